"""Claims about the command line and about what it finds on a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsync import __version__
from rlsync.cli import doctor, main
from rlsync.cli.requirements import declared, unmet

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


def test_doctor_fails_exactly_when_it_finds_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fine, wrong = doctor.Finding("warning", "little memory", "add some"), doctor.Finding("error", "no memory", "add some")
    monkeypatch.setattr(doctor, "examine", lambda: [fine])
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda: [fine, wrong])
    assert main(["doctor"]) == 1
    assert "-> add some" in capsys.readouterr().out


def test_doctor_names_python_outside_the_range() -> None:
    assert doctor._python((3, 11)).level == doctor._python((3, 12)).level == "ok"
    assert doctor._python((3, 10)).level == doctor._python((3, 13)).level == "error"


def test_doctor_reports_missing_shared_memory(tmp_path: Path) -> None:
    assert doctor._shared_memory(tmp_path / "absent").level == "error"


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"rlsync {__version__}\n"
