"""``rollout.validate_weight``: an engine that read the HF weights itself answers the same before and after a first sync."""

from __future__ import annotations

from rlsync.engine.handles import Completion
from rlsync.errors import RlsyncError
from workers.crew import Crew
from workers.preparation import Preparation

_NUM_PROMPTS, _NUM_TOKENS = 4, 16


class WeightCheck:
    """Greedy answers of each engine to the first prompts, from before and from after a sync.

    Args:
        model_path: what the engines read, for messages.
    """

    def __init__(self, crew: Crew, prepared: Preparation, model_path: str) -> None:
        self._crew, self._tokenizer, self._model_path = crew, prepared.tokenizer, model_path
        self._sampling = {"n": 1, "temperature": 0.0, "max_tokens": _NUM_TOKENS, "stop_token_ids": list(prepared.stop_ids)}
        self._prompts = [prepared.dataset[i].token_ids for i in range(min(_NUM_PROMPTS, len(prepared.dataset)))]
        self._before: list[list[tuple[Completion, ...]]] | None = None

    def before(self) -> None:
        """Take the answers from before; the first call counts."""
        if self._before is None:
            self._before = self._crew.answers(self._prompts, self._sampling)

    def after(self) -> str:
        """Take those from after; returns what to tell the user. Raises RlsyncError at the first difference."""
        assert self._before is not None, "call before() before the sync"
        after = self._crew.answers(self._prompts, self._sampling)
        for engine, (old, new) in enumerate(zip(self._before, after, strict=True)):
            for prompt, was, is_now in zip(self._prompts, old, new, strict=True):
                if was[0].token_ids != is_now[0].token_ids:
                    raise RlsyncError(
                        f"rollout.validate_weight: to the prompt {self._decoded(prompt)} engine {engine} answered "
                        f"{self._decoded(was[0].token_ids)} with the weights of {self._model_path}, but "
                        f"{self._decoded(is_now[0].token_ids)} with those of the actor; do both start from the same weights?"
                    )
        return f"weights validated: {len(self._prompts)} greedy answers of each engine are the same before and after a sync"

    def _decoded(self, token_ids: tuple[int, ...]) -> str:
        return repr(self._tokenizer.decode(list(token_ids)))
