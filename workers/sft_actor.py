"""One rank of the actor of a run of supervised fine-tuning: its share of the data, the supervised step, and the validation's loss.

The first rank of each data-parallel replica reads the replica's share and gives the microbatches to the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlsync.layout.topology import Topology
from rlsync.megatron.parallel import compute_device, share_in_replica
from rlsync.megatron.train import StepResult, token_scores, train_step
from rlsync.transport.collectives import agreed
from workers.actor import ActorRank
from workers.config import SftConfig
from workers.metrics import part_rates
from workers.model_folder import read_hf_config
from workers.preparation import load_tokenizer
from workers.row_loader import LEFT_OUT, ExampleSource, RowLoader
from workers.samples import PAD_ID, micro_batches_by_tokens, stacked
from workers.sft_data import SftExample
from workers.sft_preparation import example_source, num_val_examples, open_loader, val_examples
from workers.supervised import SupervisedObjective, num_targets

# What a replica passes through the model where others still have examples.
_NOTHING = SftExample((PAD_ID, PAD_ID), (False, False), None, None, "nothing")


class SftRank(ActorRank):
    """Order of calls: ``setup``, ``begin``, ``open_data``; then ``train`` each step, ``validate`` where wanted, and ``sync`` after
    ``connect`` where there are engines."""

    _config: SftConfig

    def __init__(self, config: SftConfig, topology: Topology) -> None:
        super().__init__(config, topology)
        at = topology.coordinates(self._rank)
        self._dp_rank, self._reads = at.dp_rank, at.leads_replica
        self._loader: RowLoader[SftExample] | None = None
        self._batches: Iterator[list[SftExample]] | None = None
        self._held_out: ExampleSource[SftExample] | None = None

    # Data.

    def open_data(self, position: Mapping[str, Any]) -> None:
        """Open the data where ``RowLoader.state_dict`` says. Collective.

        Raises CheckpointError where this rank finds other data than the driver.
        """
        with agreed(device=compute_device()):
            if not self._reads:
                return
            config = self._config
            tokenizer = load_tokenizer(config, read_hf_config(Path(config.model_path), config.model_key))
            self._loader = open_loader(config, tokenizer, dp_rank=self._dp_rank, dp_size=self._topology.dp_size)
            self._loader.load_state_dict(position)
            self._batches = iter(self._loader)
            if config.data.val_data_paths:
                self._held_out = example_source(config, config.data.val_data_paths, tokenizer, substitutes=False)

    def data_state(self) -> Mapping[str, Any] | None:
        """Position in the data, on the ranks that read it; the same on all of these."""
        return None if self._loader is None else self._loader.state_dict()

    # Training.

    def train(self) -> dict[str, float]:
        """One optimizer step on the next global batch. Collective.

        Returns metrics, equal on all ranks but for ``time/data_wait``, the seconds that this rank waited for its share of the data.
        """
        began = time.monotonic()
        examples: list[SftExample] = []
        left_out: Mapping[str, int] = dict.fromkeys(LEFT_OUT, 0)
        with agreed(device=compute_device()):
            if self._batches is not None and self._loader is not None:
                examples = next(self._batches)
                left_out = self._loader.take_left_out()
        waited = time.monotonic() - began
        microbatches = self._microbatches(examples)
        counts = self._summed(num_targets(examples), sum(example.length for example in examples), *(left_out[name] for name in LEFT_OUT))
        num_tokens = int(counts[0])
        per_microbatch = self._config.algorithm.loss_agg_func == "micro-batch-mean"
        objective = SupervisedObjective(num_tokens, len(microbatches) * self._topology.dp_size if per_microbatch else None)
        result = train_step(self._models, self._optimizer, microbatches, objective, scheduler=self._scheduler, **self._passes)
        return {
            **step_metrics(result),
            "train/num_tokens": float(num_tokens),
            "perf/total_num_tokens": counts[1],
            **dict(zip(LEFT_OUT, counts[2:], strict=True)),
            "time/data_wait": waited,
            "time/training": time.monotonic() - began - waited,
        }

    def _microbatches(self, examples: Sequence[SftExample]) -> list[dict[str, torch.Tensor]]:
        """The replica's share of a step as microbatches, equally many on all replicas. Collective."""
        micro = self._config.actor.micro_batch_size
        assert micro is not None, "a rule requires it"
        if self._config.runner.enable_dynamic_batch_size:
            cuts = self._cut_by_tokens(examples)
        else:
            cuts = [list(examples[i : i + micro]) for i in range(0, len(examples), micro)]
        return share_in_replica([stacked(cut) for cut in cuts] if self._reads else None)

    def _cut_by_tokens(self, examples: Sequence[SftExample]) -> list[list[SftExample]]:
        """Cuts of at most ``runner.max_tokens_per_mbs`` positions, as many as the replica that needs most of them has. Collective."""
        most = self._config.runner.max_tokens_per_mbs
        assert most is not None, "load_config derives it"
        budget = self.token_budget(most)
        lengths, count, cuts = [example.length for example in examples], 1, []
        while True:
            with agreed(device=compute_device()):
                if self._reads:
                    cuts = micro_batches_by_tokens(lengths, budget, min_batches=count)
            found = torch.tensor([len(cuts), -len(cuts) if self._reads else -(2**31)], device=compute_device())
            dist.all_reduce(found, dist.ReduceOp.MAX)
            count = int(found[0])
            if -int(found[1]) == count:
                return [[examples[i] for i in cut] for cut in cuts]

    # Validation.

    def validate(self) -> dict[str, float]:
        """Mean loss of the answers' tokens in the examples of the validation, and the share of examples whose tokens in the loss are
        all the likeliest, so that greedy decoding answers as the row does. Collective; equal on all ranks."""
        size, device = self._config.actor.eval_batch_size, compute_device()
        assert size is not None, "load_config derives it"
        count = int(self._summed(0 if self._held_out is None or self._dp_rank else num_val_examples(self._config, self._held_out))[0])
        share = -(-count // self._topology.dp_size)
        mine = range(self._dp_rank * share, min(count, (self._dp_rank + 1) * share))
        loss, num_tokens, num_examples, num_right = 0.0, 0, 0, 0
        for first in range(0, share, size):
            examples: list[SftExample] = []
            with agreed(device=device):
                if self._held_out is not None:
                    examples = list(val_examples(self._config, self._held_out, mine[first : first + size]))
            (batch,) = share_in_replica([stacked(examples or [_NOTHING])] if self._reads else None)
            (scores,) = token_scores(self._models, [batch], **self._passes)
            if self._reads:
                loss -= float((scores.log_probs * batch["mask"]).sum(dtype=torch.float64))
                num_tokens, num_examples = num_tokens + num_targets(examples), num_examples + len(examples)
                num_right += int((scores.likeliest | ~batch["mask"]).all(dim=1)[: len(examples)].sum())
        total, tokens, seen, right = self._summed(loss, num_tokens, num_examples, num_right)
        return {
            "val/loss": total / tokens if tokens else math.nan,
            "val/accuracy": right / seen if seen else math.nan,
            "val/num_tokens": tokens,
            "val/num_examples": seen,
        }

    def _summed(self, *numbers: float) -> list[float]:
        """Sums over the ranks that read data, on every rank. Collective."""
        sums = torch.tensor(numbers if self._reads else [0.0] * len(numbers), dtype=torch.float64, device=compute_device())
        dist.all_reduce(sums)
        return sums.tolist()

    def close(self) -> None:
        """``ActorRank.close``, after the loader's processes."""
        self._batches = self._loader = None
        super().close()


def step_metrics(result: StepResult) -> dict[str, float]:
    """Metrics of a supervised step; nan where a skipped update has no number."""
    return {
        "train/loss": result.metrics["loss"],
        **{f"train/{name}": value for name, value in result.balancing.items()},
        "train/lm_loss": result.metrics["lm_loss"],
        "train/learning_rate": result.learning_rate,
        **{f"train/{name}": rate for name, rate in part_rates(result.learning_rates).items()},
        "train/grad_norm": math.nan if result.grad_norm is None else result.grad_norm,
        "train/loss_scale": result.loss_scale,
        "train/update_success": float(not result.skipped),
    }
