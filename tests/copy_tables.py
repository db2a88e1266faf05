"""What the tables of the CUDA copier mean, executed on memory of the host: as the head of rlsync.copy.tables says, unit by unit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import torch

from rlsync.copy.checksum import BASE
from rlsync.copy.tables import FORMS, Tables

# Units of some bytes at addresses, (n, bytes) uint8; and such units written there.
Read = Callable[[np.ndarray, int], np.ndarray]
Write = Callable[[np.ndarray, np.ndarray], None]


def places(tables: Tables) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Pair, first unit and the addresses of the units of every task, on both sides."""
    for task in tables.tasks:
        row = tables.pairs[task["pair"]]
        form = FORMS[row["form"]]
        units = task["first_unit"] + np.arange(task["units"])
        run, in_run = np.divmod(units, row["units_per_run"])
        source = int(row["source"]) + in_run * form.load_bytes
        destination = int(row["destination"]) + in_run * form.store_bytes
        for dim in tables.dims[row["first_dim"] : row["first_dim"] + row["num_dims"]]:
            run, index = np.divmod(run, dim["size"])
            source, destination = source + index * dim["source_step"], destination + index * dim["destination_step"]
        assert not run.any()
        yield int(task["pair"]), int(task["first_unit"]), source, destination


def execute(tables: Tables, memory: torch.Tensor, base: int) -> tuple[np.ndarray, list[int]]:
    """Run the tables over memory (1-D uint8) that counts as beginning at address ``base``: writes by byte, and checksums by pair."""
    raw, writes = memory.numpy(), np.zeros(len(memory), np.int64)

    def write(addresses: np.ndarray, units: np.ndarray) -> None:
        at = (addresses - base)[:, None] + np.arange(units.shape[1])
        raw[at] = units
        np.add.at(writes, at, 1)

    return writes, _run(tables, lambda addresses, nbytes: raw[(addresses - base)[:, None] + np.arange(nbytes)], write)


def execute_in_place(tables: Tables) -> list[int]:
    """Run the tables over the memory of this process that they name; checksums by pair."""

    def read(addresses: np.ndarray, nbytes: int) -> np.ndarray:
        return np.frombuffer(b"".join(ctypes.string_at(int(at), nbytes) for at in addresses), np.uint8).reshape(-1, nbytes)

    def write(addresses: np.ndarray, units: np.ndarray) -> None:
        for at, unit in zip(addresses, units, strict=True):
            ctypes.memmove(int(at), unit.tobytes(), len(unit))

    return _run(tables, read, write)


def _run(tables: Tables, read: Read, write: Write) -> list[int]:
    sums = tables.lengths.copy()
    for pair, first_unit, source, destination in places(tables):
        form = FORMS[tables.pairs[pair]["form"]]
        # The device refuses units that are not aligned to their width.
        assert not (source % form.load_bytes).any()
        assert not (destination % form.store_bytes).any()
        units = read(source, form.load_bytes)
        if form.dtypes is not None:
            given, taken = (getattr(torch, d) for d in form.dtypes)
            units = torch.from_numpy(units).view(given).to(taken).view(torch.uint8).numpy()
        if tables.pairs[pair]["destination"]:
            write(destination, units)
        with np.errstate(over="ignore"):
            sums[pair] += weighed(units.tobytes()) * np.uint64(pow(BASE, first_unit * form.store_bytes // 4, 2**64))
    return [int(value) for value in sums]


def weighed(raw: bytes) -> np.uint64:
    words = np.frombuffer(raw + bytes(-len(raw) % 4), "<i4").astype(np.int64).view(np.uint64)
    powers = np.full(len(words), BASE, np.uint64)
    powers[:1] = 1
    return (words * np.cumprod(powers)).sum()
