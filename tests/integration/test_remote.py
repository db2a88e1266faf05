"""Worker processes under real Ray: failures are one error that names who, in what, why, and where it printed; strangers are kept out."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import services

from rlsync.engine.handles import ray as ray_handles
from rlsync.engine.handles.calls import Gate
from rlsync.engine.handles.ray import CONTROL_GROUP, ENGINE_THREADS, EngineActor, RayEngine
from rlsync.errors import CheckpointError, RlsyncError
from tests.deadlines import HANG_S, SLACK, ended_before
from workers import forked_workers
from workers.cluster import Cluster
from workers.forked_workers import ForkedWorker
from workers.remote import Worker, WorkerDiedError, WorkerSilentError, collect, collect_answered, collect_streamed
from workers.worker_logs import keep_own_log

# Joins a cluster and runs code in it.
_CLIENT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: "RAN").remote()))
"""


class Rank:
    def __init__(self) -> None:
        keep_own_log()

    def echo(self, value: int) -> int:
        print(f"echo {value}", flush=True)
        return value

    def place(self) -> tuple[int, int, str]:
        """Its own process, its parent's, and what its environment says of it."""
        return os.getpid(), os.getppid(), os.environ["NUMBER"]

    def hang(self) -> None:
        time.sleep(HANG_S)

    def refuse(self) -> None:
        raise CheckpointError("iter_0000007 was saved with TP 4; this run has 2")

    def break_down(self, after_s: float) -> None:
        time.sleep(after_s)
        raise ZeroDivisionError("division by zero")

    def die(self, after_s: float) -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)


class Answers:
    """Stands in for an engine: gives an answer, the last prompt's first, and waits until it has been seen before it gives the next."""

    def __init__(self) -> None:
        self._seen = threading.Semaphore(0)

    def seen(self) -> None:
        self._seen.release()

    def generate(self, prompts: Sequence[str], sampling: object, *, seeds: object, timeout_s: object, on_result: Any) -> None:
        for number, prompt in reversed([*enumerate(prompts)]):
            if prompt == "refuse":
                raise CheckpointError("no answer")
            if prompt == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            on_result(number, (prompt,))
            assert self._seen.acquire(timeout=HANG_S)


class Engine(EngineActor):
    def __init__(self) -> None:
        self._engine = Answers()


class Gated:
    """Stands in for an engine that is nothing but its gate."""

    def __init__(self) -> None:
        self._gate = Gate("engine 0", "it is not started")
        self._gate.open()

    @property
    def state(self) -> str:
        return self._gate.state

    def generate(self, prompts: Sequence[str], sampling: object, *, seeds: object, timeout_s: float | None) -> list[str]:
        self._gate.wait(timeout_s)
        return [f"{prompt} by {self._gate.version}" for prompt in prompts]

    def pause(self, mode: str, sync: str, timeout_s: float) -> None:
        self._gate.begin_sync(sync, timeout_s)

    def resume(self, version: int, timeout_s: float) -> None:
        self._gate.commit(self._gate.ticket(), version)


class GatedEngine(EngineActor):
    def __init__(self) -> None:
        self._engine = Gated()


