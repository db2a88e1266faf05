"""Claims about what a run says before it starts anything: all findings at once, and without importing what is slow."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlsync.cli.shapes import shape_of
from rlsync.models import model_of
from rlsync.models.lora import PREFIX, LoraSpec, adapters_of
from rlsync.models.moe import further_layers_note
from tests.deadlines import HANG_S
from tests.unit.test_models_config import QWEN3_MOE, QWEN3_VL
from workers.check import GRPO_CHECKS, check_devices, check_memory, check_model, check_run
from workers.check_report import Report
from workers.config import RunConfig
from workers.config.fields import dotted_keys
from workers.config.schema import ArithmeticRecipe
from workers.resume import write_settings
from workers.synthetic import build_world

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/reasoning/run_main_grpo_math.sh"
HEAVY = ("torch", "transformers", "ray", "vllm", "megatron", "torchdata")
RECIPE = ArithmeticRecipe(
    seed=0, max_operand=4, num_problems=64, num_supervised=8, supervised_noise=0.5, hidden_size=128, num_layers=2
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world") / "world"
    build_world(path, RECIPE)
    return path


@pytest.fixture
def own(world, tmp_path) -> Path:
    """A world that a test may break."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def values(world: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "cluster": {"component_placement": {"actor": "0-1", "rollout,reward": "2"}},
        "runner": {"seq_length": 16, "experiment_name": "run", "output_dir": str(world.parent / "results")},
        "algorithm": {"group_size": 2},
        "rollout": {"model": {"model_path": str(world / "model")}},
        "data": {"train_data_paths": [str(world / "train.jsonl")], "max_prompt_length": 8, "rollout_batch_size": 4},
        "actor": {"model": {"precision": "fp32", "tensor_model_parallel_size": 2}},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}


def check(world: Path, monkeypatch: pytest.MonkeyPatch | None = None, num_gpus: int = 0, **sections: dict[str, Any]) -> Report:
    if monkeypatch is not None:
        monkeypatch.setattr("workers.check.count_gpus", lambda: num_gpus)
    return check_run(values(world, **sections), GRPO_CHECKS)


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def texts(report: Report) -> str:
    return "\n".join(text for _, text in report.findings)


def test_a_run_that_can_start_has_no_findings_and_a_plan(world, monkeypatch) -> None:
    report = check(world, monkeypatch)
    assert report.findings == [] and report.notes == []
    plan = dict(report.plan)
    assert plan["actor"] == "2 ranks (TP 2) on process slots 0-1" and plan["engines"] == "1 on process slots 2, disaggregated"
    assert plan["model"].startswith("Qwen2ForCausalLM, 2 layers, 0.40 M parameters, fp32") and plan["steps"] == "up to 16"
    assert plan["begins"].startswith("from the start")


def test_the_plan_says_where_samples_of_a_step_wait_for_others(world, monkeypatch) -> None:
    apart = {"cluster": {"component_placement": {"actor": "0-1", "rollout": "2-3", "reward": "0"}}}
    batch = {"data": {"rollout_batch_size": 6}, "algorithm": {"group_size": 4}}
    texts = {
        most: dict(check(world, monkeypatch, **apart, **batch, rollout={"max_running_requests": most}).plan)["engines"] for most in (11, 12)
    }
    assert texts[11].endswith("disaggregated; up to 12 samples of a step each, 11 at once (rollout.max_running_requests)"), texts
    assert texts[12] == "2 on process slots 2-3, disaggregated"
    greedy = {**batch, "algorithm": {"group_size": 4, "sampling_params": {"do_sample": False}}}
    assert dict(check(world, monkeypatch, **apart, **greedy, rollout={"max_running_requests": 3}).plan)["engines"] == texts[12]


