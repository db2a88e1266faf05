"""Engines for GPU tests: started small and on chosen GPUs, and what can be asked of them. Owns no test."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlsync.sync import SyncReport
from tests.inspection import inspect_engines

if TYPE_CHECKING:
    # Ranks of an actor come by here, and would import vLLM for nothing.
    from rlsync.engine.handles.local import Engine

# Specs of an actor's layers that can be built here; TransformerEngine's takes a GPU besides, as all of these tests do.
LAYERS = ("local", "te") if importlib.util.find_spec("transformer_engine") else ("local",)
# Named, because what vLLM finds out at its start is wrong where others take memory meanwhile.
KV_CACHE_BYTES = 2**28
PROMPTS = [[5, 17, 99, 3], [130, 2, 64], [7] * 12, [50]]
GREEDY = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "logprobs": 0}
# By worker: path -> hash.
State = list[dict[str, str]]
# By prompt: tokens and their log-probabilities.
Answers = list[tuple[tuple[int, ...], tuple[float, ...]]]


@contextlib.contextmanager
def only_gpus(indices: str) -> Iterator[None]:
    """Engines that are started meanwhile see these GPUs, of those that this one sees, as ``"0,1"``, and do without multicast.

    Not every host has it.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = indices if not seen else ",".join(seen.split(",")[int(i)] for i in indices.split(","))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", names)
        patch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
        yield


def start(engine_id: str, folder: Path, gpus: str, **options: Any) -> Engine:
    """An engine with a worker on each of ``gpus``."""
    from rlsync.engine.handles.local import Engine

    made = Engine(engine_id, {
        "model": str(folder), "max_model_len": 64, "max_num_seqs": 8, "skip_tokenizer_init": True, "disable_log_stats": True,
        "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": KV_CACHE_BYTES, "tensor_parallel_size": len(gpus.split(",")),
        "worker_extension_cls": f"{__name__}.{Asked.__name__}", **options,
    })  # fmt: skip
    with only_gpus(gpus):
        made.start()
    return made


def state(engine: Engine) -> State:
    """Hashes of all that each worker computes from."""
    found = inspect_engines([engine])
    return [found[place] for place in sorted(found)]


def answers(engine: Engine) -> Answers:
    """Greedy, one prompt after the other, so that every batch is the same each time."""
    found = [engine.generate([prompt], GREEDY, timeout_s=60)[0][0] for prompt in PROMPTS]
    return [(one.token_ids, one.logprobs) for one in found]


def worst(one: Answers, other: Answers) -> float:
    """Largest difference of log-probabilities; the tokens are the same."""
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
    return max(abs(x - y) for (_, a), (_, b) in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


class Asked:
    """What vLLM's workers can do besides, as their ``worker_extension_cls``."""

    model_runner: Any

    def tell_addresses(self) -> dict[str, int]:
        """Of all parameters and buffers."""
        model = self.model_runner.model
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return {name: tensor.data_ptr() for name, tensor in tensors}

    def tell_pid(self) -> int:
        return os.getpid()

    def load_adapter(self, folder: str, adapter_id: int) -> None:
        """vLLM's own way of a PEFT folder into a slot."""
        from vllm.lora.request import LoRARequest

        self.model_runner.add_lora(LoRARequest("folder", adapter_id, folder))


def addresses(engine: Engine) -> list[dict[str, int]]:
    """Of all parameters and buffers of each worker."""
    return engine.call_workers("tell_addresses", (), 30)


def told(report: SyncReport) -> str:
    """A report in a line."""
    return (
        f"{report.transport} {'+'.join(report.sinks)} {report.bytes} B in {report.num_buckets} buckets, {report.bytes_by_link}: "
        f"{report.seconds * 1e3:.1f} ms (pause {report.pause_s * 1e3:.1f}, begin {report.begin_s * 1e3:.1f}, "
        f"transfer {report.transfer_s * 1e3:.1f}, pull {report.pull_s * 1e3:.2f}, verify {report.verify_s * 1e3:.2f}, "
        f"commit {report.commit_s * 1e3:.1f}, resume {report.resume_s * 1e3:.1f}), extra {report.extra_bytes} B"
    )
