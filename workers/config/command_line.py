"""The two places where hydra and OmegaConf need telling: resolvers, and overrides that may name a key in either form.

Nothing here runs at import; the entry point calls ``register_resolvers`` and ``lenient_overrides`` first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import OmegaConf

from rlsync.errors import ConfigError

# torch's dtype names to the precisions of this configuration: OmegaConf nodes cannot hold a torch.dtype.
_PRECISION_OF_DTYPE = {
    **dict.fromkeys(("float32", "float", "fp32"), "fp32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **dict.fromkeys(("float16", "half", "fp16"), "fp16"),
}
_DOTTED_OVERRIDE = re.compile(r"^\+?(?P<key>[A-Za-z_]\w*(?:\.\w+)+)=")


def register_resolvers() -> None:
    """Make ``${multiply:}``, ``${int_div:}``, ``${subtract:}``, ``${not:}`` and ``${torch.dtype:}`` known to OmegaConf. Idempotent."""
    resolvers: dict[str, Callable[..., Any]] = {
        "multiply": lambda a, b: a * b,
        "int_div": lambda a, b: a // b,
        "subtract": lambda a, b: a - b,
        "not": lambda value: not value,
        "torch.dtype": _precision_of_dtype,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def _precision_of_dtype(name: str) -> str:
    precision = _PRECISION_OF_DTYPE.get(str(name).removeprefix("torch."))
    if precision is None:
        raise ConfigError(f"${{torch.dtype:{name}}}: known names are {', '.join(_PRECISION_OF_DTYPE)}")
    return precision


def lenient_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which ``a.b=1`` and ``+a.b=1`` both set ``a.b``, whether or not the yaml has it.

    Hydra refuses the first for a key the yaml lacks and the second for one it has; ``++a.b=1`` does both. Unknown
    keys stay errors: ``load_config`` names them with the nearest known one. Options, group choices and ``hydra.*``
    stay as they are.
    """
    return [
        f"++{argument.removeprefix('+')}"
        if (match := _DOTTED_OVERRIDE.match(argument)) is not None and not match["key"].startswith("hydra.")
        else argument
        for argument in arguments
    ]
