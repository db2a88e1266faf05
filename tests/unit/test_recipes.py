"""Claims about recipes on paper: each is a typed configuration that keys override, and the script turns menu and flags into one command."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from transformers import AutoConfig

from rlsync.cli.shapes import SHAPES, twin_of
from rlsync.errors import ConfigError
from rlsync.models import check_config, model_of
from tests.deadlines import HANG_S
from tests.unit.test_sft_config import findings, minimal
from workers.check import SFT_CHECKS, check_run
from workers.check_report import Report
from workers.config import SftConfig, load_config, register_resolvers
from workers.config.schema import ArithmeticRecipe
from workers.synthetic import build_world

pytestmark = pytest.mark.usefixtures("no_gpus")

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, SCRIPT = ROOT / "configs" / "sft", ROOT / "examples" / "recipes" / "run.sh"
# Parameters of the published models, in 10^9, and what the recipe spreads them over.
RECIPES = {
    "llama3_8b": (8.03, "8 ranks (TP 2 DP 4)"),
    "llama3_70b": (70.55, "64 ranks (TP 8 PP 4 DP 2)"),
    "qwen2.5_7b": (7.62, "8 ranks (TP 2 DP 4)"),
    "qwen2.5_72b": (72.71, "64 ranks (TP 8 PP 4 DP 2)"),
    "qwen3_8b": (8.19, "8 ranks (TP 2 DP 4)"),
    "qwen3_30b_a3b": (30.53, "16 ranks (DP 16 EP 8)"),
    "qwen3_235b_a22b": (235.09, "128 ranks (TP 2 PP 8 DP 8 EP 8)"),
    "moonlight_16b": (15.96, "8 ranks (DP 8 EP 8)"),
    "deepseek_v3": (671.03, "256 ranks (PP 16 DP 16 EP 16)"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    build_world(folder, ArithmeticRecipe(num_problems=1, num_supervised=1, num_documents=9, hidden_size=32, num_layers=1))
    return folder / "documents.jsonl"


def check(text: Path, *overrides: str) -> Report:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("pretrain_text", [f"data.train_data_paths=[{text}]", f"runner.output_dir={text.parent}", *overrides])
    return check_run(composed, SFT_CHECKS, "sft")


def test_every_recipe_has_a_row_here() -> None:
    assert RECIPES.keys() == {path.stem for path in (CONFIGS / "recipe").glob("*.yaml")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_run_that_can_start_with_its_price(name: str, text: Path) -> None:
    report = check(text, f"recipe={name}")
    assert report.findings == [] and isinstance(report.config, SftConfig)
    plan = dict(report.plan)
    assert f" {RECIPES[name][0]} B parameters, bf16" in plan["model"] and "random weights" in plan["model"]
    assert plan["actor"].startswith(RECIPES[name][1])
    assert report.memory is not None and 20e9 < report.memory.in_training < 80e9, "it is a recipe for GPUs of 80 GB"


@pytest.mark.parametrize("name", ["llama3_8b", "qwen3_235b_a22b", "deepseek_v3"])
def test_a_twin_runs_on_one_core_whatever_the_layout_of_its_recipe(name: str, text: Path) -> None:
    report = check(text, f"recipe={name}", "+twin=cpu")
    assert report.findings == []
    plan = dict(report.plan)
    assert plan["actor"] == "1 ranks on process slots 0" and " M parameters, fp32" in plan["model"] and plan["steps"] == "4"


@pytest.mark.parametrize("name", SHAPES)
def test_a_twin_has_the_architecture_of_its_shape_and_a_model_that_transformers_knows(name: str) -> None:
    shape, twin = SHAPES[name], twin_of(SHAPES[name])
    assert check_config(twin) == [] and sum(tensor.size for tensor in model_of(twin).tensors()) < 200_000
    assert model_of(twin).features == model_of(shape).features and twin["architectures"] == shape["architectures"]
    assert AutoConfig.for_model(**twin).model_type == shape["model_type"]


def test_keys_stand_above_the_recipe_and_a_layout_that_does_not_fit_is_told(text: Path) -> None:
    report = check(
        text, "recipe=qwen3_8b", "++actor.model.tensor_model_parallel_size=4", "++runner.seq_length=2048", "++actor.optim.lr=1e-4"
    )
    assert report.findings == [] and report.config is not None
    actor = report.config.actor
    assert (actor.model.tensor_model_parallel_size, report.config.runner.seq_length, actor.optim.lr) == (4, 2048, 1e-4)
    (said,) = [said for _, said in check(text, "recipe=deepseek_v3", "++actor.model.decoder_first_pipeline_num_layers=5").findings]
    assert "61 layers cannot be split over pp_size 16 with first_stage_layers 5" in said, said


def test_random_first_weights_are_refused_where_somebody_needs_others() -> None:
    megatron = {"convert_from_hf": False}
    for sections, said in (
        ({"validation": {"generate": True}}, "gives engines no weights to start with; set validation.generate to False"),
        ({"actor": {"lora": {"r": 4}}}, "beside actor.lora, whose base is a model"),
        ({"actor": {"megatron": {"use_hf_ckpt": False}}}, "beside actor.megatron.use_hf_ckpt=False"),
    ):
        merged = {
            **sections,
            "actor": {**sections.get("actor", {}), "megatron": {**megatron, **sections.get("actor", {}).get("megatron", {})}},
        }
        assert f"actor.megatron.convert_from_hf=False {said}" in findings(**merged)
    assert findings(actor={"megatron": megatron}) == ""
    config = load_config(minimal(seeded_model={"path": "/m", "hf_config": "llama4"}), "sft")
    assert config.seeded_model is not None
    with pytest.raises(ConfigError, match=r"names 'llama4'; shapes are known of .*llama3-8b"):
        config.seeded_model.config_json  # noqa: B018


def script(*arguments: str, answers: str = "") -> tuple[int, str]:
    """The last line that the script prints, or its error. Nothing is started."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={"PATH": os.environ["PATH"]},
        input=answers,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    return done.returncode, (done.stdout or done.stderr).strip().splitlines()[-1] if done.returncode == 0 else done.stderr