def test_findings_of_every_part_come_together(own, monkeypatch) -> None:
    edit(own / "model/config.json", architectures=["GemmaForCausalLM"])
    (own / "model/tokenizer.json").unlink()
    report = check(
        own,
        monkeypatch,
        runner={"logger": {"logger_backends": ["wandb"]}, "resume_dir": "/nowhere"},
        data={"train_data_paths": ["/gone.jsonl"]},
        cluster={"component_placement": {"actor": "0-2", "rollout,reward": "3"}},
        actor={"optim": {"lr": -1.0}, "model": {"tensor_model_parallel_size": 2, "precision": "fp32"}},
    )
    assert {about for about, _ in report.findings} >= {"configuration", "devices", "model", "tokenizer", "data", "loggers", "resume"}
    said = texts(report)
    for part in (
        "actor.optim.lr (-1.0) must be at least 0",
        "gives the actor 3 ranks, which TP x PP x CP = 2 must divide",
        "unknown architecture GemmaForCausalLM",
        "holds no tokenizer",
        "/gone.jsonl does not exist",
        "names wandb, which cannot be imported (it is not installed)",
        "resume_dir /nowhere does not exist",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[1]", "config.json holds list instead of an object"),
        ("config.json", b"\xff\xfe", "config.json is not UTF-8 text"),
        ("config.json", b"{}", "architecture"),
        ("config.json", b'{"architectures": ["Qwen2ForCausalLM"], "hidden_size": "many"}', "hidden_size"),
        ("generation_config.json", b"{", "generation_config.json is not JSON"),
        ("generation_config.json", b'{"eos_token_id": 1.5}', "eos_token_id"),
        ("tokenizer.json", b"{", "tokenizer.json is not JSON"),
        ("tokenizer.json", b"{}", "no tokenizer can be made from"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds list"),
    ],
)
def test_broken_files_of_the_model_are_findings(own, monkeypatch, name, content, part) -> None:
    (own / "model" / name).write_bytes(content)
    said = texts(check(own, monkeypatch))
    assert part in said and len(set(said.splitlines())) == len(said.splitlines()), said


@pytest.mark.parametrize("wrong", ["x", -1, {}, [None]], ids=repr)
def test_whatever_a_config_json_holds_is_answered_by_findings(own, monkeypatch, wrong) -> None:
    """A raw error would end this test."""
    path = own / "model/config.json"
    held = json.loads(path.read_text())
    for key in held:
        path.write_text(json.dumps({**held, key: wrong}))
        check(own, monkeypatch)
        path.write_text(json.dumps({name: value for name, value in held.items() if name != key}))
        check(own, monkeypatch)


@pytest.mark.parametrize("wrong", ["x", {"a": None}], ids=repr)
def test_whatever_a_key_holds_is_answered_by_findings(world, monkeypatch, wrong) -> None:
    """A raw error would end this test. Not every value is a finding: some keys hold any text."""
    monkeypatch.setattr("workers.check.count_gpus", lambda: 0)
    answered = 0
    for key in dotted_keys(RunConfig):
        composed = values(world)
        *sections, name = key.split(".")
        inner = composed
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = wrong
        answered += bool(check_run(composed, GRPO_CHECKS).findings)
    assert answered > 100


