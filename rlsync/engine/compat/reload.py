"""vLLM's own loaders and its layer-wise reload: of a whole model, of some layers of it, and of none, with parameters that have no memory.

Knows no bucket.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.platforms import current_platform

from rlsync.engine.compat.layers import checkpoint_layout, live_tensors

try:  # vLLM >= 0.27: a draft model's completeness is checked after each load_weights call, while a sync makes one per bucket
    from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check as _partial_load
except ImportError:
    _partial_load = contextlib.nullcontext

# What vLLM's parameters call their loader, which a reload wraps.
_LOADER_NAMES = frozenset({"weight_loader", "_weight_loader"})


def begin_whole_reload(model: torch.nn.Module) -> None:
    """Put the parameters into checkpoint layout on meta; each layer is rebuilt when its last tensor arrives."""
    layerwise.initialize_layerwise_reload(model)


def load_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hand HF-named tensors to the model's own loaders."""
    with _partial_load(), torch.no_grad():
        model.load_weights(weights)


def finish_whole_reload(model: torch.nn.Module, model_config: Any) -> None:
    """Rebuild the layers that padding or attention kept waiting, and everything derived from them."""
    # vLLM warns of every layer without checkpoint tensors (rotary caches, tied heads), at every reload; what is loaded was
    # judged at connect.
    with torch.no_grad(), quiet():
        layerwise.finalize_layerwise_reload(model, model_config)
        refresh_sharers(model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep vLLM's warnings out of the log for the moment."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def abandon_reload(model: torch.nn.Module) -> None:
    """Give every layer that still waits for tensors its former ones back, so that no parameter stays on meta.

    Without it a later reload skips those layers and counts on from where this one stopped (``can_load`` is true).
    """
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            for tensor in get_layer_tensors(layer).values():
                # Tensors that a reload leaves live were wrapped too.
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = layerwise._get_original_loader(tensor)
            info.reset()
    layerwise.LOADING_LAYERS.clear()


@contextlib.contextmanager
def parameters_on_meta(model: torch.nn.Module) -> Iterator[None]:
    """For the moment, parameters have checkpoint layout and no memory, and loaders run at once. Leaves no trace.

    Raises RuntimeError while a reload is under way.
    """
    known = set(layerwise.LAYERWISE_INFO)
    kept: list[_KeptLayer] = []
    try:
        for layer in model.modules():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                raise RuntimeError(f"a reload of {type(layer).__name__} is under way; finish or abandon it first")
            kept.append(_KeptLayer(layer, info))
            restore_layer_on_meta(layer, info)
            for tensor in get_layer_tensors(layer).values():
                # An earlier reload has left its wrappers on the tensors that describe the layout.
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = layerwise._get_original_loader(tensor)
        yield
    finally:
        for layer_kept in reversed(kept):
            layer_kept.put_back()
        for layer in set(layerwise.LAYERWISE_INFO) - known:
            del layerwise.LAYERWISE_INFO[layer]


class _KeptLayer:
    """Attributes of a layer and its tensors, to be restored in the same order."""

    def __init__(self, layer: torch.nn.Module, info: Any) -> None:
        tensors = [*get_layer_tensors(layer).values(), *(t for group in info.restore_metadata for t in group.values())]
        tables: list[dict[str, Any]] = [layer.__dict__, layer._parameters, layer._buffers, *(t.__dict__ for t in tensors)]
        self._tables = [(table, dict(table)) for table in tables]
        self._non_persistent = layer._non_persistent_buffers_set, set(layer._non_persistent_buffers_set)

    def put_back(self) -> None:
        for table, entries in self._tables:
            table.clear()
            table.update(entries)
        names, kept = self._non_persistent
        names.clear()
        names |= kept


def refresh_sharers(model: torch.nn.Module) -> None:
    """Rebuild what a CPU layer packed from a parameter that belongs to another layer.

    A tied lm_head shares the embedding's parameter, and no tensor is loaded for it, so its reload leaves it alone. On CPU
    it computes from a packed copy made at start-up, which would stay that of the old weights.
    """
    if not current_platform.is_cpu():
        return
    owners: dict[int, Any] = {}
    layer: Any
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            shared = owners.setdefault(id(parameter), layer) is not layer
            # Experts share a gate's score correction, and would pack packed weights.
            if shared and parameter.numel() and parameter is getattr(layer, "weight", None) and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)


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
    """Rebuild those of ``layers`` that padding left incomplete, and attention layers that received tensors."""
    # vLLM warns of every layer without checkpoint tensors, at every reload; what is loaded was judged at connect.
    with torch.no_grad(), quiet():
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
    live, wanted = live_tensors(layer).get(attribute), checkpoint_layout(layer).get(attribute)
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
    """Whether two attributes have one value, where values can be compared, and are of one kind otherwise."""
    if isinstance(mine, bool | int | float | str | None):
        return bool(mine == theirs)
    return type(mine) is type(theirs) and _function(mine) is _function(theirs) if callable(mine) else type(mine) is type(theirs)
