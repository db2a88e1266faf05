"""Tensors that stand in for others on meta: like them in everything, and each in a place of its own."""

from __future__ import annotations

import torch

from rlsync.engine.compat.layers import META_ALIGNMENT, metas_bytes, placed_like


class Marked(torch.nn.Parameter):
    """A parameter as vLLM has them: a class and attributes."""


def metas() -> list[torch.Tensor]:
    marked = Marked(torch.empty(5, 3, device="meta"), requires_grad=False)
    marked.loader = print  # type: ignore[attr-defined]
    transposed = torch.empty(4, 6, dtype=torch.bfloat16, device="meta").t()
    gaping = torch.empty_strided((3, 2), (7, 2), dtype=torch.int8, device="meta")
    return [marked, transposed, gaping, torch.empty((), device="meta"), torch.empty(0, 4, device="meta"), torch.empty(300, device="meta")]


def test_each_is_like_the_one_on_meta_and_fills_a_place_of_its_own():
    memory = torch.full((metas_bytes(metas()),), 0xFF, dtype=torch.uint8)
    rest, made = memory, []
    for meta in metas():
        tensor, rest = placed_like(meta, rest)
        assert (type(tensor), tensor.shape, tensor.stride(), tensor.dtype) == (type(meta), meta.shape, meta.stride(), meta.dtype)
        assert vars(tensor) == vars(meta)
        assert not tensor.numel() or (tensor.data_ptr() - memory.data_ptr()) % META_ALIGNMENT == 0
        made.append(tensor)
    assert rest.numel() == 0
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert [set(tensor.flatten().tolist()) for tensor in made] == [{n} if made[n].numel() else set() for n in range(len(made))]
    assert made[0].untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def test_attributes_are_not_shared_with_the_one_on_meta():
    (meta, *_), memory = metas(), torch.zeros(512, dtype=torch.uint8)
    tensor, _ = placed_like(meta, memory)
    tensor.loader = None
    assert meta.loader is print  # type: ignore[attr-defined]
