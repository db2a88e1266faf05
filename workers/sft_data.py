"""Rows to training examples, and a loader of them that resumes at the exact batch.

Owns the chat template, the loss mask, the length rule and the order of batches over all epochs. Knows neither Ray nor Megatron;
the tokenizer is any fast Hugging Face tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlsync.errors import CheckpointError, ConfigError
from workers.problems import BadSamples, OnBadSample
from workers.row_files import BadRow, Integers, RowFiles
from workers.sft_rows import Conversation, RowForm, conversation

# Rows tried in the place of one that is left out. So many in a row that cannot be used are no accident.
_NUM_SUBSTITUTES = 32
# Substitutes come from this many rows around, so that a Parquet file is not read all over for each.
_NEIGHBOURHOOD = 1024


@dataclass(frozen=True, slots=True)
class SftExample:
    """One row as the model is trained on it, neither padded nor shifted.

    Attributes:
        token_ids: of prompt and answer together; a picture's placeholder stands as often as the model has features for it.
        loss_mask: for each token, whether it is to be predicted. The first one never is.
        pixel_values: (patches, patch size) float32 of all pictures in their order; None without pictures.
        image_grid_thw: (pictures, 3) int64, each picture's patches in time, height and width; None without pictures.
        where: file and row.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    where: str

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are in the loss."""
        return sum(self.loss_mask)


class TooLong(BadRow):
    """A row that has more tokens than an example may have."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that was not used, and why."""

    where: str
    reason: str
    too_long: bool


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a loader process made of one place of a batch: an example, None if there is none, and the rows that were tried before."""

    example: SftExample | None
    left_out: tuple[LeftOut, ...] = ()


class ExampleSource(Protocol):
    """Where examples come from. An item says everything that one example is made of, wherever that is done."""

    num_items: int

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[Any]:
        """The ``num_items`` items of an epoch, in an order that depends on (seed, epoch) only."""
        ...

    def draw(self, item: Any) -> Drawn:
        """The example of an item. Called by loader processes, too."""
        ...

    def fingerprint(self) -> str:
        """Hash of the data."""
        ...


@dataclass(frozen=True, slots=True)
class ExampleForm:
    """How a row becomes an example: the ``data`` keys of the same names.

    Attributes:
        max_length: most tokens of an example, pictures among them.
        train_on_generation_prompt: the template's prompt for a next answer stands behind the last one, and in the loss.
    """

    max_length: int
    apply_chat_template: bool = True
    train_on_generation_prompt: bool = False


class ExampleEncoder:
    """Conversations to examples by the tokenizer of a model folder.

    Raises:
        ConfigError: the form and the tokenizer do not fit together.
    """

    def __init__(self, tokenizer: Any, form: ExampleForm) -> None:
        self._tokenizer, self._form = tokenizer, form
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError("supervised fine-tuning needs a fast tokenizer, which says where in the text a token stands (tokenizer.json)")
        if form.apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "data.apply_chat_template is True, and the tokenizer has no chat template; add chat_template.jinja to its folder, "
                "or set data.apply_chat_template to False"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no eos_token; an answer could not end")

    def __call__(self, found: Conversation, where: str) -> SftExample:
        """The example. Raises BadRow where the template refuses the row or nothing of it would be learned, and TooLong."""
        token_ids, mask = self._rendered(found) if self._form.apply_chat_template else self._plain(found)
        if len(token_ids) > self._form.max_length:
            raise TooLong(f"it has {len(token_ids)} tokens, and an example has at most {self._form.max_length}")
        mask = [False, *mask[1:]]
        if not any(mask):
            raise BadRow("no token of it is in the loss")
        return SftExample(tuple(token_ids), tuple(mask), None, None, where)

    def _plain(self, found: Conversation) -> tuple[list[int], list[bool]]:
        """Prompt and answer without a template, and the end-of-sequence token."""
        prompt, answer = ("".join(part.get("text", "") for part in message.parts) for message in found.messages[-2:])
        has_own = self._tokenizer.bos_token is not None and prompt.startswith(self._tokenizer.bos_token)
        before = list(self._tokenizer(prompt, add_special_tokens=not has_own)["input_ids"])
        after = [*self._tokenizer(answer, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        return before + after, [False] * len(before) + [True] * len(after)

    def _rendered(self, found: Conversation) -> tuple[list[int], list[bool]]:
        text, spans = self._spans(found)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(start >= begin and stop <= end for begin, end in spans) for start, stop in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), mask

    def _spans(self, found: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and where in it stands what is learned."""
        inputs = [message.as_template_input() for message in found.messages]
        text = self._render(inputs, add_generation_prompt=self._form.train_on_generation_prompt)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(found.messages):
            if message.in_loss:
                before = self._render(inputs[:i], add_generation_prompt=True)
                through = self._render(inputs[: i + 1], add_generation_prompt=False)
                if not text.startswith(through) or not through.startswith(before):
                    raise BadRow(f"the chat template renders message {i} otherwise when others follow")
                spans.append((len(before), len(through.rstrip())))
        if self._form.train_on_generation_prompt:
            spans.append((len(self._render(inputs, add_generation_prompt=False)), len(text)))
        return text, spans

    def _render(self, inputs: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            rendered: str = self._tokenizer.apply_chat_template(list(inputs), tokenize=False, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from None
        return rendered


class RowExamples:
    """An example a row. A row that cannot be used has a row nearby in its place, if it is to be skipped.

    Args:
        on_bad_sample, on_too_long: whether such rows are skipped, or end the run.
    """

    def __init__(
        self, files: RowFiles, form: RowForm, encode: ExampleEncoder, *, on_bad_sample: OnBadSample, on_too_long: OnBadSample
    ) -> None:
        self._files, self._form, self._encode = files, form, encode
        self._skips = {False: on_bad_sample == "skip", True: on_too_long == "skip"}
        self.num_items = len(files)

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[Integers]:
        return _RowItems(self._files.order(epoch, shuffle=shuffle, seed=seed), epoch, seed, substitutes=any(self._skips.values()))

    def draw(self, item: Integers) -> Drawn:
        left_out: list[LeftOut] = []
        for row in item:
            where, content = self._files.read(int(row))
            try:
                return Drawn(self._encode(conversation(content, self._form), where), tuple(left_out))
            except BadRow as reason:
                left_out.append(LeftOut(where, str(reason), isinstance(reason, TooLong)))
                if not self._skips[left_out[-1].too_long]:
                    break
        return Drawn(None, tuple(left_out))

    def fingerprint(self) -> str:
        return self._files.fingerprint()


class _RowItems(Sequence[Integers]):
    """For each place of an epoch its row and, where rows may be skipped, those that may take its place."""

    def __init__(self, order: Integers, epoch: int, seed: int, *, substitutes: bool) -> None:
        self._order, self._epoch, self._seed, self._substitutes = order, epoch, seed, substitutes

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: Any) -> Any:
        if not self._substitutes:
            return self._order[place : place + 1]
        near = np.random.Generator(np.random.PCG64((self._seed, self._epoch, place)))
        steps = near.integers(1, max(2, min(_NEIGHBOURHOOD, len(self._order))), _NUM_SUBSTITUTES)
        return self._order[np.concatenate([[place], (place + steps) % len(self._order)])]


class _Drawing(Dataset[Drawn]):
    """A source as torch's loader asks it."""

    def __init__(self, source: ExampleSource) -> None:
        self._source = source

    def __getitem__(self, item: Any) -> Drawn:
        return self._source.draw(item)


class _Share(Sampler[list[Any]]):
    """Items of one replica's share of each global batch over all epochs; a short last batch is dropped. Begins with batch ``first``."""

    def __init__(self, source: ExampleSource, batch_size: int, share: range, *, num_epochs: int, shuffle: bool, seed: int) -> None:
        self._source, self.batch_size, self._share = source, batch_size, share
        self.num_epochs, self.shuffle, self.seed = num_epochs, shuffle, seed
        self.batches_per_epoch = source.num_items // batch_size
        self.first = 0

    def __len__(self) -> int:
        return self.batches_per_epoch * self.num_epochs

    def __iter__(self) -> Iterator[list[Any]]:
        done_epochs, done_batches = divmod(self.first, max(1, self.batches_per_epoch))
        for epoch in range(done_epochs, self.num_epochs):
            items = self._source.items(epoch, shuffle=self.shuffle, seed=self.seed)
            for batch in range(done_batches if epoch == done_epochs else 0, self.batches_per_epoch):
                yield [items[batch * self.batch_size + i] for i in self._share]


def _as_list(batch: list[Drawn]) -> list[Drawn]:
    return batch


class SftLoader:
    """A replica's share of each global batch, over all epochs, with a position that can be saved and restored exactly.

    ``len`` is the number of global batches of the whole run. Iterating gives lists of ``global_batch_size // dp_size`` examples and
    continues after the last one handed out. Batches and position depend neither on ``num_workers`` nor, but for who gets which
    examples, on ``dp_size``; the state of any replica is that of all.

    Args:
        num_workers: processes that read rows and decode pictures ahead of the step; 0: done when a batch is asked for.

    Raises:
        ConfigError: the data is smaller than a batch, or the batch cannot be split; while iterating, a row that cannot be used and is
            not to be skipped, by file and row.
    """

    def __init__(
        self,
        source: ExampleSource,
        global_batch_size: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_epochs: int = 1,
        shuffle: bool = True,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        if global_batch_size % dp_size:
            raise ConfigError(f"actor.global_batch_size ({global_batch_size}) cannot be split over {dp_size} data-parallel ranks")
        size = global_batch_size // dp_size
        share = range(dp_rank * size, (dp_rank + 1) * size)
        self._source = source
        self._order = _Share(source, global_batch_size, share, num_epochs=num_epochs, shuffle=shuffle, seed=seed)
        if len(self._order) == 0:
            raise ConfigError(
                f"Train dataloader is empty! The data makes {source.num_items} examples, fewer than actor.global_batch_size "
                f"({global_batch_size}), over {num_epochs} epochs"
            )
        self._loader = DataLoader(_Drawing(source), batch_sampler=self._order, collate_fn=_as_list, num_workers=num_workers)
        self._handed_out = 0
        self._batches: Iterator[list[Drawn]] | None = None
        self._left_out = {False: BadSamples(), True: BadSamples()}

    @property
    def batches_per_epoch(self) -> int:
        return self._order.batches_per_epoch

    @property
    def num_bad(self) -> int:
        """Rows of this share that were left out so far because they cannot be used."""
        return len(self._left_out[False].found)

    @property
    def num_too_long(self) -> int:
        """Rows of this share that were left out so far because of their length."""
        return len(self._left_out[True].found)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[SftExample]]:
        while self._handed_out < len(self):
            if self._batches is None:
                self._order.first = self._handed_out
                self._batches = iter(self._loader)
            examples = [self._taken(drawn) for drawn in next(self._batches)]
            self._handed_out += 1
            yield examples

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, and what it is a position in; plain containers."""
        return {"order": self._identity(), "handed_out": self._handed_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which ``state_dict`` was taken, without reading what lies before it. More epochs than then, and
        another number of replicas, are allowed.

        Raises:
            CheckpointError: the state belongs to other data, batch size, seed or shuffling.
        """
        saved, present = state["order"], self._identity()
        if saved != present:
            changed = ", ".join(f"{name} {saved.get(name)} -> {present[name]}" for name in present if saved.get(name) != present[name])
            raise CheckpointError(
                f"data position was saved with other settings ({changed}); restore them, or remove data/data.pt of the checkpoint to start "
                "the data from the beginning"
            )
        self._handed_out, self._batches = state["handed_out"], None

    def _taken(self, drawn: Drawn) -> SftExample:
        for row in drawn.left_out:
            self._left_out[row.too_long].add(row.where, row.reason)
        if drawn.example is None:
            last = drawn.left_out[-1]
            tried = f" ({len(drawn.left_out)} rows were tried)" if len(drawn.left_out) > 1 else ""
            key = "data.on_too_long" if last.too_long else "data.on_bad_sample"
            raise ConfigError(f"{last.where}: {last.reason}{tried}. {key}=skip leaves such rows out")
        return drawn.example

    def _identity(self) -> dict[str, int | str]:
        order = self._order
        return {
            "num_examples": self._source.num_items,
            "global_batch_size": order.batch_size,
            "seed": order.seed,
            "shuffle": int(order.shuffle),
            "data": self._source.fingerprint(),
        }
