"""Adapters on paper: merged into weights on their way as PEFT merges them, and from PEFT's folder to Megatron's shards and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlsync.cli import main
from rlsync.convert.conversion import convert
from rlsync.errors import ConfigError
from tests.integration.conversions import request, tensors
from tests.models import save_tiny_model, tiny_model
from tests.vision_models import save_tiny_vision_model, tiny_vision_model

# Two of three packed projections, rslora, one layer alone; experts as PEFT stacks them; the language model of one with pictures.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, {"tp_size": 2, "pp_size": 2, "vpp_size": 2}),
    "qwen2": ({"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj", "up_proj", "down_proj"]}, {"tp_size": 4}),
    "glm4": ({"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.[12]\..*proj"}, {"tp_size": 2, "pp_size": 2}),
    "qwen3_moe": (
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"ep_size": 4, "etp_size": 2, "tp_size": 2},
    ),
    "mixtral": ({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}, {"tp_size": 2}),
    "qwen3": ({"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "embed_tokens", "o_proj"]}, {"tp_size": 2}),
    "qwen2_5_vl": ({"r": 4, "lora_alpha": 8, "target_modules": r".*language_model.*((q|o)_proj|embed_tokens)"}, {"tp_size": 2}),
}
# Of which PEFT has one tensor for all experts, and folders of ours one for each; or other names for routers.
STACKED = frozenset({"qwen3_moe", "mixtral"})


def save_adapted(folder: Path, family: str, spec: dict[str, Any]) -> Path:
    """A base in ``folder``, PEFT's adapters of it in ``adapter``, and in ``merged`` what PEFT makes of both."""
    import peft

    save, make = (save_tiny_vision_model, tiny_vision_model) if "vl" in family else (save_tiny_model, tiny_model)
    save(folder, family)
    model = peft.get_peft_model(make(family), peft.LoraConfig(**spec))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, factor in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.05)
    model.save_pretrained(folder / "adapter")
    save_as_base(model.merge_and_unload(), folder / "merged")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}))
    return folder


def save_as_base(model: Any, folder: Path) -> None:
    """As the base was saved: of models with pictures transformers would write other names."""
    if hasattr(model.config, "vision_config"):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(folder)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapted")
    return {family: save_adapted(root / family, family, spec) for family, (spec, _) in CASES.items()}


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    return max((t.double() - second[name].double()).abs().max().item() for name, t in first.items())


@pytest.mark.parametrize("family", CASES)
def test_adapters_are_merged_as_peft_does_into_files_of_any_form(adapted, tmp_path, family):
    """From Hugging Face files, and from shards into shards of another layout; in fp32, with the sum rounded once."""
    base, sizes = adapted[family], CASES[family][1]
    merging = {"adapter": base / "adapter", "merge_lora": True}
    convert(request(base, tmp_path / "merged", "hf", **merging))
    found, wanted = tensors(tmp_path / "merged"), tensors(base / "merged")
    assert apart(found, wanted) < 1e-6 and apart(tensors(base), wanted) > 1e-3
    convert(request(base, tmp_path / "shards", "megatron", sizes))
    convert(request(tmp_path / "shards", tmp_path / "other", "megatron", {"tp_size": 2}, **merging))
    convert(request(tmp_path / "other", tmp_path / "back", "hf"))
    assert apart(tensors(tmp_path / "back"), found) < 1e-6
    convert(request(base, tmp_path / "half", "hf", dtype="bfloat16", **merging))
    half = tensors(tmp_path / "half")
    assert all(torch.equal(t, found[name].bfloat16()) for name, t in half.items())


