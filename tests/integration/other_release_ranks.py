"""Ranks with the Megatron-Core that PYTHONPATH names, in a module of its own: others are forked from a process that has the usual one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron.core
import torch.distributed as dist

from rlsync.megatron.parallel import destroy_parallel
from tests.integration.megatron_ranks import Actor


def go_on(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], root: str, release: str, saves: bool) -> None:
    """Two steps and a save, or a load; then two steps, after which every rank has the bits that it had when it saved."""
    assert megatron.core.__version__ == release, f"{megatron.core.__version__} is imported, and {release} was asked for"
    for index, case in enumerate(cases):
        expected, place = models[case["model"]], Path(root, str(index))
        actor = Actor(expected["folder"], case, load=saves)
        bits = Path(root, f"{index}-{dist.get_rank()}.bits")
        if saves:
            actor.steps(expected["batch"], 2)
            actor.save(str(place), step=2)
        else:
            actor.load(str(place))
        at_save = actor.digest()
        losses = [repr(step.metrics["loss"]) for step in actor.steps(expected["batch"], 2)]
        found = "\n".join([at_save, *losses, actor.digest()])
        if saves:
            bits.write_text(found)
        assert bits.read_text() == found, f"{case}: saved by another release, and trained on otherwise by {release}"
        print(f"TRAINED {case['model']} {case['topology']}", flush=True)
        destroy_parallel(keep_distributed=True)
