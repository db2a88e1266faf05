"""The claim that the doctor asks the real frameworks, and finds what was left behind in this machine's shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsync.cli.doctor.finding import Finding
from rlsync.transport.shm import SHM_DIR
from tests.deadlines import HANG_S
from tests.integration.engine_source import ENGINE_ENV

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_doctor_asks_torch_megatron_and_vllm() -> None:
    # As a killed worker of this machine leaves it: vLLM itself says under which name.
    left = SHM_DIR / f"vllm_dist_doctor_{os.getpid()}"
    left.write_bytes(b"")
    try:
        run = subprocess.run(
            [sys.executable, "-m", "rlsync.cli", "doctor", "--json", "--ring-bytes", str(2**60)],
            cwd=ROOT, env={**os.environ, **ENGINE_ENV}, capture_output=True, text=True, timeout=HANG_S,
        )  # fmt: skip
    finally:
        left.unlink()
    findings = [Finding(**fields) for fields in json.loads(run.stdout)]
    text = "\n".join(f"{f.level} {f.text}" for f in findings)
    assert "ok vLLM finds the rlsync plug-in" in text
    assert "ok Megatron-Core 0.16.1 can be used on" in text
    assert "has what a sync needs" in text and "rlsync was not among them" not in text
    assert "ok torch " in text
    assert any("no process here uses" in f.text and ("vllm_dist_doctor" in f.text or " more, " in f.text) for f in findings), text
    problems = [f.text for f in findings if f.level == "problem"]
    assert run.returncode == 1 and len(problems) == 1 and "the ring needs" in problems[0], problems
