"""Forms in which files hold the tensors of a model: experts one by one, stacked, stacked and transposed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeForConditionalGeneration

from rlsync.copy.cpu import bind
from rlsync.errors import PlacementError
from rlsync.layout.geometry import whole_tensors
from rlsync.models import Model, model_of
from rlsync.models.stored import default_form, file_placement, form_of, misfits
from rlsync.plan.planner import build_plan
from tests.models import STACKED_FAMILIES, tiny_model
from tests.vision_models import tiny_vision_model

Tensors = dict[str, torch.Tensor]


def made(family: str, **changes: int) -> tuple[Model, Tensors]:
    """A model, and the tensors of transformers' modules, which stack experts as (experts, rows, columns)."""
    make = tiny_vision_model if family == "qwen3_vl_moe" else tiny_model
    theirs = make(family, num_hidden_layers=2, **changes)
    config = {**json.loads(theirs.config.to_json_string(use_diff=False)), "architectures": [type(theirs).__name__]}
    return model_of(config), {name: tensor.detach() for name, tensor in theirs.state_dict().items()}


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def one_by_one(model: Model, stored: Tensors) -> Tensors:
    """The tensors of the table out of those of files."""
    files = form_of(model, shapes(stored)).file_tensors(model, model.tensors())
    tensors = {t.name: torch.full(t.shape, float("nan")) for t in model.tensors()}
    for bucket in build_plan(model.tensors(), [file_placement("files", files)], [whole_tensors("table", model.tensors())]).buckets:
        bind(bucket.copies, stored, tensors).run()
    return tensors


def transposed(stored: Tensors) -> Tensors:
    return {name: t.transpose(1, 2).contiguous() if ".mlp.experts." in name else t for name, t in stored.items()}


@pytest.mark.parametrize("family", [*STACKED_FAMILIES, "qwen3_vl_moe"])
def test_stacked_experts_are_those_that_transformers_saves_one_by_one(family, tmp_path):
    """The stacked form is the modules', the other one what transformers' own conversion writes for released models."""
    model, stored = made(family)
    assert misfits(model, shapes(stored)) == []
    ours = one_by_one(model, stored)
    if family == "qwen3_vl_moe":
        expert = stored["model.language_model.layers.0.mlp.experts.gate_up_proj"][5]
        assert torch.equal(ours["model.language_model.layers.0.mlp.experts.5.up_proj.weight"], expert[48:])
        return
    tiny_model(family, num_hidden_layers=2).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert form_of(model, shapes(theirs)).experts is None


def test_tensors_of_layers_that_predict_further_tokens_are_no_misfits():
    """As many such layers as config.json counts. Negative controls: one more, and a config that counts none."""
    model, stored = made("moonlight", num_mtp_layers=2)
    further = {f"model.layers.{layer}.eh_proj.weight": (96, 192) for layer in (2, 3)}
    assert misfits(model, shapes(stored) | further) == [] == misfits(model, shapes(stored))
    assert [t.name for t in model.tensors() if model.is_kept(t.name)] == []
    beyond = {"model.layers.4.eh_proj.weight": (96, 192), "model.layers.20.norm.weight": (96,)}
    assert misfits(model, shapes(stored) | further | beyond) == [f"unexpected 2 tensors: {', '.join(sorted(beyond))}"]
    model, stored = made("moonlight")
    assert misfits(model, shapes(stored) | further) == [f"unexpected 2 tensors: {', '.join(further)}"]


def test_shapes_tell_whether_experts_are_transposed(tmp_path):
    """Released files of Qwen3-VL-MoE are transposed, and what transformers saves is not; both give the same experts there and here."""
    model, stored = made("qwen3_vl_moe")
    released = transposed(stored)
    assert (form_of(model, shapes(stored)).experts, form_of(model, shapes(released)).experts) == ("rows", "columns")
    assert default_form(model).experts == "columns", "what a model without files is saved as"
    ours, theirs = one_by_one(model, stored), one_by_one(model, released)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, files in (("rows", stored), ("columns", released)):
        folder = tmp_path / name
        tiny_vision_model("qwen3_vl_moe", num_hidden_layers=2).config.save_pretrained(folder)
        save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
        loaded = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    tiny_vision_model("qwen3_vl_moe", num_hidden_layers=2).save_pretrained(tmp_path)
    assert shapes(load_file(tmp_path / "model.safetensors")) == shapes(stored)


@pytest.mark.parametrize("moe_intermediate_size", [64, 128])
def test_square_experts_of_a_family_with_two_orientations_are_refused(moe_intermediate_size):
    """hidden_size is 128. Negative control: a family whose files have one orientation only."""
    model, stored = made("qwen3_vl_moe", moe_intermediate_size=moe_intermediate_size)
    with pytest.raises(PlacementError, match=r"experts\.(gate_up|down)_proj .*: an expert's matrix is square"):
        form_of(model, shapes(stored))
    assert "is square" in misfits(model, shapes(stored))[0]
    model, stored = made("qwen3_moe", hidden_size=128, moe_intermediate_size=moe_intermediate_size)
    assert misfits(model, shapes(stored)) == []


def test_a_file_with_both_forms_is_refused_and_a_missing_stack_is_named():
    model, stored = made("qwen3_moe")
    both = {**shapes(stored), "model.layers.0.mlp.experts.3.up_proj.weight": (48, 96)}
    assert misfits(model, both) == [
        "experts are stacked in model.layers.0.mlp.experts.gate_up_proj, and model.layers.0.mlp.experts.3.up_proj.weight is there as well; "
        "remove one of them"
    ]
    lacking = {name: shape for name, shape in shapes(stored).items() if not name.endswith("0.mlp.experts.down_proj")}
    assert misfits(model, lacking) == ["missing 1 tensors: model.layers.0.mlp.experts.down_proj"]
    (finding,) = misfits(model, shapes(transposed(stored)))
    assert "wrongly shaped" in finding and "expected (8, 96, 96), stored" not in finding
