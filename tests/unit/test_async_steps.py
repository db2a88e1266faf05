"""Claims about rollouts one step ahead of training (``runner.async_steps``): the order of a run's phases, with a stand-in for ranks and
engines that answers by the version it holds and the seed it is given, and refuses what would spoil real ones."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from rlsync.engine.handles import Completion
from rlsync.errors import ConfigError, RlsyncError
from rlsync.layout.topology import Topology
from tests.deadlines import HANG_S
from tests.unit.test_check import check, values
from tests.unit.test_check import world as world  # the fixture
from tests.unit.test_config import minimal
from tests.unit.test_picture_prompts import RECIPE, written
from tests.unit.test_picture_prompts import values as picture_values
from tests.unit.test_sft_config import minimal as sft_minimal
from workers import grpo_runner, worker_group
from workers.config import RunConfig, load_config, validate_world
from workers.data import Prompt
from workers.grpo_runner import GrpoRunner
from workers.judges import Beside, ExactJudge
from workers.picture_world import build_picture_world
from workers.preparation import prepare
from workers.resume import DATA_STATE, Beginning
from workers.rollout_ahead import STATE, Batch, Rollout, outdated, restored, state_of
from workers.row_loader import LEFT_OUT
from workers.samples import Sample
from workers.worker_group import WorkerGroup, _Round

STEPS = 6
FRESH = Beginning()


class Group:
    """Ranks and engines. Where rollouts go ahead, training ends when the next one has begun, and that one when training has.

    Attributes:
        trained: of each step, response and version of its samples, and their advantages.
        syncs: versions in their order.
        logprobs: of each step, those that its samples had before they were scored.
        scores_early: prompts behind which engines go on only when the actor has scored.
    """

    topology, num_devices, engine_ids = Topology(tp_size=2), 3, ("0",)
    aside = WorkerGroup.aside

    def __init__(self, version: int, steps_ahead: int, loses: Sequence[int] = ()) -> None:
        """``steps_ahead``: trainings that have a rollout beside them; ``loses``: of those rollouts, which an engine does not survive."""
        self.version, self.held, self.num_replaced = version, -1, 0
        self.trained: list[list[tuple[tuple[int, ...], int | None, float]]] = []
        self.syncs: list[int] = []
        self.logprobs: list[list[list[float] | None]] = []
        self.scores_early: tuple[int, ...] = ()
        self._steps_ahead, self._loses, self._num_ahead = steps_ahead, loses, 0
        self._aside: list[Future[Any]] = []
        self._generates, self._trains = threading.Semaphore(0), threading.Semaphore(0)
        self._scores = threading.Semaphore(0)
        self._is_generating = False

    def connect(self) -> None: ...

    def generate(
        self, prompts: Sequence[Any], sampling: Mapping[str, Any], seeds: Sequence[int] | None, on_groups: Any, *, some_logprobs: bool
    ) -> None:
        assert seeds is not None and self.held >= 0 and not self._is_generating
        self._is_generating, held = True, self.held
        try:
            if threading.current_thread() is not threading.main_thread():
                self._num_ahead += 1
                self._generates.release()
                assert self._trains.acquire(timeout=HANG_S), "the actor trains meanwhile"
                if self._num_ahead in self._loses:
                    raise RlsyncError("process 7 of engine 0 has ended")
            for number, seed in reversed([*enumerate(seeds)]):
                group = (Completion((3 + (held * 5 + seed + i) % 9,), (-0.5,), "stop", held, held) for i in range(sampling["n"]))
                on_groups({number: tuple(group)})
                if self.scores_early and number in self.scores_early:
                    assert self._scores.acquire(timeout=HANG_S), "the actor scores meanwhile"
        finally:
            self._is_generating = False

    def on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        if method == "sync":
            assert not self._is_generating
            (self.held,) = arguments
            self.syncs.append(self.held)
            return [SimpleNamespace(metrics=dict)]
        if method == "score_early":
            ((batch,),) = arguments
            self._scores.release()
            return [([torch.full((s.length,), float(s.response_ids[0])) for s in batch.samples], None), (None, None)]
        if method == "train":
            if self._steps_ahead:
                self._steps_ahead -= 1
                assert self._generates.acquire(timeout=HANG_S), "engines generate meanwhile"
                self._trains.release()
            ((batch,),) = arguments
            self.trained.append([(s.response_ids, s.version, s.advantage) for s in batch.samples])
            self.logprobs.append([None if s.old_logprobs is None else s.old_logprobs.tolist() for s in batch.samples])
            self.version += 1
            return [[{}]]
        return [None]

    def generating_s(self, since_s: float, until_s: float) -> float:
        return 0.0

    def lost_engines(self, error: RlsyncError) -> dict[int, str]:
        return {0: str(error)}

    def replace_engines(self, numbers: Sequence[int]) -> None:
        self.held = -1
        self.num_replaced += len(numbers)


def config(world: Path, **sections: dict[str, Any]) -> RunConfig:
    base = values(world)
    runner = {**base["runner"], "async_steps": 1, "max_steps": STEPS}
    sections = {"runner": runner, "reward": {"reward_type": "exact"}, **sections}
    rollout = {**base["rollout"], "max_engine_restarts": 1}
    return load_config(values(world, rollout=rollout, **sections))


@pytest.fixture
def begun(world, monkeypatch):
    """A function that makes a runner whose processes have come up as they would at its first step, or behind a checkpoint's."""
    monkeypatch.setattr(grpo_runner, "ray", SimpleNamespace(put=lambda value: value))

    def begin(found: RunConfig, beginning: Beginning = FRESH, loses: Sequence[int] = ()) -> tuple[GrpoRunner, Group]:
        runner = GrpoRunner(found)
        runner._prepared = prepare(found, beginning)
        runner._batches, runner._judge, runner._total = iter(runner._prepared.data.loader), ExactJudge(found.reward), STEPS
        nothing = SimpleNamespace(before_sync=bool, after_sync=bool, after_rollout=bool, take_seconds=dict)
        runner._colocation, runner.notes = nothing, []
        runner._screen = SimpleNamespace(phase=lambda name: None, note=runner.notes.append, component=lambda *_: None)
        runner._log = SimpleNamespace(show=lambda metrics: None)
        group = Group(beginning.step, (STEPS - beginning.step - 1) * found.runner.async_steps, loses)
        runner._group = group
        runner._restore_ahead()
        return runner, group

    return begin


