"""Adapters added to weights: which are computed together, and how. On CUDA by one kernel, elsewhere by torch in fp32.

Knows factors and weights; must not know layers, names or ranks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlsync.copy.merge_kernel import Form

logger = logging.getLogger(__name__)

# Elements of weights that torch merges at once: their fp32 takes 256 MiB.
_MERGED_TOGETHER = 2**26
_FUSED_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
# Compute capability from which on tensor cores take bfloat16.
_CAPABILITY = (8, 0)
# Bytes at a multiple of which a GPU loads the most at once.
_ALIGNMENT = 16
# Rows and columns of what is merged for the sake of compiling.
_TINY = 16
# Shapes of a weight and its factors that are merged once to see whether the kernel is right: edges of tiles are among them.
_TRIED, _TRIED_SCALING = ((72, 144), (72, 32), (2 * 32, 144)), 1.75


@dataclass(frozen=True, slots=True)
class Factors:
    """What of an adapter is multiplied, scaled and added to its weight.

    Attributes:
        left: (rows, r), or (r, rows) where the factors are ``transposed``.
        right: (projections * r, columns), or (columns, r); each row of the product takes the r rows of its own projection.
        owners: of which projection each row is: (rows, projections), one or zero. None where there is one, and all rows are of it.
        likeness: equal for factors whose owners are equal.
    """

    left: Tensor
    right: Tensor
    owners: Tensor | None
    likeness: Hashable
    transposed: bool = False

    def multiplied(self) -> tuple[Tensor, Tensor]:
        """The left and the right one as they are multiplied."""
        return (self.left.t(), self.right.t()) if self.transposed else (self.left, self.right)


def spread(left: Tensor, owners: Tensor) -> Tensor:
    """A left factor (..., rows, r) with a block of columns for each projection, zero outside its own rows: (..., rows, projections * r)."""
    return (left.unsqueeze(-2) * owners.unsqueeze(-1)).flatten(-2)


@dataclass(slots=True)
class _Alike:
    """Weights that are merged together, by their places among all; ``form`` as the kernel takes them, None where torch merges them.
    ``table`` is of where they lie, unless factors are copied in each run."""

    form: Form | None
    places: list[int] = field(default_factory=list)
    table: Tensor | None = None


class MergeProgram:
    """Weights (rows, columns), to each of which its adapter is added: computed in fp32, and rounded once to the dtype of the weight.

    Weights and factors that are alike, as those of hundreds of experts, are computed together: what one adapter makes of its weight does
    not depend, bit for bit, on those beside it. How they lie in memory is looked at once, and again when they have moved. Not collective.
    """

    def __init__(self, weights: Sequence[Tensor], factors: Sequence[Factors], scaling: float) -> None:
        self._given, self._scaling = tuple(zip(weights, factors, strict=True)), scaling
        self._alike: tuple[_Alike, ...] = ()
        self._looked_at: object = None

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """The sums, in new memory. Takes theirs, and where no kernel makes them ``_MERGED_TOGETHER`` elements or one weight in fp32
        besides. Enqueued on the current stream."""
        # A table is there for what comes after it on the stream on which it was made.
        devices = {weight.device for weight, _ in self._given}
        streams = [torch.cuda.current_stream(device).cuda_stream for device in sorted(devices, key=str) if device.type == "cuda"]
        seen = streams, [(weight.data_ptr(), f.left.data_ptr(), f.right.data_ptr()) for weight, f in self._given]
        if seen != self._looked_at:
            self._alike, self._looked_at = self._look(), seen
        found: dict[int, Tensor] = {}
        for alike in self._alike:
            at_once = len(alike.places)
            if alike.form is None:
                at_once = max(1, _MERGED_TOGETHER // max(1, self._given[alike.places[0]][0].numel()))
            for start in range(0, len(alike.places), at_once):
                places = alike.places[start : start + at_once]
                found.update(zip(places, self._merged(alike, places), strict=True))
        return [found[place] for place in range(len(self._given))]

    def _look(self) -> tuple[_Alike, ...]:
        found: dict[Hashable, _Alike] = {}
        for place, (weight, of_one) in enumerate(self._given):
            form = _fused_form(weight, of_one)
            kind = of_one.likeness, of_one.left.shape, of_one.left.dtype, weight.shape, weight.dtype, weight.device, form
            found.setdefault(kind, _Alike(form)).places.append(place)
        return tuple(found.values())

    def _merged(self, alike: _Alike, places: Sequence[int]) -> Sequence[Tensor]:
        if alike.form is None:
            weights, factors = zip(*(self._given[place] for place in places), strict=True)
            return _by_torch(weights, factors, self._scaling)
        results, alike.table = _enqueue([self._given[place] for place in places], self._scaling, alike.form, alike.table)
        return results.unbind()


def merged(weights: Sequence[Tensor], factors: Sequence[Factors], scaling: float) -> list[Tensor]:
    """What a MergeProgram of them makes."""
    return MergeProgram(weights, factors, scaling).run()


def _by_torch(weights: Sequence[Tensor], factors: Sequence[Factors], scaling: float) -> Sequence[Tensor]:
    sums, owners = _stacked(weights), factors[0].owners
    left, right = map(_stacked, zip(*(f.multiplied() for f in factors), strict=True))
    if owners is not None:
        left = spread(left, owners)
    # Not one batched product: which kernel makes it, and so its rounding, may go by the size of the batch.
    for total, one_left, one_right in zip(sums.unbind(), left.unbind(), right.unbind(), strict=True):
        total.addmm_(one_left, one_right, alpha=scaling)
    return sums.to(weights[0].dtype).unbind()


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Copies of tensors of one shape, in fp32: (tensors, ...)."""
    made = torch.empty((len(tensors), *tensors[0].shape), dtype=torch.float32, device=tensors[0].device)
    torch._foreach_copy_(list(made.unbind()), list(tensors))
    return made


