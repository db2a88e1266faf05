"""Claims about what a saved model folder holds beside its weights, with transformers as the judge of what is read and what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from rlsync.bridge.adapter_folder import other_base
from rlsync.bridge.model_folder import copy_files, travelling_files, with_dtype
from rlsync.copy.files import write_index, write_small_file
from rlsync.errors import CheckpointError
from rlsync.layout.geometry import TensorSpec


def files_of_tokenizers() -> set[str]:
    """What the tokenizer classes of the installed transformers read."""
    names = {"special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"}
    for entry in TOKENIZER_MAPPING_NAMES.values():
        for kind in entry if isinstance(entry, tuple | list) else (entry,):
            names |= set(getattr(getattr(transformers, kind or "", None), "vocab_files_names", {}).values())
    return names


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def travels(folder: Path) -> set[str]:
    return {path.as_posix() for path in travelling_files(folder, but=folder / "out")}


def test_every_file_that_transformers_reads_beside_weights_travels(tmp_path):
    names = files_of_tokenizers() | {
        CONFIG_NAME, GENERATION_CONFIG_NAME, CHAT_TEMPLATE_FILE, f"{CHAT_TEMPLATE_DIR}/rag.jinja", LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME, AUDIO_TOKENIZER_NAME,
        "qwen.tiktoken", "tokenizer.model.v3", "tekken.json", "modeling_own.py", "LICENSE", "LICENSE.txt", "NOTICE.md",
    }  # fmt: skip
    assert len(names) > 30
    assert travels(folder_with(tmp_path, *names)) == names


def test_weights_and_what_describes_them_stay(tmp_path):
    stays = (
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "original/params.json",
        "onnx/model.onnx", "hf_quant_config.json", "README.md", "trainer_state.json", ".cache/huggingface/x.json", ".gitattributes",
        "checkpoint-5/config.json", "adapter_config.json", "logo.png",
    )  # fmt: skip
    assert travels(folder_with(tmp_path, CONFIG_NAME, *stays)) == {CONFIG_NAME}


def test_with_code_of_its_own_a_folder_travels_whole_but_for_weights(tmp_path):
    names = {"config.json", "tokenizer_config.json", "code/tokenizer.py", "code/words/list.dat", "sub/spiece.model"}
    folder_with(tmp_path, *names, "model.safetensors", "sub/pytorch_model.bin", "README.md", "out/config.json", ".git/config")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.tokenizer.Own", null]}}')
    assert travels(tmp_path) == names, "what was saved into a folder inside is not copied into itself"
    copy_files(tmp_path, travelling_files(tmp_path, but=tmp_path / "out"), tmp_path / "out")
    assert (tmp_path / "out/code/words/list.dat").read_text() == "{}"


def test_links_are_followed_and_a_dangling_one_is_named(tmp_path):
    """Snapshots of the Hub's cache are links."""
    (tmp_path / "blob").write_text("words")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/merges.txt").symlink_to("../blob")
    copy_files(tmp_path / "m", travelling_files(tmp_path / "m", but=tmp_path / "out"), tmp_path / "out")
    assert (tmp_path / "out/merges.txt").read_text() == "words" and not (tmp_path / "out/merges.txt").is_symlink()
    (tmp_path / "blob").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt: a link to \.\./blob, which is missing"):
        travelling_files(tmp_path / "m", but=tmp_path / "out")


def test_a_tokenizer_with_templates_in_a_folder_survives(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    tokenizer.chat_template = {"default": "{{ 1 }}", "rag": "{{ 2 }}"}
    tokenizer.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m/additional_chat_templates/rag.jinja").is_file()
    copy_files(tmp_path / "m", travelling_files(tmp_path / "m", but=tmp_path / "out"), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template and again("a").input_ids == [0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model_type": "qwen2", "torch_dtype": "float32"}', '{"model_type": "qwen2", "torch_dtype": "bfloat16"}'),
        (
            '{\r\n\t"dtype":"float32",\r\n "model_type" : "qwen2", "x": "\\"dtype\\": \\"float32\\" é", "y": [{"dtype": 1}]\r\n}\n\n',
            '{\r\n\t"dtype":"bfloat16",\r\n "model_type" : "qwen2", "x": "\\"dtype\\": \\"float32\\" é", "y": [{"dtype": 1}]\r\n}\n\n',
        ),
        (
            '{"dtype": "float32", "torch_dtype": "float16", "model_type": "qwen2"}',
            '{"dtype": "bfloat16", "torch_dtype": "bfloat16", "model_type": "qwen2"}',
        ),
        (
            '{"torch_dtype": null, "model_type": "qwen2", "dtype": "torch.float32"}',
            '{"torch_dtype": null, "model_type": "qwen2", "dtype": "bfloat16"}',
        ),
    ],
)
def test_the_dtype_tells_the_truth_to_transformers_and_all_else_stays_byte_for_byte(tmp_path, text, expected):
    assert with_dtype(text, "bfloat16") == expected
    (tmp_path / "config.json").write_bytes(expected.encode())
    assert str(AutoConfig.from_pretrained(tmp_path).dtype) == "torch.bfloat16"


def test_parts_of_a_config_tell_the_truth_too_and_what_is_no_dtype_of_weights_stays():
    config = {
        "architectures": ["X"],
        "text_config": {"dtype": "float32", "text_config": {"torch_dtype": "float32"}},
        "vision_config": {"dtype": "float32"},
        "quantization_config": {"dtype": "float32"},
        "rope": {"dtype": "float32"},
    }
    said = json.loads(with_dtype(json.dumps(config), "float16"))
    assert said["text_config"] == {"dtype": "float16", "text_config": {"torch_dtype": "float16"}}
    assert said["vision_config"] == {"dtype": "float16"}
    assert said["quantization_config"] == said["rope"] == {"dtype": "float32"} and "dtype" not in said


def test_a_config_without_a_dtype_stays_as_it_is():
    for text in ("{}", '{"a": {}}', ' { "torch_dtype" : null } '):
        assert with_dtype(text, "bfloat16") == text


@pytest.mark.parametrize("durable", [True, False])
def test_index_and_copies_reach_the_disk_before_a_durable_save_returns(tmp_path, monkeypatch, durable):
    """A folder that is published after a power loss would have weights beside an empty index or configuration."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
    folder_with(tmp_path, "m/tokenizer.json", "out/x")
    spec = TensorSpec("a", "float32", (1,))
    copy_files(tmp_path / "m", (Path("tokenizer.json"),), tmp_path / "out", durable=durable)
    write_index(tmp_path / "out", {"1.safetensors": [spec], "2.safetensors": []}, durable=durable)
    write_small_file(tmp_path / "out/config.json", b"{}", durable=durable)
    assert synced == (["tokenizer.json", "model.safetensors.index.json", "config.json"] if durable else [])
    assert (tmp_path / "out/tokenizer.json").read_text() == (tmp_path / "out/config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "folder", "is_other"),
    [
        ("some-lab/Base-7B", "models/base-7b", False),
        ("some-lab/Base-7B", "hub/models--some-lab--Base-7B/snapshots/0a1b", False),
        ("some-lab/Base-7B", "models/Base-7B-Instruct", True),
        ("/gone/global_step_4/actor/hf_model", "global_step_8/actor/hf_model", True),
        (None, "models/base-7b", False),
    ],
)
def test_adapters_of_a_model_of_another_name_are_told(tmp_path, name: str | None, folder: str, is_other: bool) -> None:
    assert (other_base(name, tmp_path / folder) is not None) == is_other
    assert other_base(str(tmp_path / folder), tmp_path / folder) is None