class StoppedEngine:
    """Stands in for an engine's actor whose process is stopped, as by a debugger or a lock that native code holds."""

    def pid(self) -> int:
        return os.getpid()

    def stop_while_streaming(self) -> Iterator[str]:
        yield "begun"
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)  # another thread may be the one that takes the signal
        yield "went on"

    def generate(self, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def go_on_streaming(self, count: int) -> Iterator[int]:
        for number in range(count):
            yield number
            time.sleep(0.5)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


# The processes of Ray that the first attempt to start it has left.
GIVEN_UP: list[psutil.Process] = []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One that starts at the second attempt, as on a machine that was too busy for the first."""
    before, get_node = set(psutil.Process().children()), services.get_node

    def gives_up_once(*arguments):
        if GIVEN_UP:
            return get_node(*arguments)
        GIVEN_UP.extend(set(psutil.Process().children()) - before)
        raise Exception("The current node timed out during startup.")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(services, "get_node", gives_up_once)
        started = Cluster.start(log_folder=tmp_path_factory.mktemp("logs"))
    with started:
        yield started


def test_what_an_attempt_to_start_ray_has_left_is_ended(cluster):
    assert GIVEN_UP
    assert [process.pid for process in psutil.wait_procs(GIVEN_UP, timeout=10 * SLACK)[1]] == []


def test_ray_starts_what_a_run_needs_and_nothing_else(cluster):
    """Of its processes each reads Python for seconds, and all of them have 30 s."""
    titles = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True) if process.is_running()]
    for needed in ("gcs_server", "raylet/raylet"):
        assert any(needed in title for title in titles), titles
    for spared in ("monitor.py", "dashboard/dashboard.py", "ray::IDLE"):
        assert not any(spared in title for title in titles), spared


def client(address: str, **variables: str) -> subprocess.Popen[str]:
    """Another process of this user, with his home folder, that has none of Ray's variables but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", _CLIENT, address], env=kept | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def clients(cluster) -> Iterator[list[subprocess.Popen[str]]]:
    """One that has the token of the run, and strangers, whom Ray lets try for a quarter of a minute, in which other tests go on."""
    address, own = ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"]
    made = [
        client(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=own),
        client(address),
        client(address, RAY_AUTH_MODE="token"),  # with what Ray keeps in the home folder
        client(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
    ]
    yield made
    for process in made:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def ranks(cluster, clients) -> list[Worker]:
    """The last two are forked."""
    return [
        cluster.launch(
            Rank, f"Ranks:{i}", (i,), name=f"actor rank {i}", environment={"NUMBER": str(i)}, forked=ForkedWorker if i > 1 else None
        )
        for i in range(4)
    ]


def test_workers_are_forked_with_environment_and_title_of_their_own_and_not_of_the_group_of_a_terminal(ranks):
    places = collect([rank.call("place") for rank in ranks])
    (server,) = {parent for _, parent, _ in places[2:]}
    assert [number for *_, number in places] == ["0", "1", "2", "3"]
    assert "multiprocessing.forkserver" in " ".join(psutil.Process(server).cmdline()) and server not in {p for _, p, _ in places[:2]}
    assert all(psutil.Process(pid).cmdline()[0].startswith("ray::") for pid, *_ in places)
    assert [os.getpgid(pid) for pid, *_ in places[2:]] == [pid for pid, *_ in places[2:]] and os.getpgid(server) == os.getpgid(0)


def test_where_nothing_is_forked_the_command_starts_the_worker():
    command = [sys.executable, "-S", "-E", forked_workers.__file__, "/nowhere/socket", "-c", "import sys; print(sys.argv)", "7"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=HANG_S).stdout == "['-c', '7']\n"


def test_results_come_in_the_order_of_the_calls(ranks):
    assert collect([rank.call("echo", i) for i, rank in enumerate(ranks)]) == [0, 1, 2, 3]
    assert "echo 2" in Path(ranks[2].log).read_text()


def test_what_a_run_can_do_without_is_taken_of_those_who_answer_in_time(ranks):
    calls = [ranks[0].call("echo", 5), ranks[1].call("refuse"), ranks[2].call("break_down", 0.0), ranks[3].call("break_down", 5.0)]
    assert collect_answered(calls, 4.0) == [5]


def test_an_error_of_ours_arrives_as_it_was_raised(ranks):
    with pytest.raises(CheckpointError) as caught:
        collect([ranks[0].call("echo", 1), ranks[1].call("refuse")])
    assert str(caught.value) == "iter_0000007 was saved with TP 4; this run has 2"


def test_any_other_error_names_rank_call_and_log_and_keeps_its_traceback(ranks):
    with pytest.raises(RlsyncError, match=r"actor rank 1 failed in break_down: ZeroDivisionError: division by zero") as caught:
        collect([ranks[0].call("echo", 1), ranks[1].call("break_down", 0.0)])
    assert "in break_down" in str(caught.value) and f"its log: {ranks[1].log}" in str(caught.value)


def test_a_dead_rank_is_named_although_another_complains_first_and_a_third_hangs(ranks):
    died = pytest.raises(WorkerDiedError, match=r"actor rank 3 \(process \d+\) ended during die")
    with ended_before(HANG_S), died as caught:
        collect([ranks[1].call("break_down", 0.0), ranks[2].call("hang"), ranks[3].call("die", 0.5)])
    assert f"its log: {ranks[3].log}\n    echo 3" in str(caught.value)


def test_a_forked_worker_that_ends_before_ray_hears_of_it_is_told_with_its_last_lines(cluster, ranks):
    """Ray itself would say after minutes that an actor was not created."""
    unable = {"RAY_NUM_REDIS_GET_RETRIES": "many"}  # ends the import of Ray
    worker = cluster.launch(Rank, "Unable", (0,), name="actor rank 9", environment=unable, forked=ForkedWorker)
    with pytest.raises(WorkerDiedError, match=r"actor rank 9 did not come up for echo: its process \d+ ended \(exit code 1\)\n") as caught:
        collect([worker.call("echo", 1), ranks[0].call("echo", 1)])
    assert "    ValueError: invalid literal for int() with base 10: 'many'" in str(caught.value).splitlines()


def test_answers_arrive_while_others_are_still_generated_until_an_engine_fails(cluster):
    engines = [cluster.launch(Engine, f"Engines:{i}", (i,), name=f"engine {i}", threads=ENGINE_THREADS) for i in range(2)]
    arrived: list[list[tuple[int, tuple[str, ...]]]] = [[], []]

    def take(number: int, items: list[Any]) -> None:
        arrived[number] += [pair for pairs in items for pair in pairs]
        with suppress(WorkerDiedError):  # "die" may be its next prompt, and the engine be gone before it has answered this
            collect([engines[number].call("call", "seen")])

    def ask(*prompts: Sequence[str]) -> None:
        calls = zip(engines, prompts, strict=True)
        collect_streamed([engine.stream("stream", asked, {}, None, None) for engine, asked in calls], take)

    ask(["a", "b", "c"], ["d"])
    assert arrived == [[(2, ("c",)), (1, ("b",)), (0, ("a",))], [(0, ("d",))]]
    ask([], [])
    with pytest.raises(CheckpointError, match=r"^no answer$"):
        ask(["e"], ["refuse", "f"])
    with pytest.raises(WorkerDiedError, match=r"engine 0 .*ended during stream"):
        ask(["die", "g"], ["h"])
    assert arrived[0][3:] == [(0, ("e",)), (1, ("g",))] and arrived[1][1:] == [(1, ("f",)), (0, ("h",))]


def test_calls_that_wait_for_the_end_of_a_sync_do_not_keep_it_from_ending_however_many_they_are(cluster):
    worker = cluster.launch(GatedEngine, "Gated:0", (0,), name="engine 0", threads=ENGINE_THREADS, groups=CONTROL_GROUP)
    engine = RayEngine("engine 0", 1, worker.actor)
    engine.pause("abort", "the sync", HANG_S)
    waiting = [worker.call("generate", ["a"], {}, None, HANG_S) for _ in range(3 * ENGINE_THREADS)]
    time.sleep(1)  # so that those that Ray has threads for are at the gate
    with ended_before(HANG_S):
        assert engine.state == "syncing"
        engine.resume(7, 10.0)
        assert collect(waiting) == [["a by 7"]] * len(waiting)


def test_an_engine_whose_actor_was_made_without_the_group_of_its_control_calls_is_told_how_to_make_it(cluster):
    """Ray ends its process, and says nothing of the group to whoever called."""
    worker = cluster.launch(GatedEngine, "Gated:1", (0,), name="engine 1", threads=ENGINE_THREADS)
    with pytest.raises(
        RlsyncError, match=r"(?s)Ray actor of engine engine 1 is gone: .*; if .* ray\.remote\(concurrency_groups=CONTROL_GROUP\)"
    ):
        RayEngine("engine 1", 1, worker.actor).pause("abort", "the sync", HANG_S)


def test_a_call_whose_process_is_stopped_ends_at_its_deadline_and_one_that_is_answered_does_not(cluster):
    """What it said before has arrived; a process that has died meanwhile is named before it."""
    stopped, at_work = (cluster.launch(StoppedEngine, f"Stopped:{i}", (i,), name=f"engine {i}", threads=ENGINE_THREADS) for i in range(2))
    pids = collect([stopped.call("pid", timeout_s=HANG_S), at_work.call("pid", timeout_s=HANG_S)])
    silent = r"^engine 0 did not answer {} within {} s: its process is stopped or stuck\nits log: "
    arrived: list[list[Any]] = [[], []]
    calls = [stopped.stream("stop_while_streaming", timeout_s=10.0), at_work.stream("go_on_streaming", 4, timeout_s=HANG_S)]
    with ended_before(HANG_S), pytest.raises(WorkerSilentError, match=silent.format("stop_while_streaming", 10)) as caught:
        collect_streamed(calls, lambda number, items: arrived[number].extend(items))
    assert caught.value.worker == "engine 0" and pickle.loads(pickle.dumps(caught.value)).worker == "engine 0"
    assert arrived == [["begun"], [*range(4)]]
    with ended_before(HANG_S), pytest.raises(WorkerSilentError, match=silent.format("pid", 2)):
        collect([stopped.call("pid", timeout_s=2.0), at_work.call("pid", timeout_s=HANG_S)])
    with ended_before(HANG_S), pytest.raises(WorkerDiedError, match=r"engine 1 .*ended during die"):
        collect([stopped.call("pid", timeout_s=2.0), at_work.call("die", timeout_s=HANG_S)])
    ray.kill(stopped.actor)
    assert psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=HANG_S)[1] == []


def test_a_handle_does_not_wait_for_ever_for_an_actor_that_is_stopped(cluster, monkeypatch):
    stopped = cluster.launch(StoppedEngine, "Stopped:2", (0,), name="engine 2", threads=ENGINE_THREADS)
    pid = ray.get(stopped.actor.pid.remote())
    monkeypatch.setattr(ray_handles, "ENGINE_GRACE_S", 1.5)
    with ended_before(HANG_S), pytest.raises(TimeoutError, match=r"^engine 2 did not answer generate within 2 s$"):
        RayEngine("2", 1, stopped.actor).generate(["a"], {}, timeout_s=0.5)
    ray.kill(stopped.actor)
    assert psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=HANG_S)[1] == []


