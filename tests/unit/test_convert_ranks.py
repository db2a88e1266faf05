"""How processes of one conversion divide files and wait for each other: threads stand for them, and a store in memory for torchrun's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from rlsync.convert.ranks import Ranks
from rlsync.errors import CheckpointError, ConfigError
from tests.deadlines import HANG_S
from tests.ranks import free_port


def test_every_file_is_filled_by_one_process_and_none_has_much_more_than_another():
    sizes = [5, 70, 20, 20, 20, 10, 0, 60]
    for world in (1, 2, 3, 11):
        shares = [Ranks(HashStore(), rank, world).share(sizes) for rank in range(world)]
        assert sorted(number for share in shares for number in share) == list(range(len(sizes)))
        filled = [sum(sizes[number] for number in share) for share in shares]
        assert max(filled) - min(filled) <= max(sizes), (world, filled)


def test_the_error_of_one_is_raised_on_all():
    store, begun = HashStore(), threading.Event()

    def fail() -> None:
        with Ranks(store, 1, 3).together():
            begun.wait(HANG_S)
            raise CheckpointError("no room")

    def wait(rank: int) -> str:
        ranks = Ranks(store, rank, 3, silence_s=HANG_S)
        try:
            with ranks.together():
                begun.set()
                ranks.wait("all is copied")
        except CheckpointError as error:
            return str(error)
        return "nothing was raised"

    with ThreadPoolExecutor(3) as pool:
        failing, *waiting = pool.submit(fail), pool.submit(wait, 0), pool.submit(wait, 2)
        assert {task.result(HANG_S) for task in waiting} == {"process 1 of 3: no room"}
        assert isinstance(failing.exception(HANG_S), CheckpointError)


def test_a_silent_one_and_one_that_was_asked_for_something_else_are_named():
    with pytest.raises(CheckpointError, match=r"process 1 of 2 said nothing for 0\.2 s, before the files are made"):
        Ranks(HashStore(), 0, 2, silence_s=0.2).wait("the files are made")

    store = HashStore()

    def same(rank: int) -> None:
        Ranks(store, rank, 2, silence_s=HANG_S).same("request", f"of {rank}")

    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(same, rank) for rank in (0, 1)]:
            assert "give all the same arguments and files" in str(task.exception(HANG_S))


def test_an_environment_that_lacks_something_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2 in the environment, and MASTER_ADDR, MASTER_PORT, RANK not there"):
        Ranks.from_environment()


@pytest.mark.parametrize(("rank", "size"), [("3", "2"), ("-1", "2"), ("0", "0"), ("x", "2")])
def test_a_rank_of_no_group_is_refused_instead_of_waited_for(monkeypatch, rank, size) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"RANK is {rank} and WORLD_SIZE {size} in the environment, and ranks count from 0"):
        Ranks.from_environment(silence_s=1)
