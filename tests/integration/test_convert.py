"""Conversions between Hugging Face files and Megatron's of every form and layout: bit for bit, on paper, and never half there."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rlsync import models
from rlsync.cli import main
from rlsync.convert import conversion
from rlsync.convert.conversion import convert
from rlsync.errors import CheckpointError, ConfigError, PlacementError
from tests.deadlines import HANG_S
from tests.integration.conversions import ConvertingProcess, request, run, run_rank, tensors
from tests.integration.test_convert_adapters import CASES, save_adapted
from tests.models import DENSE_FAMILIES, MOE_FAMILIES, add_further_layer, save_tiny_model, tiny_config
from tests.ranks import free_port, run_ranks
from tests.vision_models import FAMILIES as VISION_FAMILIES
from tests.vision_models import MOE_FAMILIES as VISION_MOE_FAMILIES
from tests.vision_models import save_tiny_vision_model, tiny_vision_config

RANKS = "tests.integration.convert_ranks"
SP = {"sequence_parallel": True}
DENSE = ({"tp_size": 2, "pp_size": 2}, {"pp_size": 2, "vpp_size": 2}, {"tp_size": 4, "first_stage_layers": 1, "pp_size": 2})
EXPERTS = (
    {"tp_size": 2, "pp_size": 2, "ep_size": 2},
    {"ep_size": 4, "etp_size": 2, "tp_size": 2},
    {"pp_size": 2, "vpp_size": 2, "ep_size": 2},
)
# Of adapters, of dense layers and experts.
ADAPTED = {"qwen3_moe": {"tp_size": 2, "pp_size": 2, "ep_size": 2}}
PICTURES = ({"tp_size": 2}, {"pp_size": 2}, {"tp_size": 4, "pp_size": 2})
WEIGHTS = ("*.safetensors", "iter_*/*/*.pt")


def shards(folder: Path) -> dict[str, dict]:
    return {path.parent.name: torch.load(path, weights_only=True) for path in sorted(Path(folder).glob("iter_*/*/model_optim_rng.pt"))}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        t.dtype == second[name].dtype and torch.equal(t, second[name]) for name, t in first.items()
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "hf", "qwen3", tied=True)


WITH_PICTURES = (*VISION_FAMILIES, *VISION_MOE_FAMILIES)


def test_no_family_is_left_out():
    made = [*(tiny_config(name) for name in (*DENSE_FAMILIES, *MOE_FAMILIES)), *(tiny_vision_config(name) for name in WITH_PICTURES)]
    assert {config.model_type for config in made} == {family.model_type for family in models.FAMILIES}


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        *((family, DENSE) for family in DENSE_FAMILIES),
        *((family, EXPERTS) for family in MOE_FAMILIES),
        *((family, PICTURES) for family in WITH_PICTURES),
    ],
)
def test_every_family_goes_through_three_layouts_and_torch_dist_and_back_bit_for_bit(family, layouts, tmp_path):
    """Hugging Face -> Megatron -> Megatron -> Megatron -> torch_dist -> Hugging Face; the files and what lies beside them are the first
    ones."""
    save = save_tiny_vision_model if layouts is PICTURES else save_tiny_model
    before = folder = save(tmp_path / "hf", family)
    for number, sizes in enumerate(layouts):
        made = convert(request(folder, tmp_path / str(number), "megatron", sizes, make_vocab_size_divisible_by=1 + 7 * number))
        assert made.progress.done_bytes == made.progress.total_bytes
        folder = tmp_path / str(number)
    convert(request(folder, tmp_path / "whole", "torch_dist", max_shard_bytes=2**18, flavour="te"))
    folder = tmp_path / "whole"
    # Files of this family exist in two forms, and shards do not say which they came from.
    convert(request(folder, tmp_path / "back", "hf", model_folder=before if family in VISION_MOE_FAMILIES else None))
    assert same(tensors(before), tensors(tmp_path / "back"))
    names = {path.name for path in before.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    assert all((tmp_path / "back" / name).read_bytes() == (before / name).read_bytes() for name in names if name.endswith(".json"))


@pytest.mark.parametrize("form", ["megatron", "torch_dist"])
def test_layers_that_predict_further_tokens_come_back_from_the_folder_that_has_them(form, tmp_path):
    """No shard has them; without that folder the way back is refused, and nothing is written."""
    before = add_further_layer(save_tiny_model(tmp_path / "hf", "glm4_moe", num_hidden_layers=2))
    convert(request(before, tmp_path / "shards", form, {"ep_size": 2, "dp_size": 2} if form == "megatron" else None))
    with pytest.raises(CheckpointError, match=r"shards hold no model\.layers\.2\.\*, which the model has; name a folder"):
        convert(request(tmp_path / "shards", tmp_path / "no", "hf"))
    convert(request(tmp_path / "shards", tmp_path / "back", "hf", model_folder=before))
    found = tensors(tmp_path / "back")
    assert same(tensors(before), found) and sum(name.startswith("model.layers.2.") for name in found) == 4
    # A cast is of what is trained: the others stay as they were, whatever they are.
    convert(request(before, tmp_path / "half", "hf", dtype="bfloat16"))
    half, further = tensors(tmp_path / "half"), {name: t for name, t in found.items() if name.startswith("model.layers.2.")}
    assert same({name: half[name] for name in further}, further) and half["lm_head.weight"].dtype == torch.bfloat16
    assert not (tmp_path / "no").exists()


def test_files_are_those_of_megatron_in_every_form(tmp_path):
    """On real ranks: what rlsync saves, what Megatron-LM saves, and Megatron's dist_checkpointing; and ranks load what was converted."""
    wanted = (
        ("llama", False, {"tp_size": 2, "pp_size": 2, "vpp_size": 2}, None, {}),
        ("qwen3", True, {"tp_size": 2, "pp_size": 2}, None, {"metadata": {"singleton_local_shards": True}, "divisor": 8}),
        ("qwen3_moe", False, {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}, SP, {}),
        ("glm4_moe", False, {"dp_size": 4, "ep_size": 4}, None, {"metadata": {"singleton_local_shards": True}}),
    )
    cases = []
    for family, tied, topology, overrides, more in wanted:
        folder = save_tiny_model(tmp_path / family / "hf", family, tied=tied)
        converted = tmp_path / family / "converted"
        convert(request(folder, converted, "megatron", topology, make_vocab_size_divisible_by=more.get("divisor", 1)))
        out = str(tmp_path / family)
        convert(request(folder, tmp_path / family / "whole", "torch_dist", flavour="local", max_shard_bytes=2**17))
        cases.append({"folder": str(folder), "converted": str(converted), "topology": topology, "overrides": overrides, "out": out, **more})
    adapted = [_adapted(tmp_path / f"adapted {family}", family, topology) for family, topology in ADAPTED.items()]
    run_ranks(4, RANKS, "write_and_read", cases=cases, adapted=adapted)
    assert all(len(list((tmp_path / family / "whole").rglob("*.distcp"))) > 1 for family, *_ in wanted)
    for case in adapted:
        actor, base = Path(case["out"]), {"adapter": Path(case["adapter"]), "merge_lora": True}
        convert(request(actor, tmp_path / case["family"] / "adapter", "hf"))
        assert same(tensors(tmp_path / case["family"] / "adapter"), tensors(case["adapter"]))
        convert(request(case["folder"], tmp_path / case["family"] / "merged", "hf", **base))
        # A run's checkpoint says which model its adapters are of.
        convert(request(actor, tmp_path / case["family"] / "anew", "megatron", {"ep_size": 2}, adapter=Path(case["adapter"])))
        assert same(tensors(tmp_path / case["family"] / "merged"), tensors(actor / "hf_model")), "not what ranks merge"
        (sums,) = actor.glob("iter_*/checksums.json")
        file, begin, _, crc = next(one for one in json.loads(sums.read_text()) if one[0].endswith("model_optim_rng.pt"))
        content = bytearray((sums.parent / file).read_bytes())
        content[begin] ^= 1
        (sums.parent / file).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"bytes {begin} to .* and were written with {crc:08x}"):
            convert(request(actor, tmp_path / case["family"] / "damaged", "hf"))
    for case in cases:
        out = Path(case["out"])
        converted, ours = shards(case["converted"]), shards(out / "ours")
        assert converted.keys() == ours.keys()
        for name, state in converted.items():
            assert state["topology"] == ours[name]["topology"] and state["options"] == ours[name]["options"], name
            chunks = [key for key in ours[name] if key.startswith("model")]
            assert [key for key in state if key.startswith("model")] == chunks
            assert all(same(state[key], ours[name][key]) for key in chunks), (case["topology"], name)
        for form in ("ours", "legacy", "torch_dist"):
            made = convert(request(out / form, out / f"{form}-hf", "hf", model_folder=Path(case["folder"])))
            assert made.source.step == 5
            assert same(tensors(out / f"{form}-hf"), tensors(case["folder"])), (case["topology"], form)


