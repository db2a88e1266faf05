"""The GRPO run itself, shortened: script in, files out. Real Megatron ranks, real vLLM, real Ray."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.greedy import greedy
from tests.integration.script_runs import by_itself, engine_core, exit_code, run, started, strike
from workers.metrics_log import read_metrics
from workers.reward import VerifierPool
from workers.rollout_ahead import STATE

# A run takes a minute, or several beside others.
pytestmark = pytest.mark.slow

SMALL = [
    "arithmetic.path=${runner.output_dir}/world",
    "arithmetic.num_problems=256", "arithmetic.num_supervised=1024", "data.rollout_batch_size=16", "algorithm.group_size=8",
    "warm_start.num_steps=100", "algorithm.training_batch_size_per_gpu=64", "weight_sync.timeout_s=40",
    # Or each engine writes zeros to a GiB.
    "rollout.vllm.num_gpu_blocks_override=256",
]  # fmt: skip
SCRIPT = ["bash", "examples/reasoning/run_main_grpo_math.sh", *SMALL]


def main(config: str = "arithmetic-grpo-megatron") -> list[str]:
    """The same run as that of the script."""
    return [*by_itself("examples/reasoning/main_grpo.py", "configs/reasoning", config), *SMALL]


# Half of the prompts are scored while engines may still answer others.
EARLY = "algorithm.early_scoring_prompts=8"
SAME_MEANING = ("actor/training/actor/final_loss", "rollout/reward_scores", "actor/training/actor/grad_norm", "sync/version")
VALIDATION = ("val/reward", "val/fraction_correct", "val/response_length", "val/fraction_of_samples_properly_ended", "val/num_problems")


def resumable(finished: Path, folder: Path) -> str:
    """Lay out in ``folder`` what a run had after its fourth step, which saves another the warm start; the option to go on from it."""
    shutil.copytree(finished / "run" / "checkpoints" / "global_step_4", folder / "run" / "checkpoints" / "global_step_4")
    shutil.copytree(finished / "world", folder / "world")
    return "runner.resume_dir=auto"


def write_puzzles(folder: Path) -> str:
    """Prompts that no training taught, so that what a model says to them is another thing after every few steps; the option to validate
    with them."""
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices("0123456789+=", k=5)), "solutions": str(draw.randint(0, 8))} for _ in range(60)]
    (folder / "puzzles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.val_data_paths=[{folder}/puzzles.jsonl]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Eight steps with a checkpoint and a validation after the fourth and at the end, and a validation before the first."""
    folder = tmp_path_factory.mktemp("grpo")
    return folder, run(SCRIPT, folder, "runner.max_steps=8", "runner.save_interval=4", EARLY, write_puzzles(folder))


def test_reward_rises_and_engines_agree_with_the_actor_at_every_step(finished):
    first, *lines = read_metrics(finished[0] / "run")
    assert first["step"] == 0 and [line["step"] for line in lines] == list(range(1, 9))
    rewards = [line["rollout/reward_scores"] for line in lines]
    assert sum(rewards[-2:]) / 2 - sum(rewards[:2]) / 2 >= 0.1, rewards
    assert all(line["rollout/logprob_diff_mean"] <= 1e-3 for line in lines)
    assert [line["sync/version"] for line in lines] == list(range(8))
    assert all(line["sync/bytes"] > 0 and line["sync/gb_per_s"] > 0 for line in lines)
    assert all(line["time/actor/early_inference"] > 0 and line["rollout/version_lag"] == 0 for line in lines)
    assert all(0 <= line[name] < 1 for line in lines for name in ("perf/idle", "perf/actor_idle", "perf/engine_idle"))


def test_reward_of_a_model_with_experts_rises_on_two_expert_ranks(tmp_path):
    run(
        main("arithmetic-grpo-moe-megatron"), tmp_path, "runner.max_steps=8", "runner.save_interval=-1",
        "runner.val_before_train=False", "data.val_data_paths=[]", "algorithm.training_batch_size_per_gpu=32",
    )  # fmt: skip
    lines = [line for line in read_metrics(tmp_path / "run") if line["step"]]
    rewards = [line["rollout/reward_scores"] for line in lines]
    assert sum(rewards[-2:]) / 2 - sum(rewards[:2]) / 2 >= 0.1, rewards
    assert all(line["rollout/logprob_diff_mean"] <= 1e-3 for line in lines)
    # Four experts, of which a token takes two: twice the mean is the most.
    assert all(1 <= line["moe/load_imbalance"] <= 2 for line in lines)


