"""The program of docs/your-own-trainer.md under real Ray, with real Megatron ranks and a real vLLM engine."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsync.engine.handles.ray import RayEngine
from rlsync.errors import ConfigError, EngineDirtyError, RlsyncError
from tests.deadlines import HANG_S
from tests.integration.engine_source import ENGINE_ENV, NUM_BLOCKS
from tests.models import save_tiny_model
from tests.ranks import CAN_FORK, REPO, WITH_VLLM
from workers.forked_workers import ForkedWorker, Forks

NUM_TOKENS = 8


class ForkedOwner(ForkedWorker):
    """Of an engine."""

    preload = WITH_VLLM


def greedy(folder: Path) -> tuple[int, ...]:
    """What transformers says to the program's prompt."""
    model, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), [5, 6, 7]
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[3:])


def ask_until_gone(engine: RayEngine) -> None:
    """Ray ends an actor in its own time."""
    while engine.state:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_trainer_of_ones_own_keeps_an_engine_in_a_ray_actor_equal_to_itself(tmp_path: Path) -> None:
    """It starts without weights, gets those of the start, then trained ones; each time it answers as transformers from the same folder."""
    folder, trained = save_tiny_model(tmp_path / "hf", "qwen2", seed=1), tmp_path / "trained"
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **ENGINE_ENV, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    run = subprocess.run(
        [sys.executable, str(REPO / "examples/library/ray_trainer.py"), str(folder), str(trained)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    found = [tuple(map(int, line.split(","))) for line in re.findall(r"version \d: .* tokens \(([^)]*)\)", run.stdout)]
    assert found == [greedy(folder), greedy(trained)]
    assert found[0] != found[1]


@pytest.mark.slow
def test_what_goes_wrong_in_the_actor_arrives_as_it_was_raised(tmp_path: Path) -> None:
    import ray

    folder = save_tiny_model(tmp_path / "hf", "qwen2", seed=1)
    variables = {**ENGINE_ENV, "PYTHONPATH": os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))}
    with contextlib.ExitStack() as stack:
        executable = {}
        if CAN_FORK:
            forks = Forks(ForkedOwner)
            stack.callback(forks.close)
            executable = {"py_executable": forks.command()}
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables, **executable}
        )  # fmt: skip
        stack.callback(ray.shutdown)
        arguments = {"model": str(folder), "dtype": "float32", "enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True}
        arguments["num_gpu_blocks_override"] = NUM_BLOCKS
        with pytest.raises(ConfigError, match=r"cannot be synced: offload_config"):
            RayEngine.launch("refused", {**arguments, "cpu_offload_gb": 1})
        engine = RayEngine.launch("dirty", {**arguments, "load_format": "dummy"})
        assert (engine.num_workers, engine.state) == (1, "dirty")
        with pytest.raises(EngineDirtyError, match="load_format=dummy"):
            engine.generate([[1]], {"max_tokens": 1})
        engine.close()
        with pytest.raises(RlsyncError, match="the Ray actor of engine dirty is gone"):
            ask_until_gone(engine)
        engine.close()
