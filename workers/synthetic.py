"""Models and data made locally from a recipe: the arithmetic world of the default run, and models of seeded random weights.

A folder is made once, complete or absent, and never over what somebody else put there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

from rlsync.errors import ConfigError
from workers.config.schema import ArithmeticRecipe
from workers.config.worlds import EXPERTS_OF_A_TOKEN, HEAD_DIM

_PAD, _BOS, _EOS, _UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
_CHARACTERS = "0123456789+-*=()., \\{}"
# Of the folder, among what decides whether one that is there is this one: counts changes of the files in it.
_FORM = 2


@dataclass(frozen=True, slots=True)
class ArithmeticWorld:
    """Paths of the parts."""

    model_path: Path
    train_path: Path
    val_path: Path
    supervised_path: Path


def build_world(path: str | Path, recipe: ArithmeticRecipe) -> ArithmeticWorld:
    """Make the folder unless it already holds this very recipe. Same recipe, same bytes.

    Raises:
        ConfigError: ``path`` holds something that this function did not make.
    """
    folder = Path(path)
    world = ArithmeticWorld(folder / "model", *(folder / f"{name}.jsonl" for name in ("train", "val", "supervised")))
    make_once(
        folder,
        {**{f.name: getattr(recipe, f.name) for f in fields(ArithmeticRecipe)}, "form": _FORM},
        lambda empty: _fill(empty, recipe),
        key="arithmetic.path",
    )
    return world


def _fill(folder: Path, recipe: ArithmeticRecipe) -> None:
    (folder / "model").mkdir()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    _make_model(recipe, tokenizer).save_pretrained(folder / "model")
    _write_lines(folder / "train.jsonl", _training_lines(recipe))
    _write_lines(folder / "val.jsonl", _every_problem(recipe))
    _write_lines(folder / "supervised.jsonl", _supervised_lines(recipe))
    if recipe.num_held_out:
        held_out: list[dict[str, object]] = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a, b in _held_out(recipe)]
        _write_lines(folder / "held_out.jsonl", held_out)
    if recipe.num_documents:
        _write_lines(folder / "documents.jsonl", _documents(recipe))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, no token added on its own; pad, bos, eos and unk have ids 0 to 3."""
    vocabulary = {token: i for i, token in enumerate((_PAD, _BOS, _EOS, _UNKNOWN, *_CHARACTERS))}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=_UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=_PAD, bos_token=_BOS, eos_token=_EOS, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False
    )


