"""What the ranks of ``test_actor`` do; each function runs on every rank, without Ray and without engines."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from rlsync.errors import CheckpointError, ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.parallel import destroy_parallel
from rlsync.megatron.train import train_step
from tests.integration.actor_reference import Reference, read_samples, run_config
from workers import grpo_actor, initial_weights
from workers.actor import ActorRank
from workers.config import RunConfig, actor_topology
from workers.early_scores import EarlyScores
from workers.grpo_actor import GrpoRank
from workers.metrics import difference_metrics
from workers.samples import ReplicaBatch, Sample, aligned, split_samples
from workers.supervised import answered


def start(config: RunConfig, *, load_initial: bool = True) -> GrpoRank:
    """An ``GrpoRank`` after ``setup``, on as many replicas as there are ranks for."""
    one = actor_topology(config.actor.model, 1)
    topology: Topology = actor_topology(config.actor.model, int(os.environ["WORLD_SIZE"]) // one.world_size)
    actor = GrpoRank(config, topology)
    set_up(actor, load_initial)
    return actor


def set_up(actor: ActorRank, load_initial: bool = True) -> None:
    """As a run's driver has it done; the port is known before, and process groups of an actor before are gone on with."""
    port = int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" and not dist.is_initialized():
        assert actor.listen("127.0.0.1", port) == port
    actor.setup("127.0.0.1", port, load_initial)


def meet(folder: str) -> None:
    """Where this process listens at the port of the process group's store; before, rank 0 is refused an address that is not its host's."""
    config = run_config(folder, {})
    if os.environ["RANK"] == "0":
        stranger = GrpoRank(config, actor_topology(config.actor.model, int(os.environ["WORLD_SIZE"])))
        try:
            stranger.listen("192.0.2.1")
            raise AssertionError("an address that is kept for documentation is this host's")
        except ConfigError as error:
            refusal = str(error)
        assert stranger.listen("127.0.0.1") not in (0, int(os.environ["MASTER_PORT"])), "without a port the system chooses"
    actor = start(config)
    mine = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    met = [at.ip for at in mine if at.port == int(os.environ["MASTER_PORT"])]
    if os.environ["RANK"] == "0":
        say({"refusal": refusal, "listens": met})
    else:
        assert met == []
    leave(actor)


def leave(actor: GrpoRank) -> None:
    """End Megatron's groups, so that another actor can start in this process."""
    destroy_parallel(keep_distributed=True)


def batches(actor: GrpoRank, samples: Sequence[Sample], step: int, *, num_updates: int | None = None) -> list[ReplicaBatch]:
    config = actor._config
    most = config.runner.max_tokens_per_mbs if config.runner.enable_dynamic_batch_size else None
    return split_samples(
        samples,
        dp_size=actor._topology.dp_size,
        num_updates=config.algorithm.n_minibatches if num_updates is None else num_updates,
        micro_batch_size=config.algorithm.training_batch_size_per_gpu,
        budget=None if most is None else actor.token_budget(most),
        balance=config.actor.enable_dp_load_balance,
        shuffle_seed=config.actor.seed + step if config.algorithm.shuffle_rollout and num_updates is None else None,
    )


