"""Claims about ``rlsync verify``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from rlsync.cli import main
from rlsync.cli.verify import report
from tests.ranks import free_port


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


def test_what_an_engine_holds_otherwise_is_told_by_worker_in_layer_order(tmp_path, capsys):
    found = [["model.layers.10.norm.weight", "model.layers.9.mlp.down_proj.#probe", "lm_head.weight"], []]
    assert report([1, 2, 3], tmp_path, "http://h:1", found) == 1
    assert capsys.readouterr().out.splitlines() == [
        "worker 0: lm_head.weight",
        "worker 0: model.layers.9.mlp.down_proj, by what it makes of a fixed input",
        "worker 0: model.layers.10.norm.weight",
        f"3 tensors of the engine differ: 3 tensors in {tmp_path}; 2 workers of http://h:1",
    ]
    assert report([1, 2, 3], tmp_path, "http://h:1", [[], []]) == 0
    assert capsys.readouterr().out == f"equal: 3 tensors in {tmp_path}; 2 workers of http://h:1\n"


def test_a_folder_is_compared_with_one_other_thing(tmp_path, capsys):
    for arguments in ([], ["x", "--engine", "http://127.0.0.1:1"]):
        assert main(["verify", str(tmp_path), *arguments]) == 1
        assert "with one other thing: a second folder, or --engine URL" in capsys.readouterr().err


def test_an_engine_that_is_not_there_is_named(tmp_path, capsys):
    folder = checkpoint(tmp_path / "m", {"a": torch.ones(2)})
    (tmp_path / "m/config.json").write_text("{}")
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["verify", folder, "--engine", url, "--timeout-s", "1"]) == 1
    assert f"engine {url}" in capsys.readouterr().err
