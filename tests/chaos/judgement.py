"""Whether a call that met a fault ended as it has to: in time, on every living rank, with one error that says what happened. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rlsync.errors import WeightSyncError
from tests.chaos.faults import Scene
from tests.chaos.rank import Ended


def complaints(scene: Scene, ended: Sequence[Ended], fired_s: float, limit_s: float) -> list[str]:
    """What is wrong with how ranks 0 and 1 ended (rank 1 is missing where it has died), or nothing.

    A rank that was stopped has its ``limit_s`` from when it went on.
    """
    fault, findings = scene.draw.fault, []
    for rank, end in enumerate(ended):
        since_s = max(fired_s, scene.revived_s or 0.0) if rank == 1 else fired_s
        if end.at_s - since_s > limit_s:
            findings.append(f"rank {rank} ended {end.at_s - since_s:.1f} s after the fault; the limit is {limit_s:g} s: {end.text}")
    if len(ended) < 2 and not scene.actors.killed:
        findings.append("rank 1 has died")
    texts = {end.text for end in ended}
    if len(texts) > 1:
        findings.append(f"the ranks ended differently: {texts}")
    error = ended[0].error
    if error is None:
        if scene.draw.phase not in fault.may_commit:
            findings.append("the sync committed in spite of the fault")
    elif not isinstance(error, WeightSyncError):
        findings.append(f"rank 0 raised {type(error).__name__}: {error}")
    else:
        findings += [f"{finding}: {error}" for finding in _silent(scene, error)]
    return findings


def _silent(scene: Scene, error: WeightSyncError) -> list[str]:
    """What an error does not say, although it is known."""
    draw, findings = scene.draw, []
    if draw.fault.says not in error.cause:
        findings.append(f"no word of {draw.fault.says!r}")
    if (error.version is None) is not (draw.phase == "connect"):
        findings.append(f"version {error.version} in phase {draw.phase}")
    if error.version is not None and error.version not in draw.fault.versions(scene.version):
        findings.append(f"version {error.version} instead of {scene.version}")
    if draw.fault.names_engine and error.engine != scene.victim:
        findings.append(f"engine {error.engine} instead of {scene.victim}")
    if draw.phase.endswith("bucket") and error.phase in ("transfer", "verify") and error.bucket is None:
        findings.append("no bucket")
    if draw.fault.exact_bucket and error.bucket != scene.bucket():
        findings.append(f"bucket {error.bucket} instead of {scene.bucket()}")
    return findings