RUN = "bash examples/sft/run_llm_sft.sh"
TP = "actor.model.tensor_model_parallel_size=2 actor.model.sequence_parallel=True"
STAGES = "actor.model.decoder_first_pipeline_num_layers=null actor.model.decoder_last_pipeline_num_layers=null"


@pytest.mark.parametrize(
    ("flags", "answers", "command"),
    [
        ("--plain", "1\n\n", f"{RUN} arithmetic_pretrain_text"),
        ("--recipe qwen3_8b --data /text", "2\nqwen3_8b\n/text\n", f"{RUN} pretrain_text recipe=qwen3_8b data.train_data_paths=[/text]"),
        (
            "--recipe llama3_8b --hf /hf --twin",
            "3\n\n/hf\n\n",
            f"{RUN} pretrain_text recipe=llama3_8b +twin=cpu actor.megatron.convert_from_hf=True actor.model.model_path=/hf",
        ),
        (
            "--recipe llama3_8b --tp 2 --pp 1 --ep 1 --devices 0-1 --twin",
            "4\n\n2\n\n\n0-1\n\n",
            f"{RUN} pretrain_text recipe=llama3_8b +twin=cpu {TP} actor.model.pipeline_model_parallel_size=1 {STAGES} "
            'actor.model.expert_model_parallel_size=1 cluster.component_placement.actor="0-1"',
        ),
        (
            "--recipe llama3_8b --precision fp16 --twin",
            "5\n\nfp16\n\n",
            f"{RUN} pretrain_text recipe=llama3_8b +twin=cpu actor.model.precision=fp16",
        ),
        ("--to-hf /run/global_step_4 /out", "6\n/run/global_step_4\n/out\n", "rlsync convert /run/global_step_4 /out --to hf"),
    ],
    ids=["plain", "recipe", "from HF", "layout", "precision", "to HF"],
)
def test_flags_and_menu_give_the_same_command(flags: str, answers: str, command: str) -> None:
    assert script(*flags.split(), "--print") == (0, command)
    assert script("--menu", "--print", answers=answers) == (0, command)


def test_paths_of_any_letters_come_to_the_run_and_through_a_shell(text: Path, tmp_path: Path) -> None:
    """Both the command that is shown and what it says to hydra are read anew, by a shell and by hydra."""
    path = Path(shutil.copy(text, tmp_path / 'my text (1) "b".jsonl'))
    code, shown = script("--recipe", "llama3_8b", "--twin", "--data", str(path), "--hf", "/my models/(a)", "--print")
    assert code == 0
    words = shlex.split(shown)
    assert words[-1] == 'actor.model.model_path="/my models/(a)"'
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("pretrain_text", words[3:])
    assert list(composed.data.train_data_paths) == [str(path)] and composed.actor.model.model_path == "/my models/(a)"
    code, shown = script("--to-hf", "/a b/global_step_4", "/out (1)", "--print")
    assert (code, shlex.split(shown)) == (0, ["rlsync", "convert", "/a b/global_step_4", "/out (1)", "--to", "hf"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--recipe llama5_8b", "error: no recipe llama5_8b; there are"),
        ("--recipe", "error: --recipe: no flag that is known, or its value is missing"),
        ("--zp 3", "error: --zp is no flag"),
        ("--twin", "error: --twin is of a recipe"),
        ("--to-hf /run/global_step_4", "error: --to-hf CHECKPOINT FOLDER: the folder to write is missing"),
        ("--tp 2 --to-hf /run/global_step_4 /out", "error: --to-hf stands alone"),
        ("--plain own --to-hf /run/global_step_4 /out", "error: --to-hf stands alone"),
        ("--plain own --recipe llama3_8b --print", "error: --plain is of a configuration that says everything, and --recipe of another"),
    ],
)
def test_what_no_way_is_called_is_refused_before_anything_is_set_up(arguments: str, said: str) -> None:
    code, told = script(*arguments.split())
    assert code == 2 and told.startswith(said)


def test_the_help_lists_every_recipe() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--help"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=HANG_S)
    assert all(name in done.stdout for name in RECIPES) and "set -e" not in done.stdout and not done.stderr
