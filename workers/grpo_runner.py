"""The GRPO loop: sync, rollout, reward, log-probabilities, training, validation. Owns the order, not the phases."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from rlsync.engine.handles import Completion
from rlsync.errors import RlsyncError, WeightSyncError
from rlsync.models import Model, model_of
from rlsync.sync import SyncReport
from rlsync.sync.report import SyncHealth
from workers.config import RunConfig, WarmStartConfig
from workers.data import Prompt, tokenized
from workers.early_scores import EarlyScores
from workers.grpo_actor import GrpoRank
from workers.judges import Beside, MathJudge, Verdict, open_judge
from workers.metrics import difference_metrics, idle_metrics, sample_metrics, speed_metrics
from workers.metrics_log import REWARDS
from workers.model_folder import read_vocab_size, unknown_token
from workers.picture_prompts import warm_start_loader
from workers.preparation import Preparation, prepare, prompt_form
from workers.problems import BadSamples, load_supervised
from workers.resume import Beginning
from workers.reward import unreadable_reference
from workers.rollout import reshaping, sampling_arguments
from workers.rollout_ahead import STATE, Batch, Rollout, RolloutAhead, outdated, restored, state_of
from workers.routes import RoutingCounts, engine_routes, routing_metrics, routing_shape
from workers.row_loader import RowLoader
from workers.runner import Runner, timed
from workers.samples import ReplicaBatch, Sample, TokenBudget, aligned, split_samples, with_advantages
from workers.screen import GRPO_COLUMNS
from workers.sft_data import SftExample
from workers.supervised import answered
from workers.validation import validation_metrics
from workers.worker_group import WorkerGroup

T = TypeVar("T")


class GrpoRunner(Runner[RunConfig, Preparation]):
    """One GRPO run."""

    NAME = "GRPO"
    RANK = GrpoRank
    COLUMNS = GRPO_COLUMNS
    PLOT = REWARDS

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._num_restarts = 0
        self._health = SyncHealth()
        # Of the version that the engines hold, where a validation has synced it and the next step has yet to generate with it.
        self._served: SyncReport | None = None
        self._generating_s = 0.0
        self._batch: Batch | None = None
        self._ahead: RolloutAhead | None = None
        # Of micro-batches of training that are cut by tokens.
        self._budget: TokenBudget | None = None

    # Set-up.

    def _prepare(self, beginning: Beginning) -> Preparation:
        prepared = prepare(self._config, beginning)
        self._batches = iter(prepared.data.loader)
        return prepared

    def _enter(self, stack: ExitStack) -> None:
        self._judge = stack.enter_context(open_judge(self._config.reward))

    def _start(self) -> None:
        config, prepared, group = self._config, self._prepared, self._group
        # A resumed run overwrites the initial weights, but its KL reference is made from them.
        fresh = prepared.beginning.resume is None
        needs_initial = fresh or config.has_reference
        check = WeightCheck(group, prepared, config.rollout.model.model_path) if config.rollout.validate_weight and fresh else None

        self._start_workers(load_initial=needs_initial, engines_up=check.before if check is not None else lambda: None)
        if config.runner.enable_dynamic_batch_size:
            most = config.runner.max_tokens_per_mbs
            assert most is not None, "load_config derives it"
            # Whether sequences are packed is decided by the layers that ranks have.
            self._budget = self._on_ranks("token_budget", most)[0]
        if check is not None:
            self._validate_weights(check)
        if config.warm_start is not None and needs_initial:
            self._warm_start(config.warm_start)
        if config.rollout.return_logprobs is not False and (keys := reshaping(config, vocab_size=self._model.dims["vocab"])):
            self._screen.note(f"the engines' log-probabilities are those after {', '.join(keys)}; rollout/logprob_diff_* shows that too")
        self._begin()
        self._restore_ahead()

    @property
    def _model(self) -> Model:
        return model_of(self._prepared.hf_config)

    @property
    def _updates_per_step(self) -> int:
        return self._config.algorithm.n_minibatches

    def _data_state(self) -> Mapping[str, Any]:
        """Behind the last trained step; with the samples of the next one, where they have been generated or are now."""
        if self._ahead is None:
            return self._prepared.data.loader.state_dict()
        batch, rollout = self._ahead.batch, self._settled({})
        return batch.position if rollout is None else {**batch.position, STATE: state_of(rollout, batch)}

    def _speeds(self, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
        group = self._group
        idle = idle_metrics(
            step_s=seconds["time/step"],
            actor_s=sum(seconds.get(f"time/actor/{name}", 0.0) for name in ("early_inference", "inference", "training")),
            generating_s=self._generating_s,
            sync_s=seconds.get("time/sync_weights", 0.0),
            actor_share=None if group.num_actor_devices == group.num_devices else group.num_actor_devices / group.num_devices,
        )
        return {**speed_metrics(metrics, seconds, group.num_devices), **idle}

    def _validate_weights(self, check: WeightCheck) -> None:
        """Answers of the engines before and after a first sync must be equal."""
        self._screen.phase("validating weights")
        check.before()
        self._colocation.before_sync()
        self._group.connect()
        self._on_ranks("sync", 0)
        self._colocation.after_sync()
        self._screen.note(check.after())
        self._colocation.after_rollout()

    def _warm_start(self, warm: WarmStartConfig) -> None:
        """The supervised steps of ``warm_start``."""
        self._screen.phase("warm start")
        began = time.monotonic()
        config, tokenizer, pictures = self._config, self._prepared.tokenizer, self._prepared.data.pictures
        steps: Iterable[list[list[SftExample]]]
        if pictures is None:
            steps = [warm_start_texts(config, warm, tokenizer, self._prepared.stop_ids[:1])]
        else:  # one by one, because pictures of all steps would be held at once
            loader = warm_start_loader(config, warm, tokenizer, pictures)
            steps = ([step] for step in islice(loader, warm.num_steps))
        losses = [loss for given in steps for loss in self._on_ranks("warm_start", ray.put(given), warm.lr)[0]]
        for note in () if pictures is None else left_out_notes(loader):
            self._screen.note(note)
        took = time.monotonic() - began
        self._screen.component("warm start", took, f"{warm.num_steps} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    # The loop.

    def _step(self, step: int, seconds: dict[str, float]) -> tuple[dict[str, float], list[dict[str, float]]]:
        """One step. Before it there are ``step - 1`` versions of the weights; its samples come from the last of them, or, generated ahead
        of the step, from the one before."""
        algorithm, screen, begun_s = self._config.algorithm, self._screen, time.monotonic()
        batch = self._drawn(step, seconds)
        report, rollout = self._synced_rollout(batch.prompts, step, seconds)
        seconds.update(rollout.seconds)
        self._served = self._ahead = None
        self._colocation.after_rollout()
        if self._config.runner.async_steps and step < self._total:
            self._begin_ahead(self._drawn(step + 1, seconds))
        samples = with_advantages(rollout.samples, algorithm.group_size, normalize=algorithm.normalize_advantages)
        shuffle_seed = self._config.actor.seed + step if algorithm.shuffle_rollout else None
        replica_batches = ray.put(self._dealt(samples, num_updates=algorithm.n_minibatches, shuffle_seed=shuffle_seed))
        screen.phase("log-probabilities")
        with timed(seconds, "time/actor/inference"):
            differences = self._on_ranks("score", replica_batches)
            counted = [*rollout.routing, *self._on_ranks("routing_counts")] if "num_experts" in self._model.dims else []
        screen.phase("training")
        with timed(seconds, "time/actor/training"):
            updates = self._on_ranks("train", replica_batches)[0]
        seconds.update(self._colocation.take_seconds())
        self._generating_s = self._group.generating_s(begun_s, time.monotonic())
        found = {
            **sample_metrics(samples, algorithm.group_size, step - 1),
            **difference_metrics(differences),
            **routing_metrics(counted),
            **self._left_out(),
            **report.metrics(),
        }
        return {**found, **self._health.metrics(), "rollout/engine_restarts": float(self._num_restarts)}, updates

    def _left_out(self) -> dict[str, float]:
        """Metrics of rows that were left out, where rows are read when their turn comes; notes at the start say it of others."""
        loader = self._prepared.data.loader
        return {name: float(count) for name, count in loader.take_left_out().items()} if isinstance(loader, RowLoader) else {}

    def _drawn(self, step: int, seconds: dict[str, float]) -> Batch:
        """The prompts of a step, which are drawn once, in the order of the steps."""
        if self._batch is None or self._batch.step != step:
            with timed(seconds, "time/prepare_data"):
                position = self._prepared.data.loader.state_dict()
                self._batch = Batch(step, next(self._batches), position)
                self._check_references(self._batch.prompts)
        return self._batch

    def _synced_rollout(self, prompts: Sequence[Prompt], step: int, seconds: dict[str, float]) -> tuple[SyncReport, Rollout]:
        """Sync and rollout of a step. One that was begun ahead ends before the sync, which is for the next one then."""
        ahead = self._settled(seconds)
        return self._generated(step - 1, seconds, "rollout", lambda: self._rollout(prompts, step) if ahead is None else ahead)

    def _begin_ahead(self, batch: Batch) -> None:
        """Begin the rollout of the next step with the weights that the engines have."""
        self._ahead = RolloutAhead(batch, self._group.aside(lambda: self._rollout(batch.prompts, batch.step)))

    def _settled(self, seconds: dict[str, float]) -> Rollout | None:
        """The rollout that was begun ahead, once it has ended; None without one, and where engines were lost in it. Those are replaced, and
        its prompts are generated for anew in their step."""
        if self._ahead is None:
            return None
        self._screen.phase("rollout")
        try:
            with timed(seconds, "time/rollout_wait"):
                return self._ahead.rollout.result()
        except RlsyncError as error:
            self._ahead = None
            self._replace_lost_engines(error)
            return None

    def _restore_ahead(self) -> None:
        """Take up the samples that a checkpoint has of the next step, with rewards by the settings of this run."""
        beginning, position = self._prepared.beginning, self._prepared.position
        if not self._config.runner.async_steps or position is None or STATE not in position:
            return
        batch, known = self._drawn(beginning.step + 1, {}), Future[Rollout]()
        rollout = self._config.rollout
        changed = outdated(
            position[STATE],
            batch,
            beginning,
            group_size=self._config.algorithm.group_size,
            logprobs=bool(rollout.return_logprobs),
            routes=bool(rollout.enable_return_routed_experts),
        )
        if changed:
            self._screen.note(
                f"step {batch.step} is generated anew: {', '.join(changed)} changed since the checkpoint, which has samples of it"
            )
            return
        groups, seconds = restored(position[STATE], batch.prompts)
        known.set_result(Rollout(tuple(s for group in self._judged(batch.prompts, groups) for s in group), seconds))
        self._ahead = RolloutAhead(batch, known)

    def _generated(self, version: int, seconds: dict[str, float], name: str, generate: Callable[[], T]) -> tuple[SyncReport, T]:
        """What the engines generate with the weights of ``version``, after a sync to them; repeated from the sync on after lost engines
        were replaced, up to ``rollout.max_engine_restarts``. ``name``: of the phase, for the screen."""
        while True:
            try:
                report = self._synced(version, seconds) if self._served is None else self._served
                self._screen.phase(name)
                return report, generate()
            except RlsyncError as error:
                self._served = None
                if isinstance(error, WeightSyncError):
                    self._health.failed(error, self._group.engine_ids)
                    self._log.show(self._health.metrics())
                self._replace_lost_engines(error)

    def _synced(self, version: int, seconds: dict[str, float]) -> SyncReport:
        report = super()._synced(version, seconds)
        self._health.committed(self._group.engine_ids)
        return report

    def _validate(self, step: int) -> dict[str, float]:
        """One greedy response to each validation problem. Its sync is that of the next step, made earlier, and the engines forget what
        they cached of these prompts."""
        config, prompts = self._config, self._prepared.data.val_prompts
        sampling = sampling_arguments(config, model=self._model, stop_token_ids=self._prepared.stop_ids, validation=True)

        def generate() -> list[tuple[Completion, ...]]:
            parts = self._prepared.data.val_parts(config.data.num_workers)
            groups = [group for part in parts for group in self._group.generate(part, sampling, None)]
            self._group.reset_caches()
            return groups

        self._settled({})
        self._served, groups = self._generated(step, {}, "validation", generate)
        self._colocation.take_seconds()  # part of the validation's
        responses = [response for (response,) in groups]
        verdicts = [verdict for (verdict,) in self._verdicts(prompts, [[r.token_ids] for r in responses])]
        lengths, ended = [len(r.token_ids) for r in responses], [r.finish_reason == "stop" for r in responses]
        return validation_metrics(verdicts, response_lengths=lengths, properly_ended=ended)

    def _replace_lost_engines(self, error: RlsyncError) -> None:
        """Replace lost engines. Raises ``error`` if no engine is lost, or too many are; the screen says which key lets it be fewer."""
        allowed = self._config.rollout.max_engine_restarts
        left = allowed - self._num_restarts
        # Not asked where none may be replaced: one that is stopped would be waited for.
        lost = self._group.lost_engines(error) if left > 0 else {}
        if not 0 < len(lost) <= left:
            if lost or left <= 0:
                self._screen.note(
                    f"if an engine is lost: rollout.max_engine_restarts is {allowed}, and {self._num_restarts} were replaced; a larger one "
                    "lets a run replace it"
                )
            raise error
        for reason in lost.values():
            self._screen.note(f"replacing an engine: {reason}")
        self._num_restarts += len(lost)
        self._connected = False
        self._group.replace_engines(list(lost))

    def _rollout(self, prompts: Sequence[Prompt], step: int) -> Rollout:
        """``group_size`` samples of each prompt, which engines share. What has ended gets its rewards while others are generated."""
        groups: list[list[Sample]] = [[] for _ in prompts]
        seconds: dict[str, float] = {}

        def judge(numbers: Sequence[int]) -> None:
            for number, group in zip(numbers, self._judged([prompts[i] for i in numbers], [groups[i] for i in numbers]), strict=True):
                groups[number] = group

        def take(ended: Mapping[int, tuple[Completion, ...]]) -> None:
            for number, completions in ended.items():
                groups[number] = self._samples(prompts[number], completions)
            judging.add(ended)
            scoring.add(ended)

        early = EarlyScores(groups, self._config.algorithm.early_scoring_prompts, self._score_early)
        with Beside(judge) as judging, Beside(early.ended) as scoring:
            with timed(seconds, "time/rollout"):
                sampling = sampling_arguments(self._config, model=self._model, stop_token_ids=self._prepared.stop_ids)
                seeds, some = self._seeds(len(prompts), step), self._config.rollout.return_logprobs is None
                self._group.generate([p.for_engine() for p in prompts], sampling, seeds, take, some_logprobs=some)
            with timed(seconds, "time/reward"):
                judging.wait()
            scoring.wait()
        samples = early.attached()
        if early.seconds:
            seconds["time/actor/early_inference"] = early.seconds
        if self._config.rollout.print_outputs:
            self._screen.note(f"{self._decoded(samples[0].prompt_ids)} -> {self._decoded(samples[0].response_ids)}")
        return Rollout(samples, seconds, tuple(early.counts))

    def _score_early(self, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[RoutingCounts | None]]:
        batches = self._dealt(samples, num_updates=1, shuffle_seed=None)
        answers = self._on_ranks("score_early", ray.put(batches))
        return aligned(samples, batches, [scored for scored, _ in answers if scored is not None]), [counts for _, counts in answers]

    def _samples(self, prompt: Prompt, group: tuple[Completion, ...]) -> list[Sample]:
        """``group_size`` samples without rewards."""
        return [_sample(prompt, c, self._routes(prompt, c)) for c in group * (self._config.algorithm.group_size // len(group))]

    def _routes(self, prompt: Prompt, completion: Completion) -> torch.Tensor | None:
        if not self._config.rollout.enable_return_routed_experts:
            return None
        shape = routing_shape(self._model.transformer)
        return engine_routes(completion.routes, length=len(prompt.token_ids) + len(completion.token_ids), shape=shape)

    def _check_references(self, prompts: Sequence[Prompt]) -> None:
        """Find the rows to which no response can be correct, as the judge reads references, where rows are read when their turn comes. They
        end the run, or, where bad samples are skipped, are said; as all responses to one get the same reward, they give no gradient."""
        if self._prepared.data.pictures is None or not isinstance(self._judge, MathJudge):
            return
        bad = BadSamples()
        for prompt in self._judge.unreadable(prompts):
            bad.add(prompt.where, unreadable_reference(prompt.answers[0]))
        for note in bad.settle(self._config.data.on_bad_sample):
            self._screen.note(note)

    def _seeds(self, count: int, step: int) -> list[int] | None:
        """One seed per prompt of a step; vLLM seeds the prompt's samples with consecutive numbers from it."""
        if not self._config.algorithm.sampling_params.seeded:
            return None
        draw = random.Random(f"rollout-{self._config.actor.seed}-{step}")
        return [draw.randrange(2**40) for _ in range(count)]

    def _judged(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
        """The samples of each prompt with their rewards."""
        verdicts = self._verdicts(prompts, [[sample.response_ids for sample in group] for group in groups])
        return [
            [replace(sample, reward=verdict.reward) for sample, verdict in zip(group, found, strict=True)]
            for group, found in zip(groups, verdicts, strict=True)
        ]

    def _verdicts(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[tuple[int, ...]]]) -> list[list[Verdict]]:
        """On the responses (token ids) to each prompt. Those that took too long are said."""
        decode = self._prepared.tokenizer.batch_decode
        texts = iter(decode([list(response) for group in responses for response in group], skip_special_tokens=True))
        verdicts = self._judge.judge(prompts, [[next(texts) for _ in group] for group in responses])
        late = [prompt.where for prompt, group in zip(prompts, verdicts, strict=True) if any(verdict.timed_out for verdict in group)]
        if late:
            self._screen.note(
                f"no verdict on responses to {late[0]}{f' and {len(late) - 1} more rows' if len(late) > 1 else ''} within reward.timeout_s "
                f"({self._config.reward.timeout_s:g} s): they get reward.reward_min_val"
            )
        return verdicts

    def _dealt(self, samples: Sequence[Sample], *, num_updates: int, shuffle_seed: int | None) -> list[ReplicaBatch]:
        """The samples of a step, or some of them, as the actor's replicas take them."""
        actor = self._config.actor
        assert actor.micro_batch_size is not None, "load_config derives it"
        return split_samples(
            samples,
            dp_size=self._group.topology.dp_size,
            num_updates=num_updates,
            micro_batch_size=actor.micro_batch_size,
            budget=self._budget,
            balance=actor.enable_dp_load_balance,
            shuffle_seed=shuffle_seed,
        )

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return repr(self._prepared.tokenizer.decode(list(token_ids)))


