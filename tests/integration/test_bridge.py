"""AutoBridge on real Megatron shards: logits equal HF's, and tensors survive load, export and save bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsync import AutoBridge
from rlsync.errors import ConfigError
from tests.hf_models import make_models
from tests.ranks import run_ranks
from tests.vision_models import save_tiny_vision_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict]:
    return make_models(tmp_path_factory.mktemp("hf"))


def test_logits_and_tensors_agree_with_huggingface_on_four_ranks(models, tmp_path):
    """TP (also beyond the KV heads), PP, VPP, uneven PP, DP, CP, sequence parallel; each family, tied and untied."""
    weights_only = {name: value for name, value in models["llama"].items() if name != "logits"}
    cases = [
        {**models["qwen2"], "topology": {"tp_size": 2, "pp_size": 2}},
        {**models["qwen2-tied"], "topology": {"tp_size": 4}, "divisor": 8},
        {**models["qwen2-tied"], "topology": {"tp_size": 2, "pp_size": 2}, "overrides": {"sequence_parallel": True}},
        {**models["llama"], "topology": {"pp_size": 2, "vpp_size": 2, "tp_size": 2}},
        {**models["llama-tied"], "topology": {"pp_size": 4}},
        {**models["llama"], "topology": {"tp_size": 2, "dp_size": 2}, "divisor": 128},
        {**models["qwen3"], "topology": {"tp_size": 4}, "overrides": {"sequence_parallel": True}},
        {**models["qwen3-tied"], "topology": {"pp_size": 2, "dp_size": 2, "first_stage_layers": 1, "last_stage_layers": 3}},
        {**models["qwen3-tied"], "topology": {"pp_size": 2, "vpp_size": 2, "tp_size": 2}, "overrides": {"sequence_parallel": True}},
        {**models["glm4"], "topology": {"tp_size": 2, "pp_size": 2}, "overrides": {"sequence_parallel": True}},
        {**models["seed_oss"], "topology": {"tp_size": 2, "pp_size": 2}},
        {**models["smollm3"], "topology": {"tp_size": 2, "pp_size": 2, "vpp_size": 2}, "overrides": {"sequence_parallel": True}},
        # Its weights are held to HF's here, and its logits where models are trained.
        {**weights_only, "topology": {"tp_size": 2, "cp_size": 2}},
    ]
    outputs = run_ranks(4, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=cases, out_dir=str(tmp_path))
    assert outputs[3].count("LOGITS") == len(cases) - 1, "the last rank is on the last stage of every case"
    for saved in tmp_path.iterdir():
        assert ("lm_head.weight" in json.dumps(sorted(_names(saved)))) != json.loads((saved / "config.json").read_text())[
            "tie_word_embeddings"
        ]


# What a processor reads, beside the files of a tokenizer; a saved model needs all of them as they are.
PROCESSOR = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def _respelled_model(folder: Path, family: str, tower: str, text: str, **options: object) -> str:
    """A tiny vision-language model whose names begin with ``tower`` and ``text``, beside files of a processor."""
    save_tiny_vision_model(folder, family, **options)
    tensors = {
        name.replace("model.visual.", tower, 1).replace("model.language_model.", text, 1): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for number, name in enumerate(PROCESSOR):
        (folder / name).write_bytes(b'{"size":  %d}\r\n' % number)
    return str(folder)


def test_vision_language_models_keep_the_names_and_files_of_their_folder(tmp_path):
    """Loaded under one layout, exported, saved, and loaded and saved under another: the bits, names and files of the first folder."""
    new, old = ("model.visual.", "model.language_model."), ("visual.", "model.")
    sources = [
        (_respelled_model(tmp_path / "a", "qwen2_5_vl", *old), {"tp_size": 2}, {"pp_size": 2}),
        (_respelled_model(tmp_path / "b", "qwen2_5_vl", *new, tied=True), {"pp_size": 2}, {"dp_size": 2}),
        (_respelled_model(tmp_path / "c", "qwen3_vl", *new), {"pp_size": 2, "vpp_size": 1}, {"tp_size": 2}),
        (_respelled_model(tmp_path / "d", "qwen3_vl", "visual.", "model.language_model.", tied=True), {"tp_size": 2}, {"pp_size": 2}),
        (_respelled_model(tmp_path / "e", "qwen3_vl", "model.visual.", "model."), {"dp_size": 2}, {"tp_size": 2}),
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    cases = [{"folder": folder, "topology": topology} for folder, topology, _ in sources]
    run_ranks(2, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=cases, out_dir=str(first))
    again = [{"folder": str(first / f"saved-{i}"), "topology": topology} for i, (_, _, topology) in enumerate(sources)]
    run_ranks(2, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=again, out_dir=str(second))
    for number, (folder, _, _) in enumerate(sources):
        before, after = Path(folder), second / f"saved-{number}"
        tensors, saved = load_file(before / "model.safetensors"), {}
        for file in after.glob("*.safetensors"):
            saved |= load_file(file)
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
        assert all((after / name).read_bytes() == (before / name).read_bytes() for name in (*PROCESSOR, "config.json"))
        if (after / "model.safetensors.index.json").is_file():
            assert json.loads((after / "model.safetensors.index.json").read_text())["weight_map"].keys() == tensors.keys()


def test_a_trainer_with_megatrons_own_process_groups_is_served(models):
    """On CPU, too, where Megatron alone ends with "Torch not compiled with CUDA enabled"."""
    outputs = run_ranks(
        2, "tests.integration.bridge_ranks", "serve_a_trainer_with_plain_mpu", case={**models["qwen3-tied"], "topology": {"tp_size": 2}}
    )
    assert all("LOGITS" in output for output in outputs)
    assert all(re.search(r"SAID .*call megatron.core.tensor_parallel.model_parallel_cuda_manual_seed", output) for output in outputs)


def test_process_groups_end_where_they_are_given_up(models):
    """Each of them has threads. Without that the numbers grow by tens with every layout."""
    outputs = run_ranks(2, "tests.integration.bridge_ranks", "build_and_give_up", folder=models["qwen2"]["folder"], times=4)
    for output in outputs:
        numbers = json.loads(output.partition("THREADS ")[2].splitlines()[0])
        assert numbers[1:] == numbers[:-1], numbers


def test_what_every_rank_holds_is_exported_without_moving_or_copying_it(models):
    run_ranks(2, "tests.integration.bridge_ranks", "export_without_moving", folder=models["qwen3-tied"]["folder"])


def test_a_checkpoint_saved_under_one_layout_loads_in_transformers(models, tmp_path):
    """And one rank reads what four would: the saved folder is an ordinary HF checkpoint."""
    from transformers import AutoModelForCausalLM

    case = {**models["qwen3-tied"], "topology": {"tp_size": 2}}
    run_ranks(2, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=[case], out_dir=str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved-0", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = again(torch.tensor(case["tokens"])).logits
    assert torch.equal(logits, torch.tensor(case["logits"]))


def test_transformer_engine_names_and_attributes_do_not_mislead(models):
    folders = [models[name]["folder"] for name in ("qwen2", "qwen3-tied")]
    run_ranks(2, "tests.integration.bridge_ranks", "survive_transformer_engine_names", folders=folders)


def test_bad_checkpoints_are_refused_on_every_rank_before_anything_changes(models, tmp_path):
    folder = Path(models["qwen2"]["folder"])
    tensors = load_file(folder / "model.safetensors")

    def broken(kind: str, tensors: dict[str, torch.Tensor]) -> str:
        shutil.copytree(folder, tmp_path / kind)
        save_file(tensors, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path / kind)

    wrong = {**tensors, "model.norm.weight": torch.ones(7), "model.layers.0.mlp.up_proj.weight": torch.ones(3, 128)}
    kinds = {
        "missing": broken("missing", {n: t for n, t in tensors.items() if not n.startswith("model.layers.2.self_attn.q_proj")}),
        "wrong": broken("wrong", wrong),
        "unexpected": broken("unexpected", {**tensors, "model.layers.0.self_attn.sinks": torch.ones(4)}),
        "truncated": broken("truncated", tensors),
    }
    file = Path(kinds["truncated"], "model.safetensors")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1000)
    outputs = run_ranks(2, "tests.integration.bridge_ranks", "refuse_bad_checkpoints", folder=str(folder), broken=kinds)
    for output in outputs:
        said = json.loads(output.split("SAID ")[1].splitlines()[0])
        assert "missing 2 tensors: model.layers.2.self_attn.q_proj.bias, model.layers.2.self_attn.q_proj.weight" in said["missing"]
        assert "wrongly shaped 2 tensors" in said["wrong"] and "expected (160, 128), stored (3, 128)" in said["wrong"]
        assert "unexpected 1 tensors: model.layers.0.self_attn.sinks" in said["unexpected"]
        assert re.search(r"CheckpointError: .*truncated safetensors file: .* ends at byte \d+, the file has \d+", said["truncated"])
        assert "missing 2 tensors" in said["one rank"], "an error of rank 1 alone is raised on rank 0 too"


def test_a_save_that_one_rank_cannot_begin_leaves_the_older_weights(models, tmp_path):
    run_ranks(
        2, "tests.integration.bridge_ranks", "fail_to_save_on_one_rank", folder=models["qwen2"]["folder"], out_dir=str(tmp_path / "out")
    )


def test_a_rank_without_memory_to_save_with_fails_on_all_ranks_and_lets_none_wait(models, tmp_path):
    run_ranks(
        2,
        "tests.integration.bridge_ranks",
        "run_out_of_host_memory_on_one_rank",
        folder=models["qwen2"]["folder"],
        out_dir=str(tmp_path / "out"),
    )


def test_a_saved_folder_says_its_own_dtype_and_the_loaded_one_is_never_written_over(models, tmp_path):
    """A NaN in both copies of a tied embedding does not make them differ; the head that was stored is the embedding."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "hf"
    shutil.copytree(models["qwen3-tied"]["folder"], folder)
    (folder / "merges.txt").write_text("a b")
    (folder / "training_log.txt").write_text("loss")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = float("nan")
    shutil.copytree(folder, tmp_path / "nan")
    with_head = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(with_head, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    run_ranks(
        2, "tests.integration.bridge_ranks", "save_in_another_dtype", folder=str(folder), nan_folder=str(tmp_path / "nan"), out_dir=str(out)
    )
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16, "transformers takes the dtype of the config"
    saved = load_file(out / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(saved[name].view(torch.int16).equal(t.to(torch.bfloat16).view(torch.int16)) for name, t in tensors.items())
    before = (folder / "config.json").read_text()
    assert before.count('"float32"') == 1
    assert (out / "config.json").read_text() == before.replace('"float32"', '"bfloat16"')
    assert {path.name for path in out.iterdir()} == {
        "adapter.safetensors", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
    }  # fmt: skip


def test_a_tied_checkpoint_that_stores_only_its_head_is_refused_on_every_rank(models, tmp_path):
    """transformers takes the head for the embedding, vLLM refuses the folder."""
    folder = Path(models["qwen3-tied"]["folder"])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    shutil.copytree(folder, tmp_path / "head")
    save_file(tensors, tmp_path / "head" / "model.safetensors", metadata={"format": "pt"})
    kinds = {"head": str(tmp_path / "head"), "missing": str(tmp_path / "head")}
    for output in run_ranks(2, "tests.integration.bridge_ranks", "refuse_bad_checkpoints", folder=str(folder), broken=kinds):
        said = json.loads(output.split("SAID ")[1].splitlines()[0])
        assert "CheckpointError" in said["head"] and "rename it to model.embed_tokens.weight" in said["head"]


def test_a_model_that_differs_from_its_table_is_refused_by_name(models):
    for output in run_ranks(2, "tests.integration.bridge_ranks", "refuse_foreign_parameters", folder=models["llama"]["folder"]):
        assert "extra (3,): in the model, not in the table" in output
        assert "decoder.layers.1.bias (4,): in the model, not in the table" in output
        assert "scratch" not in output


def test_unknown_architecture_lists_the_supported_ones():
    with pytest.raises(ConfigError, match=r"unknown architecture GPT2LMHeadModel; supported are .*Qwen3ForCausalLM"):
        AutoBridge.from_config({"architectures": ["GPT2LMHeadModel"]})
    assert "Qwen3ForCausalLM" in AutoBridge.list_supported_models()


def _names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}
