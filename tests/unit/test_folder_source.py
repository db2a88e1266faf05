"""Claims about a checkpoint folder as the source of a sync."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlsync import AutoBridge
from rlsync.bridge.folder_source import FolderSource
from rlsync.copy.files import shard_files, write_index
from rlsync.errors import CheckpointError, ConfigError
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.plan.planner import build_plan
from rlsync.sync import Source
from tests.unit.test_models_config import QWEN2


def tensors_of_a_model() -> dict[str, torch.Tensor]:
    names = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.mlp.down_proj.weight" for i in (10, 2, 0)),
        "model.norm.weight",
    ]
    return {name: torch.randn(4, 6).to(torch.bfloat16 if "layers" in name else torch.float32) for name in names}


def folder_of(folder: Path, tensors: dict[str, torch.Tensor], *, tied: bool = False, files: int = 1) -> Path:
    folder.mkdir()
    specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
    cut = shard_files(specs, sum(s.nbytes for s in specs) // files)
    for file, group in cut.items():
        save_file({s.name: tensors[s.name] for s in group}, folder / file)
    write_index(folder, cut)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return folder


@pytest.mark.parametrize("files", [1, 3])
def test_a_folder_gives_every_tensor_in_layer_order(tmp_path: Path, files: int) -> None:
    tensors = tensors_of_a_model()
    source: Source = FolderSource(folder_of(tmp_path / "m", tensors, files=files))
    assert [t.name for t in source.tensors] == [
        "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight",
        "model.layers.10.mlp.down_proj.weight", "model.norm.weight",
    ]  # fmt: skip
    assert {t.dtype for t in source.tensors} == {"bfloat16", "float32"}
    assert source.buffers.keys() == tensors.keys()
    assert all(torch.equal(source.buffers[name], tensor) for name, tensor in tensors.items())
    build_plan(source.tensors, source.placements, [whole_tensors("worker", source.tensors)])
    source.begin(7)


def test_buffers_stay_where_they_are(tmp_path: Path) -> None:
    """A sync compares addresses between connect and fill."""
    source = FolderSource(folder_of(tmp_path / "m", tensors_of_a_model()))
    assert {n: t.data_ptr() for n, t in source.buffers.items()} == {n: t.data_ptr() for n, t in source.buffers.items()}


def test_what_no_engine_loads_is_left_out(tmp_path: Path) -> None:
    """What old checkpoints carry, by vLLM's list, and the copy of a tied embedding."""
    old = [f"model.layers.0.self_attn.rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached")]
    tensors = tensors_of_a_model() | {name: torch.ones(3) for name in (*old, "model.rotary_pos_emb.inv_freq")}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = FolderSource(folder_of(tmp_path / "tied", tensors, tied=True))
    assert source.buffers.keys() == tensors_of_a_model().keys() - {"lm_head.weight"}
    assert "lm_head.weight" in FolderSource(folder_of(tmp_path / "untied", tensors)).buffers


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ties the embeddings, but lm_head\.weight is not model\.embed_tokens\.weight"):
        FolderSource(folder_of(tmp_path / "m", tensors_of_a_model(), tied=True))


def test_a_tied_head_of_the_same_bits_is_left_out_though_a_nan_is_among_them(tmp_path: Path) -> None:
    tensors = tensors_of_a_model()
    tensors["model.embed_tokens.weight"][1, 2] = float("nan")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in FolderSource(folder_of(tmp_path / "m", tensors, tied=True)).buffers


def test_a_tied_head_without_its_embedding_is_refused(tmp_path: Path) -> None:
    """transformers takes it for the embedding, vLLM refuses it."""
    tensors = tensors_of_a_model()
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored and model\.embed_tokens\.weight is not; rename it to model"):
        FolderSource(folder_of(tmp_path / "m", tensors, tied=True))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", " is not JSON: .*; write or download it again"),
        (b"\xff{}", " is not UTF-8 text: byte 1"),
        (b'["tie_word_embeddings"]', " holds list instead of an object"),
        (b'{"transformers_weights": "other.safetensors"}', ": transformers_weights names 'other.safetensors'"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    folder = folder_of(tmp_path / "m", tensors_of_a_model())
    (folder / "config.json").write_bytes(content)
    for read in (FolderSource, AutoBridge.from_pretrained):
        with pytest.raises(ConfigError, match=rf"config\.json{said}"):
            read(folder)


def test_a_folder_without_weights_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        FolderSource(tmp_path)
    folder = folder_of(tmp_path / "m", {"model.norm.weight": torch.ones(3)})
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file; give a local Hugging Face folder"):
        FolderSource(folder)


def test_an_empty_list_of_models_is_refused_by_name() -> None:
    bridge = AutoBridge.from_config(QWEN2)
    with pytest.raises(ConfigError, match="models is empty; give the chunks that get_model returned"):
        bridge.shards([])
    with pytest.raises(ConfigError, match="these models have no adapters"):
        bridge.adapter_shards([])
