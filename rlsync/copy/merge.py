"""Adapters added to weights: which are computed together, and how. On CUDA by one kernel, elsewhere by torch in fp32.

Knows factors and weights; must not know layers, names or ranks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Factors:
    """What of an adapter is multiplied, scaled and added to its weight.

    Attributes:
        left: (rows, r).
        right: (projections * r, columns); each row of the product takes the r rows of its own projection.
        owners: of which projection each row is: (rows, projections), one or zero. None where there is one, and all rows are of it.
        likeness: equal for factors whose owners are equal.
    """

    left: Tensor
    right: Tensor
    owners: Tensor | None
    likeness: Hashable


def spread(left: Tensor, owners: Tensor) -> Tensor:
    """A left factor (..., rows, r) with a block of columns for each projection, zero outside its own rows: (..., rows, projections * r)."""
    return (left.unsqueeze(-2) * owners.unsqueeze(-1)).flatten(-2)


@torch.no_grad()
def merged(weights: Sequence[Tensor], factors: Sequence[Factors], scaling: float) -> list[Tensor]:
    """Each weight (rows, columns) plus its adapter: computed in fp32, and rounded once to the dtype of the weight.

    Weights and factors that are alike, as those of hundreds of experts, are computed together: what one adapter makes of its weight does
    not depend, bit for bit, on those beside it. Takes the memory of the results; where no kernel fuses the sum besides
    ``_MERGED_TOGETHER`` elements or one weight in fp32. Enqueued on the current stream. Not collective.
    """
    forms = [_fused_form(weight, of_one) for weight, of_one in zip(weights, factors, strict=True)]
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for index, (weight, of_one, form) in enumerate(zip(weights, factors, forms, strict=True)):
        kind = of_one.likeness, of_one.left.shape, of_one.left.dtype, weight.shape, weight.dtype, weight.device, form
        alike[kind].append(index)
    found: dict[int, Tensor] = {}
    for group in alike.values():
        form, given = forms[group[0]], [(weights[i], factors[i]) for i in group]
        at_once = len(group) if form is not None else max(1, _MERGED_TOGETHER // max(1, weights[group[0]].numel()))
        for start in range(0, len(group), at_once):
            some, of_some = zip(*given[start : start + at_once], strict=True)
            results = _by_torch(some, of_some, scaling) if form is None else _fused(some, of_some, scaling, form)
            found.update(zip(group[start : start + at_once], results, strict=True))
    return [found[index] for index in range(len(weights))]


def _by_torch(weights: Sequence[Tensor], factors: Sequence[Factors], scaling: float) -> Sequence[Tensor]:
    sums, owners = _stacked(weights), factors[0].owners
    left, right = (_stacked(each) for each in ([f.left for f in factors], [f.right for f in factors]))
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


def _fused(weights: Sequence[Tensor], factors: Sequence[Factors], scaling: float, form: Form) -> Sequence[Tensor]:
    # Those of an embedding are transposed, and few.
    lefts, rights = [f.left.contiguous() for f in factors], [f.right.contiguous() for f in factors]
    with _compiler:
        return _kernel().merge(weights, lefts, rights, factors[0].owners, scaling, form).unbind()


def _fused_form(weight: Tensor, factors: Factors) -> Form | None:
    """How the kernel takes a weight and its factors; None where torch merges them. Goes by nothing but these."""
    dtypes = {weight.dtype, factors.left.dtype, factors.right.dtype}
    is_taken = dtypes <= _FUSED_DTYPES and factors.left.dtype == factors.right.dtype and weight.dim() == 2 and weight.stride(1) == 1
    if not is_taken or not weight.numel() or not _fuses(weight.device):
        return None
    kernel, (row_stride, columns), rank = _kernel(), (weight.stride(0), weight.shape[1]), factors.left.shape[1]
    is_aligned = not weight.data_ptr() % _ALIGNMENT and _begins_aligned(factors.right)
    is_aligned = is_aligned and not row_stride % kernel.UNIT and not columns % kernel.UNIT
    is_rank_aligned = _begins_aligned(factors.left) and not rank % kernel.UNIT
    form: Form = kernel.Form(row_stride, kernel.UNIT if is_aligned else 1, kernel.UNIT if is_rank_aligned else 1)
    return form


def _begins_aligned(tensor: Tensor) -> bool:
    """Whether a factor begins at a multiple of _ALIGNMENT; its contiguous copy, where it has to be copied, does."""
    return not tensor.is_contiguous() or tensor.data_ptr() % _ALIGNMENT == 0


_compiler = threading.Lock()


def _kernel() -> ModuleType:
    """The module, imported by whoever merges on CUDA only."""
    from rlsync.copy import merge_kernel

    return merge_kernel


@lru_cache
def _fuses(device: torch.device) -> bool:
    """Whether the kernel runs on a device. Triton comes with torch's builds for CUDA; it needs a C compiler and Python's headers."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    try:
        kernel, tiny = _kernel(), torch.zeros(_TINY, _TINY, dtype=torch.bfloat16, device=device)
        with _compiler:
            kernel.merge([tiny], [tiny], [tiny], None, 1.0, kernel.Form(_TINY, kernel.UNIT, kernel.UNIT))
    except Exception as error:
        logger.warning("%s: torch merges adapters, in several passes over copies in fp32, because Triton does not run: %s", device, error)
        return False
    return True


def compile_ahead(weights: Sequence[Tensor], factors: Sequence[Factors]) -> threading.Thread:
    """Begin to compile what merges these, which takes seconds on a machine that has not had it yet. Returns at once.

    Whoever merges before it is there waits for it, and hears what keeps it from being compiled: nothing is said of that here.
    """

    def run() -> None:
        compiled: set[Hashable] = set()
        with contextlib.suppress(Exception):
            for weight, of_one in zip(weights, factors, strict=True):
                form = _fused_form(weight, of_one)
                kind = weight.device, weight.dtype, of_one.left.dtype, of_one.left.shape[1], of_one.owners is None, form
                if form is not None and kind not in compiled:
                    compiled.add(kind)
                    _fused(*_tiny(weight, of_one), 1.0, replace(form, row_stride=_TINY))

    thread = threading.Thread(target=run, name="rlsync-merge-compiler", daemon=True)
    thread.start()
    return thread


def _tiny(weight: Tensor, factors: Factors) -> tuple[list[Tensor], list[Factors]]:
    """Zeros of their dtypes, rank and projections."""
    left, right, owners = factors.left, factors.right, factors.owners
    made = Factors(
        left.new_zeros(_TINY, left.shape[1]),
        right.new_zeros(right.shape[0], _TINY),
        None if owners is None else owners.new_zeros(_TINY, owners.shape[1]),
        None,
    )
    return [weight.new_zeros(_TINY, _TINY)], [made]
