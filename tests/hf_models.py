"""Random HF models on disk, small enough for a laptop, one for each family, tied and untied."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCAB = 131  # divided by no tensor axis
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": {"kind": "LlamaConfig", "rope_parameters": LLAMA3_ROPE},
    "llama-tied": {"kind": "LlamaConfig", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2": {"kind": "Qwen2Config"},
    "qwen2-tied": {"kind": "Qwen2Config", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {"kind": "Qwen3Config", "head_dim": 32},
    "qwen3-tied": {"kind": "Qwen3Config", "head_dim": 32, "tie_word_embeddings": True},
}
SMALL_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def make_models(root: Path, names: tuple[str, ...] = tuple(MODELS)) -> dict[str, dict]:
    """Save the named models under ``root``. Each comes as its folder, a token batch, and HF's fp32 logits for it."""
    made = {}
    for name in names:
        torch.manual_seed(len(made))
        options = dict(MODELS[name])
        kind = getattr(transformers, options.pop("kind"))
        config = kind(**{**SMALL_SIZES, **options})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1) if parameter.ndim > 1 else parameter.data.uniform_(0.5, 1.5)
        model.save_pretrained(root / name)
        tokens = torch.randint(0, VOCAB, (2, 24))
        with torch.no_grad():
            logits = model(tokens).logits
        made[name] = {"folder": str(root / name), "tokens": tokens.tolist(), "logits": logits.tolist()}
    return made