def test_weight_files_that_are_not_the_models_are_findings(own, monkeypatch) -> None:
    weights = own / "model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "truncated safetensors file" in texts(check(own, monkeypatch))
    (own / "model/model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    assert "model.safetensors.index.json" in texts(check(own, monkeypatch))
    (own / "model/model.safetensors.index.json").unlink()
    weights.write_bytes(whole)
    edit(own / "model/config.json", num_hidden_layers=4, layer_types=["full_attention"] * 4, max_window_layers=4)
    found = texts(check(own, monkeypatch))
    assert "does not fit Qwen2ForCausalLM: missing 24 tensors: model.layers.2.input_layernorm.weight" in found
    assert "model.layers.2.self_attn.o_proj.weight and 16 more" in found, "a few names and a count, however large the model is"


def test_a_user_is_told_what_becomes_of_layers_that_predict_further_tokens(tmp_path) -> None:
    told = "layers that predict further tokens (MTP) are neither trained nor sent to engines: saved folders have "
    further = {"num_nextn_predict_layers": 1}
    assert further_layers_note(further, 2, tmp_path) == f"{told}their 2 tensors as {tmp_path} has"
    assert (
        further_layers_note(further, 0, None)
        == f"{told}no tensors of them, although num_nextn_predict_layers is 1 in config.json; set it to 0"
    )
    assert further_layers_note({"num_nextn_predict_layers": 0}, 0, tmp_path) is further_layers_note({}, 0, None) is None


def test_adapters_are_checked_against_the_model_and_their_folder(own, monkeypatch) -> None:
    lora = {"r": 4, "adapter_path": str(own / "adapter"), "target_modules": ["q_proj", "gate"]}
    found = texts(check(own, monkeypatch, actor={"lora": lora, "megatron": {"mbridge": True}}))
    assert "actor.lora: target_modules name gate, which no linear layer of Qwen2ForCausalLM is called" in found
    assert f"{own}/adapter/adapter_config.json cannot be read" in found


@pytest.mark.parametrize(
    ("config", "drop", "words"),
    [
        ({}, "", ""),
        ({"base_model_name_or_path": "some-lab/other"}, "", ""),
        ({"use_dora": True}, "", "adapter_config.json: use_dora is True; only False or None is supported"),
        ({"rank_pattern": {"q_proj": 2}}, "", "rank_pattern is {'q_proj': 2}"),
        ({"r": 8}, "", "holds another adapter than this run's: r 8 there, 4 here"),
        ({}, "layers.1.self_attn.q_proj.lora_B.weight", "adapters asked for: missing 1 tensors: model.layers.1.self_attn.q_proj.lora_B"),
        ({}, "adapter_model.safetensors", "no *.safetensors file"),
    ],
)
def test_a_folder_of_other_adapters_is_a_finding(own, monkeypatch, config: dict[str, Any], drop: str, words: str) -> None:
    """Each of its keys and tensors, before anything starts; the whole one has no finding."""
    spec = LoraSpec(4, 32.0, target_modules=("q_proj",))
    model = model_of(json.loads((own / "model/config.json").read_text()))
    tensors = {f"{PREFIX}{t.name}": torch.zeros(t.shape) for t in adapters_of(model, spec).tensors(model, "float32")}
    (own / "adapter").mkdir()
    save_file({name: t for name, t in tensors.items() if not drop or drop not in name}, own / "adapter/adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj"], **config}
    (own / "adapter/adapter_config.json").write_text(json.dumps(content))
    if drop.endswith(".safetensors"):
        (own / "adapter" / drop).unlink()
    lora = {"r": 4, "adapter_path": str(own / "adapter"), "target_modules": ["q_proj"]}
    report = check(own, monkeypatch, actor={"lora": lora, "megatron": {"mbridge": True}})
    assert (words in texts(report)) if words else "adapter" not in texts(report)
    named = "base_model_name_or_path" in config
    assert named == any("that they are adapters of some-lab/other: whether" in note for note in report.notes)


def test_a_vision_language_model_is_checked_before_anything_starts(own, monkeypatch) -> None:
    """Negative control: the same run without what is refused has no such findings."""
    (own / "model/config.json").write_text(json.dumps(QWEN3_VL))
    layout = {"precision": "fp32", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}

    def said(**model: Any) -> str:
        return texts(check(own, monkeypatch, actor={"model": {**layout, **model}}))

    refusal = "apply_rope_fusion must be False for Qwen3 VL SFT, the Mrope answer is Error"
    assert refusal in said(apply_rope_fusion=True)
    found = said()
    assert refusal not in found
    assert "deepstack_visual_indexes [0, 2, 3] go into language layers 0 to 2, and the first pipeline stage holds 2 of 4 layers" in found
    assert "decoder_first_pipeline_num_layers" in found
    assert "deepstack" not in said(decoder_first_pipeline_num_layers=3, decoder_last_pipeline_num_layers=1)
    assert "does not fit Qwen3VLForConditionalGeneration: missing" in found, "its weights are looked at as well"
    frozen = {f"freeze_{part}": True for part in ("language_model", "vision_model", "vision_projection")}
    assert "freeze all of Qwen3VLForConditionalGeneration" in said(**frozen)


