"""Claims about scripts/bootstrap.sh: it costs nothing when nothing is to do, says what is wrong, and leaves nothing half made behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest

from tests.deadlines import HANG_S

ROOT = Path(__file__).resolve().parents[2]


def bootstrap(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script of a checkout with no environment active, no package index, and these variables."""
    base = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    return subprocess.run(
        ["bash", "scripts/bootstrap.sh"], cwd=root, env=base | environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a lock of one package that no index has. Its .venv can be begun but never completed."""
    for name in ("scripts", "requirements", "rlsync/cli"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "rlsync/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "requirements/cpu.lock").write_text("absent-package==1.0\nuv==0.13.9\n")
    return tmp_path


@pytest.fixture
def base_python() -> str:
    """The interpreter that this environment was made from; it lacks this environment's packages."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def test_complete_environment_is_taken_as_it_is_after_two_questions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its version, and its packages. Asking is all that is done: no index, no pip, no other interpreter."""
    lock = "cpu" if shutil.which("nvidia-smi") is None else "cuda"
    folder = tmp_path_factory.mktemp("bin")
    asked, python = folder / "asked", folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "RLSYNC_LOCK": lock}
    first = bootstrap(checkout, **environment)
    if "lacks" in first.stderr:
        pytest.skip(f"this environment is not a complete one: {first.stderr.splitlines()[0]}")
    asked.unlink()
    # No other command named python or pip is found.
    for name in ("python3", "python3.11", "python3.12", "pip", "pip3"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {asked}\n")
        (folder / name).chmod(0o755)
    again = bootstrap(checkout, PATH=f"{folder}:{os.environ['PATH']}", **environment)
    version, packages = asked.read_text().splitlines()
    assert version.startswith("-c import sys; sys.exit(")
    assert packages.startswith(f"-P {checkout}/rlsync/cli/requirements.py {checkout}/pyproject.toml")
    assert first.stdout == again.stdout == f"{python}\n"
    assert not (checkout / ".venv").exists()
    assert "vllm.general_plugins" in (checkout / "rlsync.egg-info/entry_points.txt").read_text()


def test_package_that_cannot_be_had_is_named_and_nothing_is_declared_ready(checkout: Path, base_python: str) -> None:
    run = bootstrap(checkout, PYTHON=base_python, RLSYNC_LOCK="cpu", TMPDIR=str(checkout))
    assert run.returncode == 3, run.stderr
    assert "the package absent-package==1.0 cannot be had" in run.stderr
    assert not (checkout / ".venv/.rlsync-stamp").exists()
    assert not (checkout / ".venv/.rlsync-installing").exists(), "pip wrote nothing, so the next set-up may build on this .venv"


def test_set_up_that_died_while_writing_is_started_over(checkout: Path, base_python: str) -> None:
    remnant = checkout / ".venv/lib/half-written"
    remnant.mkdir(parents=True)
    (checkout / ".venv/.rlsync-installing").touch()
    run = bootstrap(checkout, PYTHON=base_python, RLSYNC_LOCK="cpu")
    assert "was being written to when an earlier set-up died; making it anew" in run.stderr
    assert not remnant.exists()


def test_interpreter_outside_the_range_is_refused_by_version(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "bin/python3"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho Python 3.10.0\nexit 1\n")
    old.chmod(0o755)
    for name in ("python3.11", "python3.12"):
        (old.parent / name).symlink_to(old)
    script = checkout / "scripts/bootstrap.sh"
    script.write_text(script.read_text().replace("/usr/bin/python3.", "/nowhere/python3."))
    run = bootstrap(checkout, PATH=f"{old.parent}:{os.environ['PATH']}", RLSYNC_LOCK="cpu")
    assert run.returncode == 3
    assert "Python 3.11 or 3.12 is needed" in run.stderr
    assert f"{old} (Python 3.10.0)" in run.stderr


def test_an_optimized_interpreter_goes_before_others_that_are_found_first_and_not_before_one_that_is_named(
    checkout: Path, base_python: str, tmp_path: Path
) -> None:
    """Three that say of themselves how they were compiled, and make no environment; between them one that pyenv has and has not chosen."""
    found, headers = tmp_path / "bin", tmp_path / "include"
    found.mkdir()
    headers.mkdir()
    (headers / "Python.h").touch()
    script = checkout / "scripts/bootstrap.sh"
    script.write_text(script.read_text().replace("/usr/bin/python3.11 /usr/bin/python3.12", str(found / "last")))

    def compile_as(name: str, configured: str, include: Path) -> str:
        said = f"import sys, sysconfig; sys.base_prefix = '/opt'; sysconfig.get_config_vars()['CONFIG_ARGS'] = '{configured}'"
        said += f"; sysconfig.get_path = lambda _: '{include}'"
        path = found / name
        runs = f'[ "$1" = -m ] && exit 1\n[ "$1" = -c ] || exec {base_python} "$@"\nexec {base_python} -c "{said}\n$2"'
        path.write_text(f"#!/bin/sh\n{runs}\n")
        path.chmod(0o755)
        return str(path)

    def chosen(**environment: str) -> tuple[str, str]:
        said = bootstrap(checkout, PATH=f"{found}:{os.environ['PATH']}", RLSYNC_LOCK="cpu", **environment).stderr
        assert "stopped by a failure" not in said
        return said.split("making ")[1].split(" from ")[1].split(" (")[0], said

    own, bare = compile_as("python3", "--enable-shared", headers), compile_as("python3.11", "--enable-optimizations", tmp_path)
    (found / "python3.12").write_text("#!/bin/sh\nexit 127\n")
    (found / "python3.12").chmod(0o755)
    assert chosen() == (own, ANY), "none is better than the first"
    optimized = compile_as("last", "--enable-shared --enable-optimizations", headers)
    python, said = chosen()
    assert python == optimized and f"{own} was compiled without optimizations" in said and f"PYTHON={own}" in said
    assert chosen(PYTHON=bare) == (bare, ANY)


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"PYTHON": "/no/such/python"}, "there is no such command"), ({"RLSYNC_LOCK": "tpu"}, "it must be cpu or cuda")],
)
def test_wrong_setting_is_refused(checkout: Path, environment: dict[str, str], message: str) -> None:
    run = bootstrap(checkout, **environment)
    assert run.returncode == 3
    assert message in run.stderr


