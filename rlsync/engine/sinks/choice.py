"""Choice of the sink for each buffer of a worker, from an allow-list of layers and the live model. Knows no bucket and no byte.

A layout that is shape, strides and dtype may still hold shuffled bytes, and a checksum after a write of one's own proves
nothing; so *direct* needs a kind of layer that is known to compute from plain weights, and memory that is what it seems.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rlsync.engine.compat import layers as compat_layers
from rlsync.engine.compat import patches
from rlsync.engine.compat import reload as compat_reload
from rlsync.engine.compat.layers import LayerKind
from rlsync.engine.sinks import owner
from rlsync.errors import ConfigError

SinkName = Literal["direct", "layerwise", "loaders"]
REQUESTS = ("auto", *get_args(SinkName))

_LAYERS = "vllm.model_executor.layers"
_LINEAR = f"{_LAYERS}.linear.UnquantizedLinearMethod"
_EMBEDDING = f"{_LAYERS}.vocab_parallel_embedding.UnquantizedEmbeddingMethod"
_EXPERTS = f"{_LAYERS}.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod"
_NORMS = (
    *(f"{_LAYERS}.layernorm.{name}" for name in ("RMSNorm", "GemmaRMSNorm", "RMSNormGated", "LayerNorm")),
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.RMSNorm",
)
# Of vision towers: the patch embedding, and a learned table of positions.
_PLAIN = (*(f"{_LAYERS}.conv.{name}" for name in ("Conv2dLayer", "Conv3dLayer")), "torch.nn.modules.sparse.Embedding")
# Kinds of layers that compute from plain weights and derive nothing else from them, in vLLM 0.25.1 and 0.32.0.
DIRECT: frozenset[LayerKind] = frozenset(
    {LayerKind(platform, kind) for platform in ("cpu", "cuda") for kind in (*_NORMS, *_PLAIN)}
    | {
        LayerKind("cuda", _LINEAR),
        LayerKind("cuda", _EMBEDDING),
        LayerKind("cuda", _EXPERTS, "TRITON"),
        LayerKind("cuda", _EXPERTS, "BATCHED_TRITON"),
        LayerKind("cpu", _LINEAR, "plain"),
        LayerKind("cpu", _EMBEDDING, "plain"),
    }
)
# Whose post-processing may run on the live weight, after the layer that owns it has been written (a tied lm_head).
_SHARERS = frozenset({_LINEAR, _EMBEDDING})


@dataclass(frozen=True, slots=True)
class Choice:
    """``sinks``: buffer name -> sink; either no buffer is written by ``loaders`` or all are. ``reasons``: one sentence for each
    module that is not direct, or for the worker where nothing is placed, for the log."""

    sinks: Mapping[str, SinkName]
    reasons: tuple[str, ...]


def choose(model: torch.nn.Module, buffers: Sequence[str], aliases: Mapping[str, Sequence[str]], requested: str) -> Choice:
    """Choose for each module that holds one of ``buffers``.

    Args:
        model: the live model of a worker, in the state in which it serves.
        buffers: names as in ``named_parameters``; one of each group that shares memory.
        aliases: for a buffer, the other names of its memory (a tied ``lm_head.weight``).
        requested: ``auto``, ``direct``, ``layerwise`` or ``loaders``. ``auto`` is direct where that is safe, else layerwise, and
            loaders for the whole worker where vLLM's reload of one layer alone would not be complete.

    Raises ConfigError where what is requested cannot be kept right; one error with all that is in its way.
    """
    if requested not in REQUESTS:
        raise ConfigError(f"weight_sync.sink is {requested!r}; it is one of {', '.join(REQUESTS)}")
    unsound = patches.reload_findings(model)
    if unsound:
        raise ConfigError(
            f"vLLM's reload cannot be relied on: {'; '.join(unsound)}. Is the plug-in loaded in the worker, and its vLLM supported?"
        )
    if requested == "loaders":
        return Choice(dict.fromkeys(buffers, "loaders"), ("loaders: requested",))
    modules: dict[str, list[str]] = defaultdict(list)
    for name in buffers:
        modules[name.rpartition(".")[0]].append(name)
    view = _View.of(model, aliases)
    against = {path: tuple(_against_direct(view, names)) for path, names in modules.items()}
    if requested == "direct" and any(against.values()):
        raise ConfigError(f"weight_sync.sink is direct, but: {'; '.join(_sentences(modules, against))}. Use auto or layerwise")
    findings = _against_layerwise(view, modules, {path for path in modules if requested == "layerwise" or against[path]})
    if findings and requested != "auto":
        raise ConfigError(f"weight_sync.sink is {requested}, but: {'; '.join(findings)}. Use auto or loaders")
    if findings:
        return Choice(dict.fromkeys(buffers, "loaders"), tuple(f"loaders: {finding}" for finding in findings))
    sinks: dict[str, SinkName] = {}
    for path, names in modules.items():
        sinks.update(dict.fromkeys(names, "layerwise" if requested == "layerwise" or against[path] else "direct"))
    return Choice(sinks, tuple(_sentences(modules, against)) if requested == "auto" else (f"{requested}: requested",))


def not_in_place(
    model: torch.nn.Module, buffers: Sequence[str], computed: Sequence[str], aliases: Mapping[str, Sequence[str]]
) -> tuple[torch.nn.Module, ...]:
    """Layers that vLLM's loaders cannot write where they live, so that they have to go through its reload.

    Args:
        buffers: all that loaders write. computed: those of them into which a loader puts what it has computed.
    """
    view = _View.of(model, aliases)
    modules: dict[str, list[str]] = defaultdict(list)
    for name in buffers:
        modules[name.rpartition(".")[0]].append(name)
    made = {name.rpartition(".")[0] for name in computed}
    found: dict[int, torch.nn.Module] = {}
    for path, names in modules.items():
        layer = model.get_submodule(path)
        known = all(compat_reload.loads_in_place(layer, name.rpartition(".")[2]) for name in names)
        if path in made or not known or any(True for _ in _against_direct(view, names)):
            found[id(layer)] = layer
    return tuple(found.values())


def _sentences(modules: Mapping[str, Sequence[str]], against: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for path, reasons in against.items():
        if reasons:
            yield f"{', '.join(modules[path])} {'is' if len(modules[path]) == 1 else 'are'} not direct: {', '.join(dict.fromkeys(reasons))}"


@dataclass(frozen=True, slots=True)
class _View:
    """What is asked of a model for every buffer. ``attention``: identity -> path of each attention layer. ``absorbed``: identity of
    a projection -> what an attention layer made of its weight, by path."""

    model: torch.nn.Module
    aliases: Mapping[str, Sequence[str]]
    attention: Mapping[int, str]
    absorbed: Mapping[int, Mapping[str, torch.Tensor]]

    @classmethod
    def of(cls, model: torch.nn.Module, aliases: Mapping[str, Sequence[str]]) -> _View:
        attention, absorbed = {}, {}
        for path, layer in compat_layers.attention_layers(model):
            attention[id(layer)] = path
            found = compat_layers.absorbed_tensors(layer)
            if found is not None:
                absorbed[id(found[0])] = {f"{path}.{name}": tensor for name, tensor in found[1].items()}
        return cls(model, aliases, attention, absorbed)

    def sharers(self, name: str) -> dict[str, torch.nn.Module]:
        """Other layers that share the memory; without attention, which renews its views of other layers' weights at the end of a sync."""
        first = owner(self.model, name)[0]
        found = {alias: owner(self.model, alias)[0] for alias in self.aliases.get(name, ())}
        return {alias: layer for alias, layer in found.items() if layer is not first and id(layer) not in self.attention}


