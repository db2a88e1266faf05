"""What a child process of the sink tests does: says which layers of an engine in it loaders do not write where they live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm import LLM

from rlsync.engine.compat import engine as compat
from rlsync.engine.recorder import record
from rlsync.engine.sinks.choice import not_in_place
from rlsync.layout.geometry import TensorSpec
from tests.gpu.engines import KV_CACHE_BYTES
from tests.integration.engine_source import read_folder


def run(folder: str, report: str) -> None:
    """Paths of layers, as JSON in ``report``. Once in a process: vLLM keeps the groups of its first engine."""
    Path(report).write_text(json.dumps(rebuilt(Path(folder))))


def rebuilt(folder: Path) -> list[str]:
    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 8, "skip_tokenizer_init": True, "enforce_eager": True}
    options |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": KV_CACHE_BYTES, "disable_log_stats": True}
    llm = LLM(str(folder), dtype="bfloat16", **options)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    specs = [TensorSpec(n, "bfloat16", tuple(t.shape)) for n, t in read_folder(folder).items()]
    with compat.config_scope(runner.vllm_config):
        recording = record(runner.model, specs)
    layers = {id(layer) for layer in not_in_place(runner.model, [b.name for b in recording.buffers], (), recording.aliases)}
    return [path for path, layer in runner.model.named_modules() if id(layer) in layers]
