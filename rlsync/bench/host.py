"""The process of one engine: ``python -m rlsync.bench.host SPEC INDEX``, an index into ``Spec.hosts``. Owns what the engine is
started with.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from typing import Any

from rlsync.bench import spec as specs
from rlsync.bench.remote import serve
from rlsync.engine.handles.adapters import lora_arguments
from rlsync.sync.config import LoraSync

# Of an engine that answers a handful of short prompts at most: what is measured is its weights.
_MAX_TOKENS = 512
_MAX_REQUESTS = 8
_KV_CACHE_BYTES = 2**30
# As many as those requests fill where a block holds 16 tokens; on CPU it holds more.
_NUM_CPU_BLOCKS = _MAX_REQUESTS * _MAX_TOKENS // 16
# CUDA context, activations, and the buffers that vLLM makes at start.
_BESIDE_BYTES = 6 * 2**30
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def environment(spec: specs.Spec, host: int) -> dict[str, str]:
    """Environment variables for an engine's process, which torch and vLLM read when they are imported. What the caller has set wins."""
    added = dict(_ENVIRONMENT)
    if not spec.cuda_graphs:
        added["TORCH_COMPILE_DISABLE"] = "1"
    if find_spec("flashinfer") is None:
        added["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if "vllm-ipc" in spec.peers:
        # vLLM's ipc backend takes its handles as a pickle.
        added["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    merged = {**added, **os.environ}
    if spec.on_gpu:
        merged["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices[gpu] for gpu in spec.engine_gpus[spec.hosts[host][1]])
    return merged


def engine_arguments(spec: specs.Spec, lora: LoraSync, weight_bytes: int, gpu_bytes: int | None) -> dict[str, Any]:
    """Fields of AsyncEngineArgs. ``lora``: what the engine takes. ``weight_bytes``: of the whole model, and of adapters in all places
    where the engine has them. ``gpu_bytes``: of one GPU, None on CPU.
    """
    arguments: dict[str, Any] = {
        "model": spec.folder, "dtype": "bfloat16", "load_format": "dummy", "seed": spec.seed,
        # What makes pictures into tokens knows these by their text.
        "skip_tokenizer_init": "vision_config" not in spec.config,
        "tensor_parallel_size": spec.engine_tp, "enable_expert_parallel": spec.engine_ep > 1,
        "enforce_eager": not spec.cuda_graphs, "disable_log_stats": True,
        "max_model_len": _MAX_TOKENS, "max_num_batched_tokens": _MAX_TOKENS, "max_num_seqs": _MAX_REQUESTS,
        "worker_extension_cls": "rlsync.bench.worker.PeerWorker",
    }  # fmt: skip
    if lora == "adapter":
        arguments |= lora_arguments(spec.lora_r)
    if gpu_bytes is not None:
        # With the cache's size given vLLM does not measure free memory, which the actor changes at the same time.
        needed = weight_bytes / spec.engine_tp * 1.1 + _KV_CACHE_BYTES + _BESIDE_BYTES
        arguments |= {"kv_cache_memory_bytes": _KV_CACHE_BYTES, "gpu_memory_utilization": min(0.9, max(0.05, needed / gpu_bytes))}
    else:
        # vLLM writes zeros to all of the cache, on CPU to a GiB at least.
        arguments["num_gpu_blocks_override"] = _NUM_CPU_BLOCKS
    return arguments


def main(path: str, index: str) -> None:
    spec = specs.read(path)
    from rlsync.engine.handles.local import Engine
    from rlsync.models import model_of
    from rlsync.models.lora import adapters_of

    floors = json.loads(specs.await_file(spec.floors_path, spec.start_s))
    model, lora = model_of(spec.config), spec.hosts[int(index)][0]
    weight_bytes = sum(tensor.nbytes for tensor in model.tensors("bfloat16"))
    if lora == "adapter":
        assert spec.lora is not None
        # Two slots, and what lands beside them.
        weight_bytes += 3 * sum(tensor.nbytes for tensor in adapters_of(model, spec.lora).tensors(model, "bfloat16"))
    engine = Engine(f"engine{index}", engine_arguments(spec, lora, weight_bytes, floors["gpu_bytes"]))
    engine.start()
    serve(engine, spec.socket(int(index)), spec.token)


if __name__ == "__main__":
    main(*sys.argv[1:])
