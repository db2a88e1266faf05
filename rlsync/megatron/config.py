"""A model of ``rlsync.models`` -> Megatron-Core's TransformerConfig and the arguments of GPTModel.

Owns what the topology, the dtype and this machine decide. Knows no family: what differs between them is in ``Model``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.overrides import checked_overrides
from rlsync.megatron.pictures import axes_of_frequencies
from rlsync.models import Part, check_overrides, model_of
from rlsync.models.rope import Rope
from rlsync.models.stacks import Vision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ACTIVATIONS: Mapping[str, Callable[..., torch.Tensor]] = {"silu": F.silu}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """All that a chunk needs to take pictures.

    Attributes:
        tower: transformers' config of the vision tower.
        model: what ``rlsync.models`` says of the tower and of picture tokens.
        mrope_axes: which of three positions turns each frequency, from ``axes_of_frequencies``.
    """

    tower: Any
    model: Vision
    mrope_axes: tuple[int, ...]


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
        vision: of a model that takes pictures, None for one of text.
        tower_parts: see ``Model.tower_parts``.
        normed_outputs: attention and MLP of a layer have a norm after them too.
    """

    transformer: TransformerConfig
    vocab_size: int
    padded_vocab_size: int
    max_sequence_length: int
    tied_embeddings: bool
    rope: Rope
    vision: VisionConfig | None
    tower_parts: Mapping[str, Part]
    normed_outputs: bool = False


def model_config(
    hf_config: Mapping[str, Any],
    *,
    topology: Topology,
    dtype: torch.dtype,
    make_vocab_size_divisible_by: int = 1,
    overrides: Mapping[str, Any] | None = None,
    is_transformer_engine: bool = False,
) -> ModelConfig:
    """Translate the content of a config.json.

    Args:
        hf_config: content of config.json, of transformers 4 or 5.
        topology: parallel layout the model is built for.
        dtype: of the parameters: float32, bfloat16 or float16.
        make_vocab_size_divisible_by: the padded vocabulary is a multiple of this times tp_size.
        overrides: further TransformerConfig fields by name (recomputation, fusions, sequence_parallel, ...). A fusion
            whose library is missing is dropped with a warning: it changes speed, not results.
        is_transformer_engine: layers will be TransformerEngine's.

    Raises:
        ConfigError: all that ``rlsync.models.check_config`` finds; unknown overrides, or overrides of what config.json, topology or
            dtype decide.
    """
    model = model_of(hf_config, topology)
    structure = {**model.transformer, "activation_func": _ACTIVATIONS[model.transformer["activation_func"]]}
    if model.rope.mrope_section is not None:
        structure["mrope_section"] = list(model.rope.mrope_section)
    is_latent = "multi_latent_attention" in structure
    if is_latent:
        structure |= _latent_rotations(model.rope)
    settings = {**_defaults(topology), **structure, **_parallel(topology), **_precision(dtype)}
    findings = check_overrides(model, overrides or {}, topology)
    if findings:
        raise ConfigError("; ".join(findings))
    settings |= checked_overrides(
        overrides or {},
        decided=settings,
        structure=structure,
        topology=topology,
        unfused_rope=_unfused_rope(model.rope, structure),
        is_transformer_engine=is_transformer_engine,
    )
    if is_transformer_engine and _has_plain_swiglu(settings):
        settings |= {"bias_activation_fusion": False, "use_te_activation_func": True}
    transformer = _build(settings)
    _check_context(transformer, is_transformer_engine=is_transformer_engine)
    if model.rope.yarn is not None and not is_latent:
        _multiply_rotations(transformer, model.rope.yarn.attention_factor)
    return ModelConfig(
        transformer=transformer,
        vocab_size=model.dims["vocab"],
        padded_vocab_size=model.padded_vocab(topology.tp_size, make_vocab_size_divisible_by),
        max_sequence_length=model.max_positions,
        tied_embeddings=model.tied,
        rope=model.rope,
        vision=None if model.vision is None else _vision(hf_config, model.vision, model.rope),
        tower_parts=model.tower_parts(),
        normed_outputs="normed_outputs" in model.features,
    )


def _vision(hf_config: Mapping[str, Any], vision: Vision, rope: Rope) -> VisionConfig:
    from transformers import AutoConfig

    assert rope.mrope_section is not None, "models that take pictures have positions in three dimensions"
    # transformers' own reading, with its defaults: the tower is its class.
    return VisionConfig(
        tower=AutoConfig.for_model(**hf_config).vision_config,
        model=vision,
        mrope_axes=axes_of_frequencies(rope.mrope_section, interleaved=rope.mrope_interleaved),
    )


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
        # Megatron's own moves a router's bias in every step, which balances experts and changes what a model computes.
        "moe_router_bias_update_rate": 0.0,
        "use_te_activation_func": False,
    }


