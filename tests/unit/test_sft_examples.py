"""Claims about what of a conversation is learned, and about pictures in it, beside what transformers makes of the same."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin, Qwen2_5_VLProcessor

from rlsync.errors import ConfigError
from workers.picture_world import image_settings, make_vision_tokenizer
from workers.pictures import PictureProcessor, load_picture_processor, open_picture
from workers.row_files import BadRow
from workers.row_loader import TooLong
from workers.sft_data import ExampleEncoder, ExampleForm, SftExample
from workers.sft_rows import RowForm, conversation

CHAT = RowForm("chat", "messages", "answer", image_keys=("images",))
TOKENIZER = make_vision_tokenizer()
TEMPLATE = TOKENIZER.chat_template
BODY = TEMPLATE[TEMPLATE.index("{% if message.content is string %}") : TEMPLATE.index("<|im_end|>")] + "<|im_end|>"
HEAD = "{% for message in messages %}<|im_start|>{{ message.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Jinja drops a line break behind a tag.
BREAK = "{{ '\n' }}{% endfor %}"
# The same text as TEMPLATE makes, with transformers' own marks of what is generated.
IF_ANSWER = "{% if message.role == 'assistant' %}"
MARKED = f"{HEAD}{IF_ANSWER}{{% generation %}}{BODY}{{% endgeneration %}}{{% else %}}{BODY}{{% endif %}}{BREAK}{PROMPT}"
# As Qwen3's: only the last answer has a place for thoughts.
THINKING = f"{HEAD}{IF_ANSWER}{{% if loop.last %}}<think>\n\n</think>\n{{{{ '\n' }}}}{{% endif %}}{{% endif %}}{BODY}{BREAK}{PROMPT}"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "uno  "},
    {"role": "user", "content": "Two, <b>?"},
    {"role": "assistant", "content": "dos\n\ndos"},
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PictureProcessor:
    folder = tmp_path_factory.mktemp("processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(image_settings()))
    return load_picture_processor(folder, TOKENIZER.convert_tokens_to_ids("<|image_pad|>"), min_pixels=None, max_pixels=None)


@pytest.fixture
def theirs(processor: PictureProcessor, monkeypatch: pytest.MonkeyPatch) -> Qwen2_5_VLProcessor:
    """transformers' processor around the same parts; without a processor of videos, which would need torchvision."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    return Qwen2_5_VLProcessor(processor.image_processor, with_template(MARKED), None, chat_template=MARKED)


def with_template(template: str) -> Any:
    tokenizer = make_vision_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def example(turns: list[dict[str, Any]], template: str = TEMPLATE, images: Any = None, folder: Path = Path(), **form: Any) -> SftExample:
    pictures = form.pop("pictures", None)
    encode = ExampleEncoder(with_template(template), ExampleForm(**{"max_length": 2048, **form}), pictures)
    return encode(conversation({"messages": turns, "images": images}, CHAT), "a row", folder)


