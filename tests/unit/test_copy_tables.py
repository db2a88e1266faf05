"""Claims about the tables of the CUDA copier, executed by their meaning on CPU memory and compared with the CPU copier, bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.paper import QWEN3_30B_A3B
from rlsync.copy.checksum import checksums
from rlsync.copy.cpu import CopyProgram
from rlsync.copy.cuda import CudaCopyProgram
from rlsync.copy.tables import (
    CASTS,
    FORMS,
    MOST_RUN_UNITS,
    PATTERN_BYTES,
    UNITS_PER_TASK,
    Move,
    Strided,
    Tables,
    build_tables,
    moved,
    moves_of,
)
from rlsync.errors import ConfigError, PlacementError
from rlsync.layout.geometry import contiguous_strides
from rlsync.models import model_of
from rlsync.models.paper import Seat
from tests.copy_pairs import Drawn, Pairs, draw_pairs, give
from tests.copy_tables import execute, places
from tests.counted import num_calls
from tests.paper import paper_worker


class Bound:
    """Drawn pairs over one CPU memory: destinations, then sources, then the patterns of the constants, at made-up addresses."""

    def __init__(self, pairs: Pairs, seed: int, base: int = 2**40) -> None:
        self.pairs, self.base = pairs, base
        given = give(pairs, seed)
        patterns = [
            torch.full((PATTERN_BYTES // getattr(torch, d.dtype).itemsize,), v, dtype=getattr(torch, d.dtype)).view(torch.uint8)
            for d, v in pairs.constants
        ]
        self.given_offset = -(-pairs.taken_bytes // 16) * 16
        self.pattern_offset = self.given_offset + -(-len(given) // 16) * 16
        self.memory = torch.zeros(self.pattern_offset + PATTERN_BYTES * len(patterns) + 64, dtype=torch.uint8)
        self.memory[: pairs.taken_bytes] = 0xA5
        self.memory[self.given_offset : self.given_offset + len(given)] = given
        for i, pattern in enumerate(patterns):
            self.memory[self.pattern_offset + i * PATTERN_BYTES :][:PATTERN_BYTES] = pattern

    def tables(self, *, in_order: bool) -> Tables:
        copies = [(self.strided(d, 0), self.strided(s, self.given_offset)) for d, s in self.pairs.copies]
        constants = [
            (self.strided(d, 0), self.base + self.pattern_offset + i * PATTERN_BYTES) for i, (d, _) in enumerate(self.pairs.constants)
        ]
        return build_tables(copies, constants, in_order=in_order)

    def strided(self, drawn: Drawn, offset: int) -> Strided:
        return Strided(self.base + offset + drawn.byte_offset, drawn.dtype, drawn.shape, drawn.strides)

    def expected(self) -> torch.Tensor:
        """The memory after the CPU copier."""
        memory = self.memory.clone()
        CopyProgram((d.over(memory), s.over(memory[self.given_offset :])) for d, s in self.pairs.copies).run()
        for drawn, value in self.pairs.constants:
            drawn.over(memory).fill_(value)
        return memory

    def sums(self) -> list[int]:
        given = self.memory[self.given_offset :]
        views = [s.over(given).to(getattr(torch, d.dtype)) for d, s in self.pairs.copies]
        return checksums([view.clone(memory_format=torch.contiguous_format) for view in views])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12), in_order=st.booleans())
def test_tables_mean_what_the_cpu_copier_does(seed: int, count: int, in_order: bool) -> None:
    bound = Bound(draw_pairs(random.Random(seed), count), seed)
    expected, sums = bound.expected(), bound.sums()
    tables = bound.tables(in_order=in_order)
    writes, found = execute(tables, bound.memory, bound.base)
    assert torch.equal(bound.memory, expected)
    assert writes.max() <= 1 and writes.sum() == tables.nbytes
    if in_order:
        assert found[: len(sums)] == sums


@pytest.mark.parametrize(
    ("table", "field", "change"),
    [("pairs", "source", 16), ("pairs", "units_per_run", 1), ("dims", "size", 1), ("dims", "source_step", 16),
     ("dims", "destination_step", 16), ("tasks", "first_unit", 4), ("tasks", "units", -1)],
)  # fmt: skip
def test_a_wrong_row_is_seen(table: str, field: str, change: int) -> None:
    """The comparison above fails for any field that is off in one row: in bytes, in sums, or because it leads out of the memory."""
    copy = Drawn(0, "bfloat16", (40, 9, 64), (9 * 80, 80, 1)), Drawn(0, "bfloat16", (40, 9, 64), (64, 40 * 64, 1))
    bound = Bound(Pairs((copy,), (), 2 * 40 * 9 * 80, 2 * 40 * 9 * 64), seed=7)
    expected, sums, tables = bound.expected(), bound.sums(), bound.tables(in_order=True)
    rows = getattr(tables, table).copy()
    assert len(rows) == {"pairs": 1, "dims": 2, "tasks": 1}[table]
    rows[field][0] += change
    try:
        _, found = execute(replace(tables, **{table: rows}), bound.memory, bound.base)
    except (AssertionError, IndexError):
        return
    assert not torch.equal(bound.memory, expected) or found != sums


def dense(address: int, dtype: str, *shape: int) -> Strided:
    return Strided(address, dtype, shape, contiguous_strides(shape))


@pytest.mark.parametrize(
    ("destination", "source", "unit_bytes", "num_dims"),
    [
        (dense(1 << 20, "bfloat16", 512, 64), dense(1 << 30, "bfloat16", 512, 64), 16, 0),
        # A slice of the columns.
        (dense(1 << 20, "bfloat16", 512, 64), Strided(1 << 30, "bfloat16", (512, 64), (128, 1)), 16, 1),
        (dense(1 << 20, "bfloat16", 512, 64), Strided((1 << 30) + 2, "bfloat16", (512, 64), (128, 1)), 2, 1),
        (dense(1 << 20, "bfloat16", 512, 66), Strided(1 << 30, "bfloat16", (512, 66), (132, 1)), 4, 1),
        # The heads of a packed qkv: two groups of three heads of (32, 64).
        (dense(1 << 20, "bfloat16", 2, 3, 32, 64), Strided(1 << 30, "bfloat16", (2, 3, 32, 64), (5 * 2048, 2048, 64, 1)), 16, 1),
        (dense(1 << 20, "float32", 3, 1, 1), dense(1 << 30, "float32", 3, 1, 1), 4, 0),
        # A transposition has no runs.
        (dense(1 << 20, "bfloat16", 8, 16), Strided(1 << 30, "bfloat16", (8, 16), (1, 8)), 2, 2),
        # Bytes that are aligned to less than an element.
        (dense(1 << 20, "float32", 4), dense((1 << 30) + 1, "float32", 4), 1, 0),
    ],
)
def test_units_are_as_wide_and_dims_as_few_as_can_be(destination: Strided, source: Strided, unit_bytes: int, num_dims: int) -> None:
    for in_order in (False, True):
        (row,) = build_tables([(destination, source)], in_order=in_order).pairs
        assert (FORMS[row["form"]].load_bytes, row["num_dims"]) == (unit_bytes, num_dims)


def test_dims_that_are_permuted_alike_are_one_run_unless_their_order_counts() -> None:
    pair = Strided(1 << 20, "bfloat16", (64, 32), (1, 64)), Strided(1 << 30, "bfloat16", (64, 32), (1, 64))
    free, ordered = (build_tables([pair], in_order=order) for order in (False, True))
    assert (free.pairs["num_dims"][0], len(free.tasks), FORMS[free.pairs["form"][0]].load_bytes) == (0, 1, 16)
    assert (ordered.pairs["num_dims"][0], FORMS[ordered.pairs["form"][0]].load_bytes) == (2, 2)


@pytest.mark.parametrize("cast", CASTS)
def test_casts_take_several_elements_where_both_sides_are_aligned(cast: tuple[str, str]) -> None:
    given, taken = cast
    for shift, is_wide in ((0, True), (4, False)):
        (row,) = build_tables([(dense(1 << 20, taken, 64), dense((1 << 30) + shift, given, 64))]).pairs
        form = FORMS[row["form"]]
        assert form.dtypes == cast
        assert (max(form.load_bytes, form.store_bytes) == 16) is is_wide


def test_one_large_copy_and_many_small_ones_are_cut_into_equal_tasks() -> None:
    large = dense(1 << 40, "bfloat16", 2**20 + 8), dense(1 << 41, "bfloat16", 2**20 + 8)
    small = [(dense((1 << 42) + 512 * i, "bfloat16", 64), dense((1 << 43) + 512 * i, "bfloat16", 64)) for i in range(1000)]
    tables = build_tables([large, *small])
    by_pair = np.bincount(tables.tasks["pair"])
    assert by_pair[0] == 2**21 // (16 * UNITS_PER_TASK) + 1
    assert (by_pair[1:] == 1).all()
    assert sorted(tables.tasks["units"])[-32:] == [UNITS_PER_TASK] * 32
    assert sum(tables.tasks["units"]) * 16 == tables.nbytes == 2 * (2**20 + 8) + 1000 * 128


def test_tasks_of_long_runs_come_first() -> None:
    """What is moved in bulk: 16-byte units, and runs of 256 bytes or more; no casts and no constants."""
    long_runs = Strided(1 << 40, "bfloat16", (4, 128), (256, 1))
    pairs = [
        (dense(1 << 20, "bfloat16", 4, 120), Strided(1 << 30, "bfloat16", (4, 120), (128, 1))),
        (dense(1 << 21, "bfloat16", 4, 128), long_runs),
        (dense(1 << 22, "float32", 4, 128), long_runs),
        (None, dense(1 << 41, "uint8", 2**20)),
    ]
    tables = build_tables(pairs, [(dense(1 << 23, "float32", 1024), 1 << 31)])
    assert tables.tasks["pair"].tolist() == [1, *[3] * 16, 0, 2, 4]
    assert tables.num_bulk == 17
    # Constants have no runs, and units of 16 bytes all the same.
    assert tables.tasks["units"][-1] == 1024 * 4 // 16


def test_offsets_beyond_32_bits_are_kept() -> None:
    pair = Strided(1 << 44, "bfloat16", (3, 8), (2**33, 1)), Strided(1 << 45, "bfloat16", (3, 8), (2**34, 1))
    ((_, _, source, destination),) = places(build_tables([pair]))
    assert (source == (1 << 45) + np.arange(3) * 2**35).all()
    assert (destination == (1 << 44) + np.arange(3) * 2**34).all()


def test_runs_too_long_for_a_thread_to_count_are_stepped_through() -> None:
    """Two rows of one more unit than 32 bits count; the device takes a run's units as 32 bits where there are several runs."""
    length = 16 * (MOST_RUN_UNITS + 1)
    sides = [Strided(address, "uint8", (2, length), (step * length, 1)) for address, step in ((1 << 50, 1), (1 << 51, 2))]
    tables = build_tables([(sides[0], sides[1])])
    (row,) = tables.pairs
    assert row["units_per_run"] == 1
    assert tables.dims["size"].tolist() == [MOST_RUN_UNITS + 1, 2]
    assert tables.dims["source_step"].tolist() == [16, 2 * length]
    assert tables.dims["destination_step"].tolist() == [16, length]
    assert tables.tasks["first_unit"][-1] + tables.tasks["units"][-1] == 2 * (MOST_RUN_UNITS + 1)


