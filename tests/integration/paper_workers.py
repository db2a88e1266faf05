"""What vLLM's own loaders make of tiny models, beside what paper says. Runs in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

from rlsync.layout.geometry import Placement
from rlsync.layout.recorded import placement_of
from rlsync.models import model_of
from rlsync.models.paper import paper_worker
from tests.integration.recorder_models import Worker, engine_config, start_ranks, virtual_rank


def compare(folders: dict[str, str], sizes: dict[str, list[int]], report: str) -> None:
    """Write, for each family, size and rank, what differs between the recorded placement and that on paper."""
    start_ranks(engine_config(next(iter(folders.values()))), 0, 1)
    found = {
        f"{family} {rank}/{size}": _differences(folder, rank, size)
        for family, folder in folders.items()
        for size in sizes[family]
        for rank in range(size)
    }
    Path(report).write_text(json.dumps(found))


def _differences(folder: str, rank: int, size: int) -> list[str]:
    model = model_of(json.loads((Path(folder) / "config.json").read_text()))
    with virtual_rank(rank, size):
        worker = Worker(folder)
        specs = list(model.tensors())
        recording = worker.record(specs)
    recorded, findings = placement_of("worker", specs, recording.buffers, recording.writes)
    on_paper = paper_worker(model, rank, size, holder="worker", dtype="bfloat16")
    # A paper of another rank shows that the comparison sees what it should.
    assert size == 1 or _unlike(recorded, paper_worker(model, (rank + 1) % size, size, holder="worker", dtype="bfloat16"))
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
