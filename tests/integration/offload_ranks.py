"""What the ranks of ``test_offload`` do; each function runs on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlsync.errors import RlsyncError
from rlsync.megatron.model import iter_parameters
from rlsync.megatron.offload import PARTS, ActorMemory, Part
from rlsync.megatron.parallel import compute_device, destroy_parallel
from tests.integration.megatron_ranks import Actor


def goes_on_bitwise(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Two steps, everything to the host and back in the order of a collocated step, two steps: as without, bit for bit."""
    for case in cases:
        expected = models[case["model"]]
        undisturbed, bits = _run(case, expected, moves=False)
        moved, same = _run(case, expected, moves=True)
        assert moved == undisturbed, f"{case}: {moved} with offloading, {undisturbed} without"
        assert same == bits, f"{case}: weights differ after offloading"
        spoiled, _ = _run(case, expected, moves=True, spoil="optimizer")
        assert spoiled[0] == undisturbed[0], "the first loss comes from the weights alone"
        assert spoiled != undisturbed, "negative control: moments of zero went unnoticed"
        print(f"OFFLOADED {case['model']} {case['topology']}", flush=True)


def _run(case: Mapping[str, Any], expected: Mapping[str, Any], *, moves: bool, spoil: Part | None = None) -> tuple[list[Any], str]:
    actor = Actor(expected["folder"], case)
    actor.steps(expected["batch"], 2)
    memory = ActorMemory(actor.models, actor.optimizer)
    if moves:
        for _ in range(2):
            _away_and_back(actor, memory, spoil)
    else:
        actor.digest()  # both read the weights here
    results, digest = actor.steps(expected["batch"], 2), actor.digest()
    dist.barrier()
    destroy_parallel(keep_distributed=True)
    return results, digest


def _away_and_back(actor: Actor, memory: ActorMemory, spoil: Part | None) -> None:
    parameters = [p for _, _, _, p in iter_parameters(actor.models)]
    before, nbytes = actor.digest(), sum(p.nbytes for p in parameters)
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    given = memory.offload("grads", "optimizer")
    assert given >= nbytes and memory.is_resident("weights") and not memory.is_resident("grads")
    assert actor.digest() == before, "a sync reads weights while the rest is away"
    weights = memory.offload("weights", "optimizer")
    assert weights >= nbytes and not any(p.untyped_storage().nbytes() for p in parameters)
    if torch.cuda.is_available():
        freed = held - torch.cuda.memory_allocated()
        assert freed >= given + weights, f"{freed} bytes free after {given + weights} were given back"
    with pytest.raises(RlsyncError, match=r"are offloaded .*: onload them before they are synced"):
        actor.digest()
    if spoil is not None:
        for piece in memory._host[spoil]._pieces:
            piece.zero_()
    assert memory.onload("weights") == weights
    assert actor.digest() == before, "the weights are not those that went"
    assert memory.onload(*PARTS) == given and memory.onload(*PARTS) == 0
    assert all(p.device == compute_device() for p in parameters)
