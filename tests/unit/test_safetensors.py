"""Claims about reading and writing checkpoint folders, with the safetensors library as the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsync.copy.files import FileWriter, MappedTensors, remove_weights, shard_files, write_index
from rlsync.errors import CheckpointError
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.safetensors import INDEX_NAME, read_checkpoint

SPECS = (TensorSpec("a", "float32", (3, 5)), TensorSpec("b", "bfloat16", (7,)), TensorSpec("c", "int64", ()))


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {s.name: torch.full(s.shape, value).to(getattr(torch, s.dtype)) for s in SPECS}


def write(folder: Path, value: float, max_shard_bytes: int) -> None:
    remove_weights(folder)
    files = shard_files(SPECS, max_shard_bytes)
    for file, group in files.items():
        with FileWriter(folder / file, group) as writer:
            for spec in reversed(group):
                writer.write(spec.name, tensors(value)[spec.name])
    write_index(folder, files)


@pytest.mark.parametrize("max_shard_bytes", [10, 70, 10_000])
def test_what_is_written_the_safetensors_library_reads_and_so_do_we(tmp_path, max_shard_bytes):
    write(tmp_path, 2.0, max_shard_bytes)
    theirs = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    ours = MappedTensors(read_checkpoint(tmp_path))
    assert set(theirs) == set(ours) == {"a", "b", "c"}
    assert all(torch.equal(theirs[n], tensors(2.0)[n]) and torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize(("first", "second"), [(10, 10_000), (10_000, 10)])
def test_saving_over_a_checkpoint_cut_otherwise_leaves_only_the_new_one(tmp_path, first, second):
    write(tmp_path, 1.0, first)
    write(tmp_path, 2.0, second)
    stored = MappedTensors(read_checkpoint(tmp_path))
    assert all(torch.equal(stored[n], t) for n, t in tensors(2.0).items())


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": ', "[]"])
def test_an_unreadable_index_is_named(tmp_path, text):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="unreadable index"):
        read_checkpoint(tmp_path)


def test_an_index_that_lists_what_no_file_holds_is_refused(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(("a", "b", "c", "d"), "model.safetensors")}))
    with pytest.raises(CheckpointError, match="lists 1 tensors that no file holds: d"):
        read_checkpoint(tmp_path)


def test_a_failed_write_leaves_no_file_under_the_final_name(tmp_path):
    def fail() -> None:
        with FileWriter(tmp_path / "model.safetensors", SPECS) as writer:
            writer.write("a", tensors()["a"])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
