"""Claims about ``rlsync verify``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from rlsync.cli import main


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_verify_finds_one_flipped_bit_and_every_other_difference(tmp_path, capsys):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([float("nan"), 0.0]), "c": torch.ones(2)}
    first, same = checkpoint(tmp_path / "1", tensors), checkpoint(tmp_path / "2", tensors)
    assert main(["verify", first, same]) == 0
    assert capsys.readouterr().out.startswith("equal: 3 tensors")
    flipped = tensors["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    other = checkpoint(tmp_path / "3", {"a": flipped, "b": torch.tensor([float("nan"), -0.0]), "d": torch.ones(2)})
    assert main(["verify", first, other]) == 1
    out = capsys.readouterr().out
    assert "a: 1 of 12 elements differ" in out and "b: 1 of 2 elements differ" in out
    assert "c: only in the first" in out and "d: only in the second" in out


def test_verify_names_a_folder_without_weights(tmp_path, capsys):
    assert main(["verify", str(tmp_path), str(tmp_path)]) == 1
    assert "no *.safetensors file" in capsys.readouterr().err
