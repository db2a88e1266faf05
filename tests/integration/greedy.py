"""What transformers answers, token by token: the measure of every engine. And how two answers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlsync.engine.handles import Completion

LOGPROB_TOLERANCE = 1e-4


@lru_cache
def _model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@lru_cache
def greedy(folder: Path, prompt: tuple[int, ...], num_tokens: int) -> Completion:
    """The greedy continuation of one prompt by the checkpoint in ``folder``, in fp32, ignoring the end of sequence."""
    tokens, logprobs, cache = list(prompt), [], None
    with torch.no_grad():
        for _ in range(num_tokens):
            new = tokens if cache is None else tokens[-1:]
            output = _model(folder)(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache, row = output.past_key_values, output.logits[0, -1].log_softmax(-1)
            logprobs.append(float(row.max()))
            tokens.append(int(row.argmax()))
    return Completion(tuple(tokens[len(prompt) :]), tuple(logprobs), "length", None, None)


def same(found: Completion, wanted: Completion) -> bool:
    """Token for token, and log-probability for log-probability within LOGPROB_TOLERANCE."""
    return found.token_ids == wanted.token_ids and close(found.logprobs, wanted.logprobs)


def close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(found) == len(wanted) and all(abs(x - y) <= LOGPROB_TOLERANCE for x, y in zip(found, wanted, strict=True))
