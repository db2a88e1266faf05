"""The rollout of a step while it is under way beside the training of the step before (``runner.async_steps``), and in a checkpoint.

Owns what of it outlives a step or a run. Knows no engine: who generates is a call that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from workers.data import Prompt
from workers.resume import Beginning
from workers.samples import Sample

# Where a checkpoint's data position has the samples that lie behind it.
STATE = "rollout_ahead"
# Keys that decide what is drawn to a prompt: under another value of one, saved samples are not those that a run would draw.
_DECIDE = ("algorithm.group_size", "algorithm.sampling_params.", "data.", "rollout.model.", "runner.seq_length")


@dataclass(frozen=True, slots=True)
class Batch:
    """The prompts of a step.

    Attributes:
        position: in the data before they were drawn.
    """

    step: int
    prompts: Sequence[Prompt]
    position: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What engines generated for a step.

    Attributes:
        samples: of each prompt ``group_size``, adjacent, with their rewards.
        seconds: of its phases, by metric.
    """

    samples: tuple[Sample, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RolloutAhead:
    """A rollout that was begun before its step."""

    batch: Batch
    rollout: Future[Rollout]


def state_of(rollout: Rollout) -> dict[str, Any]:
    """A rollout without prompts and rewards, in containers that ``torch.load`` reads with ``weights_only``."""
    samples = [
        {
            "response_ids": list(sample.response_ids),
            "engine_logprobs": list(sample.engine_logprobs),
            "finished": sample.finished,
            "version": sample.version,
            "routes": sample.routes,
        }
        for sample in rollout.samples
    ]
    return {"samples": samples, "seconds": dict(rollout.seconds)}


def restored(state: Mapping[str, Any], prompts: Sequence[Prompt]) -> Rollout:
    """The rollout of ``state_of`` with the prompts that it answers, without rewards."""
    size = len(state["samples"]) // len(prompts)
    samples = [
        Sample(
            prompt.token_ids,
            tuple(sample["response_ids"]),
            tuple(sample["engine_logprobs"]),
            sample["finished"],
            sample["version"],
            routes=sample["routes"],
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
        )
        for i, sample in enumerate(state["samples"])
        for prompt in (prompts[i // size],)
    ]
    return Rollout(tuple(samples), state["seconds"])


def outdated(beginning: Beginning) -> tuple[str, ...]:
    """Keys for whose change since the checkpoint its samples cannot be trained on."""
    return tuple(key for key in beginning.changed if key.startswith(_DECIDE) and not key.startswith("data.val_"))
