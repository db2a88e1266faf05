"""Checkpoints: resumed steps equal uninterrupted ones bit for bit, and a killed save leaves the previous one newest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlsync import checkpoint as checkpoints
from tests.models import save_tiny_model
from tests.ranks import run_ranks

RANKS = "tests.integration.checkpoint_ranks"
TP2 = {"tp_size": 2}
PP2 = {"pp_size": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", tied=True))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> tuple[Path, list[float]]:
    """A run under TP=2 that saved step 2, and the losses of its steps 3 and 4."""
    root = tmp_path_factory.mktemp("run")
    outputs = run_ranks(2, RANKS, "train_and_save", folder=model, topology=TP2, root=str(root))
    return root, said(outputs[0])


def said(output: str):
    return json.loads(output.split("SAID ")[1].splitlines()[0])


def test_layout_is_the_documented_one(saved):
    actor = saved[0] / "global_step_2" / "actor"
    assert (actor / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert {p.name for p in (actor / "iter_0000002").iterdir()} == {"mp_rank_00", "mp_rank_01"}
    assert {p.name for p in (actor / "iter_0000002" / "mp_rank_01").iterdir()} == {"model_optim_rng.pt", "distrib_optim.pt"}
    assert (actor / "hf_model" / "config.json").exists() and (actor / "hf_model" / "model.safetensors").exists()


def test_resumed_steps_equal_the_uninterrupted_ones_bitwise(model, saved):
    root, losses = saved
    outputs = run_ranks(2, RANKS, "resume", folder=model, topology=TP2, root=str(root))
    assert said(outputs[0]) == losses


@pytest.mark.parametrize("distributed", [True, False])
def test_a_resumed_optimizer_holds_its_own_options_and_the_saved_state(model, tmp_path, distributed):
    run_ranks(
        2, RANKS, "resume_with_other_options", folder=model, topology={"dp_size": 2}, root=str(tmp_path), distributed=distributed
    )  # fmt: skip


@pytest.mark.parametrize("distributed", [True, False])
def test_a_static_loss_scale_is_the_run_s_own_and_a_dynamic_one_goes_on(model, tmp_path, distributed):
    run_ranks(
        1, RANKS, "resume_with_another_loss_scale", folder=model, topology={}, root=str(tmp_path), distributed=distributed
    )  # fmt: skip


def test_optimizer_state_fits_other_shards_or_is_refused_by_name_on_all_ranks(model, tmp_path):
    for output in run_ranks(2, RANKS, "resume_with_other_shards", folder=model, topology={"dp_size": 2}, root=str(tmp_path)):
        unsharded, other_buckets = (json.loads(line.split("\n")[0]) for line in output.split("SAID ")[1:])
        assert "used a distributed optimizer, this one uses none; resume with the saved use_distributed_optimizer" in unsharded
        assert "gradient buffer 0 held" in other_buckets and "ddp_bucket_size" in other_buckets


def test_another_layout_is_refused_with_both_sizes_and_hf_weights_are_offered(model, saved):
    for output in run_ranks(2, RANKS, "resume_refused", folder=model, topology=PP2, root=str(saved[0])):
        assert "was saved with tensor_model_parallel_size 2, pipeline_model_parallel_size 1; this run has 1, 2" in said(output)
        assert "actor/hf_model" in said(output)


def test_a_checkpoint_with_hf_weights_alone_is_read_under_either_name_and_said_to_be_incomplete(model, saved, tmp_path):
    """As after a run of another trainer that calls the folder hf_checkpoint."""
    actor = tmp_path / "global_step_7" / "actor"
    shutil.copytree(saved[0] / "global_step_2" / "actor" / "hf_model", actor / "hf_checkpoint")
    (actor / "latest_checkpointed_iteration.txt").write_text("7")
    outputs = run_ranks(2, RANKS, "resume_weights", folder=model, topology=PP2, actor_parent=str(actor.parent))
    assert said(outputs[0]) > 0


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_one_rank_s_truncated_file_is_an_error_on_all_before_anything_changes(model, saved, tmp_path, file):
    shutil.copytree(saved[0], tmp_path / "run")
    path = tmp_path / "run" / "global_step_2" / "actor" / "iter_0000002" / "mp_rank_01" / file
    path.write_bytes(path.read_bytes()[:-2000])
    for output in run_ranks(2, RANKS, "resume_truncated", folder=model, topology=TP2, root=str(tmp_path / "run")):
        assert f"mp_rank_01/{file}" in said(output)


@pytest.mark.parametrize("die_at", ["write_rank_state", "_write_durably", "publish_checkpoint"])
def test_a_killed_save_leaves_the_previous_checkpoint_newest(model, tmp_path, die_at):
    with pytest.raises(AssertionError, match="exit -9"):
        run_ranks(1, RANKS, "killed_while_saving", folder=model, topology={}, root=str(tmp_path), die_at=die_at)
    assert checkpoints.latest_checkpoint(tmp_path) == tmp_path / "global_step_1"
    assert (tmp_path / ".global_step_2.partial").exists(), "it died in the middle"
    run_ranks(1, RANKS, "resume", folder=model, topology={}, root=str(tmp_path))
