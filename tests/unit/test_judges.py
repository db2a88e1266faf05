"""Claims about rewards: built-in ways and functions of the user's, with real processes; what is refused, and named by its row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlsync.errors import ConfigError, RlsyncError
from tests.unit.test_check import check
from tests.unit.test_check import world as world  # the fixture
from workers.check import GRPO_CHECKS
from workers.config.grpo import RewardConfig
from workers.judges import Judge, Verdict, check_reward_function, last_box, normalised, open_judge
from workers.problems import load_problems


@dataclass(frozen=True)
class Row:
    text: str
    answers: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = "a.jsonl:1"


# A function for each thing that can go right or wrong.
FUNCTIONS = """
import os, subprocess, sys, time
from beside import OFFSET

def seen(prompts, responses, references, metadata):
    assert prompts == ["2+2="] * 2 and references == [["4", "four"]] * 2 and metadata == [{"level": 3, "tags": ["a"]}] * 2
    return [len(text) + OFFSET for text in responses]

def one_raises(prompts, responses, **others):
    return [1 / len(text) for text in responses]

def too_few(responses, **others):
    return [1.0]

def nan(responses, **others):
    return [float("nan")] * len(responses)

def nothing(responses, **others):
    print("prints")

def late(responses, **others):
    if "sleep" in responses:
        time.sleep(1000)
    if "crash" in responses:
        os._exit(3)
    return [1] * len(responses)

def runs_programs(responses, references, **others):
    found = [subprocess.run([sys.executable, "-S", "-c", text], capture_output=True) for text in responses]
    return [float(done.returncode == 0) for done in found]

def wants_more(prompts, responses, references, metadata, model):
    return [0.0]

def takes_less(responses):
    return [0.0]

async def awaited(**others):
    return []

number = 3

def huge(**others):
    return [10**400, 0]

def keyed(responses, **others):
    return {i: 1.0 for i, _ in enumerate(responses)}

def digits(responses, **others):
    return "1" * len(responses)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "beside.py").write_text("OFFSET = 0.5\n")
    path = folder / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def config(reward_type: str, **keys: Any) -> RewardConfig:
    return RewardConfig(reward_type=reward_type, **{"num_processes": 1, "reward_scale": 2.0, **keys})


def judged(reward_type: str, responses: Sequence[Sequence[str]], rows: Sequence[Row], **keys: Any) -> list[list[Verdict]]:
    with open_judge(config(reward_type, **keys)) as judge:
        return judge.judge(rows, responses)


@pytest.fixture(scope="module")
def math() -> Iterator[Judge]:
    with open_judge(config("math", reward_min_val=0.0, timeout_s=2.0)) as judge:
        yield judge


def test_math_scales_the_values_of_right_and_wrong(math: Judge) -> None:
    found = math.judge([Row("2+3=", ("5",)), Row("x", ("1", "7"))], [["5", "6"], [r"so \boxed{7}"]])
    assert found == [[Verdict(2.0, True), Verdict(0.0, False)], [Verdict(2.0, True)]]
    assert math.judge([Row("x", ("1",))], [[r"\boxed{9^{9^{9^{9}}}}"]]) == [[Verdict(0.0, False, timed_out=True)]]


@pytest.mark.parametrize(
    ("response", "reference", "equal"),
    [
        ("  Red\n", "red", True),
        ("It is \\boxed{a  Dark {blue}}.", "A dark {BLUE}", True),
        ("first \\boxed{red}, no: \\boxed{blue}", "red", False),
        ("blue.", "blue", True),
        ("ﬁve", "five", True),
        ("the red one", "red", False),
        ("\\boxed{red", "red", False),
        ("4.0", "4", False),
    ],
)
def test_exact_compares_texts_but_for_case_spaces_and_a_full_stop(response: str, reference: str, equal: bool) -> None:
    (((verdict,),)) = judged("exact", [[response]], [Row("x", ("other", reference))])
    assert (verdict.correct, verdict.reward) == ((True, 2.0) if equal else (False, -2.0))
    assert normalised(last_box("\\boxed{}")) == ""


