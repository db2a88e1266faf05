"""Claims about the configuration of a run of supervised fine-tuning: which keys are its own, and what is said of the others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlsync.errors import ConfigError
from workers.config import SftConfig, config_as_dict, load_config, read_config, register_resolvers, validate_world
from workers.config.fields import dotted_keys
from workers.config.foreign_keys import INERT_IN_SFT, SFT_NAMES, find_inert
from workers.placement import components_of, resolve_placement

CONFIGS = Path(__file__).parents[2] / "configs" / "sft"


def minimal(**sections: Any) -> dict[str, Any]:
    """The required keys, with sections merged over them."""
    base = {
        "cluster": {"component_placement": {"actor": "0"}},
        "runner": {"task_type": "sft", "seq_length": 32, "experiment_name": "x"},
        "data": {"train_data_paths": ["a.jsonl"]},
        "actor": {"model": {"model_path": "/model"}, "micro_batch_size": 2, "global_batch_size": 8},
    }
    return OmegaConf.to_container(OmegaConf.merge(base, sections))  # type: ignore[return-value]


def findings(**sections: Any) -> str:
    return "\n".join(read_config(minimal(**sections), "sft").findings)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_config_loads_without_inert_keys(name: str) -> None:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        reading = read_config(compose(name), "sft")
    assert (reading.findings, reading.inert) == ((), ()) and isinstance(reading.config, SftConfig)


def test_the_configs_users_ask_for_by_name_exist() -> None:
    wanted = {
        "arithmetic_sft_llm",
        "qwen2_5_vl_megatron_sft_vlm",
        "qwen3_vl_megatron_sft_vlm",
        "qwen3_vl_moe_megatron_sft_vlm",
        "qwen3_sft_llm",
        "qwen3_pretrain_text",
        "qwen3_vl_sft_lora",
    }
    assert wanted <= {path.stem for path in CONFIGS.glob("*.yaml")}


def test_the_model_is_read_from_one_key_which_everything_else_follows() -> None:
    config = load_config(minimal(), "sft")
    assert config.actor.megatron.ckpt_convertor.hf_model_path == config.actor.tokenizer.tokenizer_model == config.model_path == "/model"
    assert config.actor.eval_batch_size == 2 and config.rollout.return_logprobs is False and not config.has_engines
    assert load_config(config_as_dict(config), "sft") == config


def test_a_yaml_of_the_other_kind_is_refused_with_the_script_that_runs_it() -> None:
    (said,) = read_config(minimal()).findings
    assert said == (
        "runner.task_type is sft: such a run is started by examples/sft/run_vlm_sft.sh and run_llm_sft.sh, not by "
        "examples/reasoning/run_main_grpo_math.sh"
    )
    (said,) = read_config(minimal(runner={"task_type": "reasoning"}), "sft").findings
    assert said.startswith("runner.task_type is reasoning: such a run is started by examples/reasoning/run_main_grpo_math.sh")
    assert "runner.task_type: expected one of reasoning, sft, got 'embodied'" in findings(runner={"task_type": "embodied"})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"actor": {"megatron": {"ckpt_convertor": {"hf_model_path": "/other"}}}},
            "actor.megatron.ckpt_convertor.hf_model_path (/other) belongs to a reasoning run; SFT reads the model at actor",
        ),
        ({"rollout": {"model": {"model_path": "/other"}}}, "rollout.model.model_path (/other) and actor.model.model_path (/model) are the"),
        ({"actor": {"model": {"model_path": None}}}, "actor.model.model_path is required in an SFT run"),
        ({"actor": {"micro_batch_size": None}}, "actor.micro_batch_size is required in an SFT run"),
        ({"actor": {"enable_dp_load_balance": True}}, "actor.enable_dp_load_balance=True is for the samples of a reasoning run"),
        ({"algorithm": {"group_size": 8}}, "unknown key algorithm.group_size: it belongs to a reasoning (GRPO) run"),
        (
            {"reward": {"reward_scale": 5.0}},
            "unknown key reward.reward_scale: it belongs to a reasoning (GRPO) run (runner.task_type: reasoning)",
        ),
        ({"algorithm": {"sampling_params": {"temperature": 0.5}}}, "algorithm.sampling_params.temperature=0.5: it would divide the logits"),
        ({"critic": {"use_critic_model": True}}, "critic.use_critic_model=True: supervised fine-tuning has no critic"),
        ({"trainer": {"per_device_train_batch_size": 4}}, "it is actor.micro_batch_size here"),
        ({"validation": {"generate": True}}, "validation.generate=True needs data.val_data_paths"),
        ({"data": {"image_keys": ["image"]}}, "data.image_keys (('image',)) is for questions about pictures, which data.type llm has not"),
        ({"data": {"type": "chat", "choice_key": "choices"}}, "data.choice_key (choices) is for questions about pictures"),
        (
            {"data": {"type": "text", "system_prompt": "x"}},
            "data.system_prompt ('x') is for conversations, and data.type text has documents",
        ),
        ({"data": {"system_prompt": "x", "apply_chat_template": False}}, "data.system_prompt ('x') needs data.apply_chat_template=True"),
        (
            {"data": {"type": "text"}, "validation": {"generate": True}},
            "validation.generate=True needs questions, and data.type text has none",
        ),
        (
            {"actor": {"megatron": {"router_replay": "R2"}}},
            "actor.megatron.router_replay and rollout.enable_return_routed_experts belong to",
        ),
        (
            {"actor": {"megatron": {"convert_from_hf": False}}, "validation": {"generate": True}},
            "actor.megatron.convert_from_hf=False gives engines no weights to start with",
        ),
        ({"actor": {"megatron": {"convert_from_hf": False}, "lora": {"r": 4}}}, "convert_from_hf=False beside actor.lora, whose base is a"),
        (
            {"actor": {"megatron": {"convert_from_hf": False, "use_hf_ckpt": False}}},
            "convert_from_hf=False beside actor.megatron.use_hf_ckpt",
        ),
        ({"rollout": {"validate_weight": True}}, "rollout.validate_weight (True) belongs to a reasoning run"),
        ({"data": {"val_data_paths": ["b"], "eval_data_paths": ["c"]}}, "data.val_data_paths (['b']) and data.eval_data_paths (['c']) are"),
    ],
)
def test_what_belongs_elsewhere_is_refused_and_said_where(sections: dict[str, Any], said: str) -> None:
    assert said in findings(**sections)


def test_keys_of_sft_in_a_reasoning_run_are_refused() -> None:
    values = {
        "cluster": {"component_placement": {"actor,rollout,reward": "0"}},
        "runner": {"seq_length": 32, "experiment_name": "x"},
        "rollout": {"model": {"model_path": "/model"}},
        "data": {"train_data_paths": ["a.jsonl"], "max_prompt_length": 8, "rollout_batch_size": 4},
        "actor": {"model": {"model_path": "/model"}, "eval_batch_size": 1},
        "validation": {"generate": True},
    }
    said = "\n".join(read_config(values).findings)
    assert "actor.model.model_path (/model) belongs to SFT (runner.task_type: sft); a reasoning run reads the model at" in said
    assert "actor.eval_batch_size belongs to SFT" in said
    assert "unknown key validation.generate: it belongs to a run of supervised fine-tuning (runner.task_type: sft)" in said


def test_keys_of_rlinfs_sft_yamls_that_mean_nothing_here_are_named_with_a_reason() -> None:
    theirs = minimal(
        algorithm={"adv_type": "gae", "sampling_params": {"temperature": 1.0}},
        actor={"eval_batch_size": 1, "model": {"model_type": "qwen2.5_vl", "is_lora": False, "seq_length": 32, "add_qkv_bias": True}},
        data={"eval_data_paths": "held_out.jsonl", "use_chat_template": True, "lazy_loading": True, "dataset_name": "robo2vlmsft"},
        reward={"use_reward_model": False},
        critic={"use_critic_model": False},
    )
    del theirs["runner"]["seq_length"]
    reading = read_config(theirs, "sft")
    assert reading.findings == () and isinstance(reading.config, SftConfig)
    assert reading.config.data.val_data_paths == ("held_out.jsonl",)
    assert (reading.config.runner.seq_length, reading.config.actor.eval_batch_size) == (32, 1)
    inert = dict(reading.inert)
    assert inert["data.use_chat_template"] == "data.apply_chat_template decides"
    assert {"algorithm.adv_type", "reward", "critic", "actor.model.seq_length", "actor.model.add_qkv_bias"} <= inert.keys()


def test_no_key_of_sft_is_both_read_and_inert_and_hints_name_keys_that_exist() -> None:
    known = set(dotted_keys(SftConfig))
    assert [name for name in known if find_inert(name, "sft") is not None] == []
    assert set(SFT_NAMES.values()) <= known and len(INERT_IN_SFT) > 4


def test_only_what_a_run_has_is_placed() -> None:
    plain, generating = (
        load_config(
            minimal(validation={"generate": does, "max_new_tokens": 8}, data={"val_data_paths": ["b"]}, runner={"val_check_interval": 1}),
            "sft",
        )
        for does in (False, True)
    )
    assert components_of(plain) == ("actor",) and components_of(generating) == ("actor", "rollout")
    placed = resolve_placement({"actor": "0-1"}, None, components_of(plain))
    assert placed.actor == (0, 1) and placed.engines(1) == ()
    with pytest.raises(ConfigError, match=r"remove rollout .*; this run has no engines, which it has with validation.generate=True"):
        resolve_placement({"actor": "0", "rollout": "1"}, None, components_of(plain))
    with pytest.raises(ConfigError, match="must place rollout"):
        resolve_placement({"actor": "0"}, None, components_of(generating))


def test_world_size_and_batches_must_divide() -> None:
    config = load_config(minimal(actor={"model": {"tensor_model_parallel_size": 2}}), "sft")
    assert validate_world(config, 4) == 2
    with pytest.raises(ConfigError, match=r"actor.global_batch_size \(8\), the samples of a step, must be divisible by .* \(3\)"):
        validate_world(config, 6)
    with pytest.raises(ConfigError, match=r"micro_batch_size x data-parallel size \(2 x 8\)"):
        validate_world(config, 16)
