"""Claims about rewards, with real verifier processes: what is correct, and that no response can hang or break the pool."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsync.errors import RlsyncError
from tests.deadlines import HANG_S
from workers.reward import VerifierPool, is_plain, unreadable_references

# Takes longer than any run: native big-integer code that no signal interrupts.
HANGS = r"\boxed{9^{9^{9^{9}}}}"


TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(num_processes=2, timeout_s=TIMEOUT_S) as pool:
        yield pool


CASES = [
    (r"so it is \boxed{18}", ["18"], True),
    (r"so it is \boxed{18}", ["19"], False),
    (r"so it is \boxed{19}", ["17", "19"], True),
    (r"\boxed{\frac{1}{2}}", ["0.5"], True),
    (r"\boxed{0.5}", [r"\frac{1}{2}"], True),
    (r"\boxed{0.5}", [r"$\frac{1}{2}$"], True),
    (r"\boxed{\sqrt{8}}", [r"2\sqrt{2}"], True),
    (r"first \boxed{3}, no: \boxed{4}", ["4"], True),
    ("The answer is 1,234.", ["1234"], True),
    ("17", ["17"], True),
    ("17", ["7"], False),
    ("", ["7"], False),
    ("I do not know", ["7"], False),
    (r"\boxed{x+1", ["7"], False),
]


# What data sets write, and a response that is right.
REFERENCES = [
    ("$5$.", r"\boxed{5}"), ("5 dollars", r"\boxed{5}"), ("$5$ dollars", r"\boxed{5}"), (r"\$5", r"\boxed{5}"), ("5€", r"\boxed{5}"),
    ("5.", r"\boxed{5}"), ("**5**", r"\boxed{5}"), (r"\(5\)", r"\boxed{5}"), ("$1,234.50", r"\boxed{1234.5}"), ("-3 units", r"\boxed{-3}"),
    ("12 square meters", r"\boxed{12}"), ("½", r"\boxed{0.5}"), ("√2", r"\boxed{\sqrt{2}}"), ("x²", r"\boxed{x^2}"),
    ("∞", r"\boxed{\infty}"),
    ("1,200%", r"\boxed{1,200\%}"), ("1,200%", r"\boxed{1200%}"), (r"1,200.5\%", r"\boxed{1,200.5%}"),
    ("50%", r"\boxed{50\%}"), ("50%", "It is 50%."), ("5 x", r"\boxed{5x}"), ("90 degrees", r"\boxed{90^\circ}"),
    (r"$\frac{1}{2}$.", r"\boxed{0.5}"), ("Paris", r"\boxed{Paris}"), ("(B)", r"\boxed{B}"), ("true", r"\boxed{true}"),
    ("[1,2)", r"\boxed{[1,2)}"),
]  # fmt: skip


def test_references_are_read_as_data_sets_write_them(pool: VerifierPool) -> None:
    found = pool.check([response for _, response in REFERENCES], [[answer] for answer, _ in REFERENCES])
    assert [pair for pair, correct in zip(REFERENCES, found, strict=True) if not correct] == []
    assert pool.check([r"\boxed{6}"] * len(REFERENCES), [[answer] for answer, _ in REFERENCES]) == [False] * len(REFERENCES)


# Numbers whose thousands are apart: what is right, and what math-verify would take them for.
SPACED = [
    (r"10\,000", r"\boxed{10000}", r"\boxed{0}"), (r"$10\ 000$", r"\boxed{10,000}", r"\boxed{7\,000}"),
    ("10 000", r"\boxed{10 000}", r"\boxed{10}"),
    ("-1 234 567.5", r"\boxed{-1234567.5}", r"\boxed{-1}"), (r"x = 3\;000", r"\boxed{3000}", r"\boxed{0}"),
    (r"\boxed{3\,000\text{ km}}", r"\boxed{3000}", r"\boxed{0}"), ("1,000", r"\boxed{1\,000}", r"\boxed{1}"),
    ("2½", r"\boxed{2½}", r"\boxed{1}"), (r"\boxed{50\%}", r"\boxed{0.5}", r"\boxed{50}"),
    # Not so grouped.
    ("(1, 200)", r"\boxed{(1,200)}", r"\boxed{1200}"), ("1 1/2", r"\boxed{1.5}", r"\boxed{11/2}"),
]  # fmt: skip


@pytest.mark.parametrize("side", ["right", "wrong"])
def test_thousands_may_be_apart_in_references_and_in_responses(pool: VerifierPool, side: str) -> None:
    found = pool.check([right if side == "right" else wrong for _, right, wrong in SPACED], [[answer] for answer, _, _ in SPACED])
    assert [row for row, correct in zip(SPACED, found, strict=True) if correct != (side == "right")] == []


# Numbers with words that change them: what is right, and what math-verify would take them for.
SPOKEN = [
    ("5 million", r"\boxed{5000000}", r"\boxed{5}"), ("5 million", r"\boxed{5\text{ million}}", r"\boxed{5}"),
    (r"5\text{ million}", r"\boxed{5000000}", r"\boxed{5}"), (r"\boxed{5\text{ million}}", r"\boxed{5000000}", r"\boxed{5}"),
    ("2.5 million dollars", r"\boxed{2500000}", r"\boxed{2.5}"), ("2 hundred thousand", r"\boxed{200000}", r"\boxed{2}"),
    ("3 dozen", r"\boxed{36}", r"\boxed{3}"), ("1 1/2", r"\boxed{1.5}", r"\boxed{1}"), ("-1 1/2", r"\boxed{-1.5}", r"\boxed{-0.5}"),
    ("1 1/2", r"\boxed{1 1/2}", r"\boxed{1}"), ("1 and 1/2 cups", r"\boxed{\frac{3}{2}}", r"\boxed{1}"),
    ("1/2 cup", r"\boxed{0.5}", r"\boxed{1}"),
    ("12 meters squared", r"\boxed{12}", r"\boxed{144}"), ("3 seconds", r"\boxed{3}", r"\boxed{2}"),
]  # fmt: skip


def test_words_that_change_a_number_are_part_of_its_value(pool: VerifierPool) -> None:
    assert pool.check([right for _, right, _ in SPOKEN], [[answer] for answer, _, _ in SPOKEN]) == [True] * len(SPOKEN)
    assert pool.check([wrong for _, _, wrong in SPOKEN], [[answer] for answer, _, _ in SPOKEN]) == [False] * len(SPOKEN)
    assert unreadable_references([answer for answer, _, _ in SPOKEN], num_processes=1, timeout_s=TIMEOUT_S) == set()


def test_words_that_are_neither_unit_nor_magnitude_make_a_reference_unreadable(pool: VerifierPool) -> None:
    """math-verify reads products of letters, or drops what it does not know."""
    refused = ["2 thirds", "3 squared", "3 cubed", "10 choose two", "10 choose 2", "5 factorial", "2 theta", "2 root three", "5 and a half",
               "10 over 3",
               "3 half dozen", "2-thirds", "1 3/2", r"2\text{ thirds}", "x = 5 million", "101 base two", r"5 million\%"]  # fmt: skip
    assert unreadable_references(refused, num_processes=1, timeout_s=TIMEOUT_S) == set(refused)
    assert pool.check([r"\boxed{2}", r"\boxed{3}"], [["2 thirds"], ["3 squared"]]) == [False, False]
    read = [r"2\theta", r"\frac{1}{2}", r"1 \frac{1}{2}", "two thirds", "12 square meters", "60 miles per hour", "7 cm", "x = 5"]
    assert unreadable_references(read, num_processes=1, timeout_s=TIMEOUT_S) == set()


def test_references_that_nothing_can_equal_are_found(pool: VerifierPool) -> None:
    unreadable = [r"\sqrt{2", "$", ".", "-", "𝔸"]
    readable = [answer for answer, _ in REFERENCES]
    assert unreadable_references([*readable, *unreadable], num_processes=2, timeout_s=2.0) == set(unreadable)


def test_plain_references_are_those_that_math_verify_reads_for_certain(pool: VerifierPool) -> None:
    texts = [answer for answer, _ in REFERENCES] + [
        "7",
        "-7",
        "+7",
        ".5",
        "7.25",
        "1,000",
        "3/4",
        "-3/4",
        "C",
        "yes",
        "no solution",
        "7 cm",
    ]
    plain = [text for text in texts if is_plain(text) and text != "true"]
    assert len(plain) > 15
    assert pool.can_read(plain) == [True] * len(plain)
    assert not is_plain("1/0") and not is_plain("") and not is_plain("-")


@pytest.mark.parametrize("order", [1, -1])
def test_answers_are_judged_by_value_and_in_any_order(pool: VerifierPool, order: int) -> None:
    cases = CASES[::order]
    found = pool.check([response for response, _, _ in cases], [answers for _, answers, _ in cases])
    assert found == [expected for _, _, expected in cases]


def test_a_hanging_check_is_wrong_and_its_neighbours_and_the_pool_live_on(pool: VerifierPool) -> None:
    replaced = pool.num_replaced
    assert pool.check([r"\boxed{1}", HANGS, r"\boxed{2}", HANGS, r"\boxed{3}"], [["1"], ["1"], ["2"], ["1"], ["3"]]) == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert pool.num_replaced == replaced + 2
    assert pool.check([r"\boxed{4}"], [["4"]]) == [True]


def test_a_killed_process_is_replaced(pool: VerifierPool) -> None:
    for process in pool._processes:
        os.kill(process._popen.pid, signal.SIGKILL)
        process._popen.wait()
    assert pool.check([r"\boxed{4}"] * 4, [["4"]] * 4) == [True] * 4


def test_a_task_whose_process_is_killed_is_done_once_more_and_then_counts_as_wrong(pool: VerifierPool) -> None:
    """By the kernel for want of memory, say: the response is innocent. One that takes its process with it every time is not."""
    replaced, killed = pool.num_replaced, []

    def kill(count: int, checked: threading.Event) -> None:
        while len(killed) < count and not checked.is_set():
            for process in [process for process in pool._processes if process.task == 0 and process._popen.pid not in killed]:
                killed.append(process._popen.pid)
                os.kill(process._popen.pid, signal.SIGKILL)
            time.sleep(0.01)

    for count in (1, 2):
        killed.clear()
        checked = threading.Event()
        killer = threading.Thread(target=kill, args=(count, checked), daemon=True)
        killer.start()
        assert pool.check([HANGS, r"\boxed{4}"], [["1"], ["4"]]) == [False, True]
        checked.set()
        killer.join(timeout=HANG_S)
        assert len(killed) == count
    # One run: killed, done again, out of time. The other: killed, done again, killed.
    assert pool.num_replaced == replaced + 4


def test_a_call_that_is_interrupted_leaves_no_answer_to_the_next(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.check([r"\boxed{1}"], [["1"]])
    assert pool.check([r"\boxed{1}"], [["2"]]) == [False]


def test_time_that_a_process_waits_for_the_processor_is_not_counted(pool: VerifierPool) -> None:
    """Stopped for longer than its timeout in the middle of a task, a process answers it all the same."""
    stopped = []

    def stop_and_go_on() -> None:
        while not stopped:
            time.sleep(0.01)
            stopped.extend(process for process in pool._processes if process.task is not None)
        for process in stopped:
            os.kill(process._popen.pid, signal.SIGSTOP)
        time.sleep(1.5 * TIMEOUT_S)
        for process in stopped:
            os.kill(process._popen.pid, signal.SIGCONT)

    replaced = pool.num_replaced
    stopper = threading.Thread(target=stop_and_go_on, daemon=True)
    stopper.start()
    count = 500
    assert pool.check([r"\boxed{\sqrt{8}}"] * count, [[r"2\sqrt{2}"]] * count) == [True] * count
    stopper.join(timeout=HANG_S)
    assert stopped and pool.num_replaced == replaced


def test_closing_ends_every_process_and_is_idempotent() -> None:
    pool = VerifierPool(num_processes=1)
    pid = pool._processes[0]._popen.pid
    pool.close()
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ValueError, match="closed"):
        pool.check(["1"], [["1"]])


def test_an_installation_that_cannot_verify_raises_instead_of_judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named math_verify' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RlsyncError, match="did not start") as caught:
        VerifierPool(num_processes=1)
    assert "No module named math_verify" in str(caught.value)


def test_lengths_must_agree(pool: VerifierPool) -> None:
    with pytest.raises(ValueError, match="2 responses but 1 lists"):
        pool.check(["1", "2"], [["1"]])
