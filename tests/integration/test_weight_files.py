"""Which files of a folder are its weights: what transformers and vLLM both load is loaded, and where they differ it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsync.copy.files import MappedTensors
from rlsync.errors import CheckpointError
from rlsync.layout.safetensors import INDEX_NAME, read_checkpoint

SINGLE = "model.safetensors"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# Files that are there, files that the index lists (none: no index), and files that are loaded (None: refused).
FOLDERS = {
    "a single file": ((SINGLE,), (), (SINGLE,)),
    "a single file and an index of it": ((SINGLE,), (SINGLE,), (SINGLE,)),
    "an index": (PARTS, PARTS, PARTS),
    "an index and files that it does not list": ((*PARTS, "consolidated.safetensors", "other.safetensors"), PARTS, PARTS),
    "an index, and a folder in place of the single file": ((*PARTS, SINGLE + "/"), PARTS, PARTS),
    "a single file beside an index of others": ((SINGLE, *PARTS), PARTS, None),
    "a single file that an index lists with another": ((SINGLE, PARTS[0]), (SINGLE, PARTS[0]), None),
    "a single file and others without an index": ((SINGLE, "other.safetensors"), (), None),
    "an index of a file that is missing": ((PARTS[0],), PARTS, None),
}


def folder_with(folder: Path, files: tuple[str, ...], listed: tuple[str, ...]) -> Path:
    for number, file in enumerate(files):
        if file.endswith("/"):
            (folder / file).mkdir()
        else:
            save_file({f"tensor-{number}": torch.full((2,), float(number))}, folder / file, metadata={"format": "pt"})
    if listed:
        numbers = {file: number for number, file in enumerate(files)}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {f"tensor-{numbers.get(f, 9)}": f for f in listed}}))
    return folder


def transformers_loads(folder: Path) -> set[str] | None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    try:
        files, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, {}, False)
        return {Path(file).name for file in files if load_file(file)}
    except OSError:
        return None


def vllm_loads(folder: Path) -> set[str] | None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    try:
        _, files, _, _ = DefaultModelLoader(LoadConfig(load_format="hf"))._prepare_weights(str(folder), None, None, False, None)
        return {Path(file).name for file in files if load_file(file)}
    except OSError:
        return None


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_both_load_is_loaded_and_what_they_load_differently_is_refused(tmp_path, kind):
    files, listed, loaded = FOLDERS[kind]
    folder = folder_with(tmp_path, files, listed)
    theirs, vllms = transformers_loads(folder), vllm_loads(folder)
    if loaded is None:
        assert theirs != vllms or theirs is None
        with pytest.raises(CheckpointError, match=str(folder)):
            read_checkpoint(folder)
        return
    assert theirs == vllms == set(loaded)
    ours = MappedTensors(read_checkpoint(folder))
    assert {name: t.tolist() for name, t in ours.items()} == {n: t.tolist() for file in loaded for n, t in load_file(folder / file).items()}


def test_a_refusal_says_what_each_would_load(tmp_path):
    folder = folder_with(tmp_path, (SINGLE, *PARTS), PARTS)
    with pytest.raises(CheckpointError, match=r"transformers loads model\.safetensors alone, vLLM the files of .*index\.json: model-00001"):
        read_checkpoint(folder)
