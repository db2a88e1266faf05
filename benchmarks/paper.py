"""Both sides of plans of the size of real models, on paper: actor ranks by Megatron's tables, workers as vLLM lays them out.

For tests and benches that need the shapes and none of the bytes. A sync records what live workers hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.cli.scene import Scene, Sides, set_out
from rlsync.cli.shapes import SHAPES

QWEN25_05B: Mapping[str, Any] = SHAPES["qwen2.5-0.5b"]
QWEN25_7B: Mapping[str, Any] = SHAPES["qwen2.5-7b"]
QWEN25_72B: Mapping[str, Any] = SHAPES["qwen2.5-72b"]
QWEN3_30B_A3B: Mapping[str, Any] = SHAPES["qwen3-30b-a3b"]
DEEPSEEK_V3: Mapping[str, Any] = SHAPES["deepseek-v3"]
LLAMA31_405B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "dtype": "bfloat16", "tie_word_embeddings": False,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


def experts(num_layers: int, num_experts: int, **changes: Any) -> dict[str, Any]:
    """A small model with so many experts in every layer."""
    return {**SHAPES["tiny-moe"], "num_hidden_layers": num_layers, "num_experts": num_experts, **changes}


def sides(config: Mapping[str, Any], axes: Mapping[str, int], **scene: Any) -> Sides:
    """Both sides; ``axes`` are the actor's, as arguments of Topology, ``scene`` the other fields of Scene."""
    found = set_out(config, Scene(axes, **scene), dtype=None, engine_dtype=None, make_vocab_size_divisible_by=1)
    assert not found.refusals, found.refusals
    return found
