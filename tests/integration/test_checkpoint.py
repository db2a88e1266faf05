"""Checkpoints: resumed steps equal uninterrupted ones bit for bit, and a killed save leaves the previous one newest."""

from __future__ import annotations

import json
import random
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from rlsync.bridge import checkpoint_folder
from tests.models import save_tiny_model
from tests.ranks import run_ranks, said
from tests.vision_models import save_tiny_vision_model

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


def test_layout_is_the_documented_one(saved):
    actor = saved[0] / "global_step_2" / "actor"
    assert (actor / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert {p.name for p in (actor / "iter_0000002").iterdir()} == {"mp_rank_00", "mp_rank_01", "checksums.json"}
    assert {p.name for p in (actor / "iter_0000002" / "mp_rank_01").iterdir()} == {"model_optim_rng.pt", "distrib_optim.pt"}
    assert (actor / "hf_model" / "config.json").exists() and (actor / "hf_model" / "model.safetensors").exists()


def test_a_deferred_save_holds_what_the_weights_were_when_it_began(saved):
    """Every file, byte for byte, although training went on before any of them was written."""
    at_once, deferred = (sorted(p for p in (root / "global_step_2").rglob("*")) for root in (saved[0], saved[0] / "deferred"))
    assert [p.name for p in at_once] == [p.name for p in deferred] and len(at_once) > 10
    assert [p for p, q in zip(at_once, deferred, strict=True) if p.is_file() and p.read_bytes() != q.read_bytes()] == []


def test_resumed_steps_equal_the_uninterrupted_ones_bitwise(model, saved):
    root, losses = saved
    outputs = run_ranks(2, RANKS, "resume", folder=model, topology=TP2, root=str(root))
    assert said(outputs[0]) == losses


def test_moments_go_to_parameters_by_name_where_another_release_ordered_them_otherwise(model, saved, tmp_path):
    """Two parameters of one size change places in the saved state. Without names that cannot be seen: the steps after are others."""
    root, losses = saved
    swapped, nameless = (Path(shutil.copytree(root, tmp_path / name)) for name in ("swapped", "nameless"))
    for copy in (swapped, nameless):
        (copy / "global_step_2/actor/iter_0000002/checksums.json").unlink()
        for folder in copy.glob("global_step_2/actor/iter_*/mp_rank_*"):
            swap_queries_and_keys(folder, keep_names=copy is swapped)
    assert said(run_ranks(2, RANKS, "resume", folder=model, topology=TP2, root=str(swapped))[0]) == losses
    assert said(run_ranks(2, RANKS, "resume", folder=model, topology=TP2, root=str(nameless))[0]) != losses


def swap_queries_and_keys(folder: Path, *, keep_names: bool) -> None:
    """In the optimizer state of a rank, the norms of the first layer's queries and keys, with their names and numbers."""
    state, content = (torch.load(folder / file, weights_only=True) for file in ("model_optim_rng.pt", "distrib_optim.pt"))
    (names,), (ranges,) = state["parameter_names"][0], state["parameter_ranges"][0]
    places = [names.index(f"decoder.layers.0.self_attention.{which}_layernorm.weight") for which in "qk"]
    names[places[0]], names[places[1]] = names[places[1]], names[places[0]]
    for plane in ("param", "exp_avg", "exp_avg_sq"):
        (tensors,) = content[0][0].values()
        first, second = (tensors[plane][slice(*ranges[place])] for place in places)
        assert len(first) == len(second) and not torch.equal(first, second)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    if not keep_names:
        del state["parameter_names"]
    torch.save(state, folder / "model_optim_rng.pt")
    torch.save(content, folder / "distrib_optim.pt")


def test_moments_stay_with_their_parameter_where_modules_are_registered_in_another_order(model, saved):
    for output in run_ranks(2, RANKS, "resume_in_another_order", folder=model, topology=TP2, root=str(saved[0])):
        assert said(output) == "another order"


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


def test_optimizer_state_is_cut_into_other_shards_or_refused_by_name_on_all_ranks(model, tmp_path):
    for output in run_ranks(2, RANKS, "resume_with_other_shards", folder=model, topology={"dp_size": 2}, root=str(tmp_path)):
        assert "used a distributed optimizer, this one uses none; resume with the saved use_distributed_optimizer" in said(output)


def test_moments_stay_with_their_parameter_under_other_gradient_buckets(model, tmp_path):
    (output,) = run_ranks(1, RANKS, "resume_with_other_buckets", folder=model, topology={}, root=str(tmp_path))
    assert said(output) > 1, "no two cuts have equally many elements in other places, so counting would do"


def test_another_layout_goes_on_with_weights_and_optimizer_and_back_bit_for_bit(tmp_path):
    """On four ranks, dense and with experts: the step after is the one of the run that never moved, and from there the first layout's."""
    dense = save_tiny_model(tmp_path / "dense", "qwen3", tied=True)
    experts = save_tiny_model(tmp_path / "experts", "qwen3_moe")
    cases = [
        {"folder": str(dense), "then": {"tp_size": 2, "dp_size": 2}, "now": {"tp_size": 2, "pp_size": 2, "vpp_size": 2}},
        {
            "folder": str(experts),
            "then": {"dp_size": 4, "ep_size": 2},
            "now": {"tp_size": 2, "pp_size": 2, "ep_size": 2},
            "overrides": {"sequence_parallel": True},
        },
    ]
    for output in run_ranks(4, RANKS, "resume_elsewhere", cases=cases, root=str(tmp_path)):
        assert output.count("MOVED") == len(cases)


def test_an_optimizer_that_is_not_distributed_goes_on_under_another_layout_too(model, tmp_path):
    """From and to one that is, in half precision with its main parameters and loss scale, and with an optimizer of experts beside."""
    experts = str(save_tiny_model(tmp_path / "experts", "qwen3_moe", num_hidden_layers=2))
    cases = [
        {"folder": model, "then": TP2, "now": PP2, "distributed": [False, False]},
        {"folder": model, "then": {"dp_size": 2}, "now": TP2, "distributed": [False, True], "fp16": True},
        {"folder": model, "then": PP2, "now": {"dp_size": 2}, "distributed": [True, False]},
        {"folder": experts, "then": {"dp_size": 2, "ep_size": 2}, "now": PP2, "distributed": [False, False]},
    ]
    for output in run_ranks(2, RANKS, "resume_elsewhere", cases=cases, root=str(tmp_path)):
        assert output.count("MOVED") == len(cases)


def test_a_checkpoint_with_hf_weights_alone_is_read_under_either_name_and_said_to_be_incomplete(model, saved, tmp_path):
    """As after a run of another trainer that calls the folder hf_checkpoint."""
    actor = tmp_path / "global_step_7" / "actor"
    shutil.copytree(saved[0] / "global_step_2" / "actor" / "hf_model", actor / "hf_checkpoint")
    (actor / "latest_checkpointed_iteration.txt").write_text("7")
    outputs = run_ranks(2, RANKS, "resume_weights", folder=model, topology=PP2, actor_parent=str(actor.parent))
    assert said(outputs[0]) > 0
    damaged, words = {}, {}
    # Without the header of a file, whose damage may be found before by what it says.
    for file, begin, *_ in json.loads((actor / "hf_checkpoint" / "checksums.json").read_text())[1::7]:
        kind = f"a bit of byte {begin} of {file}"
        shutil.copytree(actor.parent, tmp_path / kind / "global_step_2")
        path = tmp_path / kind / "global_step_2" / "actor" / "hf_checkpoint" / file
        content = bytearray(path.read_bytes())
        content[begin] ^= 1
        path.write_bytes(content)
        damaged[kind], words[kind] = str(tmp_path / kind), f"CheckpointError: {path}: bytes {begin} to "
    assert len(damaged) > 2
    for output in run_ranks(2, RANKS, "resume_damaged", folder=model, topology=PP2, roots=damaged):
        found = said(output)
        assert not {kind: found.get(kind, "loaded") for kind in damaged if words[kind] not in found.get(kind, "")}


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_one_rank_s_truncated_file_is_an_error_on_all_before_anything_changes(model, saved, tmp_path, file):
    shutil.copytree(saved[0], tmp_path / "run")
    path = tmp_path / "run" / "global_step_2" / "actor" / "iter_0000002" / "mp_rank_01" / file
    path.write_bytes(path.read_bytes()[:-2000])
    for output in run_ranks(2, RANKS, "resume_truncated", folder=model, topology=TP2, root=str(tmp_path / "run")):
        assert f"mp_rank_01/{file}" in said(output)


def test_whatever_is_damaged_or_foreign_is_named_on_all_ranks_before_anything_changes(model, saved, tmp_path):
    """Files of rank 1 alone: both ranks raise one of our errors, which names the file."""
    shards = Path("global_step_2/actor/iter_0000002")
    state_file, optimizer_file = (shards / "mp_rank_01" / name for name in ("model_optim_rng.pt", "distrib_optim.pt"))
    state = torch.load(saved[0] / state_file, weights_only=True)
    ((names,),) = state["parameter_names"]
    first, second = names[:2]
    renamed, twice, mixed = ([[[*begin, *names[2:]]]] for begin in ([f"{first}.other", second], [second, second], [second, first]))
    damaged = {
        "a list": (state_file, [1, 2], "holds a list, expected a dict"),
        "no step": (state_file, {k: v for k, v in state.items() if k != "iteration"}, "holds no 'iteration'"),
        "no ranges": (state_file, {k: v for k, v in state.items() if k != "parameter_ranges"}, "holds no 'parameter_ranges'"),
        "names of others": (state_file, {**state, "parameter_names": renamed}, f"{first} is missing; {first}.other is unexpected"),
        "a name twice": (state_file, {**state, "parameter_names": twice}, f"{second} is doubled; {first} is missing"),
        "other sizes": (state_file, {**state, "parameter_names": mixed}, f"{first}: expected"),
        "too few names": (state_file, {**state, "parameter_names": [[names[1:]]]}, "does not hold what model_optim_rng.pt says"),
        "names of nothing": (state_file, {**state, "parameter_names": 1}, "does not hold what model_optim_rng.pt says"),
        "a step of words": (state_file, {**state, "iteration": "2"}, "holds 'iteration' as a str, expected a int"),
        "a model of numbers": (state_file, {**state, "model": {"a": 1}}, "something else than tensors by name"),
        "options of nothing": (state_file, {**state, "options": None}, "holds 'options' as a NoneType, expected a dict"),
        "an earlier build": (state_file, {k: v for k, v in state.items() if k != "options"}, "start a new run from the"),
        "optimizer of words": (state_file, {**state, "optimizer": "x"}, "optimizer, schedule or random state is damaged"),
        "optimizer without groups": (state_file, {**state, "optimizer": {"optimizer": {}}}, "KeyError: 'param_groups'"),
        "a schedule of nothing": (state_file, {**state, "opt_param_scheduler": {}}, "KeyError: 'num_steps'"),
        "a random state of nothing": (state_file, {**state, "rng_state": [{}]}, "KeyError: 'random_rng_state'"),
        "a random state cut": (
            state_file,
            {**state, "rng_state": [{**state["rng_state"][0], "torch_rng_state": torch.zeros(8, dtype=torch.uint8)}]},
            "optimizer, schedule or random state is damaged",
        ),
        "objects": (state_file, {**state, "args": Fraction(1, 2)}, "another trainer wrote it with objects"),
        "optimizer of another form": (optimizer_file, [{}], "does not hold what model_optim_rng.pt says"),
        "optimizer cut": (optimizer_file, [{0: {("x", "y"): {"param": torch.ones(3), "numel_unpadded": 3}}}], "does not hold what"),
        "optimizer of nothing": (optimizer_file, [], "optimizer state of"),
    }
    roots, expected = {}, {}
    for kind, (file, content, words) in damaged.items():
        roots[kind], expected[kind] = str(shutil.copytree(saved[0], tmp_path / kind)), words
        torch.save(content, Path(roots[kind]) / file)
    for file, begin, _, crc in json.loads((saved[0] / shards / "checksums.json").read_text())[::20]:
        kind = f"a bit of byte {begin} of {file}"
        roots[kind], expected[kind] = str(shutil.copytree(saved[0], tmp_path / kind.replace("/", " "))), f"were written with {crc:08x}"
        content = bytearray((Path(roots[kind]) / shards / file).read_bytes())
        content[begin] ^= 1
        (Path(roots[kind]) / shards / file).write_bytes(content)
    chance = random.Random(0)
    for number in range(12):
        root = Path(shutil.copytree(saved[0], tmp_path / f"noise {number}"))
        content = bytearray((root / state_file).read_bytes())
        begin = chance.randrange(2_000)
        content[begin : begin + 200] = chance.randbytes(200)
        (root / state_file).write_bytes(content)
        roots[root.name], expected[root.name] = str(root), "model_optim_rng.pt"
    foreign = Path(shutil.copytree(saved[0], tmp_path / "foreign"))
    for path in (foreign / shards).iterdir():
        path.rename(path.with_name("__0_" + path.name))
    roots["foreign"], expected["foreign"] = str(foreign), "no mp_rank_* folder, as in a checkpoint of another trainer"
    outputs = run_ranks(2, RANKS, "resume_damaged", folder=model, topology=TP2, roots=roots)
    for output in outputs:
        found = said(output)
        assert {kind: words in found.get(kind, "loaded") for kind, words in expected.items()} == dict.fromkeys(expected, True), found


@pytest.mark.parametrize("die_at", ["create_rank_files", "put_shards", "close", "write_durably", "publish_checkpoint"])
def test_a_killed_save_leaves_the_previous_checkpoint_newest(model, tmp_path, die_at):
    with pytest.raises(AssertionError, match="exit -9"):
        run_ranks(1, RANKS, "killed_while_saving", folder=model, topology={}, root=str(tmp_path), die_at=die_at)
    assert checkpoint_folder.latest_checkpoint(tmp_path) == tmp_path / "global_step_1"
    assert (tmp_path / ".global_step_2.partial").exists(), "it died in the middle"
    run_ranks(1, RANKS, "resume", folder=model, topology={}, root=str(tmp_path))


def test_experts_the_bias_of_their_routers_and_towers_go_on_under_another_layout_and_back(tmp_path):
    """From expert ranks to ranks that each have a part of every expert, with latent attention; from two stages, one with the tower."""
    sequence = {"sequence_parallel": True}
    cases = [
        {
            "folder": str(save_tiny_model(tmp_path / "experts", "deepseek_v3", num_hidden_layers=2)),
            "then": {"dp_size": 2, "ep_size": 2},
            "now": {**TP2, "etp_size": 2},
            "overrides": {**sequence, "moe_router_bias_update_rate": 0.05},
        },
        {"folder": str(save_tiny_vision_model(tmp_path / "tower", "qwen3_vl")), "then": PP2, "now": TP2, "overrides": sequence},
    ]
    for output in run_ranks(2, RANKS, "resume_elsewhere", cases=cases, root=str(tmp_path)):
        assert output.count("MOVED") == len(cases)


@pytest.mark.parametrize("die_at", ["put_shards", "write_durably"])
def test_a_killed_save_of_expert_ranks_leaves_every_expert_of_the_previous_checkpoint(tmp_path, die_at):
    case = {
        "folder": str(save_tiny_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2)),
        "topology": {"dp_size": 2, "ep_size": 2},
        "root": str(tmp_path / "run"),
    }
    with pytest.raises(AssertionError, match="exit -9"):
        run_ranks(2, RANKS, "killed_while_saving", **case, die_at=die_at)
    assert checkpoint_folder.latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "global_step_1"
    assert (tmp_path / "run" / ".global_step_2.partial").exists(), "it died in the middle"
    run_ranks(2, RANKS, "resume", **case)
    (path,) = tmp_path.glob("run/global_step_1/actor/iter_*/mp_rank_00_001/model_optim_rng.pt")
    state = torch.load(path, weights_only=True)
    name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight"
    torch.save({**state, "model": {key: t for key, t in state["model"].items() if key != name.format(1)}}, path)
    with pytest.raises(AssertionError, match=re.escape(f"{name.format(5)} ({name.format(1)} there) is missing")):
        run_ranks(2, RANKS, "resume", **case)
