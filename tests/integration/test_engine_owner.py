"""Claims about the processes of an engine whose owner is killed and can end nothing any more."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlsync.engine.handles.local import shared_segments
from rlsync.engine.plugin import _OWNER_VARIABLE, declare_owner
from tests.deadlines import HANG_S
from tests.integration import owned_engine
from tests.integration.engine_source import ENGINE_ENV
from tests.models import save_tiny_model
from tests.ranks import make_process

pytestmark = pytest.mark.slow


def test_the_processes_of_an_engine_end_with_the_owner_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are forked from a server that outlives it, as are those of runs on CPU."""
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    folder = save_tiny_model(tmp_path / "model", "llama", tied=True)
    pipe, other = multiprocessing.Pipe()
    process = make_process(owned_engine.main, other, str(folder), daemon=False)
    process.start()
    other.close()
    assert pipe.poll(HANG_S)
    children = [psutil.Process(pid) for pid in pipe.recv()]
    mapped = {m.path for child in children for m in child.memory_maps() if m.path.startswith("/dev/shm/")} | shared_segments(children)
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(children, timeout=HANG_S)
    for child in alive:
        child.kill()
    assert len(children) >= 2, "a core and its worker"
    assert [child.pid for child in alive] == []
    assert [path for path in mapped if os.path.exists(path)] == []


def test_a_process_ends_with_its_owner_and_not_with_a_namesake_on_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pid is that of a process that has ended; only the first of the two children knows it as its owner."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    declare_owner()
    declared = os.environ[_OWNER_VARIABLE]
    monkeypatch.setenv(_OWNER_VARIABLE, declared.replace(str(os.getpid()), str(gone.pid), 1))
    code = "import sys, time; from rlsync.engine.plugin import watch_owner; watch_owner(); watch_owner(); time.sleep(float(sys.argv[1]))"
    watching = subprocess.Popen([sys.executable, "-c", code, "60"])
    monkeypatch.setenv(_OWNER_VARIABLE, f"{gone.pid}@elsewhere")
    far = subprocess.Popen([sys.executable, "-c", code, "2"])
    assert (watching.wait(60), far.wait(60)) == (-15, 0)