def steps(runner: GrpoRunner, first: int, last: int) -> list[dict[str, float]]:
    """Their metrics, but for seconds."""
    found = [runner._step(step, {})[0] for step in range(first, last + 1)]
    return [{name: value for name, value in metrics.items() if not name.startswith("time/")} for metrics in found]


def test_engines_generate_a_step_ahead_with_the_weights_before_and_are_synced_between_rollouts(world, begun) -> None:
    runner, group = begun(config(world))
    lags = [metrics["rollout/version_lag"] for metrics in steps(runner, 1, STEPS)]
    assert lags == [0, 1, 1, 1, 1, 1] and group.syncs == [0, 1, 2, 3, 4, 5]
    assert [{version for _, version, _ in samples} for samples in group.trained] == [{0}, {0}, {1}, {2}, {3}, {4}]
    in_turn, other = begun(config(world, runner={**values(world)["runner"], "async_steps": 0}))
    assert [metrics["rollout/version_lag"] for metrics in steps(in_turn, 1, STEPS)] == [0] * 6
    # Seeds are of steps: where versions are the same, samples are.
    assert group.trained[0] == other.trained[0] and group.trained[1:] != other.trained[1:]


def test_rows_that_are_left_out_are_counted_in_their_step(tmp_path, begun) -> None:
    world = build_picture_world(tmp_path / "world", RECIPE)
    good = [json.loads(line) for line in world.train_path.read_text().splitlines()[:6]]
    rows = written(world, "left_out.jsonl", *good, {**good[0], "image": "gone.png"}, {**good[0], "question": "Which?" * 20})
    data = {"train_data_paths": rows, "rollout_batch_size": 8, "on_bad_sample": "skip", "shuffle": False}
    sections = picture_values(world, data=data, algorithm={"recompute_logprobs": True}, rollout={"max_engine_restarts": 1})
    sections["runner"] |= {"max_epochs": STEPS, "max_steps": STEPS}
    runner, _ = begun(load_config(sections))
    counted = [[metrics[name] for name in LEFT_OUT] for metrics in steps(runner, 1, 2)]
    loader = prepare(load_config(sections), FRESH).data.loader
    read, expected = iter(loader), []
    for _ in counted:
        next(read)
        expected.append([*loader.take_left_out().values()])
    assert counted == expected and all(bad and too_long for bad, too_long in counted)


