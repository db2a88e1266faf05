"""Claims about ``rlsync verify``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlsync.cli import main, verify
from tests.deadlines import ended_before
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
    assert "a: 1 of 12 elements differ by at most" in out and "b: 1 of 2 elements differ by at most 0, 0 on average, first at [1]" in out
    assert "c: only in the first" in out and "d: only in the second" in out


def test_verify_says_how_far_tensors_are_from_each_other(tmp_path, capsys):
    """A dtype of its own is told as such, with whether the values agree; shapes are told; numbers and none are kept apart."""
    first = {
        "cast": torch.tensor([0.5, 1.5]),
        "cut": torch.tensor([1.0, 1.0 + 2**-20]),
        "far": torch.zeros(3, 4),
        "nan": torch.tensor([[1.0, float("nan"), 3.0, float("inf")]]),
        "fp8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        "shape": torch.ones(2, 3),
    }
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["cast"], second["cut"] = first["cast"].bfloat16(), first["cut"].bfloat16()
    second["far"][1, 2], second["far"][2, 3] = 0.5, -1.0
    second["nan"][0, 0], second["nan"][0, 2] = float("nan"), 3.5
    second["fp8"] = torch.tensor([1.0, 4.0]).to(torch.float8_e4m3fn)
    second["shape"] = torch.ones(3, 2)
    folders = checkpoint(tmp_path / "1", first), checkpoint(tmp_path / "2", second)
    assert main(["verify", *folders]) == 1
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "cast: [2] float32 against [2] bfloat16, the values are equal",
        "cut: [2] float32 against [2] bfloat16, 1 of 2 elements differ by at most 9.54e-07, 4.77e-07 on average, first at [1]",
        "far: 2 of 12 elements differ by at most 1, 0.125 on average, first at [1, 2]",
        "fp8: 1 of 2 elements differ by at most 2, 1 on average, first at [1]",
        "nan: 2 of 4 elements differ by at most 0.5, 0.125 on average, 1 of them infinite or no number, first at [0, 0]",
        "shape: [2, 3] float32 against [3, 2] float32",
    ]
    assert main(["verify", *folders, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "different" and said["first"] == {"folder": folders[0], "tensors": 6}
    (far,) = (row for row in said["differences"] if row["tensor"] == "far")
    assert far == {
        "tensor": "far", "kind": "values", "first": {"dtype": "float32", "shape": [3, 4]}, "second": {"dtype": "float32", "shape": [3, 4]},
        "elements": 2, "size": 12, "max_abs": 1.0, "mean_abs": 0.125, "not_finite": 0, "first_index": [1, 2],
    }  # fmt: skip
    assert main(["verify", folders[0], folders[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "equal"


def test_a_difference_is_found_wherever_the_comparison_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_CHUNK", 5)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 3, 2, generator=generator)
    for flat in range(first.numel()):
        second = first.clone()
        second.view(-1)[flat] += 1.0
        found = verify.distance(first, second)
        assert found["elements"] == 1 and first[found["first_index"]] != second[found["first_index"]]
        assert found["mean_abs"] == pytest.approx(found["max_abs"] / 24) and found["max_abs"] == pytest.approx(1.0)
    assert verify.distance(first, first.clone())["elements"] == 0


def test_what_cannot_be_read_is_told_from_what_differs(tmp_path, capsys):
    folder = checkpoint(tmp_path / "m", {"a": torch.ones(2)})
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/model.safetensors").write_bytes((tmp_path / "m/model.safetensors").read_bytes()[:-1])
    for other, said in ((tmp_path, "no *.safetensors file"), (tmp_path / "nowhere", "no such folder"), (tmp_path / "cut", "truncated")):
        assert main(["verify", folder, str(other)]) == 2
        assert said in capsys.readouterr().err
        assert main(["verify", folder, str(other), "--json"]) == 2
        answer = json.loads(capsys.readouterr().out)
        assert answer["verdict"] == "unreadable" and said in answer["error"]


def test_a_step_folder_says_where_its_model_is(tmp_path, capsys):
    (tmp_path / "global_step_10/actor").mkdir(parents=True)
    folder = checkpoint(tmp_path / "global_step_10/actor/hf_model", {"a": torch.ones(2)})
    assert main(["verify", str(tmp_path / "global_step_10"), folder]) == 2
    assert f"did you mean {folder}?" in capsys.readouterr().err
    assert main(["verify", folder, folder]) == 0


def test_what_an_engine_holds_otherwise_is_told_by_worker_in_layer_order(tmp_path):
    found = [["model.layers.10.norm.weight", "model.layers.9.mlp.down_proj.#probe", "lm_head.weight"], []]
    lines, verdict = verify.report([1, 2, 3], tmp_path, "http://h:1", found)
    assert lines == [
        "worker 0: lm_head.weight",
        "worker 0: model.layers.9.mlp.down_proj, by what it makes of a fixed input",
        "worker 0: model.layers.10.norm.weight",
        f"3 tensors of the engine differ: 3 tensors in {tmp_path}; 2 workers of http://h:1",
    ]
    assert verdict["verdict"] == "different" and verdict["differences"][0] == {"worker": 0, "tensor": "lm_head.weight"}
    lines, verdict = verify.report([1, 2, 3], tmp_path, "http://h:1", [[], []])
    assert lines == [f"equal: 3 tensors in {tmp_path}; 2 workers of http://h:1"] and verdict["verdict"] == "equal"


def test_a_folder_is_compared_with_one_other_thing(tmp_path, capsys):
    for arguments in ([], ["x", "--engine", "http://127.0.0.1:1"]):
        assert main(["verify", str(tmp_path), *arguments]) == 2
        assert "with one other thing: a second folder, or --engine URL" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "said"), [("127.0.0.1", "Connection refused"), ("no-such-host.invalid", "unknown host name")])
def test_an_engine_that_is_not_there_is_named_at_once(host, said, tmp_path, capsys):
    folder = checkpoint(tmp_path / "m", {"a": torch.ones(2)})
    (tmp_path / "m/config.json").write_text("{}")
    url = f"http://{host}:{free_port()}"
    # The server of an engine that starts meanwhile is waited for as long.
    with ended_before(120):
        assert main(["verify", folder, "--engine", url]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: engine {url} cannot be reached for GET /version: {said}") and error.count(url) == 1


def test_a_time_limit_is_positive(tmp_path, capsys):
    for value in ("-1", "0", "nan", "inf"):
        assert main(["verify", str(tmp_path), "--engine", "http://127.0.0.1:1", f"--timeout-s={value}"]) == 2
        assert "--timeout-s is" in capsys.readouterr().err
