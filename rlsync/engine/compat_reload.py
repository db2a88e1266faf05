"""vLLM's layer-wise reload of some layers of a model, while loaders write all others where they live.

Like compat, it holds private names and version branches of vLLM (0.25.1, 0.32.0). Knows no bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise

from rlsync.engine import compat, compat_layers

# What vLLM's parameters call their loader, which a reload wraps.
_LOADER_NAMES = frozenset({"weight_loader", "_weight_loader"})


class _Layers:
    """Some layers of a model, for functions of vLLM that go through all ``modules()`` of one; in all else it is the model."""

    def __init__(self, model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        vars(self).update(_model=model, _some=layers)

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(self._some)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


def begin_reload(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """Put the parameters of ``layers`` into checkpoint layout on meta; each layer is rebuilt when its last tensor arrives."""
    layerwise.initialize_layerwise_reload(_Layers(model, layers))


def finish_reload(model: torch.nn.Module, layers: Sequence[torch.nn.Module], model_config: Any) -> None:
    """Rebuild those of ``layers`` that padding kept waiting, and attention layers into which something was loaded."""
    # vLLM warns of every layer without checkpoint tensors, at every reload; what is loaded was judged at connect.
    with torch.no_grad(), compat.quiet():
        layerwise.finalize_layerwise_reload(_Layers(model, layers), model_config)


def loading_device(model: torch.nn.Module) -> torch.device:
    """Where tensors of the model were made when it was loaded."""
    known = (layerwise.LAYERWISE_INFO[layer] for layer in model.modules() if layer in layerwise.LAYERWISE_INFO)
    return next(info.restore_device for info in known if any(info.restore_metadata))


def loads_in_place(layer: torch.nn.Module, attribute: str) -> bool:
    """Whether loaders take the live tensor for what they take the one in checkpoint layout for: same class, attributes and loader.

    Post-processing may have put a plain parameter in the place of the one that knew how it is loaded. What a compiler or a load has
    noted on the live one beside that does not matter; neither does the tensors' layout.
    """
    live, wanted = compat_layers.live_tensors(layer).get(attribute), compat_layers.checkpoint_layout(layer).get(attribute)
    if live is None or wanted is None or type(live) is not type(wanted):
        return False
    # As it is: vLLM >= 0.32 wraps loaders of live biases too, and one that a reload without them has left wrapped loads nothing.
    if _function(layerwise._get_weight_loader(live)) is not _function(layerwise._get_original_loader(wanted)):
        return False
    mine, theirs = ({n: v for n, v in vars(t).items() if n not in _LOADER_NAMES} for t in (live, wanted))
    return mine.keys() >= theirs.keys() and all(_same(mine[name], value) for name, value in theirs.items())


def _function(loader: Callable[..., Any]) -> Any:
    """Without the layer that it is bound to, which the checkpoint layout does not refer to."""
    return getattr(loader, "__func__", loader)


def _same(mine: Any, theirs: Any) -> bool:
    """Of one value, where values can be compared; of one kind otherwise."""
    if isinstance(mine, bool | int | float | str | None):
        return bool(mine == theirs)
    return type(mine) is type(theirs) and _function(mine) is _function(theirs) if callable(mine) else type(mine) is type(theirs)
