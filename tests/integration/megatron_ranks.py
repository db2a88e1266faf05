"""What the ranks of ``test_megatron_training`` do; each function runs on every rank."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.bridge.checkpoint import load_checkpoint, save_checkpoint
from rlsync.bridge.checkpoint_folder import Restored
from rlsync.errors import CheckpointError, GradientError
from rlsync.layout.topology import Topology
from rlsync.megatron import scores as scores_module
from rlsync.megatron.model import DdpOptions, gather_parameters, iter_parameters
from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.scores import CHUNK_TOKENS, Scoring, TokenScores, score_hidden
from rlsync.megatron.train import StepResult, token_scores, train_step
from rlsync.models.lora import LoraSpec
from tests.models import VOCAB_SIZE
from tests.vision_models import collated
from workers.algorithms import PolicyLossOptions
from workers.grpo_actor import PolicyObjective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Actor:
    """A loaded model with its optimizer and schedule, under one layout."""

    def __init__(self, folder: str, case: Mapping[str, Any], *, load: bool = True) -> None:
        self.case = case
        self.topology = Topology(**case["topology"])
        torch.use_deterministic_algorithms(True)  # CUDA's embedding gradients would differ from run to run
        initialize_parallel(self.topology, seed=5, timeout_s=300)
        precision = case.get("precision", "fp32")
        self.bridge = AutoBridge.from_pretrained(folder)
        self.models = self.bridge.get_model(
            folder if load else None,
            topology=self.topology,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            ddp=DdpOptions(**case.get("ddp", {})),
            overrides=case.get("overrides"),
            frozen=case.get("frozen", ()),
            lora=LoraSpec(**case["lora"]) if "lora" in case else None,
        )
        self.optimizer = build_optimizer(self.models, OptimizerOptions(**case["optimizer"]))
        self.scheduler = build_scheduler(
            self.optimizer,
            SchedulerOptions(
                max_lr=case["optimizer"]["lr"],
                start_weight_decay=case["optimizer"]["weight_decay"],
                end_weight_decay=case["optimizer"]["weight_decay"],
            ),
        )

    def microbatches(self, batch: Mapping[str, list] | str) -> list[dict[str, torch.Tensor]]:
        """This replica's share of the batch, cut as the case says, each part trimmed to its longest sequence.

        A string is a file of rows, which may have pictures.
        """
        replica, replicas = parallel_state.get_data_parallel_rank(), self.topology.dp_size
        if isinstance(batch, str):
            found = torch.load(batch)["rows"][replica::replicas]
            assert len(found) == sum(self.case["cut"])
            ends = list(accumulate(self.case["cut"]))
            return [collated(found[start:end]) for start, end in pairwise((0, *ends))]
        whole = {name: torch.tensor(values) for name, values in batch.items()}
        mine = {name: tensor[replica::replicas] for name, tensor in whole.items()}
        parts, start = [], 0
        for rows in self.case["cut"]:
            part = {name: tensor[start : start + rows] for name, tensor in mine.items()}
            lengths = torch.where(part["weights"].ne(0), torch.arange(1, part["weights"].size(1) + 1), 0).amax(dim=1)
            parts.append({name: tensor[:, : int(lengths.max())].contiguous() for name, tensor in part.items()} | {"lengths": lengths})
            start += rows
        assert start == mine["tokens"].size(0)
        return parts

    def steps(self, batch: Mapping[str, list] | str, count: int, *, temperature: float = 1.0) -> list[StepResult]:
        return [
            train_step(
                self.models, self.optimizer, self.microbatches(batch), loss, scheduler=self.scheduler, temperature=temperature, **self.how
            )
            for _ in range(count)
        ]

    @property
    def how(self) -> dict[str, Any]:
        """How the case passes its microbatches through the model."""
        return {"packing": self.case.get("packing", False), "chunk_tokens": self.case.get("chunk_tokens", CHUNK_TOKENS)}

    def gradients(self, batch: Mapping[str, list] | str, **how: Any) -> list[torch.Tensor]:
        """Of a step that changes nothing, and its loss."""
        found: list[torch.Tensor] = []

        def keep() -> tuple[bool, None, None]:
            found.extend(p.main_grad.detach().clone() for *_, p in iter_parameters(self.models))
            return False, None, None

        with mock.patch.object(self.optimizer, "step", keep):
            result = train_step(self.models, self.optimizer, self.microbatches(batch), loss, **how)
        return [torch.tensor(result.metrics["loss"]), *(gradient.cpu() for gradient in found)]

    def digest(self) -> str:
        gather_parameters(self.models)
        sha = hashlib.sha256()
        for _, _, name, parameter in iter_parameters(self.models):
            sha.update(name.encode())
            sha.update(parameter.detach().float().cpu().clone().numpy().tobytes())  # numpy() pins a storage for good
        return sha.hexdigest()

    def save(self, root: str, step: int) -> None:
        save_checkpoint(root, None, self.models, step=step, optimizer=self.optimizer, scheduler=self.scheduler)

    def load(self, root: str) -> Restored:
        return load_checkpoint(root, self.bridge, self.models, optimizer=self.optimizer, scheduler=self.scheduler)


def loss(scores: TokenScores, microbatch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted log-likelihood with an entropy bonus; ``weights`` carry the global normalisation."""
    weights = microbatch["weights"]
    entropy = (scores.entropy * weights.abs()).sum()
    return -(scores.log_probs * weights).sum() - 0.1 * entropy, {"entropy": entropy, "tokens": weights.ne(0).sum()}


