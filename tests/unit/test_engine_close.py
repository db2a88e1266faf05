"""What is left of an engine that is closed where vLLM fails to end it, and arguments that an engine has by itself.

vLLM is replaced; the process that it leaves is one.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from rlsync.engine.handles.local import Engine
from rlsync.errors import ConfigError


class Failing:
    """An AsyncLLM with a core that runs on, whose end fails."""

    output_handler = None

    def __init__(self, core: subprocess.Popen[bytes]) -> None:
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[core])))

    def shutdown(self, timeout: float) -> None:
        raise RuntimeError("the monitor of the cores is gone")


def test_no_process_outlives_an_engine_that_vllm_fails_to_end() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as core:
        try:
            engine = Engine("e", {})
            engine._llm = Failing(core)
            engine._calls.start()
            engine._processes.look(engine._llm)
            with pytest.raises(RuntimeError, match="the monitor of the cores is gone"):
                engine.close()
            assert not psutil.pid_exists(core.pid)
            assert engine._calls.closed
            # Idempotent all the same.
            engine.close()
        finally:
            core.kill()


def test_the_transfer_of_weights_is_rlsyncs_alone() -> None:
    with pytest.raises(ConfigError, match="engine e0: weight_transfer_config is that of rlsync"):
        Engine("e0", {"model": "m", "weight_transfer_config": {"backend": "nccl"}})