# Who may join.


@pytest.mark.slow
def test_who_has_not_the_token_of_a_run_cannot_run_code_in_its_cluster(clients):
    friend, *strangers = clients
    said, _ = friend.communicate(timeout=HANG_S)
    assert friend.returncode == 0 and "RAN" in said, said
    for stranger in strangers:
        said, _ = stranger.communicate(timeout=HANG_S)
        assert stranger.returncode != 0 and "RAN" not in said and "oken" in said, said


def test_the_token_is_in_no_argument_and_no_log(cluster, ranks):
    own, folder = os.environ["RAY_AUTH_TOKEN"].encode(), ray._private.worker.global_worker.node.get_session_dir_path()
    commands = [(Path("/proc") / str(p.pid) / "cmdline").read_bytes() for p in psutil.Process().children(recursive=True)]
    assert len(commands) > 5 and [c for c in commands if own in c] == []
    logs = [path for root in (folder, cluster.logs) for path in Path(root).rglob("*") if path.is_file()]
    assert len(logs) > 10 and [path for path in logs if own in path.read_bytes()] == []


def test_a_cluster_that_refuses_the_token_is_an_error_that_says_so(ranks):
    """In a process of its own, because this one is connected already."""
    address = ray.get_runtime_context().gcs_address
    script = "from workers.ray_access import check_answers\nimport sys\ncheck_answers(sys.argv[1])\n"
    variables = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64, "RAY_ADDRESS": address}
    run = subprocess.run([sys.executable, "-c", script, address], env=variables, capture_output=True, text=True, timeout=HANG_S)
    assert f"ConfigError: RAY_ADDRESS={address}" in run.stderr and "oken" in run.stderr.splitlines()[-1], run.stderr
    run = subprocess.run([sys.executable, "-c", script, address], env=os.environ, capture_output=True, text=True, timeout=HANG_S)
    assert run.returncode == 0, run.stderr