def test_limits_and_rope_of_the_model_are_looked_at(own, monkeypatch) -> None:
    edit(own / "model/config.json", max_position_embeddings=12)
    assert "runner.seq_length (16) exceeds max_position_embeddings (12)" in texts(check(own, monkeypatch))
    edit(own / "model/config.json", rope_parameters={"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0})
    assert "longrope" in texts(check(own, monkeypatch))


def test_initial_weights_of_no_model_or_another_than_the_engines_are_findings(world, own, monkeypatch) -> None:
    """Negative control: the same model in another folder, whose end-of-sequence token is another one."""

    def said(folder: Path) -> str:
        return texts(
            check(world, monkeypatch, actor={**values(world)["actor"], "megatron": {"ckpt_convertor": {"hf_model_path": str(folder)}}})
        )

    edit(own / "model/config.json", eos_token_id=3)
    assert said(own / "model") == ""
    assert f"actor.megatron.ckpt_convertor.hf_model_path {own} holds no config.json" in said(own)
    edit(own / "model/config.json", num_key_value_heads=4)
    found = said(own / "model")
    assert f"hf_model_path {own}/model is of another model than rollout.model.model_path {world}/model: " in found
    assert "num_groups 4 there, 2 here" in found


def test_keys_of_experts_are_told_for_a_model_without_any(world, own, monkeypatch) -> None:
    """Negative control: a model with experts."""
    keys = {"moe_token_dispatcher_type": "allgather", "moe_permute_fusion": True, "moe_router_pre_softmax": False}
    actor = {"model": {"precision": "fp32", "tensor_model_parallel_size": 2, **keys}}
    said = [
        f"actor.model.{name} has no effect: Qwen2ForCausalLM has no experts" for name in ("moe_token_dispatcher_type", "moe_permute_fusion")
    ]
    assert sorted(check(world, monkeypatch, actor=actor).notes) == sorted(said)
    (own / "model/config.json").write_text(json.dumps(QWEN3_MOE))
    assert not any("has no experts" in note for note in check(own, monkeypatch, actor=actor).notes)


def test_it_is_said_that_greedy_responses_teach_nothing(world, monkeypatch) -> None:
    greedy = {**values(world)["algorithm"], "sampling_params": {"do_sample": False}}
    assert "do_sample=False: all responses to a prompt are the same one" in " ".join(check(world, monkeypatch, algorithm=greedy).notes)


def test_places_that_cannot_be_used_are_findings(world, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    runner = {**values(world)["runner"], "logger": {"log_path": str(tmp_path / "file/log")}}
    found = texts(check(world, monkeypatch, runner=runner, weight_sync={"bind_host": "192.0.2.1"}))
    assert f"results cannot be written to {tmp_path}/file/log: Not a directory; set runner.logger.log_path" in found
    assert "weight_sync.bind_host 192.0.2.1: actor rank 0 cannot listen there" in found
    assert "bind_host" not in texts(check(world, monkeypatch, weight_sync={"bind_host": "127.0.0.1"}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        logger = {"prometheus_port": port}
        assert f"cannot listen on 127.0.0.1:{port}" in texts(
            check(world, monkeypatch, runner={**values(world)["runner"], "logger": logger})
        )
    assert texts(check(world, monkeypatch, runner={**values(world)["runner"], "logger": logger})) == ""
    megatron = {"mbridge": False, "ckpt_convertor": {"save_path": str(tmp_path / "file/converted")}}
    found = texts(check(world, monkeypatch, actor={**values(world)["actor"], "megatron": megatron}))
    assert f"cannot be written to {tmp_path}/file/converted: Not a directory; set actor.megatron.ckpt_convertor.save_path" in found


def test_what_may_not_be_read_is_a_finding(own, monkeypatch) -> None:
    """Model and data of another user, beside what else is wrong; permissions hold for everybody but root."""
    check(own, monkeypatch)  # with all modules imported
    (own / "train.jsonl").chmod(0)
    (own / "model").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        found = texts(check(own, monkeypatch, runner={**values(own)["runner"], "resume_dir": "/nowhere"}))
    finally:
        os.seteuid(user)
        (own / "model").chmod(0o755)
    assert re.search(rf"{own}/model\S*: Permission denied; start the run as a user who may", found)
    assert "resume_dir /nowhere does not exist" in found


def test_a_world_that_cannot_be_made_where_it_is_asked_for_is_a_finding(world, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    found = texts(check(world, monkeypatch, arithmetic={"path": str(tmp_path / "file" / "world")}))
    assert f"cannot be written to {tmp_path}/file/world: Not a directory; set arithmetic.path to another folder" in found


def test_a_model_that_engines_do_not_compute_on_a_cpu_is_a_finding(own, monkeypatch) -> None:
    edit(own / "model/config.json", num_attention_heads=8)
    said = "model/config.json: heads of 16, which vLLM's attention on CPU does not compute"
    assert said in texts(check(own, monkeypatch)) and said not in texts(check(own, monkeypatch, num_gpus=3))


def test_layouts_that_do_not_fit_are_findings(own, monkeypatch) -> None:
    edit(own / "model/config.json", intermediate_size=511)
    assert "511" in texts(check(own, monkeypatch))
    three = {"model": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 3, "precision": "fp32"}}
    placed = {"component_placement": {"actor": "0-2", "rollout,reward": "3"}}
    assert "2 layers cannot be split over pp_size 3" in texts(check(own, monkeypatch, actor=three, cluster=placed))


def test_placement_without_enough_gpus_is_a_finding_and_a_cluster_is_counted_later(world, monkeypatch) -> None:
    everything = {"component_placement": {"actor,rollout,reward": "all"}}
    assert "`all` needs GPUs, and there are none" in texts(check(world, monkeypatch, cluster=everything))
    assert check(world, monkeypatch, num_gpus=2, cluster=everything).findings == []
    nccl = check(world, monkeypatch, num_gpus=2, cluster=everything, weight_sync={"transport": "nccl"})
    assert "weight_sync.transport nccl takes one process on each GPU" in texts(nccl)
    eight = {"component_placement": {"actor": "0-1", "rollout,reward": "2-7"}}
    assert "device 7 does not exist; the cluster has 4" in texts(check(world, monkeypatch, num_gpus=4, cluster=eight))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        report = check(world, monkeypatch, cluster=everything)
        assert report.findings == [] and f"counted when Ray is joined at {address}" in report.notes[0]
    assert f"RAY_ADDRESS={address}: nothing answers there" in texts(check(world, monkeypatch, cluster=everything))


FLEX = {"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}
# Of runs on this machine: GPUs and TransformerEngine that it has, sections, and what is found; nothing where GPUs are enough.
_ASKED_OF_MACHINES = [
    (0, False, {"actor": {"spec_name": "te_gpt"}}, "spec_name te_gpt is TransformerEngine's layers, which need GPUs"),
    (6, False, {"actor": {"spec_name": "te_gpt"}}, "spec_name te_gpt needs the package transformer_engine, which is not"),
    (6, True, {"actor": {"spec_name": "te_gpt"}}, ""),
    (0, False, {"actor": {"optim": {"optimizer_cpu_offload": True}}}, "optimizer_cpu_offload=True .* there are none"),
    (6, False, {"actor": {"optim": {"optimizer_cpu_offload": True}}}, ""),
    (0, True, {"actor": {"optim": {"use_precision_aware_optimizer": True}}}, "use_precision_aware_optimizer=True needs GPUs"),
    (6, False, {"actor": {"optim": {"use_precision_aware_optimizer": True}}}, "use_precision_aware_optimizer=True needs the package"),
    (0, False, {"actor": {"model": FLEX}}, "dispatcher_type flex is DeepEP's, which needs GPUs"),
    (6, False, {"actor": {"model": FLEX}}, "dispatcher_type flex needs the package deep_ep"),
    (6, True, {"actor": {"model": {**FLEX, "expert_model_parallel_size": 1}}}, "flex sends tokens to experts of other ranks"),
    (0, False, {"actor": {"megatron": {"distributed_backend": "nccl"}}}, "distributed_backend nccl needs GPUs"),
    (0, False, {"weight_sync": {"transport": "ipc"}}, "weight_sync.transport ipc is between GPUs"),
    (6, False, {"weight_sync": {"transport": "ipc"}}, ""),
    (0, False, {"rollout": {"vllm": {"enable_chunked_prefill": True}}}, "enable_chunked_prefill=True ends vLLM on CPU .* set one of them"),
    (6, False, {"rollout": {"vllm": {"enable_chunked_prefill": True}}}, ""),
    (0, False, {"rollout": {"max_running_requests": 4, "vllm": {"max_num_batched_tokens": 8}}}, "batched_tokens .8. must be .* on CPU"),
    (6, False, {"rollout": {"max_running_requests": 4, "vllm": {"max_num_batched_tokens": 8}}}, ""),
    (
        0,
        False,
        {"rollout": {"vllm": {"enable_expert_parallel": True}}},
        "engines that share experts compute on GPUs alone.* set it to False",
    ),
    (0, False, {"rollout": {"enable_return_routed_experts": True}}, "router_replay=R3 needs, is of engines on GPUs.*R2 does without"),
    (6, True, {"actor": {"model": {"context_parallel_size": 2}}}, "precision fp32 under context_parallel_size 2"),
    (6, True, {"actor": {"model": {"context_parallel_size": 2}, "spec_name": "local_gpt"}}, ""),
    (
        0,
        False,
        {"actor": {"model": {"context_parallel_size": 2, "cp_comm_type": "a2a", "tensor_model_parallel_size": 2}}},
        "a2a deals .* 2 ranks, and each .* has 1 of them",
    ),
]


@pytest.mark.parametrize(("num_gpus", "has_library", "asked", "found"), _ASKED_OF_MACHINES)
def test_what_this_machine_has_not_is_found_before_anything_starts(world, monkeypatch, num_gpus, has_library, asked, found) -> None:
    find, library = importlib.util.find_spec, object() if has_library else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: library if name in ("transformer_engine", "deep_ep") else find(name))
    placed = {"component_placement": {"actor": "0-3", "rollout,reward": "4-5"}}
    model = {"precision": "fp32", "tensor_model_parallel_size": 1, **asked.get("actor", {}).get("model", {})}
    asked = {**asked, "actor": {**asked.get("actor", {}), "model": model}}
    report = check(world, monkeypatch, num_gpus=num_gpus, cluster=placed, **asked)
    assert re.search(found, texts(report)) if found else texts(report) == ""


def test_keys_of_engines_on_gpus_are_told_where_there_are_none(world, monkeypatch) -> None:
    """Negative control: GPUs, where they are read."""
    asked: dict[str, Any] = {
        "rollout": {"vllm": {"attention_backend": "FLASH_ATTN", "kv_cache_memory_bytes": 2**30}, "cuda_graph_max_bs": 8},
        "weight_sync": {"staging": "always"},
    }
    names = ("rollout.vllm.attention_backend", "rollout.vllm.kv_cache_memory_bytes", "rollout.cuda_graph_max_bs", "weight_sync.staging")
    assert check(world, monkeypatch, **asked).notes == [f"{name} has no effect: there are no GPUs" for name in names]
    assert check(world, monkeypatch, num_gpus=3, **asked).notes == []
    eager = check(world, monkeypatch, rollout={"enforce_eager": True, "cuda_graph_max_bs": 8})
    assert eager.notes == ["rollout.cuda_graph_max_bs has no effect: rollout.enforce_eager is True"], "told once"


def test_rows_are_looked_at_with_tokenizer_template_and_verifier(own, monkeypatch) -> None:
    rows = [
        '{"prompt": "1+1=", "solutions": "2"}',
        '{"prompt": "1+1=", "solutions": "\\\\sqrt{2"}',
        '{"prompt": "1+1=", "solutions": null}',
        *['{"prompt": "1+1=", "solutions": "2"}'] * 4,
    ]
    (own / "train.jsonl").write_text("\n".join(rows))
    said = texts(check(own, monkeypatch))
    assert "train.jsonl:3: field 'solutions' holds null" in said and "train.jsonl:2: math-verify cannot read" in said
    report = check(own, monkeypatch, data={"on_bad_sample": "skip", "rollout_batch_size": 1})
    assert report.findings == [] and report.notes[0].startswith("left out 2 bad samples")
    (own / "train.jsonl").write_text('{"prompt": "1+1=1+1=1+1=1+1=", "solutions": "2"}\n')
    assert "all of the first 1 prompts are longer than data.max_prompt_length (8)" in texts(check(own, monkeypatch))
    (own / "train.jsonl").write_text('{"prompt": [{"role": "user", "content": "1+1="}], "solutions": "2"}\n')
    assert "set data.apply_chat_template=True" in texts(check(own, monkeypatch))
    assert "the tokenizer has no chat template" in texts(
        check(own, monkeypatch, data={"rollout_batch_size": 1, "apply_chat_template": True})
    )
    (own / "model/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    assert "the chat template of" in texts(check(own, monkeypatch, data={"rollout_batch_size": 1, "apply_chat_template": True}))
    (own / "model/chat_template.jinja").write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert check(own, monkeypatch, data={"rollout_batch_size": 1, "apply_chat_template": True}).findings == []


def test_a_vocabulary_of_another_model_is_a_finding(own, monkeypatch) -> None:
    edit(own / "model/config.json", vocab_size=4)
    assert "they belong to different models" in texts(check(own, monkeypatch))


def test_what_would_be_resumed_is_said_or_a_finding(own, monkeypatch) -> None:
    folder = own.parent / "results/run/checkpoints/global_step_3"
    for rank in range(2):
        (folder / f"actor/iter_0000003/mp_rank_0{rank}").mkdir(parents=True)
    (folder / "actor/latest_checkpointed_iteration.txt").write_text("3")
    auto = {"resume_dir": "auto"}
    assert f"after step 3 of {folder}" in dict(check(own, monkeypatch, runner=auto).plan)["begins"]
    torn = folder / "actor/iter_0000003/mp_rank_00/model_optim_rng.pt"
    torn.touch()
    assert "model_optim_rng.pt has 0 bytes" in texts(check(own, monkeypatch, runner=auto))
    torn.unlink()
    one = {"model": {"tensor_model_parallel_size": 1, "precision": "fp32"}}
    assert texts(check(own, monkeypatch, runner=auto, actor=one)) == "", "another layout is cut anew"
    report = check(own, monkeypatch, runner=auto)
    assert report.config is not None
    write_settings(folder, report.config, {}, 4)
    assert any("4 actor ranks saved" in said and "and 2 go on" in said for _, said in check(own, monkeypatch, runner=auto).plan)
    (folder / "run.json").unlink()
    (folder / "data").mkdir()
    with zipfile.ZipFile(folder / "data/data.pt", "w") as archive:
        archive.writestr("data/data.pkl", "whole")
    assert "data.pt" not in texts(check(own, monkeypatch, runner=auto))
    whole = (folder / "data/data.pt").read_bytes()
    # Flags of its entry in the directory of the archive: now it asks for a password.
    flags = whole.index(b"PK\x01\x02") + 8
    asking = whole[:flags] + bytes([whole[flags] ^ 1]) + whole[flags + 1 :]
    for content in (b"cut", whole.replace(b"whole", b"whale"), asking):
        (folder / "data/data.pt").write_bytes(content)
        assert "data.pt cannot be read" in texts(check(own, monkeypatch, runner=auto))


def test_rows_of_a_validation_file_are_not_those_of_a_training_file_whose_name_begins_alike(own, monkeypatch) -> None:
    (own / "rows.json").write_text('[{"prompt": 3, "answer": "1"}]')
    shutil.copy(own / "train.jsonl", own / "rows.jsonl")
    data = {"train_data_paths": [str(own / "rows.json")], "val_data_paths": [str(own / "rows.jsonl")], "on_bad_sample": "skip"}
    assert f"all rows of {own / 'rows.json'} are bad samples" in texts(check(own, monkeypatch, data=data, runner={"val_check_interval": 1}))


def test_runs_that_would_fail_for_data_or_results_are_findings(own, monkeypatch) -> None:
    assert "Train dataloader is empty!" in texts(check(own, monkeypatch, data={"rollout_batch_size": 65}))
    (own / "results").write_text("a file")
    base = {"seq_length": 16, "experiment_name": "run", "output_dir": str(own / "results")}
    assert "results cannot be written to" in texts(check(own, monkeypatch, runner=base))
    rows = own / "bad.jsonl"
    rows.write_text('{"prompt": null, "solutions": ["1"]}\n' * 8)
    assert "nothing is left" in texts(check(own, monkeypatch, data={"train_data_paths": [str(rows)], "on_bad_sample": "skip"}))
    (own / "text.parquet").write_text("words")
    said = texts(check(own, monkeypatch, data={"train_data_paths": [str(own / "text.parquet")]}))
    assert "named as a Parquet file" in said and "skip" not in said


def test_memory_of_an_actor_gpu_is_predicted_and_what_cannot_fit_is_a_finding_with_a_way_out(own, monkeypatch) -> None:
    (own / "model/config.json").write_text(json.dumps(shape_of("qwen2.5-7b")))
    monkeypatch.setattr("workers.check.gpu_bytes", lambda: 80 * 2**30)

    def memory(cut: dict[str, Any] | None = None, **model: Any) -> Report:
        runner = {"seq_length": 8192, "experiment_name": "run", "output_dir": str(own.parent / "results"), **(cut or {})}
        sections = {"cluster": {"component_placement": {"actor": "0-1", "rollout,reward": "2"}}, "actor": {"model": model}}
        return check_run({**values(own, runner=runner), **sections}, (check_devices, check_model, check_memory))

    monkeypatch.setattr("workers.check.count_gpus", lambda: 3)
    report = memory(tensor_model_parallel_size=2)
    assert [about for about, _ in report.findings] == ["memory"]
    said = texts(report)
    for part in ("cannot train", "80.0 GiB", "optimizer 42.6", "granularity to full", "sequence_parallel to True", "optimizer_cpu_offload"):
        assert part in said, said
    assert "lower algorithm.training_batch_size_per_gpu" not in said and "use_distributed_optimizer to" not in said
    assert "max_tokens_per_mbs" not in said
    by_tokens = {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": 16384}
    assert "lower runner.max_tokens_per_mbs" in texts(memory(by_tokens, tensor_model_parallel_size=2))
    assert "max_tokens_per_mbs" not in texts(memory({"enable_dynamic_batch_size": True}, tensor_model_parallel_size=2)), "it is the least"
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    fits = memory(tensor_model_parallel_size=2, sequence_parallel=True, **again)
    assert fits.findings == [] and "of the 80 of a GPU in training" in dict(fits.plan)["memory"]
    found = json.loads(json.dumps(fits.as_dict()))["memory"]
    assert found["rank"]["optimizer"] == pytest.approx(6 * 7615616512, rel=1e-3)
    # Nearer than the estimate is: said, and not refused.
    assert found["device"] == 80 * 2**30 < found["in_training"] < 88 * 2**30 and "may not fit" in " ".join(fits.notes)
    shared = {"cluster": {"component_placement": {"actor,rollout,reward": "0-1"}}, "actor": {"model": {"tensor_model_parallel_size": 2}}}
    shared |= {"runner": {"seq_length": 64, "experiment_name": "run", "output_dir": str(own.parent / "results")}}
    beside = check_run({**values(own), **shared}, (check_devices, check_model, check_memory))
    assert "set actor.offload_weight, actor.offload_grad, actor.offload_optimizer to True, or lower rollout.gpu_memory" in texts(beside)
    monkeypatch.setattr("workers.check.gpu_bytes", lambda: None)
    unknown = memory(tensor_model_parallel_size=2)
    assert unknown.findings == [] and "CUDA 2" in dict(unknown.plan)["memory"], "of a GPU of unknown size nothing is too much"
    monkeypatch.setattr("workers.check.count_gpus", lambda: 0)
    in_host = memory(tensor_model_parallel_size=2)
    assert in_host.findings == [] and "optimizer 42.6" in dict(in_host.plan)["memory"] and "CUDA" not in dict(in_host.plan)["memory"]


def test_initial_weights_that_nothing_names_are_one_finding(world, monkeypatch) -> None:
    actor = {"model": {"precision": "fp32", "tensor_model_parallel_size": 2}, "megatron": {"use_hf_ckpt": False}}
    assert len(check(world, monkeypatch, actor=actor).findings) == 1


def test_the_script_checks_without_importing_what_is_slow_and_without_leaving_files(world, tmp_path) -> None:
    """Of a whole world: its files, its rows, its template. The exit code and the screen are a user's."""
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print('CODE', end.code)\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    overrides = [f"rollout.model.model_path={world / 'model'}", f"data.train_data_paths=[{world / 'train.jsonl'}]"]
    overrides += [f"runner.output_dir={tmp_path / 'results'}", "--check"]
    command = [sys.executable, "-c", program, str(ROOT / "examples/reasoning/main_grpo.py"), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert "CODE 0" in done.stdout and "HEAVY []" in done.stdout, done.stdout + done.stderr
    assert "no findings in" in done.stdout and "2 ranks (TP 2)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_checks_itself_first_and_starts_nothing_with_a_finding(tmp_path) -> None:
    command = ["bash", str(SCRIPT), f"runner.output_dir={tmp_path / 'results'}", "actor.optim.lr=-1", "data.train_data_paths=[/gone.jsonl]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert "actor.optim.lr (-1) must be at least 0" in done.stderr and "/gone.jsonl does not exist" in done.stderr
    assert "2 findings" in done.stderr and "nothing was started" in done.stderr
