"""Claims about what the scripts of runs take: names of configurations, keys, files that are not YAML, and a call for help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import HANG_S

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/reasoning/run_main_grpo_math.sh"


@pytest.mark.parametrize("argument", ["data=/a.jsonl", "actor=3"])
def test_a_value_in_place_of_a_section_names_the_sections_keys(argument) -> None:
    done = subprocess.run(["bash", str(SCRIPT), argument, "--check"], capture_output=True, text=True, timeout=HANG_S, check=False)
    name = argument.partition("=")[0]
    said = " ".join(done.stderr.split())
    assert done.returncode == 1 and f"{argument}: {name} is a section; set its keys: {name}." in said and "Traceback" not in said


@pytest.mark.parametrize("argument", ["actor.optim.lr=[1", "runner.seq_length=${nowhere}"])
def test_what_hydra_cannot_read_is_told_without_a_traceback(argument) -> None:
    done = subprocess.run(["bash", str(SCRIPT), argument, "--check"], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["reasoning/run_main_grpo_math.sh", "sft/run_vlm_sft.sh", "sft/run_llm_sft.sh"])
def test_help_is_the_script_s_own_and_sets_nothing_up(script) -> None:
    """Hydra's would be a dump of every key, after an installation."""
    path = ROOT / "examples" / script
    environment = {"PATH": "/usr/bin:/bin"}
    for word in ("--help", "-h"):
        done = subprocess.run(["bash", str(path), word], env=environment, capture_output=True, text=True, timeout=HANG_S, check=True)
        assert f"bash examples/{script} [CONFIG] --check" in done.stdout and "set -e" not in done.stdout
        configs = {file.stem for file in (ROOT / "configs" / path.parent.name).glob("*.yaml")}
        assert configs <= {line.strip() for line in done.stdout.splitlines()} and not done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("runner:\n\tseq_length: 3\n", "line 2: found character"),
        ("runner:\n  seq_length: 3\n seed: 4\n", "line 3: "),
        ("runner: [1\ndata: 3\n", "line 2: expected ',' or ']'"),
        ("data: {}\ndata: {}\n", "line 2: found duplicate key data"),
        ("data: \x07\n", "not YAML that can be read"),
    ],
)
def test_a_file_that_is_not_yaml_is_told_in_a_line(tmp_path, content, said) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    command = [sys.executable, str(SCRIPT.parent / "main_grpo.py"), "--config-path", str(tmp_path), "--config-name", "mine", "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S, check=False)
    printed = " ".join(done.stderr.split())
    assert done.returncode == 1 and printed.startswith("error: ") and said in printed and len(done.stderr.splitlines()) <= 5, done.stderr


@pytest.mark.parametrize("name", ["mine.yaml", "./mine.yaml", "{folder}/mine.yaml", "{folder}/arithmetic-grpo-megatron.yaml"])
def test_a_configuration_may_lie_anywhere_and_be_made_of_those_that_are_shipped(tmp_path, name) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    path = name.format(folder=folder)
    (folder / Path(path).name).write_text("defaults:\n  - base/grpo-megatron\n  - _self_\n\nrunner:\n  seq_lenth: 8\n")
    done = subprocess.run(["bash", str(SCRIPT), path, "--check"], cwd=folder, capture_output=True, text=True, timeout=HANG_S, check=False)
    printed = " ".join(done.stderr.split())
    assert "unknown key runner.seq_lenth: did you mean runner.seq_length?" in printed and "model_path is missing" in printed, printed
    assert "the tiny CPU default" not in done.stdout
    assert [left.name for left in folder.iterdir()] == [Path(path).name], "hydra leaves no log and no folder of its own"


def test_a_configuration_that_is_nowhere_is_told_with_both_places(tmp_path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "gone", "--check"], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 2 and "no config named gone in configs/reasoning, and no file gone.yaml" in done.stderr, done.stderr


def test_a_key_without_its_section_is_answered_with_the_section() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--check", "max_steps=5"], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1 and done.stderr == "error: unknown key max_steps: did you mean runner.max_steps?\n"


@pytest.mark.parametrize("name", ["configs/reasoning/arithmetic-grpo-megatron.yaml", "arithmetic-grpo-megatron.yaml"])
def test_the_path_of_a_configuration_names_it(name) -> None:
    done = subprocess.run(["bash", str(SCRIPT), name, "--check"], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert "no config named" not in done.stderr and "no findings" in done.stdout, done.stderr
