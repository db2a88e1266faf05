"""What engines answer, and of which weights an answer is: greedy continuations of fixed prompts, compared with those of fresh engines.

An answer that is neither that of checkpoint a nor that of checkpoint b was computed from mixed weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsync.engine.handles.local import Completion, Engine
from rlsync.errors import EngineDirtyError
from tests.integration.greedy import close

PROMPTS = ((3, 5, 7, 9), (11, 2, 100, 130, 4), (1,))
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
_PAUSE_S = 0.05

# One completion a prompt.
Reference = tuple[Completion, ...]


def ask(engine: Engine, timeout_s: float) -> Reference:
    """What an engine answers to all prompts."""
    return tuple(answer[0] for answer in engine.generate(PROMPTS, GREEDY, timeout_s=timeout_s))


def begins(found: Completion, wanted: Completion) -> bool:
    """Whether a completion, cut off or not, is the beginning of another."""
    count = len(found.token_ids)
    return found.token_ids == wanted.token_ids[:count] and close(found.logprobs, wanted.logprobs[:count])


def same(found: Reference, wanted: Reference) -> bool:
    """Whether all completions are complete and equal."""
    return all(len(f.token_ids) == len(w.token_ids) and begins(f, w) for f, w in zip(found, wanted, strict=True))


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer that somebody got while a sync was going on."""

    engine_id: str
    prompt: int
    completion: Completion


class Traffic:
    """Requests to engines, one after another to each, from ``start`` to ``stop``."""

    def __init__(self, engines: Sequence[Engine], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ended = threading.Event()
        self.samples: list[Sample] = []
        self.refusals = 0
        self._threads = [threading.Thread(target=self._ask, args=(e,), name=f"traffic-{e.engine_id}", daemon=True) for e in engines]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Sample]:
        """What was answered. Raises TimeoutError where a request neither ended nor failed in the time it was given."""
        self._ended.set()
        deadline_s = time.monotonic() + 3 * self._timeout_s + 10
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"a request of {thread.name} has not ended {3 * self._timeout_s + 10:g} s after its sync")
        return self.samples

    def _ask(self, engine: Engine) -> None:
        prompt = 0
        while not self._ended.is_set():
            try:
                (answers,) = engine.generate([PROMPTS[prompt]], GREEDY, timeout_s=self._timeout_s)
                self.samples.append(Sample(engine.engine_id, prompt, answers[0]))
            except EngineDirtyError:
                self.refusals += 1
            except Exception:  # of an engine that is killed or closed: no answer is never a wrong one
                self.refusals += 1
            prompt = (prompt + 1) % len(PROMPTS)
            self._ended.wait(_PAUSE_S)


def mixtures(samples: list[Sample], letters: Mapping[tuple[str, int | None], str], references: Mapping[str, Reference]) -> list[str]:
    """Answers that are not of the weights they are labelled with.

    ``letters`` names the checkpoint of (engine id, version). What was begun before a sync and went on after it (pause mode
    ``keep``) carries two versions, and is right up to its first token only.
    """
    findings = []
    for sample in samples:
        c = sample.completion
        letter = letters.get((sample.engine_id, c.version))
        if letter is None:
            findings.append(f"engine {sample.engine_id} answered with version {c.version}, which it was never given: {c}")
        elif c.token_ids:
            count = len(c.token_ids) if c.version == c.last_version else 1
            found = Completion(c.token_ids[:count], c.logprobs[:count], c.finish_reason, c.version, c.last_version)
            if not begins(found, references[letter][sample.prompt]):
                findings.append(f"engine {sample.engine_id} answered prompt {sample.prompt} with {c}, which is not of checkpoint {letter}")
    return findings
