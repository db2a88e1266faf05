"""Claims about what a source notices before it sends; the bridge is a table, the model a module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlsync.bridge import source
from rlsync.errors import PlacementError, RlsyncError
from rlsync.layout.geometry import Box, Piece, Placement
from rlsync.megatron import model as megatron_model


@pytest.fixture
def norm(monkeypatch) -> torch.nn.Module:
    module = torch.nn.BatchNorm1d(4)
    monkeypatch.setattr(source.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(megatron_model, "iter_weights", lambda models: iter(named(module).items()))
    return module


def named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def source_of(module: torch.nn.Module) -> source.MegatronSource:
    pieces = tuple(Piece(f"hf.{name}", Box((0,), (4,)), name, 0, (1,)) for name in ("weight", "bias", "running_mean"))
    shards = SimpleNamespace(
        tensors=(), placements=(Placement("actor 0", (), pieces),), buffers=named(module), adapters={}, adapted=frozenset()
    )
    return source.MegatronSource(SimpleNamespace(shards=lambda models: shards), [module])


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_a_replaced_parameter_or_buffer_is_named(norm, name):
    held = source_of(norm)
    held.begin(0)
    setattr(norm, name, torch.nn.Parameter(torch.ones(4)) if name == "weight" else torch.ones(4))
    with pytest.raises(PlacementError, match=f"1 parameters or buffers are other objects than at connect.*{name}"):
        held.begin(1)


def test_a_buffer_alone_that_is_away_is_named(norm):
    held = source_of(norm)
    norm.running_mean.untyped_storage().resize_(0)
    with pytest.raises(RlsyncError, match=r"offloaded \(1 parameters and buffers, among them running_mean\)"):
        held.begin(0)


def test_parameters_without_gradient_are_frozen_and_buffers_never(norm):
    assert source_of(norm).frozen == frozenset()
    norm.weight.requires_grad_(False)
    held = source_of(norm)
    assert held.frozen == {"hf.weight"}
    held.begin(0)
    norm.weight.requires_grad_(True)
    with pytest.raises(PlacementError, match=r"1 parameters were frozen at connect.* among them weight"):
        held.begin(1)


def test_scaled_factors_are_those_of_now_wherever_they_lie_and_are_looked_up_once():
    """An optimizer writes into factors, and an offload takes their memory away and brings it back elsewhere."""
    looked_up: list[str] = []

    class Buffers(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            looked_up.append(name)
            return super().__getitem__(name)

    factors = {name: torch.nn.Parameter(torch.randn(shape).to(torch.bfloat16)) for name, shape in {"a": (8, 2), "b": (3, 2)}.items()}
    scaled = source._Scaling(Buffers(factors), 1.7)
    for step in range(3):
        for factor in factors.values():
            storage = factor.untyped_storage()
            kept = storage.clone()
            storage.resize_(0)
            storage.resize_(kept.nbytes())
            storage.copy_(kept)
            with torch.no_grad():
                factor.add_(step)
        for factor, found in zip(factors.values(), scaled(tuple(factors)), strict=True):
            assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found.view(factor.shape), factor.float() * 1.7)
    assert looked_up == ["a", "b"]
