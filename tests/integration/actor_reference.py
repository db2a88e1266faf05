"""GRPO as anyone would write it: HF's model, the whole mini-batch at once, torch's AdamW. What ``GrpoRank`` must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.models import VOCAB_SIZE
from tests.vision_models import IMAGE, VIDEO, VISION_START, row
from workers.algorithms import aggregation_denominator, correct_importance, policy_loss
from workers.config import RunConfig, load_config
from workers.samples import Sample, collate, mini_batches, with_advantages

GROUP_SIZE, NUM_PROMPTS, TEMPERATURE = 4, 4, 0.7
PICTURES = ("pixel_values", "image_grid_thw")
# A large epsilon keeps Adam from blowing up the rounding differences of gradients near zero.
OPTIM = {"lr": 2e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}


def run_config(folder: str, sections: Mapping[str, Mapping[str, Any]] | None = None) -> RunConfig:
    """A configuration around the model in ``folder``; ``sections`` are dotted section names to keys that differ."""
    values: dict[str, Any] = {
        "cluster": {"component_placement": {"actor": "0", "rollout,reward": "1"}},
        "runner": {"seq_length": 24, "experiment_name": "actor", "output_dir": str(Path(folder).parent)},
        "algorithm": {
            "group_size": GROUP_SIZE, "n_minibatches": 2, "training_batch_size_per_gpu": 2, "logprob_forward_micro_batch_size": 3,
            "clip_ratio_high": 0.28, "sampling_params": {"temperature": TEMPERATURE},
        },
        "rollout": {"model": {"model_path": folder}, "return_logprobs": True},
        "data": {"train_data_paths": ["read by nobody"], "max_prompt_length": 8, "rollout_batch_size": NUM_PROMPTS},
        "actor": {"model": {"precision": "fp32"}, "optim": dict(OPTIM), "megatron": {"mbridge": True}},
    }  # fmt: skip
    for section, keys in (sections or {}).items():
        into = values
        for name in section.split("."):
            into = into.setdefault(name, {})
        into.update(keys)
    return load_config(values)


# Parts of prompts, as ``tests.vision_models.row`` takes them: one picture, none, two of different sizes, one that is not square.
SEEN: tuple[tuple[int | tuple[int, int], ...], ...] = ((2, (56, 56), 2), (3,), (1, (84, 56), 2, (56, 56), 1), ((56, 112), 3))


def make_samples(folder: str) -> list[Sample]:
    """Sixteen samples of four prompts, which are ``SEEN`` where the model takes pictures; the engine's log-probabilities are the model's
    with a little noise."""
    generator, samples, config = torch.Generator().manual_seed(7), [], AutoConfig.from_pretrained(folder)
    sees = hasattr(config, "vision_config")

    def tokens(low: int, high: int) -> tuple[int, ...]:
        # HF's embedding takes no gradient for the padding token 0, Megatron's does: keep it out.
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(1, VISION_START if sees else VOCAB_SIZE, (length,), generator=generator).tolist())

    for number in range(NUM_PROMPTS):
        seen = row(config, SEEN[number], seed=number) if sees else {}
        prompt = tuple(seen["tokens"].tolist()) if sees else tokens(3, 8)
        pictures = {name: seen.get(name) for name in ("pixel_values", "image_grid_thw")}
        for _ in range(GROUP_SIZE):
            reward = float(torch.randint(0, 2, (1,), generator=generator))
            samples.append(Sample(prompt, tokens(1, 14), (), True, 0, reward=reward, **pictures))
    scores, _ = _scores(_loaded(folder), collate(samples))
    noisy = scores.detach() + 0.1 * torch.randn(scores.shape, generator=generator)
    with_scores = [
        replace(sample, engine_logprobs=tuple(noisy[i, len(sample.prompt_ids) : sample.length].tolist()))
        for i, sample in enumerate(samples)
    ]
    return with_advantages(with_scores, GROUP_SIZE, normalize=True)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    torch.save([{name: getattr(sample, name) for name in Sample.__dataclass_fields__} for sample in samples], path)


def read_samples(path: str) -> list[Sample]:
    return [Sample(**fields) for fields in torch.load(path)]


def _loaded(folder: str, **options: Any) -> torch.nn.Module:
    kind = AutoModelForImageTextToText if hasattr(AutoConfig.from_pretrained(folder), "vision_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, **options)


class Reference:
    """The model, its frozen first self, and the optimizer."""

    def __init__(self, config: RunConfig) -> None:
        from workers.grpo_actor import policy_loss_options

        self._config, self._options = config, policy_loss_options(config.algorithm)
        self.model, self._first = (_loaded(config.rollout.model.model_path, attn_implementation="eager") for _ in range(2))
        self.model.train()
        optim = config.actor.optim
        decayed, plain = ([p for p in self.model.parameters() if (p.dim() > 1) is many] for many in (True, False))
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr, eps=optim.adam_eps, betas=(optim.adam_beta1, optim.adam_beta2),
        )  # fmt: skip

    def step(self, samples: Sequence[Sample], shuffle_seed: int | None) -> list[dict[str, float]]:
        """All updates of a step; metrics of each as ``GrpoRank.train`` names them."""
        algorithm = self._config.algorithm
        whole = collate(samples)
        with torch.no_grad():
            recomputed, _ = _scores(self.model, whole)
            whole["reference_logprobs"], _ = _scores(self._first, whole)
        whole["old_logprobs"] = recomputed if algorithm.recompute_logprobs else whole["engine_logprobs"]
        if algorithm.importance_sampling_fix:
            whole["advantages"] = correct_importance(
                whole["advantages"], recomputed, whole["engine_logprobs"], algorithm.importance_sampling_clip
            )
        batches = mini_batches(len(samples), algorithm.n_minibatches, shuffle=shuffle_seed is not None, seed=shuffle_seed or 0)
        # Of pictures there are not as many as rows.
        rows = {name: tensor for name, tensor in whole.items() if name not in PICTURES}
        return [
            self._update({**collate([samples[i] for i in batch]), **{name: tensor[batch] for name, tensor in rows.items()}})
            for batch in batches
        ]

    def _update(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        log_probs, entropy = _scores(self.model, batch)
        wants_entropy = self._options.entropy_bonus != 0 or self._config.algorithm.calculate_entropy
        loss = policy_loss(
            log_probs, batch["old_logprobs"], batch["advantages"], batch["mask"], self._options,
            reference_logprobs=batch["reference_logprobs"] if self._options.kl_beta != 0 else None,
            entropy=entropy if wants_entropy else None,
        )  # fmt: skip
        self._adam.zero_grad()
        (loss.numerator / aggregation_denominator(batch["mask"], self._options.loss_agg_func)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.actor.optim.clip_grad)
        self._adam.step()
        return {**{f"actor/{name}": value for name, value in loss.sums.means().items()}, "actor/grad_norm": norm.item()}


def _scores(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at each token, zero at the first."""
    tokens = batch["tokens"]
    pictures: dict[str, Tensor] = {name: batch[name] for name in PICTURES if name in batch}
    if pictures:
        pictures["mm_token_type_ids"] = (tokens == IMAGE).long()
    logits = model(tokens, **pictures).logits.float()
    if hasattr(model.config, "vision_config"):
        # As engines draw: what stands for pictures has no probability.
        logits[..., [IMAGE, VIDEO]] = -1e9
    distribution = (logits / TEMPERATURE).log_softmax(dim=-1)[:, :-1]
    log_probs = distribution.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(distribution.exp() * distribution).sum(dim=-1)
    return tuple(torch.nn.functional.pad(values, (1, 0)) for values in (log_probs, entropy))
