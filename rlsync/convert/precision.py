"""Logits of transformers' model beside those of Megatron's with the same weights, on one process: how far apart, and from which layer on.

Owns the comparison and its numbers. Knows no argument of a command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.convert.sources import holdings_of
from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.model import unwrap
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.train import gathered_logits
from rlsync.models import Model, Vision

# Share of the logits' norm by which they may differ: rounding in another order.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
_HF_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)")
_HF_NORM = re.compile(r"(?:model\.)?(?:language_model\.)?norm")


@dataclass(frozen=True, slots=True)
class Difference:
    """How far logits are apart on some positions.

    Attributes:
        positions: which: all, prompt, response, text, pictures.
        count: how many.
        mean, largest: of the absolute differences of logits.
        relative: norm of the differences over that of transformers' logits.
        top1: share of positions at which both find the same token likeliest.
    """

    positions: str
    count: int
    mean: float
    largest: float
    relative: float
    top1: float


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """The hidden states before and after layers: ``after`` is "embedding" or "layer N"; numbers as of :class:`Difference`."""

    after: str
    largest: float
    relative: float


@dataclass(frozen=True, slots=True)
class Precision:
    """What a comparison found. ``first_layer`` is the first that is further apart than the tolerance, or None."""

    dtype: str
    tolerance: float
    logits: tuple[Difference, ...]
    layers: tuple[LayerDifference, ...]
    first_layer: str | None

    @property
    def is_within(self) -> bool:
        """Whether the logits are as near as the tolerance asks."""
        return self.logits[0].relative <= self.tolerance


def random_batch(model: Model, *, rows: int, length: int, seed: int, pictures: int = 0) -> dict[str, Tensor]:
    """Random tokens (``rows``, ``length``), and the first of each row are random pictures of four tokens, as processed.

    Raises ConfigError where pictures do not fit, or the model takes none.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = model.vision
    special = (
        set()
        if vision is None
        else {vision.image_token_id, vision.video_token_id, vision.vision_start_token_id, vision.vision_end_token_id}
    )
    words = torch.tensor([token for token in range(model.dims["vocab"]) if token not in special])
    tokens = words[torch.randint(len(words), (rows, length), generator=generator)]
    if not pictures:
        return {"tokens": tokens}
    if vision is None:
        raise ConfigError(f"{model.architecture} takes no pictures; leave --pictures out")
    block = [vision.vision_start_token_id, *[vision.image_token_id] * 4, vision.vision_end_token_id]
    if len(block) * pictures >= length:
        raise ConfigError(f"{pictures} pictures are {len(block) * pictures} tokens, and a row has {length}; make --length larger")
    tokens[:, 1 : 1 + len(block) * pictures] = torch.tensor(block * pictures)
    side = 2 * vision.spatial_merge_size
    patches = torch.randn(rows * pictures * side**2, vision.patch_dim, generator=generator)
    return {"tokens": tokens, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]] * (rows * pictures))}


def compare_logits(
    folder: Path,
    batch: Mapping[str, Tensor],
    *,
    weights: Path | None = None,
    dtype: str = "float32",
    prompt_length: int = 0,
    tolerance: float | None = None,
) -> Precision:
    """Run both models on a batch, one after the other, and compare. Makes a process group of one rank where there is none.

    Args:
        folder: Hugging Face folder, whose weights transformers loads.
        batch: ``tokens`` (B, S) int64 without padding, and pictures as of ``train_step``.
        weights: what Megatron loads: ``folder`` by default, or shards of any layout.
        dtype: of both models' parameters.
        prompt_length: so many tokens of each row are counted as its prompt.

    Raises what ``AutoBridge.load_weights`` raises, before a model is loaded where it stands in the headers of files.
    """
    bridge = AutoBridge.from_pretrained(folder)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    # Headers alone: what is missing or damaged is said before a model is loaded, and by its file.
    for source in (weights or folder, *([folder] if any(folder.glob("*.safetensors*")) else [])):
        holdings_of(source, bridge.model)
    theirs, their_states = _of_transformers(folder, bridge.model, batch, getattr(torch, dtype))
    ours, our_states = _of_megatron(bridge, folder if weights is None else weights, batch, dtype)
    layers = tuple(
        LayerDifference("embedding" if index == 0 else f"layer {index - 1}", *_distance(a, b))
        for index, (a, b) in enumerate(zip(their_states, our_states, strict=True))
    )
    first = next((layer.after for layer in layers if not layer.relative <= tolerance), None)
    kinds = _kinds(batch["tokens"], prompt_length, bridge.model.vision)
    return Precision(dtype, tolerance, tuple(_difference(name, theirs[mask], ours[mask]) for name, mask in kinds.items()), layers, first)


