"""Claims about loading a run configuration: real hydra, every shipped yaml, and a yaml written for another runner."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlsync.errors import ConfigError
from rlsync.models import REFUSED_SWITCHES
from tests.deadlines import HANG_S
from workers.config import (
    RunConfig,
    config_as_dict,
    config_table,
    describe_config,
    lenient_overrides,
    load_config,
    read_config,
    register_resolvers,
)
from workers.config.fields import Bounds, bounds_of, dotted_keys, section_of
from workers.config.foreign_keys import ABSENT, OTHER_NAMES, find_inert

CONFIGS = Path(__file__).parents[2] / "configs" / "reasoning"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def shipped(name: str = "arithmetic-grpo-megatron", *overrides: str) -> RunConfig:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return load_config(compose(name, overrides=lenient_overrides(overrides)))


def minimal(**sections: Any) -> dict[str, Any]:
    """The required keys, with sections merged over them."""
    base = {
        "cluster": {"component_placement": {"actor,rollout,reward": "0"}},
        "runner": {"seq_length": 32, "experiment_name": "x"},
        "rollout": {"model": {"model_path": "/model"}},
        "data": {"train_data_paths": ["a.jsonl"], "max_prompt_length": 8, "rollout_batch_size": 4},
    }
    return OmegaConf.to_container(OmegaConf.merge(base, sections))  # type: ignore[return-value]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads_without_inert_keys(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = shipped(name)
    assert not caplog.records
    assert config.rollout.rollout_backend == "vllm" and config.actor.megatron.mbridge is True


def test_the_configs_users_ask_for_by_name_exist() -> None:
    named = {"arithmetic-grpo-megatron", "qwen2.5-1.5b-grpo-megatron", "qwen2.5-7b-grpo-megatron"}
    assert named | {
        "arithmetic-grpo-moe-megatron",
        "qwen3-30b-grpo-megatron",
        "moonlight-16b-grpo-megatron",
        "qwen2.5-7b-grpo-lora-megatron",
    } <= set(SHIPPED)


@pytest.mark.parametrize("form", ["{}", "+{}", "++{}"])
@pytest.mark.parametrize("key", ["actor.megatron.mbridge", "actor.model.make_vocab_size_divisible_by"], ids=["in yaml", "absent from yaml"])
def test_every_override_form_sets_a_key(form: str, key: str) -> None:
    value = "False" if key.endswith("mbridge") else "64"
    config = shipped("arithmetic-grpo-megatron", form.format(f"{key}={value}"))
    found = config.actor.megatron.mbridge if key.endswith("mbridge") else config.actor.model.make_vocab_size_divisible_by
    assert str(found) == value


def test_hydra_alone_refuses_both_forms() -> None:
    """Why lenient_overrides exists."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        with pytest.raises(HydraException):
            compose("arithmetic-grpo-megatron", overrides=["+actor.megatron.mbridge=True"])
        with pytest.raises(HydraException):
            compose("arithmetic-grpo-megatron", overrides=["actor.model.make_vocab_size_divisible_by=64"])


