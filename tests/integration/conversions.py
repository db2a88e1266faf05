"""A conversion in a process of its own, for tests that end it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlsync.convert.conversion import Journal, Request, convert
from rlsync.convert.ranks import Ranks
from rlsync.convert.sources import smallest_topology
from rlsync.engine.forking import ForkedProcess
from rlsync.layout.topology import Topology


class ConvertingProcess(ForkedProcess):
    """Forked from a process that has imported what a conversion needs."""

    preload = ("tests.integration.conversions",)


def request(source: str | Path, target: str | Path, form: str, sizes: dict[str, int] | None = None, **options: Any) -> Request:
    """A request with a topology of these sizes, with as few data-parallel ranks as there may be where they are not given."""
    topology = (Topology if "dp_size" in (sizes or {}) else smallest_topology)(**(sizes or {}))
    return Request(Path(source), Path(target), form, topology=topology, **options)  # type: ignore[arg-type]


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Those of all safetensors files in a folder."""
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def run_rank(asked: Request, silence_s: float, dies: bool = False) -> None:
    """As one of the processes that the environment says. ``dies``: it is killed as soon as a bucket of its own is on the disk."""
    torch.set_num_threads(1)
    if dies:
        add = Journal.add_bucket

        def add_and_die(journal: Journal, *bucket: int) -> None:
            add(journal, *bucket)
            os.kill(os.getpid(), signal.SIGKILL)

        Journal.add_bucket = add_and_die  # type: ignore[method-assign,assignment]
    convert(asked, ranks=Ranks.from_environment(silence_s=silence_s))


def run(asked: Request) -> None:
    torch.set_num_threads(1)
    convert(asked)
