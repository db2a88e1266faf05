"""rlsync as a library: a trainer of one's own keeps a vLLM engine equal to its Megatron ranks.

    source scripts/bootstrap.sh
    VLLM_LOGGING_LEVEL=ERROR torchrun --nproc-per-node 2 examples/library/sync_engine.py MODEL

MODEL is a local Hugging Face folder of a supported family. Two ranks, TP=2; rank 0 also owns the engine. Without GPUs
everything runs on the CPU: Megatron on gloo, vLLM's CPU build, weights through shared memory.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

# docs: begin
from rlsync import AutoBridge, MegatronSource, SyncConfig, Topology, WeightSyncer
from rlsync.engine import Engine
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import destroy_parallel, initialize_parallel
from rlsync.megatron.train import train_step

# docs: end


def main(hf_path: str) -> None:
    # docs: begin
    initialize_parallel(Topology(tp_size=2), seed=1, timeout_s=300)
    bridge = AutoBridge.from_pretrained(hf_path)
    models = bridge.get_model(weight_path=hf_path, bf16=False)  # this rank's chunks, wrapped in Megatron's DDP, in fp32
    optimizer = build_optimizer(models, OptimizerOptions(lr=1e-3))  # or your own trainer's

    rank = dist.get_rank()
    engines = [start_engine(hf_path)] if rank == 0 else []
    syncer = WeightSyncer(
        MegatronSource(bridge, models),
        engines,
        SyncConfig(bucket_bytes=2**20, timeout_s=120),
        rank=rank,
        world_size=dist.get_world_size(),
        broadcast=broadcast_bytes,
    )
    syncer.connect()  # once: plan, shared memory, every name checked against the engine's model
    for version in range(3):
        report = syncer.sync(version)  # on every rank; raises the same WeightSyncError on all of them
        for engine in engines:
            ((completion,),) = engine.generate([[5, 6, 7]], {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True})
            print(f"version {completion.version}: {report.bytes} bytes in {report.seconds:.3f} s, tokens {completion.token_ids}")
        tokens = torch.randint(4, 27, (4, 16), generator=torch.Generator().manual_seed(version))
        train_step(models, optimizer, [{"tokens": tokens}], lambda scores, batch: (-scores.log_probs.mean(), {}))
    num_tensors = sum(1 for _ in bridge.export_weights(models))  # collective: full tensors under their HF names, in layer order
    # docs: end
    if rank == 0:
        print(f"exported {num_tensors} tensors")
    syncer.close()
    for engine in engines:
        engine.close()
    destroy_parallel()


def start_engine(hf_path: str) -> Engine:
    """A vLLM engine without weights: it refuses to generate until its first sync."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    engine = Engine(
        "engine 0",
        {"model": hf_path, "dtype": "float32", "load_format": "dummy", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8},
    )
    engine.start()
    return engine


def broadcast_bytes(payload: bytes) -> bytes:
    """Rank 0's payload on every rank."""
    box = [payload]
    dist.broadcast_object_list(box, src=0)
    return box[0]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
