"""GRPO runs of the tiny model with experts on GPUs, in bf16, as subprocesses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from workers.metrics_log import read_metrics

REPO = Path(__file__).resolve().parents[2]
# More experts and layers than the CPU default has, in bf16: near ties, which actor and engines break differently.
OVERRIDES = (
    "actor.model.precision=bf16", "arithmetic.num_experts=32", "arithmetic.num_layers=4", "runner.max_steps=6", "runner.save_interval=-1",
    "runner.val_before_train=False", "data.val_data_paths=[]", "rollout.gpu_memory_utilization=0.2", "warm_start.num_steps=60",
)  # fmt: skip


def steps(root: Path, name: str, placement: str, *overrides: str) -> list[dict[str, Any]]:
    """Metrics of each step of a run in ``root/name``. ``placement``: JSON of ``cluster.component_placement``."""
    command = [
        sys.executable, "-m", "tests.integration.grpo_run", "none", "--placement", placement,
        "--config", "arithmetic-grpo-moe-megatron", f"runner.output_dir={root}", f"runner.experiment_name={name}", *OVERRIDES, *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [line for line in read_metrics(root / name) if line["step"]]
