"""Rows to training examples, and a loader of what rows become that resumes at the exact batch.

Owns the chat template, the loss mask, the length rule and the order of batches over all epochs. Knows neither Ray nor Megatron;
the tokenizer is any fast Hugging Face tokenizer. Prompts of GRPO about pictures come through the same loader.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from jinja2 import TemplateError
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.utils.chat_template_utils import render_jinja_template

from rlsync.errors import CheckpointError, ConfigError
from workers.pictures import Patches, PictureProcessor, open_picture
from workers.problems import BadSamples, OnBadSample
from workers.row_files import BadRow, Integers, RowFiles
from workers.sft_rows import Conversation, RowForm, conversation

# Rows tried in the place of one that is left out. So many in a row that cannot be used are no accident.
_NUM_SUBSTITUTES = 32
# Substitutes come from this many rows around, so that a Parquet file is not read all over for each.
_NEIGHBOURHOOD = 1024
# Examples that a loader process hands over at once: each time costs a millisecond, and more of large pictures would fill its memory.
_HANDED_OVER = 16
_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")

# What a row becomes.
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


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


@dataclass(frozen=True, slots=True)
class SftQuestion:
    """One row as an engine is asked it.

    Attributes:
        prompt_ids: tokens up to the answer; a picture's placeholder stands once.
        images: RGB pictures in the order of their placeholders.
        question: text of the last turn before the answer.
        answer: what is expected.
        where: file and row.
    """

    prompt_ids: tuple[int, ...]
    images: tuple[Image, ...]
    question: str
    answer: str
    where: str


class TooLong(BadRow):
    """A row that has more tokens than an example may have."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that was not used, and why."""

    where: str
    reason: str
    too_long: bool


@dataclass(frozen=True, slots=True)
class Drawn(Generic[T_co]):
    """What a loader process made of one place of a batch: an example, None if there is none, and the rows that were tried before."""

    example: T_co | None
    left_out: tuple[LeftOut, ...] = ()


