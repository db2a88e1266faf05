"""Ray as the run uses it: start or join a cluster, number its devices, start actors on them, end them all.

Device numbers count GPUs over all nodes in node order; without GPUs a device is a process slot on the driver's node.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.node
import ray._private.parameter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsync.errors import ConfigError, RlsyncError
from workers.forked_workers import CPU_ENVIRONMENT, NAME_VARIABLE, ForkedWorker, Forks, may_fork
from workers.ray_access import LOCAL, check_answers, cluster_address, is_protected
from workers.remote import Worker
from workers.worker_logs import LOG_VARIABLE

_log = logging.getLogger(__name__)

_REPOSITORY = Path(__file__).resolve().parents[1]
# Enough for the actors of a run on one machine; they share its real cores.
_LOCAL_CPUS = 64
# How often Ray is started here before it counts as not coming up.
_ATTEMPTS = 3
_RAY_LOGS = "/tmp/ray/session_latest/logs"


@contextlib.contextmanager
def _few_processes() -> Iterator[None]:
    """Within it ``ray.init`` starts no process that a cluster of a run's own has no use for: what watches over nodes that come and go, what
    brings logs to the driver, and what answers jobs and the dashboard. Each reads Python for seconds while Ray waits for those it needs.

    Ray knows them as parameters of its own, for which ``ray.init`` has no argument. A Ray that has other ones starts what it would.
    """
    parameters, node = ray._private.parameter.RayParams, ray._private.node.Node
    spared = {"no_monitor": True, "include_log_monitor": False}
    with contextlib.ExitStack() as stack:
        if spared.keys() <= inspect.signature(parameters).parameters.keys():
            stack.callback(setattr, ray._private.parameter, "RayParams", parameters)
            ray._private.parameter.RayParams = partial(parameters, **spared)
        if (start_api_server := getattr(node, "start_api_server", None)) is not None:
            stack.callback(setattr, node, "start_api_server", start_api_server)
            node.start_api_server = lambda self, **options: None
        yield


def _start_here(options: Mapping[str, Any]) -> None:
    """``ray.init`` of a cluster of this process's own, tried again where Ray gave up.

    Ray waits 30 seconds for its own processes, which is a constant in its code, and too short on a machine that is busy or reads them
    from a cold disk. The processes that an attempt has left are ended.
    """
    before = set(psutil.Process().children())
    for left in reversed(range(_ATTEMPTS)):
        try:
            with _few_processes():
                ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            for process in set(psutil.Process().children()) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(f"{os.sep}ray{os.sep}" in argument for argument in process.cmdline()):
                        process.kill()
            if not left:
                raise
            _log.warning("Ray did not start (%s); trying again", str(error).splitlines()[0] if str(error) else repr(error))


@dataclass(frozen=True, slots=True)
class Device:
    """Location of a device: Ray node, its address, GPU index on the node (None for a process slot)."""

    node_id: str
    address: str
    gpu: int | None


@dataclass(slots=True)
class Cluster:
    """A connection to Ray. A context manager: leaving it ends every actor started here."""

    num_gpus: int = 0
    log_folder: Path | None = None
    _nodes: list[dict[str, Any]] = field(default_factory=list)
    _workers: list[Worker] = field(default_factory=list)
    # None where workers are not forked.
    _forks: dict[type[ForkedWorker], Forks] | None = None

    @classmethod
    def start(cls, num_nodes: int = 1, *, log_folder: Path | None = None) -> Cluster:
        """Join the cluster that RAY_ADDRESS names, or with several nodes the one running here, or else start one on this machine.

        With ``log_folder`` (visible to all nodes) what an actor and its children print goes to ``<log_folder>/<name>.log``,
        else to Ray's session folder. One that is started here lets in who has the token of ``workers.ray_access``, and has no dashboard.
        Raises ConfigError when there is no such cluster, which is known before Ray would wait for it, or nodes are missing.
        """
        address = cluster_address(num_nodes)
        assert address != LOCAL or is_protected(), "call protect_own_cluster before Ray is imported"
        check_answers(address)
        # Actors have environments of their own, for which no worker that Ray has started beforehand would do.
        own = {"num_cpus": _LOCAL_CPUS, "include_dashboard": False, "_system_config": {"prestart_worker_first_driver": False}}
        options: dict[str, Any] = own if address == LOCAL else {}
        # Ray must not narrow CUDA_VISIBLE_DEVICES: devices are given out here.
        environment = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        options |= {"address": address, "log_to_driver": False, "logging_level": "error", "runtime_env": {"env_vars": environment}}
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if address == LOCAL:
                _start_here(options)
            else:
                ray.init(**options)
        except Exception as error:  # Ray has no type of its own for processes that do not come up
            if address == LOCAL:
                raise RlsyncError(
                    f"Ray did not start on this machine: {error}; is it short of memory or busy? Ray's logs: {_RAY_LOGS}"
                ) from error
            raise ConfigError(f"no Ray cluster at {address} ({error}); start Ray on all nodes and set RAY_ADDRESS") from None
        # Ray's own handlers abort the process in the middle of ending the others.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        here = ray.get_runtime_context().get_node_id()
        nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeID"] != here, n["NodeID"]))
        if len(nodes) < num_nodes:
            ray.shutdown()
            raise ConfigError(
                f"cluster.num_nodes is {num_nodes}, but Ray has {len(nodes)} nodes; start Ray on the others and set RAY_ADDRESS"
            )
        gpus = sum(int(n["Resources"].get("GPU", 0)) for n in nodes)
        return cls(gpus, log_folder, nodes, _forks={} if may_fork(address) and not gpus else None)

    @property
    def num_devices(self) -> int | None:
        """GPUs of the cluster, or None where a device is a process slot."""
        return self.num_gpus if self.num_gpus else None

    @property
    def logs(self) -> str:
        """Folder of the workers' logs, for messages."""
        return _RAY_LOGS if self.log_folder is None else str(self.log_folder)

    def device(self, number: int) -> Device:
        """Location of a device by number; the placement has checked the number."""
        left = number
        for node in self._nodes:
            here = int(node["Resources"].get("GPU", 0))
            if self.num_gpus and left < here:
                return Device(node["NodeID"], node["NodeManagerAddress"], left)
            left -= here
        assert not self.num_gpus, f"device {number} does not exist"
        return Device(self._nodes[0]["NodeID"], self._nodes[0]["NodeManagerAddress"], None)

    def launch(
        self,
        actor_class: type,
        ray_name: str,
        devices: Sequence[int],
        *arguments: Any,
        name: str,
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
        groups: Mapping[str, int] | None = None,
        forked: type[ForkedWorker] | None = None,
    ) -> Worker:
        """Start a Ray actor that sees exactly ``devices`` (all on one node), with extra environment variables.

        ``ray_name`` is for Ray and the log's file name, ``name`` for messages; ``groups``: threads of its concurrency
        groups, beside ``threads``; ``forked``: what its process is where workers are forked.
        """
        places = [self.device(d) for d in devices]
        if len({p.node_id for p in places}) != 1:
            raise ConfigError(f"{name} needs devices {devices} on one node; choose sizes that do not straddle nodes")
        visible = CPU_ENVIRONMENT if places[0].gpu is None else {"CUDA_VISIBLE_DEVICES": self._visible(places)}
        log = None if self.log_folder is None else str(self.log_folder / f"{ray_name.replace(':', '-')}.log")
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_REPOSITORY), os.environ.get("PYTHONPATH")))),
            "TOKENIZERS_PARALLELISM": "false",
            **({} if log is None else {LOG_VARIABLE: log}),
            NAME_VARIABLE: ray_name,
            **visible,
            **({} if environment is None else environment),
        }
        actor = (
            ray.remote(concurrency_groups=groups)(actor_class)
            .options(
                num_cpus=0, max_concurrency=threads, name=ray_name, max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(places[0].node_id, soft=False),
                runtime_env={"env_vars": variables, **self._executable(forked)},
            )
            .remote(*arguments)
        )  # fmt: skip
        forks = None if forked is None else (self._forks or {}).get(forked)
        ended = {} if forks is None else {"ended": partial(forks.ended, ray_name)}
        worker = Worker(name, actor, self.logs if log is None else log, **ended)
        self._workers.append(worker)
        return worker

    def _executable(self, forked: type[ForkedWorker] | None) -> dict[str, str]:
        if self._forks is None or forked is None:
            return {}
        if forked not in self._forks:
            self._forks[forked] = Forks(forked)
        return {"py_executable": self._forks[forked].command()}

    def _visible(self, places: Sequence[Device]) -> str:
        """CUDA_VISIBLE_DEVICES of a process."""
        node = next(n for n in self._nodes if n["NodeID"] == places[0].node_id)
        names = _gpu_names(int(node["Resources"].get("GPU", 0)), os.environ.get("CUDA_VISIBLE_DEVICES") if node is self._nodes[0] else None)
        return ",".join(names[p.gpu] for p in places if p.gpu is not None)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        # Each of them also where one before it fails, as all of Ray does when its head is gone. The last one that is pushed is the first.
        with contextlib.ExitStack() as stack:
            for forks in (self._forks or {}).values():
                stack.callback(forks.close)
            stack.callback(ray.shutdown)
            for worker in self._workers:
                stack.callback(ray.kill, worker.actor)


def _gpu_names(count: int, visible: str | None) -> list[str]:
    """How CUDA_VISIBLE_DEVICES names the GPUs of a node, in the order of Ray's count; ``visible``: the driver's own, on its node."""
    named = [] if visible is None else visible.split(",")
    return named if len(named) == count else [str(i) for i in range(count)]
