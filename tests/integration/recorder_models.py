"""Models that vLLM's own loaders made of a checkpoint, packed and plain, as real ranks and as virtual ones."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import base_loader, get_model
from vllm.platforms import current_platform

from rlsync.copy.cpu import bind, write_padding
from rlsync.engine.recorder import Recording, record
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.layout.recorded import placement_of
from rlsync.plan.planner import build_plan


def engine_config(folder: str | Path, **options: Any) -> Any:
    """A config of its own for each call: a model leaves its layers in it."""
    return copy.deepcopy(_engine_config(str(folder), tuple(sorted(options.items()))))


@functools.cache
def _engine_config(folder: str, options: tuple[tuple[str, Any], ...]) -> Any:
    defaults = {"skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 64, "enforce_eager": True}
    return EngineArgs(model=folder, **defaults, **dict(options)).create_engine_config()


def start_ranks(config: Any, rank: int, world_size: int) -> None:
    """Make this process a rank of vLLM's tensor-parallel group, as its workers do."""
    if current_platform.is_cpu():
        import vllm.v1.worker.cpu.shm  # noqa: F401  # makes the loader's calls to torch.accelerator do nothing

        # Where the processor has AVX-512 ranks talk through shared memory of this name, which vLLM's workers set themselves.
        os.environ["VLLM_DIST_IDENT"] = os.environ["MASTER_PORT"]
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(world_size, rank, "env://", rank, backend=current_platform.dist_backend)
        parallel_state.ensure_model_parallel_initialized(world_size, 1)


@contextlib.contextmanager
def virtual_rank(rank: int, world_size: int) -> Iterator[None]:
    """For the moment, this process is one of ``world_size`` ranks. Loading a model asks for both numbers and sends nothing."""
    group = parallel_state.get_tp_group()
    with mock.patch.object(group, "rank_in_group", rank), mock.patch.object(group, "world_size", world_size):
        yield


class Worker:
    """One worker's model, loaded by vLLM, and the HF tensors it was loaded from. ``plain``: nothing is post-processed."""

    def __init__(self, folder: str | Path, *, plain: bool = False, **options: Any) -> None:
        self.tensors = load_file(Path(folder) / "model.safetensors")
        self.specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in self.tensors.items()]
        self.config = engine_config(folder, **options)
        with set_current_vllm_config(self.config), contextlib.ExitStack() as stack:
            # Each model would take longer to walk through all that was imported than to load.
            stack.enter_context(mock.patch.object(base_loader, "gc"))
            if plain:
                stack.enter_context(mock.patch.object(base_loader, "process_weights_after_loading", return_value=None))
            self.model = get_model(vllm_config=self.config)

    def record(self, specs: list[TensorSpec] | None = None) -> Recording:
        with set_current_vllm_config(self.config):
            return record(self.model, self.specs if specs is None else specs)

    def held(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers under all of their names."""
        return dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers(remove_duplicate=False))


def executed(recording: Recording, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Buffers filled by a plan over the recorded placement, and the findings about the others."""
    specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
    placement, findings = placement_of("worker", specs, recording.buffers, recording.writes)
    plan = build_plan(specs, [whole_tensors("hf", specs)], [placement], transforms=("cast",))
    buffers = {b.name: torch.full(b.shape, 7, dtype=getattr(torch, b.dtype)) for b in placement.buffers}
    write_padding(placement.padding, buffers)
    bind((c for bucket in plan.buckets for c in bucket.copies), tensors, buffers).run()
    return buffers, tuple(map(str, findings))


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Buffers of which a bit, the shape or the dtype is not as wanted."""
    return [name for name, tensor in found.items() if not same_bits(tensor, wanted[name])]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (one, other)))