def scored_early(actor: GrpoRank, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """With log-probabilities, where the configuration has them made before ``score``; as a run's driver does it."""
    size = actor._config.algorithm.group_size

    def score(some: Sequence[Sample]) -> tuple[list[torch.Tensor], list[None]]:
        dealt = batches(actor, some, 0, num_updates=1)
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, actor.score_early(dealt))
        return aligned(some, dealt, [scored for scored, _ in answers if scored is not None]), []

    early = EarlyScores([samples[i : i + size] for i in range(0, len(samples), size)], actor._config.algorithm.early_scoring_prompts, score)
    # Prompts end in another order than they were asked.
    for number in reversed(range(len(samples) // size)):
        early.ended([number])
    return early.attached()


def steps(actor: GrpoRank, samples: Sequence[Sample], which: Sequence[int]) -> list[list[dict[str, float]]]:
    """Score and train, once for each number of a step; metrics of every update."""
    done = []
    for step in which:
        dealt = batches(actor, scored_early(actor, samples), step)
        actor.score(dealt)
        done.append(actor.train(dealt))
    return done


def weights(actor: GrpoRank) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in actor._bridge.export_weights(actor._models)}


def say(value: Any) -> None:
    if dist.get_rank() == 0:
        print("SAID " + json.dumps(value), flush=True)


def train_as_reference(cases: Sequence[Mapping[str, Any]], folder: str, samples: str) -> None:
    """Two steps under each configuration: every metric of every update, and the weights, as the reference has them. A case may be of
    another model, with samples of its own."""
    for case in cases:
        mine = read_samples(case.get("samples", samples))
        config = run_config(case.get("folder", folder), {name: keys for name, keys in case.items() if name not in ("folder", "samples")})
        algorithm = config.algorithm
        seeds = [config.actor.seed + step if algorithm.shuffle_rollout else None for step in (1, 2)]
        reference = Reference(config) if os.environ["RANK"] == "0" else None
        expected = [reference.step(mine, seed) for seed in seeds] if reference is not None else []
        actor = start(config)
        actor.begin(None)
        found = steps(actor, mine, (1, 2))
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        assert all(other == found for other in everywhere), f"{case}: ranks report different metrics"
        trained = weights(actor)
        if reference is not None:
            _compare(case, found, expected, trained, reference.model.state_dict())
        leave(actor)


def _compare(case: Any, found: Any, expected: Any, trained: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    for step, (updates, wanted) in enumerate(zip(found, expected, strict=True), 1):
        assert len(updates) == len(wanted)
        for update, (ours, theirs) in enumerate(zip(updates, wanted, strict=True)):
            where = f"{case}: step {step}, update {update}"
            missing = theirs.keys() - ours.keys()
            assert not missing, f"{where}: no {missing}"
            off = {k: (ours[k], v) for k, v in theirs.items() if abs(ours[k] - v) > 1e-4 * max(1.0, abs(v))}
            assert not off, f"{where}: {off}"
            assert ours["actor/update_success"] == 1.0 and ours["actor/lr"] > 0
    assert state.keys() - trained.keys() <= {"lm_head.weight"}, f"{case}: {state.keys() - trained.keys()} were not compared"
    worst = max((trained[name] - tensor).abs().max().item() for name, tensor in state.items() if name in trained)
    assert worst < 5e-5, f"{case}: weights differ by {worst}"
    print(f"EQUAL {json.dumps(case)} weights within {worst:.1e}", flush=True)


def begin_with(cases: Sequence[Mapping[str, Any]], folder: str, samples: str) -> None:
    """The weights that ``setup`` gives in each case, whether it converted, and whether an optimizer built on them trains."""
    found = []
    for case in cases:
        sections = {name: keys for name, keys in case.items() if name != "folder"}
        config = run_config(case.get("folder", folder), sections)
        origin = Path(config.actor.megatron.ckpt_convertor.save_path, initial_weights.ORIGIN)
        before = origin.stat().st_mtime_ns if origin.is_file() else None
        actor = start(config)
        converted = origin.is_file() and origin.stat().st_mtime_ns != before
        found.append({"digest": _digest(weights(actor)), "converted": converted})
        actor.begin(None)
        (updates,) = steps(actor, read_samples(samples), (1,))
        assert all(u["actor/update_success"] for u in updates) and _digest(weights(actor)) != found[-1]["digest"]
        leave(actor)
    say(found)


def convert_own_copies(case: Mapping[str, Any], folders: Sequence[str]) -> None:
    """Ranks that each have the HF files in a folder of their own convert once, and all take that conversion the next time."""
    written = []
    for _ in range(2):
        config = run_config(folders[int(os.environ["RANK"])], case)
        actor = start(config)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, _digest(weights(actor)))
        assert len(set(found)) == 1, f"ranks have different weights: {found}"
        written.append(Path(config.actor.megatron.ckpt_convertor.save_path, initial_weights.ORIGIN).stat().st_mtime_ns)
        leave(actor)
    assert written[0] == written[1], "converted twice"


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].float().numpy().tobytes())
    return whole.hexdigest()


