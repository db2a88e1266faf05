"""A tiny random Qwen2-Audio: the smallest real model with an encoder, whose outputs vLLM caches. Needs no torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from tests.models import VOCAB_SIZE

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
# One placeholder, which the processor makes as long as the audio is.
AUDIO_PROMPT = (1, 3, 4, 5, 20, 21)
SAMPLING_RATE = 16000


def save_audio_model(folder: Path, seed: int) -> Path:
    """Save a checkpoint folder in fp32, with processor and tokenizer; deterministic in ``seed``."""
    audio = Qwen2AudioEncoderConfig(num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=64)
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = Qwen2AudioConfig(audio_config=audio.to_dict(), text_config=text.to_dict(), audio_token_index=_SPECIAL.index("<|AUDIO|>"))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name and parameter.dim() > 1:
                parameter.normal_(std=0.2)  # so that what the encoder says decides what is answered
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    # The names of the published checkpoints, which are those that vLLM knows.
    tensors = {_published(name): tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _processor().save_pretrained(folder)
    return folder


def save_language_model(folder: Path, audio_folder: Path) -> Path:
    """Save what ``audio_folder`` does with text alone, as a qwen2 checkpoint."""
    prefix = "language_model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in read_audio_model(audio_folder).items() if name.startswith(prefix)}
    config = Qwen2Config.from_dict(json.loads((audio_folder / "config.json").read_text())["text_config"])
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_audio_model(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by name, the encoder's first."""
    return dict(sorted(load_file(folder / "model.safetensors").items()))


def sound(seed: int) -> np.ndarray:
    """One second of noise."""
    return np.random.default_rng(seed).standard_normal(SAMPLING_RATE).astype(np.float32)


def _published(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1)


def _processor() -> Qwen2AudioProcessor:
    words = [*_SPECIAL, *(f"w{i}" for i in range(VOCAB_SIZE - len(_SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", additional_special_tokens=list(_SPECIAL[3:])
    )
    return Qwen2AudioProcessor(feature_extractor=WhisperFeatureExtractor(feature_size=16), tokenizer=fast)
