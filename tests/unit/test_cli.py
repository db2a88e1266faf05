"""Claims about the command line as a whole, and about which requirements an interpreter meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlsync import __version__
from rlsync.cli import main
from rlsync.cli.requirements import declared, unmet
from tests.deadlines import HANG_S

ROOT = Path(__file__).resolve().parents[2]


def test_unmet_names_missing_and_unfit_distributions() -> None:
    assert unmet(["pytest>=1", "pytest<1", "no-such-distribution>=2"]) == [
        f"pytest<1 (found {pytest.__version__})",
        "no-such-distribution>=2",
    ]


def test_unmet_minds_markers_and_extras() -> None:
    conditional = ['absent; python_version < "3"', 'missing; extra == "cuda"']
    assert unmet(conditional) == []
    assert unmet(conditional, ("cuda",)) == ["missing"]


def test_development_environment_meets_what_is_declared() -> None:
    assert unmet(declared(ROOT / "pyproject.toml", ("runner", "dev"))) == []


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"rlsync {__version__}\n"


@pytest.mark.parametrize("command", ["bench", "compare", "convert", "doctor", "plan", "verify"])
def test_each_command_explains_its_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: rlsync {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "package"), [("plan", "numpy"), ("bench", "msgspec")])
def test_a_command_says_what_it_lacks_where_only_python_is_installed(tmp_path: Path, command: str, package: str) -> None:
    """Without site-packages, as a laptop's own Python is."""
    (tmp_path / "config.json").write_text("{}")
    arguments = [str(tmp_path)] if command == "plan" else []
    run = subprocess.run(
        [sys.executable, "-S", "-m", "rlsync.cli", command, *arguments],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert run.returncode == 1 and run.stderr.startswith(f"error: rlsync {command} needs {package}, which is not installed: "), run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["rlsync", "rlsync.cli"])
def test_the_package_runs_as_the_command(module: str) -> None:
    run = subprocess.run([sys.executable, "-m", module, "--version"], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert (run.returncode, run.stdout) == (0, f"rlsync {__version__}\n")


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["dctor"], ["plan"], ["doctor", "--ring-bytes", "many"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    assert "invalid choice: 'dctor'" in capsys.readouterr().err


# Whoever starts the tests in the background of a shell lets them ignore SIGINT.
_STANDS_STILL = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from rlsync import cli
from rlsync.cli import doctor

def examine(**_):
    while True:
        time.sleep({pause_s})
        yield doctor.Finding("ok", "x" * 1000)
        print("begun", file=sys.stderr, flush=True)

doctor.examine = examine
sys.exit(cli.main(["doctor"]))
"""


def test_what_may_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders of another user, whose permissions hold for everybody but root."""
    closed = tmp_path / "closed"
    closed.mkdir()
    commands = (["plan", str(closed)], ["convert", str(closed), str(tmp_path / "out")], ["verify", str(closed), str(closed)])
    for command in commands:
        main(command)  # with all modules imported
    capsys.readouterr()
    closed.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        codes = [(main(command), capsys.readouterr().err) for command in commands]
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
    assert [code for code, _ in codes] == [1, 1, 2]
    assert all(str(tmp_path) in said and "Permission denied" in said and "Traceback" not in said for _, said in codes), codes


def test_ctrl_c_ends_a_command_with_one_line() -> None:
    code = _STANDS_STILL.format(pause_s=0.1)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None and run.stderr.readline() == "begun\n"
        run.send_signal(signal.SIGINT)
        rest = run.communicate(timeout=HANG_S)[1].replace("begun\n", "")
    assert (run.returncode, rest) == (130, "interrupted\n")


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    code = _STANDS_STILL.format(pause_s=0)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None and run.stdout.readline().startswith("ok")
        run.stdout.close()
        rest = run.stderr.read().replace("begun\n", "")
    assert (run.returncode, rest) == (141, "")
