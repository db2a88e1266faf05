"""Claims about leaving post-processing out: only what makes the same of any weights rests, and what it writes is still written."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlsync.engine.sinks.post_processing import PostProcessingCache

KEPT: list[torch.Tensor] = []


class Toy(torch.nn.Module):
    """Has what vLLM's attention has: scales on the device and on the host, ranges, and an implementation."""

    def __init__(self, process: Callable[[Toy], None]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))
        self.weight = torch.nn.Parameter(torch.arange(4.0))
        self.impl = SimpleNamespace(sinks=None, depth=SimpleNamespace(held=None))
        self.projection = torch.nn.Linear(3, 4, bias=False)
        self.process, self.runs, self.kv_cache = process, [], torch.zeros(2)

    def finish(self) -> None:
        self.runs.append(1)
        self.process(self)


def scales(layer: Toy) -> None:
    layer.scale.fill_(1.0)
    layer.scale_float = 1.0
    layer.range = torch.tensor(200.0, dtype=torch.float32)
    layer.impl.sinks = torch.full((2,), 3.0) * 2


def finishing(*layers: Toy) -> PostProcessingCache:
    return PostProcessingCache(layers, lambda layer: (layer, layer.impl), ("kv_cache",))


def run(held: PostProcessingCache, times: int = 1) -> None:
    for _ in range(times):
        held.run(lambda layer: layer.finish())


def test_constants_rest_from_the_second_run_and_are_still_written() -> None:
    layers = [Toy(scales), Toy(scales)]
    held = finishing(*layers)
    run(held)
    assert held.num_skipped == 0  # it has made attributes that were not there
    run(held)
    assert held.num_skipped == 2
    layers[0].scale.fill_(7.0)  # as sleep does
    layers[0].kv_cache = torch.ones(3)
    run(held, 3)
    assert [len(layer.runs) for layer in layers] == [2, 2]
    assert [float(layer.scale) for layer in layers] == [1.0, 1.0]


def absorbs(layer: Toy) -> None:
    """As latent attention does: views of another layer's weight, and scales."""
    layer.scale.fill_(1.0)
    first, second = layer.projection.weight.to(torch.float32).T.view(3, 2, 2).split([1, 1], dim=-1)
    layer.absorbed, layer.impl.sinks = first.transpose(0, 1), second.permute(1, 2, 0)


def absorbing(*, with_projection: bool = True) -> tuple[Toy, PostProcessingCache]:
    layer = Toy(absorbs)
    parts = (layer, layer.impl, *([layer.projection] if with_projection else []))
    layer.finish()
    return layer, PostProcessingCache([layer], lambda layer: parts, ("kv_cache",))


def is_absorbed(layer: Toy) -> bool:
    weight = layer.projection.weight.T.view(3, 2, 2)
    return torch.equal(layer.absorbed, weight[..., :1].transpose(0, 1)) and torch.equal(layer.impl.sinks, weight[..., 1:].permute(1, 2, 0))


def test_views_of_a_weight_rest_and_show_what_is_written_to_it() -> None:
    layer, held = absorbing()
    run(held)
    assert held.num_skipped == 1
    with torch.no_grad():
        layer.projection.weight.mul_(2.0)
    layer.scale.fill_(7.0)
    run(held, 3)
    assert len(layer.runs) == 2 and is_absorbed(layer) and float(layer.scale) == 1.0


@pytest.mark.parametrize("is_moved", [False, True])
def test_views_are_taken_again_of_a_weight_that_is_another_or_has_moved(is_moved: bool) -> None:
    layer, held = absorbing()
    run(held)
    other = torch.nn.Parameter(torch.randn(4, 3))
    if is_moved:
        layer.projection.weight.data = other.data
    else:
        layer.projection.weight = other
    assert not is_absorbed(layer)
    run(held)
    assert is_absorbed(layer)


def test_views_of_what_no_part_has_are_taken_every_time() -> None:
    """Nobody would see that it was replaced, although an attribute of the layer is a view of the same memory."""
    layer, held = absorbing(with_projection=False)
    run(held, 3)
    assert (held.num_skipped, len(layer.runs)) == (0, 4)


