"""The rollout of a step while it is under way beside the training of the step before (``runner.async_steps``), and in a checkpoint.

Owns what of it outlives a step or a run. Knows no engine: who generates is a call that it is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from workers.data import Prompt
from workers.resume import Beginning
from workers.routes import RoutingCounts
from workers.samples import Sample

# Where a checkpoint's data position has the samples that lie behind it.
STATE = "rollout_ahead"
# Keys that decide, beside the prompt, what is drawn to it: under another value of one, saved samples are not those that a run would draw.
_DECIDE = ("algorithm.group_size", "algorithm.sampling_params.", "runner.seq_length", "actor.seed")


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
    """A rollout of these prompts, without them and rewards, as ``torch.load`` reads it with ``weights_only``: numbers of all samples in one
    tensor each, because a step may have 10^8 tokens."""
    samples = rollout.samples
    tokens = sum(len(sample.response_ids) for sample in samples)
    numbers = [sample.engine_logprobs for sample in samples]
    saved = {
        "lengths": torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.int64),
        "response_ids": torch.from_numpy(np.fromiter(chain.from_iterable(sample.response_ids for sample in samples), np.int32, tokens)),
        # As engines said them, so that a resumed run computes the same.
        "engine_logprobs": torch.from_numpy(np.fromiter(chain.from_iterable(numbers), np.float64, sum(map(len, numbers)))),
        "finished": [sample.finished for sample in samples],
        "versions": [sample.version for sample in samples],
        "routes": [sample.routes for sample in samples],
    }
    seen = {"prompts": _fingerprint(batch.prompts), "pictures": _fingerprint_of_pictures(batch.prompts)}
    return {"samples": saved, "seconds": dict(rollout.seconds), **seen}


def restored(state: Mapping[str, Any], prompts: Sequence[Prompt]) -> tuple[list[list[Sample]], Mapping[str, float]]:
    """The inverse of ``state_of``: the samples of each prompt, without rewards, and the seconds of the rollout."""
    saved = state["samples"]
    lengths, count = saved["lengths"].tolist(), len(saved["lengths"])
    has_logprobs = len(saved["engine_logprobs"]) > 0
    of_each = zip(
        (prompt for prompt in prompts for _ in range(count // len(prompts))),
        saved["response_ids"].split(lengths),
        saved["engine_logprobs"].split(lengths) if has_logprobs else [saved["engine_logprobs"]] * count,
        saved["finished"],
        saved["versions"],
        saved["routes"],
        strict=True,
    )
    samples = [
        Sample(
            prompt.token_ids,
            tuple(response.tolist()),
            tuple(logprobs.tolist()),
            finished,
            version,
            routes=routes,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
        )
        for prompt, response, logprobs, finished, version, routes in of_each
    ]
    size = count // len(prompts)
    return [samples[i : i + size] for i in range(0, count, size)], state["seconds"]


def outdated(
    state: Mapping[str, Any], batch: Batch, beginning: Beginning, *, group_size: int, logprobs: bool, routes: bool
) -> tuple[str, ...]:
    """What has changed since the checkpoint, so that its samples are not those of this run.

    Args:
        group_size: of this run. A checkpoint without its settings tells of another one by its samples.
        logprobs: engines of this run return log-probabilities of their samples.
        routes: engines of this run return routes.
    """
    saved, changed = state["samples"], [key for key in beginning.changed if key.startswith(_DECIDE)]
    if not isinstance(saved, Mapping):
        return (*changed, "how samples are saved")
    if len(saved["lengths"]) != group_size * len(batch.prompts) and "algorithm.group_size" not in changed:
        changed.append("algorithm.group_size")
    if logprobs != (len(saved["engine_logprobs"]) > 0) and len(saved["response_ids"]):
        changed.append("rollout.return_logprobs")
    if any(routes != (sample is not None) for sample in saved["routes"]):
        changed.append("rollout.enable_return_routed_experts")
    if state["prompts"] != _fingerprint(batch.prompts):
        changed.append("the prompts")
    elif state.get("pictures") != _fingerprint_of_pictures(batch.prompts):
        changed.append("pictures of the prompts")
    return tuple(changed)


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Digest of the prompts' tokens, among which a picture is a placeholder as often as it has features."""
    return hashlib.blake2b(repr([prompt.token_ids for prompt in prompts]).encode(), digest_size=16).hexdigest()


def _fingerprint_of_pictures(prompts: Sequence[Prompt]) -> str | None:
    """Digest of the pictures that engines are shown, which have fewer bytes than their patches. None where no prompt has pictures."""
    if not any(prompt.images for prompt in prompts):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr([(image.mode, image.size) for image in prompt.images]).encode())
        for image in prompt.images:
            digest.update(image.tobytes())
    return digest.hexdigest()
