"""The rollout of a step while it is under way beside the training of the step before (``runner.async_steps``), and in a checkpoint.

Owns what of it outlives a step or a run. Knows no engine: who generates is a call that it is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from workers.data import Prompt
from workers.resume import Beginning
from workers.routes import RoutingCounts
from workers.samples import Sample

# Where a checkpoint's data position has the samples that lie behind it.
STATE = "rollout_ahead"
# Keys that decide, beside the prompt, what is drawn to it: under another value of one, saved samples are not those that a run would draw.
_DECIDE = ("algorithm.group_size", "algorithm.sampling_params.", "runner.seq_length")


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
        routing: what ranks have said of the routing of samples that they have scored already.
    """

    samples: tuple[Sample, ...]
    seconds: Mapping[str, float]
    routing: tuple[RoutingCounts | None, ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutAhead:
    """A rollout that was begun before its step."""

    batch: Batch
    rollout: Future[Rollout]


def state_of(rollout: Rollout, batch: Batch) -> dict[str, Any]:
    """A rollout of these prompts, without them and rewards, in containers that ``torch.load`` reads with ``weights_only``."""
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
    seen = {"prompts": _fingerprint(batch.prompts), "pictures": _fingerprint_of_pictures(batch.prompts)}
    return {"samples": samples, "seconds": dict(rollout.seconds), **seen}


def restored(state: Mapping[str, Any], prompts: Sequence[Prompt]) -> tuple[list[list[Sample]], Mapping[str, float]]:
    """Of ``state_of``: the samples of each of the prompts that they answer, without rewards, and the seconds."""
    samples, size = state["samples"], len(state["samples"]) // len(prompts)
    groups = [[_sample(saved, prompt) for saved in samples[i * size : (i + 1) * size]] for i, prompt in enumerate(prompts)]
    return groups, state["seconds"]


def _sample(saved: Mapping[str, Any], prompt: Prompt) -> Sample:
    return Sample(
        prompt.token_ids,
        tuple(saved["response_ids"]),
        tuple(saved["engine_logprobs"]),
        saved["finished"],
        saved["version"],
        routes=saved["routes"],
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
    )


def outdated(state: Mapping[str, Any], batch: Batch, beginning: Beginning) -> tuple[str, ...]:
    """What has changed since the checkpoint, so that its samples are not those of this run."""
    keys = tuple(key for key in beginning.changed if key.startswith(_DECIDE))
    if state["prompts"] != _fingerprint(batch.prompts):
        return (*keys, "the prompts")
    return keys if state.get("pictures") == _fingerprint_of_pictures(batch.prompts) else (*keys, "pictures of the prompts")


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of tokens, among which a picture is a placeholder as often as it has features."""
    return hashlib.blake2b(repr([prompt.token_ids for prompt in prompts]).encode(), digest_size=16).hexdigest()


def _fingerprint_of_pictures(prompts: Sequence[Prompt]) -> str | None:
    """Of what engines are shown, from which patches of several times the bytes are made. None where no prompt has pictures."""
    if not any(prompt.images for prompt in prompts):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr([(image.mode, image.size) for image in prompt.images]).encode())
        for image in prompt.images:
            digest.update(image.tobytes())
    return digest.hexdigest()
