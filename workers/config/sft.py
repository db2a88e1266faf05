"""Sections of the yaml that only an SFT run has, and the whole of it; what runs of every kind have is in ``schema``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.config.fields import SEED, key
from workers.config.schema import CommonConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SftAlgorithmConfig:
    """``algorithm`` of an SFT run."""

    loss_agg_func: Literal["token-mean", "micro-batch-mean"] = key(
        "token-mean",
        "token-mean: mean over the answer tokens of the global batch, however it is cut; micro-batch-mean: mean over the micro-batches of "
        "each one's mean, as RLinf has it",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SftDataConfig:
    """``data`` of an SFT run: examples with prompt and answer."""

    type: Literal["llm", "chat", "vlm", "text"] = key(
        "llm",
        "form of the rows: prompt and answer; a list of messages; a question about pictures, with or without choices; a document of "
        "continued pretraining, which is packed",
    )
    train_data_paths: tuple[str, ...] = key(doc="files and folders with the training rows")
    val_data_paths: tuple[str, ...] = key((), "files and folders with the rows of the validation; `eval_data_paths` is taken too")
    val_data_size: int | None = key(None, "use only the first this many rows of the validation; null: all", min=1)
    prompt_key: str = key("prompt", "field with the prompt, the question, the messages or the text")
    answer_key: str = key("response", "field with the answer")
    choice_key: str | None = key(None, "vlm: field with the choices, of which the answer names one; null: none")
    image_keys: tuple[str, ...] = key((), "fields with pictures")
    min_pixels: int | None = key(None, "smaller pictures are enlarged to this; null: as the model folder's image processor says", min=1)
    max_pixels: int | None = key(None, "larger pictures are reduced to this; null: as the model folder's image processor says", min=1)
    system_prompt: str | None = key(None, "system message put before rows that have none")
    apply_chat_template: bool = key(True, "render rows with the tokenizer's chat template; false: prompt, answer and end-of-sequence token")
    train_on_generation_prompt: bool = key(
        False, "the template's prompt for a next answer stands behind the last one and in the loss, as RLinf has it"
    )
    on_bad_sample: Literal["error", "skip"] = key(
        "error", "rows that cannot be used; error: name file and row and end, skip: another row nearby takes the place"
    )
    on_too_long: Literal["error", "skip"] = key("error", "the same for rows of more than runner.seq_length tokens")
    num_workers: int = key(0, "loader processes of a data-parallel rank; 0: in the rank", min=0)
    shuffle: bool = key(True, "a new order each epoch, derived from seed")
    seed: int = key(1234, "seed of that order", bounds=SEED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """``validation`` of an SFT run, every ``runner.val_check_interval`` steps on ``data.val_data_paths``; the loss needs no key."""

    generate: bool = key(
        False, "engines answer the prompts greedily too, and answers are compared with the references; the placement has `rollout` then"
    )
    max_new_tokens: int = key(64, "with generate: longest answer in tokens", min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(CommonConfig):
    """A whole run of supervised fine-tuning, validated."""

    algorithm: SftAlgorithmConfig = key(SftAlgorithmConfig(), "")
    data: SftDataConfig = key(doc="")
    validation: ValidationConfig = key(ValidationConfig(), "")

    @property
    def model_key(self) -> str:
        return "actor.model.model_path"

    @property
    def has_engines(self) -> bool:
        return self.validation.generate

    @property
    def has_reference(self) -> bool:
        return False

    @property
    def data_paths(self) -> tuple[str, ...]:
        return self.data.train_data_paths + self.data.val_data_paths
