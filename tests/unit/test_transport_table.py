"""Claims about what a transport is: a module and a row of a table."""

from __future__ import annotations

import inspect

import pytest

from rlsync.errors import ConfigError
from rlsync.plan.transports import TRANSPORTS, TransportRow, fills_buckets, in_one_group, in_place
from rlsync.sync import SyncConfig
from rlsync.transport.ends import Receiver, Sender, Transport, transport
from tests.mailbox import BOXES
from tests.thread_actors import SIZES, Actors, holds
from tests.thread_engines import ThreadEngine


def members(protocol: type) -> set[str]:
    return {name for name, value in vars(protocol).items() if not name.startswith("_") and (callable(value) or isinstance(value, property))}


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_row_names_a_module_with_both_ends(name: str) -> None:
    module = transport(name)
    assert {name for name in members(Transport) if not callable(getattr(module, name, None))} == set()
    assert members(Sender) <= set(dir(_made(module.make_sender)))
    assert members(Receiver) <= set(dir(_made(module.make_receiver))) | {"lands_ahead"}, "a group's is of its communicator"


def _made(make: object) -> type:
    """The class that a function says it returns."""
    returned = inspect.signature(make).return_annotation  # type: ignore[arg-type]
    found = vars(inspect.getmodule(make))[returned]
    assert isinstance(found, type)
    return found


def test_a_new_transport_is_a_file_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is tests/mailbox.py. It plans, connects, exports, carries, fails and goes on as others do."""
    with pytest.raises(ConfigError, match="known are auto, ipc, shm, nccl, gloo"):
        SyncConfig(transport="mailbox")
    monkeypatch.setitem(TRANSPORTS, "mailbox", TransportRow("mailbox", "tests.mailbox"))
    engine = ThreadEngine("near")
    actors = Actors([engine], transport="mailbox", verify="full")
    actors.connect()
    assert len(BOXES) == 2
    for version in (1, 2, 3):
        report = actors.sync(version)
        assert holds(engine, version)
        assert not holds(engine, version + 1)
    assert (report.transport, report.num_buckets) == ("mailbox", len(SIZES))
    engine.on_hold = lambda worker, weights: weights["w2"].neg_() if worker == 1 else None
    assert actors.failure(lambda s: s.sync(4)).phase == "verify"
    engine.on_hold = lambda worker, weights: None
    actors.sync(5)
    assert holds(engine, 5)
    actors.close()
    assert not BOXES


def test_a_connection_has_one_group_of_the_least_preferred_transport() -> None:
    assert in_one_group(["ipc", "nccl", "shm", "gloo"]) == ("ipc", "gloo", "shm", "gloo")
    assert in_one_group(["nccl", "ipc"]) == ("nccl", "ipc")


@pytest.mark.parametrize(
    ("transports", "is_direct", "staged", "way", "fills"),
    [
        (["ipc"], True, False, "read", False),
        (["ipc"], True, True, "read", True),
        (["ipc"], False, False, "", True),
        (["nccl", "nccl"], True, False, "steps", False),
        (["nccl", "shm"], True, False, "", True),
        (["shm"], True, False, "", True),
        (["gloo"], True, False, "", True),
    ],
)
def test_what_goes_from_parameters_to_parameters_fills_no_buckets(
    transports: list[str], is_direct: bool, staged: bool, way: str, fills: bool
) -> None:
    assert in_place(transports, is_direct=is_direct) == way
    assert fills_buckets(transports, is_direct=is_direct, staged=staged) == fills
