"""Claims about supervised examples: what of a row is in the loss, and a loader that resumes at the exact batch."""

from __future__ import annotations

import gc
import json
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rlsync.errors import CheckpointError, ConfigError
from tests.json_lines import written
from workers.picture_world import image_settings, make_vision_tokenizer
from workers.pictures import load_picture_processor
from workers.row_files import RowFiles
from workers.row_loader import RowLoader
from workers.sft_data import ExampleEncoder, ExampleForm, RowExamples, SftExample
from workers.sft_rows import RowForm
from workers.synthetic import make_tokenizer

TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}({{ m['role'] | length }}{{ m['content'] }}){% endfor %}{% if add_generation_prompt %}(9{% endif %}"
)
PAIRS = RowForm("llm", "prompt", "response")


def source(path: str, form: RowForm = PAIRS, *, skip: bool = False, **example: Any) -> RowExamples:
    encode = ExampleEncoder(TOKENIZER, ExampleForm(**{"max_length": 32, "apply_chat_template": False, **example}))
    on = "skip" if skip else "error"
    return RowExamples(RowFiles([path]), form, encode, on_bad_sample=on, on_too_long=on)


def sums(path: Path, count: int = 23) -> str:
    return written(path / "sums.jsonl", *({"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(count)))


def learned(example: SftExample) -> str:
    return TOKENIZER.decode([token for token, is_target in zip(example.token_ids, example.loss_mask, strict=True) if is_target])


def test_of_a_pair_the_response_and_its_end_are_in_the_loss(tmp_path: Path) -> None:
    [example] = next(iter(RowLoader(source(sums(tmp_path)), 1, shuffle=False)))
    assert TOKENIZER.decode(example.token_ids) == "0+1=1<eos>"
    assert learned(example) == "1<eos>"


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
        [{"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3", "loss": False}],
        [{"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3"}],
    ],
)
def test_without_a_template_nothing_but_an_answer_to_a_prompt_is_learned(tmp_path: Path, turns: list[dict[str, Any]]) -> None:
    """Not the user's own words, nor what a row leaves out of the loss, because they come second."""
    chat = RowForm("chat", "messages", "answer")
    loader = RowLoader(source(written(tmp_path / "a.jsonl", {"messages": turns}), chat), 1)
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: it is not a prompt and an answer that is learned"):
        next(iter(loader))
    right = {"messages": [{"role": "user", "content": "1"}, turns[0]]}
    [example] = next(iter(RowLoader(source(written(tmp_path / "b.jsonl", right), chat), 1)))
    assert learned(example) == "2<eos>"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_continues_at_the_exact_batch_however_many_processes_load(tmp_path: Path, num_workers: int) -> None:
    path = sums(tmp_path)
    whole = [[example.where for example in batch] for batch in RowLoader(source(path), 4, num_epochs=3)]
    first = RowLoader(source(path), 4, num_epochs=3, num_workers=num_workers)
    head = [[example.where for example in batch] for batch in islice(first, 7)]
    second = RowLoader(source(path), 4, num_epochs=3, num_workers=2 - num_workers)
    second.load_state_dict(first.state_dict())
    assert head + [[example.where for example in batch] for batch in second] == whole
    assert len(whole) == 15 and len({where for batch in whole[:5] for where in batch}) == 20


def test_replicas_share_each_global_batch(tmp_path: Path) -> None:
    path = sums(tmp_path)
    whole = list(RowLoader(source(path), 6))
    shares = [list(RowLoader(source(path), 6, dp_rank=rank, dp_size=3)) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == whole


def test_a_position_in_other_data_is_refused(tmp_path: Path) -> None:
    state = RowLoader(source(sums(tmp_path)), 4).state_dict()
    other = written(tmp_path / "other.jsonl", *({"prompt": f"{i}+1=", "response": "0"} for i in range(23)))
    with pytest.raises(CheckpointError, match="data position was saved with other settings"):
        RowLoader(source(other), 4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="global_batch_size 4 -> 5"):
        RowLoader(source(sums(tmp_path)), 5).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_row_ends_the_run_by_file_and_row_or_is_replaced_and_counted(tmp_path: Path, num_workers: int) -> None:
    good = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(8)]
    path = written(tmp_path / "a.jsonl", *good[:3], {"prompt": "1+1="}, *good[3:])
    with pytest.raises(ConfigError, match=r"^.*a\.jsonl:4: no field 'response'; it has 'prompt'\. Set data\.answer_key"):
        list(RowLoader(source(path), 3, num_workers=num_workers))
    loader = RowLoader(source(path, skip=True), 3, num_workers=num_workers)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert loader.take_left_out() == {"data/left_out_bad": 1, "data/left_out_too_long": 0} and not any(loader.take_left_out().values())
    assert all(example.where != f"{path}:4" for batch in batches for example in batch)


def seen(example: SftExample) -> tuple[Any, ...]:
    """All that an example is, its tensors as bytes."""
    pictures = [
        None if t is None else (t.dtype, tuple(t.shape), t.numpy().tobytes()) for t in (example.pixel_values, example.image_grid_thw)
    ]
    return example.token_ids, example.loss_mask, example.where, *pictures


@pytest.mark.parametrize("num_workers", [1, 2])
def test_pictures_come_from_other_processes_as_they_were_made(tmp_path: Path, num_workers: int) -> None:
    """Rows with two pictures, with one and with none, of several sizes, and one that is left out; shares that no number of processes
    divides."""
    for side in (28, 56):
        Image.new("RGB", (side, 2 * side), (side, 7, 9)).save(tmp_path / f"{side}.png")
    pictures = [["28.png"], [], ["56.png", "28.png"], ["gone.png"], ["56.png"]]
    lines = [{"question": f"{i}?", "image": pictures[i % 5], "answer": str(i)} for i in range(35)]
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor/preprocessor_config.json").write_text(json.dumps(image_settings()))
    tokenizer = make_vision_tokenizer()
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    encode = ExampleEncoder(
        tokenizer, ExampleForm(256), load_picture_processor(tmp_path / "processor", token, min_pixels=None, max_pixels=None)
    )
    files = RowFiles([written(tmp_path / "rows.jsonl", *lines)])
    form = RowForm("vlm", "question", "answer", image_keys=("image",))
    rows = RowExamples(files, form, encode, on_bad_sample="skip", on_too_long="error")
    here, there = (RowLoader(rows, 11, num_epochs=2, num_workers=count) for count in (0, num_workers))
    wanted, found = ([[seen(example) for example in batch] for batch in loader] for loader in (here, there))
    assert found == wanted and [len(batch) for batch in wanted] == [11] * 6
    left_out = here.take_left_out()
    assert there.take_left_out() == left_out and left_out["data/left_out_bad"] > 0
    assert {example[4] if example[4] is None else example[4][1][0] for batch in found for example in batch} == {None, 1, 2}


def test_drawing_takes_nothing_from_the_random_state_of_training(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    next(iter(RowLoader(source(sums(tmp_path)), 4, num_workers=1)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("end", ["unread", "last", "error"])
def test_processes_are_told_to_end_with_their_loader_its_last_batch_and_an_error(tmp_path: Path, end: str) -> None:
    """And not found by a garbage collection, in which torch cannot tell them, waits for seconds and kills them."""
    rows = [{"prompt": f"{i}+1=", "response": "0"} for i in range(8)] + [{"prompt": "1+1="}] * (end == "error")
    before = set(active_children())
    loader = RowLoader(source(written(tmp_path / "a.jsonl", *rows)), 3, shuffle=False, num_workers=2)
    handed_out = iter(loader)
    next(handed_out)
    processes = [each for each in active_children() if each not in before]
    assert len(processes) == 2
    gc.disable()
    try:
        if end == "unread":
            del loader, handed_out
        elif end == "last":
            assert len(list(handed_out)) == 1
        else:
            with pytest.raises(ConfigError, match="no field 'response'"):
                list(handed_out)
        assert [each.exitcode for each in processes] == [0, 0]
    finally:
        gc.enable()
