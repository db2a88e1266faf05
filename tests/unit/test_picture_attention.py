"""Attention of vision towers over whole batches: what transformers' own attention gives sequence by sequence, with fewer calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rlsync.megatron.vision import attend_within_pictures

HEADS, SIZE = 3, 8


def sequences(lengths: list[int], *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (3, 1, HEADS, sum(lengths), SIZE)
    query, key, value = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_().unbind(0)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return query, key, value, ends


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    parts = zip(*(tensor.split(ends.diff().tolist(), dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, scale=0.4).transpose(1, 2) for part in parts], dim=1)


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    longest = int(ends.diff().max())
    found, weights = attend_within_pictures(
        torch.nn.Module(), query, key, value, None, scaling=0.4, cu_seq_lens_q=ends, max_length_q=longest, is_causal=False
    )
    assert weights is None
    return found


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [4, 4, 2, 6, 6, 6, 4], [1, 9]])
def test_patches_see_those_of_their_sequence_alone(lengths):
    query, key, value, ends = sequences(lengths)
    found, expected = attended(query, key, value, ends), one_by_one(query, key, value, ends)
    assert found.shape == (1, sum(lengths), HEADS, SIZE)
    assert torch.equal(found, expected)
    mine, theirs = (torch.autograd.grad(out.square().sum(), (query, key, value), retain_graph=True) for out in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
    if len(lengths) > 1:  # the control: across their ends they would see others
        whole = F.scaled_dot_product_attention(query, key, value, scale=0.4).transpose(1, 2)
        assert not torch.allclose(found, whole, atol=1e-3)


def test_equally_long_neighbours_are_one_call(monkeypatch):
    calls = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *parts, **given: calls.append(parts[0].shape) or plain(*parts, **given))
    attended(*sequences([4, 4, 4, 2, 2, 4]))
    assert [(shape[0], shape[2]) for shape in calls] == [(3, 4), (2, 2), (1, 4)]


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_attends_as_a_cpu_does(dtype):
    """In half precision with one kernel for all sequences, forward and backward."""
    lengths = [64] * 7 + [16, 448, 64]
    expected = one_by_one(*sequences(lengths))
    query, key, value, ends = sequences(lengths, device="cuda", dtype=dtype)
    found = attended(query, key, value, ends)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    assert (found.cpu().float() - expected).abs().max() <= tolerance
    (gradient,) = torch.autograd.grad(found.float().square().sum(), value)
    cpu = sequences(lengths)
    (wanted,) = torch.autograd.grad(one_by_one(*cpu).square().sum(), cpu[2])
    assert (gradient.cpu().float() - wanted).abs().max() <= 10 * tolerance
