"""A conversion in a process of its own, for tests that end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlsync.convert.conversion import Request, convert
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


def run_rank(asked: Request, silence_s: float) -> None:
    """As one of the processes that the environment says."""
    torch.set_num_threads(1)
    convert(asked, ranks=Ranks.from_environment(silence_s=silence_s))


def run(asked: Request) -> None:
    torch.set_num_threads(1)
    convert(asked)
