"""Engine workers on paper: what a vLLM worker of a dense decoder would hold, from a config.json alone.

This is the one place that says again what the recorder finds out: ``rlsync plan`` and the floors of ``rlsync bench`` need an engine's
layout where no engine runs, for clusters that nobody has at hand. A sync never uses it, as the layering test holds; another test
compares it with recordings of real workers, and turns red where vLLM lays out its weights in another way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsync.errors import PlacementError
from rlsync.layout.geometry import BufferSpec, Location, Padding, Piece, Placement
from rlsync.models.layouts import Column, GatedColumn, Layout, LocalLayout, Part, Replicated, Row, Shape, VocabPadded
from rlsync.models.stacks import Model

# vLLM pads the vocabulary to a multiple of this, whatever the number of ranks (``DEFAULT_VOCAB_PADDING_SIZE``).
_VOCAB_MULTIPLE = 64
_LAYER = "model.layers.{layer}."


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """(q, k, v) one below the other: the rank's query heads, then its key heads, then its value heads (QKVParallelLinear).

    Where there are fewer key-value heads than ranks, neighbouring ranks hold the same one.
    """

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        heads, groups = dims["num_heads"], dims["num_groups"]
        if heads % size:
            raise PlacementError(f"{heads} attention heads cannot be divided by {size} ranks")
        if groups % size and size % groups:
            raise PlacementError(f"{groups} key-value heads and {size} ranks do not divide one another")
        kv_size = min(size, groups)
        kv_rank = rank * kv_size // size
        parts, rows = [], 0
        for source, (at, of) in enumerate(((rank, size), (kv_rank, kv_size), (kv_rank, kv_size))):
            part = Column().local((shapes[source],), at, of, dims).parts[0]
            parts.append(Part(source, part.box, rows * part.strides[0], part.strides))
            rows += part.box.shape[0]
        return LocalLayout((rows, *shapes[0][1:]), tuple(parts))


@dataclass(frozen=True, slots=True)
class Held:
    """One parameter of a worker, the HF tensors in it, and how they are packed. Names carry ``{layer}`` where they repeat."""

    name: str
    hf: tuple[str, ...]
    layout: Layout


def _same(name: str, layout: Layout) -> Held:
    return Held(name, (name,), layout)


def _attention(kind: str) -> Held:
    return Held(
        f"{_LAYER}self_attn.qkv_proj.{kind}", tuple(f"{_LAYER}self_attn.{x}_proj.{kind}" for x in ("q", "k", "v")), FusedQKV()
    )  # fmt: skip


# A row whose first HF tensor the model lacks does not apply: biases, head norms, the head of a tied model.
_TABLE = (
    _same("model.embed_tokens.weight", VocabPadded()),
    _attention("weight"),
    _attention("bias"),
    _same(f"{_LAYER}self_attn.o_proj.weight", Row()),
    _same(f"{_LAYER}self_attn.q_norm.weight", Replicated()),
    _same(f"{_LAYER}self_attn.k_norm.weight", Replicated()),
    Held(f"{_LAYER}mlp.gate_up_proj.weight", tuple(f"{_LAYER}mlp.{x}_proj.weight" for x in ("gate", "up")), GatedColumn()),
    _same(f"{_LAYER}mlp.down_proj.weight", Row()),
    _same(f"{_LAYER}input_layernorm.weight", Replicated()),
    _same(f"{_LAYER}post_attention_layernorm.weight", Replicated()),
    _same("model.norm.weight", Replicated()),
    _same("lm_head.weight", VocabPadded()),
)


def paper_worker(
    model: Model, rank: int, size: int, *, holder: str, dtype: str | None = None, location: Location | None = None
) -> Placement:
    """What worker ``rank`` of ``size`` tensor-parallel ones holds. ``dtype`` is the engine's; default: the model's.

    Raises PlacementError where a tensor has no row here, or where vLLM could not divide one; one error with all of them.
    """
    shapes = {t.name: t.shape for t in model.tensors()}
    dims = {**model.dims, "padded_vocab": -(-model.dims["vocab"] // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE}
    buffers: list[BufferSpec] = []
    pieces: list[Piece] = []
    padding: list[Padding] = []
    findings: dict[str, str] = {}
    for held in _rows(model, shapes):
        try:
            local = held.layout.local([shapes[name] for name in held.hf], rank, size, dims)
        except PlacementError as error:
            findings.setdefault(str(error), held.name)
            continue
        buffers.append(BufferSpec(held.name, dtype or model.dtype, local.shape))
        pieces += (Piece(held.hf[p.source], p.box, held.name, p.offset, p.strides) for p in local.parts)
        padding += (Padding(held.name, p.offset, p.shape, p.strides) for p in local.padding)
    if findings:
        raise PlacementError(f"an engine of {size} ranks cannot hold this model: {'; '.join(f'{n}: {f}' for f, n in findings.items())}")
    return Placement(holder, tuple(buffers), tuple(pieces), tuple(padding), location)


def _rows(model: Model, shapes: Mapping[str, Shape]) -> list[Held]:
    """The table for every layer of the model. Raises PlacementError where it leaves a tensor out."""
    rows = []
    for held in _TABLE:
        layers = range(model.num_layers) if held.name.startswith(_LAYER) else range(1)
        for layer in layers:
            names = tuple(name.format(layer=layer) for name in held.hf)
            if names[0] in shapes:
                rows.append(Held(held.name.format(layer=layer), names, held.layout))
    absent = sorted(shapes.keys() - {name for row in rows for name in row.hf})
    if absent:
        raise PlacementError(f"no layout of vLLM's is written down for {', '.join(absent[:5])}; a running engine would be asked instead")
    return rows