def _adapted(folder: Path, family: str, topology: dict[str, int]) -> dict[str, Any]:
    """A base, PEFT's adapters of it with a tensor for each factor, and their shards as converted."""
    save_adapted(folder, family, CASES[family][0])
    convert(request(folder / "adapter", folder / "factors", "hf"))
    convert(request(folder / "adapter", folder / "converted", "megatron", topology))
    paths = {"adapter": str(folder / "factors"), "converted": str(folder / "converted"), "out": str(folder / "out")}
    return {"family": family, "folder": str(folder), "topology": topology, **paths}


def test_a_comparison_names_the_first_layer_that_differs_and_a_converted_model_computes_what_it_did(tiny, tmp_path):
    """The control is one projection of layer 2, changed in the weights that Megatron loads."""
    pictures = save_tiny_vision_model(tmp_path / "pictures", "qwen3_vl")
    convert(request(tiny, tmp_path / "shards", "megatron", {"tp_size": 2, "pp_size": 2}))
    changed = Path(shutil.copytree(tiny, tmp_path / "changed"))
    weights = tensors(tiny)
    weights["model.layers.2.self_attn.q_proj.weight"] += 0.01
    (changed / "model.safetensors").unlink()
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    folders = {"folder": tiny, "pictures": pictures, "changed": changed, "shards": tmp_path / "shards", "out": tmp_path / "converted"}
    run_ranks(1, RANKS, "compare_precision", **{name: str(path) for name, path in folders.items()})


