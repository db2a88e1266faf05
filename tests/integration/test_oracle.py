"""The oracle: after several syncs an engine answers like a fresh engine started from the ``hf_model`` of that version."""

from __future__ import annotations

import pytest

from tests.models import save_tiny_model
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("family", "tied", "topology"),
    [
        ("llama", False, {"tp_size": 2}),
        ("qwen2", True, {"pp_size": 2}),
        ("qwen3", False, {"dp_size": 2}),
    ],
)
def test_a_synced_engine_answers_like_a_fresh_one(tmp_path, monkeypatch, family, tied, topology):
    """Token for token, and within 1e-4 log-probability for log-probability (greedy, fp32)."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # An uncached first generate would spend its time in a compiler.
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    folder = save_tiny_model(tmp_path / "hf", family, tied=tied)
    outputs = run_ranks(
        2, "tests.integration.oracle_ranks", "sync_and_compare", folder=str(folder), topology=topology, out_dir=str(tmp_path)
    )
    assert "ORACLE" in outputs[0]