def train_as_huggingface(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """For each case: scores, losses, gradient norms and final weights equal those of HF's model under torch's AdamW."""
    for case in cases:
        expected = models[case["model"]]
        actor = Actor(expected["folder"], case)
        _check_scores(actor, expected)
        if any(name in case for name in ("packing", "chunk_tokens")):
            _check_as_padded(actor, expected)
        results = actor.steps(expected["batch"], len(expected["losses"]), temperature=expected["temperature"])
        for step, result in enumerate(results):
            _close(result.metrics["loss"], expected["losses"][step], 2e-5, f"{case}: loss of step {step}")
            _close(result.grad_norm, expected["grad_norms"][step], 1e-4, f"{case}: gradient norm of step {step}")
            counted = expected["zeros"][step] if case["optimizer"].get("log_num_zeros_in_grad") else None
            assert result.num_zeros_in_grad == counted != 0, f"{case}: {result.num_zeros_in_grad} zeros in step {step}, not {counted}"
            _close(result.metrics["tokens"], expected["tokens"], 0, f"{case}: tokens of step {step}")
            assert not result.skipped
            assert result.learning_rate == case["optimizer"]["lr"]
        exported = dict(actor.bridge.export_weights(actor.models))
        trained = torch.load(expected["trained"])
        worst = max((exported[name].cpu() - tensor).abs().max().item() for name, tensor in trained.items())
        assert worst < 2e-5, f"{case}: weights differ by {worst} after training"
        print(f"TRAINED {case['model']} {case['topology']} weights within {worst:.1e}", flush=True)
        destroy_parallel(keep_distributed=True)


def _check_scores(actor: Actor, expected: Mapping[str, Any]) -> None:
    microbatches = actor.microbatches(expected["batch"])
    scores = token_scores(actor.models, microbatches, temperature=expected["temperature"], **actor.how)
    replica, replicas = parallel_state.get_data_parallel_rank(), actor.topology.dp_size
    start = 0
    for microbatch, part in zip(microbatches, scores, strict=True):
        rows, length = microbatch["tokens"].shape
        counted = microbatch["weights"].ne(0)
        assert part.log_probs.dtype is torch.float32
        assert part.log_probs.shape == (rows, length)
        for ours, theirs in ((part.log_probs, expected["log_probs"]), (part.entropy, expected["entropy"])):
            theirs = torch.tensor(theirs)[replica::replicas][start : start + rows, :length]
            worst = ((ours.cpu() - theirs).abs() * counted).max().item()
            assert worst < 1e-4, f"{actor.case}: scores differ by {worst}"
        start += rows


def _check_as_padded(actor: Actor, expected: Mapping[str, Any]) -> None:
    """Scores, loss and gradients of the case are those of padded sequences whose logits are kept whole."""
    microbatches = actor.microbatches(expected["batch"])
    for packed, padded, micro in zip(
        token_scores(actor.models, microbatches, **actor.how), token_scores(actor.models, microbatches), microbatches, strict=True
    ):
        counted = (torch.arange(micro["tokens"].size(1)) < micro["lengths"][:, None]).to(padded.log_probs.device)
        for ours, theirs in ((packed.log_probs, padded.log_probs), (packed.entropy, padded.entropy)):
            worst = ((ours - theirs) * counted).abs().max().item()
            assert worst <= 1e-5, f"{actor.case}: scores differ by {worst} from those of padded sequences"
        # Whether a token is the likeliest may turn with the last bit of a tie, which random logits do not have.
        assert torch.equal(packed.likeliest & counted, padded.likeliest & counted), actor.case
    ours, theirs = actor.gradients(expected["batch"], **actor.how), actor.gradients(expected["batch"])
    worst = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    assert worst <= 1e-5, f"{actor.case}: loss or gradients differ by {worst} from those of padded sequences"
    assert any(bool(gradient.any()) for gradient in theirs[1:]), "gradients were not kept"


def resume_bitwise(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]], root: str) -> None:
    """Two steps, save, two steps; then a fresh actor, load, two steps: the same losses and the same bits."""
    for index, case in enumerate(cases):
        expected, place = models[case["model"]], f"{root}/{index}"
        actor = Actor(expected["folder"], case)
        actor.steps(expected["batch"], case.get("steps_before", 2))
        actor.save(place, step=2)
        at_save, torch_state = actor.digest(), torch.get_rng_state()
        uninterrupted, bits = actor.steps(expected["batch"], 2), actor.digest()
        dist.barrier()
        destroy_parallel(keep_distributed=True)

        again = Actor(expected["folder"], case, load=False)
        assert again.digest() != at_save, "negative control: a fresh actor differs"
        assert again.load(place) == Restored(2, complete=True)
        assert again.digest() == at_save, f"{case}: weights changed on their way through the file"
        assert torch.equal(torch.get_rng_state(), torch_state), f"{case}: random state changed"
        resumed = again.steps(expected["batch"], 2)
        assert resumed == uninterrupted, f"{case}: {resumed} after resume, {uninterrupted} without"
        assert again.digest() == bits, f"{case}: weights differ after resume"
        print(f"RESUMED {case['model']} {case['topology']} {uninterrupted[-1].metrics['loss']!r}", flush=True)
        destroy_parallel(keep_distributed=True)


