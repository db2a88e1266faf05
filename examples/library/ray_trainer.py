"""rlsync in a trainer of one's own: Ray workers, Megatron's own process groups, and a vLLM engine in a Ray actor.

    source scripts/bootstrap.sh
    python examples/library/ray_trainer.py MODEL OUT

MODEL is a local Hugging Face folder of a supported family; OUT gets the trained weights in the same form. Two ranks with TP=2 and one
engine on this machine; on a machine with GPUs one GPU each, so three. docs/your-own-trainer.md explains it.
"""

from __future__ import annotations

import sys

# docs: begin
import ray
import torch
import torch.distributed as dist
from megatron.core import mpu, tensor_parallel

from rlsync import AutoBridge, MegatronSource, SyncConfig, WeightSyncer
from rlsync.engine import RayEngine

GPUS = 1 if torch.cuda.is_available() else 0


class Rank:
    """One Megatron rank in a Ray actor."""

    def __init__(self, rank: int, world_size: int, address: str, hf_path: str) -> None:
        dist.init_process_group("nccl" if GPUS else "gloo", init_method=address, rank=rank, world_size=world_size)
        mpu.initialize_model_parallel(tensor_model_parallel_size=world_size)
        self.bridge = AutoBridge.from_pretrained(hf_path)  # before the seed: it makes Megatron run without CUDA
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self.models = self.bridge.get_model(weight_path=hf_path, bf16=False)

    def connect(self, engines: list[RayEngine]) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        source, config = MegatronSource(self.bridge, self.models), SyncConfig(timeout_s=120)
        mine = engines if rank == 0 else []
        self.syncer = WeightSyncer(source, mine, config, rank=rank, world_size=world_size, broadcast=broadcast_bytes)
        self.syncer.connect()

    def sync(self, version: int) -> float:
        return self.syncer.sync(version).seconds

    def train(self) -> None:
        """Stands for a step of your trainer."""
        with torch.no_grad():
            for model in self.models:
                for parameter in model.parameters():
                    parameter.mul_(1.25)

    def save(self, folder: str) -> None:
        self.bridge.save_weights(self.models, folder)
        self.syncer.close()


def broadcast_bytes(payload: bytes) -> bytes:
    """Rank 0's payload on every rank."""
    box = [payload]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# docs: end


def main(hf_path: str, out: str) -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    cpu_only = {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}}
    address = f"tcp://127.0.0.1:{free_port()}"
    # docs: begin
    ranks = [ray.remote(Rank).options(num_gpus=GPUS).remote(i, 2, address, hf_path) for i in range(2)]
    arguments = {"model": hf_path, "dtype": "float32", "load_format": "dummy", "enforce_eager": True, "max_model_len": 128}
    engine = RayEngine.launch("engine 0", arguments, num_gpus=GPUS, runtime_env=cpu_only)

    def on_ranks(method: str, *args: object) -> list[object]:
        return ray.get([getattr(rank, method).remote(*args) for rank in ranks])

    on_ranks("connect", [engine])  # once; the handle travels to rank 0
    for version in range(2):
        seconds = on_ranks("sync", version)[0]
        ((completion,),) = engine.generate([[5, 6, 7]], {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True})
        print(f"version {completion.version}: {seconds:.3f} s, tokens {completion.token_ids}")
        if version == 0:
            on_ranks("train")
    on_ranks("save", out)
    engine.close()
    # docs: end
    ray.shutdown()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