def test_sourcing_script_stops_where_set_up_fails(checkout: Path) -> None:
    program = "set -euo pipefail; source scripts/bootstrap.sh; echo reached"
    run = subprocess.run(
        ["bash", "-c", program],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "RLSYNC_LOCK": "tpu"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert run.returncode != 0
    assert "reached" not in run.stdout


def test_uv_is_given_pips_settings_the_strongest_of_each() -> None:
    listed = (
        ":env:.cert='/etc/ca.crt'\n:env:.find-links='/wheels'\nglobal.constraint='/c.txt'\nglobal.find-links='/weaker'\n"
        "global.index-url='https://user:key=1@index/simple'\ninstall.extra-index-url='https://one/simple\\nhttps://two/simple'\n"
        "global.extra-index-url='https://weaker/simple'\nglobal.no-index='false'\nfreeze.find-links='/other-command'\n"
    )
    command = [sys.executable, ROOT / "scripts/uv_options.py"]
    options = subprocess.run(command, input=listed, capture_output=True, text=True, timeout=HANG_S, check=True).stdout.split()
    pairs = sorted(zip(options[::2], options[1::2], strict=True))
    assert pairs == [
        ("--constraints", "/c.txt"),
        ("--default-index", "https://user:key=1@index/simple"),
        ("--find-links", "/wheels"),
        ("--index", "https://one/simple"),
        ("--index", "https://two/simple"),
    ]