def test_the_actor_scores_prompts_that_have_ended_while_engines_answer_others(world, begun) -> None:
    """Of four prompts, the last of which ends first, two at a time."""
    in_turn = {**values(world)["runner"], "async_steps": 0}
    runner, group = begun(config(world, runner=in_turn, algorithm={"early_scoring_prompts": 2}))
    group.scores_early = (2, 0)
    metrics = steps(runner, 1, 2)
    plain, other = begun(config(world, runner=in_turn))
    assert steps(plain, 1, 2) == metrics and other.trained == group.trained and other.logprobs == [[None] * 8] * 2
    # Each has its own, in the order of training.
    scores = [[row[0] for row in step if row is not None] for step in group.logprobs]
    assert scores == [[float(ids[0]) for ids, _, _ in samples] for samples in group.trained]


def test_a_resumed_run_trains_on_the_samples_that_the_uninterrupted_one_had_under_way(world, begun, tmp_path) -> None:
    whole, group = begun(config(world))
    expected = steps(whole, 1, 3)
    (tmp_path / DATA_STATE).parent.mkdir()
    torch.save(whole._data_state(), tmp_path / DATA_STATE)
    expected = steps(whole, 4, STEPS)
    resumed, other = begun(config(world), Beginning(tmp_path, 3))
    assert steps(resumed, 4, STEPS) == expected and other.trained == group.trained[3:]
    # In turn it draws the same prompts, with the newest weights.
    found = config(world, runner={**values(world)["runner"], "async_steps": 0})
    in_turn, fresh = begun(found, Beginning(tmp_path, 3, changed=("runner.async_steps",)))
    steps(in_turn, 4, STEPS)
    assert [{version for _, version, _ in samples} for samples in fresh.trained] == [{3}, {4}, {5}] and in_turn.notes == []
    # Nor are samples of other settings trained on.
    changed = Beginning(tmp_path, 3, changed=("algorithm.sampling_params.temperature", "actor.optim.lr"))
    runner, anew = begun(config(world), changed)
    steps(runner, 4, STEPS)
    # Where their files lie is not among them.
    moved, same = begun(config(world), Beginning(tmp_path, 3, changed=("data.train_data_paths", "rollout.model.model_path")))
    assert steps(moved, 4, STEPS) == expected and same.trained == group.trained[3:] and moved.notes == []
    state = torch.load(tmp_path / DATA_STATE, weights_only=True)
    torch.save({**state, STATE: {**state[STATE], "prompts": "others"}}, tmp_path / DATA_STATE)
    others, _ = begun(config(world), Beginning(tmp_path, 3))
    assert others.notes == ["step 4 is generated anew: the prompts changed since the checkpoint, which has samples of it"]
    assert {version for _, version, _ in anew.trained[0]} == {3}
    assert STATE in state and state[STATE]["pictures"] is None
    assert runner.notes == [
        "step 4 is generated anew: algorithm.sampling_params.temperature changed since the checkpoint, which has samples of it"
    ]


def test_samples_of_other_pictures_under_the_same_tokens_are_not_those_of_a_resumed_run() -> None:
    """One pixel of one picture, a picture of the other question, and a picture more."""
    red, blue = (Image.new("RGB", (4, 6), colour) for colour in ("red", "blue"))
    spotted = red.copy()
    spotted.putpixel((3, 5), (255, 0, 1))

    def batch(*pictures: tuple[Image.Image, ...]) -> Batch:
        prompts = [Prompt(-1, "what", (5, 6), ("red",), engine_ids=(5,), images=images) for images in pictures]
        return Batch(4, prompts, {})

    state, asked = state_of(Rollout((), {}), batch((red,), (blue,))), {"group_size": 0, "logprobs": True, "routes": False}
    assert outdated(state, batch((red.copy(),), (blue.copy(),)), FRESH, **asked) == ()
    for others in (((spotted,), (blue,)), ((blue,), (red,)), ((red, blue), ()), ((red.transpose(Image.Transpose.ROTATE_90),), (blue,))):
        assert outdated(state, batch(*others), FRESH, **asked) == ("pictures of the prompts",)
    # What does not say which pictures it was drawn to.
    bare = {key: value for key, value in state.items() if key != "pictures"}
    assert outdated(bare, batch((red,), (blue,)), FRESH, **asked) != ()


