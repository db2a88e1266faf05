"""``rlsync doctor``: does this machine have what rlsync needs? Looks only: changes nothing and starts no engine.

Owns the order of the findings and their output; what is looked at stands in a module for each subject. Runs without torch, vLLM,
Megatron and GPUs, and says so: what has to be imported to be asked is imported in processes of its own (``probes``).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rlsync.cli.doctor import environment, gpus, host, leftovers, network, probes
from rlsync.cli.doctor.finding import Finding
from rlsync.cli.lines import wrapped

__all__ = ["Finding", "add_arguments", "examine", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a JSON list of findings instead of lines")
    parser.add_argument("--quick", action="store_true", help="import neither torch nor Megatron nor vLLM, which takes half a minute")
    parser.add_argument("--ring-bytes", type=int, help="what a ring needs in /dev/shm (rlsync plan says it): does it fit here?")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 when one of them is a problem."""
    findings = []
    for finding in examine(quick=arguments.quick, ring_bytes=arguments.ring_bytes):
        findings.append(finding)
        if not arguments.json:
            print(wrapped(str(finding), indent=14), flush=True)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def examine(*, quick: bool = False, ring_bytes: int | None = None) -> Iterator[Finding]:
    """All findings on this machine, in the order they are shown.

    Args:
        quick: leave out what has to import a framework.
        ring_bytes: size of a ring that /dev/shm has to hold, or None.
    """
    with ExitStack() as stack:
        # They take seconds and wait for one another only where they are read.
        asked = {} if quick else {name: stack.enter_context(probes.Probe(name)) for name in probes.PROBES}
        driver = gpus.ask_driver()
        yield from environment.examine("cuda" if driver.gpus else "cpu")
        facts = {name: probe.facts() for name, probe in asked.items()}
    if not quick:
        yield from environment.examine_megatron(facts["megatron"])
        yield from environment.examine_vllm(facts["engine"], os.environ)
    yield from gpus.examine(driver, facts.get("cuda"))
    yield from host.examine(ring_bytes)
    yield from network.examine()
    engine = facts.get("engine")
    prefixes = engine.get("shm_prefixes", []) if isinstance(engine, dict) else []
    yield from leftovers.examine(Path("/dev/shm"), prefixes)
