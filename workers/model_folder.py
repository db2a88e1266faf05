"""A Hugging Face folder as a run needs it: its JSON files and its tokenizer's files, checked before anything is made from them.

Reads small files only. Knows no torch and no transformers, so that ``workers.check`` may use it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsync.errors import ConfigError, first_few
from rlsync.layout.json_files import read_json_object
from rlsync.models import model_of

# Sets of files, each of which is enough to make a tokenizer from. Without any of them transformers makes an empty one, silently.
_TOKENIZER_FILES: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.txt",),
    ("tekken.json",),
)


def read_hf_config(folder: Path, key: str) -> dict[str, Any]:
    """Content of a model folder's config.json. Raises ConfigError; ``key`` names the folder there."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key} {folder} holds no config.json; it must be a local Hugging Face folder")
    return read_json_object(folder / "config.json")[1]


def check_same_model(folder: Path, hf_config: Mapping[str, Any], engines_folder: Path, of_engines: Mapping[str, Any]) -> None:
    """Raise ConfigError where the config.json of the initial weights describes another model than that of the engines. Both are read by a
    family; values that change no computation may differ."""
    one, other = model_of(hf_config), model_of(of_engines)
    sides = [{"architecture": m.architecture, "rope": m.rope, **m.dims, **m.transformer} for m in (one, other)]
    different = [f"{name} {sides[0].get(name)} there, {value} here" for name, value in sides[1].items() if sides[0].get(name) != value]
    if different:
        raise ConfigError(
            f"actor.megatron.ckpt_convertor.hf_model_path {folder} is of another model than rollout.model.model_path {engines_folder}: "
            f"{first_few(different, 4)}"
        )


def read_vocab_size(folder: Path, key: str) -> int:
    """Tokens that the model of a folder has embeddings of. Raises ConfigError; ``key`` names the folder there."""
    return model_of(read_hf_config(folder, key)).dims["vocab"]


def read_picture_tokens(folder: Path, key: str) -> frozenset[int]:
    """Ids of the tokens that stand for pictures and videos in a vision-language model's prompts; none of a model of text. Raises
    ConfigError; ``key`` names the folder there."""
    vision = model_of(read_hf_config(folder, key)).vision
    return frozenset() if vision is None else frozenset(vision.placeholders)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Content of a model folder's generation_config.json; empty where there is none. Raises ConfigError."""
    path = folder / "generation_config.json"
    return read_json_object(path)[1] if path.is_file() else {}


def text_config(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says about the language model: an object of its own in those of vision-language models, else all of it."""
    found = hf_config.get("text_config")
    return found if isinstance(found, Mapping) else hf_config


def token_ids(value: Any, where: str) -> list[int]:
    """The ids that a config gives as a number, a list of numbers or nothing. Raises ConfigError naming ``where``."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in found):
        raise ConfigError(f"{where} is {value!r}; it must be a token id, a list of them, or null")
    return found


def check_tokenizer_files(folder: Path, *, trust_remote_code: bool) -> None:
    """Raise ConfigError unless a tokenizer can be made from the folder."""
    if not folder.is_dir():
        raise ConfigError(f"actor.tokenizer.tokenizer_model {folder} is no folder; it must be a local Hugging Face folder")
    settings = read_json_object(folder / "tokenizer_config.json")[1] if (folder / "tokenizer_config.json").is_file() else {}
    if trust_remote_code and "auto_map" in settings:
        return
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise ConfigError(
            f"actor.tokenizer.tokenizer_model {folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt, "
            "tokenizer.model or vocab.txt is there; copy the model's tokenizer files into it, or name a folder that has them"
        )
    if (folder / "tokenizer.json").is_file():
        read_json_object(folder / "tokenizer.json")


def named(tokenizer: Any) -> str:
    """A tokenizer and, where it was made from one, its folder, for messages."""
    folder = getattr(tokenizer, "name_or_path", "")
    return f"the tokenizer of {folder}" if folder else "the tokenizer"


def check_tokenizer_size(num_tokens: int, vocab_size: Any, folder: Path) -> None:
    """Raise ConfigError where a tokenizer, its added tokens left out, has ids that a model has no row for."""
    if isinstance(vocab_size, int) and num_tokens > vocab_size:
        raise ConfigError(
            f"the tokenizer of {folder} has {num_tokens} tokens, config.json's vocab_size is {vocab_size}: they belong to different models"
        )


def unknown_token(token_ids: Sequence[int], tokenizer: Any, vocab_size: int | None) -> str | None:
    """What is wrong with tokens of which a model has no embedding, such as added ones; None where it has them all, or ``vocab_size`` is
    None. The model itself would not say it: a rank gives zeros for ids that others have, and padded rows have no meaning."""
    if vocab_size is None or max(token_ids, default=0) < vocab_size:
        return None
    token_id = next(token_id for token_id in token_ids if token_id >= vocab_size)
    return (
        f"{named(tokenizer)} makes the token {tokenizer.convert_ids_to_tokens(token_id)!r} of id {token_id} of it, and the model's "
        f"vocab_size is {vocab_size}; resize the model's embedding (resize_token_embeddings of transformers), or name the model's own "
        "tokenizer in actor.tokenizer.tokenizer_model"
    )


def picture_token(token_ids: Sequence[int], tokenizer: Any, picture_tokens: Collection[int]) -> str | None:
    """What is wrong with a text that has tokens that stand for pictures, which a vision-language model would look for; None without."""
    found = next((token_id for token_id in token_ids if token_id in picture_tokens), None) if picture_tokens else None
    if found is None:
        return None
    return f"{named(tokenizer)} makes the token {tokenizer.convert_ids_to_tokens(found)!r} of it, which stands for a picture or a video"


def processor_template(folder: Path) -> str | None:
    """The chat template of a vision-language model's chat_template.json; None where there is none. transformers' processors read it
    before any other, and its tokenizers do not. Raises ConfigError."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    found = read_json_object(path)[1].get("chat_template")
    if not isinstance(found, str):
        raise ConfigError(f"{path} holds no chat_template, which must be a string; copy it again")
    return found


def check_chat_template(folder: Path, *, takes_pictures: bool) -> None:
    """Raise ConfigError where a tokenizer's folder has no chat template, or one that is none.

    ``takes_pictures``: the model does, so that ``processor_template`` counts.
    """
    file = folder / "chat_template.jinja"
    held: Any = processor_template(folder) if takes_pictures else None
    is_file = held is None and file.is_file()
    if held is None and not is_file and (folder / "tokenizer_config.json").is_file():
        held = read_json_object(folder / "tokenizer_config.json")[1].get("chat_template")
    if not is_file and held is None:
        raise ConfigError(
            f"data.apply_chat_template is True, and the tokenizer has no chat template; add chat_template.jinja to {folder}, "
            "or set data.apply_chat_template to False"
        )
    try:
        sources = [file.read_text(encoding="utf-8")] if is_file else [held] if isinstance(held, str) else []
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: byte {error.start + 1}; copy it again") from None
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # A tag of transformers' own, which marks what an assistant says.
    tag = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
    for source in sources:
        try:
            ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(tag.sub("", source))
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template of {folder} is not one: line {error.lineno}: {error.message}") from None
