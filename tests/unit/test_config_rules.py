"""Claims about rules between keys of a configuration, and between it and the model, its layout and its ranks."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from rlsync.errors import ConfigError
from rlsync.models.lora import LoraSpec
from tests.models import tiny_config
from tests.unit.test_config import minimal, shipped
from tests.unit.test_models_config import DEEPSEEK_V3, GLM4_MOE, MIXTRAL, QWEN2, QWEN2_5_VL, QWEN3_MOE, QWEN3_VL, QWEN3_VL_MOE
from tests.unit.test_sft_config import minimal as sft_minimal
from workers.config import RunConfig, SftConfig, load_config, read_config, register_resolvers, validate_model, validate_world
from workers.config.fields import dotted_keys
from workers.config.unread_keys import IN_EVERY_RUN, IN_GRPO, IN_SFT, ReadWhere


def test_adapters_have_the_meaning_and_forms_of_pefts_keys() -> None:
    assert shipped("arithmetic-grpo-megatron").actor.lora_spec is None
    lora = shipped("arithmetic-grpo-megatron", "actor.lora.r=4", "actor.lora.target_modules=[q_proj,v_proj]", "actor.lora.use_rslora=true")
    assert lora.actor.lora_spec == LoraSpec(4, 32.0, target_modules=("q_proj", "v_proj"), use_rslora=True)
    assert lora.actor.lora_spec.scaling == 16.0
    pattern = shipped("arithmetic-grpo-megatron", "actor.lora.r=4", "actor.lora.target_modules='.*_proj'")
    assert pattern.actor.lora_spec.target_modules == ".*_proj"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["actor.lora.alpha=8"], "actor.lora.alpha without actor.lora.r"),
        (["actor.lora.r=4", "actor.model.freeze_vision_model=True"], "freeze_vision_model beside actor.lora"),
        (["actor.lora.r=4", "actor.optim.vision_lr=1e-4"], "actor.optim.vision_lr beside actor.lora"),
        (["actor.lora.r=4", "actor.megatron.mbridge=False"], "actor.lora needs actor.megatron.mbridge"),
        (["actor.lora.r=4", "actor.model.moe_router_bias_update_rate=0.1"], "changes the base"),
        (
            ["actor.lora.r=4", "actor.lora.adapter_path=/x", "rollout.validate_weight=True"],
            "validate_weight compares engines with the base",
        ),
        (["actor.lora.r=4", "actor.lora.target_modules=3"], "actor.lora.target_modules: expected"),
        (["actor.lora.rank=4"], "unknown key actor.lora.rank"),
        (["actor.model.lora_rank=4"], "it is actor.lora.r here"),
        (["weight_sync.lora=adapter"], "weight_sync.lora=adapter without actor.lora.r"),
        (["actor.lora.r=513", "weight_sync.lora=adapter"], r"actor.lora.r \(513\) is beyond the adapters that vLLM holds \(rank 512\)"),
        (["actor.lora.r=4", "weight_sync.lora=adapter", "weight_sync.verify=off"], "verify is off: by checksums alone"),
    ],
)
def test_adapters_that_cannot_be_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shipped("arithmetic-grpo-megatron", *overrides)


def test_adapters_that_match_no_layer_of_the_model_are_refused() -> None:
    config = shipped("arithmetic-grpo-megatron", "actor.lora.r=4", "actor.lora.target_modules=[qkv]")
    with pytest.raises(ConfigError, match=r"actor\.lora: target_modules qkv match no linear layer of Qwen2ForCausalLM"):
        validate_model(config, QWEN2)
    left_out = shipped("arithmetic-grpo-megatron", "actor.lora.r=4", "actor.lora.exclude_modules=[k_porj]")
    with pytest.raises(ConfigError, match=r"actor\.lora: exclude_modules name k_porj, which no layer of Qwen2ForCausalLM is called"):
        validate_model(left_out, QWEN2)


def test_adapters_that_engines_do_not_hold_beside_their_base_are_refused() -> None:
    experts = {**tiny_config("qwen3_moe").to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}
    partial = ("actor.lora.r=4", "actor.lora.target_modules=[gate_proj]")
    validate_model(shipped("arithmetic-grpo-moe-megatron", *partial), experts)
    with pytest.raises(ConfigError, match=r"actor.lora: .*gate_proj has an adapter: .* add up_proj, down_proj, or set weight_sync"):
        validate_model(shipped("arithmetic-grpo-moe-megatron", *partial, "weight_sync.lora=adapter"), experts)


@pytest.mark.parametrize("mode", ["off", "R2", "R3"])
def test_router_replay_asks_the_engines_for_routes_where_it_needs_them(mode: str) -> None:
    config = shipped("arithmetic-grpo-moe-megatron", f"actor.megatron.router_replay={mode}")
    assert config.actor.megatron.router_replay == mode
    assert config.rollout.enable_return_routed_experts is (mode == "R3")


def test_router_replay_is_off_also_where_yaml_reads_a_bare_off_as_false() -> None:
    assert shipped("arithmetic-grpo-moe-megatron", "actor.megatron.router_replay=false").actor.megatron.router_replay == "off"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["actor.megatron.router_replay=R2", "algorithm.recompute_logprobs=False"], "R2 needs algorithm.recompute_logprobs=True"),
        (
            ["actor.megatron.router_replay=R3", "rollout.enable_return_routed_experts=False"],
            "R3 needs rollout.enable_return_routed_experts",
        ),
        (["actor.megatron.router_replay=R3", "rollout.vllm.enable_prefix_caching=False"], "needs rollout.vllm.enable_prefix_caching"),
        (["actor.megatron.router_replay=R4"], "one of off, R2, R3"),
    ],
)
def test_router_replay_that_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shipped("arithmetic-grpo-moe-megatron", *overrides)


def test_router_replay_of_a_model_without_experts_is_refused() -> None:
    config = shipped("arithmetic-grpo-megatron", "actor.megatron.router_replay=R2")
    with pytest.raises(ConfigError, match="router_replay=R2 is of models with experts"):
        validate_model(config, QWEN2)


HF_INIT_REFUSED = "model.megatron_checkpoint should be None if use_hf_ckpt is True"
CHECKPOINT_NEEDED = "model.megatron_checkpoint is required if use_hf_ckpt is False"


@pytest.mark.parametrize(
    ("use_hf_ckpt", "checkpoint", "resume_dir", "message"),
    [
        (True, None, None, None),
        (True, "/ckpt", None, HF_INIT_REFUSED),
        (True, "/ckpt", "auto", HF_INIT_REFUSED),
        (False, "/ckpt", None, None),
        (False, None, None, CHECKPOINT_NEEDED),
        (False, None, "/results/checkpoints/global_step_10", None),
        (False, None, "auto", None),
    ],
)
@pytest.mark.parametrize("mbridge", [True, False, None])
def test_where_initial_weights_may_come_from(
    use_hf_ckpt: bool, checkpoint: str | None, resume_dir: str | None, message: str | None, mbridge: bool | None
) -> None:
    values = minimal(
        actor={"model": {"megatron_checkpoint": checkpoint}, "megatron": {"use_hf_ckpt": use_hf_ckpt, "mbridge": mbridge}},
        runner={"resume_dir": resume_dir},
    )
    if message is None:
        load_config(values)
        return
    with pytest.raises(ConfigError) as caught:
        load_config(values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"runner": {"seq_length": 8}}, "runner.seq_length (8) must be greater than data.max_prompt_length (8)"),
        ({"runner": {"save_interval": 5, "val_check_interval": 2}}, "save_interval=5 must be divisible by val_check_interval=2"),
        ({"algorithm": {"group_size": 1}}, "algorithm.group_size (1) must be greater than 1"),
        (
            {"algorithm": {"recompute_logprobs": False}, "rollout": {"return_logprobs": False}},
            "algorithm.recompute_logprobs or rollout.return_logprobs must be True",
        ),
        ({"algorithm": {"n_minibatches": 3}}, "must be divisible by algorithm.n_minibatches (3)"),
        ({"actor": {"global_batch_size": 7}}, "actor.global_batch_size (7) must be"),
        ({"actor": {"lr_sched": {"lr_decay_style": "cosine"}}}, "lr_decay_style cosine needs start_weight_decay and end_weight_decay"),
        ({"actor": {"lr_sched": {"start_weight_decay": 0.1, "end_weight_decay": 0.1}}}, "must be left out when lr_decay_style is constant"),
        (
            {"actor": {"lr_sched": {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 5}}},
            "give lr_warmup_fraction or lr_warmup_iters, not both",
        ),
        ({"actor": {"optim": {"fp16": True}}}, "actor.optim.fp16=True contradicts actor.model.precision=bf16"),
        (
            {"actor": {"megatron": {"check_for_nan_in_loss_and_grad": True}, "model": {"precision": "fp16"}}},
            "check_for_nan_in_loss_and_grad=True ends a run at the first gradient that overflows, and the loss scaling of "
            "actor.model.precision=fp16",
        ),
        ({"actor": {"model": {"sequence_parallel": True}}}, "sequence_parallel=True needs"),
        ({"actor": {"model": {"expert_tensor_parallel_size": 2}}}, "must be less than or equal to tensor_model_parallel_size (1)"),
        ({"rollout": {"pipeline_parallel_size": 2}}, "rollout.pipeline_parallel_size (2) must be 1"),
        (
            {"rollout": {"max_running_requests": 32, "vllm": {"max_num_batched_tokens": 31}}},
            "rollout.vllm.max_num_batched_tokens (31) must be at least rollout.max_running_requests (32)",
        ),
        (
            {"rollout": {"max_running_requests": 4097}},
            "max_num_batched_tokens (4096, the least that null is to vLLM) must be at least rollout.max_running_requests (4097)",
        ),
        (
            {"rollout": {"max_running_requests": 8, "vllm": {"max_num_batched_tokens": 31, "enable_chunked_prefill": False}}},
            "rollout.vllm.max_num_batched_tokens (31) must be at least runner.seq_length (32) with",
        ),
        ({"runner": {"experiment_name": ""}}, "runner.experiment_name: expected a string that is not empty, got ''"),
        ({"runner": {"experiment_name": "."}}, "runner.experiment_name ('.') must be the name of a folder below runner.output_dir"),
        ({"runner": {"experiment_name": "../run"}}, "runner.experiment_name ('../run') must be the name of a folder"),
        ({"runner": {"experiment_name": "/run"}}, "runner.experiment_name ('/run') must be the name of a folder"),
        ({"rollout": {"group_name": "ActorGroup"}}, "actor.group_name and rollout.group_name are both 'ActorGroup'"),
        ({"data": {"train_data_paths": []}}, "data.train_data_paths names no file"),
        ({"pictures": {"path": "/p", "questions": []}}, "pictures.questions names nothing that pictures could be asked about"),
        (
            {"algorithm": {"importance_sampling_fix": True}, "rollout": {"return_logprobs": False}},
            "algorithm.importance_sampling_fix=True needs the engines' log-probabilities, and rollout.return_logprobs is False",
        ),
        (
            {"runner": {"async_steps": 1}, "rollout": {"return_logprobs": False}},
            "algorithm.importance_sampling_fix=True, which runner.async_steps (1) makes it, needs the engines' log-probabilities",
        ),
        ({"rollout": {"distributed_executor_backend": "ray"}}, "ray has Ray choose the GPUs of an engine's workers"),
        ({"algorithm": {"clip_ratio_c": 1.0}}, "algorithm.clip_ratio_c (1.0) must be greater than 1.0"),
        ({"runner": {"keep_last_n": 0}}, "runner.keep_last_n (0) must be at least 1"),
        ({"algorithm": {"logprob_forward_max_tokens": 8}}, "algorithm.logprob_forward_max_tokens (8) must be at least runner.seq_length"),
        (
            {"algorithm": {"sampling_params": {"max_new_tokens": 4, "min_new_tokens": 5}}},
            "algorithm.sampling_params.min_new_tokens (5) must not exceed max_new_tokens (4), which is runner.seq_length - ",
        ),
        # The longest response that is derived where none is set.
        ({"algorithm": {"sampling_params": {"min_new_tokens": 100000}}}, "min_new_tokens (100000) must not exceed max_new_tokens ("),
        ({"runner": {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": 8}}, "runner.max_tokens_per_mbs (8) must be at least"),
        (
            {
                "runner": {"packing": True},
                "actor": {"model": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}},
            },
            "runner.packing=True packs sequences into one",
        ),
        ({"weight_sync": {"num_slots": 0}}, "weight_sync.num_slots (0) must be at least 1"),
        ({"weight_sync": {"bind_host": "0.0.0.0"}}, "weight_sync.bind_host is '0.0.0.0', which is every address"),
        ({"actor": {"optim": {"min_lr": 1.0}}}, "min_lr (1.0) must not exceed max_lr (1e-06)"),
        ({"actor": {"lr_sched": {"lr_warmup_init": 1.0}}}, "lr_warmup_init (1.0) must not exceed max_lr (1e-06)"),
        (
            {"actor": {"lr_sched": {"lr_warmup_init": 1e-7}, "optim": {"vision_lr": 0.0}}},
            "lr_warmup_init (1e-07) must not exceed actor.optim.vision_lr (0.0)",
        ),
        (
            {"actor": {"lr_sched": {"lr_decay_style": "linear", "lr_warmup_iters": 10, "start_weight_decay": 0, "end_weight_decay": 0}}},
            "the warm-up (10 steps) leaves nothing of lr_decay_iters (10)",
        ),
        (
            {"actor": {"lr_sched": {"lr_decay_style": "linear", "lr_warmup_fraction": 1, "start_weight_decay": 0, "end_weight_decay": 0}}},
            "the warm-up (10 steps) leaves nothing of lr_decay_iters (10)",
        ),
        (
            {"actor": {"lr_sched": {"lr_decay_style": "WSD", "start_weight_decay": 0, "end_weight_decay": 0}}},
            "WSD needs lr_wsd_decay_iters (None) from 1 to lr_decay_iters (10)",
        ),
        (
            {"actor": {"lr_sched": {"lr_decay_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.1}}},
            "end_weight_decay (0.1) must not be less than start_weight_decay (0.2)",
        ),
        (
            {"actor": {"lr_sched": {"lr_decay_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1}}},
            "differ, but weight_decay_incr_style is constant",
        ),
        ({"actor": {"model": {"cp_comm_type": "a2a"}}}, "actor.model.cp_comm_type needs actor.model.context_parallel_size > 1"),
        (
            {"actor": {"model": {"context_parallel_size": 2, "cp_comm_type": "a2a"}}, "runner": {"packing": True}},
            "actor.model.cp_comm_type=a2a takes no packed sequences",
        ),
        ({"algorithm": {"sampling_params": {"max_new_tokens": 25}}}, "must not exceed runner.seq_length (32)"),
        ({"runner": {"val_before_train": True}}, "runner.val_before_train=True needs data.val_data_paths"),
        (
            {"algorithm": {"importance_sampling_fix": True, "recompute_logprobs": False}},
            "algorithm.importance_sampling_fix needs algorithm.recompute_logprobs=True",
        ),
        ({"arithmetic": {"path": "x", "hidden_size": 48}}, "arithmetic.hidden_size (48) must be a multiple of the head size 32"),
        (
            {"arithmetic": {"path": "x", "num_held_out": 25}},
            "arithmetic.num_held_out (25) must be less than the 25 problems that there are",
        ),
        ({"arithmetic": {"path": "x", "num_experts": 1}}, "arithmetic.num_experts (1) must be 0, for a dense model, or at least 2"),
        ({"pictures": {"path": "x", "hidden_size": 80}}, "pictures.hidden_size (80) must be a multiple of the head size 32"),
        ({"pictures": {"path": "x", "vision_hidden_size": 80}}, "pictures.vision_hidden_size (80) must be a multiple of the head size 32"),
        # Ratios begin at one: clamped on its wrong side, none has a gradient.
        ({"algorithm": {"clip_log_ratio_min": 0.5}}, "algorithm.clip_log_ratio_min (0.5) must be at most 0"),
        ({"algorithm": {"clip_log_ratio_max": -0.5}}, "algorithm.clip_log_ratio_max (-0.5) must be at least 0"),
        (
            {"algorithm": {"sampling_params": {"temperature": 0.0}}},
            "algorithm.sampling_params.temperature (0.0) must be greater than 0; do_sample=False decodes greedily",
        ),
        ({"reward": {"reward_min_val": 1.0}}, "reward.reward_min_val (1.0) must be less than reward.reward_max_val (1.0)"),
        ({"actor": {"micro_batch_size": 2}}, "actor.micro_batch_size (2) must equal algorithm.training_batch_size_per_gpu (1)"),
        ({"actor": {"model": {"virtual_pipeline_model_parallel_size": 2}}}, "needs actor.model.pipeline_model_parallel_size > 1"),
        ({"actor": {"model": {"recompute_granularity": "full"}}}, "full needs recompute_method and recompute_num_layers"),
        ({"actor": {"megatron": {"convert_from_hf": False}}}, "actor.megatron.convert_from_hf=False belongs to SFT"),
        ({"weight_sync": {"lora": "adapter", "sink": "loaders"}}, "weight_sync.lora is adapter and sink is loaders"),
        ({"weight_sync": {"lora": "adapter", "verify": "off"}}, "weight_sync.lora is adapter and verify is off"),
        ({"actor": {"model": {"precision": "${torch.dtype:int8}"}}}, "${torch.dtype:int8}: known names are float32"),
        ({"data": {"system_prompt": "Be brief."}}, "data.system_prompt ('Be brief.') needs data.apply_chat_template=True"),
        (
            {"actor": {"model": {"recompute_granularity": "selective", "recompute_num_layers": 2}}},
            "actor.model.recompute_num_layers (2) is for recompute_granularity full",
        ),
        (
            {"actor": {"model": {"moe_token_dispatcher_type": "allgather", "pipeline_model_parallel_size": 2}}},
            "pipeline_model_parallel_size 2 exchange theirs; set it to alltoall",
        ),
        (
            {"actor": {"model": {"moe_token_dispatcher_type": "allgather", "variable_seq_lengths": True}}},
            "the stages of variable_seq_lengths=True exchange theirs",
        ),
        (
            {"actor": {"model": {"moe_router_load_balancing_type": "sinkhorn"}}},
            "expected one of aux_loss, seq_aux_loss, global_aux_loss, none",
        ),
        ({"actor": {"optim": {"overlap_param_gather": True}}}, "needs use_distributed_optimizer and overlap_grad_reduce True"),
        (
            {"actor": {"optim": {"use_precision_aware_optimizer": True, "use_distributed_optimizer": False}}},
            "use_precision_aware_optimizer=True needs use_distributed_optimizer=True",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(sections: dict[str, Any], message: str) -> None:
    register_resolvers()
    with pytest.raises(ConfigError) as caught:
        load_config(minimal(**sections))
    assert message in str(caught.value)


EXPERTS = QWEN3_MOE | {"num_experts": 6}


def assert_refused(config: RunConfig, hf: dict[str, Any], message: str | None) -> None:
    """The model does not fit the configuration, in these words; None: it does."""
    if message is None:
        validate_model(config, hf)
        return
    with pytest.raises(ConfigError) as caught:
        validate_model(config, hf)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("hf", "actor", "message"),
    [
        (QWEN2 | {"num_attention_heads": 14, "hidden_size": 112}, {}, None),
        (QWEN2 | {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112}, {}, "7 attention heads cannot be divided by"),
        (QWEN2 | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}, {}, "3 key-value heads and a tensor axis of 2"),
        (QWEN2 | {"num_hidden_layers": 3}, {}, "3 layers"),
        (QWEN2, {"expert_model_parallel_size": 2}, "Qwen2ForCausalLM has no experts"),
        (EXPERTS, {"sequence_parallel": True, "expert_model_parallel_size": 2}, None),
        (EXPERTS, {"sequence_parallel": True, "expert_model_parallel_size": 4}, "num_experts 6 cannot be divided by ep_size 4"),
        (EXPERTS, {}, "actor.model.sequence_parallel must be True for a model with experts under tensor_model_parallel_size 2"),
        (EXPERTS, {"tensor_model_parallel_size": 1}, None),
    ],
)
def test_layouts_that_cannot_hold_the_model_are_refused(hf: dict[str, Any], actor: dict[str, Any], message: str | None) -> None:
    config = load_config(minimal(actor={"model": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, **actor}}))
    assert_refused(config, hf, message)


@pytest.mark.parametrize(
    ("hf", "size", "sections", "message"),
    [
        (EXPERTS, 2, {}, None),
        (QWEN2, 2, {}, "enable_expert_parallel=True is of models with experts"),
        (EXPERTS, 1, {}, "rollout.tensor_parallel_size (1) must be from 2 to num_experts (6)"),
        (
            EXPERTS | {"num_attention_heads": 8, "num_key_value_heads": 8},
            8,
            {},
            "tensor_parallel_size (8) must be from 2 to num_experts (6)",
        ),
        (EXPERTS, 2, {"weight_sync": {"lora": "adapter"}}, "weight_sync.lora=adapter was never tried on engines that share experts"),
        (EXPERTS, 2, {"returns_routes": True}, "rollout.enable_return_routed_experts, which actor.megatron.router_replay=R3 needs"),
    ],
)
def test_engines_share_experts_where_there_are_some_to_share(
    hf: dict[str, Any], size: int, sections: dict[str, Any], message: str | None
) -> None:
    """Negative control: without the key nothing of this is refused."""
    beside = {"actor": {"lora": {"r": 4}, "megatron": {"mbridge": True}}} if "weight_sync" in sections else {}
    for is_shared in (True, False):
        rollout = {"tensor_parallel_size": size, "vllm": {"enable_expert_parallel": is_shared}}
        rollout |= {"enable_return_routed_experts": True} if "returns_routes" in sections else {}
        more = {name: section for name, section in sections.items() if name != "returns_routes"}
        assert_refused(load_config(minimal(rollout=rollout, **beside, **more)), hf, message if is_shared else None)


def test_model_type_must_match_the_folder() -> None:
    validate_model(load_config(minimal(rollout={"model": {"model_path": "/m", "model_type": "qwen2.5"}})), QWEN2)
    with pytest.raises(ConfigError, match="model_type is qwen3"):
        validate_model(load_config(minimal(rollout={"model": {"model_path": "/m", "model_type": "qwen3"}})), QWEN2)


PARTS = ("freeze_language_model", "freeze_vision_model", "freeze_vision_projection")


@pytest.mark.parametrize(
    ("model", "optim", "hf", "message"),
    [
        ({"freeze_vision_model": True}, {}, QWEN2_5_VL, None),
        ({"freeze_language_model": True, "freeze_vision_model": True}, {"projection_lr": 1e-4}, QWEN2_5_VL, None),
        ({}, {"vision_lr": 0.0, "projection_lr": 1e-4}, QWEN3_VL, None),
        ({"apply_rope_fusion": True}, {}, QWEN2_5_VL, None),
        ({"apply_rope_fusion": True}, {}, QWEN2, None),
        ({"apply_rope_fusion": False}, {}, QWEN3_VL, None),
        ({"apply_rope_fusion": True}, {}, QWEN3_VL, "apply_rope_fusion must be False for Qwen3 VL SFT, the Mrope answer is Error"),
        ({"freeze_vision_model": True}, {}, QWEN2, "actor.model.freeze_vision_model: Qwen2ForCausalLM is a model of text"),
        ({}, {"vision_lr": 1e-6}, QWEN2, "actor.optim.vision_lr: Qwen2ForCausalLM is a model of text"),
        ({"moe_aux_loss_coeff": 0.01}, {}, QWEN3_MOE, None),
        ({"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "none"}, {}, QWEN3_MOE, "set that to aux_loss"),
        ({"moe_aux_loss_coeff": 0.01}, {}, QWEN2, "moe_aux_loss_coeff is 0.01, and Qwen2ForCausalLM has no experts"),
        ({"moe_router_bias_update_rate": 0.001}, {}, QWEN3_MOE, "the routers of Qwen3MoeForCausalLM have no bias"),
        ({"moe_router_bias_update_rate": 0.0}, {}, QWEN3_MOE, None),
        ({"moe_router_pre_softmax": False}, {}, QWEN3_MOE, "moe_router_pre_softmax=False contradicts True, which config.json of "),
        ({"moe_router_pre_softmax": True}, {}, QWEN3_MOE, None),
        ({"moe_router_pre_softmax": True}, {}, MIXTRAL, "moe_router_pre_softmax=True contradicts False, which config.json of "),
        ({"moe_router_pre_softmax": True}, {}, DEEPSEEK_V3, "moe_router_pre_softmax=True contradicts False, which config.json of "),
        ({"moe_router_pre_softmax": True}, {}, GLM4_MOE, "moe_router_pre_softmax=True contradicts False, which config.json of "),
        ({"moe_router_pre_softmax": False}, {}, MIXTRAL, None),
        (dict.fromkeys(PARTS, True), {}, QWEN3_VL, "freeze all of Qwen3VLForConditionalGeneration"),
        ({"freeze_vision_model": True}, {"vision_lr": 1e-6}, QWEN3_VL, "actor.optim.vision_lr is a learning rate of what actor"),
    ],
)  # fmt: skip
def test_what_a_model_does_not_take_is_refused_by_its_key(
    model: dict[str, Any], optim: dict[str, Any], hf: dict[str, Any], message: str | None
) -> None:
    config = load_config(minimal(actor={"model": model, "optim": optim}))
    assert_refused(config, hf, message)


def test_heads_that_the_engines_cannot_divide_are_refused() -> None:
    config = load_config(minimal(rollout={"model": {"model_path": "/m"}, "tensor_parallel_size": 8}))
    with pytest.raises(ConfigError, match=r"num_attention_heads \(4\) must be divisible by rollout.tensor_parallel_size \(8\)"):
        validate_model(config, QWEN2)


def test_a_key_that_engines_read_without_a_default_is_asked_for_where_there_are_engines() -> None:
    """transformers leaves it out when it saves. Negative controls: the key, and a run without engines."""
    config, sft = load_config(minimal()), load_config(sft_minimal(), "sft")
    assert config.has_engines and not sft.has_engines
    validate_model(sft, QWEN3_VL_MOE)
    with pytest.raises(ConfigError, match=r"/model/config.json: text_config.norm_topk_prob is missing: transformers takes it for true"):
        validate_model(config, QWEN3_VL_MOE)
    validate_model(config, {**QWEN3_VL_MOE, "text_config": {**QWEN3_VL_MOE["text_config"], "norm_topk_prob": True}})


def test_world_size_and_batches_must_divide() -> None:
    config = load_config(minimal(actor={"model": {"tensor_model_parallel_size": 2}}, algorithm={"training_batch_size_per_gpu": 4}))
    assert validate_world(config, 4) == 2
    with pytest.raises(ConfigError, match="TP x PP x CP = 2 must divide"):
        validate_world(config, 3)
    with pytest.raises(ConfigError, match=r"must be divisible by the data-parallel size \(3\)"):
        validate_world(config, 6)
    with pytest.raises(
        ConfigError,
        match=r"algorithm.n_minibatches \(32\) must be divisible by algorithm.training_batch_size_per_gpu x data-parallel size \(4 x 16\)",
    ):
        validate_world(config, 32)
    warm = load_config(minimal(warm_start={"data_paths": ["a"], "num_steps": 1, "batch_size": 1}))
    with pytest.raises(ConfigError, match=r"warm_start.batch_size \(1\) must be at least the data-parallel size \(2\)"):
        validate_world(warm, 2)


def unread(*, sft: bool = False, **sections: Any) -> dict[str, str]:
    reading = read_config(sft_minimal(**sections), "sft") if sft else read_config(minimal(**sections))
    assert reading.findings == ()
    return dict(reading.inert)


def test_a_key_that_another_key_switches_off_is_told_with_that_key() -> None:
    given = {
        "actor": {"optim": {"optimizer_offload_fraction": 0.5, "loss_scale": 8.0}, "lr_sched": {"lr_wsd_decay_iters": 4}},
        "algorithm": {"kl_penalty_type": "k1", "sampling_params": {"do_sample": False, "temperature": 0.5}},
        "runner": {"max_tokens_per_mbs": 64, "keep_last_n": 2},
    }
    assert unread(**given) == {
        "actor.optim.optimizer_offload_fraction": "actor.optim.optimizer_cpu_offload is False",
        "actor.optim.loss_scale": "actor.model.precision is bf16",
        "actor.lr_sched.lr_wsd_decay_iters": "actor.lr_sched.lr_decay_style is constant",
        "algorithm.kl_penalty_type": "algorithm.kl_beta is 0.0",
        "algorithm.sampling_params.temperature": "algorithm.sampling_params.do_sample is False",
        "runner.max_tokens_per_mbs": "runner.enable_dynamic_batch_size is False",
        "runner.keep_last_n": "runner.save_interval is -1",
    }
    switched_on = {
        "actor": {"optim": {"optimizer_cpu_offload": True}, "model": {"precision": "fp16"}},
        "algorithm": {"kl_beta": 0.1, "sampling_params": {"do_sample": True}},
        "runner": {"enable_dynamic_batch_size": True, "save_interval": 1},
    }
    selective = {"actor": {"model": {"recompute_granularity": "selective", "recompute_method": "block"}}}
    assert unread(**selective) == {"actor.model.recompute_method": "actor.model.recompute_granularity is selective"}
    many = {"logprob_forward_max_tokens": 64}
    why = "algorithm.logprob_forward_max_tokens is 64"
    assert unread(algorithm={**many, "logprob_forward_micro_batch_size": 2}) == {"algorithm.logprob_forward_micro_batch_size": why}
    why = "algorithm.recompute_logprobs is False"
    engines = {"recompute_logprobs": False}
    assert unread(algorithm={**many, **engines}, rollout={"return_logprobs": True}) == {"algorithm.logprob_forward_max_tokens": why}
    given["actor"].pop("lr_sched")
    assert unread(**OmegaConf.to_container(OmegaConf.merge(given, switched_on))) == {}  # type: ignore[arg-type]


DECAYED = {"lr_decay_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.2}
STAGES = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**STAGES, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("sections", "key", "why"),
    [
        ({"actor": {"optim": {"weight_decay": 0.1}, "lr_sched": DECAYED}}, "actor.optim.weight_decay", "start_weight_decay is 0.2"),
        ({"actor": {"optim": {"weight_decay": 0.2}, "lr_sched": DECAYED}}, "actor.optim.weight_decay", None),
        ({"actor": {"optim": {"lr": 1e-3}, "lr_sched": {"max_lr": 2e-3}}}, "actor.optim.lr", "lr_sched.max_lr is 0.002"),
        ({"actor": {"optim": {"min_lr": 1e-8}, "lr_sched": {"min_lr": 1e-9}}}, "actor.optim.min_lr", "lr_sched.min_lr is 1e-09"),
        (
            {"actor": {"model": {"moe_router_load_balancing_type": "seq_aux_loss"}}},
            "actor.model.moe_router_load_balancing_type",
            "moe_aux_loss_coeff is null",
        ),
        (
            {"actor": {"model": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}}},
            "actor.model.moe_router_load_balancing_type",
            None,
        ),
        ({"actor": {"model": {"batch_p2p_comm": True}}}, "actor.model.batch_p2p_comm", "pipeline_model_parallel_size is 1"),
        ({"actor": {"model": {"batch_p2p_comm": True, **STAGES}}}, "actor.model.batch_p2p_comm", None),
        (
            {"actor": {"model": {"batch_p2p_comm": True, **VIRTUAL}}},
            "actor.model.batch_p2p_comm",
            "virtual_pipeline_model_parallel_size is 2",
        ),
        (
            {"actor": {"model": {"variable_seq_lengths": True, **VIRTUAL}}},
            "actor.model.variable_seq_lengths",
            "virtual_pipeline_model_parallel_size is 2",
        ),
        ({"actor": {"model": {"variable_seq_lengths": False, **VIRTUAL}}}, "actor.model.variable_seq_lengths", None),
        (
            {"actor": {"lora": {"r": 4, "init": "gaussian", "adapter_path": "/x"}, "megatron": {"mbridge": True}}},
            "actor.lora.init",
            "adapter_path is /x",
        ),
        (
            {"actor": {"megatron": {"mbridge": True, "ckpt_convertor": {"save_path": "/x"}}}},
            "actor.megatron.ckpt_convertor.save_path",
            "mbridge is True",
        ),
        ({"weight_sync": {"staging": "always", "transport": "gloo"}}, "weight_sync.staging", "weight_sync.transport is gloo"),
        ({"weight_sync": {"staging": "always"}}, "weight_sync.staging", None),
        ({"data": {"shuffle": False, "seed": 1}}, "data.seed", "data.shuffle is False"),
        (
            {"algorithm": {"ratio_clip_eps": 0.1, "clip_ratio_low": 0.2, "clip_ratio_high": 0.3}},
            "algorithm.ratio_clip_eps",
            "clip_ratio_high is 0.3",
        ),
        ({"algorithm": {"ratio_clip_eps": 0.1, "clip_ratio_high": 0.3}}, "algorithm.ratio_clip_eps", None),
    ],
)
def test_a_key_whose_part_another_one_takes_is_told(sections: dict[str, Any], key: str, why: str | None) -> None:
    told = unread(**sections).get(key)
    assert told is None if why is None else told is not None and told.endswith(why), told


def test_keys_of_engines_in_a_run_without_any_are_told() -> None:
    sections = {"rollout": {"model": {"precision": "fp16"}, "vllm": {"enable_prefix_caching": True}}, "weight_sync": {"num_slots": 3}}
    why = "validation.generate is False"
    assert unread(sft=True, **sections) == {"rollout.vllm": why, "rollout.model.precision": why, "weight_sync.num_slots": why}
    validated = {
        "validation": {"generate": True, "max_new_tokens": 8},
        "data": {"val_data_paths": ["b"]},
        "runner": {"val_check_interval": 1},
    }
    assert unread(sft=True, **sections, **validated) == {}


@pytest.mark.parametrize("row", [*IN_EVERY_RUN, *IN_GRPO, *IN_SFT], ids=lambda row: row.keys[0])
def test_every_row_of_unread_keys_names_keys_that_exist(row: ReadWhere) -> None:
    known = {*dotted_keys(RunConfig), *dotted_keys(SftConfig)}
    assert {*row.keys, row.switch} <= known
