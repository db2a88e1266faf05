"""Failures of worker processes under real Ray: one error that names who, in what, why, and where it printed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from rlsync.errors import CheckpointError, RlsyncError
from workers.cluster import Cluster
from workers.logs import keep_own_log
from workers.remote import Worker, WorkerDiedError, collect


class Rank:
    def __init__(self) -> None:
        keep_own_log()

    def echo(self, value: int) -> int:
        print(f"echo {value}", flush=True)
        return value

    def hang(self) -> None:
        time.sleep(600)

    def refuse(self) -> None:
        raise CheckpointError("iter_0000007 was saved with TP 4; this run has 2")

    def break_down(self, after_s: float) -> None:
        time.sleep(after_s)
        raise ZeroDivisionError("division by zero")

    def die(self, after_s: float) -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster.start(log_folder=tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture(scope="module")
def ranks(cluster) -> list[Worker]:
    return [cluster.launch(Rank, f"Ranks:{i}", (i,), name=f"actor rank {i}") for i in range(4)]


def test_results_come_in_the_order_of_the_calls(ranks):
    assert collect([rank.call("echo", i) for i, rank in enumerate(ranks)]) == [0, 1, 2, 3]
    assert "echo 2" in Path(ranks[2].log).read_text()


def test_an_error_of_ours_arrives_as_it_was_raised(ranks):
    with pytest.raises(CheckpointError) as caught:
        collect([ranks[0].call("echo", 1), ranks[1].call("refuse")])
    assert str(caught.value) == "iter_0000007 was saved with TP 4; this run has 2"


def test_any_other_error_names_rank_call_and_log_and_keeps_its_traceback(ranks):
    with pytest.raises(RlsyncError, match=r"actor rank 1 failed in break_down: ZeroDivisionError: division by zero") as caught:
        collect([ranks[0].call("echo", 1), ranks[1].call("break_down", 0.0)])
    assert "in break_down" in str(caught.value) and f"its log: {ranks[1].log}" in str(caught.value)


def test_a_dead_rank_is_named_although_another_complains_first_and_a_third_hangs(ranks):
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"actor rank 3 \(process \d+\) ended during die") as caught:
        collect([ranks[1].call("break_down", 0.0), ranks[2].call("hang"), ranks[3].call("die", 0.5)])
    assert time.monotonic() - began < 20 and ranks[3].log in str(caught.value)
