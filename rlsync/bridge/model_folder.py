"""A Hugging Face model folder: its configuration, the files that travel with weights, where the tensors of its model lie, its tied head.

Owns which files of a folder belong to a saved model and why. Must not know Megatron, engines or process groups.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rlsync.copy.files import MappedTensors
from rlsync.errors import CheckpointError, ConfigError, PlacementError, first_few
from rlsync.layout.json_files import read_json_object
from rlsync.layout.safetensors import CHECKSUMS, INDEX_NAME, SINGLE_NAME, Holding, StoredTensor, read_checkpoint
from rlsync.models.stacks import Model
from rlsync.models.stored import StoredForm, default_form, file_placement, form_of, has_other_forms, misfits

CONFIG_NAME = "config.json"
HEAD = "lm_head.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")

# What travels with weights, by what it is for. Patterns are paths in the folder; ``*`` stays within one folder.
TRAVELS: dict[str, tuple[str, ...]] = {
    "configuration": (CONFIG_NAME, "generation_config.json"),
    "tokenizer": (
        "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken*.json",
        "vocab*.json", "vocab*.txt", "*_vocab.json", "merges.txt", "dict.txt", "bpe.codes",
        "*.model", "tokenizer.model*", "*.spm", "*.tiktoken", "*.tokenizer",
        "normalizer.json", "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json",
    ),
    "chat template": ("*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja"),
    "processor": ("*processor_config.json", "audio_tokenizer_config.json"),
    "remote code": ("*.py", "requirements.txt"),
    "licence": ("LICENSE*", "LICENCE*", "License*", "COPYING*", "NOTICE*", "USE_POLICY*"),
}  # fmt: skip
# A folder whose configurations name classes of its own: their code may open files under any name, so all travel but these.
_OWN_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
STAYS: dict[str, tuple[str, ...]] = {
    "weights": (
        "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.npz",
        "*.index.json", "*.partial",
    ),
    "describes the weights that were loaded": (CHECKSUMS, "hf_quant_config.json", "README*", "trainer_state.json", "*_results.json"),
}  # fmt: skip

_log = logging.getLogger(__name__)


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of ``config.json``. Raises ConfigError where it is missing, unreadable or names weight files of its own."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a local Hugging Face folder, which has one")
    text, config = read_json_object(path, remedy="write or download it again")
    named = config.get("transformers_weights")
    if named not in (None, SINGLE_NAME, INDEX_NAME):
        raise ConfigError(
            f"{path}: transformers_weights names {named!r}, which transformers loads and vLLM does not; call the weights {SINGLE_NAME} "
            f"or list them in {INDEX_NAME}, and remove the key"
        )
    return text, config


def with_dtype(text: str, dtype: str) -> str:
    """The text of a ``config.json`` whose weights have ``dtype``: every ``dtype`` and ``torch_dtype`` says so, all else is as it was.

    Of the configuration itself and of those of its parts (``text_config`` ...). A key that is absent or null stays: transformers and
    vLLM then look at the weights.
    """
    spans = [span for span in _dtype_spans(text, 0) if text[slice(*span)] != "null"]
    for begin, end in reversed(spans):
        text = text[:begin] + json.dumps(dtype) + text[end:]
    return text


def _dtype_spans(text: str, begin: int) -> Iterator[tuple[int, int]]:
    """Where the values of dtype keys lie in the JSON object that begins at or after ``begin``, in their order."""
    decoder, cursor = json.JSONDecoder(), text.index("{", begin) + 1
    while text[(cursor := _after(r"[\s,]*", text, cursor))] != "}":
        key, cursor = decoder.raw_decode(text, cursor)
        start = _after(r"\s*:\s*", text, cursor)
        value, cursor = decoder.raw_decode(text, start)
        if key in ("dtype", "torch_dtype"):
            yield start, cursor
        elif isinstance(value, dict) and key.endswith("_config") and key not in ("quantization_config", "compression_config"):
            yield from _dtype_spans(text, start)


def _after(pattern: str, text: str, cursor: int) -> int:
    match = re.compile(pattern).match(text, cursor)
    assert match is not None
    return match.end()


def travelling_files(folder: Path, *, but: Path) -> tuple[Path, ...]:
    """Files of ``folder`` that a model saved from it needs beside its weights, as paths in it; none of those below ``but``.

    Raises CheckpointError for a link whose target is missing.
    """
    has_own_code = any("auto_map" in _content(folder / name) for name in _OWN_CODE)
    patterns = [pattern for row in TRAVELS.values() for pattern in row]
    stays = [pattern for row in STAYS.values() for pattern in row]
    chosen, left = [], []
    for path in _files(folder, but.resolve()):
        relative = path.relative_to(folder)
        is_named = any(len(Path(p).parts) == len(relative.parts) and fnmatchcase(relative.as_posix(), p) for p in patterns)
        is_kept_back = any(fnmatchcase(relative.name, p) for p in stays)
        if is_named or (has_own_code and not is_kept_back):
            if not path.is_file():
                raise CheckpointError(f"{path}: a link to {os.readlink(path)}, which is missing; download it again, or remove the link")
            chosen.append(relative)
        elif not is_kept_back:
            left.append(relative.as_posix())
    if left:
        _log.info("files of %s that a saved model does not need stay there: %s", folder, first_few(left, 20))
    return tuple(chosen)


def _files(folder: Path, but: Path) -> Iterator[Path]:
    """Files and links below a folder in the order of their names; nothing hidden, nothing below ``but``."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__" or path.resolve() == but:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path, but)
        elif not path.is_dir():
            yield path


