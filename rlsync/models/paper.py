"""Engine workers on paper: what a vLLM worker would hold of a decoder, dense or with experts, and of a vision tower before it, from a
config.json alone.

This is the one place that says again what the recorder finds out: ``rlsync plan`` and the floors of ``rlsync bench`` need an engine's
layout where no engine runs, for clusters that nobody has at hand. A sync never uses it, as the layering test holds; another test
compares it with recordings of real workers, and turns red where vLLM lays out its weights in another way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlsync.errors import PlacementError, first_few
from rlsync.layout.geometry import BufferSpec, Padding, Piece, Placement, contiguous_strides
from rlsync.models.layouts import Column, Fused, GatedColumn, Layout, LocalLayout, Part, Replicated, Row, Shape, VocabPadded
from rlsync.models.stacks import Model

# vLLM pads the vocabulary to a multiple of this, whatever the number of ranks (``DEFAULT_VOCAB_PADDING_SIZE``).
_VOCAB_MULTIPLE = 64
_LAYER = "model.layers.{layer}."
_BLOCK = "visual.blocks.{layer}."
_DEEPSTACK = "visual.deepstack_merger_list.{layer}."
# The size that counts what repeats.
_REPEATED = {_LAYER: "num_layers", _BLOCK: "num_blocks", _DEEPSTACK: "num_deepstack"}
# Names in the table -> those of Hugging Face, and of vLLM, in models that take pictures.
_WITH_PICTURES = {
    "model.": ("model.language_model.", "language_model.model."),
    "lm_head.": ("lm_head.", "language_model.lm_head."),
    "visual.": ("model.visual.", "visual."),
}
_NUMBER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a worker is in its engine, whose ranks are numbered data-parallel rank by data-parallel rank.

    Attributes:
        rank: of ``tp_size * dp_size``.
        tp_size, dp_size: vLLM's tensor_parallel_size and data_parallel_size. Attention is cut by TP and whole on every DP rank.
        expert_parallel: vLLM's enable_expert_parallel. Every rank has some of the experts, or, without it, a slice of each.
    """

    rank: int
    tp_size: int = 1
    dp_size: int = 1
    expert_parallel: bool = False

    @property
    def size(self) -> int:
        return self.tp_size * self.dp_size

    @property
    def tensor_axis(self) -> tuple[int, int]:
        """Rank and size of the axis that cuts attention, dense MLPs and the vocabulary."""
        return self.rank % self.tp_size, self.tp_size

    @property
    def sequence_axis(self) -> tuple[int, int]:
        """``tensor_axis`` of weights that are whole where vLLM gives each tensor rank a part of the sequence before experts."""
        is_sequence_parallel = self.expert_parallel and self.tp_size > 1 and self.dp_size > 1
        return (0, 1) if is_sequence_parallel else self.tensor_axis

    @property
    def slice_axis(self) -> tuple[int, int]:
        """Rank and size of the axis that cuts each expert."""
        return (0, 1) if self.expert_parallel else (self.rank, self.size)

    def experts(self, num_experts: int) -> range:
        """Global numbers of the experts of this worker, in the order in which they are stacked: equally many on every rank, and one more
        on the first ones where they do not come out even (vLLM's ``determine_expert_map``)."""
        if not self.expert_parallel:
            return range(num_experts)
        block, more = divmod(num_experts, self.size)
        first = self.rank * block + min(self.rank, more)
        return range(first, first + block + (self.rank < more))


def seats(model: Model, *, tp_size: int = 1, dp_size: int = 1, ep_size: int = 1) -> tuple[Seat, ...]:
    """The seats of the workers of an engine, rank by rank.

    ``ep_size``: ranks that share the experts, which is 1 (each expert is cut) or all (vLLM's enable_expert_parallel).
    Raises PlacementError for experts that vLLM cannot share so.
    """
    size = tp_size * dp_size
    if ep_size not in (1, size):
        raise PlacementError(
            f"ep={ep_size} of an engine of tp={tp_size}, dp={dp_size}: vLLM shares experts among all {size} ranks of an engine or among "
            f"none; use ep={size} or ep=1"
        )
    if ep_size > 1 and "num_experts" not in model.dims:
        raise PlacementError(f"ep={ep_size} of an engine: {model.architecture} has no experts; leave ep out")
    if ep_size > model.dims.get("num_experts", ep_size):
        raise PlacementError(f"ep={ep_size} of an engine: {model.architecture} has {model.dims['num_experts']} experts; take fewer ranks")
    return tuple(Seat(rank, tp_size, dp_size, ep_size > 1) for rank in range(size))


