"""Which declared requirements an interpreter does not meet. Knows distributions and versions, imports none of them.

Also run as a file, by interpreters that do not have rlsync yet: ``python requirements.py PYPROJECT [EXTRA ...]`` prints the unmet
requirements, one a line, and exits 1 when there are any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


def unmet(requirements: Iterable[str], extras: Iterable[str] = ()) -> list[str]:
    """Requirements (PEP 508 strings) this interpreter does not meet, each with the version found instead.

    A requirement whose marker holds neither here nor for one of the extras is met.
    """
    from packaging.requirements import Requirement  # not at the top: the interpreter under question may lack it

    environments = [{"extra": extra} for extra in ("", *extras)]
    findings = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate(environment) for environment in environments):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            findings.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            findings.append(f"{requirement.name}{requirement.specifier} (found {version})")
    return findings


def declared(pyproject: Path, extras: Iterable[str]) -> list[str]:
    """The dependencies and the named extras of a pyproject.toml."""
    import tomllib

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]


def _main(pyproject: str, *extras: str) -> int:
    try:
        findings = unmet(declared(Path(pyproject), extras))
    except ModuleNotFoundError as error:
        findings = [str(error.name)]
    print("\n".join(findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
