"""The tiny models of ``tests.models`` on disk, each with a token batch and HF's own logits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models import FAMILIES, MOE_FAMILIES, STACKED_FAMILIES, VOCAB_SIZE, tiny_model

# KV heads: fewer than the largest tensor axis of the tests (4), one alone, and as many as query heads.
MODELS: dict[str, dict[str, Any]] = {
    **{family: {"family": family, "tied": False} for family in FAMILIES},
    "llama-tied": {"family": "llama", "tied": True, "num_key_value_heads": 4},
    "qwen2-tied": {"family": "qwen2", "tied": True, "num_key_value_heads": 1},
    "qwen3-tied": {"family": "qwen3", "tied": True},
    "glm4": {"family": "glm4", "tied": False},
    "seed_oss": {"family": "seed_oss", "tied": False},
    "smollm3": {"family": "smollm3", "tied": True},
}
MOE_MODELS: dict[str, dict[str, Any]] = {
    **{family: {"family": family, "tied": False} for family in MOE_FAMILIES},
    "qwen3_moe-tied": {"family": "qwen3_moe", "tied": True},
    **{f"{family}-stacked": {"family": family, "stacked": True} for family in STACKED_FAMILIES},
}


def make_models(root: Path, names: tuple[str, ...] = tuple(MODELS)) -> dict[str, dict[str, Any]]:
    """Save the named models under ``root``: name -> folder, tokens (2, 24) and fp32 logits (2, 24, vocab) as lists."""
    made = {}
    for seed, name in enumerate(names):
        options = {**MODELS, **MOE_MODELS}[name]
        model = tiny_model(seed=seed, **{key: value for key, value in options.items() if key != "stacked"})
        # transformers writes the names of released checkpoints unless it is told to write those of its modules.
        model.save_pretrained(root / name, save_original_format="stacked" not in options)
        tokens = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = model(tokens).logits
        made[name] = {"folder": str(root / name), "tokens": tokens.tolist(), "logits": logits.tolist()}
    return made