def test_overrides_work_from_a_real_hydra_command_line(tmp_path: Path) -> None:
    entry = tmp_path / "entry.py"
    entry.write_text(
        textwrap.dedent(
            """
            import sys
            import hydra
            from workers.config import hydra_arguments, load_config, register_resolvers

            @hydra.main(version_base="1.3", config_path=None)
            def main(composed):
                config = load_config(composed)
                print("FOUND", config.actor.megatron.mbridge, config.actor.megatron.no_load_optim, config.runner.logger.log_path)

            register_resolvers()
            sys.argv[1:] = hydra_arguments(sys.argv[1:])
            main()
            """
        )
    )
    arguments = ["--config-path", str(CONFIGS), "--config-name", "qwen2.5-1.5b-grpo-megatron"]
    arguments += ["+actor.megatron.mbridge=True", "actor.megatron.no_load_optim=True", "runner.output_dir=/out", "hydra.job.name=n"]
    done = subprocess.run(
        [sys.executable, str(entry), *arguments],
        env={"PYTHONPATH": str(CONFIGS.parents[1]), "PATH": "/usr/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert "FOUND True True /out/grpo-1.5b" in done.stdout, done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["entry.py"], "hydra must leave no folders behind"


def test_several_components_are_placed_by_one_key_as_in_a_yaml() -> None:
    placed = {"cluster.component_placement.rollout,reward=2", "+cluster.component_placement.rollout,reward=2"}
    for argument in placed:
        expected = ["++cluster.component_placement.rollout=2", "++cluster.component_placement.reward=2"]
        assert lenient_overrides([argument]) == expected
    config = shipped("arithmetic-grpo-megatron", "cluster.component_placement.rollout,reward=4-5")
    assert {config.cluster.component_placement[name] for name in ("rollout", "reward")} == {"4-5"}


def test_lenient_overrides_leaves_options_groups_and_hydra_keys_alone() -> None:
    untouched = ["--config-name", "x", "hydra.run.dir=.", "+base=grpo", "~actor.optim.lr", "++a.b=1", "-m", "base/x=y"]
    assert lenient_overrides(untouched) == untouched


def test_unknown_keys_are_all_reported_with_the_nearest_known_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal(actor={"megatron": {"mbrige": True}}, algorithm={"grup_size": 4}, weight_sink={"a": 1}))
    message = str(caught.value)
    assert "unknown key actor.megatron.mbrige: did you mean actor.megatron.mbridge?" in message
    assert "unknown key algorithm.grup_size: did you mean algorithm.group_size?" in message
    assert "unknown key weight_sink: did you mean weight_sync?" in message


def test_unknown_key_from_the_command_line_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"runner\.max_step\b.*did you mean runner\.max_steps"):
        shipped("arithmetic-grpo-megatron", "runner.max_step=3")


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key actor\.group_size: did you mean algorithm\.group_size\?"):
        load_config(minimal(actor={"group_size": 4}))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("algorithm", {"group_size": "many"}, "algorithm.group_size: expected a whole number, got 'many'"),
        ("algorithm", {"group_size": True}, "algorithm.group_size: expected a whole number, got True"),
        ("actor", {"model": {"precision": "int8"}}, "actor.model.precision: expected one of fp32, bf16, fp16, got 'int8'"),
        ("rollout", {"rollout_backend": "sglang"}, "rollout.rollout_backend: expected one of vllm, got 'sglang'"),
        ("actor", {"model": 3}, "actor.model: expected a section with keys, got 3"),
        ("reward", {"timeout_s": "soon"}, "reward.timeout_s: expected a number, got 'soon'"),
        ("runner", {"experiment_name": None}, "runner.experiment_name: expected a string, got None"),
        ("runner", {"resume_dir": ""}, "runner.resume_dir: expected a string that is not empty, or null, got ''"),
        ("rollout", {"model": {"model_path": " "}}, "rollout.model.model_path: expected a string that is not empty, got ' '"),
    ],
)
def test_a_wrong_type_names_key_expectation_and_value(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal(**{section: values}))
    assert message in str(caught.value)


def numeric_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, type, Bounds | None]]:
    """Dotted name, type and bounds of every key that holds a number."""
    hints = get_type_hints(cls)
    for declared in fields(cls):
        section = section_of(hints[declared.name])
        if section is not None:
            yield from numeric_keys(section, f"{prefix}{declared.name}.")
        kinds = {int, float} & {hints[declared.name], *get_args(hints[declared.name])}
        if kinds and get_origin(hints[declared.name]) is not Literal:
            yield prefix + declared.name, kinds.pop(), bounds_of(declared)


NUMERIC = list(numeric_keys())


def test_every_number_names_the_values_it_may_have() -> None:
    assert len(NUMERIC) > 80
    assert [name for name, _, bounds in NUMERIC if bounds is None] == []


@pytest.mark.parametrize(("name", "kind", "bounds"), NUMERIC, ids=[name for name, _, _ in NUMERIC])
def test_no_number_is_taken_that_its_key_cannot_have(name: str, kind: type, bounds: Bounds) -> None:
    outside = [] if kind is int else [math.nan, math.inf, -math.inf]
    outside += [-(10**9)] if bounds.min is not None or bounds.above is not None else []
    outside += [bounds.above] if bounds.above is not None else []
    outside += [10**12] if bounds.max is not None or bounds.below is not None else []
    outside += [bounds.below] if bounds.below is not None else []
    for value in outside:
        sections: Any = value
        for part in reversed(name.split(".")):
            sections = {part: sections}
        findings = read_config(minimal(**sections)).findings
        assert any(finding.startswith(f"{name} ({value}) must be ") for finding in findings), (value, findings)