def _has_plain_swiglu(settings: Mapping[str, Any]) -> bool:
    """Whether a fused activation is SwiGLU alone in every layer, which ``SwiGLU`` computes for less of the host's time than Megatron."""
    return (
        bool(settings.get("bias_activation_fusion"))
        and settings["activation_func"] is F.silu
        and bool(settings.get("gated_linear_unit"))
        and not settings.get("add_bias_linear")
        and settings.get("num_moe_experts") is None
        and not settings.get("activation_func_fp8_input_store")
        and not settings.get("cpu_offloading")
    )


def _parallel(topology: Topology) -> dict[str, Any]:
    # Megatron divides by the number of stages between the first and the last. Without any the first one's layers say it all.
    is_said = topology.pp_size == 2 and topology.first_stage_layers is not None
    return {
        "tensor_model_parallel_size": topology.tp_size,
        "pipeline_model_parallel_size": topology.pp_size,
        "virtual_pipeline_model_parallel_size": topology.vpp_size if topology.vpp_size > 1 else None,
        "context_parallel_size": topology.cp_size,
        "expert_model_parallel_size": topology.ep_size,
        "expert_tensor_parallel_size": topology.etp_size,
        "num_layers_in_first_pipeline_stage": topology.first_stage_layers,
        "num_layers_in_last_pipeline_stage": None if is_said else topology.last_stage_layers,
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


def _unfused_rope(rope: Rope, structure: Mapping[str, Any]) -> str:
    """What TransformerEngine's fused rotary kernels get wrong of this embedding as Megatron 0.16 calls them, or ""."""
    if rope.mrope_section is not None:
        return "positions of three dimensions"
    if structure.get("rotary_interleaved"):
        return "pairs of neighbours in packed sequences"
    if rope.yarn is not None and rope.yarn.attention_factor != 1.0:
        return "the attention factor of yarn"
    return ""


def _latent_rotations(rope: Rope) -> dict[str, Any]:
    """Fields of MLATransformerConfig for a rotary embedding, which each of its layers has for itself.

    Megatron multiplies scores by ``(0.1 mscale_all_dim log factor + 1) ** 2``, and cosines and sines by the quotient of that with mscale
    and with mscale_all_dim (``multi_latent_attention.py`` of 0.16); its defaults are those of one model.
    """
    plain = {"rope_type": "rope", "rotary_base": rope.theta, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    if rope.yarn is None:
        return plain
    root, stretch = math.sqrt(rope.yarn.score_factor), 0.1 * math.log(rope.yarn.factor)
    return plain | {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope.yarn.factor,
        "original_max_position_embeddings": rope.yarn.original_max_position_embeddings,
        "beta_fast": rope.yarn.beta_fast,
        "beta_slow": rope.yarn.beta_slow,
        "mscale": (rope.yarn.attention_factor * root - 1) / stretch,
        "mscale_all_dim": (root - 1) / stretch,
    }


def _multiply_rotations(transformer: TransformerConfig, factor: float) -> None:
    """Have Megatron's attention multiply cosines and sines by ``factor``.

    It computes the factor as ``(0.1 mscale log scaling + 1) / (0.1 mscale_all_dim log scaling + 1)`` from three attributes that are no
    fields of TransformerConfig (``yarn_rotary_pos_embedding.py`` of 0.16): with a scaling of e and no second term mscale gives any factor.
    """
    attributes: Any = transformer
    attributes.yarn_rotary_scaling_factor, attributes.yarn_mscale, attributes.yarn_mscale_all_dim = math.e, 10 * (factor - 1), 0.0


def _check_context(transformer: TransformerConfig, *, is_transformer_engine: bool) -> None:
    """Raise ConfigError where attention under context parallelism would fail in the first pass."""
    size = transformer.context_parallel_size
    if size > 1 and is_transformer_engine and transformer.params_dtype is torch.float32:
        raise ConfigError(
            f"TransformerEngine's attention does not compute fp32 under context_parallel_size {size}; use bf16, or the local spec"
        )


def _build(settings: Mapping[str, Any]) -> TransformerConfig:
    try:
        return (MLATransformerConfig if "multi_latent_attention" in settings else TransformerConfig)(**settings)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"Megatron-Core refuses this combination of settings: {error}") from error