def _against_direct(view: _View, names: Sequence[str]) -> Iterator[str]:
    """Why the buffers of one module cannot be written where they live."""
    for name in names:
        for alias, layer in {name: owner(view.model, name)[0], **view.sharers(name)}.items():
            attribute = alias.rpartition(".")[2]
            kind = compat_layers.layer_kind(layer)
            if kind not in DIRECT and not compat_layers.stays_as_loaded(attribute):
                yield f"{kind.method}{f' ({kind.backend})' if kind.backend else ''} on {kind.platform} is not on the list"
            reason = _identity(layer, attribute)
            if reason is not None:
                yield f"{alias} {reason}"
                continue
            storage = compat_layers.live_tensors(layer)[attribute].untyped_storage().data_ptr()
            absorbed = view.absorbed.get(id(layer), {})
            yield from (f"{path} is a copy of {alias}" for path, t in absorbed.items() if t.untyped_storage().data_ptr() != storage)


def _identity(layer: torch.nn.Module, attribute: str) -> str | None:
    """Why the live tensor is not its checkpoint layout, or None."""
    live, wanted = compat_layers.live_tensors(layer).get(attribute), compat_layers.checkpoint_layout(layer).get(attribute)
    if live is None or wanted is None:
        return "exists in only one of engine and checkpoint layout"
    if (live.shape, live.stride(), live.dtype) != (wanted.shape, wanted.stride(), wanted.dtype):
        return (
            f"is {tuple(live.shape)} {live.dtype} {live.stride()} in the engine, "
            f"{tuple(wanted.shape)} {wanted.dtype} {wanted.stride()} as it is loaded"
        )
    if not live.numel() or not live.is_contiguous():
        return "is empty" if not live.numel() else f"has strides {live.stride()}"
    return "is kept in host memory" if compat_layers.is_host_offloaded(live) else None


def _against_layerwise(view: _View, modules: Mapping[str, Sequence[str]], layerwise: set[str]) -> list[str]:
    """Reasons why reloading the modules in ``layerwise`` one by one, and writing the others in place, would leave a wrong model."""
    findings = [f"{name} has a post-processing that only a load runs" for name in compat_layers.own_post_processing(view.model)]
    attention = set(view.attention.values())
    for path, names in modules.items():
        if path in attention:
            findings.append(f"{', '.join(names)} are loaded into an attention layer, which is post-processed after all others")
        if path not in layerwise:
            continue
        findings += _unfilled(view.model.get_submodule(path), path, {name.rpartition(".")[2] for name in names})
        for name in (name for name in names if not compat_layers.stays_as_loaded(name.rpartition(".")[2])):
            kinds = {alias: compat_layers.layer_kind(layer).method for alias, layer in view.sharers(name).items()}
            findings += [f"{alias} shares {name} and is made by {kind}" for alias, kind in kinds.items() if kind not in _SHARERS]
    return findings


def _unfilled(layer: torch.nn.Module, path: str, filled: set[str]) -> Iterator[str]:
    """Unfilled tensors of a module whose live values do not fit its checkpoint layout."""
    live = compat_layers.live_tensors(layer)
    for name, wanted in compat_layers.checkpoint_layout(layer).items():
        if name in filled:
            continue
        kept = live.get(name)
        if kept is None or (kept.shape, kept.dtype) != (wanted.shape, wanted.dtype):
            yield f"nothing fills {path}.{name}, and the engine no longer has it as it was loaded"
