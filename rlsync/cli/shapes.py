"""Shapes of models by name: what a config.json says that decides sizes. No weights, no tokenizer, nothing to download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlsync.errors import ConfigError

_QWEN25: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False,
    "dtype": "bfloat16", "torch_dtype": "bfloat16", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "hidden_act": "silu", "initializer_range": 0.02, "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip


def _qwen25(hidden: int, ffn: int, layers: int, heads: int, groups: int, **changes: Any) -> Mapping[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**_QWEN25, **sizes, "num_key_value_heads": groups, **changes}


# Experts in every layer. Configs of files say decoder_sparse_step and mlp_only_layers, without which vLLM does not start.
_QWEN3_MOE: Mapping[str, Any] = {
    **_QWEN25, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "attention_bias": False, "max_position_embeddings": 40960,
}  # fmt: skip


def _qwen3_moe(hidden: int, ffn: int, expert_ffn: int, layers: int, heads: int, **changes: Any) -> Mapping[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "moe_intermediate_size": expert_ffn, "num_hidden_layers": layers}
    return {**_QWEN3_MOE, **sizes, "num_attention_heads": heads, **changes}


# DeepSeek-V3 without the layer that predicts a further token, which is not trained.
_DEEPSEEK_V3: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "tie_word_embeddings": False,
    "dtype": "bfloat16", "torch_dtype": "bfloat16", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 3, "moe_layer_freq": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "hidden_act": "silu", "attention_bias": False, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_MOONLIGHT: Mapping[str, Any] = {
    **_DEEPSEEK_V3, "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "first_k_dense_replace": 1,
    "q_lora_rank": None, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "rope_scaling": None,
    "bos_token_id": 163584, "eos_token_id": 163585,
}  # fmt: skip

# Llama 3, whose rope is unscaled.
_LLAMA3: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "attention_bias": False, "initializer_range": 0.02, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
_QWEN3_8B: Mapping[str, Any] = {
    **_QWEN25, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "attention_bias": False, "max_position_embeddings": 40960,
}  # fmt: skip


def _llama3(hidden: int, ffn: int, layers: int, heads: int) -> Mapping[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**_LLAMA3, **sizes}


# Small enough for two CPU cores; a head has 32 elements because vLLM's attention on CPU takes no fewer.
_TINY: Mapping[str, Any] = {"vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _qwen25(128, 160, 4, 4, 2, **_TINY),
    "tiny-moe": _qwen3_moe(128, 160, 64, 4, 4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, **_TINY),
    "llama3-8b": _llama3(4096, 14336, 32, 32),
    "llama3-70b": _llama3(8192, 28672, 80, 64),
    "qwen2.5-0.5b": _qwen25(896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-1.5b": _qwen25(1536, 8960, 28, 12, 2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen25(3584, 18944, 28, 28, 4),
    "qwen2.5-32b": _qwen25(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen25(8192, 29568, 80, 64, 8),
    "qwen3-8b": _QWEN3_8B,
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 768, 48, 32),
    "qwen3-235b-a22b": _qwen3_moe(4096, 12288, 1536, 94, 64),
    "moonlight-16b": _MOONLIGHT,
    "deepseek-v3": _DEEPSEEK_V3,
}  # fmt: skip


# Sizes of a model that two CPU cores train in seconds, by the keys of config.json that have them.
_TWIN_SIZES: Mapping[str, int] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip


def twin_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the same architecture with the sizes of a tiny model; what decides how it computes stays as it is.

    Fewer key-value heads than attention heads stay fewer, and ids of tokens beyond the vocabulary are left out.
    """
    sizes = {name: min(config[name], most) for name, most in _TWIN_SIZES.items() if isinstance(config.get(name), int)}
    if config.get("num_key_value_heads") != config.get("num_attention_heads"):
        sizes["num_key_value_heads"] = 1
    lost = [name for name in ("bos_token_id", "eos_token_id") if (config.get(name) or 0) >= sizes["vocab_size"]]
    return {name: value for name, value in {**config, **sizes}.items() if name not in lost}


def shape_of(model: str) -> dict[str, Any]:
    """The config of a name of SHAPES, or of a config.json or the folder that holds it.

    Raises ConfigError where it is neither, and for files that are no config.
    """
    if model in SHAPES:
        return dict(SHAPES[model])
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        known = f"neither a known shape ({', '.join(SHAPES)}) nor a config.json, nor a folder that holds one"
        raise ConfigError(f"{model}: {known}{model_below(Path(model), 'config.json')}")
    return read_config(path)


def model_below(folder: Path, pattern: str) -> str:
    """The end of an error about a folder without files of this pattern: where a checkpoint of the runner has them, or nothing."""
    with suppress(PermissionError):  # of a folder that nobody may look into, which the error is about
        if any(folder.glob(pattern)):
            return ""
        for below in (folder / "actor" / "hf_model", folder / "hf_model"):
            if any(below.glob(pattern)):
                return f"; did you mean {below}?"
    return ""


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises ConfigError for what is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds {type(config).__name__}, not the object that a config.json is")
    return config
