"""Megatron's ``torch_dist`` checkpoints on paper: whole tensors in chunks, which ``.metadata`` lists by key, offset, file and byte.

A key names a parameter of all ranks: layers and experts may stand as numbers in it, or as first dims of its tensor. Its other dims are
those of the parameter under TP=1.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from rlsync.errors import CheckpointError, PlacementError, first_few
from rlsync.layout.geometry import Box, BufferSpec, Padding, Piece, Placement, box_in_buffer, contiguous_strides
from rlsync.layout.safetensors import StoredTensor
from rlsync.layout.torch_files import TensorView, read_torch_file, restricted
from rlsync.models import Flavour, Model
from rlsync.models.layouts import LocalLayout
from rlsync.models.shards import EXTRA_STATE
from rlsync.models.stacks import Bound, Rule

METADATA = ".metadata"
# Says which format a folder has; written last.
CONFIG = "metadata.json"
COMMON = "common.pt"
_FORMAT = "torch_dist"
CONFIG_CONTENT = {"sharded_backend": _FORMAT, "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
# How keys are written here: numbers of layers stand in them, those of experts are first dims. Megatron-LM asks for what this says.
WRITTEN_FORM = {"singleton_local_shards": False, "non_homogeneous_layers": True}
# What optimizers are saved under.
_OTHER_KEYS = re.compile(r"(chained_\d+\.)?optimizer\..*|rng_state.*|rerun_state.*|.*" + EXTRA_STATE + r".*")
# Layers without TransformerEngine save their norms under the names that it has for them.
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of the tensor of a key, and where its bytes are."""

    key: str
    box: Box
    dtype: str
    file: Path
    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.key}{self.box}"


@dataclass(frozen=True, slots=True)
class _Form:
    """How keys may name a parameter: the key, the numbers that are its first indices, and rows of the parameter before its tensor."""

    key: str
    indices: tuple[int, ...]
    first_row: int = 0


def is_distributed(folder: Path) -> bool:
    """Whether a folder is one of ``torch_dist``, whole or not."""
    return (folder / METADATA).is_file() or (folder / CONFIG).is_file()


def placed_chunks(folder: Path, model: Model) -> tuple[Placement, Mapping[str, StoredTensor], int]:
    """Where the tensors of ``model`` lie in a ``torch_dist`` folder, by chunk, and the step that it was saved after.

    Raises CheckpointError for what is missing or damaged, PlacementError with every parameter that is missing or unexpected.
    """
    sizes, chunks = _read_metadata(folder)
    placement, used = _placement(folder, model, sizes, chunks)
    stored: dict[str, StoredTensor] = {}
    for chunk in used:
        view = read_torch_file(chunk.file, begin=chunk.begin, end=chunk.end)
        if not isinstance(view, TensorView) or (view.shape, view.dtype) != (chunk.box.shape, chunk.dtype):
            said = f"{view.shape} {view.dtype}" if isinstance(view, TensorView) else type(view).__name__
            raise CheckpointError(f"{chunk.file}: {chunk.name} is {said} there, and {chunk.box.shape} {chunk.dtype} in {METADATA}")
        stored[chunk.name] = view.stored(chunk.name)
    return placement, stored, _step(folder)


def placed_keys(model: Model, flavour: Flavour, dtype: str, padded_vocab: int) -> Placement:
    """The parameters of a model under the keys that a save of ``WRITTEN_FORM`` has for them, whole; one buffer for each key.

    ``flavour`` decides where the norms before experts are, which layers without TransformerEngine save under another name.
    """
    model = replace(model, dims={**model.dims, "padded_vocab": padded_vocab})
    buffers: dict[str, BufferSpec] = {}
    pieces: list[Piece] = []
    padding: list[Padding] = []
    layouts: dict[Rule, LocalLayout] = {}
    for bound in model.parameters():
        if bound.rule.pipelined_only:
            continue
        layout = layouts.get(bound.rule) or model.local_layout(bound, 0, 1)
        layouts[bound.rule] = layout
        key, number, count = _written_key(bound, flavour)
        shape = layout.shape if count is None else (count, *layout.shape)
        buffers.setdefault(key, BufferSpec(key, bound.stack.dtype or dtype, shape))
        first = number * prod(layout.shape)
        pieces += [Piece(bound.hf[p.source][0], p.box, key, first + p.offset, p.strides) for p in layout.parts]
        padding += [Padding(key, first + p.offset, p.shape, p.strides) for p in layout.padding]
    return Placement(_FORMAT, tuple(buffers.values()), tuple(pieces), tuple(padding))


