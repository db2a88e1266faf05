"""What checks found about a run that has not started, and what it will do; and what it will make before it reads anything.

Knows no check. Imports neither torch, transformers, Ray, vLLM nor Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsync.errors import RlsyncError
from workers.colocation import ColocationPlan
from workers.config import AnyConfig
from workers.memory import PredictedMemory
from workers.pictures import PictureSizes


@dataclass(slots=True)
class Report:
    """What checks found, and what a run without findings will do.

    Attributes:
        config: None where the configuration cannot be read.
        findings: (what it is about, what is wrong and what to do).
        notes: what has no effect, or will only be known later.
        plan: (what it is about, what will happen).
        dp_size: of the actor, where the placement is known.
        num_ranks: actor ranks; None where the placement is not known.
        colocation: what leaves the GPUs when, where that is known; ``shares_gpus``: engines are on those of the actor.
        on_gpus: ranks and engines run on GPUs, and not on process slots of a machine that has none.
        gpu_bytes: memory of the largest GPU here, where there is one.
        hf_config: content of the model's config.json, where it has no findings.
        picture_sizes: of each of the first training rows, width and height of its pictures in pixels.
        memory: of the fullest GPU of the actor, where it could be predicted.
    """

    config: AnyConfig | None
    findings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: list[tuple[str, str]] = field(default_factory=list)
    dp_size: int = 1
    num_ranks: int | None = None
    colocation: ColocationPlan | None = None
    shares_gpus: bool = False
    on_gpus: bool = True
    gpu_bytes: int | None = None
    hf_config: Mapping[str, Any] | None = None
    picture_sizes: list[PictureSizes] = field(default_factory=list)
    memory: PredictedMemory | None = None

    def found(self, about: str, text: str) -> None:
        if text not in (known for _, known in self.findings):
            self.findings.append((about, text))

    def as_dict(self) -> dict[str, Any]:
        """For JSON. ``memory`` is in bytes, of the fullest GPU of the actor; null where it could not be predicted."""
        findings = [{"about": about, "text": text} for about, text in self.findings]
        memory = None if self.memory is None else self.memory.as_dict()
        return {"findings": findings, "notes": self.notes, "plan": dict(self.plan), "memory": memory}

    def take(self, about: str, check: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call; where it raises one of our errors that is a finding, as is a file that may not be read, and the result
        None."""
        try:
            return check(*arguments)
        except RlsyncError as error:
            for text in _findings_of(error):
                self.found(about, text)
            return None
        except PermissionError as error:
            self.found(about, f"{error.filename}: {error.strerror}; start the run as a user who may read and write it")
            return None


# The configuration is that of the kind of run that the check is for.
Check = Callable[[Any, Report], None]


def will_be_made(config: AnyConfig, path: Path) -> bool:
    """Whether a path that is not there yet belongs to what the run makes first."""
    makers = [made.path for made in (config.arithmetic, config.pictures, config.seeded_model) if made is not None]
    return not path.exists() and any(path.absolute().is_relative_to(Path(maker).absolute()) for maker in makers)


def _findings_of(error: RlsyncError) -> list[str]:
    lines = str(error).splitlines()
    if len(lines) > 1 and lines[0].endswith(":") and all(line.startswith("  ") for line in lines[1:]):
        return [line.strip() for line in lines[1:]] if lines[0] == "configuration:" else [str(error)]
    return [str(error)]