def test_findings_of_all_kinds_come_together() -> None:
    actor = {"optim": {"lr": -1.0}, "qlora": True}
    with pytest.raises(ConfigError) as caught:
        load_config(minimal(actor=actor, critic={"use_critic_model": True}, rollout={"rollout_backend": "sglang"}))
    message = str(caught.value)
    for part in ("actor.optim.lr (-1.0) must be at least 0", "unknown key actor.qlora", "GRPO has no critic", "expected one of vllm"):
        assert part in message


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("actor.model.peft", "adapters (LoRA) are set by actor.lora.r"),
        ("actor.model.dora", "of adapters only LoRA is supported"),
        ("rollout.quantization", "quantization is not supported"),
        ("rollout.vllm.quantization", "quantization is not supported"),
        ("rollout.sglang_args", "SGLang is not supported"),
        ("runner.validation_steps", "validation is set by runner.val_check_interval"),
        ("data.eval_files", "validation is set by runner.val_check_interval"),
        ("data.val_files", "it is data.val_data_paths here"),
        ("convert.format", "nothing has to be converted"),
        ("trainer.total_epochs", "it is runner.max_epochs here"),
        ("trainer.test_freq", "it is runner.val_check_interval here"),
        ("trainer.save_freq", "it is runner.save_interval here"),
        ("data.train_files", "it is data.train_data_paths here"),
        ("actor_rollout_ref.model.path", "it is rollout.model.model_path here"),
        ("actor_rollout_ref.actor.optim.lr", "it is actor.optim.lr here"),
        ("actor_rollout_ref.rollout.n", "it is algorithm.group_size here"),
        ("actor_rollout_ref.ref.fsdp_config.param_offload", "it is actor.offload_weight here"),
        ("actor.rollout.n", "it is algorithm.group_size here"),
        ("rollout.backend", "it is rollout.rollout_backend here"),
        ("rollout.model_dir", "it is rollout.model.model_path here"),
        ("runner.logger.path", "it is runner.logger.log_path here"),
        ("learning_rate", "it is actor.optim.lr here"),
        ("actor.group_size", "did you mean algorithm.group_size?"),
        ("runner.max_step", "did you mean runner.max_steps?"),
        ("runner.val_chek_interval", "did you mean runner.val_check_interval?"),
        ("something.entirely_different", "no key is like it; docs/configuration.md lists all"),
    ],
)
def test_a_key_that_is_not_there_is_answered_by_what_was_meant(key: str, said: str) -> None:
    merged = OmegaConf.to_container(OmegaConf.merge(minimal(), OmegaConf.from_dotlist([f"{key}=1"])))
    assert f"unknown key {key}: {said}" in read_config(merged).findings[0]  # type: ignore[arg-type]


def test_hints_point_at_keys_that_exist_and_shadow_none() -> None:
    known = set(dotted_keys(RunConfig))
    assert set(OTHER_NAMES.values()) <= known
    mentioned = {
        name for _, sentence in ABSENT for name in re.findall(r"\b(?:actor|rollout|runner|reward|algorithm|data)\.[\w.]*\w", sentence)
    }
    assert mentioned <= known


def test_interpolations_of_what_is_missing_hide_no_other_finding() -> None:
    register_resolvers()
    new = {"sampling_params": {"max_new_tokens": "${subtract:${runner.seq_length}, ${data.max_prompt_length}}"}}
    written: dict[str, Any] = minimal(actor={"optim": {"lr": -1.0}})
    written["algorithm"] = new
    written["rollout"]["model"]["precision"] = "${actor.model.precision}"
    written["runner"]["logger"] = {"log_path": "${arithmetic.path}/x"}
    del written["runner"]["seq_length"]
    said = read_config(written).findings
    assert set(said[:2]) == {
        "arithmetic.path is missing; runner.logger.log_path needs it",
        "runner.seq_length is missing; algorithm.sampling_params.max_new_tokens needs it",
    }
    assert len(said) == 3 and said[2].startswith("actor.optim.lr")
    written["runner"]["seq_length"] = None
    said = read_config(written).findings
    assert not any("TypeError" in text for text in said) and any(text.startswith("runner.seq_length: expected a whole") for text in said)


def test_an_interpolation_reads_the_default_of_a_key_that_is_left_out() -> None:
    register_resolvers()
    written: dict[str, Any] = minimal(runner={"seq_length": 2048})
    written["algorithm"] = {"sampling_params": {"max_new_tokens": "${subtract:${runner.seq_length}, ${data.max_prompt_length}}"}}
    written["rollout"]["model"]["precision"] = "${actor.model.precision}"
    del written["data"]["max_prompt_length"]
    config = load_config(written)
    assert config.algorithm.sampling_params.max_new_tokens == 1024 and config.rollout.model.precision == "bf16"


def test_a_prompt_length_that_leaves_no_room_is_told_by_the_keys_that_were_set() -> None:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("qwen2.5-7b-grpo-megatron", overrides=["runner.seq_length=64", "data.max_prompt_length=64"])
    assert read_config(composed).findings[0].startswith("runner.seq_length (64) must be greater than data.max_prompt_length (64)")


