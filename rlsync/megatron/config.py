"""Hugging Face model config -> Megatron-Core's TransformerConfig and the arguments of GPTModel.

Owns the table of architectures. Must not know parameters, files or process groups
beyond the Topology. A new dense family is a row of ``_ARCHITECTURES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.overrides import checked_overrides
from rlsync.megatron.rope import Rope, read_rope

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What one Hugging Face architecture adds to the common decoder.

    Attributes:
        qkv_bias: q, k and v projections carry biases whatever the config says.
        qk_layernorm: queries and keys are normalised per head.
        head_dim: of the class where config.json names none; None means hidden_size / num_attention_heads.
        must_be_false: keys of config.json that ask for weights Megatron's layer does not have.
    """

    qkv_bias: bool = False
    qk_layernorm: bool = False
    head_dim: int | None = None
    must_be_false: tuple[str, ...] = ()


_ARCHITECTURES: Mapping[str, Architecture] = {
    # attention_bias would put a bias on o_proj too, which Megatron couples to biases in the MLP.
    "LlamaForCausalLM": Architecture(must_be_false=("attention_bias", "mlp_bias")),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, must_be_false=("use_sliding_window",)),
    "Qwen3ForCausalLM": Architecture(qk_layernorm=True, head_dim=128, must_be_false=("attention_bias", "use_sliding_window")),
}

# TransformerConfig field -> key of config.json, for every architecture.
_COMMON = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that ``GPTModel`` needs, apart from its pipeline stage.

    Attributes:
        transformer: Megatron's config object; shared by all chunks of a rank.
        vocab_size: rows of the embedding in the checkpoint.
        padded_vocab_size: rows of the embedding over all tp_ranks in Megatron.
        max_sequence_length: in tokens.
        tied_embeddings: input embedding and output layer are one weight.
        rope: rotary embedding.
    """

    transformer: TransformerConfig
    vocab_size: int
    padded_vocab_size: int
    max_sequence_length: int
    tied_embeddings: bool
    rope: Rope


def supported_architectures() -> tuple[str, ...]:
    """Names, as in the ``architectures`` key of config.json, that ``model_config`` accepts."""
    return tuple(sorted(_ARCHITECTURES))


def model_config(
    hf_config: Mapping[str, Any],
    *,
    topology: Topology,
    dtype: torch.dtype,
    make_vocab_size_divisible_by: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Translate the content of a config.json.

    Args:
        hf_config: content of config.json, of transformers 4 or 5.
        topology: parallel layout the model is built for.
        dtype: of the parameters: float32, bfloat16 or float16.
        make_vocab_size_divisible_by: the padded vocabulary is a multiple of this times tp_size.
        overrides: further TransformerConfig fields by name (recomputation, fusions, sequence_parallel, ...). A fusion
            whose library is missing is dropped with a warning: it changes speed, not results.

    Raises:
        ConfigError: architecture, rope type or key that is not supported; heads, layers or vocabulary that the
            topology cannot divide; unknown overrides, or overrides of what config.json, topology or dtype decide.
    """
    name, architecture = _architecture(hf_config)
    _check_flags(name, architecture, hf_config)
    structure = _structure(name, architecture, hf_config)
    _check_division(structure, topology)
    settings = {**_defaults(topology), **structure, **_parallel(topology), **_precision(dtype)}
    settings |= checked_overrides(overrides or {}, decided=settings, structure=structure, topology=topology)
    vocab_size, multiple = int(_required(hf_config, "vocab_size", name)), make_vocab_size_divisible_by * topology.tp_size
    return ModelConfig(
        transformer=_build(settings),
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // multiple) * multiple,
        max_sequence_length=int(hf_config.get("max_position_embeddings", 2048)),
        tied_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        rope=read_rope(hf_config),
    )


def _architecture(hf_config: Mapping[str, Any]) -> tuple[str, Architecture]:
    names = hf_config.get("architectures") or ()
    for name in names:
        if name in _ARCHITECTURES:
            return name, _ARCHITECTURES[name]
    raise ConfigError(
        f"config.json names architectures {list(names)} (model_type {hf_config.get('model_type')!r}); "
        f"supported are {', '.join(supported_architectures())}"
    )


