"""Vision towers compute what transformers' do, with their parameters under their names, and with fewer calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlsync.megatron.tower import GatedNetwork, PatchAttention, PatchProjection, RootMeanSquareNorm, attend_within_pictures, refined
from tests.vision_models import picture, processed, tiny_vision_config, tiny_vision_model

HEADS, SIZE = 3, 8
# Height and width in pixels: several windows, whole and cut ones.
PICTURES = [(112, 84), (56, 56), (140, 28)]


def features(tower: Any, *given: torch.Tensor) -> torch.Tensor:
    """All that a tower returns of pictures, one below the other."""
    output = tower(given[0].to(tower.dtype), grid_thw=given[1])
    return torch.cat((output.pooler_output, *getattr(output, "deepstack_features", ())))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_tower_computes_what_transformers_does(family, recomputes):
    """Features and the gradients of every parameter. The control: patches that lie elsewhere are seen otherwise."""
    config, tower = tiny_vision_config(family), tiny_vision_model(family, num_hidden_layers=2).model.visual.train()
    given = processed(config, [picture(*size, seed=seed) for seed, size in enumerate(PICTURES)])

    def computed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        tower.zero_grad()
        found = features(tower, *given)
        found.square().mean().backward()
        return found.detach(), {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}

    wanted, gradients = computed()
    parameters = dict(tower.named_parameters())
    refined(tower)
    assert {name: id(parameter) for name, parameter in tower.named_parameters()} == {name: id(each) for name, each in parameters.items()}
    kinds = {type(module) for module in tower.modules()}
    assert {PatchProjection, PatchAttention} <= kinds
    assert ({GatedNetwork, RootMeanSquareNorm} <= kinds) == (family == "qwen2_5_vl")
    if recomputes:
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    found, ours = computed()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6 + 1e-5 * gradient.abs().max().item(), msg=name)
    with torch.no_grad():
        elsewhere = features(tower, given[0], given[1][:, [0, 2, 1]])
    assert not torch.allclose(elsewhere, wanted, atol=1e-2)


def sequences(lengths: list[int], *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values (patches, heads, head size), and where sequences end."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (3, sum(lengths), HEADS, SIZE)
    query, key, value = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_().unbind(0)
    return query, key, value, torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(each.transpose(0, 1)[None] for each in (query, key, value)), scale=0.4)[0].transpose(0, 1)


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    parts = zip(*(tensor.split(ends.diff().tolist()) for tensor in (query, key, value)), strict=True)
    return torch.cat([whole(*part) for part in parts])


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return attend_within_pictures(query, key, value, ends, int(ends.diff().max()), 0.4)


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [4, 4, 2, 6, 6, 6, 4], [1, 9]])
def test_patches_see_those_of_their_sequence_alone(lengths):
    query, key, value, ends = sequences(lengths)
    found, expected = attended(query, key, value, ends), one_by_one(query, key, value, ends)
    assert found.shape == (sum(lengths), HEADS, SIZE)
    assert torch.equal(found, expected)
    mine, theirs = (torch.autograd.grad(out.square().sum(), (query, key, value), retain_graph=True) for out in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
    if len(lengths) > 1:  # the control: across their ends they would see others
        assert not torch.allclose(found, whole(query, key, value), atol=1e-3)


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


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_tower_on_a_gpu_computes_what_transformers_does_on_a_cpu(family, dtype, monkeypatch):
    """Also in bfloat16, with kernels that a CPU has not: its features and gradients are as far off as transformers' own in bfloat16."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    config = tiny_vision_config(family)
    given = processed(config, [picture(*size, seed=seed) for seed, size in enumerate(PICTURES)])

    def computed(dtype: torch.dtype, device: str, *, ours: bool) -> list[torch.Tensor]:
        tower = tiny_vision_model(family, num_hidden_layers=2).model.visual.train().to(device, dtype)
        if ours:
            refined(tower)
        found = features(tower, *(each.to(device) for each in given))
        found.float().square().mean().backward()
        return [each.float().cpu() for each in (found.detach(), *(parameter.grad for parameter in tower.parameters()))]

    def apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
        return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, wanted, strict=True))

    exact = computed(torch.float32, "cpu", ours=False)
    off = apart(computed(dtype, "cuda", ours=True), exact)
    allowed = 1e-4 if dtype == torch.float32 else 1.5 * apart(computed(dtype, "cuda", ours=False), exact)
    print(f"TOWER {family} {dtype}: {off:.1e}, allowed {allowed:.1e}")
    assert off <= allowed


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_patches_are_projected_as_by_the_convolution(family):
    """With its parameters, under its names."""
    config = tiny_vision_config(family)
    model = tiny_vision_model(family, num_hidden_layers=2).model.visual.patch_embed
    patches, _ = processed(config, [picture(112, 84, seed=1), picture(56, 56, seed=2)])
    names, convolved = list(model.state_dict()), model(patches)
    model.proj = PatchProjection(model.proj)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(patches), convolved, rtol=1e-5, atol=1e-4)
