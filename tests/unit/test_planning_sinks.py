"""How a plan's buckets depend on how workers take them in."""

from __future__ import annotations

import pytest

from rlsync.coordinator.messages import Recorded, Reports
from rlsync.layout.geometry import Placement, TensorSpec, whole_tensors
from rlsync.sync.config import SyncConfig
from rlsync.sync.planning import plan_connection
from tests.unit.test_planning_ipc import TENSORS, actor, worker


@pytest.mark.parametrize("sink", ["direct+layerwise", "layerwise", "loaders"])
def test_buckets_are_as_large_as_the_largest_tensor(sink: str) -> None:
    """One tensor is four times as large as each of the others, and of these each is a whole bucket as it is asked for."""
    tensors = [TensorSpec("large", "bfloat16", (256, 32)), *TENSORS[:7]]
    reports = Reports(
        tuple(actor(rank, f"a{rank}", "stable") for rank in range(2)),
        tuple(worker(number, f"a{number}") for number in range(2)),
        tuple(Recorded(whole_tensors(f"worker {number}", tensors), sink) for number in range(2)),
    )
    replicas = [whole_tensors(f"actor {rank}", tensors) for rank in range(2)]
    made = plan_connection(tensors, replicas, reports, SyncConfig(bucket_bytes=TENSORS[0].nbytes))
    assert len(made.parts) == 3
    assert max(part.nbytes for row in made.parts for part in row) == tensors[0].nbytes


def test_a_worker_that_takes_nothing_does_not_keep_others_from_being_planned() -> None:
    reports = Reports(
        (actor(0, "a0", "stable"),),
        tuple(worker(number, f"a{number}") for number in range(2)),
        (Recorded(whole_tensors("worker 0", TENSORS), "layerwise"), Recorded(Placement("worker 1", (), ()), "")),
    )
    made = plan_connection(TENSORS, [whole_tensors("actor 0", TENSORS)], reports, SyncConfig())
    assert [sum(row[d].nbytes > 0 for row in made.parts) for d in made.destination_of] == [len(made.parts), 0]
