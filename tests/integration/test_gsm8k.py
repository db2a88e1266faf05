"""Claims about real data, on every problem of GSM8K: loader, template, prompt filter and verifier.

The data is not part of this repository: ``RLSYNC_GSM8K_DIR``, or ``../shared/data/gsm8k`` beside the checkout, holds
``train.jsonl`` and ``test.jsonl``. Where they are absent these tests skip and say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.data import PromptDataset, PromptForm, PromptLoader
from workers.problems import Problem, load_problems
from workers.reward import VerifierPool
from workers.synthetic import make_tokenizer

FOLDER = Path(os.environ.get("RLSYNC_GSM8K_DIR", Path(__file__).parents[3] / "shared" / "data" / "gsm8k"))
FILES = [str(FOLDER / name) for name in ("train.jsonl", "test.jsonl")]
NUM_PROBLEMS = 7473 + 1319

pytestmark = pytest.mark.skipif(
    not all(Path(name).is_file() for name in FILES),
    reason=f"GSM8K is not at {FOLDER}; set RLSYNC_GSM8K_DIR to a folder with train.jsonl and test.jsonl",
)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return load_problems(FILES)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(num_processes=2) as pool:
        yield pool


def perturbed(answer: str, index: int) -> str:
    """A wrong answer near the right one: off by one, ten times, negated or halved and shifted."""
    value = float(answer.replace(",", ""))
    wrong = (value + 1, value * 10 + 1, -value - 1, value / 2 + 0.25)[index % 4]
    return f"{wrong:g}" if abs(wrong) < 1e6 else str(round(wrong))


def test_every_problem_is_read_with_a_numeric_reference(problems: list[Problem]) -> None:
    assert len(problems) == NUM_PROBLEMS
    assert all(isinstance(problem.prompt, str) and problem.prompt and len(problem.answers) == 1 for problem in problems)
    for problem in problems:
        float(problem.answers[0].replace(",", ""))


def test_every_reference_answer_is_correct_and_every_perturbed_one_is_not(problems: list[Problem], pool: VerifierPool) -> None:
    forms = (r"So we get \boxed{%s}.", "The answer is %s.", "#### %s")
    responses = [forms[i % len(forms)] % problem.answers[0] for i, problem in enumerate(problems)]
    references = [problem.answers for problem in problems]
    judged = pool.check(responses, references)
    assert [problems[i] for i, correct in enumerate(judged) if not correct] == []
    wrong = [forms[i % len(forms)] % perturbed(problem.answers[0], i) for i, problem in enumerate(problems)]
    judged = pool.check(wrong, references)
    assert [(wrong[i], problems[i]) for i, correct in enumerate(judged) if correct] == []
    assert pool.num_replaced == 0


def test_template_filter_and_loader_take_all_problems(problems: list[Problem]) -> None:
    """With a character tokenizer, so lengths are those of the texts."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    suffix = "\nPut the answer in \\boxed{}."
    limit = 400
    form = PromptForm(max_prompt_length=limit, apply_chat_template=True, prompt_suffix=suffix)
    dataset = PromptDataset(problems, tokenizer, form)
    expected = [p for p in problems if len(f"<user>{p.prompt}{suffix}<assistant>") <= limit]
    assert len(dataset) == len(expected) and dataset.num_too_long == NUM_PROBLEMS - len(expected) > 0
    assert dataset[0].text == f"<user>{expected[0].prompt}{suffix}<assistant>" and len(dataset[0].token_ids) == len(dataset[0].text)
    seen = [prompt.index for batch in PromptLoader(dataset, 64, seed=1) for prompt in batch]
    assert len(seen) == len(set(seen)) == len(dataset) // 64 * 64
