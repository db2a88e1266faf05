"""What every test process needs: its environment, GPU tests that skip themselves where there are no GPUs, and which files go together."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

from rlsync.engine.forking import EngineProcess
from tests.ranks import CAN_FORK, WITH_VLLM
from workers.ray_access import LOCAL, protect_own_cluster

# A busy machine is slow now and then, which is no finding.
settings.register_profile("rlsync", deadline=None)
settings.load_profile("rlsync")

# Before torch, vLLM or Ray are imported, and inherited by every process a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
if CAN_FORK:
    # On CPU an engine would compile one function of its sampler, which takes longer than all that it computes.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray gives its workers a niceness of 15, with which they wait for all else that runs beside them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
# As the entry point of a run does; runs that tests start make a token of their own (``tests.ray_token``).
protect_own_cluster(LOCAL)

# One process imports vLLM for engines and for ranks, which are forked from it.
EngineProcess.preload = WITH_VLLM

# Files that share fixtures of a session with another one, in whose lane they run, after it and in this order: they cost it engines.
SHARED = {
    "tests/integration/test_engine_sync_faults.py": "tests/integration/test_engine_sync.py",
    "tests/integration/test_gloo_sync.py": "tests/integration/test_engine_sync.py",
}
# Files each of whose tests starts engines on GPUs of its own accord and shares nothing: any lane takes any of them.
APART = tuple(f"tests/gpu/test_{name}_cuda.py" for name in ("adapters", "engine", "families"))
# Files that wait for most of their time: for deadlines to pass, and for stopped and killed processes to be missed. They start no engine. Of
# three lanes or more one takes these and nothing else, so that they keep no lane from computing.
WAITING = tuple(
    f"tests/{name}.py"
    for name in (
        "integration/test_remote",
        "unit/test_coordinator_faults",
        "unit/test_gloo_channel",
        "unit/test_nccl_channel",
        "unit/test_late_engines",
        "unit/test_gloo_group",
    )
)
# Files that take a minute or more, or whose group does, the longest first: else one lane works on the last of them alone.
LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        "integration/test_engine_sync",
        "integration/test_grpo",
        "integration/test_oracle",
        "integration/test_sft",
        "integration/test_lora",
        "integration/test_bench",
        "integration/test_megatron_training",
        "integration/test_actor",
        "integration/test_http_engine",
        "integration/test_gloo_hosts",
        "integration/test_own_trainer",
        "chaos/test_chaos",
        "integration/test_picture_engines",
        "integration/test_convert",
        "integration/test_remote",
        "integration/test_checkpoint",
        "integration/test_sft_actor",
        "integration/test_bridge",
        "integration/test_replay",
    )
)


def _gpu_lack(count: int) -> str | None:
    """Why a test for ``count`` CUDA devices cannot run here, or None."""
    import torch  # only sessions that hold GPU tests pay for it here

    if not torch.cuda.is_available():
        return f"needs {count} CUDA device(s); torch {torch.__version__} sees none"
    seen = torch.cuda.device_count()
    return None if seen >= count else f"needs {count} CUDA devices; torch sees {seen}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports the modules of tests, with all that they import, of which nothing is garbage, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure() -> None:
    # Or extensions complain of what outlives the interpreter.
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first. ``@pytest.mark.gpu`` or ``@pytest.mark.gpu(2)``: the number of CUDA devices the test needs, 1 by default."""
    places = {file: place for place, file in enumerate(LONGEST)}
    files = [item.nodeid.partition("::")[0] for item in items]
    shared = {file: place for place, file in enumerate(SHARED)}

    def place_of(i: int) -> tuple[int, int]:
        return places.get(SHARED.get(files[i], files[i]), len(LONGEST)), shared.get(files[i], -1)

    order = sorted(range(len(items)), key=place_of)
    items[:] = [items[i] for i in order]
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One file after the other in each lane, as ``--dist=loadfile``, but for files that share, those whose tests share nothing, and those
    that wait."""
    from xdist.scheduler import LoadFileScheduling

    class SharingScheduling(LoadFileScheduling):
        _waiting: Any = None

        def schedule(self) -> None:
            if self.collection is None and len(self.nodes) > 2:
                self._waiting = self.nodes[-1]
            super().schedule()

        def _assign_work_unit(self, node: Any) -> None:
            # The other lanes take what waits when nothing else is left.
            waits = node is self._waiting
            fitting = next((scope for scope in self.workqueue if (scope in WAITING) == waits), None)
            if fitting is not None:
                self.workqueue.move_to_end(fitting, last=False)
            elif waits:
                node.shutdown()
                return
            super()._assign_work_unit(node)

        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file in APART else SHARED.get(file, file)

    return SharingScheduling(config, log)
