"""Claims about prompts: the file forms, the length rule, and a loader that resumes at the exact batch."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsync.errors import CheckpointError, ConfigError
from tests.json_lines import written
from workers.data import PromptDataset, PromptForm, PromptLoader
from workers.problems import BadSamples, Problem, load_problems, load_supervised
from workers.synthetic import make_tokenizer

TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}={% endif %}"


def dataset(num: int = 10, **form: Any) -> PromptDataset:
    problems = [Problem(f"{i}+{i}=", (str(2 * i),)) for i in range(num)]
    return PromptDataset(problems, TOKENIZER, PromptForm(**{"max_prompt_length": 8, **form}))


def indices(batches: Any) -> list[list[int]]:
    return [[prompt.index for prompt in batch] for batch in batches]


def test_math_lines_are_read_with_one_or_several_references(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        {"prompt": "1+1=", "solutions": ["2", "\\boxed{2}"], "task": "math", "query_id": 3},
        {"prompt": [{"role": "user", "content": "2+2"}], "solutions": "4"},
        {"prompt": "3+3=", "solutions": 6},
    )
    found = load_problems([path])
    assert found[0] == Problem("1+1=", ("2", "\\boxed{2}"))
    assert found[1] == Problem(({"role": "user", "content": "2+2"},), ("4",))
    assert found[2].answers == ("6",)
    assert load_problems([path, path], data_size=4) == [*found, found[0]]


def test_a_whole_number_may_be_larger_than_floats_are(tmp_path: Path) -> None:
    """As 2^2000 is, which some problems ask for."""
    [found] = load_problems([written(tmp_path / "a.jsonl", {"prompt": "2^2000", "solutions": 2**2000})])
    assert found.answers == (str(2**2000),)


def test_a_text_problem_with_pictures_is_refused_unless_a_reward_function_is_given_them(tmp_path: Path) -> None:
    """Such a problem cannot be solved, and its reward would be that of wrong answers."""
    row = {"prompt": "<image>Find x.", "images": ["a.png"]}
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: the row has 'images', which data\.type math does not read: its pictures would not"):
        load_problems([written(tmp_path / "a.jsonl", {**row, "solutions": "4"})])
    [found] = load_problems([str(tmp_path / "a.jsonl")], metadata=True)
    assert found.metadata == {"images": ["a.png"]}
    [unanswered] = load_problems([written(tmp_path / "b.jsonl", {**row, "solutions": None})], metadata=True)
    assert unanswered.answers == ()


def test_gsm8k_lines_keep_what_follows_the_mark(tmp_path: Path) -> None:
    path = written(tmp_path / "g.jsonl", {"question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 2,000"})
    assert load_problems([path]) == [Problem("How many?", ("2,000",))]
    assert load_problems([path], prompt_key="question", answer_key="answer") == [Problem("How many?", ("2,000",))]


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"q": "1", "a": ["2"]}]))
    assert load_problems([str(tmp_path / "a.json")], prompt_key="q", answer_key="a") == [Problem("1", ("2",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "solutions": "1"}\n{"prompt": "a"}\n', "a.jsonl:2: no field 'solutions'"),
        ('{"prompt": "a", "solutions": "1"}\n{"prompt"\n', "a.jsonl:2: not JSON"),
        ('{"prompt": "a", "solutions": []}\n', "a.jsonl:1: field 'solutions' is an empty list"),
        ("[1]\n", "a.jsonl:1: expected an object, got a list"),
        ("\n", "a.jsonl: no problems in this file"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_problems([str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("null", "holds null"),
        ("true", "holds true"),
        ("{}", "holds an object"),
        ("NaN", "holds NaN"),
        ("[null]", "holds null"),
        ('""', "is empty"),
        ('"  "', "is empty"),
        ('"because\\n#### "', "is empty after ####"),
        ('"\\ud800"', "holds half of a surrogate pair"),
        ("1e400", "holds Infinity"),
    ],
)
def test_what_is_no_reference_answer_does_not_become_one(tmp_path: Path, answer: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "solutions": "1"}\n{"prompt": "a", "solutions": ' + answer + "}\n")
    with pytest.raises(ConfigError, match=re.escape(f"a.jsonl:2: field 'solutions' {reason}")):
        load_problems([str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("null", "holds null"),
        ("7", "holds a number"),
        ('" \\n"', "is empty"),
        ("[]", "is an empty list"),
        ('["a"]', "message 0 needs a `role` and a `content`"),
        ('[{"role": "user"}]', "message 0 needs a `role` and a `content`"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "message 0 needs a `role` and a `content`"),
        ('[{"role": "user", "content": ""}]', "holds empty messages only"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, prompt: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"solutions": "1", "prompt": ' + prompt + "}\n")
    with pytest.raises(ConfigError, match=re.escape("a.jsonl:1: field 'prompt'") + ".*" + re.escape(reason)):
        load_problems([str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "solutions": "1"}\n{"prompt": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8: byte 16 is 0xe9"),
        ("a.parquet", b"PAR1\x15\x04\x15", "is a Parquet file"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "is a gzip file"),
        ("a.json", b'{"prompt": "a", "solutions": "1"}\n{"prompt": "b"}', r"a\.json: not JSON.*one array of objects"),
        ("a.json", b'{"prompt": "a", "solutions": "1"}', r"a\.json: holds an object; a \.json file holds one array"),
        ("a.json", b"[" * 100_000, "not JSON that can be read"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_problems([str(tmp_path / name)])


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        load_problems([str(tmp_path)])


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "solutions": "1"}\n')
    assert load_problems([str(tmp_path / "a.jsonl")]) == [Problem("a", ("1",))]


def test_bad_rows_are_left_out_and_counted_where_asked_or_named_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "solutions": "1" if i % 2 else None} for i in range(20)]
    bad = BadSamples()
    found = load_problems([written(tmp_path / "a.jsonl", *rows)], bad=bad)
    assert [problem.prompt for problem in found] == [str(i) for i in range(1, 20, 2)]
    (note,) = bad.settle("skip")
    assert note.startswith("left out 10 bad samples") and "a.jsonl:1: field 'solutions' holds null" in note and "and 5 more" in note
    with pytest.raises(ConfigError, match=r"10 bad samples; data\.on_bad_sample=skip leaves such rows out"):
        bad.settle("error")
    assert BadSamples().settle("error") == ()


def test_supervised_rows_need_both_texts(tmp_path: Path) -> None:
    assert load_supervised([written(tmp_path / "a.jsonl", {"prompt": "1+1=", "response": "2"})]) == [Problem("1+1=", ("2",))]
    with pytest.raises(ConfigError, match=r"b\.jsonl:1: needs the fields 'prompt' and 'response'"):
        load_supervised([written(tmp_path / "b.jsonl", {"prompt": "1+1="})])


def test_a_prompt_without_tokens_is_a_bad_sample_and_all_of_them_are_the_tokenizers_fault() -> None:
    class KnowsDigits:
        """As transformers makes it from a folder without tokenizer.json: it drops what it does not know, without a word."""

        bos_token = None

        def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(c) for c in t if c.isdigit()] for t in text]}

    problems = [Problem("1=", ("1",), "a.jsonl:1"), Problem("one", ("1",), "a.jsonl:2")]
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: the prompt 'one' has no tokens"):
        PromptDataset(problems, KnowsDigits(), PromptForm(max_prompt_length=8))
    bad = BadSamples()
    assert len(PromptDataset(problems, KnowsDigits(), PromptForm(max_prompt_length=8), bad)) == 1 and len(bad.found) == 1
    with pytest.raises(ConfigError, match="makes no token of any prompt"):
        PromptDataset(problems[1:], KnowsDigits(), PromptForm(max_prompt_length=8))


def test_a_row_that_the_chat_template_refuses_is_a_bad_sample_and_a_missing_template_is_said() -> None:
    tokenizer = make_tokenizer()
    form = PromptForm(max_prompt_length=8, apply_chat_template=True)
    problems = [Problem("1=", ("1",), "a.jsonl:1"), Problem(({"role": "tool", "content": "1"},), ("1",), "a.jsonl:2")]
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        PromptDataset(problems, tokenizer, form)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('role ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: the chat template refuses it: role tool"):
        PromptDataset(problems, tokenizer, form)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl does not exist"):
        load_problems(["nowhere.jsonl"])


def test_long_prompts_are_dropped_or_cut_from_the_left() -> None:
    problems = [Problem("1+1=", ("2",)), Problem("123456789=", ("0",))]
    dropped = PromptDataset(problems, TOKENIZER, PromptForm(max_prompt_length=8))
    assert len(dropped) == 1 and dropped.num_too_long == 1
    cut = PromptDataset(problems, TOKENIZER, PromptForm(max_prompt_length=8, filter_prompt_by_length=False))
    assert len(cut) == 2 and cut.num_too_long == 1
    assert TOKENIZER.decode(cut[1].token_ids) == "3456789="


def test_chat_template_wraps_strings_and_message_lists_alike() -> None:
    problems = [Problem("1+1", ("2",)), Problem(({"role": "user", "content": "1+1."},), ("2",))]
    found = PromptDataset(
        problems, TOKENIZER, PromptForm(max_prompt_length=32, apply_chat_template=True, prompt_suffix=".", system_prompt="*")
    )
    assert [prompt.text for prompt in found] == ["(*)(1+1.)=", "(1+1.)="]  # type: ignore[attr-defined]


def test_a_message_list_without_chat_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="apply_chat_template"):
        PromptDataset([Problem(({"role": "user", "content": "1"},), ("2",))], TOKENIZER, PromptForm(max_prompt_length=8))


def test_special_tokens_are_added_exactly_once() -> None:
    class WithBos:
        """A tokenizer that prepends bos where asked, as Llama's does."""

        bos_token: str | None = "<bos>"

        def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1] * add_special_tokens + TOKENIZER(t)["input_ids"] for t in text]}

        def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
            return "<bos>" + conversation[0]["content"]

    problems = [Problem("1=", ("1",)), Problem("<bos>1=", ("1",))]
    plain = PromptDataset(problems, WithBos(), PromptForm(max_prompt_length=8))
    assert plain[0].token_ids == plain[1].token_ids
    chat = PromptDataset(problems[:1], WithBos(), PromptForm(max_prompt_length=8, apply_chat_template=True))
    assert chat[0].token_ids == plain[0].token_ids


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_loader_continues_as_if_nothing_had_happened(stop_after: int, num_workers: int, tmp_path: Path) -> None:
    """Also with another number of loading processes than before."""

    def loader(num_workers: int = 0) -> PromptLoader:
        return PromptLoader(dataset(), 3, num_epochs=3, seed=7, num_workers=num_workers)

    whole = indices(loader())
    assert len(whole) == len(loader()) == 9
    interrupted = loader()
    before = indices(islice(iter(interrupted), stop_after)) if stop_after else []
    torch.save(interrupted.state_dict(), tmp_path / "data.pt")
    resumed = loader(num_workers)
    resumed.load_state_dict(torch.load(tmp_path / "data.pt", weights_only=True))
    assert before + indices(resumed) == whole