def _content(path: Path) -> Mapping[str, Any]:
    """A small JSON object, empty where it is missing or none: whoever reads it next says what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def copy_files(folder: Path, files: tuple[Path, ...], out_dir: Path, *, durable: bool = False) -> None:
    """Copy files of a folder, given as paths in it, byte for byte. With ``durable`` the disk has them on return."""
    for relative in files:
        (out_dir / relative).parent.mkdir(parents=True, exist_ok=True)
        with (folder / relative).open("rb") as source, (out_dir / relative).open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            if durable:
                os.fsync(copy.fileno())


def form_of_folder(model: Model, folder: Path | None) -> StoredForm:
    """How the weight files of a folder hold the tensors of ``model``; where it has none, as released checkpoints of the family do.

    Reads headers, and those only where files of the family exist in several forms. Raises PlacementError where the form is not clear.
    """
    if folder is None or not has_other_forms(model) or not any(folder.glob("*.safetensors*")):
        return default_form(model)
    return form_of(model, {name: stored.spec.shape for name, stored in read_checkpoint(folder).items()})


def kept_tensors(model: Model, folder: Path | None) -> dict[str, StoredTensor]:
    """Tensors of a folder's weight files that no rank of a run holds and a saved folder has all the same; none where it has no files."""
    if folder is None or not model.family.kept(model.values) or not any(folder.glob("*.safetensors*")):
        return {}
    return {name: entry for name, entry in read_checkpoint(folder).items() if model.is_kept(name)}


def placed_checkpoint(model: Model, folder: Path) -> Holding:
    """Where the tensors of ``model`` lie in the weight files of a folder, without a copy of the embedding as its head.

    Raises CheckpointError for damaged files, PlacementError with all missing, unexpected and wrongly shaped tensors at once.
    """
    stored: Mapping[str, StoredTensor] = read_checkpoint(folder)
    if model.tied:
        stored = without_tied_head(stored, folder)
    shapes = {name: tensor.spec.shape for name, tensor in stored.items()}
    findings = misfits(model, shapes)
    if findings:
        raise PlacementError(f"{folder} does not fit {model.architecture}: " + "; ".join(findings))
    files = form_of(model, shapes).file_tensors(model, model.tensors())
    placement = file_placement(str(folder), [replace(file, spec=stored[file.spec.name].spec) for file in files])
    return Holding(placement, {buffer.name: stored[buffer.name] for buffer in placement.buffers})


def without_tied_head(stored: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint whose config ties the embeddings, without the copy of the embedding that some store as the head.

    Raises CheckpointError for a head of other bits, and for a head without an embedding: transformers and vLLM make different models
    of both.
    """
    if HEAD not in stored:
        return dict(stored)
    embedding = next((name for name in EMBEDDINGS if name in stored), EMBEDDINGS[0])
    advice = "set tie_word_embeddings to false in config.json" if embedding in stored else f"rename it to {embedding}"
    if embedding not in stored:
        raise CheckpointError(f"{folder}: config.json ties the embeddings, but {HEAD} is stored and {embedding} is not; {advice}")
    files = MappedTensors(stored)
    # As bytes: a NaN equals itself here.
    if stored[HEAD].spec.dtype != stored[embedding].spec.dtype or not files.raw(HEAD).equal(files.raw(embedding)):
        raise CheckpointError(f"{folder}: config.json ties the embeddings, but {HEAD} is not {embedding}; {advice}, or remove {HEAD}")
    return {name: entry for name, entry in stored.items() if name != HEAD}