def test_sources_can_move_and_nothing_else_does() -> None:
    pairs = [(dense(0x1000 + 256 * i, "uint8", 64), dense(0x100000 + 256 * i, "uint8", 64)) for i in range(4)]
    tables = build_tables(pairs)
    # The two exchange places: what was moved is not moved again.
    swapped = moved(tables, [Move(0x100000, 256, 0x100100), Move(0x100100, 256, 0x100000)])
    assert swapped.pairs["source"].tolist() == [0x100100, 0x100000, 0x100200, 0x100300]
    assert (swapped.pairs["destination"] == tables.pairs["destination"]).all()
    assert tables.pairs["source"][0] == 0x100000
    with pytest.raises(PlacementError, match=r"from 0x100000 to 0x100108, by no multiple of 16 bytes; build the program anew"):
        moved(tables, [Move(0x100000, 256, 0x100108)])


def test_moves_are_what_has_moved_as_a_whole_and_by_whole_units() -> None:
    a, b, c = 0x1000, 0x2000, 0x3000
    assert moves_of([(a, 64, a), (b, 64, c), (c, 32, b)]) == [Move(b, 64, c), Move(c, 32, b)]
    # One place under two names, and one inside another, move once.
    assert moves_of([(a, 64, b), (a, 32, b), (a + 16, 64, b + 16)]) == [Move(a, 80, b)]
    assert moves_of([(a, 64, b), (a, 64, c)]) is None, "what was one is two"
    assert moves_of([(a, 64, b), (a + 16, 16, c)]) is None
    assert moves_of([(a, 64, a), (b, 64, b + 8)]) is None, "units would be another size"
    assert moves_of([]) == moves_of([(0, 0, 0), (0, 0, 0)]) == []