@dataclass(frozen=True, slots=True)
class Stacked:
    """All layers of experts in one buffer: dim 0 counts those of the worker, and each lies in it as ``each`` says."""

    each: Layout

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        """``shapes``: of the tensors of one expert after those of another."""
        per_expert = len(shapes) // dims["local_experts"]
        one = self.each.local(shapes[:per_expert], rank, size, dims)
        step = contiguous_strides((dims["local_experts"], *one.shape))[0]
        parts = (
            replace(part, source=expert * per_expert + part.source, offset=expert * step + part.offset)
            for expert in range(dims["local_experts"])
            for part in one.parts
        )
        return LocalLayout((dims["local_experts"], *one.shape), tuple(parts))


@dataclass(frozen=True, slots=True)
class Below:
    """Tensors whole, one below the other (MergedColumnParallelLinear without tensor parallelism)."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        parts, rows = [], 0
        for source, shape in enumerate(shapes):
            part = Replicated().local((shape,), rank, size, dims).parts[0]
            parts.append(Part(source, part.box, rows * part.strides[0], part.strides))
            rows += shape[0]
        return LocalLayout((rows, *shapes[0][1:]), tuple(parts))


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
class Heads:
    """(q, k, v) as one tensor in a vision tower, where all have as many heads: a rank's queries, then its keys, then its values
    (QKVParallelLinear)."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        heads = {"num_heads": dims["vision_heads"], "num_groups": dims["vision_heads"]}
        return Fused(FusedQKV(), ("vision",) * 3).local(shapes, rank, size, {**dims, **heads})


@dataclass(frozen=True, slots=True)
class Held:
    """One parameter of a worker, the HF tensors in it, and how they are packed. Names carry ``{layer}`` where they repeat, and are those of
    a model of text.

    Attributes:
        axis: the property of Seat that cuts it.
        dtype: that it has whatever the engine is in, or "".
        family: the model_type whose code in vLLM lays it out so, or "" for all.
    """

    name: str
    hf: tuple[str, ...]
    layout: Layout
    axis: str = "tensor_axis"
    dtype: str = ""
    family: str = ""


def _same(name: str, layout: Layout, axis: str = "tensor_axis", dtype: str = "", family: str = "") -> Held:
    return Held(name, (name,), layout, axis, dtype, family)


def _attention(kind: str) -> Held:
    return Held(
        f"{_LAYER}self_attn.qkv_proj.{kind}", tuple(f"{_LAYER}self_attn.{x}_proj.{kind}" for x in ("q", "k", "v")), FusedQKV()
    )  # fmt: skip


def _mlp(block: str, axis: str = "tensor_axis", family: str = "") -> tuple[Held, Held]:
    gate_up = tuple(f"{_LAYER}{block}{x}_proj.weight" for x in ("gate", "up"))
    return (
        Held(f"{_LAYER}{block}gate_up_proj.weight", gate_up, GatedColumn(), axis, family=family),
        _same(f"{_LAYER}{block}down_proj.weight", Row(), axis, family=family),
    )


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Held, Held]:
    hf, held = f"{_LAYER}{block}experts.{{expert}}.", f"{_LAYER}{block}experts.routed_experts."
    return (
        Held(f"{held}w13_weight", (f"{hf}{gate}.weight", f"{hf}{up}.weight"), Stacked(GatedColumn()), "slice_axis"),
        Held(f"{held}w2_weight", (f"{hf}{down}.weight",), Stacked(Row()), "slice_axis"),
    )


def _tower_mlp(kind: str) -> Held:
    return Held(f"{_BLOCK}mlp.gate_up_proj.{kind}", tuple(f"{_BLOCK}mlp.{x}_proj.{kind}" for x in ("gate", "up")), GatedColumn())


