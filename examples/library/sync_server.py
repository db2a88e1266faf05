"""rlsync as a library, with an engine that runs elsewhere: a ``vllm serve`` is given this program's weights, step by step.

    source scripts/bootstrap.sh
    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend":"rlsync"}'
    torchrun --nproc-per-node 2 examples/library/sync_server.py MODEL http://127.0.0.1:8000

MODEL is a local Hugging Face folder of a supported family; the server is on the same host. docs/engines.md says more.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from rlsync import AutoBridge, MegatronSource, SyncConfig, Topology, WeightSyncer
from rlsync.engine import HttpEngine
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import destroy_parallel, initialize_parallel
from rlsync.megatron.train import train_step

GREEDY = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}


def main(hf_path: str, url: str) -> None:
    initialize_parallel(Topology(tp_size=2), seed=1, timeout_s=300)
    bridge = AutoBridge.from_pretrained(hf_path)
    models = bridge.get_model(weight_path=hf_path, bf16=False)
    optimizer = build_optimizer(models, OptimizerOptions(lr=1e-3))

    rank = dist.get_rank()
    engines = [HttpEngine(url, engine_id="server")] if rank == 0 else []
    source, config = MegatronSource(bridge, models), SyncConfig(timeout_s=120)
    with WeightSyncer(source, engines, config, rank=rank, world_size=dist.get_world_size(), broadcast=broadcast_bytes) as syncer:
        syncer.connect()
        for version in range(3):
            report = syncer.sync(version)  # the server stands still meanwhile, and stays so if this raises
            for engine in engines:
                ((completion,),) = engine.generate([[5, 6, 7]], GREEDY, timeout_s=60)
                print(
                    f"version {completion.version}: pause {report.pause_s:.3f} s, transfer {report.transfer_s:.3f} s", completion.token_ids
                )
            tokens = torch.randint(4, 27, (4, 16), generator=torch.Generator().manual_seed(version))
            train_step(models, optimizer, [{"tokens": tokens}], lambda scores, batch: (-scores.log_probs.mean(), {}))
    for engine in engines:
        engine.close()  # the server goes on with the last version
    destroy_parallel()


def broadcast_bytes(payload: bytes) -> bytes:
    """Rank 0's payload on every rank."""
    box = [payload]
    dist.broadcast_object_list(box, src=0)
    return box[0]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
