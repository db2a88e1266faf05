"""Prompts, and how text problems become some, with a loader that resumes at the exact batch.

Owns the chat template of text problems, the prompt-length rule and the order of batches over all epochs. Knows neither Ray nor the
model; the tokenizer is any Hugging Face tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlsync.engine.handles import PicturePrompt
from rlsync.engine.handles import Prompt as EnginePrompt
from rlsync.errors import ConfigError
from workers.chat_template import render
from workers.model_folder import picture_token, unknown_token
from workers.problems import BadSamples, Problem
from workers.row_files import BadRow
from workers.row_loader import check_position


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem ready for generation.

    Attributes:
        index: counts the text problems that passed the length rule; of a question about pictures the row in a validation, else -1.
        token_ids: as the actor takes them: a picture's placeholder stands as often as it has features of the picture.
        where: file and line.
        engine_ids: as an engine takes them, each picture's placeholder once; None without pictures, where they are ``token_ids``.
        images: RGB pictures in the order of their placeholders.
        pixel_values, image_grid_thw: as of a ``TokenRow``, for the actor; None without pictures, and where only engines are asked.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    answers: tuple[str, ...]
    where: str = field(default="a problem", compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    engine_ids: tuple[int, ...] | None = None
    images: tuple[Image, ...] = ()
    pixel_values: Tensor | None = field(default=None, compare=False, repr=False)
    image_grid_thw: Tensor | None = field(default=None, compare=False, repr=False)

    def for_engine(self) -> EnginePrompt:
        """The prompt as engines take it."""
        return self.token_ids if self.engine_ids is None else PicturePrompt(self.engine_ids, self.images)


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer used here."""

    bos_token: str | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a problem becomes tokens: the ``data`` keys of the same names."""

    max_prompt_length: int
    filter_prompt_by_length: bool = True
    apply_chat_template: bool = False
    system_prompt: str | None = None
    prompt_suffix: str = ""


class PromptDataset(Dataset[Prompt]):
    """Tokenised problems. ``num_too_long`` of them were dropped, or cut, because of their length.

    A problem that the chat template refuses, or that has no tokens or ``picture_tokens``, is added to ``bad``; without, it is an error.
    ``vocab_size``: of the model, which has no other tokens; None: unknown. ``picture_tokens``: of the model, which no text may have.
    Raises ConfigError where the form, the tokenizer and the model do not fit together.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        form: PromptForm,
        bad: BadSamples | None = None,
        *,
        vocab_size: int | None = None,
        picture_tokens: frozenset[int] = frozenset(),
    ) -> None:
        taken = BadSamples() if bad is None else bad
        found = tokenized(problems, tokenizer, form, taken, vocab_size=vocab_size, picture_tokens=picture_tokens)
        if bad is None:
            taken.settle("error")
        limit = form.max_prompt_length
        self.num_too_long = sum(len(row) > limit for _, _, row in found)
        self._num_prompts, self._form = len(found), form
        kept = [one for one in found if len(one[2]) <= limit or not form.filter_prompt_by_length]
        self._prompts = tuple(
            Prompt(index, text, tuple(row[-limit:]), problem.answers, problem.where, problem.metadata)
            for index, (problem, text, row) in enumerate(kept)
        )

    def notes(self, key: str) -> tuple[str, ...]:
        """What a user should know of the prompts that are too long; ``key`` names their files."""
        is_cut = not self._form.filter_prompt_by_length
        return too_long_notes(key, self.num_too_long, self._num_prompts, self._form.max_prompt_length, is_cut=is_cut)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def fingerprint(self) -> str:
        """Hash of all prompts' tokens, answers and metadata in their order, wherever the files lie."""
        content = hashlib.blake2b(digest_size=16)
        for prompt in self._prompts:
            content.update(repr((prompt.token_ids, prompt.answers, *([prompt.metadata] if prompt.metadata else []))).encode())
        return content.hexdigest()


def tokenized(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    form: PromptForm,
    bad: BadSamples,
    *,
    vocab_size: int | None,
    picture_tokens: frozenset[int] = frozenset(),
) -> list[tuple[Problem, str, list[int]]]:
    """Problems with their prompts as text and as tokens, of whatever length. Those that the chat template refuses, or that have no
    tokens or ``picture_tokens``, go to ``bad``. Raises ConfigError where form, tokenizer and model do not fit together."""
    if form.apply_chat_template and getattr(tokenizer, "chat_template", "") is None:
        raise ConfigError(
            "data.apply_chat_template is True, and the tokenizer has no chat template; add chat_template.jinja to its folder, "
            "or set data.apply_chat_template to False"
        )
    rendered = [(problem, text) for problem in problems if (text := _render(problem, tokenizer, form, bad)) is not None]
    ids = _tokenize([text for _, text in rendered], tokenizer, chat=form.apply_chat_template)
    if rendered and not any(ids):
        raise ConfigError("the tokenizer makes no token of any prompt; its files are incomplete, or those of another model")
    for (problem, text), row in zip(rendered, ids, strict=True):
        if (reason := unknown_token(row, tokenizer, vocab_size)) is not None:
            raise ConfigError(f"{problem.where}: {reason}")
        if not row:
            bad.add(problem.where, f"the prompt {text[:40]!r} has no tokens")
        elif (reason := picture_token(row, tokenizer, picture_tokens)) is not None:
            bad.add(problem.where, reason)
    return [(problem, text, row) for (problem, text), row in zip(rendered, ids, strict=True) if row and picture_tokens.isdisjoint(row)]