def warm_start_texts(config: RunConfig, warm: WarmStartConfig, tokenizer: Any, end: tuple[int, ...]) -> list[list[SftExample]]:
    """The examples of each step of a warm start by text: prompts as rollouts have them, and behind each its response and ``end``.
    Raises ConfigError, by file and line of a row that cannot be used."""
    bad, vocab_size = BadSamples(), read_vocab_size(Path(config.model_path), config.model_key)
    prompts = tokenized(load_supervised(warm.data_paths), tokenizer, prompt_form(config), bad, vocab_size=vocab_size)
    examples = []
    for problem, _, prompt_ids in prompts:
        response_ids = tokenizer(problem.answers[0], add_special_tokens=False)["input_ids"]
        if (reason := unknown_token(response_ids, tokenizer, vocab_size)) is not None:
            bad.add(problem.where, reason)
        examples.append(answered(tuple(prompt_ids), (*response_ids, *end), problem.where))
        if (length := examples[-1].length) > config.runner.seq_length:
            bad.add(problem.where, f"prompt and response have {length} tokens, and runner.seq_length is {config.runner.seq_length}")
    bad.settle("error", way_out=False)
    order = torch.Generator().manual_seed(config.actor.seed)
    picks = [torch.randint(len(examples), (warm.batch_size,), generator=order).tolist() for _ in range(warm.num_steps)]
    return [[examples[i] for i in pick] for pick in picks]


