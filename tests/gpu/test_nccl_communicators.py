"""NCCL groups themselves on real GPUs: the right bytes at the speed of the link, and an end of every wait. No engine.

The output of every rank is printed: when it did what, how fast, and the stacks of a rank that was stuck.
"""

from __future__ import annotations

import re

import pytest

from tests.ranks import run_ranks


def run(world_size: int, function: str, **arguments: object) -> list[str]:
    outputs = run_ranks(world_size, "tests.gpu.nccl_ranks", function, timeout_s=100, **arguments)
    print("\n".join(f"--- rank {rank}\n{output}" for rank, output in enumerate(outputs)))
    return outputs


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("megabytes", "num_steps"), [(1, 1), (64, 5), (4096, 16)])
def test_what_is_sent_lands_and_the_next_sync_too(tmp_path, megabytes, num_steps):
    outputs = run(2, "carry", folder=str(tmp_path), megabytes=megabytes, num_steps=num_steps, rounds=5)
    assert outputs[1].count("LANDED") == 5


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
def test_where_the_time_of_a_step_goes(tmp_path):
    """Prints ``SPEED`` lines; two slots are to reach most of what messages alone do."""
    outputs = run(2, "speeds", folder=str(tmp_path))
    found = {label: max(map(float, speeds)) for label, speeds in _speeds(outputs[1]).items()}
    assert found["slots 2"] >= 0.7 * found["messages of 256 MiB alone"], found


def _speeds(output: str) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for label, speed in re.findall(r"SPEED (.*?): .*?([\d.]+) GB/s", output):
        rows.setdefault(label, []).append(speed)
    return rows


@pytest.mark.gpu(4)
@pytest.mark.timeout(120)
def test_two_actor_ranks_and_two_workers_exchange_rows_for_columns(tmp_path):
    outputs = run(4, "carry", folder=str(tmp_path), megabytes=4096, num_steps=16, rounds=5)
    assert [output.count("LANDED") for output in outputs] == [0, 0, 5, 5]


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
def test_a_worker_that_waits_is_let_go_and_the_next_group_is_right(tmp_path):
    outputs = run(2, "give_up", folder=str(tmp_path))
    assert "LET GO" in outputs[1] and "RIGHT" in outputs[1]


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
def test_a_dead_actor_is_noticed_and_the_device_goes_on(tmp_path):
    outputs = run(2, "die", folder=str(tmp_path))
    assert "NOTICED" in outputs[1] and "the GPU still works" in outputs[1]