def refuse_foreign_state(models: Mapping[str, Mapping[str, Any]], root: str) -> None:
    """State of another layout or another model, and truncated files, are refused before anything changes."""
    base = {"topology": {}, "cut": [8], "optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "model": "qwen2"}
    saved = Actor(models["qwen2"]["folder"], base)
    saved.save(root, step=0)
    destroy_parallel(keep_distributed=True)
    for model, ddp, said in (("qwen3", {}, "q_layernorm"), ("qwen2", {"use_distributed_optimizer": True}, "distrib_optim.pt is missing")):
        other = Actor(models[model]["folder"], {**base, "ddp": ddp})
        before = other.digest()
        message = _refusal(other, root)
        assert said in message, message
        assert other.digest() == before
        destroy_parallel(keep_distributed=True)
    again = Actor(models["qwen2"]["folder"], base)
    path = Path(root, "iter_0000000", "mp_rank_00", "model_optim_rng.pt")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "topology": {**state["topology"], "tp_size": 2}}, path)
    message = _refusal(again, root)
    assert "mp_rank_00 says TP=2, PP=1, whose folders are 2; missing or unexpected: mp_rank_01" in message, message
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in _refusal(again, root)
    destroy_parallel(keep_distributed=True)


def _refusal(actor: Actor, root: str) -> str:
    try:
        actor.load(root)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("a foreign state was accepted")