@pytest.mark.parametrize("fails", ["{{ 'a' + message.content }}", "{{ message.content.x.y }}", "{{ message.content[0] * 'a' }}"])
@pytest.mark.parametrize("marked", [False, True])
def test_whatever_a_template_fails_with_is_why_a_row_is_left_out(fails: str, marked: bool, processor: PictureProcessor) -> None:
    """Templates of text models take content for a string."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "yes"}]
    template = "{% for message in messages %}" + fails + ("{% generation %}x{% endgeneration %}" if marked else "") + "{% endfor %}"
    images = [{"bytes": as_bytes(picture(28, 28))}]
    with pytest.raises(BadRow, match="the chat template refuses it: "):
        example(turns, template, images=images, pictures=processor)
    with pytest.raises(BadRow, match="it has 1 pictures, and the model takes none"):
        example(turns, template, images=images)


@pytest.mark.parametrize(
    ("form", "content", "damage"),
    [
        ("JPEG", b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07"),  # TypeError where the picture is turned
        ("JPEG", b"\x01\x1a\x00\x05", b"\x01\x03\x00\x05"),  # struct.error there
        ("TIFF", b"\x11\x01\x04\x00", b"\x11\x01\x0c\x00"),  # TypeError where it is read
    ],
)
def test_whatever_pillow_fails_with_is_why_a_picture_cannot_be_read(tmp_path: Path, form: str, content: bytes, damage: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5
    held = io.BytesIO()
    picture(30, 40).save(held, form, **({"exif": exif} if form == "JPEG" else {}))
    assert held.getvalue().count(content) == 1
    open_picture(held.getvalue(), tmp_path)
    (tmp_path / "damaged").write_bytes(held.getvalue().replace(content, damage))
    with pytest.raises(BadRow, match=r"picture .*damaged cannot be read: "):
        open_picture("damaged", tmp_path)


def test_a_row_with_a_token_that_the_model_does_not_have_is_a_bad_one() -> None:
    tokenizer = with_template(TEMPLATE)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    row = conversation({"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "<new>"}], "images": None}, CHAT)
    with pytest.raises(BadRow, match=rf"'<new>' of id {size} of it, and the model's vocab_size is {size}; resize the model's embedding"):
        ExampleEncoder(tokenizer, ExampleForm(64), vocab_size=size)(row, "a row", Path())
    assert size in ExampleEncoder(tokenizer, ExampleForm(64), vocab_size=size + 1)(row, "a row", Path()).token_ids


def learned(found: SftExample) -> list[str]:
    """Each stretch of tokens in the loss, as text."""
    pieces: list[list[int]] = [[]]
    for token, is_target in zip(found.token_ids, found.loss_mask, strict=True):
        if is_target:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [TOKENIZER.decode(piece) for piece in pieces if piece]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def as_bytes(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_loss_is_where_transformers_marks_what_an_assistant_generates(template: str) -> None:
    reference = with_template(MARKED).apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    found = example(TURNS, template)
    assert list(found.token_ids) == reference["input_ids"]
    assert [int(is_target) for is_target in found.loss_mask] == reference["assistant_masks"]
    assert learned(found) == ["uno  <|im_end|>", "dos\n\ndos<|im_end|>"]


def test_turns_that_say_so_stay_out_of_the_loss() -> None:
    for template in (TEMPLATE, MARKED):
        assert learned(example([*TURNS[:2], {**TURNS[2], "loss": False}, *TURNS[3:]], template)) == ["dos\n\ndos<|im_end|>"]


def test_a_template_that_renders_earlier_answers_otherwise_is_understood_by_what_ends_a_turn() -> None:
    assert learned(example(TURNS, THINKING)) == ["uno  <|im_end|>", "<think>\n\n</think>\n\ndos\n\ndos<|im_end|>"]
    with pytest.raises(BadRow, match="the chat template renders message 2 otherwise when others follow"):
        example([*TURNS[:3], {"role": "user", "content": "what is <|im_end|>?"}, TURNS[4]], THINKING)


def test_the_prompt_for_a_next_answer_is_learned_only_where_asked() -> None:
    for template in (TEMPLATE, MARKED):
        assert learned(example(TURNS, template, train_on_generation_prompt=True))[-1] == "dos\n\ndos<|im_end|>\n<|im_start|>assistant\n"
        assert "assistant" not in learned(example(TURNS, template))[-1]


def test_what_cannot_be_learned_is_refused() -> None:
    length = example(TURNS).length
    assert example(TURNS, max_length=length).length == length
    with pytest.raises(TooLong, match=f"it has {length} tokens, and an example has at most {length - 1} .runner.seq_length"):
        example(TURNS, max_length=length - 1)
    with pytest.raises(BadRow, match="the chat template refuses it: only users"):
        example(TURNS, "{{ raise_exception('only users') }}")
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        ExampleEncoder(with_template(None), ExampleForm(8))  # type: ignore[arg-type]
    endless, slow = (SimpleNamespace(is_fast=is_fast, chat_template="", eos_token_id=None, name_or_path="/m") for is_fast in (True, False))
    with pytest.raises(ConfigError, match="the tokenizer of /m has no eos_token, with which an answer ends"):
        ExampleEncoder(endless, ExampleForm(8, apply_chat_template=False))
    with pytest.raises(ConfigError, match="the tokenizer of /m is no fast one"):
        ExampleEncoder(slow, ExampleForm(8))


def test_pictures_of_any_size_become_what_transformers_processor_makes(
    processor: PictureProcessor, theirs: Qwen2_5_VLProcessor, tmp_path: Path
) -> None:
    images = [picture(56, 84), picture(301, 77, 1), picture(20, 31, 2)]
    images[0].save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "this: "}, {"type": "image", "image": as_bytes(images[2])}]},
        {"role": "assistant", "content": "no"},
    ]
    found = example(turns, images=["a.png", {"bytes": as_bytes(images[1]), "path": None}], folder=tmp_path, pictures=processor)
    rest = iter(images)
    given = [
        {**turn, "content": [{"type": "image", "image": next(rest)} if part["type"] == "image" else part for part in turn["content"]]}
        if isinstance(turn["content"], list)
        else turn
        for turn in turns
    ]
    reference = theirs.apply_chat_template(
        given, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
        processor_kwargs={"return_offsets_mapping": True},
    )  # fmt: skip
    assert list(found.token_ids) == reference["input_ids"][0].tolist()
    assert [int(is_target) for is_target in found.loss_mask] == reference["assistant_masks"][0].tolist()
    assert found.image_grid_thw is not None and found.pixel_values is not None
    assert torch.equal(found.image_grid_thw, reference["image_grid_thw"])
    assert torch.equal(found.pixel_values, reference["pixel_values"])
    assert found.token_ids.count(processor.image_token_id) == int(found.image_grid_thw.prod(dim=1).sum()) // 4
    assert learned(found) == ["yes<|im_end|>", "no<|im_end|>"]


def test_limits_of_pixels_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_settings()))
    for limits, grid in (((None, None), [1, 16, 16]), ((None, 4 * 28 * 28), [1, 4, 4]), ((400 * 28 * 28, 10**7), [1, 40, 40])):
        made = load_picture_processor(tmp_path, 0, min_pixels=limits[0], max_pixels=limits[1])([picture(280, 280)])
        assert made.image_grid_thw.tolist() == [grid]


def test_a_row_of_more_or_fewer_placeholders_than_pictures_is_refused(processor: PictureProcessor) -> None:
    image = as_bytes(picture(56, 56))
    text = [{"role": "user", "content": "see <image>!"}, {"role": "assistant", "content": "yes"}]
    assert example(text, images=[image], pictures=processor).image_grid_thw is not None
    with pytest.raises(BadRow, match="2 pictures in 'images', 1 marks '<image>' or image parts"):
        example(text, images=[image, image], pictures=processor)
    with pytest.raises(BadRow, match="the text holds 2 placeholders of pictures, and the row has 1 pictures"):
        example([{"role": "user", "content": "see <image> <|image_pad|>"}, text[1]], images=[image], pictures=processor)
    with pytest.raises(BadRow, match="it has 1 pictures, and the model takes none"):
        example(text, images=[image])


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("gone.png", "picture .*gone.png does not exist"),
        ("broken.png", "picture .*broken.png cannot be read: .*truncated"),
        ("drawn.png", "picture .*drawn.png cannot be read: it is a file of form EPS, which vLLM does not take"),
        ("text.png", "picture .*text.png cannot be read: cannot identify image file"),
        (b"nothing", "picture of 7 bytes cannot be read"),
        ({"bytes": "%%"}, "picture in base64 is not base64"),
        ({"bytes": None, "path": None}, "a picture is an object with 'bytes', 'path'; it must have bytes or path"),
        ("https://example.com/a.png", "is on the network; download it"),
        ("data:image/png,abc", "is a data address without base64"),
        (7, "a picture is int"),
        ("file://" + "a" * 300, "cannot be read: .*File name too long"),
        ("\ud800.png", "a picture's path holds half of a surrogate pair"),
        ({"path": "file://\ud800.png"}, "a picture's path holds half of a surrogate pair"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(reference: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(as_bytes(picture(60, 60))[:2000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "drawn.png").write_bytes(as_bytes(picture(9, 7), "EPS"))
    with pytest.raises(BadRow, match=reason):
        open_picture(reference, tmp_path)


def test_all_ways_to_name_a_picture_give_the_same_pixels(tmp_path: Path) -> None:
    image = picture(30, 40)
    content = as_bytes(image)
    (tmp_path / "a.png").write_bytes(content)
    encoded = base64.b64encode(content).decode()
    ways = ["a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", f"data:image/png;base64,{encoded}", content]
    (tmp_path / "größe 50%.png").write_bytes(content)
    address = (tmp_path / "größe 50%.png").as_uri()
    assert "%20" in address
    ways += [address, address.replace("file://", "file://localhost"), f"file://{tmp_path}/größe 50%.png"]
    for way in (*ways, {"bytes": content, "path": "x.png"}, {"bytes": encoded}, {"path": "a.png", "bytes": None}):
        assert np.array_equal(np.asarray(open_picture(way, tmp_path)), np.asarray(image))


def test_pictures_are_turned_as_they_say_and_clear_ones_lie_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(30, 40).save(tmp_path / "turned.png", exif=exif)
    assert open_picture("turned.png", tmp_path).size == (40, 30)
    assert open_picture(as_bytes(Image.new("RGBA", (4, 4), (9, 9, 9, 0))), tmp_path).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("clear", [False, True])
def test_pixels_are_those_that_vllm_makes_of_the_same_file(mode: str, clear: bool, tmp_path: Path) -> None:
    media = pytest.importorskip("vllm.multimodal.media")
    image = Image.new(mode, (9, 7), 9) if mode == "I;16" else picture(9, 7).convert(mode)
    colour = {"L": 9, "P": 9, "RGB": (9, 9, 9)}.get(mode)
    said = {}
    if clear and colour is not None:
        image.paste(colour, (0, 0, 5, 5))
        said["transparency"] = colour
    stream = io.BytesIO()
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG", **said)
    expected = np.asarray(media.ImageMediaIO().load_bytes(stream.getvalue()).media)
    assert np.array_equal(np.asarray(open_picture(stream.getvalue(), tmp_path)), expected)


def test_a_question_is_the_prompt_as_an_engine_is_asked_it(processor: PictureProcessor) -> None:
    encode = ExampleEncoder(with_template(TEMPLATE), ExampleForm(64), processor)
    row = {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a cat"}],
        "images": [as_bytes(picture(56, 56))],
    }
    asked = encode.question(conversation(row, CHAT), "a row", Path())
    assert TOKENIZER.decode(asked.prompt_ids).endswith("<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n<|im_start|>assistant\n")
    assert asked.answer == "a cat" and [image.size for image in asked.images] == [(56, 56)]


def test_a_question_has_the_pictures_before_its_answer_alone(processor: PictureProcessor) -> None:
    """Turns behind the last one that is learned are no part of the prompt, nor are their pictures."""
    turns = [*TURNS[1:2], {"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a cat"}]
    turns += [{"role": "user", "content": "and <image>?"}, {"role": "assistant", "content": "a dog", "loss": False}]
    row = conversation({"messages": turns, "images": [as_bytes(picture(56, 56)), as_bytes(picture(84, 56, 1))]}, CHAT)
    encode = ExampleEncoder(with_template(TEMPLATE), ExampleForm(512), processor)
    asked = encode.question(row, "a row", Path())
    assert asked.answer == "a cat" and [image.size for image in asked.images] == [(56, 56)]
    assert asked.prompt_ids.count(processor.image_token_id) == 1
    trained = encode(row, "a row", Path()).image_grid_thw
    assert trained is not None and len(trained) == 2, "the example has both"