def _written(working: Path, target: Path, total: int) -> int:
    """Bytes that a conversion has on the disk, also while it gives its folder the name."""
    with suppress(FileNotFoundError):
        found = conversion.Journal(working).done_bytes
        if not target.exists():
            return found
    return total


KILLS = (("megatron", 8), ("hf", 6), ("torch_dist", 6))


@pytest.mark.parametrize(("form", "most"), KILLS, ids=[form for form, _ in KILLS])
def test_a_conversion_killed_at_random_goes_on_and_is_there_when_it_is_whole(form, most, tmp_path):
    """Twenty kills in all: the folder is not there, or it is right; no file beside it loads; what the disk has is not copied again."""
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe", num_hidden_layers=2)
    sizes = {"tp_size": 2, "ep_size": 2}
    if form != "megatron":
        convert(request(folder, tmp_path / "shards", "megatron", sizes))
        folder, sizes = tmp_path / "shards", None
    options = {"bucket_bytes": 1, **({} if form == "megatron" else {"max_shard_bytes": 2**18})}
    total = convert(request(folder, tmp_path / "whole", form, sizes, **options)).progress.total_bytes
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert sum(path.suffix in (".pt", ".safetensors", ".distcp") for path in files) > 1
    chance, kills, resumed = random.Random(3), 0, 0
    for number in itertools.count():
        if kills >= most:
            break
        asked = request(folder, tmp_path / f"killed-{number}", form, sizes, **options)
        working, done = tmp_path / f".killed-{number}.conversion", 0
        while not asked.target.exists():
            process = ConvertingProcess(target=run, args=(asked,))
            process.start()
            if kills < most:
                # By what is on the disk, so that no machine is too slow or too fast for it; a few at the very end, or behind it.
                wanted = min(total, done + chance.random() * total / 3)
                while (now := _written(working, asked.target, total)) < wanted and process.is_alive():
                    assert now >= done, "something that the disk had is copied again"
                    time.sleep(0.001)
                process.join(chance.random() * (0.2 if wanted == total else 0.02))
            else:
                process.join()
            kills += process.exitcode is None
            process.kill()
            process.join()
            if not asked.target.exists():
                before, done = done, conversion.Journal(working).done_bytes
                # It is written when all else is there: a kill between it and the rename leaves a folder that loads and is right.
                is_loadable = any((working / "folder").glob("config.json" if form == "hf" else "latest_*"))
                assert not is_loadable or done == total, "it would load, and is not whole"
                assert before <= done <= total, "something that the disk had was lost"
                resumed += done > before > 0
        shutil.rmtree(working, ignore_errors=True)  # killed behind the rename
        for path in files:
            assert (asked.target / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
    assert resumed, "no conversion went on where one was killed"


def test_processes_share_the_files_and_what_one_leaves_the_next_ones_end(tiny, tmp_path, monkeypatch):
    """One of two is killed: the other says so, and nothing is there. Three go on with what the disk has, and make the files of one."""
    sizes = {"tp_size": 2, "pp_size": 2}
    expected = convert(request(tiny, tmp_path / "whole", "megatron", sizes, bucket_bytes=1))
    asked, working = request(tiny, tmp_path / "shared", "megatron", sizes, bucket_bytes=1), tmp_path / ".shared.conversion"

    def start(world: int, silence_s: float, dies: int | None = None) -> list[ConvertingProcess]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        ranks = [ConvertingProcess(target=run_rank, args=(asked, silence_s, rank == dies)) for rank in range(world)]
        for rank, process in enumerate(ranks):
            for name, value in (address | {"RANK": str(rank)}).items():
                monkeypatch.setenv(name, value)
            process.start()
        return ranks

    first, second = start(2, silence_s=6.0, dies=1)
    for process in (second, first):
        process.join(HANG_S)
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == 1 and not asked.target.exists(), "the first one did not notice, or called it complete"
    done = conversion.Journal(working).done_bytes
    assert 0 < done <= expected.progress.total_bytes
    ranks = start(3, silence_s=HANG_S)
    for process in ranks:
        process.join(HANG_S)
    assert [process.exitcode for process in ranks] == [0, 0, 0] and not working.exists()
    for path in (path for path in (tmp_path / "whole").rglob("*") if path.is_file()):
        assert (asked.target / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path


def test_dtypes_are_cast_as_torch_does(tiny, tmp_path):
    convert(request(tiny, tmp_path / "one", "megatron", {"pp_size": 2}, dtype="bfloat16"))
    for path in (tmp_path / "one").rglob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, "a checksum in it is none of its content"
    convert(request(tmp_path / "one", tmp_path / "back", "hf"))
    assert same(tensors(tmp_path / "back"), {name: t.to(torch.bfloat16) for name, t in tensors(tiny).items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_command_chooses_the_form_and_says_what_it_made(tiny, tmp_path, capsys):
    assert main(["convert", str(tiny), str(tmp_path / "m"), "--tp", "2", "--spec", "te"]) == 0
    said = capsys.readouterr().out
    assert "Qwen3ForCausalLM from Hugging Face files in" in said and "to Megatron (tp 2), float32, 2 files of weights" in said
    assert "self_attention.linear_qkv.layer_norm_weight" in "".join(shards(tmp_path / "m")["mp_rank_01"]["model"])
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "hf"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["from"]["form"] == "megatron" and said["to"]["form"] == "hf" and said["to"]["dtype"] == "float32"
    assert main(["verify", str(tiny), str(tmp_path / "hf")]) == 0
    refused = {
        ("--to", "hf", "--tp", "2"): "Hugging Face files have no layout",
        ("--to", "hf", "--make-vocab-size-divisible-by", "64"): "Hugging Face files have no layout",
        ("--tp", "2", "--max-shard-bytes", "9"): "--max-shard-bytes is of hf and torch_dist",
        ("--tp", "3"): "4 attention heads cannot be divided by a tensor axis of 3",
        ("--workers", "0"): "--workers is 0; it must be at least 1",
        ("--ep", "2"): "Qwen3ForCausalLM has no experts, so it must be 1",
        ("--pp", "3"): "4 layers cannot be split over pp_size 3",
    }
    for options, words in refused.items():
        assert main(["convert", str(tiny), str(tmp_path / "no"), *options]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "no").exists(), options


def test_a_comparison_of_what_is_not_there_is_refused_before_anything_is_loaded(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.json").write_text("[[1, 2, 3], [4, 5, 6]]")
    rows = ("--tokens", str(tmp_path / "rows.json"))
    convert(request(tiny, tmp_path / "shards", "megatron", {"tp_size": 2}))
    refused = {
        (str(tmp_path / "shards"),): "has no weights that transformers loads",
        (str(tiny), "--prompt-length", "32"): "--prompt-length is 32, of rows of 32 tokens",
        (str(tiny), "--prompt-length", "-1"): "--prompt-length is -1",
        (str(tiny), "--length", "4", "--prompt-length", "4"): "of rows of 4 tokens; it must be from 0 to 3",
        (str(tiny), *rows, "--prompt-length", "3"): "of rows of 3 tokens",
        (str(tiny), *rows, "--rows", "3"): "--rows are of random rows",
        (str(tiny), "--tolerance", "-1"): "--tolerance is -1.0; it must be at least 0",
        (str(tiny), "--tolerance", "nan"): "--tolerance is nan",
        (str(tiny), "--rows", "0"): "--rows is 0; it must be at least 1",
        (str(tiny), "--seed", str(2**64)): "it must be a number of 64 bits",
        (str(tiny), "--tokens", str(tmp_path / "null.json")): "not a JSON list of token ids",
        (str(tiny), "--weights", str(tmp_path / "shards" / "nowhere")): "nowhere: no such folder",
        (str(tmp_path / "cut"),): "model.safetensors: truncated safetensors file",
        (str(tmp_path / "cut"), "--weights", str(tmp_path / "shards")): "model.safetensors: truncated safetensors file",
    }
    (tmp_path / "null.json").write_text("null")
    cut = shutil.copytree(tiny, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for arguments, words in refused.items():
        assert main(["compare", *arguments]) == 1 and words in (said := capsys.readouterr().err), (arguments, said)


def test_folders_may_be_called_anything_and_be_links(tiny, tmp_path, capsys):
    """A Hugging Face folder by the name of one of Megatron's is still one, and a conversion to a link is where the link leads."""
    for name in ("release-1", "iter_5_hf"):
        shutil.copytree(tiny, tmp_path / name)
        assert convert(request(tmp_path / name, tmp_path / f"of {name}", "megatron", {"tp_size": 2})).source.form == "hf"
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "absent"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / "disk" / name)
        convert(request(tiny, tmp_path / f"link to {name}", "hf"))
        assert same(tensors(tmp_path / "disk" / name), tensors(tiny)) and (tmp_path / f"link to {name}").is_symlink()
    assert not list(tmp_path.glob("**/.*.conversion"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main(["convert", str(tiny), str(tmp_path / "loop")]) == 1 and "loop: it leads nowhere" in capsys.readouterr().err
    assert main(["convert", str(tiny), "/dev/shm"]) == 1 and "/dev/shm is where a disk is mounted" in capsys.readouterr().err


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    convert(request(tiny, whole, "megatron", {"tp_size": 2, "pp_size": 2}))
    file = Path("iter_0000000/mp_rank_00_000/model_optim_rng.pt")

    def broken(name: str, change) -> Path:
        folder = Path(shutil.copytree(whole, tmp_path / name))
        if (result := change(folder)) is not None:
            torch.save(result, folder / file)
        return folder

    state = torch.load(whole / file, weights_only=True)
    model = state["model"]
    first = "decoder.layers.0.mlp.linear_fc1.weight"

    def cut(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:-5000])

    cases = {
        "a rank": (lambda f: shutil.rmtree(f / "iter_0000000" / "mp_rank_01_001"), "missing or unexpected: mp_rank_01_001"),
        "too many": (lambda f: shutil.copytree(f / file.parent, f / "iter_0000000" / "mp_rank_02_000"), "unexpected: mp_rank_02_000"),
        "a parameter": (lambda f: {**state, "model": {k: v for k, v in model.items() if k != first}}, f"{first} is missing"),
        "one more": (lambda f: {**state, "model": {**model, "adapter.weight": torch.ones(2, 3)}}, "adapter.weight (2, 3) is unexpected"),
        "a shape": (lambda f: {**state, "model": {**model, first: model[first][1:].clone()}}, "has shape (159, 96), expected (160, 96)"),
        "another layout": (lambda f: {**state, "topology": {**state["topology"], "tp_size": 1}}, "whose folders are 2"),
        "no layout": (lambda f: {k: v for k, v in state.items() if k != "topology"}, "neither rlsync's topology nor Megatron-LM's args"),
        "transposed": (lambda f: {**state, "model": {**model, first: model[first].t()}}, "has strides (1, 96); save it contiguous"),
        "negated": (lambda f: {**state, "model": {**model, first: torch._neg_view(model[first])}}, "a tensor (160, 96) is a negated view"),
        "cut": (cut, "is not a file of torch.save, or is truncated"),
        "no tracker": (lambda f: (f / "latest_checkpointed_iteration.txt").unlink(), "cut short has none either"),
        "no model": (lambda f: (f / "config.json").unlink(), "name its Hugging Face folder by --model"),
    }
    for name, (change, words) in cases.items():
        with pytest.raises((CheckpointError, ConfigError, PlacementError), match=re.escape(words)):
            convert(request(broken(name, lambda f, c=change: r if isinstance(r := c(f), dict) else None), tmp_path / "out", "hf"))
    with pytest.raises(ConfigError, match="etp_size is 2; Qwen3ForCausalLM has no experts, so it must be 1"):
        convert(request(tiny, tmp_path / "out", "megatron", {"etp_size": 2}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(CheckpointError, match="is there and not an empty folder"):
        convert(request(tiny, tmp_path / "full", "megatron"))
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 2**20))
    with pytest.raises(CheckpointError, match=r"0\.0 GiB free, and the conversion writes 0\.1 GiB"):
        convert(request(tiny, tmp_path / "out", "megatron"))
    assert not (tmp_path / "out").exists()


def test_what_a_rank_lacks_is_named_by_its_layer_and_expert_of_the_whole_model(tmp_path):
    """Of the last stage and the second expert rank, in whose file both are counted from 0."""
    folder = save_tiny_model(tmp_path / "hf", "qwen3_moe")
    convert(request(folder, tmp_path / "shards", "megatron", {"pp_size": 2, "ep_size": 2}))
    (path,) = tmp_path.glob("shards/iter_*/mp_rank_00_001_001/model_optim_rng.pt")
    state = torch.load(path, weights_only=True)
    del state["model"]["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"]
    torch.save(state, path)
    whole, there = (f"decoder.layers.{layer}.mlp.experts.local_experts.{n}.linear_fc2.weight" for layer, n in ((3, 7), (1, 3)))
    with pytest.raises(PlacementError, match=re.escape(f"{whole} ({there} there) is missing")):
        convert(request(tmp_path / "shards", tmp_path / "back", "hf"))


def test_nothing_of_a_file_is_run(tiny, tmp_path):
    """A pickle that would make a file when it is loaded, where Megatron-LM has its arguments; loaded as torch does, it makes it."""
    convert(request(tiny, tmp_path / "m", "megatron"))
    (path,) = (tmp_path / "m").rglob("*.pt")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "args": _Runs(str(tmp_path / "run"))}, path)
    convert(request(tmp_path / "m", tmp_path / "hf", "hf"))
    assert same(tensors(tmp_path / "hf"), tensors(tiny)) and not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "run").exists(), "the control: the pickle does nothing"


class _Runs:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._path,)


def test_a_stopped_conversion_does_not_go_on_with_other_weights_or_beside_another(tiny, tmp_path, monkeypatch):
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    asked = request(source, tmp_path / "out", "megatron", {"tp_size": 2}, bucket_bytes=1)

    def stop(progress) -> None:
        if progress.done_bytes > progress.total_bytes // 2:
            with pytest.raises(CheckpointError, match="is running; wait for it, or stop it"):
                convert(asked)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(asked, report=stop)
    assert conversion.Journal(tmp_path / ".out.conversion").done_bytes and not asked.target.exists()
    (source / "model.safetensors").unlink()
    save_file({name: t + 1 for name, t in tensors(tiny).items()}, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(asked).progress.resumed_bytes == 0
    convert(request(tmp_path / "out", tmp_path / "back", "hf"))
    assert same(tensors(tmp_path / "back"), tensors(source))


@pytest.mark.parametrize("damage", ["removed", "cut", "journal of the first process removed", "journal written over"])
def test_a_stopped_conversion_whose_files_were_lost_begins_anew(tiny, tmp_path, damage):
    """A folder without the file, or with an empty one, was given its name."""
    asked, working = request(tiny, tmp_path / "out", "hf", max_shard_bytes=200_000, bucket_bytes=1), tmp_path / ".out.conversion"

    def stop(progress) -> None:
        if progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(asked, report=stop)
    assert not asked.target.exists()
    file = min((working / "folder").glob("*.safetensors"))
    if damage == "removed":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, 8)
    elif damage == "journal written over":
        with (working / "journal").open("ab") as journal:
            journal.write(b"made 0 \xff .\n")
    else:
        # What others have done is told by theirs.
        lines = (working / "journal").read_text()
        (working / "journal").unlink()
        (working / "journal.1").write_text("\n".join(line for line in lines.splitlines() if line.startswith("bucket")))
    assert convert(asked).progress.resumed_bytes == 0
    assert same(tensors(asked.target), tensors(tiny))