def _column_parallel(name: str) -> tuple[Held, Held]:
    """Weight and bias of a ColumnParallelLinear."""
    return _same(f"{name}.weight", Column()), _same(f"{name}.bias", Column())


def _row_parallel(name: str) -> tuple[Held, Held]:
    """Weight and bias of a RowParallelLinear, whose bias every rank has."""
    return _same(f"{name}.weight", Row()), _same(f"{name}.bias", Replicated())


_TOWER = (
    *(_same(f"visual.{x}", Replicated()) for x in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.weight")),
    *(_same(f"{_BLOCK}{norm}.{kind}", Replicated()) for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
    *(_same(f"{_BLOCK}attn.qkv.{kind}", Heads()) for kind in ("weight", "bias")),
    *_row_parallel(f"{_BLOCK}attn.proj"),
    *(_tower_mlp(kind) for kind in ("weight", "bias")),
    *_row_parallel(f"{_BLOCK}mlp.down_proj"),
    _same("visual.merger.ln_q.weight", Replicated()),
    *_column_parallel("visual.merger.mlp.0"),
    *_row_parallel("visual.merger.mlp.2"),
    *(
        held
        for place in (f"{_BLOCK}mlp.", "visual.merger.", _DEEPSTACK)
        for held in (*_column_parallel(f"{place}linear_fc1"), *_row_parallel(f"{place}linear_fc2"))
    ),
    *(_same(f"{place}norm.{kind}", Replicated()) for place in ("visual.merger.", _DEEPSTACK) for kind in ("weight", "bias")),
)

# A row of which the model lacks an HF tensor does not apply (biases, head norms, the head of a tied model), nor one whose first tensor
# an earlier row has.
_TABLE = (
    _same("model.embed_tokens.weight", VocabPadded()),
    _attention("weight"),
    _attention("bias"),
    Held(
        f"{_LAYER}self_attn.fused_qkv_a_proj.weight",
        tuple(f"{_LAYER}self_attn.{x}.weight" for x in ("q_a_proj", "kv_a_proj_with_mqa")),
        Below(),
    ),
    *(_same(f"{_LAYER}self_attn.{x}.weight", Replicated()) for x in ("kv_a_proj_with_mqa", "q_a_layernorm", "kv_a_layernorm")),
    *(_same(f"{_LAYER}self_attn.{x}.weight", Column()) for x in ("q_proj", "q_b_proj", "kv_b_proj")),
    _same(f"{_LAYER}self_attn.o_proj.weight", Row()),
    _same(f"{_LAYER}self_attn.q_norm.weight", Replicated()),
    _same(f"{_LAYER}self_attn.k_norm.weight", Replicated()),
    *_mlp("mlp."),
    _same(f"{_LAYER}mlp.gate_up_proj.weight", Fused(GatedColumn(), ("ffn", "ffn"))),
    _same(f"{_LAYER}mlp.gate.weight", Replicated(), dtype="float32", family="glm4_moe"),
    *(_same(f"{_LAYER}{block}gate.weight", Replicated()) for block in ("mlp.", "block_sparse_moe.")),
    _same(f"{_LAYER}mlp.gate.e_score_correction_bias", Replicated(), dtype="float32"),
    *_mlp("mlp.shared_expert."),
    _same(f"{_LAYER}mlp.shared_expert_gate.weight", Replicated()),
    *_mlp("mlp.shared_experts.", "sequence_axis", "deepseek_v3"),
    *_mlp("mlp.shared_experts."),
    *_experts("mlp.", "gate_proj", "up_proj", "down_proj"),
    *_experts("block_sparse_moe.", "w1", "w3", "w2"),
    *(_same(f"{_LAYER}{x}_layernorm.weight", Replicated()) for x in ("input", "post_attention", "post_self_attn", "post_mlp")),
    _same("model.norm.weight", Replicated()),
    _same("lm_head.weight", VocabPadded()),
    *_TOWER,
)


def paper_workers(model: Model, seats: Sequence[Seat], *, dtype: str | None = None) -> tuple[Placement, ...]:
    """What the workers in these seats hold, as holders without names. ``dtype`` is the engine's; default: the model's.

    Layers after those of the decoder predict further tokens; an engine without a draft model has none of them.
    Raises PlacementError where a tensor has no row here, or where vLLM could not divide one; one error with all of them.
    """
    shapes = {_in_table(model, t.name): t.shape for t in model.tensors()}
    shapes = {name: shape for name, shape in shapes.items() if not _is_beyond(name, model.num_layers)}
    return tuple(_held_in(seat, model, shapes, dtype or model.dtype) for seat in seats)


def _held_in(seat: Seat, model: Model, shapes: Mapping[str, Shape], dtype: str) -> Placement:
    dims = {**model.dims, "padded_vocab": -(-model.dims["vocab"] // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE}
    buffers: list[BufferSpec] = []
    pieces: list[Piece] = []
    padding: list[Padding] = []
    findings: dict[str, str] = {}
    experts: Sequence[int] = ()
    if "num_experts" in dims:
        experts = seat.experts(dims["num_experts"])
        dims["local_experts"] = len(experts)
    layouts: dict[tuple[str, tuple[Shape, ...]], LocalLayout] = {}  # of a row they are the same in every layer
    for row, held in _rows(model, shapes, experts):
        key = row.name, tuple(shapes[name] for name in held.hf)
        rank, size = getattr(seat, held.axis)
        try:
            local = layouts.get(key) or held.layout.local(key[1], rank, size, dims)
        except PlacementError as error:
            findings.setdefault(str(error), held.name)
            continue
        layouts[key] = local
        names, (_, own) = [_names(model, name)[0] for name in held.hf], _names(model, held.name)
        buffers.append(BufferSpec(own, held.dtype or dtype, local.shape))
        pieces += (Piece(names[p.source], p.box, own, p.offset, p.strides) for p in local.parts)
        padding += (Padding(own, p.offset, p.shape, p.strides) for p in local.padding)
    if findings:
        raise PlacementError(
            f"an engine of {seat.size} ranks cannot hold this model: {'; '.join(f'{n}: {f}' for f, n in findings.items())}"
        )
    return Placement("", tuple(buffers), tuple(pieces), tuple(padding))


def _names(model: Model, name: str) -> tuple[str, str]:
    """Those of Hugging Face and of vLLM for one in the table."""
    for start, (hf, own) in _WITH_PICTURES.items() if model.vision is not None else ():
        if name.startswith(start):
            return hf + name.removeprefix(start), own + name.removeprefix(start)
    return name, name


def _in_table(model: Model, name: str) -> str:
    """The name in the table for one of Hugging Face."""
    for start, (hf, _) in _WITH_PICTURES.items() if model.vision is not None else ():
        if name.startswith(hf):
            return start + name.removeprefix(hf)
    return name


def _is_beyond(name: str, num_layers: int) -> bool:
    found = _NUMBER.match(name)
    return found is not None and int(found[1]) >= num_layers


def _rows(model: Model, shapes: Mapping[str, Shape], experts: Sequence[int]) -> list[tuple[Held, Held]]:
    """Rows of the table, each beside itself with the names of a layer. Raises PlacementError where the table leaves a tensor out."""
    rows: list[tuple[Held, Held]] = []
    claimed: set[str] = set()
    for held in _TABLE:
        is_stack = held.axis == "slice_axis"
        count = next((model.dims.get(size, 0) for start, size in _REPEATED.items() if held.name.startswith(start)), 1)
        for layer in range(count):
            first = [name.format(layer=layer, expert=0) for name in held.hf]
            if first[0] in claimed or not shapes.keys() >= set(first) or held.family not in ("", model.family.model_type):
                continue
            numbers = range(model.dims["num_experts"]) if is_stack else range(1)
            claimed.update(name.format(layer=layer, expert=number) for number in numbers for name in held.hf)
            names = tuple(name.format(layer=layer, expert=number) for number in (experts if is_stack else (0,)) for name in held.hf)
            if names:
                rows.append((held, replace(held, name=held.name.format(layer=layer), hf=names)))
    absent = sorted(_names(model, name)[0] for name in shapes.keys() - claimed)
    if absent:
        raise PlacementError(f"no layout of vLLM's is written down for {first_few(absent)}; a running engine would be asked instead")
    return rows
