"""A short campaign of random faults; ``make chaos`` runs a long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.engine_source import ENGINE_ENV
from tests.ranks import run_ranks


@pytest.mark.slow
def test_a_short_campaign_finds_no_broken_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten kinds of faults in seven phases. A busy machine is late for its deadlines, which is no finding."""
    record = tmp_path / "campaign.json"
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    words = ["--faults", "10", "--seed", "72", "--timeout", "6", "--slack", "90", "--engine-starts", "1", "--json", str(record)]
    (said,) = run_ranks(1, "tests.chaos.campaign", "run", words=words)
    found = json.loads(record.read_text())
    assert found["violation"] is None
    assert len(found["steps"]) == 10
    print(said[said.index("| fault") :])
