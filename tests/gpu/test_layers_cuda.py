"""Layers of rlsync that have kernels on GPUs, as plain PyTorch computes them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rlsync.megatron.layers import SwiGLU

CONFIG = SimpleNamespace(gated_linear_unit=True, activation_func=F.silu)


@pytest.mark.gpu(1)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_swiglu_of_transformer_engine_and_its_gradient_are_those_of_pytorch(dtype, tolerance):
    pytest.importorskip("transformer_engine.pytorch")
    generator = torch.Generator("cuda").manual_seed(0)
    given = torch.randn(6, 2, 2 * 96, device="cuda", generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    gradient = torch.randn(96, 6, 2, device="cuda", generator=generator, dtype=torch.float64).to(dtype).permute(1, 2, 0)
    assert not gradient.is_contiguous()

    found = SwiGLU(CONFIG)(given)
    (slope,) = torch.autograd.grad(found, given, gradient)

    exact = given.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    (expected_slope,) = torch.autograd.grad(expected, exact, gradient.double())
    assert found.dtype == slope.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=tolerance, atol=tolerance)
    # The halves the other way round are another function.
    swapped = F.silu(up) * gate
    assert (found.double() - swapped).abs().max() > 0.1