def test_everything_that_cannot_be_copied_comes_in_one_error() -> None:
    good = dense(0, "bfloat16", 4), dense(64, "bfloat16", 4)
    bad = [
        (dense(0, "bfloat16", 4), dense(64, "bfloat16", 5)),
        (dense(0, "bfloat16", 4), dense(64, "float64", 4)),
        (dense(0, "bfloat16", 4), dense(65, "float32", 4)),
        (dense(0, "complex64", 4), dense(64, "complex64", 4)),
    ]
    with pytest.raises(PlacementError) as caught:
        build_tables([good, *bad])
    text = str(caught.value)
    assert text.startswith("4 of 5 copies cannot be made: copy 1: bfloat16 (4,) from bfloat16 (5,); ")
    assert "copy 2: bfloat16 (4,) from float64 (4,), and casts are made between float32, bfloat16, float16 only" in text
    assert "not aligned to their size" in text
    assert "copy 4: complex64" in text


def test_no_copies_make_empty_tables() -> None:
    for pairs in ([], [(dense(0, "bfloat16", 0, 4), dense(64, "bfloat16", 0, 4))]):
        tables = build_tables(pairs)
        assert (len(tables.tasks), tables.nbytes, len(tables.pairs)) == (0, 0, len(pairs))


def test_tables_of_a_model_of_18867_tensors_are_made_without_a_call_for_each_task() -> None:
    """The worker's slices of experts that lie whole at the actor. It takes calls for each copy, as each is looked at in Python."""
    boxes = [piece.box.shape for piece in paper_worker(model_of(QWEN3_30B_A3B), Seat(0, 2), holder="worker").pieces]
    assert len(boxes) == 18_867
    addresses = np.cumsum([0, *(4 * prod(shape) for shape in boxes)])
    pairs = [
        (dense(2**41 + int(at), "bfloat16", *shape), Strided(2**40 + int(at), "bfloat16", shape, (2 * shape[-1], 1)[-len(shape) :]))
        for at, shape in zip(addresses, boxes, strict=False)
    ]
    tables: list[Any] = []
    calls = num_calls(lambda: tables.append(build_tables(pairs, in_order=True)))
    assert len(tables[0].tasks) > 400_000
    assert calls < 6 * len(boxes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_the_error_says_so() -> None:
    with pytest.raises(ConfigError, match=r"CUDA copies on cuda need a CUDA device; torch .* sees 0"):
        CudaCopyProgram([], device=torch.device("cuda"))
