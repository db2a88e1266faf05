"""How a plan's buckets depend on how workers take them in."""

from __future__ import annotations

import pytest

from rlsync.coordinator.messages import Recorded, Surveyed
from rlsync.layout.geometry import Placement, TensorSpec, whole_tensors
from rlsync.sync.config import SyncConfig
from rlsync.sync.planning import draw_up
from tests.unit.test_planning_ipc import TENSORS, actor, worker


@pytest.mark.parametrize("sink", ["direct+layerwise", "layerwise", "loaders"])
def test_buckets_are_as_large_as_the_largest_tensor(sink: str) -> None:
    """One tensor is four times as large as each of the others, and of these each is a whole bucket as it is asked for."""
    tensors = [TensorSpec("large", "bfloat16", (256, 32)), *TENSORS[:7]]
    survey = Surveyed(
        tuple(actor(rank, f"a{rank}", "lendable") for rank in range(2)),
        tuple(worker(number, f"a{number}") for number in range(2)),
        tuple(Recorded(whole_tensors(f"worker {number}", tensors), sink) for number in range(2)),
    )
    replicas = [whole_tensors(f"actor {rank}", tensors) for rank in range(2)]
    made = draw_up(tensors, replicas, survey, SyncConfig(bucket_bytes=TENSORS[0].nbytes))
    assert len(made.parts) == 3
    assert max(part.nbytes for row in made.parts for part in row) == tensors[0].nbytes


def test_a_worker_that_takes_nothing_does_not_keep_others_from_being_planned() -> None:
    survey = Surveyed(
        (actor(0, "a0", "lendable"),),
        tuple(worker(number, f"a{number}") for number in range(2)),
        (Recorded(whole_tensors("worker 0", TENSORS), "layerwise"), Recorded(Placement("worker 1", (), ()), "")),
    )
    made = draw_up(TENSORS, [whole_tensors("actor 0", TENSORS)], survey, SyncConfig())
    assert [sum(row[stream].nbytes > 0 for row in made.parts) for stream in made.stream_of] == [len(made.parts), 0]
