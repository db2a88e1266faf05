"""Claims about which GPUs a process of the run sees, and about a Ray that does not start or is gone."""

from __future__ import annotations

import pytest
import ray

from rlsync.errors import RlsyncError
from workers.cluster import Cluster
from workers.forked_workers import ForkedWorker, Forks
from workers.remote import Worker


def cluster(*gpus_of_nodes: int) -> Cluster:
    nodes = [{"NodeID": f"n{i}", "NodeManagerAddress": f"10.0.0.{i}", "Resources": {"GPU": float(n)}} for i, n in enumerate(gpus_of_nodes)]
    return Cluster(sum(gpus_of_nodes), None, nodes)


def visible(made: Cluster, *devices: int) -> str:
    return made._visible([made.device(d) for d in devices])


def test_a_process_sees_its_own_gpus_as_their_node_numbers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = cluster(4, 2)
    assert visible(made, 0) == "0" and visible(made, 2, 3) == "2,3"
    assert made.device(5).node_id == "n1" and visible(made, 5) == "1"


def test_the_drivers_own_choice_of_gpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert visible(cluster(2, 2), 1) == "7" and visible(cluster(2, 2), 3) == "1"


@pytest.mark.parametrize("raised", [Exception("The current node timed out during startup."), RuntimeError("Failed to start GCS.")])
def test_a_ray_that_does_not_come_up_is_an_error_that_says_where_to_look(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    """As on a machine without memory; Ray raises bare exceptions then."""

    def fails(**options: object) -> None:
        raise raised

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(RlsyncError, match=f"Ray did not start on this machine: {raised}; is it short of memory or busy"):
        Cluster.start()


def test_what_was_forked_ends_although_ray_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    forks, ended = Forks(ForkedWorker), list[str]()

    def kill(actor: object) -> None:
        raise ConnectionError("the head of the cluster is gone")

    monkeypatch.setattr("workers.cluster.ray.kill", kill)
    monkeypatch.setattr("workers.cluster.ray.shutdown", lambda: ended.append("ray"))
    workers = [Worker(name, object(), "") for name in ("a", "b")]
    with pytest.raises(ConnectionError, match="is gone"), Cluster(_workers=workers, _forks={ForkedWorker: forks}):
        pass
    assert ended == ["ray"] and not forks._folder.exists()