def _kinds(tokens: Tensor, prompt_length: int, vision: Vision | None) -> dict[str, Tensor]:
    """Masks (B, S) of kinds of positions; those that all or no positions are of are left out."""
    is_picture = torch.zeros_like(tokens, dtype=torch.bool) if vision is None else tokens == vision.image_token_id
    is_prompt = (torch.arange(tokens.size(1)) < prompt_length).expand_as(tokens)
    kinds = {"prompt": is_prompt, "response": ~is_prompt, "pictures": is_picture, "text": ~is_picture}
    return {"all": torch.ones_like(is_prompt), **{name: mask for name, mask in kinds.items() if mask.any() and not mask.all()}}


def _difference(positions: str, theirs: Tensor, ours: Tensor) -> Difference:
    far = (theirs.double() - ours.double()).abs()
    largest, relative = _distance(theirs, ours)
    top1 = (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    return Difference(positions, len(theirs), far.mean().item(), largest, relative, top1)


def _distance(theirs: Tensor, ours: Tensor) -> tuple[float, float]:
    far = theirs.double() - ours.double()
    return far.abs().max().item(), (far.norm() / theirs.double().norm().clamp(min=1e-30)).item()


@torch.no_grad()
def _of_transformers(folder: Path, model: Model, batch: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, S, vocabulary) and hidden states (B, S, H) before the first layer and after each, on the CPU in float32."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForCausalLM if model.vision is None else AutoModelForImageTextToText
    theirs = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(compute_device()).eval()
    modules = dict(theirs.named_modules())
    layers = {int(match[1]): modules[name] for name in modules if (match := _HF_LAYER.fullmatch(name))}
    (norm,) = (modules[name] for name in modules if _HF_NORM.fullmatch(name))
    inputs = {"input_ids": batch["tokens"], "attention_mask": torch.ones_like(batch["tokens"])}
    if "pixel_values" in batch:
        assert model.vision is not None, "pictures are for models with a tower"
        kinds = (batch["tokens"] == model.vision.image_token_id).long()
        inputs |= {"mm_token_type_ids": kinds, "pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}
    with _entering([*(layers[index] for index in sorted(layers)), norm], lambda hidden: hidden) as states:
        logits = theirs(**{name: value.to(compute_device()) for name, value in inputs.items()}).logits
    return logits.float().cpu(), states


@torch.no_grad()
def _of_megatron(bridge: AutoBridge, weights: Path, batch: Mapping[str, Tensor], dtype: str) -> tuple[Tensor, list[Tensor]]:
    """The same of Megatron's model, with ``weights``."""
    is_first = not dist.is_initialized()
    if is_first:
        dist.init_process_group("nccl" if compute_device().type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        initialize_parallel(Topology(), seed=1, timeout_s=600)
    try:
        models = bridge.get_model(weights, bf16=dtype == "bfloat16", fp16=dtype == "float16", wrap_with_ddp=False)
        decoder = unwrap(models[0]).decoder
        with _entering([*decoder.layers, decoder.final_layernorm], lambda hidden: hidden.transpose(0, 1)) as states:
            logits = gathered_logits(models, batch)
        assert logits is not None, "one rank is the last stage"
        return logits.float().cpu(), states
    finally:
        if is_first:
            destroy_parallel()


@contextmanager
def _entering(modules: list[torch.nn.Module], turned: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Hidden states as they enter modules, in the order of these, on the CPU in float32."""
    states: list[Tensor] = []

    def keep(module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = positional[0] if positional else named["hidden_states"]
        states.append(turned(hidden).detach().float().cpu())

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
