"""From what a user types to hydra's arguments. Imports no hydra."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Several components in one key, as yaml files have them; hydra's grammar has no such keys.
_PLACEMENT_OVERRIDE = re.compile(r"^(?P<section>\+{0,2}cluster\.component_placement\.)(?P<names>\w+(?:,\w+)+)(?P<value>=.*)$", re.DOTALL)
_DOTTED_OVERRIDE = re.compile(r"^\+?(?P<key>[A-Za-z_]\w*(?:\.\w+)+)=")
# A run has a results folder and logs of its own: hydra is to make neither a folder nor a log in the working directory.
_NO_FILES_OF_HYDRA = ("hydra/job_logging=stdout", "hydra.run.dir=.", "hydra.output_subdir=null")


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments for ``hydra.main``: ``lenient_overrides``, and what keeps hydra from writing files. Of the keys that do that
    those that ``arguments`` set themselves count."""
    lenient = lenient_overrides(arguments)
    ours = [override for override in _NO_FILES_OF_HYDRA if not any(a.startswith(override.partition("=")[0] + "=") for a in lenient)]
    # argparse takes overrides in one row only: right before the first one, or behind all options.
    overrides = [i for i, a in enumerate(lenient) if "=" in a and not a.startswith("-") and not (i and lenient[i - 1].startswith("-"))]
    first = overrides[0] if overrides else len(lenient)
    return [*lenient[:first], *ours, *lenient[first:]]


def lenient_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which ``a.b=1`` and ``+a.b=1`` both set ``a.b``, whether or not the yaml has it.

    Hydra refuses the first for a key the yaml lacks and the second for one it has; ``++a.b=1`` does both. Unknown
    keys stay errors: ``load_config`` names them with the nearest known one. ``cluster.component_placement.a,b=1`` sets both. Options,
    group choices and ``hydra.*`` stay as they are.
    """
    single: list[str] = []
    for argument in arguments:
        several = _PLACEMENT_OVERRIDE.match(argument)
        names = [] if several is None else several["names"].split(",")
        single += [argument] if several is None else [f"{several['section']}{name}{several['value']}" for name in names]
    return [
        f"++{argument.removeprefix('+')}"
        if (match := _DOTTED_OVERRIDE.match(argument)) is not None and not match["key"].startswith("hydra.")
        else argument
        for argument in single
    ]
