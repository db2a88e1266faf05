"""What every test process needs: its environment, and GPU tests that skip themselves where there are no GPUs."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A busy machine is slow now and then, which is no finding.
settings.register_profile("rlsync", deadline=None)
settings.load_profile("rlsync")

# Before torch, vLLM or Ray are imported, and inherited by every process a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def _gpu_lack(count: int) -> str | None:
    """Why a test for ``count`` CUDA devices cannot run here, or None."""
    import torch  # only sessions that hold GPU tests pay for it here

    if not torch.cuda.is_available():
        return f"needs {count} CUDA device(s); torch {torch.__version__} sees none"
    seen = torch.cuda.device_count()
    return None if seen >= count else f"needs {count} CUDA devices; torch sees {seen}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``@pytest.mark.gpu`` or ``@pytest.mark.gpu(2)``: the number of CUDA devices the test needs, 1 by default."""
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        reason = _gpu_lack(*marker.args or (1,))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """From the reports, which come from all processes that run tests."""
    skipped = [r for r in terminalreporter.getreports("skipped") if isinstance(r, pytest.TestReport) and "gpu" in r.keywords]
    if skipped:
        terminalreporter.section(f"NOT RUN: {len(skipped)} GPU tests", sep="!", yellow=True)
        for report in sorted(skipped, key=lambda r: r.nodeid):
            assert isinstance(report.longrepr, tuple)
            terminalreporter.write_line(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
