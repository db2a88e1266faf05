"""Claims about what a worker reads of what was exported to it. The CUDA driver is stood in for: nothing is mapped, and nothing copied."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from rlsync.coordinator.messages import RankExport, WorkerAssignment
from rlsync.errors import ConfigError
from rlsync.plan.packing import PackedPart, Region
from rlsync.transport import cuda_memory
from rlsync.transport.cuda_memory import HANDLE_BYTES, Allocation
from rlsync.transport.ipc import ExportedBuffer, IpcExport, IpcReceiver, ReceiverEnd

OWNER, HERE = 0x1000, 0x900000
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Of the driver. Allocation 7 is seen at HERE, 8 a megabyte further, and so on."""
    made: list[tuple[str, Any]] = []

    def open_one(self: cuda_memory.Mappings, allocation: Allocation) -> int:
        made.append(("open", allocation.number))
        return HERE + (allocation.number - 7) * 2**20

    monkeypatch.setattr(cuda_memory, "_use", lambda device: None)
    monkeypatch.setattr(cuda_memory, "_call", lambda name, address: made.append((name, address.value)))
    monkeypatch.setattr(cuda_memory.Mappings, "_open", open_one)
    return made


def receiver(staged: dict[int, int] | None = None) -> IpcReceiver:
    """Of a worker that reads 4 rows of 8 elements (bfloat16, 16 apart) of a parameter of actor rank 0, from its element 3 on.

    ``staged``: or, by rank, byte of the slot of its ring at which they lie, dense.
    """
    region = Region(0, "t", 0, "w", 3, (16, 1), (4, 8), "p", 0, (8, 1), "bfloat16", 0, (8, 1))
    return receiver_of((PackedPart(64, (), (region,)),), (staged or {},))


def receiver_of(parts: tuple[PackedPart, ...], staged: tuple[dict[int, int], ...]) -> IpcReceiver:
    return IpcReceiver(WorkerAssignment("digest", 1, "off", 0, parts, "ipc", b"", imports=(0,)), ReceiverEnd(staged), DEVICE)


LAST_BYTE = 2 * (3 + 3 * 16 + 8)


def export(nbytes: int, *, offset: int = 256, number: int = 7, allocation_bytes: int = 4096, stays: bool = True) -> list[RankExport]:
    allocation = Allocation(OWNER, allocation_bytes, number, bytes(HANDLE_BYTES))
    return [exported(IpcExport((allocation,), {"w": ExportedBuffer(OWNER + offset, nbytes, "bfloat16")}, stable_memory=stays))]


def exported(export: IpcExport) -> RankExport:
    return RankExport(0, msgspec.msgpack.encode(export))


def read(made: IpcReceiver, told: list[RankExport]) -> int:
    """Where the region is read."""
    made._hear(told)
    made._open()
    ((_, source),) = made._sources(0)
    return source.address


def test_a_region_is_read_where_the_owner_has_it(calls: list[tuple[str, Any]]) -> None:
    assert read(receiver(), export(LAST_BYTE)) == HERE + 256 + 2 * 3
    assert read(receiver(), export(LAST_BYTE, offset=4096 - LAST_BYTE)) == HERE + 4096 - LAST_BYTE + 2 * 3, "to the last byte"


def test_what_lies_beyond_an_export_is_not_read() -> None:
    with pytest.raises(ConfigError, match=f"actor rank 0 exports {LAST_BYTE - 2} bytes of w, and the plan reads {LAST_BYTE} of them"):
        read(receiver(), export(LAST_BYTE - 2))
    for offset in (-2, 4096 - LAST_BYTE + 2, 4096):
        with pytest.raises(ConfigError, match="lies in nothing that it exports"):
            read(receiver(), export(LAST_BYTE, offset=offset))
    with pytest.raises(ConfigError, match="does not export w"):
        read(receiver(), [exported(IpcExport())])
    with pytest.raises(ConfigError, match="has not said what it exports"):
        read(receiver(), [])


def test_memory_that_moved_is_opened_anew_and_what_is_gone_is_closed(calls: list[tuple[str, Any]]) -> None:
    made = receiver()
    assert read(made, export(LAST_BYTE)) == read(made, export(LAST_BYTE)), "and nothing is opened twice"
    assert read(made, export(LAST_BYTE, number=8)) == HERE + 2**20 + 256 + 2 * 3, "the same address in another allocation"
    assert calls == [("open", 7), ("cuIpcCloseMemHandle", HERE), ("open", 8)]


@pytest.mark.parametrize("stays", [True, False])
def test_memory_that_leaves_between_syncs_is_let_go_after_each(stays: bool, calls: list[tuple[str, Any]]) -> None:
    made = receiver()
    for _ in range(2):
        read(made, export(LAST_BYTE, stays=stays))
        made._let_go()
    once = [("open", 7), ("cuIpcCloseMemHandle", HERE)]
    assert calls == (once[:1] if stays else once * 2)


def with_ring(told: list[RankExport]) -> list[RankExport]:
    """The same rank with a staging ring of one slot, which is allocation 9."""
    (before,) = (msgspec.msgpack.decode(each.export, type=IpcExport) for each in told)
    ring = Allocation(OWNER + 2**16, 1024, 9, bytes(HANDLE_BYTES))
    allocations = (*before.allocations, ring)
    return [exported(msgspec.structs.replace(before, allocations=allocations, stage=ring.address, stage_bytes=512))]


def test_a_worker_maps_what_it_reads_and_a_ring_for_good(calls: list[tuple[str, Any]]) -> None:
    made = receiver(staged={0: 128})
    for _ in range(2):
        assert read(made, with_ring(export(LAST_BYTE, stays=False))) == HERE + 2 * 2**20 + 128
        made._let_go()
    assert calls == [("open", 9)], "of parameters that it does not read it maps nothing, and the ring stays"
    calls.clear()
    assert read(receiver(), with_ring(export(LAST_BYTE))) == HERE + 256 + 2 * 3
    assert calls == [("open", 7)], "and no ring that it does not read"


def test_a_ring_stays_mapped_where_parameters_beside_it_leave(calls: list[tuple[str, Any]]) -> None:
    here, there = (Region(0, "t", 0, "w", 3, (16, 1), (4, 8), "p", 0, (8, 1), "bfloat16", 0, (8, 1)) for _ in range(2))
    made = receiver_of((PackedPart(64, (), (here,)), PackedPart(64, (), (there,))), ({}, {0: 0}))
    for _ in range(2):
        read(made, with_ring(export(LAST_BYTE, stays=False)))
        made._let_go()
    leaves = [("open", 7), ("cuIpcCloseMemHandle", HERE)]
    assert calls == [("open", 7), ("open", 9), ("cuIpcCloseMemHandle", HERE), *leaves]