def test_missing_required_keys_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({})
    for key in ("cluster.component_placement", "runner.seq_length", "rollout.model.model_path", "data.train_data_paths"):
        assert f"{key} is required" in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_is_accepted_and_reaches_the_engine(precision: str) -> None:
    config = load_config(minimal(actor={"model": {"precision": precision}}))
    assert config.actor.model.precision == config.rollout.model.precision == precision


def test_torch_dtype_resolver_gives_a_precision() -> None:
    register_resolvers()
    assert load_config(minimal(actor={"model": {"precision": "${torch.dtype:bfloat16}"}})).actor.model.precision == "bf16"


def test_derived_keys_follow_their_sources() -> None:
    config = load_config(
        minimal(algorithm={"group_size": 8, "n_minibatches": 2, "training_batch_size_per_gpu": 4}, actor={"optim": {"lr": 3}})
    )
    assert (config.actor.micro_batch_size, config.actor.global_batch_size) == (4, 16)
    assert config.actor.lr_sched.max_lr == 3.0 and config.actor.tokenizer.tokenizer_model == "/model"
    assert config.actor.megatron.ckpt_convertor.hf_model_path == "/model"
    assert config.algorithm.sampling_params.max_new_tokens == 24
    assert config.rollout.return_logprobs is None
    assert load_config(minimal(algorithm={"recompute_logprobs": False})).rollout.return_logprobs is True
    assert load_config(minimal(algorithm={"importance_sampling_fix": True})).rollout.return_logprobs is True


def test_sglang_blocks_are_accepted_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    sglang = {"attention_backend": "triton", "decode_log_interval": 500000, "use_torch_compile": False, "enable_ep_moe": True}
    with caplog.at_level(logging.WARNING):
        load_config(minimal(rollout={"sglang": sglang, "weight_reload": "sync", "padding": None}))
    assert len(caplog.records) == 1
    assert "rollout.sglang, rollout.weight_reload (SGLang only" in caplog.text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"critic": {"use_critic_model": True}}, "critic.use_critic_model=True: GRPO has no critic"),
        ({"reward": {"use_reward_model": True}}, "reward.use_reward_model=True: reward models are not supported"),
        ({"cluster": {"auto_scheduler": True}}, "cluster.auto_scheduler=True"),
        ({"actor": {"megatron": {"ckpt_format": "torch_dist"}}}, "actor.megatron.ckpt_format='torch_dist'"),
    ],
)
def test_switching_on_what_is_not_supported_is_an_error(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal(**sections))
    assert message in str(caught.value)


def test_a_yaml_written_for_another_megatron_grpo_runner_loads(caplog: pytest.LogCaptureFixture) -> None:
    register_resolvers()
    composed = OmegaConf.load(Path(__file__).with_name("foreign_grpo_megatron.yaml"))
    with caplog.at_level(logging.WARNING):
        config = load_config(composed)  # type: ignore[arg-type]
    assert len(caplog.records) == 1
    assert config.algorithm.sampling_params.max_new_tokens == 28672 - 1024
    assert config.rollout.return_logprobs is False and config.actor.megatron.mbridge is None
    assert config.actor.model.transformer_overrides()["recompute_num_layers"] == 20


@pytest.mark.parametrize(("said", "read"), [("auto", "auto"), (True, "on"), (False, "off"), ("on", "on")])
def test_packing_is_auto_or_a_switch(said: Any, read: str) -> None:
    assert load_config(minimal(runner={"packing": said})).runner.packing == read


@pytest.mark.parametrize("name", REFUSED_SWITCHES)
def test_switches_of_megatron_without_a_part_in_a_step_are_refused_and_may_be_off(name: str) -> None:
    load_config(minimal(actor={"model": {name: False}}))
    with pytest.raises(ConfigError, match=f"actor.model.{name}=True: {re.escape(REFUSED_SWITCHES[name])}; set it to False or remove it"):
        load_config(minimal(actor={"model": {name: True}}))


def test_no_key_is_both_read_and_inert() -> None:
    assert [name for name in dotted_keys(RunConfig) if find_inert(name) is not None] == []


def test_the_table_lists_every_key_once_and_the_dict_round_trips() -> None:
    names = [description.name for description in describe_config()]
    assert len(names) == len(set(names)) and "weight_sync.bucket_bytes" in names
    assert [description.name for description in describe_config() if not description.doc] == []
    assert "| `algorithm.group_size` | int, greater than 1 | `8` |" in config_table()
    config = shipped()
    assert load_config(config_as_dict(config)) == config