def test_each_epoch_has_its_own_order_and_drops_the_short_batch() -> None:
    loader = PromptLoader(dataset(), 3, num_epochs=2, seed=7)
    batches = indices(loader)
    first, second = batches[: loader.batches_per_epoch], batches[loader.batches_per_epoch :]
    assert first != second
    for epoch in (first, second):
        seen = [i for batch in epoch for i in batch]
        assert len(seen) == len(set(seen)) == 9
    assert batches == indices(PromptLoader(dataset(), 3, num_epochs=2, seed=7)) != indices(PromptLoader(dataset(), 3, num_epochs=2, seed=8))
    assert indices(PromptLoader(dataset(), 3, shuffle=False)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_position_may_be_continued_with_more_epochs_but_not_in_other_data() -> None:
    first = PromptLoader(dataset(), 3, num_epochs=1, seed=7)
    head = indices(first)
    state = first.state_dict()
    longer = PromptLoader(dataset(), 3, num_epochs=2, seed=7)
    longer.load_state_dict(state)
    assert head + indices(longer) == indices(PromptLoader(dataset(), 3, num_epochs=2, seed=7))
    with pytest.raises(CheckpointError, match="rollout_batch_size 3 -> 2"):
        PromptLoader(dataset(), 2, seed=7).load_state_dict(state)
    others = PromptDataset([Problem(f"{i}+{i}=", ("0",)) for i in range(10)], TOKENIZER, PromptForm(max_prompt_length=8))
    with pytest.raises(CheckpointError, match=r"problems [0-9a-f]+ -> [0-9a-f]+"):
        PromptLoader(others, 3, seed=7).load_state_dict(state)
    with pytest.raises(CheckpointError, match="num_problems 10 -> 9"):
        PromptLoader(dataset(9), 3, seed=7).load_state_dict(state)


def test_an_empty_loader_says_so() -> None:
    with pytest.raises(ConfigError, match=r"Train dataloader is empty! 2 problems remain"):
        PromptLoader(dataset(2), 3)
