"""Tables of a copy program: strided pairs cut into equal tasks. Owns what their rows mean; knows addresses, no device and no tensor.

A *run* is a stretch of elements that are dense on both sides; a *unit* is what one thread moves at once: the widest power of
two of bytes (at most 16) that divides the addresses, the runs and the steps of both sides, or a few elements of a cast. Units are
numbered in the row-major order of a pair's shape; unit ``u`` lies in run ``r = u // units_per_run``, and with ``r`` taken apart
along the pair's dims (innermost first) begins at ``address + (u % units_per_run) * unit_bytes + sum(index[d] * step[d])``.
A *task* is up to UNITS_PER_TASK consecutive units of one pair. Those of long runs of the widest units come first: they can be moved
in bulk, run by run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rlsync.copy.checksum import LENGTH_WEIGHT
from rlsync.errors import PlacementError, first_few
from rlsync.layout.geometry import DTYPE_BYTES

# 64 KiB of 16-byte units. Divisible by 4, so that a task of single bytes begins with a word of the checksum.
UNITS_PER_TASK = 4096
# Shorter runs are not worth an instruction of their own: 256 bytes.
LEAST_BULK_UNITS = 16
# A thread counts the units of runs in 32 bits.
MOST_RUN_UNITS = 2**31
# Bytes that a constant is repeated to in device memory, so that units of any width can load it.
PATTERN_BYTES = MOST_UNIT_BYTES = 16
# Rows as the kernel reads them; addresses and steps in bytes.
PAIR = np.dtype([("source", "u8"), ("destination", "u8"), ("units_per_run", "i8"), ("first_dim", "i4"), ("num_dims", "i2"), ("form", "i2")])
DIM = np.dtype([("size", "i8"), ("source_step", "i8"), ("destination_step", "i8")])
TASK = np.dtype([("first_unit", "i8"), ("pair", "i4"), ("units", "i4")])

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Form:
    """How units are moved: as they are (``dtypes`` is None), or ``elements`` of the first dtype cast to the second."""

    load_bytes: int
    store_bytes: int
    dtypes: tuple[str, str] | None = None


_FLOATS = ("float32", "bfloat16", "float16")
CASTS = tuple((a, b) for a in _FLOATS for b in _FLOATS if a != b)


def _casting(dtypes: tuple[str, str]) -> tuple[Form, Form]:
    """Several elements at a time, and one where alignment allows no more."""
    given, taken = (DTYPE_BYTES[d] for d in dtypes)
    elements = MOST_UNIT_BYTES // max(given, taken)
    return Form(given * elements, taken * elements, dtypes), Form(given, taken, dtypes)


# The number of a form is its place here. Those without a cast come first, the widest at 0.
FORMS: tuple[Form, ...] = (*(Form(n, n) for n in (16, 8, 4, 2, 1)), *(form for cast in CASTS for form in _casting(cast)))


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements in memory that kernels of one device can read or write: an address in bytes, a shape, strides in elements.

    ``dtype`` is torch's name without the prefix. Nothing is kept alive by it.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def region(self, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Strided:
        """Elements of a contiguous buffer that a copy of a plan reads or writes; ``offset`` and ``strides`` in elements."""
        return Strided(self.address + offset * DTYPE_BYTES[self.dtype], self.dtype, tuple(shape), tuple(strides))

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


# Destination, or None for elements that are only summed up, and source.
Pair = tuple[Strided | None, Strided]


@dataclass(frozen=True, slots=True)
class Tables:
    """Rows of PAIR, DIM and TASK, and how many of the first tasks can be moved in bulk.

    ``lengths`` (uint64, by pair) is what the number of bytes contributes to a checksum; ``nbytes`` is written by a run.
    """

    pairs: np.ndarray
    dims: np.ndarray
    tasks: np.ndarray
    num_bulk: int
    lengths: np.ndarray
    nbytes: int


@dataclass(frozen=True, slots=True)
class Move:
    """``nbytes`` of sources that lay at ``old_address`` and now lie at ``new_address``."""

    old_address: int
    nbytes: int
    new_address: int


def build_tables(pairs: Sequence[Pair], constants: Sequence[tuple[Strided, int]] = (), *, in_order: bool = False) -> Tables:
    """Tables for copies between equal shapes, and then for constants.

    Args:
        pairs: their dtypes are equal, or one of CASTS. The row of a pair has its index.
        constants: destinations, and addresses of PATTERN_BYTES of the constant repeated; at multiples of PATTERN_BYTES.
        in_order: the units of a pair keep the order of its elements, as checksums need. Else they follow the destination's
            memory, which merges dims that are permuted alike on both sides.

    Raises PlacementError with every pair that cannot be copied.
    """
    findings = list(_findings(pairs))
    if findings:
        raise PlacementError(f"{len(findings)} of {len(pairs)} copies cannot be made: {first_few(findings, 5, separator='; ')}")
    if not pairs and not constants:
        return Tables(np.empty(0, PAIR), np.empty(0, DIM), np.empty(0, TASK), 0, np.empty(0, np.uint64), 0)
    columns = _columns(pairs, constants)
    table, dims, num_units = _rows(_collapsed(columns if in_order else _in_order_of_memory(columns)))
    nbytes = num_units * np.array([form.store_bytes for form in FORMS])[table["form"]]
    written_bytes = int(nbytes[table["destination"] != 0].sum())
    tasks, num_bulk = _tasks(num_units, (table["form"] == 0) & (table["units_per_run"] >= LEAST_BULK_UNITS))
    return Tables(table, dims, tasks, num_bulk, nbytes.astype(np.uint64) * np.uint64(LENGTH_WEIGHT), written_bytes)


def moves_of(places: Iterable[tuple[int, int, int]]) -> list[Move] | None:
    """What has moved of ``places``, each the address before, the bytes, and the address now.

    Neighbours that went the same way are one move, whatever lay between them. None where programs have to be built anew: something
    moved by no multiple of MOST_UNIT_BYTES, or what overlapped has parted.
    """
    found: list[Move] = []
    for old, nbytes, new in sorted(places):
        if (new - old) % MOST_UNIT_BYTES:
            return None
        last = found[-1] if found else None
        if last is not None and new - old == last.new_address - last.old_address:
            found[-1] = replace(last, nbytes=max(last.nbytes, old + nbytes - last.old_address))
        elif last is None or old >= last.old_address + last.nbytes:
            found.append(Move(old, nbytes, new))
        else:
            return None
    return [move for move in found if move.old_address != move.new_address]


def moved(tables: Tables, moves: Sequence[Move]) -> Tables:
    """The same tables for sources that lie elsewhere now; what no move names stays.

    Raises PlacementError where a move changes the alignment, which the units depend on: then build anew.
    """
    old = tables.pairs["source"].astype(np.int64)
    new = old.copy()
    for move in moves:
        shift = move.new_address - move.old_address
        if shift % MOST_UNIT_BYTES:
            raise PlacementError(
                f"sources moved from {move.old_address:#x} to {move.new_address:#x}, by no multiple of {MOST_UNIT_BYTES} bytes; "
                "build the program anew"
            )
        new[(old >= move.old_address) & (old < move.old_address + move.nbytes)] += shift
    pairs = tables.pairs.copy()
    pairs["source"] = new
    return replace(tables, pairs=pairs)


def _findings(pairs: Sequence[Pair]) -> Iterator[str]:
    for index, (destination, source) in enumerate(pairs):
        taken = source if destination is None else destination
        if taken.shape != source.shape:
            yield f"copy {index}: {taken} from {source}"
        elif taken.dtype not in DTYPE_BYTES or source.dtype not in DTYPE_BYTES:
            yield f"copy {index}: {taken} from {source}, and the dtypes known are {', '.join(DTYPE_BYTES)}"
        elif taken.dtype != source.dtype:
            if (source.dtype, taken.dtype) not in CASTS:
                yield f"copy {index}: {taken} from {source}, and casts are made between {', '.join(_FLOATS)} only"
            elif source.address % DTYPE_BYTES[source.dtype] or taken.address % DTYPE_BYTES[taken.dtype]:
                yield f"copy {index}: {taken} from {source}, a cast of elements that are not aligned to their size"


@dataclass(frozen=True, slots=True)
class _Columns:
    """Pairs as arrays: ``n`` pairs, ``d`` dims with the innermost first; side 0 is the source, 1 the destination.

    addresses (2, n) and item_bytes (2, n); sizes (n, d); strides (2, n, d) in elements; kinds (n): 0, or 1 + index into CASTS;
    is_fill (n): the source is one place.
    """

    addresses: Integers
    item_bytes: Integers
    sizes: Integers
    strides: Integers
    kinds: Integers
    is_fill: npt.NDArray[np.bool_]


def _columns(pairs: Sequence[Pair], constants: Sequence[tuple[Strided, int]]) -> _Columns:
    """What is only summed up gets the source for a destination, at address 0: the same dims merge, the same units fit."""
    sources = [s for _, s in pairs] + [replace(d, address=address, strides=(0,) * len(d.shape)) for d, address in constants]
    destinations = [replace(s, address=0) if d is None else d for d, s in pairs] + [d for d, _ in constants]
    by_rank = defaultdict(list)
    for index, source in enumerate(sources):
        by_rank[len(source.shape)].append(index)
    depth = max(1, *by_rank)
    sizes, strides = np.ones((len(sources), depth), np.int64), np.zeros((2, len(sources), depth), np.int64)
    for rank, group in by_rank.items():
        if rank:
            sizes[group, :rank] = np.array([sources[i].shape for i in group], np.int64)[:, ::-1]
            for side, views in enumerate((sources, destinations)):
                strides[side, group, :rank] = np.array([views[i].strides for i in group], np.int64)[:, ::-1]
    number = {cast: 1 + index for index, cast in enumerate(CASTS)}
    return _Columns(
        np.array([[v.address for v in views] for views in (sources, destinations)], np.int64),
        np.array([[DTYPE_BYTES[v.dtype] for v in views] for views in (sources, destinations)], np.int64),
        sizes,
        strides,
        np.array([number.get((g.dtype, t.dtype), 0) for g, t in zip(sources, destinations, strict=True)], np.int64),
        np.arange(len(sources)) >= len(pairs),
    )


def _in_order_of_memory(c: _Columns) -> _Columns:
    """The dims of each pair in the order in which they step through the destination."""
    order = np.argsort(np.where(c.sizes == 1, 0, np.abs(c.strides[1])), axis=1, kind="stable")
    return replace(c, sizes=np.take_along_axis(c.sizes, order, 1), strides=np.take_along_axis(c.strides, order[None], 2))


def _collapsed(c: _Columns) -> _Columns:
    """Neighbouring dims that are contiguous on both sides made one, and dims of size 1 dropped: what is left of a row is 1 and 0."""
    sizes, strides = np.ones_like(c.sizes), np.zeros_like(c.strides)
    every = np.arange(len(sizes))
    top = np.full(len(sizes), -1)
    for dim in range(sizes.shape[1]):
        size, stride = c.sizes[:, dim], c.strides[:, :, dim]
        merges = (top >= 0) & (strides[:, every, top] * sizes[every, top] == stride).all(0)
        sizes[every[merges], top[merges]] *= size[merges]
        opens = ~merges & (size != 1)
        top[opens] += 1
        sizes[every[opens], top[opens]], strides[:, every[opens], top[opens]] = size[opens], stride[:, opens]
    return replace(c, sizes=sizes, strides=strides)


def _rows(c: _Columns) -> tuple[np.ndarray, np.ndarray, Integers]:
    """PAIR and DIM of collapsed columns, and the units of each pair."""
    is_dense = (c.strides[1, :, 0] == 1) & ((c.strides[0, :, 0] == 1) | c.is_fill)
    run = np.where(is_dense, c.sizes[:, 0], 1)
    sizes, steps = c.sizes.copy(), c.strides * c.item_bytes[:, :, None]
    sizes[is_dense, 0] = 1
    steps[:, sizes == 1] = 0
    forms = _forms(c, run, steps)
    store_bytes = np.array([form.store_bytes for form in FORMS])[forms]
    units_per_run = run * c.item_bytes[1] // store_bytes
    num_units = units_per_run * sizes.prod(1)
    # A constant lies in one place: its runs become dims that step on the destination's side alone. So do runs past counting.
    stepping = is_dense & (c.is_fill | (units_per_run > MOST_RUN_UNITS))
    unit_bytes = np.stack([np.where(c.is_fill, 0, np.array([form.load_bytes for form in FORMS])[forms]), store_bytes])
    sizes[stepping, 0], steps[:, stepping, 0] = units_per_run[stepping], unit_bytes[:, stepping]
    units_per_run[stepping] = 1
    is_dim = sizes > 1
    dims = np.empty(int(is_dim.sum()), DIM)
    dims["size"], dims["source_step"], dims["destination_step"] = sizes[is_dim], steps[0][is_dim], steps[1][is_dim]
    pairs = np.empty(len(sizes), PAIR)
    pairs["source"], pairs["destination"] = c.addresses
    pairs["units_per_run"], pairs["form"], pairs["num_dims"] = units_per_run, forms, is_dim.sum(1)
    pairs["first_dim"] = np.cumsum(pairs["num_dims"]) - pairs["num_dims"]
    return pairs, dims, num_units


def _forms(c: _Columns, run: Integers, steps: Integers) -> Integers:
    """The widest form of each pair that its addresses, runs and steps are multiples of."""
    common = np.bitwise_or.reduce(np.concatenate([c.addresses[None], (run * c.item_bytes)[None], np.moveaxis(steps, 2, 0)]))
    forms = np.zeros(len(run), np.int64)
    for number, form in reversed(list(enumerate(FORMS))):
        kind = 0 if form.dtypes is None else 1 + CASTS.index(form.dtypes)
        fits = (c.kinds == kind) & (common[0] % form.load_bytes == 0) & (common[1] % form.store_bytes == 0)
        forms[fits] = number
    return forms


def _tasks(num_units: Integers, in_bulk: npt.NDArray[np.bool_]) -> tuple[np.ndarray, int]:
    """Every unit of every pair once; the tasks of pairs that can be moved in bulk first, and their number."""
    counts = -(-num_units // UNITS_PER_TASK)
    order = np.argsort(~in_bulk, kind="stable")
    pair = np.repeat(order, counts[order])
    first = (np.arange(len(pair)) - np.repeat(np.cumsum(counts[order]) - counts[order], counts[order])) * UNITS_PER_TASK
    tasks = np.empty(len(pair), TASK)
    tasks["pair"], tasks["first_unit"], tasks["units"] = pair, first, np.minimum(UNITS_PER_TASK, num_units[pair] - first)
    return tasks, int(counts[in_bulk].sum())