def test_saved_samples_come_back_bit_for_bit_and_are_asked_for_what_a_run_needs_of_them(tmp_path: Path) -> None:
    """An empty response among them; log-probabilities are float64, routes are those of the samples that have some."""
    prompts = [Prompt(i, "what", (5, 6 + i), ("1",), engine_ids=(5, 6 + i)) for i in range(2)]
    batch, draw = Batch(4, prompts, {}), random.Random(0)

    def drawn(prompt: Prompt, size: int, *, logprobs: bool = True, routes: bool = False) -> Sample:
        found = tuple(draw.uniform(-9, 0) for _ in range(size)) if logprobs else ()
        ids = tuple(draw.randrange(2**20) for _ in range(size))
        return Sample(prompt.token_ids, ids, found, size > 2, 3, routes=torch.arange(size) if routes else None)

    for logprobs, routes in ((True, False), (False, False), (True, True)):
        samples = [drawn(prompts[i // 3], size, logprobs=logprobs, routes=routes) for i, size in enumerate((3, 0, 7, 1, 2, 5))]
        torch.save(state_of(Rollout(tuple(samples), {"time/rollout": 1.5}), batch), tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
        groups, seconds = restored(state, prompts)
        assert [sample for group in groups for sample in group] == samples and seconds == {"time/rollout": 1.5}
        assert [len(group) for group in groups] == [3, 3]
        for ours, theirs in zip(groups[0] + groups[1], samples, strict=True):
            assert (ours.routes is None) != routes and (not routes or torch.equal(ours.routes, theirs.routes))
        assert outdated(state, batch, FRESH, group_size=3, logprobs=logprobs, routes=routes) == ()
        assert outdated(state, batch, FRESH, group_size=3, logprobs=not logprobs, routes=routes) == ("rollout.return_logprobs",)
        assert outdated(state, batch, FRESH, group_size=3, logprobs=logprobs, routes=not routes) == (
            "rollout.enable_return_routed_experts",
        )
        # Of a checkpoint whose settings were removed: groups of another size would be taken apart.
        assert outdated(state, batch, FRESH, group_size=2, logprobs=logprobs, routes=routes) == ("algorithm.group_size",)
    assert outdated({**state, "samples": [{"version": 3}]}, batch, FRESH, group_size=3, logprobs=True, routes=True) == (
        "how samples are saved",
    )


@pytest.mark.parametrize("saves", [False, True], ids=["found at the next step", "found by a checkpoint"])
def test_a_rollout_that_an_engine_did_not_survive_is_repeated_with_the_newest_weights(world, begun, saves) -> None:
    runner, group = begun(config(world), loses=[2])
    steps(runner, 1, 2)
    if saves:
        state = runner._data_state()
        assert STATE not in state and state["handed_out"] == 2 and group.num_replaced == 1
    steps(runner, 3, STEPS)
    assert [{version for _, version, _ in samples} for samples in group.trained] == [{0}, {0}, {2}, {2}, {3}, {4}]
    assert group.num_replaced == 1 and group.syncs == [0, 1, 2, 3, 4, 5]
    runner, group = begun(config(world), loses=[2, 3])
    with pytest.raises(RlsyncError, match="process 7 of engine 0 has ended"):
        steps(runner, 1, STEPS)
    assert len(group.trained) == 3, "max_engine_restarts is 1"


def test_an_engine_that_has_answered_its_own_prompts_is_idle_while_others_generate(monkeypatch) -> None:
    """Of two rollouts the first ends within the step, the second goes on behind it."""
    group = SimpleNamespace(
        _engines=[None, None], _rounds=[_Round(100.0, 0, 2), _Round(100.0, 2, 2), _Round(108.0, 0, 2), _Round(108.0, 2, 2)]
    )
    for number, (at_s, count) in enumerate([(104.0, 2), (107.0, 2), (109.0, 1), (109.0, 2)]):
        monkeypatch.setattr(worker_group.time, "monotonic", lambda at_s=at_s: at_s)
        group._rounds[number].answered(count)
    # Seconds 102 to 110: 2, 5, 2 and 1 of them.
    assert WorkerGroup.generating_s(group, 102.0, 110.0) == (2 + 5 + 2 + 1) / 2
    assert WorkerGroup.generating_s(group, 110.0, 112.0) == 1.0


def test_numbers_that_come_during_a_call_are_taken_together_by_the_next_and_its_error_is_the_adders() -> None:
    calls: list[list[int]] = []
    first, gate = threading.Event(), threading.Event()

    def call(numbers: Sequence[int]) -> None:
        calls.append([*numbers])
        first.set()
        assert gate.wait(HANG_S)
        if 9 in numbers:
            raise ConfigError("nine")

    with Beside(call) as beside:
        beside.add([3])
        assert first.wait(HANG_S)
        beside.add([1, 4])
        beside.add([2])
        gate.set()
        beside.wait()
        assert calls == [[3], [1, 4, 2]]
        beside.add([9])
        with pytest.raises(ConfigError, match="nine"):
            beside.wait()
        with pytest.raises(ConfigError, match="nine"):
            beside.add([5])


def test_samples_of_older_weights_are_corrected_or_compared_with_the_engines_probabilities() -> None:
    ahead = {"runner": {"async_steps": 1}}
    found = load_config(minimal(**ahead))
    assert found.algorithm.importance_sampling_fix is True and found.rollout.return_logprobs is True
    found = load_config(minimal(**ahead, algorithm={"recompute_logprobs": False}))
    assert found.algorithm.importance_sampling_fix is False and found.rollout.return_logprobs is True
    assert load_config(minimal()).algorithm.importance_sampling_fix is False
    with pytest.raises(ConfigError, match=r"async_steps \(1\) trains on samples of older weights, which algorithm.importance_sampling_fix"):
        load_config(minimal(**ahead, algorithm={"importance_sampling_fix": False}))
    with pytest.raises(ConfigError, match=r"runner.async_steps \(1\) belongs to a reasoning run"):
        load_config({**(sft := sft_minimal()), "runner": {**sft["runner"], "async_steps": 1}}, "sft")


def test_devices_that_actor_and_engines_share_are_refused_before_anything_starts(world, monkeypatch) -> None:
    runner = {**values(world)["runner"], "async_steps": 1}
    shared = {"component_placement": {"actor,rollout,reward": "0-1"}}
    report = check(world, monkeypatch, runner=runner, cluster=shared)
    assert [text for about, text in report.findings] == [
        "runner.async_steps (1) has engines generate while the actor trains, but cluster.component_placement gives both the same devices, "
        "which one side has at a time; give actor and rollout devices of their own, or set runner.async_steps to 0"
    ]
    report = check(world, monkeypatch, runner=runner)
    assert report.findings == [] and dict(report.plan)["rollouts"].startswith("a step ahead of training")
    report = check(world, monkeypatch, algorithm={"early_scoring_prompts": 2}, cluster=shared)
    assert "algorithm.early_scoring_prompts (2) has engines generate while the actor scores, but" in report.findings[0][1]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"algorithm": {"recompute_logprobs": False}}, "needs algorithm.recompute_logprobs=True"),
        ({"data": {"rollout_batch_size": 5}}, r"data.rollout_batch_size \(5\) must be divisible by algorithm.early_scoring_prompts \(2\)"),
        ({"runner": {"async_steps": 1}}, "with runner.async_steps it trains meanwhile"),
        ({"actor": {"megatron": {"router_replay": "R2"}}}, "leaves no routes on the ranks, which actor.megatron.router_replay=R2 replays"),
    ],
)
def test_early_scoring_is_refused_where_it_has_nothing_to_do_or_would_lose_something(sections, said) -> None:
    found = OmegaConf.merge(minimal(algorithm={"early_scoring_prompts": 2}), sections)
    with pytest.raises(ConfigError, match=said):
        load_config(found)
    ranks = load_config(minimal(algorithm={"early_scoring_prompts": 2, "group_size": 3}, cluster={"component_placement": {"actor": "0-3"}}))
    with pytest.raises(
        ConfigError, match=r"early_scoring_prompts x algorithm.group_size \(6\) must be divisible by the data-parallel size"
    ):
        validate_world(ranks, 4)