def test_pictures_are_those_of_the_actor_and_weights_in_step_until_an_interrupt_ends_every_process(tmp_path):
    """The reward of questions about pictures rises. Then the negative controls, by which the measures are not blind: engines that see
    other pictures than the actor in one step, and that are not synced after it; and Ctrl-C, which the run does not expect."""
    command = ["-m", "tests.integration.grpo_run", "other-pictures", "--config", "pictures-grpo-megatron"]
    options = [
        f"pictures.path={tmp_path}/pictures", "pictures.num_train=512", "pictures.num_held_out=16", "pictures.questions=[colour]",
        # Deeper models with pictures are those of ``test_oracle``.
        "pictures.num_layers=1", "pictures.vision_depth=1", "warm_start.num_steps=80", "warm_start.batch_size=16",
        "algorithm.group_size=8", "runner.max_steps=40", "runner.save_interval=-1", "runner.val_check_interval=-1",
        "data.num_workers=0", "weight_sync.timeout_s=40", "rollout.vllm.num_gpu_blocks_override=256",
    ]  # fmt: skip
    with started(command, tmp_path, *options) as process:
        assert exit_code(process, strike(process, tmp_path, 13, lambda family: family[0], signal.SIGINT)) == 130
    assert "interrupted" in (tmp_path / "output.log").read_text()
    first, *lines = read_metrics(tmp_path / "run")
    lines, blind, unsynced = lines[:8], lines[8], lines[9:]
    rewards = [line["rollout/reward_scores"] for line in lines]
    assert sum(rewards[-2:]) / 2 - sum(rewards[:2]) / 2 >= 0.1, rewards
    assert all(line["rollout/logprob_diff_mean"] <= 1e-3 for line in lines) and blind["rollout/logprob_diff_mean"] > 0.1
    assert (first["step"], first["val/num_problems"]) == (0, 16) and blind["rollout/reward_scores"] < rewards[-1] - 0.3
    assert all(line["rollout/logprob_diff_mean"] > 1e-3 for line in unsynced[1:]), unsynced


def test_rollouts_a_step_ahead_are_of_the_weights_before_and_raise_the_reward_too(finished, tmp_path):
    """From a checkpoint of a run that did all in turn. One of this run's own has the samples of its next step, but for the last."""
    run(
        main(), tmp_path, resumable(finished[0], tmp_path), "runner.async_steps=1", "runner.max_steps=12", "runner.save_interval=11",
        "runner.val_before_train=False", "data.val_data_paths=[]",
    )  # fmt: skip
    lines = read_metrics(tmp_path / "run")
    assert [line["rollout/version_lag"] for line in lines] == [0] + [1] * 7
    assert [line["sync/version"] for line in lines] == list(range(4, 12))
    differences = [line["rollout/logprob_diff_mean"] for line in lines]
    assert differences[0] <= 1e-3 < min(differences[1:]), "what one step changes is in them"
    rewards = [line["rollout/reward_scores"] for line in lines]
    assert sum(rewards[-2:]) / 2 - sum(rewards[:2]) / 2 >= 0.1, rewards
    saved = [torch.load(tmp_path / f"run/checkpoints/global_step_{step}/data/data.pt", weights_only=True) for step in (11, 12)]
    assert [state["handed_out"] for state in saved] == [11, 12] and STATE not in saved[1]
    assert saved[0][STATE]["samples"]["versions"] == [10] * 128


# A reward function that says what it saw.
WITNESS = """
import json
from pathlib import Path

def score(prompts, responses, references, metadata):
    rewards = [0.25 if text in accepted else -0.5 for text, accepted in zip(responses, references)]
    with (Path(__file__).parent / "seen.jsonl").open("a") as file:
        file.write(json.dumps([prompts, references, metadata, rewards]) + "\\n")
    return rewards
"""


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory) -> tuple[Path, Path]:
    """Eight steps of adapters alone, which engines get beside the model of the fourth step, which is given too; with rewards of a function.

    That engines answer with merged weights as with these is a claim of ``test_oracle``.
    """
    folder = tmp_path_factory.mktemp("adapted")
    base = finished[0] / "run" / "checkpoints" / "global_step_4" / "actor" / "hf_model"
    (folder / "witness.py").write_text(WITNESS)
    (folder / "val.jsonl").write_text('{"prompt": "1+2=", "solutions": "3", "level": 7}\n{"prompt": "3+0=", "kind": ["x"]}\n')
    run(
        main(), folder, "warm_start=null", f"rollout.model.model_path={base}", "actor.lora.r=16", "weight_sync.lora=adapter",
        "actor.optim.lr=1e-2", "runner.max_steps=8", "runner.save_interval=8", f"reward.reward_type={folder}/witness.py:score",
        "reward.reward_scale=4",
        f"data.val_data_paths=[{folder}/val.jsonl]", "runner.val_check_interval=1", "runner.val_before_train=False",
    )  # fmt: skip
    return folder, base