class ExampleSource(Protocol[T_co]):
    """Where examples come from. An item says everything that one example is made of, wherever that is done.

    Attributes:
        num_items: in an epoch.
        notes: what the user should know about the data.
    """

    num_items: int
    notes: tuple[str, ...]

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[Any]:
        """The ``num_items`` items of an epoch, in an order that depends on (seed, epoch) only."""
        ...

    def draw(self, item: Any) -> Drawn[T_co]:
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
    """Conversations to examples by the tokenizer and, for a vision-language model, the image processor of a model folder.

    What is learned of a conversation: for each turn of the assistant that is, all that follows the template's prompt for it, up to and
    with what ends the turn (not the white space after it). A template with ``{% generation %}`` marks says it itself.

    Raises:
        ConfigError: the form and the tokenizer do not fit together.
    """

    def __init__(self, tokenizer: Any, form: ExampleForm, pictures: PictureProcessor | None = None) -> None:
        self._tokenizer, self._form, self._pictures = tokenizer, form, pictures
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError("supervised fine-tuning needs a fast tokenizer, which says where in the text a token stands (tokenizer.json)")
        template = getattr(tokenizer, "chat_template", None)
        if form.apply_chat_template and template is None:
            raise ConfigError(
                "data.apply_chat_template is True, and the tokenizer has no chat template; add chat_template.jinja to its folder, "
                "or set data.apply_chat_template to False"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no eos_token; an answer could not end")
        self._has_marks = isinstance(template, str) and _GENERATION_MARK.search(template) is not None
        self._turn_end = self._find_turn_end() if form.apply_chat_template else ""

    def __call__(self, found: Conversation, where: str, folder: Path) -> SftExample:
        """The example of a conversation.

        Args:
            where: file and row.
            folder: from which relative paths of pictures are meant.

        Raises:
            BadRow: the template refuses the conversation, a picture cannot be read, or nothing would be learned.
            TooLong: it has more tokens than ``max_length``.
        """
        token_ids, mask = self._rendered(found) if self._form.apply_chat_template else self._plain(found)
        patches = self._patches(found, folder)
        if patches is not None or self._pictures is not None:
            token_ids, mask = self._with_features(token_ids, mask, () if patches is None else patches.num_features)
        if len(token_ids) > self._form.max_length:
            raise TooLong(f"it has {len(token_ids)} tokens, and an example has at most {self._form.max_length}")
        mask = [False, *mask[1:]]
        if not any(mask):
            raise BadRow("no token of it is in the loss")
        pixels, grid = (None, None) if patches is None else (patches.pixel_values, patches.image_grid_thw)
        return SftExample(tuple(token_ids), tuple(mask), pixels, grid, where)

    def question(self, found: Conversation, where: str, folder: Path) -> SftQuestion:
        """The conversation up to the last turn that is learned, and that turn as the answer. Raises BadRow."""
        last = max(i for i, message in enumerate(found.messages) if message.in_loss)
        if self._form.apply_chat_template:
            text = self._render([message.as_template_input() for message in found.messages[:last]], add_generation_prompt=True)
            prompt_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            token_ids, mask = self._plain(found)
            prompt_ids = token_ids[: mask.index(True)]
        images = tuple(open_picture(image, folder) for image in found.images)
        asked = found.messages[last - 1].text if last else ""
        return SftQuestion(tuple(prompt_ids), images, asked, found.answer, where)

    def _patches(self, found: Conversation, folder: Path) -> Patches | None:
        if not found.images:
            return None
        if self._pictures is None:
            raise BadRow(f"it has {len(found.images)} pictures, and the model takes none")
        return self._pictures([open_picture(reference, folder) for reference in found.images])

    def _with_features(self, token_ids: list[int], mask: list[bool], counts: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Each picture's placeholder as often as the tower makes features of the picture."""
        assert self._pictures is not None
        repeats = self._pictures.repeats(token_ids, counts)
        spread = [(token, is_target) for token, is_target, n in zip(token_ids, mask, repeats, strict=True) for _ in range(n)]
        return [token for token, _ in spread], [is_target for _, is_target in spread]

    def _plain(self, found: Conversation) -> tuple[list[int], list[bool]]:
        """Prompt and answer without a template, and the end-of-sequence token."""
        if len(found.messages) != 2 or found.images:
            raise BadRow("it has pictures, or more than a prompt and an answer; set data.apply_chat_template to True")
        prompt, answer = ("".join(part["text"] for part in message.parts) for message in found.messages)
        has_own = self._tokenizer.bos_token is not None and prompt.startswith(self._tokenizer.bos_token)
        before = list(self._tokenizer(prompt, add_special_tokens=not has_own)["input_ids"])
        after = [*self._tokenizer(answer, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        return before + after, [False] * len(before) + [True] * len(after)

    def _rendered(self, found: Conversation) -> tuple[list[int], list[bool]]:
        text, spans = self._spans(found)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(start < end and stop > begin for begin, end in spans) for start, stop in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), mask

    def _spans(self, found: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and where in it stands what is learned."""
        inputs = [message.as_template_input() for message in found.messages]
        text, spans = self._marked_spans(found, inputs) if self._has_marks else self._turn_spans(found, inputs)
        if self._form.train_on_generation_prompt:
            text = self._render(inputs, add_generation_prompt=True)
            spans.append((spans[-1][0] if found.messages[-1].in_loss else len(text), len(text)))
        return text, spans

    def _turn_spans(self, found: Conversation, inputs: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._render(inputs), []
        for i, message in enumerate(found.messages):
            if message.in_loss:
                before, through = self._render(inputs[:i], add_generation_prompt=True), self._render(inputs[: i + 1])
                end = len(through.rstrip()) if text.startswith(through) else self._turn_end_after(text, len(before), found)
                if end is None or not text.startswith(before):
                    raise BadRow(
                        f"the chat template renders message {i} otherwise when others follow, so what of it is to be learned cannot be "
                        "told; put {% generation %} marks into the template"
                    )
                spans.append((len(before), end))
        return text, spans

    def _turn_end_after(self, text: str, begin: int, found: Conversation) -> int | None:
        """Where the turn that begins there ends, for templates that render a turn otherwise when others follow."""
        mark = self._turn_end
        if not mark or any(mark in part.get("text", "") for message in found.messages for part in message.parts):
            return None
        at = text.find(mark, begin)
        return None if at < 0 else at + len(mark)

    def _find_turn_end(self) -> str:
        """What the template writes after an answer."""
        answer = "an answer"
        try:
            text = self._render([{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}])
        except BadRow:
            return ""
        return text.rpartition(answer)[2].rstrip() if answer in text else ""

    def _marked_spans(self, found: Conversation, inputs: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        turns = [message for message in found.messages if message.role == "assistant"]
        try:
            [text], [spans] = render_jinja_template(
                [inputs],
                chat_template=self._tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from None
        if len(spans) != len(turns):
            raise BadRow(f"the chat template marks {len(spans)} generations in {len(turns)} turns of the assistant")
        return text, [tuple(span) for span, turn in zip(spans, turns, strict=True) if turn.in_loss]

    def _render(self, inputs: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        try:
            rendered: str = self._tokenizer.apply_chat_template(list(inputs), tokenize=False, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from None
        return rendered


class RowSource(ABC, Generic[T]):
    """An example a row. A row that cannot be used has a row nearby in its place, if it is to be skipped.

    Args:
        on_bad_sample, on_too_long: whether such rows are skipped, or end the run.
        most: only the first this many rows; None: all.
    """

    def __init__(self, files: RowFiles, *, on_bad_sample: OnBadSample, on_too_long: OnBadSample, most: int | None = None) -> None:
        self._files = files
        self._skips = {False: on_bad_sample == "skip", True: on_too_long == "skip"}
        self.num_items = len(files) if most is None else min(most, len(files))
        self.notes: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, content: Any, where: str, folder: Path) -> T:
        """The example of a row's content. Raises BadRow or TooLong."""

    def items(self, epoch: int, *, shuffle: bool, seed: int) -> Sequence[Integers]:
        order = self._files.order(epoch, shuffle=shuffle, seed=seed)
        order = order[order < self.num_items] if self.num_items < len(order) else order
        return _RowItems(order, epoch, seed, substitutes=any(self._skips.values()))

    def draw(self, item: Integers) -> Drawn[T]:
        left_out: list[LeftOut] = []
        for row in item:
            where, content = self._files.read(int(row))
            try:
                return Drawn(self.encode(content, where, self._files.folder(int(row))), tuple(left_out))
            except BadRow as reason:
                left_out.append(LeftOut(where, str(reason), isinstance(reason, TooLong)))
                if not self._skips[left_out[-1].too_long]:
                    break
        return Drawn(None, tuple(left_out))

    def fingerprint(self) -> str:
        return self._files.fingerprint()


class RowExamples(RowSource[SftExample]):
    """Rows of conversations as training examples."""

    def __init__(
        self, files: RowFiles, form: RowForm, encode: ExampleEncoder, *, on_bad_sample: OnBadSample, on_too_long: OnBadSample
    ) -> None:
        super().__init__(files, on_bad_sample=on_bad_sample, on_too_long=on_too_long)
        self._form, self._encoder = form, encode

    def encode(self, content: Any, where: str, folder: Path) -> SftExample:
        return self._encoder(conversation(content, self._form), where, folder)

    def question(self, row: int) -> SftQuestion | LeftOut:
        """A row as an engine is asked it, or why it cannot be."""
        where, content = self._files.read(row)
        try:
            return self._encoder.question(conversation(content, self._form), where, self._files.folder(row))
        except BadRow as reason:
            return LeftOut(where, str(reason), too_long=False)


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


class _Drawing(Dataset[list[Drawn[T]]]):
    """A source as torch's loader asks it."""

    def __init__(self, source: ExampleSource[T]) -> None:
        self._source = source

    def __getitem__(self, items: Any) -> list[Drawn[T]]:
        return [self._source.draw(item) for item in items]


class _Share(Sampler[Any]):
    """Items of one replica's share of each global batch over all epochs, up to ``at_once`` of a batch together; a short last batch is
    dropped. Begins with batch ``first``."""

    def __init__(
        self, source: ExampleSource[Any], batch_size: int, share: range, *, at_once: int, num_epochs: int, shuffle: bool, seed: int
    ) -> None:
        self._source, self.batch_size, self.share, self._at_once = source, batch_size, share, at_once
        self.num_epochs, self.shuffle, self.seed = num_epochs, shuffle, seed
        self.batches_per_epoch = source.num_items // batch_size
        self.first = 0

    @property
    def num_batches(self) -> int:
        return self.batches_per_epoch * self.num_epochs

    def __iter__(self) -> Iterator[Any]:
        done_epochs, done_batches = divmod(self.first, max(1, self.batches_per_epoch))
        for epoch in range(done_epochs, self.num_epochs):
            items = self._source.items(epoch, shuffle=self.shuffle, seed=self.seed)
            for batch in range(done_batches if epoch == done_epochs else 0, self.batches_per_epoch):
                places = [batch * self.batch_size + i for i in self.share]
                for start in range(0, len(places), self._at_once):
                    yield [items[place] for place in places[start : start + self._at_once]]


@dataclass(frozen=True, slots=True)
class _Packed:
    """Drawn examples between processes. Their pixels are one tensor, as each tensor costs the receiver a connection to the sender.

    Attributes:
        drawn: without patches.
        grids: ``image_grid_thw`` of each; None for those without pictures.
        num_patches: of each.
        pixel_values: of all of them; None where there are none.
    """

    drawn: tuple[Drawn[Any], ...]
    grids: tuple[list[list[int]] | None, ...]
    num_patches: tuple[int, ...]
    pixel_values: Tensor | None


def _pack(drawn: Sequence[Drawn[Any]]) -> _Packed:
    """What it is given without the memory that each example has for its patches. Examples are dataclasses with both fields of patches."""
    pixels = [None if one.example is None else one.example.pixel_values for one in drawn]
    grids = [None if one.example is None else one.example.image_grid_thw for one in drawn]
    found = [values for values in pixels if values is not None]
    return _Packed(
        tuple(one if values is None else _with_patches(one, None, None) for one, values in zip(drawn, pixels, strict=True)),
        tuple(None if grid is None else grid.tolist() for grid in grids),
        tuple(0 if values is None else len(values) for values in pixels),
        torch.cat(found) if found else None,
    )


def _unpack(packed: _Packed) -> Iterator[Drawn[Any]]:
    """What ``_pack`` was given."""
    if packed.pixel_values is None:
        yield from packed.drawn
        return
    for one, grid, pixels in zip(packed.drawn, packed.grids, packed.pixel_values.split(list(packed.num_patches)), strict=True):
        # In memory of its own: whoever pickles an example would pickle what it shares, too.
        yield one if grid is None else _with_patches(one, pixels.clone(), torch.tensor(grid))


def _with_patches(one: Drawn[Any], pixels: Tensor | None, grid: Tensor | None) -> Drawn[Any]:
    example: Any = one.example
    return replace(one, example=replace(example, pixel_values=pixels, image_grid_thw=grid))


class RowLoader(Generic[T]):
    """A replica's share of each global batch, over all epochs, with a position that can be saved and restored exactly.

    ``len`` is the number of global batches of the whole run. Iterating gives lists of ``batch_size // dp_size`` examples and
    continues after the last one handed out. Batches and position depend neither on ``num_workers`` nor, but for who gets which
    examples, on ``dp_size``; the state of any replica is that of all.

    Args:
        num_workers: processes that read rows and decode pictures ahead of the step; 0: done when a batch is asked for.
        batch_key: the configuration key of ``batch_size``, for errors and in the position.
        too_long: what a user can do about rows that are too long.

    Raises:
        ConfigError: the data is smaller than a batch, or the batch cannot be split; while iterating, a row that cannot be used and is
            not to be skipped, by file and row.
    """

    def __init__(
        self,
        source: ExampleSource[T],
        batch_size: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_epochs: int = 1,
        shuffle: bool = True,
        seed: int = 1234,
        num_workers: int = 0,
        batch_key: str = "actor.global_batch_size",
        too_long: str = "data.on_too_long=skip leaves such rows out",
    ) -> None:
        if batch_size % dp_size:
            raise ConfigError(f"{batch_key} ({batch_size}) cannot be split over {dp_size} data-parallel ranks")
        size = batch_size // dp_size
        share = range(dp_rank * size, (dp_rank + 1) * size)
        # A part of a batch each, so that all processes work on the batch that is next.
        at_once = min(_HANDED_OVER, -(-size // num_workers)) if num_workers else 1
        self._source, self._batch_key, self._packs = source, batch_key, num_workers > 0
        self._ways_out = {False: "data.on_bad_sample=skip leaves such rows out", True: too_long}
        self._calls_per_batch = -(-size // at_once)
        self._order = _Share(source, batch_size, share, at_once=at_once, num_epochs=num_epochs, shuffle=shuffle, seed=seed)
        if self._order.num_batches == 0:
            raise ConfigError(
                f"Train dataloader is empty! The data makes {source.num_items} examples, fewer than {batch_key} "
                f"({batch_size}), over {num_epochs} epochs"
            )
        self._loader = DataLoader(
            _Drawing(source),
            batch_size=None,
            sampler=self._order,
            collate_fn=_pack if self._packs else list,
            num_workers=num_workers,
            # As many as a batch has, while the batch before waits in this process.
            prefetch_factor=-(-size // (num_workers * at_once)) if num_workers else None,
            # The loader draws seeds for its processes; not from the random state of training.
            generator=torch.Generator(),
        )
        self._handed_out = 0
        self._drawn: Iterator[list[Drawn[T]]] | None = None
        self._left_out = {False: BadSamples(), True: BadSamples()}

    @property
    def batches_per_epoch(self) -> int:
        return self._order.batches_per_epoch

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the data."""
        return self._source.notes

    @property
    def num_bad(self) -> int:
        """Rows of this share that were left out so far because they cannot be used."""
        return len(self._left_out[False].found)

    @property
    def num_too_long(self) -> int:
        """Rows of this share that were left out so far because of their length."""
        return len(self._left_out[True].found)

    def __len__(self) -> int:
        return self._order.num_batches

    def __iter__(self) -> Iterator[list[T]]:
        while self._handed_out < len(self):
            if self._drawn is None:
                self._drawn = self._batches()
            examples = [self._taken(drawn) for drawn in next(self._drawn)]
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
        self._handed_out, self._drawn = state["handed_out"], None

    def _batches(self) -> Iterator[list[Drawn[T]]]:
        """Batches from the present position on. Those of other processes are fetched while the caller works on the one before."""
        count, self._order.first = len(self) - self._handed_out, self._handed_out
        calls = iter(self._loader)

        def batch() -> list[Drawn[T]]:
            parts = (next(calls) for _ in range(self._calls_per_batch))
            return [drawn for part in parts for drawn in (_unpack(part) if self._packs else part)]

        if not self._packs:
            yield from (batch() for _ in range(count))
            return
        with ThreadPoolExecutor(1, thread_name_prefix="rlsync-data") as thread:
            coming = thread.submit(batch)
            for left in range(count, 0, -1):
                found = coming.result()
                if left > 1:
                    coming = thread.submit(batch)
                yield found

    def _taken(self, drawn: Drawn[T]) -> T:
        for row in drawn.left_out:
            self._left_out[row.too_long].add(row.where, row.reason)
        if drawn.example is None:
            last = drawn.left_out[-1]
            tried = f" ({len(drawn.left_out)} rows were tried)" if len(drawn.left_out) > 1 else ""
            raise ConfigError(f"{last.where}: {last.reason}{tried}. {self._ways_out[last.too_long]}")
        return drawn.example

    def _identity(self) -> dict[str, int | str]:
        order = self._order
        return {
            "num_examples": self._source.num_items,
            self._batch_key.rpartition(".")[2]: order.batch_size,
            "seed": order.seed,
            "shuffle": int(order.shuffle),
            "data": self._source.fingerprint(),
        }
