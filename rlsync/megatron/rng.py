"""Random state of a rank: Python's, numpy's, torch's, and Megatron's tracked generators, as plain containers.

Must not know models or files.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from rlsync.megatron.parallel import compute_device


def gathered_rng_states() -> list[dict[str, Any]]:
    """Random state of each rank of the DP group, in its order. Collective over the DP group."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, _rng_state(), group=group)
    return states


def _rng_state() -> dict[str, Any]:
    generator, keys, *rest = numpy.random.get_state()
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": (generator, keys.tolist(), *rest),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def check_rng_state(state: Mapping[str, Any]) -> None:
    """Raise what :func:`set_rng_state` would raise, from generators of its own; those of the process stay as they are."""
    random.Random().setstate(state["random_rng_state"])
    numpy.random.RandomState().set_state(_numpy_state(state))
    torch.Generator().set_state(state["torch_rng_state"])
    torch.Generator(compute_device()).set_state(state["cuda_rng_state"])
    tracked = dict(state["rng_tracker_states"])
    absent = tensor_parallel.get_cuda_rng_tracker().get_states().keys() - tracked.keys()
    if absent:
        raise LookupError(f"no generator {', '.join(sorted(absent))} in rng_tracker_states")
    for generator in tracked.values():
        torch.Generator(compute_device()).set_state(generator)


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    generator, keys, *rest = state["np_rng_state"]
    return generator, numpy.array(keys, dtype=numpy.uint32), *rest


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back the random state of one rank."""
    random.setstate(state["random_rng_state"])
    numpy.random.set_state(_numpy_state(state))
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["rng_tracker_states"]))
