"""Source of a sync: the weights of a Hugging Face folder, as they lie in its files. Knows no Megatron, no engine and no channel."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlsync.copy.files import MappedTensors
from rlsync.errors import CheckpointError, ConfigError
from rlsync.layout.geometry import Placement, TensorSpec, whole_tensors
from rlsync.layout.safetensors import StoredTensor, read_checkpoint

# What old checkpoints carry and nobody loads.
_NEVER_LOADED = re.compile(r".*\.rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class FolderSource:
    """One actor rank that holds every tensor of a checkpoint whole. Of any architecture: an engine's own loaders judge the names.

    Files are mapped, so that only bytes that are copied are read; they must not change meanwhile.

    Attributes:
        tensors: in the order of their names, layer 10 after layer 9, with the dtypes of the files.
        placements: the one of this rank.
        buffers: HF name -> tensor over its file.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read headers and map the files. Raises ConfigError without a config.json, CheckpointError where files are not complete."""
        folder = Path(folder)
        stored, tied = read_checkpoint(folder), _is_tied(folder)
        files = MappedTensors(stored)
        files.open()
        loaded = {name: entry for name, entry in stored.items() if not _NEVER_LOADED.fullmatch(name)}
        if tied and _HEAD in loaded:
            _check_tied_head(files, stored, folder)
            del loaded[_HEAD]
        self.tensors: tuple[TensorSpec, ...] = tuple(loaded[name].spec for name in sorted(loaded, key=layer_order))
        self.placements: tuple[Placement, ...] = (whole_tensors(str(folder), self.tensors),)
        self.stays = True
        self.buffers: Mapping[str, torch.Tensor] = MappedTensors(loaded)

    def begin(self, version: int) -> None:
        """Nothing: the weights are what they are."""


def layer_order(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts numbers in names as numbers, so that layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _is_tied(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a Hugging Face folder has one")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    return isinstance(config, dict) and bool(config.get("tie_word_embeddings", False))


def _check_tied_head(files: MappedTensors, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """A tied checkpoint may ship a copy of the embedding as its head, which engines pass over; another head would be lost."""
    if _EMBEDDING not in stored or not torch.equal(files.raw(_HEAD), files.raw(_EMBEDDING)):
        raise CheckpointError(
            f"{folder}: config.json ties the embeddings, but {_HEAD} is not {_EMBEDDING}; set tie_word_embeddings to false or remove it"
        )
