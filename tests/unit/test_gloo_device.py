"""Claims about the thread that gloo groups share: counted in a process of its own, whose class of groups is changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import HANG_S

REPO = Path(__file__).resolve().parents[2]
NUM_GROUPS = 5
SCRIPT = f"""
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed
from rlsync.transport.gloo_device import share_gloo_device

def loops(least):
    # A thread gives itself its name, when it runs.
    time.sleep(0.2)
    while (found := count()) < least:
        time.sleep(0.01)
    return found

def count():
    return sum((task / "comm").read_text().startswith("gloo_tcp_loop") for task in Path("/proc/self/task").iterdir())

def make_groups():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=50))
    groups = [distributed.new_group([0], timeout=timedelta(seconds=7)) for _ in range({NUM_GROUPS - 1})]
    for group in groups:
        distributed.all_reduce(torch.ones(1), group=group)
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)

if sys.argv[1] == "shared":
    share_gloo_device()
    share_gloo_device()
make_groups()
print(loops(int(sys.argv[2])))
distributed.destroy_process_group()
sys.stdout.flush()
if sys.argv[1] == "shared" and os.fork() == 0:
    # The thread of its parent is not here.
    make_groups()
    print(loops(1))
    sys.stdout.flush()
    os._exit(0)
elif sys.argv[1] == "shared":
    assert os.wait()[1] == 0
"""


def said(how: str, least: int, **environment: str) -> list[int]:
    """Numbers of threads that a process with five groups has for their connections, when they are ``least``; and one that was forked
    from it."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(least)], cwd=REPO, env={"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


def test_groups_of_a_process_share_a_thread_and_those_of_a_fork_have_their_own() -> None:
    assert said("shared", 1) == [1, 1]


@pytest.mark.parametrize(("how", "environment"), [("apart", {}), ("shared", {"GLOO_SOCKET_IFNAME": "lo"})])
def test_each_group_has_a_thread_where_nobody_asked_or_somebody_chose_the_interface(how: str, environment: dict[str, str]) -> None:
    assert said(how, NUM_GROUPS, **environment)[0] == NUM_GROUPS
