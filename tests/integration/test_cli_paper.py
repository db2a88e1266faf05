"""The claim that engine workers on paper hold what vLLM's own loaders were seen to fill, buffer for buffer and piece for piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine_source import ENGINE_ENV
from tests.models import save_tiny_model
from tests.ranks import run_ranks
from tests.vision_folders import save_vision_folder

pytestmark = pytest.mark.slow

ONE, TWO, FOUR = ({"tp_size": size} for size in (1, 2, 4))
# Experts are whole on each rank under expert parallelism, and cut by all ranks of an engine without it.
EXPERTS = {"tp_size": 2, "expert_parallel": True}
ATTENTION = {"tp_size": 2, "dp_size": 2}
SIZES: dict[str, list[dict[str, Any]]] = {
    "llama": [ONE, TWO],
    "qwen2": [ONE, TWO, FOUR],
    "qwen3": [ONE, TWO],
    "glm4": [TWO],
    "seed_oss": [TWO],
    "smollm3": [TWO],
    "mixtral": [TWO, EXPERTS],
    "qwen2_moe": [ONE, TWO, EXPERTS, ATTENTION, ATTENTION | EXPERTS],
    "qwen3_moe": [ONE, FOUR, EXPERTS, ATTENTION | EXPERTS],
    "glm4_moe": [ONE, TWO, EXPERTS, ATTENTION, ATTENTION | EXPERTS],
    "deepseek_v3": [TWO, EXPERTS, ATTENTION, ATTENTION | EXPERTS],
    "moonlight": [TWO, ATTENTION | EXPERTS],
}
VISION_SIZES: dict[str, list[dict[str, Any]]] = {"qwen2_5_vl": [ONE, TWO], "qwen3_vl": [ONE, TWO], "qwen3_vl_moe": [TWO, EXPERTS]}


def test_paper_is_what_loaders_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four workers of qwen2 hold the same key-value head; the vocabulary of 131 is padded to 192; qwen3 is tied. Of two
    workers one has four of Mixtral's seven experts, the other three."""
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    changes: dict[str, dict[str, Any]] = {"qwen3": {"tied": True}, "mixtral": {"num_local_experts": 7}}
    folders = {f: str(save_tiny_model(tmp_path / f, f, num_hidden_layers=2, **changes.get(f, {}))) for f in SIZES}
    # vLLM loads stacked experts in the form of released files.
    released: dict[str, dict[str, Any]] = {"qwen3_vl_moe": {"transposed": True}}
    folders |= {f: str(save_vision_folder(tmp_path / f, f, **released.get(f, {}))) for f in VISION_SIZES}
    sizes, report = SIZES | VISION_SIZES, tmp_path / "report"
    run_ranks(1, "tests.integration.paper_workers", "compare", folders=folders, sizes=sizes, report=str(report))
    found = json.loads(report.read_text())
    seats = [fields.get("tp_size", 1) * fields.get("dp_size", 1) for some in sizes.values() for fields in some]
    assert len(found) == sum(seats)
    assert {worker: differences for worker, differences in found.items() if differences} == {}