def test_reward_rises_with_adapters_alone_and_engines_agree_with_the_actor(adapted):
    """Engines get their base once; merged in a checkpoint, adapters are what PEFT makes of them beside it."""
    from peft import PeftModel

    folder, base = adapted
    lines = read_metrics(folder / "run")
    rewards = [line["rollout/reward_scores"] for line in lines]
    assert sum(rewards[-2:]) / 2 - sum(rewards[:2]) / 2 >= 0.1, rewards
    assert all(line["rollout/logprob_diff_mean"] <= 1e-3 for line in lines)
    whole, *later = [(line["sync/bytes"], line["sync/held_bytes"]) for line in lines]
    assert whole[1] == 0 and len(set(later)) == 1 and sum(later[0]) == whole[0] and later[0][0] < whole[0] / 2, (whole, later)
    actor = folder / "run" / "checkpoints" / "global_step_8" / "actor"
    adapter = load_file(actor / "hf_adapter" / "adapter_model.safetensors")
    shards = [
        tensor for path in actor.glob("iter_*/*/model_optim_rng.pt") for tensor in torch.load(path, weights_only=True)["model"].values()
    ]
    assert sum(t.numel() for t in shards) < 2 * sum(t.numel() for t in adapter.values()), "two tensor ranks, adapters alone"
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), actor / "hf_adapter").merge_and_unload().state_dict()
    saved = load_file(actor / "hf_model" / "model.safetensors")
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in saved.items())
    assert any(not torch.equal(tensor, load_file(base / "model.safetensors")[name]) for name, tensor in saved.items())


def test_a_validation_answers_as_transformers_does_with_the_checkpoint_of_its_step(finished):
    folder = finished[0]
    found = {line["step"]: [line[name] for name in VALIDATION] for line in read_metrics(folder / "run") if "val/reward" in line}
    assert sorted(found) == [0, 4, 8] and len({tuple(numbers) for numbers in found.values()}) == 3, "other weights, other answers"
    for step in (4, 8):
        wanted = transformers_validation(
            folder / "run" / "checkpoints" / f"global_step_{step}" / "actor" / "hf_model", folder / "puzzles.jsonl"
        )
        assert found[step] == pytest.approx(wanted), step
    assert "validation of the initial weights: reward" in finished[1] and "validation after step 8: reward" in finished[1]