def left_out_notes(loader: RowLoader[SftExample]) -> tuple[str, ...]:
    """What a user should know of rows that were left out of a warm start, each time that it came to one."""
    bad, too_long = (int(count) for count in loader.take_left_out().values())
    found = [f"{bad} that cannot be used (data.on_bad_sample: skip)"] * (bad > 0)
    found += [f"{too_long} of more than runner.seq_length tokens"] * (too_long > 0)
    return (f"others were in the place of rows of warm_start.data_paths: of {' and '.join(found)}",) if found else ()


def _sample(prompt: Prompt, completion: Completion, routes: torch.Tensor | None) -> Sample:
    return Sample(
        prompt.token_ids,
        completion.token_ids,
        completion.logprobs,
        completion.finish_reason == "stop",
        completion.version,
        routes=routes,
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
    )


_NUM_TOKENS = 16


class WeightCheck:
    """Greedy answers of each engine to the first prompts, before and after a sync.

    Args:
        model_path: what the engines read, for messages.
    """

    def __init__(self, group: WorkerGroup, prepared: Preparation, model_path: str) -> None:
        self._group, self._tokenizer, self._model_path = group, prepared.tokenizer, model_path
        self._sampling = {"n": 1, "temperature": 0.0, "max_tokens": _NUM_TOKENS, "stop_token_ids": list(prepared.stop_ids)}
        self._prompts = prepared.data.first_prompts
        self._before: list[list[tuple[Completion, ...]]] | None = None

    def before(self) -> None:
        """Record the answers before the sync; later calls have no effect."""
        if self._before is None:
            self._before = self._group.answers([prompt.for_engine() for prompt in self._prompts], self._sampling)

    def after(self) -> str:
        """Compare the answers after the sync; returns a note for the user. Raises RlsyncError at the first difference."""
        assert self._before is not None, "call before() before the sync"
        after = self._group.answers([prompt.for_engine() for prompt in self._prompts], self._sampling)
        for engine, (old, new) in enumerate(zip(self._before, after, strict=True)):
            for prompt, was, is_now in zip(self._prompts, old, new, strict=True):
                if was[0].token_ids != is_now[0].token_ids:
                    raise RlsyncError(
                        f"rollout.validate_weight: to the prompt {prompt.text!r} engine {engine} answered "
                        f"{self._decoded(was[0].token_ids)} with the weights of {self._model_path}, but "
                        f"{self._decoded(is_now[0].token_ids)} with those of the actor; do both start from the same weights?"
                    )
        return f"weights validated: {len(self._prompts)} greedy answers of each engine are the same before and after a sync"

    def _decoded(self, token_ids: tuple[int, ...]) -> str:
        return repr(self._tokenizer.decode(list(token_ids)))
