"""Supervised fine-tuning: one optimizer step after the other, and the validations. Owns the order, not the phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.engine.handles import PicturePrompt
from workers.config import SftConfig
from workers.metrics import largest
from workers.metrics_log import LOSSES
from workers.resume import Beginning
from workers.runner import Runner
from workers.screen import SFT_COLUMNS
from workers.sft_actor import SftRank
from workers.sft_preparation import SftPreparation, prepare_sft


class SftRunner(Runner[SftConfig, SftPreparation]):
    """One run of supervised fine-tuning."""

    NAME = "SFT"
    RANK = SftRank
    COLUMNS = SFT_COLUMNS
    PLOT = LOSSES

    def _prepare(self, beginning: Beginning) -> SftPreparation:
        return prepare_sft(self._config, beginning)

    def _start(self) -> None:
        self._start_workers(load_initial=self._prepared.beginning.resume is None)
        self._begin()
        with self._coming_up("data"):
            self._on_ranks("open_data", self._prepared.position)

    def _data_state(self) -> Mapping[str, Any]:
        return self._on_ranks("data_state")[0]

    def _speeds(self, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
        trained_s = metrics["time/training"] + metrics["time/data_wait"]
        return {"perf/throughput": metrics["perf/total_num_tokens"] / trained_s / self._group.num_actor_devices}

    def _step(self, step: int, seconds: dict[str, float]) -> tuple[dict[str, float], list[dict[str, float]]]:
        self._screen.phase("training")
        # The slowest share of the data is what the step waited for.
        return largest(self._on_ranks("train")), []

    def _validate(self, step: int) -> dict[str, float]:
        """Loss on the held-out examples and, where engines answer them too, the share of answers that are the reference."""
        found: dict[str, float] = {}
        losses = self._on_ranks("validate")[0]
        if self._config.validation.generate:
            found = {**self._synced(step, {}).metrics(), **self._answer()}
            self._colocation.after_rollout()
            self._colocation.take_seconds()  # part of the validation's
        return {"val/loss": losses.pop("val/loss"), **found, **losses}

    def _answer(self) -> dict[str, float]:
        self._screen.phase("generation")
        asked, tokenizer = self._prepared.questions, self._prepared.tokenizer
        assert asked is not None, "made where the validation generates"
        sampling = {
            "n": 1,
            "temperature": 0.0,
            "max_tokens": self._config.validation.max_new_tokens,
            "stop_token_ids": list(self._prepared.stop_ids),
            "detokenize": self._config.rollout.detokenize,
        }
        num_asked, num_right = 0, 0
        for questions in asked.parts(self._config.data.num_workers):
            prompts = [PicturePrompt(q.prompt_ids, q.images) if q.images else q.prompt_ids for q in questions]
            groups = self._group.generate(prompts, sampling, None)
            texts = tokenizer.batch_decode([list(group[0].token_ids) for group in groups], skip_special_tokens=True)
            if self._config.rollout.print_outputs and not num_asked:
                self._screen.note(f"{tokenizer.decode(list(questions[0].prompt_ids))!r} -> {texts[0]!r}, not {questions[0].answer!r}")
            num_asked += len(questions)
            num_right += sum(text.strip() == question.answer.strip() for text, question in zip(texts, questions, strict=True))
        return {"val/exact_match": num_right / num_asked}
