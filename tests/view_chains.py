"""Random chains of views, as loaders take them: from a tensor to a view of it, and from a view to a memory of which it is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

# Elements of a memory.
SIZE_MOST = 600


@st.composite
def views(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """A random view of ``tensor``, by what loaders use: narrow, transpose, chunk, view, unsqueeze, select, expand."""
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["narrow", "transpose", "chunk", "flatten", "unflatten", "unsqueeze", "squeeze", "select", "step"]))
        if kind == "unsqueeze":
            tensor = tensor.unsqueeze(draw(st.integers(0, tensor.ndim)))
        elif kind == "squeeze":
            tensor = tensor.squeeze()
        elif tensor.ndim:
            tensor = _moved(draw, tensor, kind, draw(st.integers(0, tensor.ndim - 1)))
    return tensor


def _moved(draw: st.DrawFn, tensor: torch.Tensor, kind: str, dim: int) -> torch.Tensor:
    size = tensor.shape[dim]
    if kind == "narrow":
        start = draw(st.integers(0, size - 1)) if size else 0
        return tensor.narrow(dim, start, draw(st.integers(1, size - start)) if size else 0)
    if kind == "transpose":
        return tensor.transpose(dim, draw(st.integers(0, tensor.ndim - 1)))
    if kind == "chunk":
        return draw(st.sampled_from(tensor.chunk(draw(st.integers(1, 3)), dim)))
    if kind == "select" and size:
        return tensor.select(dim, draw(st.integers(0, size - 1)))
    if kind == "flatten" and tensor.is_contiguous():
        return tensor.flatten()
    if kind == "step":
        return tensor[(slice(None),) * dim + (slice(None, None, 2),)]
    factors = [f for f in range(1, size + 1) if size % f == 0] if kind == "unflatten" else []
    return tensor.unflatten(dim, (draw(st.sampled_from(factors)), -1)) if factors else tensor


@dataclass(frozen=True)
class Undo:
    """One step from a view back to what it is a view of, and how the view is taken."""

    kind: str
    dim: int
    sizes: tuple[int, ...]

    def base(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.kind == "narrow":
            before, after = self.sizes
            return (*shape[: self.dim], before + shape[self.dim] + after, *shape[self.dim + 1 :])
        if self.kind == "select":
            return (*shape[: self.dim], self.sizes[1], *shape[self.dim :])
        if self.kind == "transpose":
            return tuple(shape[d] for d in self._order(len(shape)))
        return (*shape[: self.dim], *self.sizes, *shape[self.dim + 1 :])

    def view(self, base: torch.Tensor) -> torch.Tensor:
        if self.kind == "narrow":
            return base.narrow(self.dim, self.sizes[0], base.shape[self.dim] - sum(self.sizes))
        if self.kind == "select":
            return base.select(self.dim, self.sizes[0])
        if self.kind == "transpose":
            return base.permute(self._order(base.ndim))
        return base.flatten(self.dim, self.dim + 1)

    def _order(self, ndim: int) -> list[int]:
        order = list(range(ndim))
        order[self.dim], order[self.sizes[0]] = order[self.sizes[0]], order[self.dim]
        return order


@st.composite
def memories(draw: st.DrawFn, shape: tuple[int, ...], steps: int) -> tuple[tuple[int, ...], list[Undo]]:
    """The shape of a memory, and the views that lead from it to a region of ``shape``."""
    undone: list[Undo] = []
    for _ in range(draw(st.integers(0, steps))):
        kind = draw(st.sampled_from(["narrow", "select", "transpose", "flatten"]))
        if kind == "select":
            count = draw(st.integers(1, 3))
            step = Undo(kind, draw(st.integers(0, len(shape))), (draw(st.integers(0, count - 1)), count))
        elif not shape:
            continue
        else:
            dim = draw(st.integers(0, len(shape) - 1))
            if kind == "narrow":
                sizes = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
            elif kind == "transpose":
                sizes = (draw(st.integers(0, len(shape) - 1)),)
            else:
                factor = draw(st.sampled_from([f for f in range(1, max(shape[dim], 1) + 1) if shape[dim] % f == 0]))
                sizes = (factor, shape[dim] // factor)
            step = Undo(kind, dim, sizes)
        if torch.Size(step.base(shape)).numel() > SIZE_MOST:
            continue
        shape = step.base(shape)
        undone.append(step)
    return shape, undone[::-1]


def region_of(memory: torch.Tensor, chain: list[Undo]) -> torch.Tensor | None:
    """None where a flattening is no view."""
    for step in chain:
        view = step.view(memory)
        if view.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr():
            return None
        memory = view
    return memory