def die_while_converting(case: Mapping[str, Any], folder: str) -> None:
    """``kill -9`` when all of a conversion is written but the word that it is."""
    original = initial_weights.save_checkpoint

    def die(*arguments: Any, **named: Any) -> None:
        original(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    initial_weights.save_checkpoint = die
    start(run_config(folder, case))


def resume(cases: Sequence[Mapping[str, Any]], folder: str, samples: str, root: str) -> None:
    """Two steps, save, two more; a new actor that resumes does the same two, bit for bit, and so does its KL reference."""
    mine = read_samples(samples)
    for number, case in enumerate(cases):
        config = run_config(folder, case)
        target = str(Path(root, f"case{number}", "actor"))
        actor = start(config)
        actor.begin(None)
        steps(actor, mine, (1, 2))
        actor.save(target, 2)
        whole, final = steps(actor, mine, (3, 4)), _digest(weights(actor))
        leave(actor)
        again = start(config, load_initial=config.algorithm.kl_beta != 0)
        restored = again.begin(target)
        assert restored is not None and (restored.step, restored.complete) == (2, True)
        after = steps(again, mine, (3, 4))
        assert after == whole, f"{case}: {after} after resume, {whole} without"
        assert _digest(weights(again)) == final, f"{case}: weights differ after resume"
        rates = [update["actor/lr"] for updates in whole for update in updates]
        print(f"RESUMED {json.dumps(case)} kl {whole[-1][-1].get('actor/kl_loss')} lr {rates}", flush=True)
        leave(again)


def resume_without_optimizer(folder: str, samples: str, root: str) -> None:
    """``no_save_optim`` and ``no_load_optim``: what each leaves out, and what is refused."""
    mine, target = read_samples(samples), str(Path(root, "weights", "actor"))
    saving = {"actor.megatron": {"no_save_optim": True}, "actor.model": {"precision": "bf16"}}
    actor = start(run_config(folder, saving))
    actor.begin(None)
    steps(actor, mine, (1,))
    actor.save(target, 1)
    saved = _digest(weights(actor))
    leave(actor)
    assert not list(Path(target).rglob("distrib_optim.pt"))
    plain = start(run_config(folder, {"actor.model": {"precision": "bf16"}}), load_initial=False)
    try:
        plain.begin(target)
        raise AssertionError("a checkpoint without optimizer was taken for one with it")
    except CheckpointError as error:
        say(str(error))
    leave(plain)
    again = start(run_config(folder, {**saving, "actor.megatron": {"no_load_optim": True}}), load_initial=False)
    assert again.begin(target) is not None
    assert _digest(weights(again)) == saved
    # An update of zero learning rate would bring back what the optimizer copied too early.
    _still(again, mine, saved)
    leave(again)


def _still(actor: GrpoRank, samples: Sequence[Sample], expected: str) -> None:
    """The optimizer's own copies are those of the weights: a step without learning rate changes nothing."""
    rates = [(group, group["lr"], group["max_lr"]) for group in actor._optimizer.param_groups]
    for group, _, _ in rates:
        group["lr"] = 0.0
    scheduler, actor._scheduler = actor._scheduler, None
    dealt = batches(actor, samples, 1)
    actor.score(dealt)
    actor.train(dealt)
    actor._scheduler = scheduler
    for group, rate, _ in rates:
        group["lr"] = rate
    assert _digest(weights(actor)) == expected, "the optimizer started from other weights than the model's"


def warm_start(cases: Sequence[Mapping[str, Any]], folder: str, samples: str) -> None:
    """Supervised steps, then GRPO from their weights: the optimizer and the KL reference start from these."""
    mine = read_samples(samples)
    examples = [[answered(s.prompt_ids, s.response_ids) for s in mine]] * 6
    for case in cases:
        config = run_config(folder, case)
        actor = start(config)
        first = _digest(weights(actor))
        losses = actor.warm_start(examples, 1e-2)
        assert losses[-1] < losses[0] - 0.1, losses
        warm = _digest(weights(actor))
        assert warm != first
        actor.begin(None)
        _still(actor, mine, warm)
        (updates,) = steps(actor, mine, (1,))
        kl = [update["actor/kl_loss"] for update in updates]
        assert kl[0] < 1e-6 < 1e-2 < kl[1], f"{case}: the reference is not the warm-started model: {kl}"
        assert all(update["actor/update_success"] == 1.0 for update in updates), updates
        print(f"WARM {json.dumps(case)} {losses[0]:.3f} -> {losses[-1]:.3f}, kl {kl}", flush=True)
        leave(actor)


def warm_start_cuts(folder: str, samples: str) -> None:
    """Microbatches of a warm start are as large as those of the training, and its losses do not depend on them, nor on examples that
    cannot be dealt evenly."""
    examples, found, sizes = [[answered(s.prompt_ids, s.response_ids) for s in read_samples(samples)][:7]] * 2, [], []

    def counted(models: Any, optimizer: Any, microbatches: Any, *args: Any, **given: Any) -> Any:
        sizes.append([len(micro["tokens"]) for micro in microbatches])
        return train_step(models, optimizer, microbatches, *args, **given)

    grpo_actor.train_step = counted
    for size in (8, 3, 1):
        actor = start(run_config(folder, {"algorithm": {"training_batch_size_per_gpu": size}}))
        found.append(actor.warm_start(examples, 1e-2))
        leave(actor)
    grpo_actor.train_step = train_step
    assert sizes == [[4]] * 2 + [[3, 1]] * 2 + [[1, 1, 1, 1]] * 2, sizes
    assert all(math.isclose(loss, first, rel_tol=1e-5) for losses in found for loss, first in zip(losses, found[0], strict=True)), found
    print("CUT", flush=True)


def keep_reference(case: Mapping[str, Any], folder: str, samples: str) -> None:
    """Steps that move routers' biases leave the reference's log-probabilities at the first ones, bit for bit; and scoring by the reference
    leaves the weights and biases of the steps as they are."""
    mine = read_samples(samples)
    actor = start(run_config(folder, case))
    actor.begin(None)
    first = {name: tensor for name, tensor in weights(actor).items() if name.endswith("e_score_correction_bias")}
    assert first, "the model has no biases"
    references = []
    for step in (1, 2):
        dealt, before = batches(actor, mine, step), _digest(weights(actor))
        actor.score(dealt)
        assert _digest(weights(actor)) == before, f"step {step}: scoring by the reference changed the weights"
        references.append(torch.cat(actor._reference_logprobs))
        actor.train(dealt)
    moved = [not torch.equal(weights(actor)[name], bias) for name, bias in first.items()]
    assert all(moved), f"control: biases moved: {moved}"
    assert torch.equal(*references), f"the reference moved by up to {(references[0] - references[1]).abs().max():.2e}"
    leave(actor)


def compare_some(folder: str, samples: str) -> None:
    """The difference is over the samples that engines gave log-probabilities of, and over no tokens where they gave none."""
    mine = read_samples(samples)
    case = {"rollout": {"model": {"model_path": folder}, "return_logprobs": None}}
    actor = start(run_config(folder, case))
    actor.begin(None)
    for asked in (range(len(mine)), range(0, len(mine), 3), ()):
        given = [s if number in asked else replace(s, engine_logprobs=()) for number, s in enumerate(mine)]
        dealt = batches(actor, given, 1)
        found = actor.score(dealt)
        rows = zip(actor._old_logprobs, dealt[0].samples, strict=True)
        apart = [abs(float(a) - b) for row, s in rows for a, b in zip(row[len(s.prompt_ids) :], s.engine_logprobs, strict=False)]
        assert found.count == len(apart) == sum(len(mine[number].response_ids) for number in asked)
        assert math.isclose(found.total, math.fsum(apart), rel_tol=1e-6) and math.isclose(
            found.largest, max(apart, default=0), rel_tol=1e-6
        )
        assert bool(difference_metrics([found])) == bool(asked)
    leave(actor)


def stop_early(folder: str, samples: str) -> None:
    """A microbatch whose mean ratio is above the limit adds nothing; the others go on."""
    mine = read_samples(samples)
    # The engine thought these much less likely than the actor does: ratios near e.
    far = [replace(s, engine_logprobs=tuple(v - 1 for v in s.engine_logprobs)) for s in mine]
    for limit, stopped in ((5.0, 0.0), (2.0, 1.0)):
        algorithm = {"recompute_logprobs": False, "early_stop_imp_ratio": limit}
        actor = start(run_config(folder, {"algorithm": algorithm}))
        actor.begin(None)
        ((first, _),) = steps(actor, far, (1,))
        assert first["actor/early_stopped"] == stopped, first
        assert (first["actor/grad_norm"] == 0.0) == bool(stopped) and (first["actor/final_loss"] == 0.0) == bool(stopped)
        leave(actor)