@pytest.mark.parametrize("family", CASES)
def test_adapters_go_to_shards_of_two_layouts_and_back_bit_for_bit(adapted, tmp_path, family):
    """And what came back is read by PEFT, which makes the same weights of it where it has words for it."""
    base, sizes = adapted[family], CASES[family][1]
    convert(request(base / "adapter", tmp_path / "first", "megatron", sizes))
    convert(request(tmp_path / "first", tmp_path / "second", "megatron", {"pp_size": 2}))
    made = convert(request(tmp_path / "second", tmp_path / "back", "hf"))
    assert made.source.adapters is not None and {path.name for path in (tmp_path / "back").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    convert(request(base / "adapter", tmp_path / "again", "hf"))
    found, wanted = tensors(tmp_path / "back"), tensors(tmp_path / "again")
    assert apart(found, wanted) == 0.0
    if family in STACKED:
        convert(request(base, tmp_path / "merged", "hf", adapter=tmp_path / "back", merge_lora=True))
        assert apart(tensors(tmp_path / "merged"), tensors(base / "merged")) < 1e-6
    else:
        assert apart(found, {name: t for name, t in tensors(base / "adapter").items() if ".base_layer." not in name}) == 0.0
    import peft

    model = (tiny_vision_model if "vl" in family else tiny_model)(family)
    save_as_base(peft.PeftModel.from_pretrained(model, tmp_path / "back").merge_and_unload(), tmp_path / "by peft")
    assert apart(tensors(tmp_path / "by peft"), tensors(base / "merged")) <= (1e-6 if family in STACKED else 0.0)


def test_names_that_nothing_is_called_are_passed_over_in_a_folder_as_peft_does(adapted, tmp_path):
    """It writes some itself: of ``.*_proj`` and a Mixtral the names of layers that other families have. A folder whose names match nothing
    is refused."""
    folder = Path(shutil.copytree(adapted["qwen2"] / "adapter", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "gate_up_proj"]}))
    convert(request(adapted["qwen2"], tmp_path / "merged", "hf", adapter=folder, merge_lora=True))
    assert apart(tensors(tmp_path / "merged"), tensors(adapted["qwen2"] / "merged")) < 1e-6
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["gate_up_proj"]}))
    with pytest.raises(ConfigError, match="target_modules gate_up_proj match no linear layer of Qwen2ForCausalLM"):
        convert(request(adapted["qwen2"], tmp_path / "none", "hf", adapter=folder, merge_lora=True))


def test_weights_that_peft_saved_beside_adapters_are_the_bases(adapted, tmp_path):
    """A base that is another is refused, and so are copies that nothing is there to compare with."""
    folder = Path(shutil.copytree(adapted["qwen3"] / "adapter", tmp_path / "adapter"))
    saved = tensors(folder)
    copy = "base_model.model.lm_head.base_layer.weight"
    assert torch.equal(saved[copy], tensors(adapted["qwen3"])["lm_head.weight"])
    save_file({**saved, copy: saved[copy].bfloat16()}, folder / "adapter_model.safetensors")
    convert(request(adapted["qwen3"], tmp_path / "rounded", "hf", adapter=folder, merge_lora=True))
    save_file({**saved, copy: saved[copy] + 0.01}, folder / "adapter_model.safetensors")
    for number, options in enumerate([{"merge_lora": True}, {}]):
        with pytest.raises(ConfigError, match=r"holds another lm_head\.weight beside its adapters"):
            convert(request(adapted["qwen3"], tmp_path / f"{number}", "hf", adapter=folder, **options))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((adapted["qwen3"] / "config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(alone)})
    )
    with pytest.raises(ConfigError, match="no base to compare them with"):
        convert(request(folder, tmp_path / "none", "hf"))


def test_adapters_are_merged_into_the_weights_that_they_name(adapted, tmp_path, capsys):
    """Others of the same shapes are refused where the named ones are here, and a warning says where only a name is known."""
    base, config = adapted["llama"], (adapted["llama"] / "adapter" / "adapter_config.json").read_text()
    folder = Path(shutil.copytree(base / "adapter", tmp_path / "adapter"))
    merge = ["--adapter", str(folder), "--merge-lora"]
    for name, change in (("copy", 0.0), ("other", 0.01)):
        shutil.copytree(base, tmp_path / name, ignore=shutil.ignore_patterns("adapter", "merged"))
        save_file({tensor: (t + change).bfloat16() for tensor, t in tensors(base).items()}, tmp_path / name / "model.safetensors")
    assert main(["convert", str(tmp_path / "copy"), str(tmp_path / "of copy"), *merge]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "other"), str(tmp_path / "no"), *merge]) == 1
    refusal = f"says that it adapts {base}, where model.layers.0.self_attn.k_proj.weight is another than in {tmp_path / 'other'}"
    assert refusal in capsys.readouterr().err and not (tmp_path / "no").exists()
    for number, (name, words) in enumerate((("some-lab/other", ""), ("some-lab/llama", "that they are adapters of some-lab/llama:"))):
        (folder / "adapter_config.json").write_text(json.dumps(json.loads(config) | {"base_model_name_or_path": name}))
        assert main(["convert", str(tmp_path / "other"), str(tmp_path / f"{number}"), *merge, "--json"]) == 0
        (warning,) = json.loads(capsys.readouterr().out)["warnings"] or [""]
        assert words in warning and bool(words) == bool(warning)


