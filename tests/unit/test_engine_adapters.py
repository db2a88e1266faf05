"""Claims about which adapters the requests of an engine run on, without an engine."""

from __future__ import annotations

import asyncio

import pytest

from rlsync.engine.handles.adapters import AdapterRequests, Served
from rlsync.errors import ConfigError, RlsyncError
from rlsync.sync import SyncConfig, WeightSyncer
from tests.thread_actors import Numbers


async def request(requests: AdapterRequests, end: asyncio.Event) -> Served:
    async with requests.running() as served:
        await end.wait()
        return served


def synced(requests: AdapterRequests, version: int) -> int:
    requests.hold()
    number = requests.next_id()
    requests.serve(version)
    return number


def test_a_request_runs_on_what_was_served_when_it_began_and_no_number_comes_twice() -> None:
    async def scene() -> None:
        requests, end = AdapterRequests(2), asyncio.Event()
        assert synced(requests, 7) == 1
        first = asyncio.create_task(request(requests, end))
        await asyncio.sleep(0)
        requests.hold()
        assert requests.in_use() == [1]
        waiting = asyncio.create_task(request(requests, end))
        # A version that fails has taken its number with it.
        assert [requests.next_id(), requests.next_id()] == [2, 3]
        await asyncio.sleep(0)
        assert requests.in_use() == [1], "one that comes in a sync runs on the version before"
        requests.serve(7)
        end.set()
        assert await first == Served(1, 7)
        assert await waiting == Served(3, 7)
        assert requests.in_use() == []
        # The next sync begins before what waited has had its turn.
        requests.hold()
        late = asyncio.create_task(request(requests, end))
        await asyncio.sleep(0)
        requests.serve(7)
        requests.hold()
        for _ in range(3):
            await asyncio.sleep(0)
        assert (late.done(), requests.in_use()) == (False, [])
        requests.serve(7)
        assert await late == Served(3, 7)
        # An engine that was paused for something else serves what it has.
        requests.hold()
        requests.serve(7)
        assert await request(requests, end) == Served(3, 7)

    asyncio.run(scene())


def test_a_version_waits_for_the_slot_of_requests_of_an_older_one() -> None:
    async def scene() -> None:
        requests, end = AdapterRequests(2), asyncio.Event()
        ends = [asyncio.Event(), asyncio.Event()]
        tasks = []
        for version, end in enumerate(ends):
            synced(requests, version)
            tasks.append(asyncio.create_task(request(requests, end)))
            await asyncio.sleep(0)
        with pytest.raises(RlsyncError, match=r"requests of 2 versions still run after 0\.01 s, and the engine holds 2"):
            await requests.make_room(0.01)
        room = asyncio.create_task(requests.make_room(60))
        await asyncio.sleep(0)
        assert not room.done()
        ends[0].set()
        await room
        assert requests.in_use() == [2]
        ends[1].set()
        await asyncio.gather(*tasks)

    asyncio.run(scene())


def test_an_engine_is_synced_as_its_source_says() -> None:
    """Else adapters would be merged, or sent to engines that have no slots, without a word."""
    with pytest.raises(ConfigError, match=r"weight_sync.lora is adapter, and the source sends no adapters; make it with lora='adapter'"):
        WeightSyncer(Numbers(0, 1), [], SyncConfig(lora="adapter"), rank=1, world_size=2, broadcast=bytes)
    for changes, words in (({"verify": "off"}, "verify is off"), ({"sink": "loaders"}, "sink is loaders")):
        with pytest.raises(ConfigError, match=words):
            SyncConfig(lora="adapter", **changes)
