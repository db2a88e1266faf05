"""Engines of every shape on CUDA: after a sync each is a fresh engine, awake or out of sleep, with and without CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsync.engine.handles.local import Engine
from rlsync.engine.state import state_difference
from tests.gpu.actor import GpuActor
from tests.gpu.engines import LAYERS, Answers, State, addresses, answers, start, state, told, worst
from tests.models import save_tiny_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(520)

_CALL_S = 60.0
# What two runs of the same kernels on the same weights may differ by: nothing, but for the order of sums over GPUs.
_LOGPROB_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    """Two engines of one shape, and the actor that syncs them. GPUs are those of the first and of the second engine."""

    gpus: tuple[str, str]
    num_actor_ranks: int
    dtype: str
    enforce_eager: bool
    model: dict[str, Any]


CASES = [
    pytest.param(Case(("0", "0"), 1, "float16", False, {"family": "qwen2"}), id="fp16-graphs", marks=pytest.mark.gpu(1)),
    pytest.param(Case(("0", "0"), 1, "bfloat16", True, {"family": "qwen3", "tied": True}), id="bf16-eager", marks=pytest.mark.gpu(1)),
    # Neither engine sees the other's GPU, nor the second actor rank the first one's.
    pytest.param(Case(("0", "1"), 2, "bfloat16", False, {"family": "llama"}), id="narrowed", marks=pytest.mark.gpu(2)),
    # One key-value head, which both workers hold.
    pytest.param(
        Case(("0,1", "0,1"), 2, "bfloat16", False, {"family": "qwen2", "num_key_value_heads": 1}), id="tp2-one-kv-head",
        marks=pytest.mark.gpu(2),
    ),
]  # fmt: skip


class Pair:
    """Engines started from folders ``a`` and ``b``, and what each held and answered before its first sync."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case = case
        self.folders: dict[str, Path] = {}
        self.engines: dict[str, Engine] = {}
        self.fresh: dict[str, State] = {}
        self.answers: dict[str, Answers] = {}
        self.addresses: dict[str, list[dict[str, int]]] = {}
        self._actor: GpuActor | None = None
        dtype = getattr(torch, case.dtype)
        try:
            for seed, (name, gpus) in enumerate(zip("ab", case.gpus, strict=True)):
                folder = self.folders[name] = save_tiny_model(root / name, seed=seed, dtype=dtype, num_hidden_layers=2, **case.model)
                engine = self.engines[name] = start(
                    name, folder, gpus, dtype=case.dtype, enforce_eager=case.enforce_eager, enable_sleep_mode=True
                )
                self.fresh[name], self.answers[name], self.addresses[name] = state(engine), answers(engine), addresses(engine)
        except BaseException:
            self.close()
            raise
        for one, other in zip(self.fresh["a"], self.fresh["b"], strict=True):
            assert len(state_difference(one, other)) > 10, "the two versions differ"
        assert self.answers["a"] != self.answers["b"]

    @contextlib.contextmanager
    def connected(self, **settings: Any) -> Iterator[GpuActor]:
        """The actor, connected with both engines."""
        if self._actor is None:
            self._actor = GpuActor(self.folders["a"], self.case.num_actor_ranks)
        with self._actor.connected(list(self.engines.values()), **settings):
            yield self._actor

    def differences(self, name: str) -> list[tuple[str, ...]]:
        """By worker of both engines: where it is not what a fresh engine of a version is."""
        held = [state(engine) for engine in self.engines.values()]
        return [state_difference(one, other) for found in held for one, other in zip(found, self.fresh[name], strict=True)]

    def check(self, name: str) -> float:
        """Both engines are fresh engines of a version: in state, in answers, and with everything where it was."""
        assert not any(self.differences(name)), self.differences(name)
        assert {key: addresses(engine) for key, engine in self.engines.items()} == self.addresses
        apart = max(worst(answers(engine), self.answers[name]) for engine in self.engines.values())
        assert apart <= _LOGPROB_TOLERANCE
        return apart

    def close(self) -> None:
        if self._actor is not None:
            self._actor.close()
        for engine in self.engines.values():
            engine.close()


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(request.param, tmp_path_factory.mktemp("pair"))
    yield made
    made.close()


