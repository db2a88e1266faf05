"""The kernel that merges adapters on CUDA: each weight is read once, its adapter is added in fp32, and the sum is rounded once and written.

Owns the program and its launch, and is the only importer of Triton; which weights it takes is in ``rlsync.copy.merge``. A tile of a result
does not depend on what else is launched with it: tiles have one size, and rank is summed up in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Rows and columns of a result that a block computes, and how much of rank at once: the least that covers it, or the most. Tensor cores take
# 16 at least. A multiprocessor of Hopper has three such blocks of half precision under way, and 48 KiB of weights. fp32 is multiplied
# without tensor cores: more of it does not fit into registers.
_HALF_TILE, _FLOAT_TILE = (64, 128, (16, 32, 64)), (64, 64, (16,))
_NUM_WARPS = 4
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Form:
    """How weights and factors of one launch lie in memory.

    Attributes:
        row_stride: elements from a row of a weight to the next.
        unit: elements at a multiple of which every row of weights and of right factors begins, and rows end: ``UNIT``, or 1 where some
            do not. By it, and by nothing else of their shapes, programs differ.
        rank_unit: the same of left factors.
    """

    row_stride: int
    unit: int
    rank_unit: int


# Elements of half precision that are loaded at once.
UNIT = 8


def merge(
    table: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, owners: torch.Tensor | None, scaling: float, form: Form
) -> torch.Tensor:
    """Enqueue on the current stream of the weights' device; results are (weights, rows, columns), in the dtype of the weights.

    Args:
        table: on that device, int64 (weights, 3): addresses of each weight (rows, columns), whose elements of a row are beside each other,
            and of its factors, both contiguous: left (rows, r) and right (projections * r, columns).
        weight, left: one of them, for their shapes and dtypes. Right factors have the dtype of left ones.
        owners: of which projection each row of each weight is: (rows, projections), one or zero. None where there is one projection,
            and all rows are of it.
    """
    (rows, columns), rank = weight.shape, left.shape[1]
    results = torch.empty((table.shape[0], rows, columns), dtype=weight.dtype, device=weight.device)
    factor = left.dtype
    tile_rows, tile_columns, sizes = _FLOAT_TILE if factor == torch.float32 else _HALF_TILE
    num_tiles = table.shape[0] * triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)
    with torch.cuda.device(results.device):
        _merge_tiles[(num_tiles,)](
            table,
            results,
            owners,
            float(scaling),
            rows,
            columns // form.unit,
            form.row_stride // form.unit,
            rank // form.rank_unit,
            1 if owners is None else owners.shape[1],
            FACTOR=_DTYPES[factor],
            UNIT=form.unit,
            RANK_UNIT=form.rank_unit,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            RANKS=next((size for size in sizes if size >= rank), sizes[-1]),
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
    return results


# A program for each kind of numbers, and not for each shape.
@triton.jit(
    do_not_specialize=["scaling", "rows", "column_units", "weight_row_units", "rank_units", "num_projections"],
)
def _merge_tiles(  # type: ignore[no-untyped-def]  # of Triton's language
    table,
    results,
    owners,
    scaling,
    rows,
    column_units,
    weight_row_units,
    rank_units,
    num_projections,
    FACTOR: tl.constexpr,
    UNIT: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    # Products with units let the compiler see how rows are aligned.
    columns, weight_row, rank = column_units * UNIT, weight_row_units * UNIT, rank_units * RANK_UNIT
    column_tiles = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * column_tiles
    index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = (tile // column_tiles) * ROWS
    row, column = tl.arange(0, ROWS), (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = first + row < rows, column < columns
    here = has_row[:, None] & has_column[None, :]

    weight = tl.load(table + 3 * index).to(tl.pointer_type(results.dtype.element_ty))
    left = tl.load(table + 3 * index + 1).to(tl.pointer_type(FACTOR))
    right = tl.load(table + 3 * index + 2).to(tl.pointer_type(FACTOR))
    if UNIT > 1:
        weight, right = tl.multiple_of(weight, 16), tl.multiple_of(right, 16)
    if RANK_UNIT > 1:
        left = tl.multiple_of(left, 16)
    # Weights may have more elements than 32 bits count; tiles have not.
    first_64 = first.to(tl.int64)
    held = tl.load(weight + first_64 * weight_row + row[:, None] * weight_row + column[None, :], mask=here, other=0.0)

    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for projection in range(num_projections):
        mine = has_row
        if owners is not None:
            mine = mine & (tl.load(owners + (first + row) * num_projections + projection, mask=has_row, other=0.0) != 0)
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            for start in range(0, rank, RANKS):
                k = start + tl.arange(0, RANKS)
                has_k = k < rank
                b = tl.load(left + first_64 * rank + row[:, None] * rank + k[None, :], mask=mine[:, None] & has_k[None, :], other=0.0)
                of_a = (projection * rank + k).to(tl.int64)[:, None] * columns + column[None, :]
                a = tl.load(right + of_a, mask=has_k[:, None] & has_column[None, :], other=0.0)
                product = tl.dot(b, a, product, input_precision="ieee")

    result = held.to(tl.float32) + scaling * product
    into = results + (index.to(tl.int64) * rows + first) * columns
    tl.store(into + row[:, None] * columns + column[None, :], result.to(results.dtype.element_ty), mask=here)