def _written_key(bound: Bound, flavour: Flavour) -> tuple[str, int, int | None]:
    """The key of a parameter, its number among the experts in it, and how many these are; None of what is no expert's."""
    rule, indices = bound.rule, bound.stack.indices
    inner = _expert_key((rule.te or rule.megatron) if flavour == "te" else _NORMS.get(rule.megatron, rule.megatron))
    key = bound.stack.megatron + inner
    is_expert = bool(indices) and indices[-1].axis == "ep"
    for index, number in zip(indices, bound.numbers, strict=True):
        key = key.replace(f"{{{index.name}}}." if index.axis == "ep" else f"{{{index.name}}}", "" if index.axis == "ep" else str(number))
    return key, bound.numbers[-1] if is_expert else 0, bound.copies if is_expert else None


def _step(folder: Path) -> int:
    common = folder / COMMON
    content = read_torch_file(common) if common.is_file() else {}
    step = content.get("iteration", 0) if isinstance(content, dict) else 0
    return step if isinstance(step, int) else 0


def _read_metadata(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_Chunk]]]:
    """Shapes and chunks of all tensors by key."""
    for name in (CONFIG, METADATA):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: its save did not end; take an older checkpoint")
    try:
        form = json.loads((folder / CONFIG).read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not say which format it is ({type(error).__name__}: {error})") from None
    if form != _FORMAT:
        raise CheckpointError(f"{folder}: its format is {form}; {_FORMAT} is read, and Megatron's torch")
    try:
        content = restricted((folder / METADATA).read_bytes(), {}).state
        where = {}
        for index, place in content["storage_data"].items():
            where[index.state["fqn"], index.state.get("offset")] = place.state
        sizes, chunks = {}, defaultdict(list)
        for key, entry in content["state_dict_metadata"].items():
            # Objects that are no tensors have nothing.
            if not isinstance(entry.state, dict) or "chunks" not in entry.state:
                continue
            sizes[key] = tuple(entry.state["size"])
            for chunk in entry.state["chunks"]:
                begin, shape = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
                place = where[key, begin]
                if place.get("transform_descriptors"):
                    raise CheckpointError(f"{folder}: {key} was written through {place['transform_descriptors']}, which is not read")
                box = Box(begin, tuple(map(sum, zip(begin, shape, strict=True))))
                file, first = folder / place["relative_path"], place["offset"]
                if file.parent != folder:
                    raise CheckpointError(f"{folder / METADATA}: {key} is in {place['relative_path']!r}, which is not a file of the folder")
                chunks[key].append(_Chunk(key, box, entry.state["properties"].state[0], file, first, first + place["length"]))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{folder / METADATA}: damaged, or not of torch ({type(error).__name__}: {error})") from None
    return sizes, dict(chunks)


def _placement(
    folder: Path, model: Model, sizes: Mapping[str, tuple[int, ...]], chunks: Mapping[str, Sequence[_Chunk]]
) -> tuple[Placement, list[_Chunk]]:
    """What the chunks hold of a model, and those that hold something."""
    by_indices: dict[str, dict[tuple[int, ...], list[_Chunk]]] = {}
    pieces: list[Piece] = []
    padding: list[Padding] = []
    used: dict[str, _Chunk] = {}
    findings: list[str] = []
    for bound in model.parameters():
        if bound.rule.pipelined_only:
            continue
        forms = _forms(bound, sizes)
        rows = sum(sizes[form.key][len(form.indices)] for form in forms if len(sizes[form.key]) > len(form.indices))
        if not forms:
            findings.append(f"{bound.local} is missing")
            continue
        layout = _whole(model, bound, rows)
        shape = (*sizes[forms[0].key][len(forms[0].indices) :],)
        whole = (rows, *shape[1:]) if shape else shape
        if whole != layout.shape:
            findings.append(f"{forms[0].key} has shape {whole}, expected {layout.shape}")
            continue
        for form in forms:
            if form.key not in by_indices:
                by_indices[form.key] = _by_indices(chunks[form.key], len(form.indices))
            for chunk in by_indices[form.key].get(form.indices, ()):
                used[chunk.name] = chunk
                for found in _in_chunk(chunk, form, bound, layout):
                    (pieces if isinstance(found, Piece) else padding).append(found)  # type: ignore[arg-type]
    known = {chunk.key for chunk in used.values()}
    findings += [f"{key} is unexpected" for key in sizes if key not in known and not _OTHER_KEYS.fullmatch(key)]
    if findings:
        raise PlacementError(f"{folder} does not hold {model.architecture}: {first_few(findings, separator='; ')}")
    buffers = tuple(BufferSpec(name, chunk.dtype, chunk.box.shape) for name, chunk in used.items())
    return Placement(str(folder), buffers, tuple(pieces), tuple(padding)), list(used.values())


def _whole(model: Model, bound: Bound, rows: int) -> LocalLayout:
    """The parameter under TP=1, with as many rows of a vocabulary as there are."""
    padded = replace(model, dims={**model.dims, "padded_vocab": max(rows, model.dims["vocab"])})
    return padded.local_layout(bound, 0, 1)


def _forms(bound: Bound, sizes: Mapping[str, Any]) -> list[_Form]:
    """The keys that are there of a parameter: one, or two where gate and up have one each."""
    names = tuple(index.name for index in bound.stack.indices)
    within = {_expert_key(bound.rule.megatron), *([_expert_key(bound.rule.te)] if bound.rule.te else [])}
    within |= {_NORMS[name] for name in within & _NORMS.keys()}
    for inner, as_dims in product(sorted(within), _subsets(names)):
        key, indices = bound.stack.megatron + inner, []
        for name, number in zip(names, bound.numbers, strict=True):
            if name in as_dims:
                key = key.replace(f"{{{name}}}.", "")
                indices.append(number)
            else:
                key = key.replace(f"{{{name}}}", str(number))
        if key in sizes:
            return [_Form(key, tuple(indices))]
        if f"{key}_w" in sizes and f"{key}_v" in sizes:
            return [_Form(f"{key}_w", tuple(indices)), _Form(f"{key}_v", tuple(indices), sizes[f"{key}_w"][len(indices)])]
    return []


def _expert_key(name: str) -> str:
    """How a key names a parameter of an expert: alike for experts one by one and grouped."""
    return re.sub(r"mlp\.experts\.(linear_fc[12]\.weight)\{expert\}", r"mlp.experts.local_experts.{expert}.\1", name).replace(
        "experts.local_experts.", "experts.experts."
    )


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Which numbers may be dims: all, none, or some."""
    return [
        tuple(name for name, is_dim in zip(names, chosen, strict=True) if is_dim) for chosen in product((True, False), repeat=len(names))
    ]


def _by_indices(chunks: Sequence[_Chunk], depth: int) -> dict[tuple[int, ...], list[_Chunk]]:
    """Chunks by the first indices of what is in them."""
    found = defaultdict(list)
    for chunk in chunks:
        for indices in product(*(range(*limits) for limits in zip(chunk.box.start[:depth], chunk.box.stop[:depth], strict=True))):
            found[indices].append(chunk)
    return found


def _in_chunk(chunk: _Chunk, form: _Form, bound: Bound, layout: LocalLayout) -> Iterator[Piece | Padding]:
    """What of one parameter is in a chunk."""
    depth, parameter = len(form.indices), BufferSpec(bound.local, chunk.dtype, layout.shape)
    strides = contiguous_strides(chunk.box.shape)
    first = sum((at - start) * step for at, start, step in zip(form.indices, chunk.box.start[:depth], strides[:depth], strict=True))
    start, stop = list(chunk.box.start[depth:]), list(chunk.box.stop[depth:])
    if start:
        start[0], stop[0] = start[0] + form.first_row, stop[0] + form.first_row
    here = Box(tuple(start), tuple(stop))

    def offset(box: Box) -> int:
        return first + sum((at - low) * step for at, low, step in zip(box.start, here.start, strides[depth:], strict=True))

    for part in layout.parts:
        region = box_in_buffer(parameter, part.offset, part.box.shape, part.strides)
        assert region is not None, f"{bound.local}: a part that is no box of the parameter"
        common = region.intersect(here)
        if common is not None:
            moved = [
                tuple(a + b - c for a, b, c in zip(part.box.start, corner, region.start, strict=True))
                for corner in (common.start, common.stop)
            ]
            yield Piece(bound.hf[part.source][0], Box(*moved), chunk.name, offset(common), strides[depth:])
    for gap in layout.padding:
        region = box_in_buffer(parameter, gap.offset, gap.shape, gap.strides)
        common = None if region is None else region.intersect(here)
        if common is not None:
            yield Padding(chunk.name, offset(common), common.shape, strides[depth:])