def _make_model(recipe: ArithmeticRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shared = {
        **decoder_sizes(recipe.hidden_size, recipe.num_layers, tokenizer),
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "dtype": "float32",
    }
    config: PretrainedConfig = Qwen2Config(**shared)
    if recipe.num_experts:
        # Two experts of half the width compute as much as the dense MLP.
        config = Qwen3MoeConfig(
            **shared, head_dim=HEAD_DIM, num_experts=recipe.num_experts, num_experts_per_tok=EXPERTS_OF_A_TOKEN, norm_topk_prob=True,
            moe_intermediate_size=recipe.hidden_size * 3 // EXPERTS_OF_A_TOKEN,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def decoder_sizes(hidden_size: int, num_layers: int, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Sizes and token ids of a tiny decoder, as transformers' configs call them."""
    heads = hidden_size // HEAD_DIM
    return {
        "vocab_size": -(-len(tokenizer) // 8) * 8,  # even over tensor-parallel ranks up to 8
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 3,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _training_lines(recipe: ArithmeticRecipe) -> list[dict[str, object]]:
    draw = random.Random(f"train-{recipe.seed}")
    return [_problem_line(draw.randint(0, recipe.max_operand), draw.randint(0, recipe.max_operand)) for _ in range(recipe.num_problems)]


def _every_problem(recipe: ArithmeticRecipe) -> list[dict[str, object]]:
    """Each problem once, to validate with. None is held out: the default has 25, too few to learn addition from 20 of them."""
    operands = range(recipe.max_operand + 1)
    return [_problem_line(a, b) for a in operands for b in operands]


def _problem_line(a: int, b: int) -> dict[str, object]:
    return {"prompt": f"{a}+{b}=", "solutions": [str(a + b)]}


def _held_out(recipe: ArithmeticRecipe) -> list[tuple[int, int]]:
    """Operands of the problems that no supervised line has."""
    numbers = range(recipe.max_operand + 1)
    problems = [(a, b) for a in numbers for b in numbers]
    return random.Random(f"held-out-{recipe.seed}").sample(problems, recipe.num_held_out)


def _supervised_lines(recipe: ArithmeticRecipe) -> list[dict[str, object]]:
    """Answers end with the eos token when tokenised; a wrong one is another sum that some problem has."""
    draw, held_out = random.Random(f"supervised-{recipe.seed}"), set(_held_out(recipe))
    lines: list[dict[str, object]] = []
    while len(lines) < recipe.num_supervised:
        a, b = draw.randint(0, recipe.max_operand), draw.randint(0, recipe.max_operand)
        if (a, b) in held_out:
            continue
        answer = a + b
        if draw.random() < recipe.supervised_noise:
            answer = draw.choice([s for s in range(2 * recipe.max_operand + 1) if s != answer])
        lines.append({"prompt": f"{a}+{b}=", "response": str(answer)})
    return lines


def _documents(recipe: ArithmeticRecipe) -> list[dict[str, object]]:
    """Plain text: a few sums in a row."""
    draw = random.Random(f"documents-{recipe.seed}")
    sums = [[(draw.randint(0, recipe.max_operand), draw.randint(0, recipe.max_operand)) for _ in range(draw.randint(1, 8))]
            for _ in range(recipe.num_documents)]  # fmt: skip
    return [{"text": ", ".join(f"{a}+{b}={a + b}" for a, b in several)} for several in sums]


def _write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


_SPECIAL = ("<pad>", "<bos>", "<eos>")


def make_seeded_model(
    path: str | Path, hf_config: Mapping[str, Any], seed: int, *, weights: bool = True, tokenizer: str | Path | None = None
) -> bool:
    """Make the folder unless it already holds this very model; returns whether it was made now. Weights are bf16.

    Args:
        hf_config: content of config.json; the tokenizer's ids and the dtype are added. Minutes for billions of parameters.
        weights: False makes config.json and tokenizer only.
        tokenizer: Hugging Face folder whose tokenizer the model gets; None: a token for each byte.

    Raises:
        ConfigError: transformers does not know the model, its vocabulary is smaller than the tokenizer, or ``path`` is somebody else's.
    """
    made = make_byte_tokenizer() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    ids = {"pad_token_id": made.pad_token_id, "bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    fields = {**hf_config, "dtype": "bfloat16", **{name: token for name, token in ids.items() if token is not None or tokenizer is None}}
    if fields.get("vocab_size", 0) < len(made):
        told = "tokens of bytes" if tokenizer is None else f"tokens of {tokenizer}"
        raise ConfigError(f"seeded_model.hf_config.vocab_size ({fields.get('vocab_size')}) must hold the {len(made)} {told}")
    if "model_type" not in fields:
        raise ConfigError("seeded_model.hf_config lacks model_type, e.g. qwen2")

    def make(folder: Path) -> None:
        made.save_pretrained(folder)
        if not weights:
            (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
            return
        config = AutoConfig.for_model(**fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)

    recipe: dict[str, Any] = {"seed": seed, "hf_config": fields} if weights else {"hf_config": fields, "weights": False}
    recipe |= {} if tokenizer is None else {"tokenizer": str(tokenizer)}
    return make_once(Path(path), recipe, make, key="seeded_model.path")


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, no token added on its own; pad, bos and eos have ids 0 to 2. Other ids decode to nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({token: i for i, token in enumerate((*_SPECIAL, *alphabet))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False)


_RECIPE = "recipe.json"


def make_once(folder: Path, recipe: Mapping[str, Any], make: Callable[[Path], None], *, key: str) -> bool:
    """Fill ``folder`` by ``make`` unless it holds this very recipe already; returns whether it was made now. Runs may ask side by side.

    Args:
        recipe: everything the content depends on, as JSON holds it.
        make: called with an empty folder, which becomes ``folder`` when it returns.
        key: names the folder in the error.

    Raises:
        ConfigError: ``folder`` holds something that this function did not make.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(folder.name + ".lock")):
        return _make_once(folder, recipe, make, key)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which is made if missing and never removed."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_once(folder: Path, recipe: Mapping[str, Any], make: Callable[[Path], None], key: str) -> bool:
    made, wanted = folder / _RECIPE, json.dumps(recipe, sort_keys=True)
    if made.is_file() and made.read_text() == wanted:
        return False
    if folder.exists() and any(folder.iterdir()):
        if not made.is_file():
            raise ConfigError(f"{key} {folder} exists and was not made by rlsync; name another folder or remove it")
        shutil.rmtree(folder)
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    make(staging)
    (staging / _RECIPE).write_text(wanted)
    if folder.exists():
        folder.rmdir()
    # An interrupted run leaves only the staging folder.
    staging.rename(folder)
    return True