def _fused_form(weight: Tensor, factors: Factors) -> Form | None:
    """How the kernel takes a weight and its factors; None where torch merges them. Goes by nothing but these."""
    dtypes = {weight.dtype, factors.left.dtype, factors.right.dtype}
    is_taken = dtypes <= _FUSED_DTYPES and factors.left.dtype == factors.right.dtype and weight.dim() == 2 and weight.stride(1) == 1
    if not is_taken or not weight.numel() or not _fuses(weight.device):
        return None
    kernel, (left, right), row_stride = _kernel(), factors.multiplied(), weight.stride(0)
    is_aligned = not weight.data_ptr() % _ALIGNMENT and _begins_aligned(right)
    is_aligned = is_aligned and not row_stride % kernel.UNIT and not weight.shape[1] % kernel.UNIT
    is_rank_aligned = _begins_aligned(left) and not left.shape[1] % kernel.UNIT
    form: Form = kernel.Form(row_stride, kernel.UNIT if is_aligned else 1, kernel.UNIT if is_rank_aligned else 1)
    return form


def _begins_aligned(factor: Tensor) -> bool:
    """Whether it begins at a multiple of _ALIGNMENT; its contiguous copy, where it has to be copied, does."""
    return not factor.is_contiguous() or factor.data_ptr() % _ALIGNMENT == 0


def _enqueue(
    given: Sequence[tuple[Tensor, Factors]], scaling: float, form: Form, table: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Results of the kernel (weights, rows, columns), and a table for the next call with weights and factors in the same places: where
    they are. None where factors had to be copied, as an embedding's."""
    (weight, first), kept = given[0], table
    multiplied = [of_one.multiplied() for _, of_one in given] if table is None else [first.multiplied()]
    copies = [(left.contiguous(), right.contiguous()) for left, right in multiplied]
    if table is None:
        places = [[each.data_ptr(), left.data_ptr(), right.data_ptr()] for (each, _), (left, right) in zip(given, copies, strict=True)]
        # Not waited for: the driver takes a copy before the call returns.
        table = torch.tensor(places, dtype=torch.int64).to(weight.device, non_blocking=True)
        factors = [factor for _, of_one in given for factor in (of_one.left, of_one.right)]
        is_copied = [factor.data_ptr() for factor in factors] != [place for _, *pair in places for place in pair]
        kept = None if is_copied else table
    with _compiler:
        return _kernel().merge(table, weight, copies[0][0], first.owners, scaling, form), kept


_compiler = threading.Lock()


def _kernel() -> ModuleType:
    """The module, imported by whoever merges on CUDA only."""
    from rlsync.copy import merge_kernel

    return merge_kernel


@lru_cache
def _fuses(device: torch.device) -> bool:
    """Whether the kernel runs on a device, and adds as torch does. Triton comes with torch's builds for CUDA; it needs a C compiler and
    Python's headers."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    try:
        _try_out(device)
    except Exception as error:
        logger.warning("%s: torch merges adapters, in several passes over copies in fp32, because Triton does not: %s", device, error)
        return False
    return True


@torch.no_grad()
def _try_out(device: torch.device) -> None:
    """Merge a small weight of two projections by the kernel and by torch. Raises AssertionError where sums differ by more than a rounding:
    engines would compute with them, and no checksum of a sync would tell."""
    kernel, generator = _kernel(), torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in _TRIED)
    weight, left, right = drawn
    owners = torch.zeros(len(weight), 2, device=device)
    owners[: len(weight) // 3, 0], owners[len(weight) // 3 :, 1] = 1, 1
    factors = Factors(left, right, owners, None)
    found, _ = _enqueue([(weight, factors)], _TRIED_SCALING, kernel.Form(weight.stride(0), kernel.UNIT, kernel.UNIT))
    torch.testing.assert_close(found[0], _by_torch([weight], [factors], _TRIED_SCALING)[0], rtol=2**-7, atol=2**-10)


def compile_ahead(weights: Sequence[Tensor], factors: Sequence[Factors]) -> threading.Thread:
    """Begin to compile what merges these, which takes seconds on a machine that has not had it yet. Returns at once.

    Whoever merges before it is there waits for it, and hears what keeps it from being compiled: nothing is said of that here.
    """

    @torch.no_grad()
    def run() -> None:
        compiled: set[Hashable] = set()
        with contextlib.suppress(Exception):
            for weight, of_one in zip(weights, factors, strict=True):
                form = _fused_form(weight, of_one)
                left, right = of_one.multiplied()
                kind = weight.device, weight.dtype, left.dtype, left.shape[1], of_one.owners is None, form
                if form is not None and kind not in compiled:
                    compiled.add(kind)
                    owners = None if of_one.owners is None else of_one.owners.new_zeros(_TINY, of_one.owners.shape[1])
                    tiny = Factors(left.new_zeros(_TINY, left.shape[1]), right.new_zeros(right.shape[0], _TINY), owners, None)
                    _enqueue([(weight.new_zeros(_TINY, _TINY), tiny)], 1.0, replace(form, row_stride=_TINY))

    thread = threading.Thread(target=run, name="rlsync-merge-compiler", daemon=True)
    thread.start()
    return thread