def test_constants_of_a_layer_that_rests_since_a_run_that_failed_are_still_written() -> None:
    plain, other = Toy(lambda layer: layer.scale.fill_(1.0)), Toy(reads_weight)
    held = finishing(plain, other)
    other.process = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        run(held)
    assert held.num_skipped == 1
    other.process = reads_weight
    plain.scale.fill_(7.0)  # as sleep does
    run(held)
    assert (len(plain.runs), float(plain.scale)) == (1, 1.0)


def fails(layer: Toy) -> None:
    raise RuntimeError("in the middle")


def reads_weight(layer: Toy) -> None:
    layer.scale.copy_(layer.weight.sum())


def makes_of_weight(layer: Toy) -> None:
    layer.impl.sinks = layer.weight.to(torch.float64)


def asks_weight(layer: Toy) -> None:
    layer.scale.fill_(float(layer.weight[0]))


def adds(layer: Toy) -> None:
    layer.scale.zero_().add_(1.0)


def copies_a_view(layer: Toy) -> None:
    layer.impl.sinks = layer.weight.view(2, 2).T.contiguous()


def draws(layer: Toy) -> None:
    layer.scale.copy_(torch.rand(()))


def writes_a_view(layer: Toy) -> None:
    layer.weight[1:].fill_(0.0)


def writes_elsewhere(layer: Toy) -> None:
    layer.impl.depth.held.fill_(2.0)


def keeps_elsewhere(layer: Toy) -> None:
    layer.impl.depth.held = torch.ones(2)


def counts(layer: Toy) -> None:
    layer.impl.count = getattr(layer.impl, "count", 0) + 1


def renews(layer: Toy) -> None:
    layer.impl.depth = SimpleNamespace(held=None)


@pytest.mark.parametrize(
    "process",
    [
        reads_weight,
        makes_of_weight,
        asks_weight,
        copies_a_view,
        adds,
        draws,
        writes_a_view,
        writes_elsewhere,
        keeps_elsewhere,
        counts,
        renews,
    ],
    ids=lambda process: process.__name__,
)
def test_what_depends_on_anything_runs_every_time(process: Callable[[Toy], None]) -> None:
    layer = Toy(process)
    layer.impl.depth.held = torch.zeros(2)
    held = finishing(layer)
    run(held, 5)
    assert (held.num_skipped, len(layer.runs)) == (0, 5)


def reshapes(layer: Toy) -> None:
    layer.impl.sinks = layer.projection.weight.T.reshape(12)


@pytest.mark.parametrize("process", [reshapes, copies_a_view, makes_of_weight], ids=lambda process: process.__name__)
def test_copies_that_could_have_been_views_are_made_every_time(process: Callable[[Toy], None]) -> None:
    """In inference mode operations come as they were called, and by their declarations these give views."""
    layer = Toy(process)
    parts = (layer, layer.impl, layer.projection)
    held = PostProcessingCache([layer], lambda layer: parts, ("kv_cache",))
    with torch.inference_mode():
        run(held, 3)
    assert (held.num_skipped, len(layer.runs)) == (0, 3)


def set_float(layer: Toy) -> None:
    layer.scale_float = 0.5


def set_buffer(layer: Toy) -> None:
    layer.scale = torch.zeros(())


def set_parameter(layer: Toy) -> None:
    layer.weight = torch.nn.Parameter(torch.zeros(4))


def set_new(layer: Toy) -> None:
    layer.impl.other = 1


def set_impl(layer: Toy) -> None:
    layer.impl = SimpleNamespace(**vars(layer.impl))


@pytest.mark.parametrize("change", [set_float, set_buffer, set_parameter, set_new, set_impl], ids=lambda change: change.__name__)
def test_a_layer_that_has_changed_runs_again(change: Callable[[Any], None]) -> None:
    layer = Toy(scales)
    held = finishing(layer)
    run(held, 2)
    change(layer)
    run(held)
    assert len(layer.runs) == 3
    assert (float(layer.scale), layer.scale_float) == (1.0, 1.0)
    run(held, 3)
    assert len(layer.runs) <= 4 and held.num_skipped == 1


def test_a_layer_that_ceases_to_rest_has_nothing_written() -> None:
    layer = Toy(scales)
    held = finishing(layer)
    run(held, 2)
    layer.process, layer.impl.other = reads_weight, 1
    run(held, 2)
    assert (held.num_skipped, float(layer.scale)) == (0, 6.0)
