"""Claims about where messages go: nowhere new until somebody asks, and then to stderr, in time's order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEAK = """
import logging, os, sys
from rlsync import logs
default = sys.argv[1] or None
logs.set_up(default)
logs.set_up(default)
log = logging.getLogger("rlsync.sync.attempt")
log.debug("a step")
log.info("a plan")
log.warning("a worry")
print(os.environ.get("RLSYNC_LOGGING_LEVEL"))
"""


def speak(level: str | None, default: str = "") -> tuple[list[str], str]:
    """What a process prints to stderr, without the time, process and thread; and the level of those that it would start."""
    environment = {key: value for key, value in os.environ.items() if key != "RLSYNC_LOGGING_LEVEL"}
    environment |= {} if level is None else {"RLSYNC_LOGGING_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", SPEAK, default], env=environment, cwd=ROOT, capture_output=True, text=True)
    return done.stderr.splitlines(), done.stdout.strip()


@pytest.mark.parametrize(
    ("level", "default", "said", "passed_on"),
    [
        (None, "", ["a worry"], "None"),  # as Python does
        (None, "INFO", ["a plan", "a worry"], "INFO"),
        ("DEBUG", "INFO", ["a step", "a plan", "a worry"], "DEBUG"),
        ("ERROR", "INFO", [], "ERROR"),
        ("", "", ["a worry"], ""),
    ],
)
def test_messages_of_the_level_are_said_once_and_by_children_too(level, default, said, passed_on):
    lines, child = speak(level, default)
    assert [line.rpartition(": ")[2] for line in lines] == said
    assert child == passed_on


def test_a_line_says_when_and_who():
    (step, *_), _ = speak("DEBUG")
    day, clock, level, process, thread, name, _ = step.split(" ", 6)
    assert (len(day), len(clock), clock[8], level, thread, name) == (5, 15, ".", "DEBUG", "MainThread", "rlsync.sync.attempt:")
    assert process.isdecimal()


def test_a_level_that_is_none_is_refused():
    assert speak("LOUD")[0][-1] == "rlsync.errors.ConfigError: RLSYNC_LOGGING_LEVEL is 'LOUD'; known are DEBUG, INFO, WARNING, ERROR"
