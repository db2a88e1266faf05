"""Claims about prompts: the file forms, the length rule, and a loader that resumes at the exact batch."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsync.errors import CheckpointError, ConfigError
from workers.arithmetic import make_tokenizer
from workers.data import Problem, PromptDataset, PromptForm, PromptLoader, load_problems

TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}={% endif %}"


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


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
        ("[1]\n", "a.jsonl:1: expected an object, got list"),
        ("\n", "a.jsonl: no problems in this file"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_problems([str(tmp_path / "a.jsonl")])


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
    def loader() -> PromptLoader:
        return PromptLoader(dataset(), 3, num_epochs=3, seed=7, num_workers=num_workers)

    whole = indices(loader())
    assert len(whole) == len(loader()) == 9
    interrupted = loader()
    before = indices(islice(iter(interrupted), stop_after)) if stop_after else []
    torch.save(interrupted.state_dict(), tmp_path / "data.pt")
    resumed = loader()
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
    with pytest.raises(CheckpointError, match="num_problems 10 -> 9"):
        PromptLoader(dataset(9), 3, seed=7).load_state_dict(state)


def test_an_empty_loader_says_so() -> None:
    with pytest.raises(ConfigError, match=r"Train dataloader is empty! 2 problems remain"):
        PromptLoader(dataset(2), 3)
