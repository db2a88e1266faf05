"""Layers of rlsync that have kernels on GPUs, as plain PyTorch computes them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rlsync.layout.topology import Topology
from rlsync.megatron.environment import rank_environment
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


@pytest.mark.gpu(1)
def test_one_kernel_multiplies_by_all_experts_as_one_for_each_does(monkeypatch):
    """In the environment that ranks start with; experts without tokens among them. Each product is compared with PyTorch's in fp64."""
    te = pytest.importorskip("transformer_engine.pytorch")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("TransformerEngine has that kernel for Hopper")
    torch.manual_seed(0)
    splits = [0, 300, 1, 77, 0, 512, 16, 40]
    layer = te.GroupedLinear(len(splits), 256, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")
    weights = [getattr(layer, f"weight{number}") for number in range(len(splits))]
    given = torch.randn(sum(splits), 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(sum(splits), 384, device="cuda", dtype=torch.bfloat16)
    rows = [part.double() for part in given.detach().split(splits)]
    expected = torch.cat([part @ weight.detach().double().T for part, weight in zip(rows, weights, strict=True)])
    back = torch.cat([part.double() @ weight.detach().double() for part, weight in zip(gradient.split(splits), weights, strict=True)])
    launches = {}
    for name, value in (("each", "0"), ("all", rank_environment(Topology())["NVTE_USE_CUTLASS_GROUPED_GEMM"])):
        monkeypatch.setenv("NVTE_USE_CUTLASS_GROUPED_GEMM", value)
        layer(given, splits)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            found = layer(given, splits)
            torch.cuda.synchronize()
        launches[name] = sum(event.count for event in profile.key_averages())
        (slope,) = torch.autograd.grad(found, given, gradient)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(slope.double(), back, rtol=1e-2, atol=1e-2)
    assert launches["all"] < launches["each"], launches
