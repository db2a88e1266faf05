"""Tiny random Hugging Face models, one recipe per family; deterministic in their seed.

head_dim is 32 because vLLM's CPU attention takes no less that is this small, and differs from hidden_size / heads. The
vocabulary of 131 has no divisor, so every tp_size above 1 pads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

VOCAB_SIZE = 131

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # logits of a few units, so that differences show
}

# Constants unlike those of Llama 3.1, with wavelengths in all three regions for a head_dim of 32.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 256,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Those of most tests, and all that are dense.
FAMILIES = ("llama", "qwen2", "qwen3")
DENSE_FAMILIES = (*FAMILIES, "mistral", "seed_oss", "smollm3", "glm4")
# Eight experts, of which a token takes three: neither divides the other. The second of Qwen's layers is dense.
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 3, "moe_intermediate_size": 48, "num_experts": 8, "mlp_only_layers": [1]}
# Routers of the kind of DeepSeek-V3: two of four groups of experts, and four experts in those. The first layer is dense.
_SIGMOID: dict[str, Any] = {
    "num_experts_per_tok": 4, "moe_intermediate_size": 48, "n_routed_experts": 16, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 1.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
}  # fmt: skip
# Heads of queries, values and hidden / heads all differ. Both halves of the rotated part turn at blended frequencies.
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 64, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_mtp_layers": 0,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
LATENT_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 1.0,
    "mscale": 0.7, "mscale_all_dim": 1.0,
}  # fmt: skip
# Kernels of vLLM's latent attention are made for these.
LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
# Those whose modules hold the experts of a layer in two tensors, as all of transformers 5 do, and all that have experts.
STACKED_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3", "moonlight")
MOE_FAMILIES = STACKED_FAMILIES


def tiny_config(family: str, *, tied: bool = False, **changes: Any) -> PretrainedConfig:
    """Config of a tiny model of ``family`` (one of DENSE_FAMILIES or MOE_FAMILIES); ``changes`` replace fields."""
    fields = {**SHARED, "tie_word_embeddings": tied, "rope_parameters": dict(_PLAIN_ROPE), **changes}
    if family == "llama":
        return LlamaConfig(**{"head_dim": 32, "rope_parameters": dict(LLAMA3_ROPE), **_without_rope(fields, changes)})
    if family == "qwen2":
        # Qwen2's class knows no head_dim; 4 heads of 32 make the hidden size.
        return Qwen2Config(**{**fields, "hidden_size": 32 * fields["num_attention_heads"]})
    if family == "qwen3":
        return Qwen3Config(**{"head_dim": 32, **fields})
    if family == "glm4":
        return Glm4Config(**{"head_dim": 32, **fields, "rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 0.5}})
    if family == "seed_oss":
        return SeedOssConfig(**{"head_dim": 32, "attention_dropout": 0.0, "residual_dropout": 0.0, **fields})
    if family == "smollm3":
        # SmolLM3's class knows no head_dim. Every other layer has no positions.
        return SmolLM3Config(**{"no_rope_layer_interval": 2, **fields, "hidden_size": 32 * fields["num_attention_heads"]})
    if family == "mistral":
        return MistralConfig(**{"head_dim": 32, "sliding_window": None, **fields})
    if family == "mixtral":
        return MixtralConfig(**{"head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 3, **fields})
    if family == "qwen2_moe":
        return Qwen2MoeConfig(
            **{**_EXPERTS, "shared_expert_intermediate_size": 80, **fields, "hidden_size": 32 * fields["num_attention_heads"]}
        )
    if family == "qwen3_moe":
        return Qwen3MoeConfig(**{"head_dim": 32, "norm_topk_prob": True, **_EXPERTS, **fields})
    if family == "glm4_moe":
        rope = {**_PLAIN_ROPE, "partial_rotary_factor": 0.5}
        switches = {"attention_bias": True, "use_qk_norm": True, "num_mtp_layers": 0}
        return Glm4MoeConfig(**{"head_dim": 32, **switches, **_SIGMOID, **fields, "rope_parameters": changes.get("rope_parameters", rope)})
    if family == "deepseek_v3":
        rope = changes.get("rope_parameters", LATENT_YARN)
        return DeepseekV3Config(**{**_LATENT, **_SIGMOID, **fields, "num_key_value_heads": 4, "rope_parameters": dict(rope)})
    if family == "moonlight":
        # Moonlight is DeepSeek-V3 without compressed queries and groups, and has another epsilon.
        whole = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5}
        return DeepseekV3Config(**{**_LATENT, **_SIGMOID, **fields, "num_key_value_heads": 4, **whole, **changes})
    raise ValueError(f"unknown family {family!r}; one of {DENSE_FAMILIES + MOE_FAMILIES}")


def tiny_model(family: str, *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model in which no parameter or saved buffer is trivial: norms and biases are random too."""
    config = tiny_config(family, tied=tied, **changes)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what no initialisation of the classes fills is NaN then
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    torch.use_deterministic_algorithms(was_deterministic)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.1)  # transformers leaves some routers at zero
            elif name.endswith(".bias"):
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
        # A wrong name or place of one whose elements are all the same would go unnoticed.
        for tensor in model.state_dict().values():
            if tensor.isnan().any() or not tensor.any():
                tensor.normal_(std=0.1)
            elif tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
                tensor.add_(torch.empty_like(tensor).uniform_(-0.5, 0.5))
    torch.random.set_rng_state(state)
    return model.to(dtype).eval()


def save_tiny_model(folder: str | Path, family: str, **options: Any) -> Path:
    """Save ``tiny_model(family, **options)`` as a checkpoint folder: config.json, generation config, safetensors."""
    folder = Path(folder)
    tiny_model(family, **options).save_pretrained(folder)
    return folder


def add_further_layer(folder: Path) -> Path:
    """Give a saved model a layer that predicts further tokens: a few of the tensors that one has, of several dtypes."""
    path, file = folder / "config.json", folder / "model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(file)
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(9)
    shapes = {"eh_proj.weight": (hidden, 2 * hidden), "enorm.weight": (hidden,), "mlp.experts.7.up_proj.weight": (48, hidden)}
    further = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    further["mlp.gate.e_score_correction_bias"] = torch.randn(16, generator=generator)
    layer = config["num_hidden_layers"]
    save_file(tensors | {f"model.layers.{layer}.{name}": t for name, t in further.items()}, file, metadata={"format": "pt"})
    path.write_text(json.dumps({**config, "num_nextn_predict_layers": 1} | ({"num_mtp_layers": 1} if "num_mtp_layers" in config else {})))
    return folder


def _without_rope(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return fields if "rope_parameters" in changes else {name: value for name, value in fields.items() if name != "rope_parameters"}
