"""Claims about what a run of supervised fine-tuning says before it starts anything: all findings at once, without slow imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.vlm_sft import make_config
from rlsync.errors import ConfigError
from tests.unit.test_check import HEAVY, ROOT, texts
from workers.check import SFT_CHECKS, check_devices, check_memory, check_model, check_run
from workers.check_data import check_sft_data
from workers.check_report import Report
from workers.config import SftConfig
from workers.config.fields import dotted_keys
from workers.config.schema import ArithmeticRecipe
from workers.picture_world import image_settings, make_vision_tokenizer
from workers.pictures import load_picture_processor
from workers.synthetic import build_world

pytestmark = pytest.mark.usefixtures("no_gpus")

RECIPE = ArithmeticRecipe(
    seed=0, max_operand=4, num_problems=8, num_supervised=64, num_held_out=5, supervised_noise=0.0, hidden_size=64, num_layers=1
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "world"
    build_world(path, RECIPE)
    return path


def values(world: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "cluster": {"component_placement": {"actor": "0-1"}},
        "runner": {"task_type": "sft", "seq_length": 16, "experiment_name": "run", "output_dir": str(world.parent / "results")},
        "data": {"train_data_paths": [str(world / "supervised.jsonl")], "answer_key": "response", "apply_chat_template": False},
        "actor": {"model": {"precision": "fp32", "model_path": str(world / "model")}, "micro_batch_size": 4, "global_batch_size": 16},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}


def check(world: Path, **sections: dict[str, Any]) -> Report:
    return check_run(values(world, **sections), SFT_CHECKS, "sft")


def seeing_model(folder: Path) -> Path:
    """Qwen2.5-VL-7B's shapes and the limits of the picture world's processor, without weights and tokenizer."""
    config = make_config("7b", make_vision_tokenizer(), None).to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(image_settings()))
    return folder


def test_memory_counts_pictures_and_says_which_keys_lower_what_they_take(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-VL-7B's shapes under TP 2, four rows with a picture of 1,024 features and 246 tokens of text each."""
    seeing_model(tmp_path / "model")
    Image.new("RGB", (896, 896)).save(tmp_path / "grey.png")
    row = {"question": "What?", "image": "grey.png", "answer": "Grey."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    (tmp_path / "text.jsonl").write_text(f"{json.dumps(row | {'image': None})}\n" * 16)
    monkeypatch.setattr("workers.check.count_gpus", lambda: 2)

    def memory(gib: float, file: str = "rows.jsonl", **model: Any) -> Report:
        monkeypatch.setattr("workers.check.gpu_bytes", lambda: int(gib * 2**30))
        data = {"type": "vlm", "train_data_paths": [str(tmp_path / file)], "prompt_key": "question", "answer_key": "answer"}
        model = {"model_path": str(tmp_path / "model"), "precision": "bf16", "tensor_model_parallel_size": 2, **model}
        sections = values(
            world,
            runner={**values(world)["runner"], "seq_length": 1270},
            data={**data, "image_keys": ["image"], "max_pixels": 1280 * 28 * 28, "apply_chat_template": True},
            actor={"model": model, "micro_batch_size": 4, "global_batch_size": 16, "optim": {"bf16": True}},
        )
        return check_run(sections, (check_devices, check_model, check_sft_data, check_memory), "sft")

    report = memory(139.8)
    assert report.findings == [] and "pictures 23.6, logits" in dict(report.plan)["memory"], (report.findings, report.plan)
    (found,) = (text for about, text in memory(80).findings if about == "memory")
    assert "the actor cannot train in this memory" in found
    assert "lower actor.micro_batch_size; lower data.max_pixels; " in found
    assert [note for note in memory(139.8, "text.jsonl").notes if "without activations of pictures" in note]
    frozen = {"freeze_vision_model": True, "freeze_vision_projection": True}
    assert "pictures" not in dict(memory(139.8, **frozen).plan)["memory"]


def test_memory_counts_the_micro_batches_of_a_validation(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have more rows than those of a step, and have their logits too."""
    given = values(world)
    runner, held_out = {**given["runner"], "val_check_interval": 2}, {**given["data"], "val_data_paths": [str(world / "held_out.jsonl")]}

    def scoring(eval_batch_size: int | None, **sections: Any) -> int:
        report = check(world, actor={**given["actor"], "eval_batch_size": eval_batch_size}, **sections)
        assert report.memory is not None, report.findings
        return report.memory.rank.scoring

    assert scoring(64) == scoring(64, data=held_out) == scoring(64, runner=runner) == 0, "a run that does not validate"
    assert 0 < scoring(None, runner=runner, data=held_out) == scoring(4, runner=runner, data=held_out)
    assert scoring(64, runner=runner, data=held_out) > 8 * scoring(4, runner=runner, data=held_out)
    monkeypatch.setattr("workers.check.gpu_bytes", lambda: 2**30)
    monkeypatch.setattr("workers.check.count_gpus", lambda: 2)
    many = check(world, actor={**given["actor"], "eval_batch_size": 2**20}, runner=runner, data=held_out)
    assert "Change one or more: lower actor.eval_batch_size" in texts(many)


def test_a_run_that_can_start_has_no_findings_and_a_plan(world: Path) -> None:
    report = check(world, runner={**values(world)["runner"], "val_check_interval": 2}, data={
        **values(world)["data"], "val_data_paths": [str(world / "held_out.jsonl")],
    })  # fmt: skip
    assert report.findings == [] and report.notes == []
    plan = dict(report.plan)
    assert plan["actor"] == "2 ranks (DP 2) on process slots 0-1" and "engines" not in plan
    assert plan["data"].startswith("16 examples a step from ") and plan["steps"] == "4" and plan["validation"].startswith("loss on ")


def test_findings_of_every_part_come_together(world: Path) -> None:
    report = check(
        world,
        cluster={"component_placement": {"actor": "0-2"}},
        runner={**values(world)["runner"], "seq_length": 4096, "resume_dir": "/nowhere", "logger": {"logger_backends": ["wandb"]}},
        data={"train_data_paths": ["/gone"], "val_data_paths": [str(world / "train.jsonl")], "apply_chat_template": True},
        actor={**values(world)["actor"], "optim": {"lr": -1.0}},
    )
    assert {about for about, _ in report.findings} >= {"configuration", "devices", "model", "tokenizer", "data", "loggers", "resume"}
    for part in (
        "actor.optim.lr (-1.0) must be at least 0",
        "actor.global_batch_size (16), the samples of a step, must be divisible by the data-parallel size (3)",
        "runner.seq_length (4096) exceeds max_position_embeddings (128)",
        "data file /gone does not exist",
        "8 bad samples",
        "no chat template",
        "names wandb, which cannot be imported",
        "resume_dir /nowhere does not exist",
    ):
        assert part in texts(report), texts(report)


def test_bad_rows_are_named_or_left_out_and_too_few_rows_are_a_finding(world: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "response": "2"}) + "\n" + json.dumps({"prompt": "1+1="}) + "\n")
    data = {**values(world)["data"], "train_data_paths": [str(rows)]}
    assert f"{rows}:2: no field 'response'" in texts(check(world, data=data))
    skipping = check(world, data={**data, "on_bad_sample": "skip"})
    assert f"Train dataloader is empty! {rows}: 2 rows, fewer than actor.global_batch_size (16)" in texts(skipping)
    assert any("left out 1 bad samples" in note for note in skipping.notes)


def test_rows_longer_than_a_sequence_are_found_before_anything_starts(world: Path, tmp_path: Path) -> None:
    """The tokenizer has a token for each character."""
    rows, short, long = tmp_path / "rows.jsonl", {"prompt": "1+1=", "response": "2"}, {"prompt": "1+1+1+1+1+1+1+1+1=", "response": "9"}
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in [*[short] * 20, long]))
    data = {**values(world)["data"], "train_data_paths": [str(rows)]}
    found = f"1 of the first 21 rows is longer than runner.seq_length (16): the texts of {rows}:21 alone have 19 tokens"
    assert f"{found}; data.on_too_long=skip leaves such rows out" in texts(check(world, data=data))
    assert check(world, data={**data, "on_too_long": "skip"}).findings == []
    assert check(world, data=data, runner={**values(world)["runner"], "seq_length": 19}).findings == []
    for way in ("error", "skip"):
        report = check(world, data={**data, "on_too_long": way}, runner={**values(world)["runner"], "seq_length": 4})
        assert f"all of the first 21 rows are longer than runner.seq_length (4): the texts of {rows}:1 alone have 5 tokens" in texts(report)


def test_pictures_are_counted_among_the_tokens_of_a_row(world: Path, tmp_path: Path) -> None:
    """One of 896 x 896 pixels is made smaller by the processor, to 224 x 224, of which 8 x 8 features are made."""
    Image.new("RGB", (896, 896)).save(tmp_path / "grey.png")
    rows = [{"question": "1+1", "image": ["grey.png"] * (1 + i % 2), "answer": "2"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"type": "vlm", "prompt_key": "question", "answer_key": "answer", "image_keys": ["image"], "apply_chat_template": True}
    model = {"precision": "fp32", "model_path": str(seeing_model(tmp_path / "model"))}

    def said(seq_length: int, **more: Any) -> str:
        sections = values(
            world,
            runner={**values(world)["runner"], "seq_length": seq_length},
            data={**data, "train_data_paths": [str(tmp_path / "rows.jsonl")], **more},
            actor={**values(world)["actor"], "model": model, "tokenizer": {"tokenizer_model": str(world / "model")}},
        )
        return texts(check_run(sections, (check_model, check_sft_data), "sft"))

    assert said(2 * 64 + 4) == ""
    assert (
        f"4 of the first 16 rows are longer than runner.seq_length (131): texts and pictures of {tmp_path}/rows.jsonl:2 have 132 tokens at "
        "least, of which 128 are of pictures; data.on_too_long=skip leaves such rows out"
    ) in said(131), "pictures of the first 8 rows are opened"
    assert said(131, on_too_long="skip") == said(131, max_pixels=112 * 112) == ""


def test_what_a_template_may_leave_out_of_a_chat_is_not_counted(world: Path, tmp_path: Path) -> None:
    turns = [("user", "1+1="), ("assistant", "1+1+1+1+1+1+1"), ("user", "2+2="), ("assistant", "4")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps({'messages': [{'role': role, 'content': text} for role, text in turns]})}\n" * 16)
    data = {**values(world)["data"], "type": "chat", "prompt_key": "messages", "train_data_paths": [str(rows)]}
    assert "longer than" not in texts(check(world, data=data))
    assert "have 9 tokens" in texts(check(world, data=data, runner={**values(world)["runner"], "seq_length": 8}))


def test_pictures_that_nobody_would_see_are_found_before_anything_starts(world: Path, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "grey.png")
    seeing = seeing_model(tmp_path / "model")

    def said(key: str, picture: str | None, model: Path = seeing, **data: Any) -> tuple[str, list[str]]:
        (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'question': 'What?', key: picture, 'answer': 'Grey.'})}\n" * 16)
        about = {"type": "vlm", "prompt_key": "question", "answer_key": "answer", "image_keys": ["image"], **data}
        sections = values(
            world,
            data={"train_data_paths": [str(tmp_path / "rows.jsonl")], "apply_chat_template": True, **about},
            actor={**values(world)["actor"], "model": {"precision": "fp32", "model_path": str(model)}},
        )
        report = check_run(sections, (check_model, check_sft_data), "sft")
        return texts(report), report.notes

    assert said("image", "grey.png") == ("", []) == said("image", None)
    found, _ = said("photo", "grey.png")
    assert (
        "none of the first 16 rows of" in found and "that data.image_keys names ('image'); they have 'question', 'photo', 'answer'" in found
    )
    assert said("photo", "grey.png", image_keys=["image", "photo"]) == ("", [])
    _, (note,) = said("photo", "grey.png", image_keys=[])
    assert note.startswith("data.image_keys names no field, so questions are asked without pictures")
    assert "rows.jsonl:1: the row has 'image', and data.image_keys names none" in said("image", "grey.png", image_keys=[])[0]
    assert "rows.jsonl:1: it has 1 pictures, and the model takes none" in said("image", "grey.png", world / "model")[0]
    # Of the first 8 rows pictures are opened, and what is in the others is not known.
    assert "bad samples, which" not in said("image", "gone.png", on_bad_sample="skip")[0]
    assert "all of the first 16 rows of" in said("image", "grey.png", on_bad_sample="skip", prompt_key="gone")[0]


def test_limits_of_pixels_that_contradict_the_processors_are_refused(world: Path, tmp_path: Path) -> None:
    """Pictures would be enlarged beyond the largest, or reduced below the smallest. The processor has 784 and 50,176."""
    seeing = seeing_model(tmp_path / "model")
    rows = {"train_data_paths": [str(tmp_path / "gone")], "type": "vlm", "image_keys": ["image"], "apply_chat_template": True}

    def said(**limits: int) -> str:
        sections = values(world, data={**rows, **limits}, actor={**values(world)["actor"], "model": {"model_path": str(seeing)}})
        return texts(check_run(sections, (check_model,), "sft"))

    for limits, refusal in (
        ({"max_pixels": 783}, "data.max_pixels (783) contradicts min_pixels 784 of the image processor of"),
        ({"min_pixels": 50_177}, "data.min_pixels (50177) contradicts max_pixels 50176 of the image processor of"),
    ):
        assert refusal in said(**limits)
        with pytest.raises(ConfigError, match=re.escape(refusal)):
            load_picture_processor(seeing, 6, **{"min_pixels": None, "max_pixels": None, **limits})
    assert said(max_pixels=784) == said(min_pixels=50_176) == said(min_pixels=60_000, max_pixels=60_000) == ""
    (seeing / "preprocessor_config.json").unlink()
    assert "holds no image processor (processor_config.json or preprocessor_config.json)" in said()


def test_keys_of_a_validation_that_is_not_run_and_files_that_are_trained_on_are_said(world: Path) -> None:
    held_out, runner, data = str(world / "held_out.jsonl"), values(world)["runner"], values(world)["data"]

    def notes(interval: int, *paths: str) -> list[str]:
        return check(world, runner={**runner, "val_check_interval": interval}, data={**data, "val_data_paths": list(paths)}).notes

    assert notes(2, held_out) == notes(-1) == []
    assert notes(2) == ["runner.val_check_interval (2) has no effect: data.val_data_paths names no file, so no validation is run"]
    assert notes(-1, held_out) == ["data.val_data_paths has no effect: no validation is run with runner.val_check_interval -1"]
    assert "validation sees rows that are trained on" in notes(2, held_out, str(world / "supervised.jsonl"))[0]


@pytest.mark.parametrize("wrong", ["x", {"a": None}], ids=repr)
def test_whatever_a_key_holds_is_answered_by_findings(world: Path, wrong: Any) -> None:
    """A raw error would end this test. Not every value is a finding: some keys hold any text."""
    answered = 0
    for key in dotted_keys(SftConfig):
        composed = values(world)
        *sections, name = key.split(".")
        inner = composed
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = wrong
        answered += bool(check_run(composed, SFT_CHECKS, "sft").findings)
    assert answered > 100


def test_checking_the_default_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.argv[1:] = sys.argv[1:]\n"
        "try: runpy.run_path('examples/sft/main_sft.py', run_name='__main__')\n"
        f"finally: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--check", f"runner.output_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "HEAVY []" in done.stdout and "no findings in" in done.stdout, done.stdout + done.stderr
    assert "2 ranks (DP 2) on process slots 0-1" in done.stdout and list(tmp_path.iterdir()) == []
