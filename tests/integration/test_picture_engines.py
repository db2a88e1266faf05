"""Claims about engines that take pictures: what a sync makes of tower and language model, and of pictures that an engine saw before it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsync.bridge.folder_source import FolderSource
from rlsync.engine.handles.local import Completion, Engine
from rlsync.engine.state import state_difference
from rlsync.errors import ConfigError
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from tests.inspection import inspect_engines
from tests.integration.engine_source import ENGINE_ENV, NUM_BLOCKS
from tests.integration.greedy import same
from tests.integration.kept_caches import keep_caches

pytest.importorskip("torchvision", reason="transformers' processors need it; make setup installs it")

from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from rlsync.engine.handles import PicturePrompt
from tests.vision_folders import PROMPTS, greedy_answer, picture_prompt, save_vision_folder
from tests.vision_models import IMAGE
from workers.pictures import Patches, load_picture_processor

# The first test waits for all engines to start.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Family, and whether its head is tied.
TIED = {"qwen2_5_vl": False, "qwen3_vl": True}
NUM_TOKENS = 8
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
TOWER = "model.visual."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By family: two checkpoints, and ``mixed``, the language model of ``a`` with the tower of ``b``."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for family, tied in TIED.items():
        for seed, name in enumerate("ab"):
            made[family, name] = save_vision_folder(root / f"{family}-{name}", family, tied=tied, seed=seed)
        a, b = (load_file(made[family, name] / "model.safetensors") for name in "ab")
        towers = {name: b[name] if name.startswith(TOWER) else tensor for name, tensor in a.items()}
        made[family, "mixed"] = with_tensors(made[family, "a"], root / f"{family}-mixed", towers)
    return made


def with_tensors(folder: Path, other: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a folder that has these tensors."""
    shutil.copytree(folder, other)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


@pytest.fixture(scope="module")
def engines(folders: dict[tuple[str, str], Path]) -> Iterator[dict[tuple[str, str], Engine]]:
    """Engines of both families, started from ``a`` and from ``b``; and one of Qwen2.5-VL that was started without weights."""
    args: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 4, "disable_log_stats": True}
    # Prompts with a large picture are longer than a block of the prefix cache.
    args |= {"block_size": 32, "num_gpu_blocks_override": NUM_BLOCKS, "enable_prefix_caching": True}

    def start(family: str, name: str) -> Engine:
        source = {"model": str(folders[family, "a" if name == "dummy" else name]), "load_format": "dummy" if name == "dummy" else "auto"}
        engine = Engine(f"{family} {name}", {**source, **args})
        engine.start()
        return engine

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENV.items():
            patch.setenv(name, value)
        with ThreadPoolExecutor(2) as pool:
            starting = {(family, name): pool.submit(start, family, name) for family in TIED for name in "ab"}
            starting["qwen2_5_vl", "dummy"] = pool.submit(start, "qwen2_5_vl", "dummy")
            made = {key: future.result() for key, future in starting.items()}
        yield made
        for engine in made.values():
            engine.close()


def synced(engine: Engine, folder: Path, version: int = 1, **settings: Any) -> SyncReport:
    """A sync of a connection of its own."""
    with WeightSyncer(FolderSource(folder), [engine], SyncConfig(**{"bucket_bytes": 100_000, "timeout_s": 60.0, **settings})) as syncer:
        syncer.connect()
        return syncer.sync(version)


def ask(engine: Engine, prompt: PicturePrompt) -> Completion:
    return engine.generate([prompt], GREEDY, timeout_s=60)[0][0]


def answers_like(engine: Engine, folder: Path) -> list[bool]:
    return [same(ask(engine, prompt), greedy_answer(folder, prompt, NUM_TOKENS)) for prompt in PROMPTS]