def train_in_half_precision(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """A dozen steps lower the loss; the first is close to float32's."""
    for case in cases:
        expected = models[case["model"]]
        actor = Actor(expected["folder"], case)
        results = actor.steps(expected["batch"], 12, temperature=expected["temperature"])
        taken = [result for result in results if not result.skipped]
        _close(taken[0].metrics["loss"], expected["losses"][0], 0.05, f"{case}: first loss")
        assert taken[-1].metrics["loss"] < taken[0].metrics["loss"] - 0.05, [result.metrics["loss"] for result in taken]
        assert len(results) - len(taken) in case["skipped"], f"{case}: skipped {len(results) - len(taken)} steps"
        assert case["scale"][0] <= results[-1].loss_scale <= case["scale"][1], f"{case}: loss scale {results[-1].loss_scale}"
        print(f"TRAINED {case['precision']}", flush=True)
        destroy_parallel(keep_distributed=True)


def stop_before_a_nan(cases: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    """A nan or an infinity in the loss of one replica ends the step on all ranks: weights, moments and schedule stay, and the next step
    goes on as if nothing had been."""
    for case in cases:
        batch, found = models[case["model"]]["batch"], []
        for bad in (None, math.nan, math.inf):
            actor = Actor(models[case["model"]]["folder"], case)
            actor.steps(batch, 1)
            before, microbatches = actor.digest(), actor.microbatches(batch)
            if bad is not None:
                is_bad = parallel_state.get_data_parallel_rank() == actor.topology.dp_size - 1
                with pytest.raises(GradientError, match=r"the norm of the gradients is (nan|inf): no weight was changed"):
                    train_step(
                        actor.models, actor.optimizer, microbatches, partial(spoilt, bad if is_bad else 1.0), scheduler=actor.scheduler
                    )
                assert actor.digest() == before, f"{case}: a step by {bad} changed the weights"
                assert actor.scheduler.num_steps == 1
            found.append((actor.steps(batch, 1), actor.digest()))
            destroy_parallel(keep_distributed=True)
        assert found[0] == found[1] == found[2], f"{case}: {found}"
        print(f"TRAINED {case['precision']} until a nan", flush=True)


def name_the_rank_of_a_nan(models: Mapping[str, Mapping[str, Any]]) -> None:
    """By default a rank looks at its own gradients before others have them."""
    case = {"topology": {}, "cut": [8], "optimizer": {"lr": 1e-3, "weight_decay": 0.0}}
    for overlap in (False, True):
        actor = Actor(models["qwen2"]["folder"], {**case, "ddp": {"overlap_grad_reduce": overlap}})
        before, microbatches = actor.digest(), actor.microbatches(models["qwen2"]["batch"])
        with pytest.raises(GradientError, match="gradients of actor rank 0 are not finite before they are reduced: no weight was changed"):
            train_step(actor.models, actor.optimizer, microbatches, partial(spoilt, math.nan), scheduler=actor.scheduler)
        assert actor.digest() == before
        destroy_parallel(keep_distributed=True)


def spoilt(factor: float, scores: TokenScores, microbatch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    value, metrics = loss(scores, microbatch)
    return value * factor, metrics


def gather_before_reading(models: Mapping[str, Mapping[str, Any]]) -> None:
    """With overlap_param_gather parameters are stale after a step until ``gather_parameters``."""
    case = {
        "topology": {"dp_size": 2}, "cut": [4], "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "ddp": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    }  # fmt: skip
    actor = Actor(models["qwen2"]["folder"], case)
    for _ in range(2):
        actor.steps(models["qwen2"]["batch"], 1)
        stale = torch.cat([parameter.detach().flatten() for _, _, _, parameter in iter_parameters(actor.models)]).clone()
        assert not _agreed(stale), "negative control: ranks hold different stale values"
        gather_parameters(actor.models)
        gather_parameters(actor.models)
        fresh = torch.cat([parameter.detach().flatten() for _, _, _, parameter in iter_parameters(actor.models)])
        assert _agreed(fresh), "ranks differ after the gather"
        assert not torch.equal(fresh, stale)
    destroy_parallel(keep_distributed=True)


def _agreed(tensor: torch.Tensor) -> bool:
    whole = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(whole, tensor)
    return all(torch.equal(whole[0], other) for other in whole)


def _close(ours: float | None, theirs: float, tolerance: float, what: str) -> None:
    assert ours is not None, what
    assert abs(ours - theirs) <= tolerance * max(1.0, abs(theirs)), f"{what}: {ours}, expected {theirs}"


def agree_in_half_precision(cases: Sequence[Mapping[str, Any]], folder: str, pictures: str | None = None) -> None:
    """In bf16: scores, loss and gradients under the switches and the layout of a case are those without, within what bf16 resolves: no
    farther from those of float32 than the ones without are, and a little. ``pictures``: a file of eight rows that have some.
    """
    seen = None if pictures is None else torch.load(pictures)["rows"]
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([200, 3, 70, 120, 16, 1, 90, 33])
    tokens = torch.randint(1, VOCAB_SIZE, (8, 200), generator=generator)
    weights = torch.rand(8, 200, generator=generator) * (torch.arange(200) < lengths[:, None]) / lengths.sum()
    for case in cases:
        topology, found = case.get("topology", {}), []
        nothing: tuple[dict[str, Any], ...] = ({}, {}, {})
        asked, beside = tuple(case.get(name, {}) for name in ("overrides", "how", "ddp")), case.get("beside", topology)
        ways = ((nothing, "fp32", beside), (nothing, "bf16", beside), (asked, "bf16", topology))
        for (overrides, how, ddp), precision, layout in ways:
            kept = {"sequence_parallel": case.get("overrides", {}).get("sequence_parallel", False)}
            options = {"cut": [4, 4], "optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "precision": precision, "topology": layout}
            actor = Actor(folder, {**options, "ddp": ddp, "overrides": {**kept, **overrides}})
            replica, replicas = parallel_state.get_data_parallel_rank(), actor.topology.dp_size
            mine = [slice(replica, 4, replicas), slice(4 + replica, 8, replicas)]
            microbatches = [
                {"tokens": tokens[rows], "weights": weights[rows], "lengths": lengths[rows]} if seen is None else collated(seen[rows])
                for rows in mine
            ]
            scored = token_scores(actor.models, microbatches, **how)
            counted = [torch.arange(m["tokens"].size(1)) < m["lengths"][:, None] for m in microbatches]
            scores = torch.cat([s.log_probs.cpu()[c] for s, c in zip(scored, counted, strict=True)])
            result = train_step(actor.models, actor.optimizer, microbatches, loss, **how)
            found.append((scores, result.metrics["loss"], result.grad_norm))
            destroy_parallel(keep_distributed=True)
        (exact, loss_exact, norm_exact), *halves = found
        plain, switched = [
            ((scores - exact).abs().mean().item(), abs(of_loss - loss_exact), abs(of_norm - norm_exact))
            for scores, of_loss, of_norm in halves
        ]
        print(f"{case}: from float32: log-probabilities {plain[0]:.1e}, with the switches {switched[0]:.1e}; losses, norms", end=" ")
        print([(f"{of_loss:.5f}", f"{of_norm:.4f}") for _, of_loss, of_norm in found], flush=True)
        assert plain[0] < 0.1, (case, plain)
        for without, with_switches, least in zip(plain, switched, (1e-6, 0.002 * abs(loss_exact), 0.01 * norm_exact), strict=True):
            assert with_switches < 1.3 * without + least, (case, plain, switched)
        print(f"AGREED {case}", flush=True)


def waits_do_not_grow_with_microbatches(hows: Sequence[Mapping[str, Any]], folder: str) -> None:
    """The host waits for the GPU as often in a step of six microbatches as in one of two, and never in a scoring pass.

    Counted are the waits that torch knows of, of passes whose shapes have been seen, with the loss of GRPO.
    """
    generator, objective = torch.Generator().manual_seed(2), PolicyObjective(PolicyLossOptions(early_stop_imp_ratio=9.0), 100, True)
    options = {"optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "precision": "bf16", "topology": {}, "overrides": {}}
    actor = Actor(folder, {**options, "cut": [4], "ddp": {"use_distributed_optimizer": True}})
    torch.use_deterministic_algorithms(False)
    microbatches = []
    for _ in range(6):
        lengths = torch.randint(2, 65, (4,), generator=generator)
        tokens = torch.randint(1, VOCAB_SIZE, (4, 64), generator=generator)
        mask = (torch.arange(64) < lengths[:, None]) & (torch.arange(64) > 0)
        of_each = {"old_logprobs": -5.0 * mask, "advantages": torch.randn(4, 1, generator=generator)}
        microbatches.append({"tokens": tokens, "lengths": lengths, "mask": mask, **of_each})

    def waits(action: Callable[..., Any], count: int) -> int:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                action(microbatches[:count])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [f"{entry.filename}:{entry.lineno}" for entry in said if "called a synchronizing CUDA" in str(entry.message)]
        print(f"WAITS {action.__name__} of {count}: {len(found)} {sorted(set(found))}", flush=True)
        return len(found)

    for how in hows:

        def train(given: Sequence[Mapping[str, torch.Tensor]]) -> None:
            train_step(actor.models, actor.optimizer, given, objective, **how)  # noqa: B023

        def score(given: Sequence[Mapping[str, torch.Tensor]]) -> None:
            token_scores(actor.models, given, **how)  # noqa: B023

        for _ in range(2):
            train(microbatches)
            score(microbatches)
        torch.cuda.synchronize()
        assert waits(score, 2) == waits(score, 6) == 0, how
        assert 0 < waits(train, 2) == waits(train, 6), how
        assert waits(lambda given: [m["tokens"].cuda().sum().item() for m in given], 6) >= 6, "control: it counts"
        print(f"ASKED NOTHING {how}", flush=True)
    destroy_parallel()


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numel = max(self.numel, found.numel())
        return found


def scores_equal_softmax(tp_size: int) -> None:
    """Vocabulary-parallel scores and gradients equal autograd through log_softmax of all logits, however they are cut into chunks and
    pieces; one rank may hold padding only."""
    initialize_parallel(Topology(tp_size=tp_size), seed=1, timeout_s=300)
    generator, device = torch.Generator().manual_seed(4), compute_device()
    for vocab_size, padded, chunk_tokens, piece in (
        (13, 14, 12, 2**20),
        (13, 26, 5, 26),
        (12, 12, 1, 1),
        (61, 62, 4, 2**20),
        (61, 62, 12, 9),
    ):
        hidden = torch.randn(2, 6, 8, generator=generator).requires_grad_()
        matrix = torch.randn(padded, 8, generator=generator).requires_grad_()
        tokens = torch.randint(0, vocab_size, (2, 6), generator=generator)
        weights = torch.randn(2, 2, 6, generator=generator)
        logits = (hidden @ matrix.t())[..., :vocab_size]
        # Of the first rank, of the second where that has more than padding, and one beyond the vocabulary.
        never = (2, vocab_size - 1, vocab_size)
        logits[..., never[:2]] = -1e4
        distribution = (logits / 0.7).log_softmax(dim=-1)
        log_probs, entropy = distribution.gather(-1, tokens[..., None])[..., 0], -(distribution.exp() * distribution).sum(dim=-1)
        of_hidden, of_matrix = torch.autograd.grad((log_probs * weights[0] + entropy * weights[1]).sum(), (hidden, matrix))

        width = padded // tp_size
        columns = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
        ours = [
            hidden.detach().transpose(0, 1).flatten(0, 1).to(device).requires_grad_(),
            matrix.detach()[columns].contiguous().to(device).requires_grad_(),
        ]
        main_grad = torch.zeros_like(ours[1]) if chunk_tokens == 5 else None
        if main_grad is not None:
            ours[1].main_grad = main_grad
        with mock.patch.object(scores_module, "_PIECE_ELEMENTS", piece), _Largest() as seen:
            found = score_hidden(*ours, Scoring(tokens.to(device), vocab_size, 0.7, never, chunk_tokens))
            value = sum((part.view(6, 2).t() * weight.to(device)).sum() for part, weight in zip(found[:2], weights, strict=True))
            gradients = torch.autograd.grad(value, ours)
        if vocab_size == 61:
            assert (seen.numel >= 12 * width) == (chunk_tokens == 12), "logits of all positions exist only where they are one chunk"
        likeliest = distribution.gather(-1, tokens[..., None])[..., 0] == distribution.amax(dim=-1)
        for part, theirs in zip(found, (log_probs, entropy, likeliest), strict=True):
            torch.testing.assert_close(part.detach().cpu().view(6, 2).t(), theirs.detach(), rtol=1e-5, atol=2e-6)
        whole = gradients[0].clone()
        dist.all_reduce(whole)
        torch.testing.assert_close(whole.cpu().view(6, 2, 8).transpose(0, 1), of_hidden, rtol=1e-5, atol=5e-6)
        summed = gradients[1] if main_grad is None else gradients[1] + main_grad
        assert main_grad is None or bool(main_grad.any()) == (dist.get_rank() == 0), "the second rank has padding alone"
        torch.testing.assert_close(summed.cpu(), of_matrix[columns], rtol=1e-5, atol=5e-6)
        with mock.patch.object(scores_module._Columns, "to_gradient", autospec=True) as to_gradient:
            log_probs = score_hidden(*ours, Scoring(tokens.to(device), vocab_size))[0]
            torch.autograd.grad(log_probs.sum(), ours)
        assert to_gradient.call_args.args[-1] is None, "nothing is computed of entropies that a loss does not read"
    destroy_parallel()
