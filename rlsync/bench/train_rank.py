"""The process of one actor rank of ``rlsync bench --train``: ``python -m rlsync.bench.train_rank SPEC``, in an environment as torchrun
makes it. Rank 0 writes what came out.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from rlsync.bench import training
from rlsync.bench.actor import synchronize
from rlsync.bench.profile import Phases, Profile, profiled
from rlsync.bench.spec import write_file
from rlsync.bench.training import RankFound, TrainFound, TrainSpec
from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.megatron.model import DdpOptions, unwrap
from rlsync.megatron.optimizer import OptimizerOptions, build_optimizer
from rlsync.megatron.parallel import compute_device, destroy_parallel, freeze_objects, initialize_parallel
from rlsync.megatron.scores import TokenScores
from rlsync.megatron.train import token_scores, train_step
from rlsync.models.memory import CHUNK_TOKENS
from rlsync.transport.collectives import gather_bytes

_ROUNDS = 5
_PRODUCTS = 8


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """10^12 operations a second of a product of square matrices on this device: the best of a few rounds of some in a row."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best_s = float("inf")
    for _ in range(1 + _ROUNDS):
        synchronize(device)
        begin_s = time.perf_counter()
        for _ in range(_PRODUCTS):
            left @ right
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return _PRODUCTS * 2 * size**3 / best_s / 1e12


class _Bench:
    """A model with its optimizer, and the microbatches of a step."""

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec
        initialize_parallel(spec.topology, seed=spec.seed, timeout_s=spec.start_s)
        self._device = compute_device()
        self._matmul = matmul_tflops(self._device, torch.bfloat16)
        self._models = AutoBridge.from_config(spec.config).get_model(
            ddp=DdpOptions(**spec.ddp), bf16=True, spec=spec.layers, overrides=spec.switches, lora=spec.lora
        )
        self._optimizer = build_optimizer(self._models, OptimizerOptions(**spec.optimizer))
        generator = torch.Generator().manual_seed(spec.seed)
        self._microbatches, self._scored = (
            [_microbatch(lengths, spec.config["vocab_size"], generator) for lengths in cuts]
            for cuts in (spec.microbatches, spec.score_microbatches)
        )
        self._num_tokens = sum(sum(lengths) for lengths in spec.microbatches) * spec.topology.dp_size
        self._how: dict[str, Any] = {
            "packing": spec.packing,
            "chunk_tokens": CHUNK_TOKENS if spec.chunk_tokens is None else spec.chunk_tokens,
        }
        self._losses: list[float] = []

    def run(self) -> TrainFound:
        """Every measured step. Collective."""
        held = 0
        train_s: list[float] = []
        score_s: list[float] = []
        for number in range(self._spec.warmup + self._spec.steps):
            if number == self._spec.warmup:
                # As an actor of a run does before its first step.
                freeze_objects()
                held = self._reset_peak()
            for seconds, step in ((train_s, self._train), (score_s, self._score)):
                seconds.append(self._timed(step))
        own = RankFound(device=self._name(), matmul_tflops=self._matmul, held_bytes=held, peak_bytes=self._peak())
        ranks = [msgspec.json.decode(said, type=RankFound) for said in gather_bytes(msgspec.json.encode(own), device=self._device)]
        first, measured = self._spec.warmup, len(self._losses)
        # In this order: once a profiler has been at work, launches take the host longer.
        phases, profiles = (self._phases(), self._profile()) if self._spec.profile else (None, {})
        return TrainFound(
            train_s=train_s[first:],
            score_s=score_s[first:],
            losses=self._losses[first:measured],
            ranks=ranks,
            profiles=profiles,
            phases=phases,
        )

    def _phases(self) -> Phases:
        issued_s = begins_s = 0.0
        config = unwrap(self._models[0]).config
        finalize = config.finalize_model_grads_func

        def finalize_later(*args: Any, **kwargs: Any) -> Any:
            nonlocal issued_s, begins_s
            # What is next looks at the gradients, which waits for the GPU.
            issued_s = time.perf_counter()
            synchronize(self._device)
            begins_s = time.perf_counter()
            return finalize(*args, **kwargs)

        config.finalize_model_grads_func = finalize_later
        self._settle()
        began_s = time.perf_counter()
        self._train()
        synchronize(self._device)
        ended_s = time.perf_counter()
        config.finalize_model_grads_func = finalize
        return Phases(issued_s=issued_s - began_s, passes_s=begins_s - began_s, optimizer_s=ended_s - begins_s)

    def _profile(self) -> dict[str, Profile]:
        """Of rank 0 alone, with whom the others compute."""
        found = {}
        for name, step in (("train", self._train), ("score", self._score)):
            self._settle()
            if dist.get_rank() == 0:
                found[name] = profiled(step)
            else:
                step()
        return found

    def _timed(self, step: Callable[[], None]) -> float:
        self._settle()
        begin_s = time.perf_counter()
        step()
        self._settle()
        return time.perf_counter() - begin_s

    def _settle(self) -> None:
        """All ranks, and what they gave their GPUs to do."""
        synchronize(self._device)
        dist.barrier()

    def _train(self) -> None:
        self._losses.append(train_step(self._models, self._optimizer, self._microbatches, self._loss, **self._how).metrics["loss"])

    def _score(self) -> None:
        token_scores(self._models, self._scored, **self._how)

    def _loss(self, scores: TokenScores, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        return -(scores.log_probs * microbatch["mask"]).sum() / self._num_tokens, {}

    def _name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"

    def _reset_peak(self) -> int:
        if self._device.type != "cuda":
            return self._peak()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self) -> int:
        """Of torch's memory on the GPU since the last reset; on CPU of this process since its start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _microbatch(lengths: tuple[int, ...], vocab_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens, right-padded; each but the first of a sequence is in the loss."""
    tokens = torch.randint(0, vocab_size, (len(lengths), max(lengths)), generator=generator)
    counts, position = torch.tensor(lengths), torch.arange(max(lengths))
    mask = (position >= 1) & (position < counts[:, None])
    return {"tokens": tokens, "lengths": counts, "mask": mask}


def main(path: str) -> None:
    spec = training.read(path)
    found = _Bench(spec).run()
    if dist.get_rank() == 0:
        write_file(spec.outcome_path, msgspec.json.encode(found).decode())
    dist.barrier()
    destroy_parallel()


if __name__ == "__main__":
    main(sys.argv[1])