@pytest.mark.parametrize("sink", ["auto", "layerwise", "loaders"])
@pytest.mark.parametrize("family", TIED)
def test_a_synced_engine_holds_what_a_fresh_one_does_and_answers_like_transformers(
    engines: dict[tuple[str, str], Engine], folders: dict[tuple[str, str], Path], family: str, sink: str
) -> None:
    """Picture by picture, and after a sync back to what the engine was started with. Before, it answers otherwise."""
    engine, fresh = engines[family, "a"], engines[family, "b"]
    assert answers_like(engine, folders[family, "a"]) == [True] * len(PROMPTS)
    assert answers_like(engine, folders[family, "b"]) == [False] * len(PROMPTS)
    report = synced(engine, folders[family, "b"], sink=sink)
    assert report.sinks == ({"auto": "direct+layerwise"}.get(sink, sink),)
    held, wanted = ([*inspect_engines([each]).values()] for each in (engine, fresh))
    assert len(wanted[0]) > 60 and state_difference(held[0], wanted[0]) == ()
    assert answers_like(engine, folders[family, "b"]) == [True] * len(PROMPTS)
    assert {(c.version, c.last_version) for c in [ask(engine, prompt) for prompt in PROMPTS]} == {(1, 1)}
    synced(engine, folders[family, "a"], sink=sink)
    assert answers_like(engine, folders[family, "a"]) == [True] * len(PROMPTS)


def test_an_engine_that_was_started_without_weights_sees_what_others_see(
    engines: dict[tuple[str, str], Engine], folders: dict[tuple[str, str], Path]
) -> None:
    """vLLM's dummy weights are also put where no checkpoint has any: into mean and deviation of pixels."""
    engine, fresh = engines["qwen2_5_vl", "dummy"], engines["qwen2_5_vl", "b"]
    synced(engine, folders["qwen2_5_vl", "b"])
    held, wanted = ([*inspect_engines([each]).values()] for each in (engine, fresh))
    assert state_difference(held[0], wanted[0]) == ()
    assert answers_like(engine, folders["qwen2_5_vl", "b"]) == [True] * len(PROMPTS)