def transformers_validation(model: Path, puzzles: Path) -> list[float]:
    """The numbers of ``VALIDATION`` as transformers answers greedily with an exported checkpoint, a prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    end, rows = tokenizer.eos_token_id, [json.loads(line) for line in puzzles.read_text().splitlines()]
    answers = [greedy(model, tuple(tokenizer(row["prompt"])["input_ids"]), 4).token_ids for row in rows]
    answers = [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]
    texts = tokenizer.batch_decode([list(answer) for answer in answers], skip_special_tokens=True)
    with VerifierPool(2) as pool:
        correct = sum(pool.check(texts, [[row["solutions"]] for row in rows])) / len(rows)
    return [correct, correct, sum(map(len, answers)) / len(rows), sum(end in answer for answer in answers) / len(rows), len(rows)]


def test_results_are_where_users_look_for_them(finished):
    folder, output = finished
    found = {path.name for path in (folder / "run").iterdir()}
    assert {"metrics.jsonl", "tensorboard", "config.yaml", "rewards.png", "checkpoints", "worker_logs"} <= found
    step = folder / "run" / "checkpoints" / "global_step_8"
    assert (step / "actor" / "latest_checkpointed_iteration.txt").read_text() == "8"
    assert (step / "data" / "data.pt").exists() and (step / "actor" / "hf_model" / "tokenizer.json").exists()
    config = (folder / "world" / "model" / "config.json").read_bytes()
    assert (step / "actor" / "hf_model" / "config.json").read_bytes() == config
    assert "lm_head.weight" not in load_file(step / "actor" / "hf_model" / "model.safetensors"), "the model is tied"
    assert "qwen2.5-7b-grpo-megatron" in output and "mean reward" in output
    logs = "".join(path.read_text() for path in (folder / "run/worker_logs").glob("**/*") if path.is_file())
    assert "decoder layers: Megatron's local ones, attention by torch's scaled_dot_product_attention" in logs
    assert "sequences of a micro-batch are padded: attention is not TransformerEngine's, and runner.packing auto" in logs
    assert all(line["time/sync_weights"] > 0 for line in read_metrics(folder / "run")[1:])


def test_a_resumed_run_replaces_the_engine_it_may_lose_goes_on_alike_and_ends_with_the_next(finished, tmp_path):
    """Three claims on one run: the steps after a resume equal the uninterrupted ones, also those after an engine was lost and replaced
    where the configuration allows it, and an engine that may not be replaced is one clear error."""
    options = resumable(finished[0], tmp_path), "runner.save_interval=4", "rollout.max_engine_restarts=1", EARLY, write_puzzles(finished[0])
    with started(main(), tmp_path, "runner.max_steps=16", "+actor.megatron.mbridge=True", *options) as process:
        family = strike(process, tmp_path, 1, engine_core, signal.SIGKILL)
        restarts = "rollout/engine_restarts"
        family += strike(process, tmp_path, 4, engine_core, signal.SIGKILL, when=lambda line: line.get(restarts) == 1)
        code = exit_code(process, family)
    output = (tmp_path / "output.log").read_text()
    assert output.count("replacing an engine: process") == 1
    assert code == 1 and "error: " in output and "engine 0" in output.split("error: ")[1], output[-4000:]
    assert "if an engine is lost: rollout.max_engine_restarts is 1, and 1 were replaced" in " ".join(output.split()), output[-4000:]
    assert "worker_logs" in output and "ray::" not in output and "Traceback" not in output, output[-4000:]
    whole, resumed = read_metrics(finished[0] / "run")[5:], read_metrics(tmp_path / "run")[:4]
    assert [line["step"] for line in resumed] == [5, 6, 7, 8]
    assert resumed[0][restarts] == 0
    assert [[line[name] for name in SAME_MEANING] for line in resumed] == [[line[name] for name in SAME_MEANING] for line in whole]
    # The whole run validated after the fourth step, with which the resumed one began, and both after the eighth.
    assert [resumed[-1][name] for name in VALIDATION] == [whole[-1][name] for name in VALIDATION]


def test_an_engine_whose_owner_is_stopped_in_a_rollout_is_replaced_and_the_next_one_ends_the_run(tmp_path):
    """No deadline inside an engine's process can act while that process is stopped: one of the run has to, 4 s later."""
    options = [
        *SMALL, "warm_start=null", "runner.max_steps=4", "runner.save_interval=-1", "runner.val_before_train=False",
        "data.val_data_paths=[]", "rollout.max_engine_restarts=1", "rollout.timeout_s=10",
    ]  # fmt: skip
    with started(["-m", "tests.integration.grpo_run", "stopped-engines"], tmp_path, *options) as process:
        family = strike(process, tmp_path, 2, lambda family: family[0], signal.SIGCONT)
        code = exit_code(process, family)
    output = (tmp_path / "output.log").read_text()
    silent = "engine 0 did not answer stream within 14 s: its process is stopped or stuck"
    assert output.count("replacing an engine: the Ray actor of engine 0 does not answer") == 1
    assert code == 1 and output.count("error: ") == 1 and silent in " ".join(output.split("error: ")[1].split()), output[-4000:]
    assert "Traceback" not in output, output[-4000:]
    assert [line["rollout/engine_restarts"] for line in read_metrics(tmp_path / "run")] == [0, 1]


def test_a_reward_function_sees_whole_rows_in_training_and_in_validation(adapted):
    folder, _ = adapted
    lines = read_metrics(folder / "run")[:2]
    seen = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    # Of a step 16 prompts with 8 responses each, in the order in which these ended, then 2 with one.
    assert [len(rewards) for *_, rewards in seen[:36]] == 2 * ([8] * 16 + [1] * 2)
    for line, step in zip(lines, (seen[:18], seen[18:36]), strict=True):
        rewards, validation = [reward for *_, group in step[:16] for reward in group], [reward for *_, (reward,) in step[16:]]
        assert (line["rollout/reward_scores"], line["val/reward"]) == (4 * sum(rewards) / 128, 4 * sum(validation) / 2)
        assert [call[:3] for call in step[16:]] == [[["1+2="], [["3"]], [{"level": 7}]], [["3+0="], [[]], [{"kind": ["x"]}]]]
        assert all(call[1] == [[str(eval(call[0][0][:-1]))]] * 8 for call in step[:16]) and "val/fraction_correct" not in line
