"""Claims about the Ray cluster of a run before Ray is imported: which it is, who may join it, and whether it answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlsync.errors import ConfigError
from tests.deadlines import HANG_S
from workers import ray_access
from workers.ray_access import LOCAL, check_answers, cluster_address, protect_own_cluster

ROOT = Path(__file__).resolve().parents[2]


def test_a_cluster_of_the_users_own_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (cluster_address(1), cluster_address(2)) == (LOCAL, "auto")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address(1) == cluster_address(2) == "head:6379"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster_address(1) == LOCAL


def test_each_run_gets_a_token_of_its_own_and_what_the_user_decided_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.scripts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    tokens = []
    for _ in range(2):
        environment: dict[str, str] = {"PATH": "/bin"}
        protect_own_cluster(LOCAL, environment)
        assert environment["RAY_AUTH_MODE"] == "token"
        tokens.append(environment["RAY_AUTH_TOKEN"])
    assert tokens[0] != tokens[1] and min(map(len, tokens)) >= 32
    for decided in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": "/secret"}, {"RAY_AUTH_TOKEN": "x" * 40}):
        environment = dict(decided)
        protect_own_cluster(LOCAL, environment)
        assert environment == decided
    environment = {}
    protect_own_cluster("head:6379", environment)
    assert environment == {}, "that cluster has a token or none; it is not the run's to choose"


def test_the_entry_point_decides_on_the_token_before_ray_is_imported() -> None:
    """With an import of Ray that looks at the environment, and the run replaced by nothing."""
    script = (
        "import os, sys, runpy\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ray':\n"
        "            print('AT IMPORT', os.environ.get('RAY_AUTH_MODE'), len(os.environ.get('RAY_AUTH_TOKEN', '')))\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "runpy.run_path('examples/reasoning/main_grpo.py', run_name='__main__')\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), variables.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, "-u", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=HANG_S)
    assert "AT IMPORT token 64" in run.stdout, run.stdout + run.stderr


# A cluster that is gone.


def refusal(address: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_answers(address)
    return str(caught.value)


def test_an_address_where_nothing_listens_is_named_without_asking_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_access.subprocess, "run", None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stale = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", stale)
    message = refusal(stale)
    assert f"RAY_ADDRESS={stale}: nothing answers there" in message and "ray start --head" in message and "unset it" in message
    assert "nothing answers there" in refusal(f"ray://{stale}") and "nothing answers there" in refusal("host.invalid:6379")
    check_answers(LOCAL)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:many"])
def test_what_is_no_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"RAY_ADDRESS={address} is no address; write HOST:PORT" in refusal(address)


def test_a_listener_that_is_not_ray_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_access, "_ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"RAY_ADDRESS={address}: no Ray cluster answered within 1 s" in refusal(address)


# Signals.

_RUN = """
import os, signal, sys, time
from workers.entry import exit_code
def run():
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        open(sys.argv[1], "w").close()
sys.exit(exit_code(run))
"""


def _heed_hangups() -> None:
    """Whoever runs the tests under nohup ignores SIGHUP, and so would the run."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ended(tmp_path: Path, number: int, before: str = "") -> tuple[int, bool]:
    """Exit code of a run that gets a signal, and whether it cleaned up."""
    mark = tmp_path / f"cleaned-{number}"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen(
        [sys.executable, "-c", before + _RUN, str(mark)], env=variables, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_hangups
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        if before:
            assert process.poll() is None
            process.kill()
        return process.wait(60), mark.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sigterm_and_sighup_end_a_run_in_order(tmp_path: Path, number: int, code: int) -> None:
    assert ended(tmp_path, number) == (code, True)


def test_a_run_under_nohup_goes_on_without_its_terminal(tmp_path: Path) -> None:
    code, cleaned = ended(tmp_path, signal.SIGHUP, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    assert code == -signal.SIGKILL and not cleaned


def test_a_run_whose_terminal_closes_cleans_up(tmp_path: Path) -> None:
    """Writing to a terminal that is gone fails, which must not end the cleaning up."""
    mark = tmp_path / "cleaned"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    pid, terminal = os.forkpty()
    if pid == 0:
        _heed_hangups()
        os.execve(sys.executable, [sys.executable, "-c", _RUN, str(mark)], variables)
    seen = b""
    while b"started" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129 and mark.exists()
