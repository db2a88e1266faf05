"""The world of the CPU default: a tiny model, a character tokenizer and additions, made locally from a seed.

Owns what lies in its folder: ``model/`` (config, seeded random weights and tokenizer, as transformers and vLLM read
them), ``train.jsonl`` (prompt, solutions) and ``supervised.jsonl`` (prompt, response). The supervised lines answer
wrongly at a known rate, so that the warm-started policy is right about as often as they are, and the gain after that
is reinforcement learning's.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlsync.errors import ConfigError
from workers.made_once import make_once

_PAD, _BOS, _EOS, _UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
_CHARACTERS = "0123456789+-*=()., \\{}"
_HEAD_DIM = 32


@dataclass(frozen=True, slots=True)
class ArithmeticRecipe:
    """Everything the folder's content depends on: the ``arithmetic`` keys of the same names."""

    seed: int = 0
    max_operand: int = 4
    num_problems: int = 2048
    num_supervised: int = 4096
    supervised_noise: float = 0.65
    hidden_size: int = 128
    num_layers: int = 2


@dataclass(frozen=True, slots=True)
class ArithmeticWorld:
    """Where the parts lie."""

    model_path: Path
    train_path: Path
    supervised_path: Path


def build_world(path: str | Path, recipe: ArithmeticRecipe) -> ArithmeticWorld:
    """Make the folder unless it already holds this very recipe. Same recipe, same bytes.

    Raises:
        ConfigError: a number that cannot work, or ``path`` holds something this function did not make.
    """
    _check(recipe)
    folder = Path(path)
    world = ArithmeticWorld(folder / "model", folder / "train.jsonl", folder / "supervised.jsonl")
    make_once(folder, asdict(recipe), lambda empty: _fill(empty, recipe), key="arithmetic.path")
    return world


def _fill(folder: Path, recipe: ArithmeticRecipe) -> None:
    (folder / "model").mkdir()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    _make_model(recipe, tokenizer).save_pretrained(folder / "model")
    _write_lines(folder / "train.jsonl", _training_lines(recipe))
    _write_lines(folder / "supervised.jsonl", _supervised_lines(recipe))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, no token added on its own; pad, bos, eos and unk have ids 0 to 3."""
    vocabulary = {token: i for i, token in enumerate((_PAD, _BOS, _EOS, _UNKNOWN, *_CHARACTERS))}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=_UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=_PAD, bos_token=_BOS, eos_token=_EOS, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False
    )


def _make_model(recipe: ArithmeticRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    heads = recipe.hidden_size // _HEAD_DIM
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,  # even over tensor-parallel ranks up to 8
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 3,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Qwen2ForCausalLM(config)


def _training_lines(recipe: ArithmeticRecipe) -> list[dict[str, object]]:
    draw = random.Random(f"train-{recipe.seed}")
    return [
        {"prompt": f"{a}+{b}=", "solutions": [str(a + b)]}
        for a, b in ((draw.randint(0, recipe.max_operand), draw.randint(0, recipe.max_operand)) for _ in range(recipe.num_problems))
    ]


def _supervised_lines(recipe: ArithmeticRecipe) -> list[dict[str, object]]:
    """Answers end with the eos token when tokenised; a wrong one is another sum that some problem has."""
    draw = random.Random(f"supervised-{recipe.seed}")
    lines: list[dict[str, object]] = []
    for _ in range(recipe.num_supervised):
        a, b = draw.randint(0, recipe.max_operand), draw.randint(0, recipe.max_operand)
        answer = a + b
        if draw.random() < recipe.supervised_noise:
            answer = draw.choice([s for s in range(2 * recipe.max_operand + 1) if s != answer])
        lines.append({"prompt": f"{a}+{b}=", "response": str(answer)})
    return lines


def _write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _check(recipe: ArithmeticRecipe) -> None:
    if recipe.hidden_size < _HEAD_DIM or recipe.hidden_size % _HEAD_DIM:
        raise ConfigError(f"arithmetic.hidden_size ({recipe.hidden_size}) must be a multiple of the head size {_HEAD_DIM}")
    if not 0 <= recipe.supervised_noise < 1:
        raise ConfigError(f"arithmetic.supervised_noise ({recipe.supervised_noise}) must lie in [0, 1)")
    for name in ("max_operand", "num_problems", "num_supervised", "num_layers"):
        if getattr(recipe, name) < 1:
            raise ConfigError(f"arithmetic.{name} ({getattr(recipe, name)}) must be at least 1")