def too_long_notes(key: str, num_too_long: int, num_prompts: int, most: int, *, is_cut: bool = False) -> tuple[str, ...]:
    """What a user should know of so many prompts of more than ``most`` tokens, in the files that ``key`` names; nothing of none."""
    if not num_too_long:
        return ()
    become = "are cut to their last tokens" if is_cut else "are left out"
    return (f"{num_too_long} of {num_prompts} prompts of {key} are longer than data.max_prompt_length ({most}) and {become}",)


def chat_messages(problem: Problem, form: PromptForm) -> list[dict[str, str]]:
    """The messages that a chat template renders to this prompt."""
    if not isinstance(problem.prompt, str):
        return [dict(message) for message in problem.prompt]
    system = [] if form.system_prompt is None else [{"role": "system", "content": form.system_prompt}]
    return [*system, {"role": "user", "content": problem.prompt + form.prompt_suffix}]


def _render(problem: Problem, tokenizer: Tokenizer, form: PromptForm, bad: BadSamples) -> str | None:
    if not form.apply_chat_template:
        if not isinstance(problem.prompt, str):
            raise ConfigError(f"{problem.where}: a prompt is a message list: set data.apply_chat_template=True")
        return problem.prompt + form.prompt_suffix
    try:
        return render(tokenizer, chat_messages(problem, form), add_generation_prompt=True)
    except BadRow as reason:
        bad.add(problem.where, str(reason))
        return None


def _tokenize(texts: list[str], tokenizer: Tokenizer, *, chat: bool) -> list[list[int]]:
    """Token ids without doubled special tokens: a chat template, or a prompt that opens with bos, brings its own."""
    has_own = [chat or (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)) for text in texts]
    rows: list[list[int]] = [[] for _ in texts]
    for own in (True, False):
        chosen = [i for i, flag in enumerate(has_own) if flag is own]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=not own)["input_ids"]
            for i, row in zip(chosen, encoded, strict=True):
                rows[i] = list(row)
    return rows


class EpochBatches(Sampler[list[int]]):
    """Index batches of all epochs in one sequence. The order of epoch e depends on (seed, e) only; a short last batch is dropped.

    Iterating begins with batch ``first`` of them.
    """

    def __init__(self, num_items: int, batch_size: int, *, num_epochs: int, shuffle: bool, seed: int) -> None:
        self.num_items, self.batch_size, self.num_epochs, self.shuffle, self.seed = num_items, batch_size, num_epochs, shuffle, seed
        self.batches_per_epoch = num_items // batch_size
        self.first = 0

    def __len__(self) -> int:
        return self.batches_per_epoch * self.num_epochs

    def __iter__(self) -> Iterator[list[int]]:
        done_epochs, done_batches = divmod(self.first, max(1, self.batches_per_epoch))
        for epoch in range(done_epochs, self.num_epochs):
            order = self._order(epoch)
            for batch in range(done_batches if epoch == done_epochs else 0, self.batches_per_epoch):
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_items))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.num_items, generator=generator).tolist()


def _as_list(batch: list[Prompt]) -> list[Prompt]:
    return batch


class PromptLoader:
    """Batches of prompts over all epochs, with a position that can be saved and restored exactly.

    ``len`` is the number of batches of the whole run. Iterating continues after the last batch handed out.
    """

    def __init__(
        self, dataset: PromptDataset, batch_size: int, *, num_epochs: int = 1, shuffle: bool = True, seed: int = 1234, num_workers: int = 0
    ) -> None:
        self._order = EpochBatches(len(dataset), batch_size, num_epochs=num_epochs, shuffle=shuffle, seed=seed)
        if len(self._order) == 0:
            raise ConfigError(
                f"Train dataloader is empty! {len(dataset)} problems remain ({dataset.num_too_long} were longer than "
                f"data.max_prompt_length), fewer than data.rollout_batch_size ({batch_size}), over {num_epochs} epochs"
            )
        # The position is the number of batches, whoever loads them: a StatefulDataLoader's is bound to ``num_workers``.
        self._loader = DataLoader(dataset, batch_sampler=self._order, collate_fn=_as_list, num_workers=num_workers)
        self._fingerprint = dataset.fingerprint()
        self._handed_out = 0
        self._batches: Iterator[list[Prompt]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        return self._order.batches_per_epoch

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[Prompt]]:
        while self._handed_out < len(self):
            if self._batches is None:
                self._order.first = self._handed_out
                self._batches = iter(self._loader)
            batch = next(self._batches)
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, and what it is a position in; plain containers."""
        return {"order": self._identity(), "handed_out": self._handed_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which ``state_dict`` was taken. More epochs than then are allowed.

        Raises:
            CheckpointError: the state belongs to other data, batch size, seed or shuffling.
        """
        check_position(state["order"], self._identity())
        self._handed_out, self._batches = state["handed_out"], None

    def _identity(self) -> dict[str, int | str]:
        order = self._order
        return {
            "num_problems": order.num_items,
            "rollout_batch_size": order.batch_size,
            "seed": order.seed,
            "shuffle": int(order.shuffle),
            "problems": self._fingerprint,
        }
