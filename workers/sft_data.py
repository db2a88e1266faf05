"""Rows to training examples.

Owns the chat template, the loss mask and the length rule. Knows neither Ray nor Megatron; the tokenizer is any fast Hugging Face
tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from rlsync.errors import ConfigError
from workers.chat_template import TEMPLATE_ERRORS, refusal, render
from workers.model_folder import named, unknown_token
from workers.pictures import Patches, PictureProcessor, open_picture
from workers.problems import OnBadSample
from workers.row_files import BadRow, RowFiles
from workers.row_loader import LeftOut, RowSource, TooLong
from workers.sft_rows import Conversation, RowForm, conversation, no_eyes

_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


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

    Args:
        vocab_size: of the model: a row with other tokens is a bad one; None: unknown.

    Raises:
        ConfigError: the form and the tokenizer do not fit together.
    """

    def __init__(
        self, tokenizer: Any, form: ExampleForm, pictures: PictureProcessor | None = None, *, vocab_size: int | None = None
    ) -> None:
        self._tokenizer, self._form, self._pictures, self._vocab_size = tokenizer, form, pictures, vocab_size
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{named(tokenizer)} is no fast one, which says where in the text a token stands, as supervised fine-tuning needs it; add "
                "tokenizer.json to its folder, and leave actor.tokenizer.use_fast True"
            )
        template = getattr(tokenizer, "chat_template", None)
        if form.apply_chat_template and template is None:
            raise ConfigError(
                "data.apply_chat_template is True, and the tokenizer has no chat template; add chat_template.jinja to its folder, "
                "or set data.apply_chat_template to False"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{named(tokenizer)} has no eos_token, with which an answer ends; name one in its tokenizer_config.json")
        self._has_marks = isinstance(template, str) and _GENERATION_MARK.search(template) is not None
        self._turn_end = self._find_turn_end() if form.apply_chat_template else ""

    def __call__(self, found: Conversation, where: str, folder: Path) -> SftExample:
        """The example of a conversation.

        Args:
            where: file and row.
            folder: from which relative paths of pictures are meant.

        Raises:
            BadRow: the template refuses the conversation, a picture cannot be read, the model does not know a token, or nothing would be
                learned.
            TooLong: it has more tokens than ``max_length``.
        """
        if found.images and self._pictures is None:  # templates of text models fail at pictures in ways of their own
            raise BadRow(no_eyes(len(found.images)))
        token_ids, mask = self._rendered(found) if self._form.apply_chat_template else self._plain(found)
        if (reason := unknown_token(token_ids, self._tokenizer, self._vocab_size)) is not None:
            raise BadRow(reason)
        patches = self._patches(found, folder)
        if patches is not None or self._pictures is not None:
            token_ids, mask = self._with_features(token_ids, mask, () if patches is None else patches.num_features)
        if len(token_ids) > self._form.max_length:
            raise TooLong(f"it has {len(token_ids)} tokens, and an example has at most {self._form.max_length} (runner.seq_length)")
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
        num_images = sum(part["type"] == "image" for message in found.messages[:last] for part in message.parts)
        images = tuple(open_picture(image, folder) for image in found.images[:num_images])
        asked = found.messages[last - 1].text if last else ""
        return SftQuestion(tuple(prompt_ids), images, asked, found.answer, where)

    def _patches(self, found: Conversation, folder: Path) -> Patches | None:
        if not found.images or self._pictures is None:
            return None
        return self._pictures([open_picture(reference, folder) for reference in found.images])

    def _with_features(self, token_ids: list[int], mask: list[bool], counts: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Each picture's placeholder as often as the tower makes features of the picture."""
        assert self._pictures is not None
        repeats = self._pictures.repeats(token_ids, counts)
        spread = [(token, is_target) for token, is_target, n in zip(token_ids, mask, repeats, strict=True) for _ in range(n)]
        return [token for token, _ in spread], [is_target for _, is_target in spread]

    def _plain(self, found: Conversation) -> tuple[list[int], list[bool]]:
        """Prompt and answer without a template, and the end-of-sequence token."""
        if [message.in_loss for message in found.messages] != [False, True] or found.images:
            raise BadRow("it is not a prompt and an answer that is learned, or has pictures; set data.apply_chat_template to True")
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
        from transformers.utils.chat_template_utils import render_jinja_template  # ranks, which come by here, do without

        turns = [message for message in found.messages if message.role == "assistant"]
        try:
            [text], [spans] = render_jinja_template(
                [inputs],
                chat_template=self._tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except TEMPLATE_ERRORS as error:
            raise refusal(error) from None
        if len(spans) != len(turns):
            raise BadRow(f"the chat template marks {len(spans)} generations in {len(turns)} turns of the assistant")
        return text, [tuple(span) for span, turn in zip(spans, turns, strict=True) if turn.in_loss]

    def _render(self, inputs: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        return render(self._tokenizer, inputs, add_generation_prompt=add_generation_prompt)


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
