"""Tables of vision-language families: the tensors of transformers' modules, where each rank has them, and how files spell their names."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rlsync.copy.cpu import bind, write_padding
from rlsync.errors import PlacementError
from rlsync.layout.geometry import whole_tensors
from rlsync.layout.topology import Topology
from rlsync.models import Model, model_of
from rlsync.models.placement import held_parameters, indivisible, megatron_placements
from rlsync.models.stored import misfits
from rlsync.plan.planner import build_plan
from tests.vision_models import FAMILIES, tiny_vision_model

TOPOLOGIES: list[dict[str, Any]] = [
    {},
    {"tp_size": 2, "dp_size": 2},
    {"tp_size": 4},
    {"tp_size": 2, "pp_size": 2},
    {"pp_size": 2, "first_stage_layers": 3, "last_stage_layers": 5, "tp_size": 2},
    {"pp_size": 2, "vpp_size": 2},
]
# Prefixes of the tower and of the language model, as checkpoints have them.
SPELLINGS = [(tower, text) for tower in ("visual.", "model.visual.") for text in ("model.", "model.language_model.")]


def made(family: str, *, tied: bool = False, layers: int = 8) -> tuple[Model, dict[str, torch.Tensor]]:
    """The model of a tiny config, and the tensors of transformers' modules by their names."""
    theirs = tiny_vision_model(family, tied=tied, num_hidden_layers=layers)
    config = {**json.loads(theirs.config.to_json_string(use_diff=False)), "architectures": [type(theirs).__name__]}
    tensors = dict(theirs.named_parameters())  # a tied head only once
    return model_of(config), {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_the_parameters_of_transformers_modules_and_no_others(family, tied):
    """Negative control: one parameter less, and one of another shape."""
    model, tensors = made(family, tied=tied)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert misfits(model, shapes) == []
    assert len(shapes["model.visual.patch_embed.proj.weight"]) == 5
    bias = next(name for name in shapes if name.startswith("model.visual.merger.") and name.endswith(".bias"))
    assert misfits(model, {name: shape for name, shape in shapes.items() if name != bias}) == [f"missing 1 tensors: {bias}"]
    (finding,) = misfits(model, {**shapes, "model.visual.patch_embed.proj.weight": (64, 3, 14, 14)})
    assert "wrongly shaped 1 tensors: model.visual.patch_embed.proj.weight" in finding


@pytest.mark.parametrize("axes", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_gets_its_share_and_the_whole_comes_back(family, axes):
    """Planned both ways, which proves that placements are complete, and copied both ways, bit for bit."""
    (model, original), topology = made(family, tied=family == "qwen3_vl"), Topology(**axes)
    assert indivisible(model, topology) == []
    tensors, ranks = model.tensors(), megatron_placements(model, topology)
    whole = whole_tensors("file", tensors)
    shards = [{b.name: torch.full(b.shape, float("nan")) for b in rank.buffers} for rank in ranks]
    for bucket in build_plan(tensors, [whole], ranks).buckets:
        for copy in bucket.copies:
            bind([copy], original, shards[copy.destination]).run()
    for rank, buffers in zip(ranks, shards, strict=True):
        write_padding(rank.padding, buffers)
        assert not any(tensor.isnan().any() for tensor in buffers.values())
    saved = {t.name: torch.full(t.shape, float("nan")) for t in tensors}
    for bucket in build_plan(tensors, ranks, [whole]).buckets:
        for copy in bucket.copies:
            bind([copy], shards[copy.source], saved).run()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_stage_has_the_tower_whole_under_the_names_of_its_modules(family):
    model, tensors = made(family)
    topology = Topology(tp_size=2, pp_size=2, dp_size=2)
    tower = {name.removeprefix("model."): tuple(t.shape) for name, t in tensors.items() if name.startswith("model.visual.")}
    for rank, placement in enumerate(megatron_placements(model, topology)):
        held = {b.name: b.shape for b in placement.buffers if b.name.startswith("visual.")}
        assert held == (tower if topology.coordinates(rank).pp_rank == 0 else {})
    names = [bound.local for bound in held_parameters(model, Topology(), 0)]
    assert names.index("embedding.word_embeddings.weight") > names.index("visual.patch_embed.proj.weight")


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_any_spelling_of_a_checkpoint_is_found_and_restored(spelling):
    model, tensors = made("qwen2_5_vl", layers=2)
    tower, text = spelling

    def spelled(name: str) -> str:
        return name.replace("model.visual.", tower, 1).replace("model.language_model.", text, 1)

    stored = {spelled(name): tuple(tensor.shape) for name, tensor in tensors.items()}
    found = model.spelling(stored)
    assert all(found.canonical(spelled(name)) == name and found.stored(name) == spelled(name) for name in tensors)
    assert misfits(model, stored) == []
    (finding,) = misfits(model, {name: shape for name, shape in stored.items() if not name.endswith("layers.1.mlp.up_proj.weight")})
    assert finding == f"missing 1 tensors: {text}layers.1.mlp.up_proj.weight", "in the words of the files"


def test_two_spellings_in_one_checkpoint_are_refused():
    model, tensors = made("qwen3_vl", layers=2)
    names = [*tensors, "visual.pos_embed.weight"]
    with pytest.raises(PlacementError, match=r"model\.visual\.\* are spelled in 2 ways: model\.visual\..*, visual\.pos_embed\.weight"):
        model.spelling(names)
    assert "spelled in 2 ways" in misfits(model, dict.fromkeys(names, (1,)))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_fits(family, tmp_path):
    """It writes the old names for the one family and the new ones for the other."""
    tiny_vision_model(family, tied=True).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    model = model_of(json.loads((tmp_path / "config.json").read_text()))
    assert model.tied and misfits(model, shapes) == []
    assert ("visual.patch_embed.proj.weight" in shapes) is (family == "qwen2_5_vl")