def _check_flags(name: str, architecture: Architecture, hf_config: Mapping[str, Any]) -> None:
    found = [key for key in architecture.must_be_false if hf_config.get(key)]
    if found:
        raise ConfigError(f"{name} with {', '.join(f'{key}={hf_config[key]}' for key in found)} is not supported; these must be false")
    if hf_config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{name} with hidden_act={hf_config['hidden_act']!r} is not supported; only 'silu' is")
    unlike = sorted({kind for kind in hf_config.get("layer_types") or () if kind != "full_attention"})
    if unlike:
        raise ConfigError(f"{name} with layers of type {', '.join(unlike)} is not supported; only full_attention is")


def _structure(name: str, architecture: Architecture, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that follow from config.json alone."""
    structure: dict[str, Any] = {field_: _required(hf_config, key, name) for field_, key in _COMMON.items()}
    heads, groups = structure["num_attention_heads"], hf_config.get("num_key_value_heads")
    head_dim = hf_config.get("head_dim")
    if head_dim is None:
        head_dim = architecture.head_dim if architecture.head_dim is not None else structure["hidden_size"] // heads
    structure |= {
        "num_query_groups": heads if groups is None else groups,
        "kv_channels": head_dim,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_layernorm,
        "normalization": "RMSNorm",
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
    }
    return structure


def _defaults(topology: Topology) -> dict[str, Any]:
    """Fields a user may override."""
    on_cpu = not torch.cuda.is_available()
    return {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        # On the CPU weights are drawn whole and then cut, so that the same seed gives the same model under any tp_size.
        "use_cpu_initialization": on_cpu,
        # Microbatches of one step may differ in shape.
        "variable_seq_lengths": topology.pp_size > 1 and topology.vpp_size == 1,
        "moe_token_dispatcher_type": "alltoall",  # the one that variable_seq_lengths allows; checked for dense models too
        "batch_p2p_comm": not on_cpu and topology.vpp_size == 1,
    }


def _parallel(topology: Topology) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": topology.tp_size,
        "pipeline_model_parallel_size": topology.pp_size,
        "virtual_pipeline_model_parallel_size": topology.vpp_size if topology.vpp_size > 1 else None,
        "context_parallel_size": topology.cp_size,
        "expert_model_parallel_size": topology.ep_size,
        "expert_tensor_parallel_size": topology.etp_size,
        "num_layers_in_first_pipeline_stage": topology.first_stage_layers,
        "num_layers_in_last_pipeline_stage": topology.last_stage_layers,
    }


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype {dtype} is not supported; use one of {', '.join(str(known) for known in DTYPES.values())}")
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }


def _check_division(structure: Mapping[str, Any], topology: Topology) -> None:
    """Refuse what Megatron would refuse by an assertion, or build wrongly."""
    tp, findings = topology.tp_size, []
    heads, groups = structure["num_attention_heads"], structure["num_query_groups"]
    if heads % groups:
        findings.append(f"{heads} attention heads are not a multiple of {groups} key-value heads")
    if heads % tp:
        findings.append(f"{heads} attention heads cannot be divided by tp_size {tp}")
    if groups % tp and tp % groups:
        findings.append(f"{groups} key-value heads and tp_size {tp} do not divide each other")
    if structure["ffn_hidden_size"] % tp:
        findings.append(f"intermediate_size {structure['ffn_hidden_size']} cannot be divided by tp_size {tp}")
    if findings:
        raise ConfigError(f"the model does not fit the topology: {'; '.join(findings)}")
    topology.layers_of(structure["num_layers"], 0)


def _build(settings: Mapping[str, Any]) -> TransformerConfig:
    try:
        return TransformerConfig(**settings)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"Megatron-Core refuses this combination of settings: {error}") from error


def _required(hf_config: Mapping[str, Any], key: str, name: str) -> Any:
    if hf_config.get(key) is None:
        raise ConfigError(f"config.json of {name} lacks {key}")
    return hf_config[key]
