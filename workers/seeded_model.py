"""A Hugging Face folder with given shapes, seeded random weights and a byte tokenizer, made locally: what a run needs to be tried
at full size where nothing can be downloaded. Owns the folder's content; knows no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlsync.errors import ConfigError
from workers.made_once import make_once

_SPECIAL = ("<pad>", "<bos>", "<eos>")


def make_seeded_model(path: str | Path, hf_config: Mapping[str, Any], seed: int) -> bool:
    """Make the folder unless it already holds this very model; returns whether it was made now. Weights are bf16.

    Args:
        hf_config: content of config.json; the tokenizer's ids and the dtype are added. Minutes for billions of parameters.

    Raises:
        ConfigError: transformers does not know the model, its vocabulary is too small for bytes, or ``path`` is somebody else's.
    """
    tokenizer = make_byte_tokenizer()
    fields = {
        **hf_config, "dtype": "bfloat16", "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if fields.get("vocab_size", 0) < len(tokenizer):
        raise ConfigError(f"seeded_model.hf_config.vocab_size ({fields.get('vocab_size')}) must hold the {len(tokenizer)} tokens of bytes")
    if "model_type" not in fields:
        raise ConfigError("seeded_model.hf_config lacks model_type, e.g. qwen2")

    def make(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        config = AutoConfig.for_model(**fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)

    return make_once(Path(path), {"seed": seed, "hf_config": fields}, make, key="seeded_model.path")


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, no token added on its own; pad, bos and eos have ids 0 to 2. Other ids decode to nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({token: i for i, token in enumerate((*_SPECIAL, *alphabet))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False)