def test_names_as_on_the_hub_are_what_modules_call_them(
    engines: dict[tuple[str, str], Engine], folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Released Qwen2.5-VL folders have ``visual.*`` and ``model.layers.*``; vLLM's loaders know both."""
    engine, fresh = engines["qwen2_5_vl", "a"], engines["qwen2_5_vl", "b"]
    tensors = load_file(folders["qwen2_5_vl", "b"] / "model.safetensors")
    released = {name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t for name, t in tensors.items()}
    assert released.keys() != tensors.keys()
    synced(engine, with_tensors(folders["qwen2_5_vl", "b"], tmp_path / "released", released))
    held, wanted = ([*inspect_engines([each]).values()] for each in (engine, fresh))
    assert state_difference(held[0], wanted[0]) == ()
    synced(engine, folders["qwen2_5_vl", "a"])


@pytest.mark.parametrize("reset", ["all", "prefix", "none"])
@pytest.mark.parametrize("family", TIED)
def test_a_picture_seen_before_a_sync_is_seen_with_the_new_tower(
    engines: dict[tuple[str, str], Engine],
    folders: dict[tuple[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    reset: str,
) -> None:
    """Only the tower is new. With the negative controls: what the former tower made of the picture is in two caches."""
    engine, prompt = engines[family, "a"], PROMPTS[2]
    before = ask(engine, prompt)
    assert same(before, greedy_answer(folders[family, "a"], prompt, NUM_TOKENS))
    with monkeypatch.context() as patch:
        if reset != "all":
            keep_caches(patch, engine, prefix=reset == "none")
        synced(engine, folders[family, "mixed"])
    after = ask(engine, prompt)
    assert same(after, greedy_answer(folders[family, "mixed"], prompt, NUM_TOKENS)) == (reset == "all")
    assert same(after, before) == (reset != "all")
    synced(engine, folders[family, "a"])


@pytest.mark.parametrize("family", TIED)
def test_a_frozen_tower_is_sent_once_and_again_to_an_engine_that_lost_it(
    engines: dict[tuple[str, str], Engine], folders: dict[tuple[str, str], Path], family: str
) -> None:
    """What checksums say of an engine that lost it and is clean for its handle: ``tests/unit/test_frozen.py``."""
    engine = engines[family, "a"]
    source = FolderSource(folders[family, "mixed"])
    source.frozen = frozenset(t.name for t in source.tensors if t.name.startswith(TOWER))
    tower_bytes = sum(t.nbytes for t in source.tensors if t.name in source.frozen)
    with WeightSyncer(source, [engine], SyncConfig(bucket_bytes=100_000, timeout_s=60.0)) as syncer:
        syncer.connect()
        first, second = syncer.sync(1), syncer.sync(2)
        assert (first.held_bytes, second.held_bytes, first.bytes - second.bytes) == (0, tower_bytes, tower_bytes)
        assert answers_like(engine, folders[family, "mixed"]) == [True] * len(PROMPTS)
        # Who connects anew knows nothing of what the engine has: here the tower of a.
        synced(engine, folders[family, "a"])
        syncer.close()
        syncer.connect()
        assert syncer.sync(1).held_bytes == 0
        assert answers_like(engine, folders[family, "mixed"]) == [True] * len(PROMPTS)
        engine.mark_dirty("its weights were dropped by sleep level 2, and no sync has followed")
        assert syncer.sync(2).held_bytes == 0
        assert syncer.sync(3).held_bytes == tower_bytes
        assert answers_like(engine, folders[family, "mixed"]) == [True] * len(PROMPTS)
    synced(engine, folders[family, "a"])


def test_placeholders_and_pictures_are_counted_before_anything_is_asked(engines: dict[tuple[str, str], Engine]) -> None:
    engine, (image, *_) = engines["qwen2_5_vl", "a"], PROMPTS[0].pictures
    with pytest.raises(ConfigError, match="a prompt has 1 pictures and 0 placeholders"):
        engine.generate([[1, 2], PicturePrompt((1, 2), (image,))], GREEDY)
    with pytest.raises(ConfigError, match="a prompt has 0 pictures and 2 placeholders"):
        engine.generate([[1, IMAGE, IMAGE]], GREEDY)


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 12_000}, {"min_pixels": 4_000, "max_pixels": 9_000}], ids=str)
@pytest.mark.parametrize("family", TIED)
def test_an_engine_sees_the_pixels_that_the_actor_is_trained_on(
    folders: dict[tuple[str, str], Path], family: str, limits: dict[str, int]
) -> None:
    """And as many placeholders, within other limits of pixels, too. Two pictures of one size are made smaller together.

    With the negative control: other limits make others of some of these pictures.
    """
    folder = folders[family, "a"]
    # vLLM normalises in the model unless it is told not to.
    normalised, plain = (
        MULTIMODAL_REGISTRY.create_processor(
            ModelConfig(
                str(folder), dtype="float32", max_model_len=512, mm_processor_kwargs=limits or None, mm_device_do_normalize=in_model
            )
        )
        for in_model in (False, True)
    )
    none = {"min_pixels": None, "max_pixels": None}
    ours, others = (load_picture_processor(folder, IMAGE, **{**none, **each}) for each in (limits, {} if limits else {"max_pixels": 4_000}))
    mean, deviation = (255 * torch.tensor(getattr(ours.image_processor, f"image_{name}"))[:, None] for name in ("mean", "std"))
    are_others = []
    for prompt in (*PROMPTS[:3], picture_prompt([(500, 300), 2, (500, 300)], seed=7)):
        found = ours(prompt.pictures)
        pixels, bytes_ = (pixels_of(each, prompt, found) for each in (normalised, plain))
        assert torch.equal(found.pixel_values, pixels)
        assert torch.equal((found.pixel_values.view(len(bytes_), 3, -1) * deviation + mean).round().to(torch.uint8).view_as(bytes_), bytes_)
        are_others.append(not torch.equal(found.image_grid_thw, others(prompt.pictures).image_grid_thw))
    assert any(are_others)


def pixels_of(processor: Any, prompt: PicturePrompt, found: Patches) -> torch.Tensor:
    """What a processor of vLLM makes of the pictures of a prompt, cut and counted as ``found`` is."""
    asked = processor(list(prompt.token_ids), processor.info.parse_mm_data({"image": list(prompt.pictures)}))
    items = [item.get_data() for item in asked["mm_kwargs"]["image"]]
    assert torch.equal(found.image_grid_thw, torch.stack([item["image_grid_thw"] for item in items]))
    assert asked["prompt_token_ids"].count(IMAGE) == sum(found.num_features)
    return torch.cat([item["pixel_values"] for item in items])
