"""The claim that engine workers on paper hold what vLLM's own loaders were seen to fill, buffer for buffer and piece for piece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.engine_source import ENGINE_ENV
from tests.models import FAMILIES, save_tiny_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def test_paper_is_what_loaders_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four workers of qwen2 hold the same key-value head; the vocabulary of 131 is padded to 192; qwen3 is tied."""
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    folders = {f: str(save_tiny_model(tmp_path / f, f, tied=f == "qwen3", num_hidden_layers=2)) for f in FAMILIES}
    report, sizes = tmp_path / "report", {"llama": [1, 2], "qwen2": [1, 2, 4], "qwen3": [1, 2]}
    run_ranks(1, "tests.integration.paper_workers", "compare", folders=folders, sizes=sizes, report=str(report))
    found = json.loads(report.read_text())
    assert len(found) == sum(map(sum, sizes.values()))
    assert {worker: differences for worker, differences in found.items() if differences} == {}
