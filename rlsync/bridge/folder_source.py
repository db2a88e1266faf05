"""Source of a sync: the weights of a Hugging Face folder, as they lie in its files. Knows no Megatron, no engine and no channel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from rlsync.bridge.model_folder import read_config, without_tied_head
from rlsync.copy.files import MappedTensors
from rlsync.layout.geometry import Placement, TensorSpec, whole_tensors
from rlsync.layout.safetensors import read_checkpoint
from rlsync.models.stacks import NEVER_LOADED
from rlsync.sync.source import Declared

_NEVER_LOADED = re.compile("|".join(NEVER_LOADED))


class FolderSource:
    """One actor rank that holds every tensor of a checkpoint whole. Of any architecture: an engine's own loaders judge the names.

    Files are mapped, so that only bytes that are copied are read; they must not change meanwhile.

    Attributes:
        tensors: in the order of their names, layer 10 after layer 9, with the dtypes of the files.
        placements: the one of this rank.
        buffers: HF name -> tensor over its file.
        frozen, declared: nothing: who syncs a second folder would make a second source.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read headers and map the files. Raises ConfigError without a config.json, CheckpointError where files are not complete."""
        folder = Path(folder)
        stored, (_, config) = read_checkpoint(folder), read_config(folder)
        if config.get("tie_word_embeddings"):
            stored = without_tied_head(stored, folder)
        loaded = {name: entry for name, entry in stored.items() if not _NEVER_LOADED.fullmatch(name)}
        files = MappedTensors(loaded)
        files.open()
        self.tensors: tuple[TensorSpec, ...] = tuple(loaded[name].spec for name in sorted(loaded, key=layer_order))
        self.placements: tuple[Placement, ...] = (whole_tensors(str(folder), self.tensors),)
        self.stable_memory = True
        self.buffers: Mapping[str, torch.Tensor] = files
        self.frozen: frozenset[str] = frozenset()
        self.declared = Declared()

    def begin(self, version: int) -> None:
        """Nothing: the weights are what they are."""


def layer_order(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts numbers in names as numbers, so that layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
