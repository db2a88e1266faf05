"""The kinds of runs (``runner.task_type``), and a description of all their keys: the table of docs/configuration.md."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin

from workers.config.fields import ANY_NUMBER, Task, annotations_of, bounds_of, section_of
from workers.config.grpo import RunConfig
from workers.config.sft import SftConfig

AnyConfig = RunConfig | SftConfig
CONFIG_OF_TASK: Mapping[Task, type[AnyConfig]] = {"reasoning": RunConfig, "sft": SftConfig}


@dataclass(frozen=True, slots=True)
class KeyDescription:
    """One key: dotted name, type and default as text, meaning."""

    name: str
    type: str
    default: str
    doc: str


def describe_config(cls: type = RunConfig, prefix: str = "") -> Iterator[KeyDescription]:
    """Every key of the configuration in the order of the yaml; sections themselves are not listed."""
    hints = annotations_of(cls)
    for declared in fields(cls):
        annotation = hints[declared.name]
        section = section_of(annotation)
        if section is not None:
            yield from describe_config(section, f"{prefix}{declared.name}.")
            continue
        default = "required" if declared.default is MISSING else _yaml(declared.default)
        bounds = bounds_of(declared)
        limits = "" if bounds is None or bounds == ANY_NUMBER else f", {bounds}"
        yield KeyDescription(prefix + declared.name, _type_text(annotation) + limits, default, declared.metadata["doc"])


def config_table() -> str:
    """The keys of both kinds of runs as Markdown tables: all of a GRPO run's, then those that an SFT run has otherwise."""
    grpo, sft = (list(describe_config(cls)) for cls in (RunConfig, SftConfig))
    return (
        f"{_rows(grpo)}\n\n## Keys of an SFT run\n\nSections and keys as above, without `reward` and `warm_start`, "
        f"but for these:\n\n{_rows([described for described in sft if described not in grpo])}"
    )


def _rows(described: Sequence[KeyDescription]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{d.name}` | {d.type} | `{d.default}` | {d.doc} |" for d in described]
    return "\n".join(rows)


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _type_text(annotation: Any) -> str:
    args = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, args))
    if get_origin(annotation) is tuple:
        return f"list of {_type_text(args[0])}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join([*map(_type_text, args), *(["null"] if type(None) in get_args(annotation) else [])])
    return getattr(annotation, "__name__", str(annotation)).lower()