def test_several_workers_merge_into_the_same_files(adapted, tmp_path):
    base = adapted["llama"]
    asked = {"dtype": "bfloat16", "adapter": base / "adapter", "merge_lora": True}
    convert(request(base, tmp_path / "one", "megatron", {"pp_size": 2}, **asked))
    convert(request(base, tmp_path / "two", "megatron", {"pp_size": 2}, bucket_bytes=10_000, **asked), workers=2)
    for path in (path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes(), path


def test_the_command_takes_adapters_and_says_what_does_not_fit(adapted, tmp_path, capsys):
    base, adapter = str(adapted["llama"]), str(adapted["llama"] / "adapter")
    assert main(["convert", base, str(tmp_path / "merged"), "--adapter", adapter, "--merge-lora"]) == 0
    assert main(["convert", adapter, str(tmp_path / "same"), "--merge-lora"]) == 0
    assert main(["convert", base, str(tmp_path / "shards"), "--adapter", adapter, "--tp", "2"]) == 0
    assert main(["convert", str(tmp_path / "shards"), str(tmp_path / "back")]) == 0
    assert (
        apart(tensors(tmp_path / "merged"), tensors(tmp_path / "same")) == apart(tensors(tmp_path / "back"), tensors(Path(adapter))) == 0.0
    )
    said = capsys.readouterr().out
    assert "LlamaForCausalLM with adapters merged from Hugging Face files" in said
    assert "adapters of LlamaForCausalLM from Megatron files" in said

    def changed(name: str, **config: Any) -> str:
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        content = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(content))
        return str(folder)

    fewer = Path(changed("fewer"))
    save_file(dict(list(tensors(fewer).items())[1:]), fewer / "adapter_model.safetensors")
    no_config = Path(shutil.copytree(tmp_path / "shards", tmp_path / "no-config"))
    (no_config / "adapter_config.json").unlink()
    other_scaling = Path(shutil.copytree(tmp_path / "shards", tmp_path / "scaling"))
    (other_scaling / "adapter_config.json").write_text((Path(changed("alpha", lora_alpha=2)) / "adapter_config.json").read_text())
    refused = {
        (base, "--merge-lora"): "holds no adapters to merge; name their folder by --adapter",
        (str(adapted["qwen2"]), "--adapter", adapter, "--merge-lora"): "wrongly shaped",
        (base, "--adapter", changed("dora", use_dora=True), "--merge-lora"): "use_dora is True",
        (base, "--adapter", changed("rank", r=8)): "wrongly shaped",
        (base, "--adapter", str(fewer), "--merge-lora"): "missing 1 tensors",
        (changed("unknown", base_model_name_or_path="meta-llama/Llama-3.1-8B"),): "name its Hugging Face folder by --model",
        (changed("hub", base_model_name_or_path=None), "--merge-lora"): "by --model",
        (base, "--adapter", adapter, "--spec", "te", "--tp", "2"): "called as in spec local",
        (base, "--adapter", base, "--merge-lora"): "holds no adapters: neither adapter_config.json",
        (str(no_config),): "says which projections the adapters in them are of",
        (str(other_scaling),): "they are of two runs",
        (base, "--adapter", adapter, "--merge-lora", "--test-precision"): "run rlsync compare TO",
    }
    for (source, *options), words in refused.items():
        assert main(["convert", source, str(tmp_path / "no"), *options]) == 1, options
        assert words in (said := capsys.readouterr().err) and not (tmp_path / "no").exists(), (options, said)
