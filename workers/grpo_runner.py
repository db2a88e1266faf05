"""The GRPO loop: sync, rollout, reward, log-probabilities, training, save. Owns the order; each part is elsewhere."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import AutoTokenizer

from rlsync.checkpoint import Restored, latest_checkpoint, publish_checkpoint, stage_checkpoint
from rlsync.errors import CheckpointError, ConfigError, RlsyncError
from rlsync.topology import Topology
from workers.actor import ActorRank, LogprobDifference
from workers.arithmetic import ArithmeticRecipe, build_world
from workers.cluster import Cluster
from workers.config import RunConfig, config_as_dict, validate_model, validate_world
from workers.data import Prompt, PromptDataset, PromptForm, PromptLoader, load_problems
from workers.metrics import MetricsLog
from workers.placement import resolve_placement
from workers.reward import RewardScale, VerifierPool
from workers.rollout import ENGINE_THREADS, RayEngine, RolloutEngine, engine_arguments, sampling_arguments
from workers.rollout_metrics import rollout_metrics
from workers.samples import Sample, Share, deal, with_advantages
from workers.screen import Screen

DATA_STATE = "data/data.pt"


class GrpoRunner:
    """One GRPO run. ``run`` starts everything, trains, and ends everything it started, however it leaves."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._root = Path(config.runner.output_dir).absolute() / config.runner.experiment_name

    def run(self) -> None:
        """Train to the end, or until KeyboardInterrupt, after which all processes are gone too.

        Raises RlsyncError (ConfigError before any process is started, where that can be).
        """
        config = self._config
        if config.arithmetic is not None:
            recipe = {name: getattr(config.arithmetic, name) for name in ArithmeticRecipe.__dataclass_fields__}
            build_world(config.arithmetic.path, ArithmeticRecipe(**recipe))
        self._read_model()
        self._loader = self._make_loader()
        resume = self._resume_folder()
        with ExitStack() as stack:
            cluster = stack.enter_context(Cluster.start(config.cluster.num_nodes, log_folder=self._log_folder()))
            self._lay_out(cluster)
            self._pool = stack.enter_context(VerifierPool(config.reward.num_processes, config.reward.timeout_s))
            start_step = self._launch(cluster, stack, resume)
            total = self._total_steps()
            log = stack.enter_context(
                MetricsLog(
                    config.runner.logger, config_as_dict(config), n_minibatches=config.algorithm.n_minibatches, start_step=start_step
                )
            )
            screen = stack.enter_context(Screen(total, start_step=start_step))
            if resume is None:
                self._warm_start(screen)
            interrupted = True
            try:
                self._train(start_step, total, log, screen)
                interrupted = False
            finally:
                screen.summary(log.history, log.folder, interrupted=interrupted)

    # Set-up.

    def _read_model(self) -> None:
        config = self._config
        path = Path(config.rollout.model.model_path)
        if not (path / "config.json").is_file():
            raise ConfigError(f"rollout.model.model_path {path} holds no config.json; it must be a local Hugging Face folder")
        self._hf_config = json.loads((path / "config.json").read_text())
        validate_model(config, self._hf_config)
        self._tokenizer = AutoTokenizer.from_pretrained(
            config.actor.tokenizer.tokenizer_model,
            use_fast=config.actor.tokenizer.use_fast,
            trust_remote_code=config.actor.tokenizer.trust_remote_code,
        )

    def _make_loader(self) -> PromptLoader:
        data, runner = self._config.data, self._config.runner
        form = PromptForm(
            max_prompt_length=data.max_prompt_length,
            filter_prompt_by_length=data.filter_prompt_by_length,
            apply_chat_template=data.apply_chat_template,
            system_prompt=data.system_prompt,
            prompt_suffix=data.prompt_suffix,
        )
        if data.val_data_paths:
            load_problems(data.val_data_paths, prompt_key=data.prompt_key, answer_key=data.answer_key)
        problems = load_problems(data.train_data_paths, prompt_key=data.prompt_key, answer_key=data.answer_key, data_size=data.data_size)
        return PromptLoader(
            PromptDataset(problems, self._tokenizer, form),
            data.rollout_batch_size,
            num_epochs=runner.max_epochs,
            shuffle=data.shuffle,
            seed=data.seed,
            num_workers=data.num_workers,
        )

    def _total_steps(self) -> int:
        most = self._config.runner.max_steps
        return len(self._loader) if most < 0 else min(most, len(self._loader))

    def _resume_folder(self) -> Path | None:
        wanted = self._config.runner.resume_dir
        if wanted is None:
            return None
        if wanted == "auto":
            return latest_checkpoint(self._root / "checkpoints")
        folder = Path(wanted).absolute()
        if not (folder / "actor").is_dir():
            raise CheckpointError(f"resume_dir {folder} does not exist, or has no actor/ folder; name a global_step_N folder, or auto")
        return folder

    def _log_folder(self) -> Path | None:
        logger = self._config.runner.logger
        assert logger.log_path is not None, "load_config derives it"
        return Path(logger.log_path).absolute() / "worker_logs" if self._config.runner.per_worker_log else None

    def _lay_out(self, cluster: Cluster) -> None:
        model = self._config.actor.model
        self._placement = resolve_placement(self._config.cluster.component_placement, cluster.num_devices)
        dp_size = validate_world(self._config, len(self._placement.actor))
        vpp = model.virtual_pipeline_model_parallel_size
        self._topology = Topology(
            tp_size=model.tensor_model_parallel_size,
            pp_size=model.pipeline_model_parallel_size,
            vpp_size=1 if vpp is None else vpp,
            cp_size=model.context_parallel_size,
            dp_size=dp_size,
            ep_size=model.expert_model_parallel_size,
            etp_size=1 if model.expert_tensor_parallel_size is None else model.expert_tensor_parallel_size,
            first_stage_layers=model.decoder_first_pipeline_num_layers,
            last_stage_layers=model.decoder_last_pipeline_num_layers,
        )

    def _launch(self, cluster: Cluster, stack: ExitStack, resume: Path | None) -> int:
        """Start engines and actor ranks side by side, and connect them. Returns the step to continue after."""
        config = self._config
        arguments = engine_arguments(config, on_gpu=cluster.num_gpus > 0)
        engines = [
            cluster.launch(RolloutEngine, f"{config.rollout.group_name}:{i}", devices, f"engine {i}", arguments, threads=ENGINE_THREADS)
            for i, devices in enumerate(self._placement.engines(config.rollout.tensor_parallel_size))
        ]
        stack.callback(_close_all, engines)
        starting = [engine.start.remote() for engine in engines]
        self._actors = [
            cluster.launch(
                ActorRank,
                f"{config.actor.group_name}:{rank}",
                (device,),
                config,
                self._topology,
                environment={"RANK": str(rank), "WORLD_SIZE": str(self._topology.world_size), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
            )
            for rank, device in enumerate(self._placement.actor)
        ]
        address, port = _get(self._actors[0].rendezvous.remote())
        folder = None if resume is None else str(resume / "actor")
        restored: list[Restored | None] = self._on_ranks("setup", address, port, folder)
        self._engines = [
            RayEngine(f"engine {i}", workers, actor) for i, (workers, actor) in enumerate(zip(_get(starting), engines, strict=True))
        ]
        self._on_ranks("connect", self._engines)
        stack.callback(lambda: _close_all(self._actors))
        if resume is None or restored[0] is None:
            return 0
        self._restore_data(resume, restored[0])
        return restored[0].step

    def _restore_data(self, folder: Path, restored: Restored) -> None:
        if not restored.complete:
            print(f"warning: {folder} holds HF weights alone: the optimizer starts anew at step {restored.step}", flush=True)
        state = folder / DATA_STATE
        if not state.is_file():
            print(f"warning: {state} is missing: the training data starts from the beginning", flush=True)
            return
        self._loader.load_state_dict(torch.load(state, weights_only=True))

    def _warm_start(self, screen: Screen) -> None:
        """Supervised steps, where the configuration asks for them."""
        warm = self._config.warm_start
        if warm is None:
            return
        screen.phase("warm start")
        began = time.monotonic()
        examples = [
            (
                tuple(self._tokenizer(line["prompt"])["input_ids"]),
                tuple(self._tokenizer(line["response"])["input_ids"]) + self._stop_ids()[:1],
            )
            for path in warm.data_paths
            for line in map(json.loads, Path(path).read_text().splitlines())
        ]
        order = torch.Generator().manual_seed(self._config.actor.seed)
        picks = [torch.randint(len(examples), (warm.batch_size,), generator=order).tolist() for _ in range(warm.num_steps)]
        losses = self._on_ranks("warm_start", [[examples[i] for i in pick] for pick in picks], warm.lr)[0]
        screen.note(
            f"warm start: {warm.num_steps} supervised steps in {time.monotonic() - began:.1f} s, loss {losses[0]:.2f} -> {losses[-1]:.2f}"
        )

    def _stop_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of the tokenizer and of the model's configs, the tokenizer's first."""
        path = Path(self._config.rollout.model.model_path) / "generation_config.json"
        generation = json.loads(path.read_text()) if path.is_file() else {}
        found: list[int] = []
        for value in (self._tokenizer.eos_token_id, generation.get("eos_token_id"), self._hf_config.get("eos_token_id")):
            found += value if isinstance(value, list) else [] if value is None else [value]
        return tuple(dict.fromkeys(found))

    # The loop.

    def _train(self, start_step: int, total: int, log: MetricsLog, screen: Screen) -> None:
        batches = iter(self._loader)
        for step in range(start_step + 1, total + 1):
            seconds: dict[str, float] = {}
            with _timed(seconds, "time/step"):
                metrics, updates = self._step(step, batches, seconds, screen)
            if self._saves(step, total):
                screen.phase("save")
                self._save(step)
            screen.step(step, log.log(step, {**metrics, **seconds}, updates))

    def _step(
        self, step: int, batches: Iterator[list[Prompt]], seconds: dict[str, float], screen: Screen
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """One step; version ``step - 1`` is the number of optimizer steps its rollouts' weights have seen."""
        with _timed(seconds, "time/prepare_data"):
            prompts = next(batches)
        screen.phase("sync")
        with _timed(seconds, "time/sync_weights"):
            report = self._on_ranks("sync", step - 1)[0]
        screen.phase("rollout")
        with _timed(seconds, "time/rollout"):
            samples = self._rollout(prompts, step)
        screen.phase("reward")
        with _timed(seconds, "time/reward"):
            samples = self._reward(prompts, samples)
        samples = with_advantages(samples, self._config.algorithm.group_size, normalize=self._config.algorithm.normalize_advantages)
        shares = ray.put(self._deal(samples, step))
        screen.phase("log-probabilities")
        with _timed(seconds, "time/actor/inference"):
            differences = self._on_ranks("score", shares)
        screen.phase("training")
        with _timed(seconds, "time/actor/training"):
            updates = self._on_ranks("train", shares)[0]
        return {**_sample_metrics(samples), **_difference_metrics(differences), **report.metrics()}, updates

    def _rollout(self, prompts: Sequence[Prompt], step: int) -> list[Sample]:
        """``group_size`` samples of each prompt, next to each other; prompts are spread over the engines."""
        sampling = sampling_arguments(self._config, vocab_size=int(self._hf_config["vocab_size"]), stop_token_ids=self._stop_ids())
        count, seeds = len(self._engines), self._seeds(len(prompts), step)
        bounds = [i * len(prompts) // count for i in range(count + 1)]
        answers = _get(
            [
                engine.actor.generate.remote([p.token_ids for p in prompts[a:b]], sampling, None if seeds is None else seeds[a:b])
                for engine, (a, b) in zip(self._engines, pairwise(bounds), strict=True)
            ]
        )
        completions = [group for answer in answers for group in answer]
        samples = [
            Sample(prompt.token_ids, c.token_ids, c.logprobs, c.finish_reason == "stop", c.version)
            for prompt, group in zip(prompts, completions, strict=True)
            for c in group
        ]
        if self._config.rollout.print_outputs:
            print(repr(self._tokenizer.decode(samples[0].prompt_ids + samples[0].response_ids)), flush=True)
        return samples

    def _seeds(self, count: int, step: int) -> list[int] | None:
        """A seed for each prompt of a step; vLLM numbers the samples of a prompt on from it."""
        if not self._config.algorithm.sampling_params.seeded:
            return None
        draw = random.Random(f"rollout-{self._config.actor.seed}-{step}")
        return [draw.randrange(2**40) for _ in range(count)]

    def _reward(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Sample]:
        config = self._config.reward
        scale = RewardScale(config.reward_scale, config.reward_min_val, config.reward_max_val)
        texts = self._tokenizer.batch_decode([list(s.response_ids) for s in samples], skip_special_tokens=True)
        answers = [prompt.answers for prompt in prompts for _ in range(self._config.algorithm.group_size)]
        correct = self._pool.check(texts, answers)
        return [replace(sample, reward=scale.reward(c)) for sample, c in zip(samples, correct, strict=True)]

    def _deal(self, samples: Sequence[Sample], step: int) -> list[Share]:
        algorithm, runner, actor = self._config.algorithm, self._config.runner, self._config.actor
        assert actor.micro_batch_size is not None, "load_config derives it"
        return deal(
            samples,
            dp_size=self._topology.dp_size,
            num_updates=algorithm.n_minibatches,
            micro_batch_size=actor.micro_batch_size,
            max_tokens=runner.max_tokens_per_mbs if runner.enable_dynamic_batch_size else None,
            balance=actor.enable_dp_load_balance,
            shuffle_seed=actor.seed + step if algorithm.shuffle_rollout else None,
        )

    def _saves(self, step: int, total: int) -> bool:
        interval = self._config.runner.save_interval
        return interval > 0 and (step % interval == 0 or step == total)

    def _save(self, step: int) -> None:
        staged = stage_checkpoint(self._root / "checkpoints", step)
        self._on_ranks("save", str(staged / "actor"), step)
        (staged / DATA_STATE).parent.mkdir()
        torch.save(self._loader.state_dict(), staged / DATA_STATE)
        publish_checkpoint(staged, keep_last_n=self._config.runner.keep_last_n)

    def _on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        """One call on every actor rank; the first error ends the wait for the others."""
        return _get([getattr(actor, method).remote(*arguments) for actor in self._actors])


def _get(references: Any) -> Any:
    """``ray.get`` with the error that was raised inside instead of Ray's wrapper, where it is one of ours."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        cause = error.as_instanceof_cause()
        if isinstance(cause, RlsyncError):
            raise cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise RlsyncError(f"a worker process ended unexpectedly: {error}") from None


def _close_all(actors: Sequence[Any]) -> None:
    """Let actors close in order; those that cannot are killed with the cluster."""
    ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=30)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - began


def _sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    advantages = [s.advantage for s in samples if s.response_ids]
    tokens = [len(s.response_ids) for s in samples if s.response_ids]
    return {
        **rollout_metrics(
            prompt_lengths=[len(s.prompt_ids) for s in samples],
            response_lengths=[len(s.response_ids) for s in samples],
            rewards=[s.reward for s in samples],
            properly_ended=[s.finished for s in samples],
        ),
        "rollout/advantages_mean": sum(a * n for a, n in zip(advantages, tokens, strict=True)) / max(1, sum(tokens)),
        "rollout/advantages_max": max(advantages, default=0.0),
        "rollout/advantages_min": min(advantages, default=0.0),
    }


def _difference_metrics(differences: Sequence[LogprobDifference | None]) -> Mapping[str, float]:
    """Over all replicas; empty where engines or actor gave no log-probabilities."""
    seen = [d for d in differences if d is not None]
    if not seen:
        return {}
    return {
        "rollout/logprob_diff_mean": sum(d.total for d in seen) / sum(d.count for d in seen),
        "rollout/logprob_diff_max": max(d.largest for d in seen),
    }
