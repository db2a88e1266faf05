"""Prints what makes uv install as pip is configured to, one argument a line: uv reads neither pip.conf nor PIP_* variables.

    python -m pip config list | python scripts/uv_options.py

Settings without a counterpart are left out. With one that matters, uv fails and pip is used.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable

# pip's setting: uv's option, which is given once for each word of the value.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
# Where pip looks for a setting, the strongest first.
SECTIONS = (":env:", "install", "global")


def settings(lines: Iterable[str]) -> dict[str, str]:
    """The values that pip install would use. `lines`: of pip config list, each like global.timeout='60'."""
    found: dict[tuple[str, str], str] = {}
    for line in lines:
        name, assigned, value = line.strip().partition("=")
        section, _, key = name.rpartition(".")
        if assigned and section in SECTIONS:
            found[section, key] = str(ast.literal_eval(value))
    return {key: found[section, key] for section in reversed(SECTIONS) for place, key in found if place == section}


def uv_options(lines: Iterable[str]) -> list[str]:
    """uv's options that stand for `lines` of pip config list."""
    values = settings(lines)
    options = [argument for key, option in OPTIONS.items() for word in values.get(key, "").split() for argument in (option, word)]
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    return options


if __name__ == "__main__":
    print("\n".join(uv_options(sys.stdin)))
