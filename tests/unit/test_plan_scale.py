"""Plans of large models: within time and memory, and without work that grows faster than the model."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import experts, sides
from rlsync.gc_pause import gc_paused
from rlsync.layout.geometry import Box
from rlsync.plan.planner import build_plan
from tests.deadlines import HANG_S

ROOT = Path(__file__).resolve().parents[2]


def test_72b_from_64_ranks_to_64_workers_is_planned_within_a_gib():
    """A process of its own, since its memory counts."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.planning", "72b"], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=True
    )
    planned = json.loads(run.stdout)
    assert (planned["sources"], planned["destinations"], planned["tensors"]) == (64, 64, 963)
    assert planned["peak_mib"] <= 1024
    assert planned["redundancy"] == [1.0, 1.0]
    assert planned["copies"] == planned["pieces"] == 963 * 64, "equal tensor axes: each piece comes whole from one rank"


@pytest.mark.parametrize("expert_parallel", [True, False])
def test_work_grows_with_the_pieces_and_not_with_their_pairs(monkeypatch, expert_parallel):
    """Counted in intersections and subtractions of boxes, of which everything that could be quadratic is made."""
    calls = [0]
    for name in ("intersect", "subtract"):
        original = getattr(Box, name)

        def counted(self, other, original=original):
            calls[0] += 1
            return original(self, other)

        monkeypatch.setattr(Box, name, counted)

    def calls_per_piece(num_layers: int, num_experts: int) -> float:
        axes = {"dp_size": 4, "ep_size": 4, "pp_size": 2}
        both = sides(experts(num_layers, num_experts), axes, num_engines=2, tp_size=4, ep_size=4 if expert_parallel else 1, colocated=True)
        calls[0] = 0
        build_plan(both.tensors, both.actors, both.workers)
        return calls[0] / sum(len(p.pieces) for p in (*both.actors, *both.workers))

    small = calls_per_piece(2, 8)
    assert small > 0
    assert calls_per_piece(2, 64) < 2 * small, "eight times the experts"
    assert calls_per_piece(16, 8) < 2 * small, "eight times the layers"


def test_cycles_are_collected_again_after_plans_also_after_one_that_fails():
    assert gc.isenabled(), "tests run with collection"

    @gc_paused()
    def fail() -> None:
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "another one goes on"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gc.isenabled()
