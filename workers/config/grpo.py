"""Sections of the yaml that only a GRPO run has, and the whole of it; what runs of every kind have is in ``schema``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.config.fields import ANY_NUMBER, SEED, key
from workers.config.schema import CommonConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """``algorithm.sampling_params``: how responses are drawn."""

    do_sample: bool = key(True, "false: greedy")
    temperature: float = key(1.0, "softmax temperature, also applied when log-probabilities are recomputed", min=0)
    top_k: int = key(1000000, "sample from this many likeliest tokens; at or above the vocabulary: all", min=-1)
    top_p: float = key(1.0, "sample from the smallest set of tokens with this probability mass", above=0, max=1)
    repetition_penalty: float = key(1.0, "vLLM's penalty of tokens that occurred before; 1.0: none", above=0)
    max_new_tokens: int | None = key(None, "longest response in tokens; null: seq_length - max_prompt_length", min=1)
    min_new_tokens: int = key(0, "no end-of-sequence before this many tokens", min=0)
    seeded: bool = key(
        True,
        "draw each prompt's responses from a seed of its own, made of actor.seed, step and prompt, so that a resumed run draws what "
        "the uninterrupted one would; false: from the engine's one stream, which is faster with many running requests",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """``algorithm``: GRPO."""

    adv_type: Literal["grpo"] = key("grpo", "advantage estimator")
    group_size: int = key(8, "responses per prompt; at least 2", above=1)
    n_minibatches: int = key(1, "optimizer updates per step", min=1)
    training_batch_size_per_gpu: int = key(1, "samples in a training micro-batch of one data-parallel rank", min=1)
    logprob_forward_micro_batch_size: int = key(1, "samples in a micro-batch when log-probabilities are recomputed", min=1)
    logprob_forward_max_tokens: int | None = key(
        None,
        "token budget of a micro-batch when log-probabilities are recomputed, padding included, in place of "
        "logprob_forward_micro_batch_size and runner.max_tokens_per_mbs; passes without gradients keep no activations, and are fastest "
        "with many times the tokens of a training micro-batch; at least runner.seq_length; "
        "null: off",
        min=1,
    )
    recompute_logprobs: bool = key(True, "the actor computes the old log-probabilities; false: the engine's are used")
    early_scoring_prompts: int = key(
        0,
        "the actor recomputes log-probabilities of so many consecutive prompts as soon as all responses to them have ended, while engines "
        "generate others; 0: of all prompts after the rollout",
        min=0,
    )
    shuffle_rollout: bool = key(False, "shuffle the samples of a step over the mini-batches, seeded by actor.seed")
    loss_type: Literal["actor"] = key("actor", "the clipped policy loss")
    loss_agg_func: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = key(
        "token-mean", "how token losses become one number"
    )
    kl_beta: float = key(0.0, "weight of the KL term to the reference (the initial weights); 0 keeps no reference", min=0)
    kl_penalty_type: Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"] = key("low_var_kl", "KL estimator")
    ratio_clip_eps: float = key(0.2, "clip range of the ratio where clip_ratio_low / high are null", min=0)
    clip_ratio_low: float | None = key(None, "clip at 1 - this", min=0, max=1)
    clip_ratio_high: float | None = key(None, "clip at 1 + this", min=0)
    clip_ratio_c: float | None = key(None, "dual clip for negative advantages; greater than 1, null: off", above=1.0)
    clip_log_ratio_min: float | None = key(None, "clamp the log ratio from below; null: off", max=0)
    clip_log_ratio_max: float | None = key(None, "clamp the log ratio from above; null: off", min=0)
    entropy_bonus: float = key(0.0, "weight of the entropy subtracted from the loss", bounds=ANY_NUMBER)
    calculate_entropy: bool = key(False, "report the entropy even when entropy_bonus is 0")
    normalize_advantages: bool = key(True, "whiten the advantages over all valid tokens of the step")
    early_stop_imp_ratio: float | None = key(None, "a micro-batch whose mean ratio exceeds this adds no gradient; null: off", above=0)
    importance_sampling_fix: bool | None = key(
        None,
        "multiply advantages by the clamped ratio of recomputed to engine probability; null: where runner.async_steps is 1 and "
        "log-probabilities are recomputed",
    )
    importance_sampling_clip: float = key(10.0, "upper clamp of that ratio", above=0)
    sampling_params: SamplingConfig = key(SamplingConfig(), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """``data``: prompts and reference answers."""

    type: Literal["math", "reasoning", "vlm", "vision_language"] = key(
        "math",
        "form of the rows: math and reasoning: a text and its answer; vlm and vision_language: a question about pictures, with or without "
        "choices, for a vision-language model",
    )
    train_data_paths: tuple[str, ...] = key(doc="JSONL / JSON files with the training problems; vlm: also Parquet files, and folders")
    val_data_paths: tuple[str, ...] = key(
        (), "files of the same form with the validation problems: one greedy response to each, by runner.val_check_interval"
    )
    prompt_key: str = key("prompt", "field with the prompt: a string, or a message list; GSM8K: question")
    answer_key: str = key("solutions", "field with the reference answer(s): string or list; GSM8K: answer (the part after ####)")
    choice_key: str | None = key(None, "vlm: field with the choices, of which the answer names one; null: none")
    image_keys: tuple[str, ...] = key((), "vlm: fields with pictures")
    min_pixels: int | None = key(None, "vlm: smaller pictures are enlarged to this; null: what the model folder's processor says", min=1)
    max_pixels: int | None = key(None, "vlm: larger pictures are reduced to this; null: what the model folder's processor says", min=1)
    on_bad_sample: Literal["error", "skip"] = key(
        "error",
        "rows whose prompt or reference answer cannot be used; error: name them and end, skip: leave them out and say how many; vlm: "
        "another row nearby takes the place",
    )
    max_prompt_length: int = key(1024, "longest prompt in tokens, those of its pictures included", min=1)
    filter_prompt_by_length: bool = key(
        True, "drop longer prompts (vlm: another row nearby takes the place); false: keep their last max_prompt_length tokens"
    )
    apply_chat_template: bool = key(False, "render the prompt with the tokenizer's chat template")
    system_prompt: str | None = key(None, "system message put before a string prompt when apply_chat_template")
    prompt_suffix: str = key("", "text appended to a string prompt, e.g. an instruction to box the answer")
    rollout_batch_size: int = key(doc="prompts per step over all ranks", min=1)
    num_workers: int = key(0, "loader processes; 0: in the driver", min=0)
    shuffle: bool = key(True, "a new order each epoch, derived from seed")
    seed: int = key(1234, "seed of that order", bounds=SEED)
    data_size: int | None = key(None, "use only the first this many problems; null: all", min=1)
    val_data_size: int | None = key(None, "use only the first this many validation problems; null: all", min=1)

    @property
    def has_pictures(self) -> bool:
        """Whether rows are questions about pictures."""
        return self.type in ("vlm", "vision_language")


BUILT_IN_REWARDS = ("math", "exact")
REWARD_FUNCTION = r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """``reward``: the verifier."""

    reward_type: str = key(
        "math",
        "math: the answer equals a reference by value; exact: the text equals one; `PATH.py:function`: a function of yours, see "
        "examples/reasoning/README.md",
    )
    reward_scale: float = key(1.0, "factor of every reward", above=0)
    reward_min_val: float = key(
        -1.0, "reward of a wrong answer before scaling; with a function, of responses that it took too long for", bounds=ANY_NUMBER
    )
    reward_max_val: float = key(1.0, "reward of a correct answer before scaling; not used with a function", bounds=ANY_NUMBER)
    num_processes: int = key(2, "processes that judge responses; not used with exact", min=1)
    timeout_s: float = key(
        10.0,
        "a response whose check takes longer, in processor time, counts as wrong and its process is replaced; with a function, the "
        "responses to a prompt, by the clock",
        above=0,
    )

    @property
    def takes_metadata(self) -> bool:
        """Whether a function of the user's is given all fields of a row."""
        return self.reward_type not in BUILT_IN_REWARDS


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartConfig:
    """``warm_start``: supervised steps through the actor before GRPO; absent: none."""

    data_paths: tuple[str, ...] = key(doc="JSONL with `prompt` and `response`; with data.type vlm rows of that form")
    num_steps: int = key(doc="optimizer steps", min=1)
    batch_size: int = key(64, "examples per step over all ranks", min=1)
    lr: float = key(1e-3, "learning rate", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(CommonConfig):
    """A whole GRPO run, validated. ``load_config`` makes it; components receive the parts they need as plain arguments."""

    algorithm: AlgorithmConfig = key(AlgorithmConfig(), "")
    data: DataConfig = key(doc="")
    reward: RewardConfig = key(RewardConfig(), "")
    warm_start: WarmStartConfig | None = key(None, "")

    @property
    def model_key(self) -> str:
        return "rollout.model.model_path"

    @property
    def has_engines(self) -> bool:
        return True

    @property
    def has_reference(self) -> bool:
        return self.algorithm.kl_beta != 0

    @property
    def data_paths(self) -> tuple[str, ...]:
        return self.data.train_data_paths + self.data.val_data_paths + (() if self.warm_start is None else self.warm_start.data_paths)
