"""What vLLM's own loaders make of tiny models, beside what paper says. Runs in a process of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from vllm.distributed import parallel_state

from rlsync.layout.geometry import Placement
from rlsync.layout.recorded import placement_of
from rlsync.models import model_of
from rlsync.models.paper import Seat
from tests.integration.recorder_models import Worker, engine_config, start_ranks, virtual_rank
from tests.paper import paper_worker


def compare(folders: dict[str, str], sizes: dict[str, list[dict[str, Any]]], report: str) -> None:
    """Write, by family, sizes of an engine (fields of Seat) and rank, what differs between the placement recorded and that on paper."""
    # vLLM makes the group of experts for models that have some.
    start_ranks(engine_config(folders["qwen3_moe"]), 0, 1)
    found = {}
    for family, folder in folders.items():
        for fields in sizes[family]:
            first = Seat(0, **fields)
            for rank in range(first.size):
                found[f"{family} {fields} {rank}"] = _differences(folder, replace(first, rank=rank))
    Path(report).write_text(json.dumps(found))


@contextlib.contextmanager
def _seated(seat: Seat) -> Iterator[None]:
    """For the moment, this process has a seat among workers that are not there."""
    group = parallel_state.get_dp_group()
    with (
        virtual_rank(seat.rank % seat.tp_size, seat.tp_size),
        mock.patch.object(group, "rank_in_group", seat.rank // seat.tp_size),
        mock.patch.object(group, "world_size", seat.dp_size),
    ):
        yield


def _differences(folder: str, seat: Seat) -> list[str]:
    model = model_of(json.loads((Path(folder) / "config.json").read_text()))
    options = {"enable_expert_parallel": True, "tensor_parallel_size": seat.tp_size} if seat.expert_parallel else {}
    if seat.dp_size > 1:
        options["data_parallel_size"] = seat.dp_size
    with _seated(seat):
        # Post-processing asks how many ranks there really are.
        worker = Worker(folder, plain=True, **options)
        specs = list(model.tensors())
        recording = worker.record(specs)
    recorded, findings = placement_of("worker", specs, recording.buffers, recording.writes)
    on_paper = paper_worker(model, seat, holder="worker", dtype="bfloat16")
    # A paper of another rank shows that the comparison sees what it should.
    other = replace(seat, rank=(seat.rank + 1) % seat.size)
    assert seat.size == 1 or _unlike(recorded, paper_worker(model, other, holder="worker", dtype="bfloat16"))
    return [*map(str, findings), *recording.findings, *_unlike(recorded, on_paper)]


def _unlike(recorded: Placement, on_paper: Placement) -> list[str]:
    parts = [("buffer", recorded.buffers, on_paper.buffers), ("piece", recorded.pieces, on_paper.pieces)]
    parts.append(("fill", recorded.padding, on_paper.padding))
    return [
        f"{kind} {side}: {part}"
        for kind, real, paper in parts
        for side, some in (("recorded only", set(real) - set(paper)), ("on paper only", set(paper) - set(real)))
        for part in sorted(some, key=str)
    ]
