"""Claims about reading and writing checkpoint folders, with the safetensors library as the judge."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rlsync.copy.files import FileWriter, MappedTensors, prepare_folder, shard_files, write_index
from rlsync.errors import CheckpointError
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.safetensors import INDEX_NAME, read_checkpoint

SPECS = (TensorSpec("a", "float32", (3, 5)), TensorSpec("b", "bfloat16", (7,)), TensorSpec("c", "int64", ()))


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {s.name: torch.full(s.shape, value).to(getattr(torch, s.dtype)) for s in SPECS}


def write(folder: Path, value: float, max_shard_bytes: int) -> None:
    prepare_folder(folder)
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


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"{}", b'{"weight_map": ', b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000,
        b'{"weight_map": ["a", "b", "c"]}', b'{"weight_map": {}}', b'{"weight_map": "model.safetensors"}',
    ],
)  # fmt: skip
def test_an_unreadable_index_is_named(tmp_path, content):
    save_file(tensors(), tmp_path / "part.safetensors")
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: unreadable index"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file", ["../part.safetensors", "sub/part.safetensors", "{folder}/part.safetensors", "", "..", ["part.safetensors"], 3, None]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, file):
    save_file(tensors(), tmp_path / "part.safetensors")
    file = file.format(folder=tmp_path) if isinstance(file, str) else file
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: a is in .*, which is not the name of a file in {tmp_path}"):
        read_checkpoint(tmp_path)


def test_folders_and_missing_files_in_place_of_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Is a directory\)"):
        read_checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"part\.safetensors: file is missing, though .* lists it"):
        read_checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / INDEX_NAME).mkdir()
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: cannot be read \(Is a directory\)"):
        read_checkpoint(tmp_path)


def test_a_damaged_file_is_refused_whenever_the_safetensors_library_refuses_it(tmp_path):
    """Bytes of the header flipped and replaced, numbers changed, ends cut off and added: our error or what the library reads."""
    save_file(tensors(), tmp_path / "whole.safetensors", metadata={"format": "pt"})
    whole = (tmp_path / "whole.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    file, chance, outcomes = tmp_path / "model.safetensors", random.Random(0), {True: 0, False: 0}
    (tmp_path / "whole.safetensors").unlink()
    for _ in range(3_000):
        damaged = bytearray(whole)
        at = chance.randrange(header_bytes)
        kind = chance.randrange(4)
        if kind == 0:
            damaged[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            damaged[at] = chance.choice(b'0123456789[]{}",:- ')
        elif kind == 2:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            damaged += b"x" * chance.randrange(9)
        file.write_bytes(damaged)
        try:
            with safe_open(file, "pt") as opened:
                theirs = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            theirs = None
        try:
            ours = MappedTensors(read_checkpoint(tmp_path))
        except CheckpointError as error:
            ours, said = None, str(error)
        outcomes[theirs is None] += 1
        assert ours is not None or str(file) in said
        if theirs is None:
            assert ours is None, f"the library refuses {bytes(damaged[:header_bytes])!r}"
        elif ours is not None:
            assert ours.keys() == theirs.keys()
            assert all(ours.raw(name).equal(theirs[name].reshape(-1).view(torch.uint8)) for name in theirs)
    assert min(outcomes.values()) > 100, outcomes


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


def test_a_folder_is_prepared_for_new_weights_or_left_as_it_is(tmp_path):
    for name in (
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors.partial",
        INDEX_NAME,
        "notes.txt",
    ):
        (tmp_path / name).write_text(name)
    before = sorted(tmp_path.iterdir())
    (tmp_path / "consolidated.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"vLLM would load consolidated\.safetensors there too"):
        prepare_folder(tmp_path)
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / "model-x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model-x\.safetensors: is a folder"):
        prepare_folder(tmp_path)
    (tmp_path / "model-x.safetensors").rmdir()
    assert sorted(tmp_path.iterdir()) == before
    prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(CheckpointError, match=r"notes\.txt: cannot be written \(File exists\)"):
        prepare_folder(tmp_path / "notes.txt")


def test_a_file_that_cannot_be_published_leaves_nothing_on_the_disk(tmp_path):
    """A part of a file of gigabytes would keep a full disk full."""
    (tmp_path / "model.safetensors" / "somebody's").mkdir(parents=True)
    writer = FileWriter(tmp_path / "model.safetensors", SPECS)
    for name, tensor in tensors().items():
        writer.write(name, tensor)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        writer.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