def test_a_function_sees_prompt_responses_references_and_metadata_of_a_row_and_is_scaled(functions: Path) -> None:
    row = Row("2+2=", ("4", "four"), {"level": 3, "tags": ["a"]})
    assert judged(f"{functions}:seen", [["4", "four"], ["", "44"]], [row, row]) == [
        [Verdict(3.0), Verdict(9.0)], [Verdict(1.0), Verdict(5.0)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one_raises", "it raised ZeroDivisionError: division by zero (.*functions.py:10, in .*)"),
        ("too_few", "it returned 1 rewards for 2 responses"),
        ("nan", "it returned nan as a reward"),
        ("huge", r"it returned list \[10000"),
        ("keyed", r"it returned dict \{0: 1.0.*, expected a list of"),
        ("digits", r"it returned str '1+', expected a list of"),
        ("nothing", "it returned None, expected a list of 2 numbers"),
    ],
)
def test_a_function_that_fails_ends_the_run_and_names_the_row(functions: Path, name: str, said: str) -> None:
    rows = [Row("a", where="a.jsonl:3"), Row("b", where="a.jsonl:7")]
    with pytest.raises(RlsyncError, match=rf"functions.py:{name} failed for a.jsonl:(3 \(and for 1 more rows\)|7): {said}"):
        judged(f"{functions}:{name}", [["a", "b"], ["c", ""]], rows)
    if name == "one_raises":
        assert judged(f"{functions}:{name}", [["a", "b"]], rows[:1]) == [[Verdict(2.0), Verdict(2.0)]]


def test_a_call_that_hangs_or_ends_its_process_costs_its_own_row_alone(functions: Path) -> None:
    rows = [Row("a")] * 4
    found = judged(f"{functions}:late", [["x"], ["sleep", "y"], ["crash"], ["z"]], rows, timeout_s=2.0, reward_min_val=-0.5)
    late = Verdict(-1.0, timed_out=True)
    assert found == [[Verdict(2.0)], [late, late], [late], [Verdict(2.0)]]


def test_programs_that_a_function_starts_take_no_task_and_end_with_it(functions: Path, tmp_path: Path) -> None:
    """One that reads finds nothing, and one that hangs does not outlive the limit of its call."""
    hangs = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(1000)"
    reads = "import sys; assert sys.stdin.read() == ''"
    found = judged(f"{functions}:runs_programs", [[reads], ["1 / 0"], [hangs], [reads]], [Row("a")] * 4, timeout_s=5.0)
    assert found == [[Verdict(2.0)], [Verdict(0.0)], [Verdict(-2.0, timed_out=True)], [Verdict(2.0)]]
    try:
        psutil.Process(int((tmp_path / "pid").read_text())).wait(timeout=10)
    except psutil.NoSuchProcess:
        pass


def test_a_file_that_cannot_be_imported_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import not_installed_anywhere\ndef score(**batch): return []\n")
    check_reward_function(f"{path}:score")  # which imports nothing, and so cannot tell
    with pytest.raises(ConfigError, match=r"broken.py cannot be imported: ModuleNotFoundError: No module named 'not_installed_anywhere'"):
        judged(f"{path}:score", [], [])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sen", "does not define sen at its top level; it defines digits, huge, keyed, late, nan, nothing, one_raises, runs"),
        ("takes_less", "line 35. does not take prompts, references, metadata; it is called with the keywords prompts, responses"),
        ("wants_more", "line 32. wants model; it is called with"),
        ("awaited", "awaited is a coroutine"),
        ("seen", None), ("late", None), ("OFFSET", None), ("number", None),
    ],
)  # fmt: skip
def test_what_a_file_defines_is_read_without_importing_it(functions: Path, name: str, said: str | None) -> None:
    if said is None:
        return check_reward_function(f"{functions}:{name}")
    with pytest.raises(ConfigError, match=said):
        check_reward_function(f"{functions}:{name}")


def test_something_that_cannot_be_called_is_refused_when_it_is_imported(functions: Path) -> None:
    with pytest.raises(ConfigError, match="TypeError: number holds int, which cannot be called"):
        judged(f"{functions}:number", [], [])


@pytest.mark.parametrize(
    ("reward_type", "said"),
    [
        ("maths", "reward.reward_type is 'maths', expected math, exact, or PATH.py:function"),
        ("/gone.py:score", "/gone.py cannot be read: No such file"),
        ("{0}:sen", "does not define sen"),
        ("{0}:seen", None),
        ("exact", None),
    ],
)
def test_the_check_of_a_run_names_what_is_wrong_with_its_reward(world, functions, monkeypatch, reward_type: str, said: str | None) -> None:
    report = check(world, monkeypatch, reward={"reward_type": reward_type.format(functions)})
    assert [text for _, text in report.findings if said is None or said not in text] == [] and bool(report.findings) == (said is not None)
    assert any(known.__name__ == "check_reward" for known in GRPO_CHECKS)


def test_fields_of_a_row_travel_with_its_problem_where_a_function_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "solutions": "1", "level": 3, "tests": ["x"]}\n{"prompt": "b", "kind": "free"}\n')
    problems = load_problems([str(path)], metadata=True)
    assert [(problem.answers, problem.metadata) for problem in problems] == [(("1",), {"level": 3, "tests": ["x"]}), ((), {"kind": "free"})]
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: no field 'solutions'"):
        load_problems([str(path)])