@pytest.mark.parametrize("staging", ["auto", "always"])
def test_two_engines_become_fresh_ones_of_each_version(pair: Pair, staging: str) -> None:
    """Version after version, and the same one twice."""
    with pair.connected(staging=staging) as actor:
        for version, name in enumerate("abba"):
            actor.take(pair.folders[name])
            report = actor.sync(version)
            apart = pair.check(name)
        assert (report.transport, report.sinks) == ("ipc", ("direct",))
        assert report.max_redundancy == 1.0 and sum(report.bytes_by_link.values()) == report.bytes
        assert (report.bytes_by_link["same host"] > 0) == (pair.case.num_actor_ranks > 1), "ranks hold what engines on other GPUs need"
        assert report.bytes_by_link["same device"] > 0
        assert (report.num_buckets == 1) == (staging == "auto")
    print(f"\nSYNC {staging}: logprobs {apart:.1e}; {told(report)}")


@pytest.mark.parametrize("staging", ["auto", "always"])
def test_engines_that_slept_become_fresh_ones(pair: Pair, staging: str) -> None:
    """What sleep drops comes back, padding included; a sync of weights alone goes between the two wakes."""
    with pair.connected(staging=staging) as actor:
        for version, name in enumerate("bab"):
            for engine in pair.engines.values():
                engine.sleep(2, _CALL_S)
                assert engine.state == "dirty"
                engine.wake(["weights"], _CALL_S)
            assert all(pair.differences(name)), "what sleep dropped is no version: here a sync has to do something"
            actor.take(pair.folders[name])
            report = actor.sync(version)
            for engine in pair.engines.values():
                engine.wake(["kv_cache"], _CALL_S)
            apart = pair.check(name)
    print(f"\nSLEEP {staging}: logprobs {apart:.1e}; {told(report)}")


@pytest.mark.gpu(2)
@pytest.mark.parametrize("spec", LAYERS)
def test_an_engine_of_two_workers_follows_a_megatron_actor_of_two(tmp_path: Path, spec: str) -> None:
    _follow(tmp_path, "qwen2", {"tp_size": 2}, "bfloat16", ["0,1"], enforce_eager=True, spec=spec)


@pytest.mark.gpu(4)
@pytest.mark.parametrize(
    ("topology", "dtype", "gpus", "enforce_eager"),
    [
        # An engine reads ranks whose GPUs it does not see.
        ({"tp_size": 2, "pp_size": 2}, "bfloat16", ["0,1", "2,3"], True),
        # Two key-value heads for four workers, and fp32 parameters that become fp16 on the way.
        ({"tp_size": 2, "dp_size": 2}, "float16", ["0,1,2,3"], True),
    ],
    ids=["two-engines-of-two", "one-engine-of-four"],
)
def test_engines_follow_a_megatron_actor_of_four(
    tmp_path: Path, topology: dict[str, int], dtype: str, gpus: list[str], enforce_eager: bool
) -> None:
    _follow(tmp_path, "qwen3", topology, dtype, gpus, enforce_eager=enforce_eager)


def _follow(
    root: Path, family: str, topology: dict[str, int], dtype: str, gpus: list[str], *, enforce_eager: bool, spec: str = "auto"
) -> None:
    folder = save_tiny_model(root / "hf", family)
    outputs = run_ranks(
        len({gpu for several in gpus for gpu in several.split(",")}), "tests.integration.oracle_ranks", "sync_and_compare", timeout_s=480,
        folder=str(folder), topology=topology, out_dir=str(root), dtype=dtype, enforce_eager=enforce_eager, gpus=gpus, transport="ipc",
        verify="full", spec=spec,
    )  # fmt: skip
    print(f"\nMEGATRON {topology} -> {gpus}: " + outputs[0][outputs[0].index("ORACLE") :].splitlines()[0])
