"""A short campaign of random faults; ``make chaos`` runs a long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import HANG_S

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_short_campaign_finds_no_broken_promise(tmp_path: Path) -> None:
    """Ten kinds of faults in seven phases. A busy machine is late for its deadlines, which is no finding."""
    record = tmp_path / "campaign.json"
    command = [sys.executable, "-m", "tests.chaos.campaign", "--faults", "10", "--seed", "72", "--timeout", "10", "--slack", "90"]
    command += ["--engine-starts", "1"]
    done = subprocess.run([*command, "--json", str(record)], cwd=REPO, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = json.loads(record.read_text())
    assert found["violation"] is None
    assert len(found["steps"]) == 10
    print(done.stdout[done.stdout.index("| fault") :])
