"""Claims about who imports whom, read from the sources; one import is made. Change LAYERS only together with the architecture."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from rlsync.cli.shapes import SHAPES
from tests.deadlines import HANG_S

ROOT = Path(__file__).resolve().parents[2]

# Lowest first. A unit imports units of lower layers and itself; units of one layer import each other only where the layer says so.
LAYERS: tuple[tuple[str, bool, frozenset[str]], ...] = (
    (
        "pure",
        True,
        frozenset(
            f"rlsync.{unit}"
            for unit in (
                "errors",
                "logs",
                "layout",
                "models",
                "plan",
                "gc_pause",
            )
        ),
    ),
    ("protocol", False, frozenset({"rlsync.coordinator"})),
    ("copy", True, frozenset({"rlsync.copy"})),
    ("transport", True, frozenset({"rlsync.transport"})),
    ("frameworks", False, frozenset({"rlsync.megatron", "rlsync.engine"})),
    ("services", True, frozenset({"rlsync.bridge", "rlsync.convert", "rlsync.sync"})),
    ("facade", True, frozenset({"rlsync"})),
    ("bench", True, frozenset({"rlsync.bench"})),
    ("command line", True, frozenset({"rlsync.cli", "rlsync.__main__"})),
    ("workers", True, frozenset({"workers"})),
    ("examples", True, frozenset({"examples"})),
)
# Foreign module -> the modules that may import it, and what lies below them. Examples are a user's programs.
OWNERS: dict[str, frozenset[str]] = {
    "megatron": frozenset({"rlsync.megatron", "examples"}),
    # Private names and differences between versions are in compat; the others use what vLLM documents.
    "vllm": frozenset({"rlsync.engine.compat", "rlsync.engine.handles.local", "rlsync.engine.worker"}),
    # A handle on an engine in a Ray actor belongs into the package, because trainers with workers of their own need it, and it knows
    # nothing of Ray but ``get`` and its errors. One file has it, and imports Ray when it is used: rlsync does not depend on Ray.
    "ray": frozenset({"workers", "examples", "rlsync.engine.handles.ray"}),
    "cupy": frozenset({"rlsync.copy"}),
    "triton": frozenset({"rlsync.copy.merge_kernel"}),
}
# What only those who price a sync may know. A sync records what live workers hold; a plan from paper would be a second truth.
ON_PAPER = "rlsync.models.paper"
ON_PAPER_READERS = frozenset({"rlsync.bench", "rlsync.cli"})
# These layers know no process group.
WITHOUT_PROCESS_GROUPS = frozenset({"pure", "protocol", "copy"})
# What integers and names do not need: modules that open sockets, and start threads or processes.
NOT_PURE = frozenset({"asyncio", "concurrent", "multiprocessing", "queue", "socket", "subprocess", "threading", "torch", "zmq"})


def unit_of(module: str) -> str | None:
    """``rlsync.engine.plugin`` -> ``rlsync.engine``, ``workers.loop`` -> ``workers``; None for modules that are not ours."""
    parts = module.split(".")
    if parts[0] in ("workers", "examples"):
        return parts[0]
    return ".".join(parts[:2]) if parts[0] == "rlsync" else None


def layer_of(unit: str) -> tuple[int, str, bool]:
    """Height, name and whether its units may import each other. A unit that no layer lists counts as pure, the strictest."""
    for height, (name, mutual, units) in enumerate(LAYERS):
        if unit in units:
            return height, name, mutual
    return 0, "pure", True


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever in the file, and uses of ``torch.distributed`` through ``torch``.

    ``from rlsync import logs`` counts as ``rlsync.logs``; a public class of the facade as ``rlsync``.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module]))) if node.level else node.module or ""
            for alias in node.names:
                is_facade_name = base == "rlsync" and not alias.name.islower()
                yield node.lineno, base if is_facade_name else f"{base}.{alias.name}"
        elif (
            isinstance(node, ast.Attribute) and node.attr == "distributed" and isinstance(node.value, ast.Name) and node.value.id == "torch"
        ):
            yield node.lineno, "torch.distributed"


def violation(importer: str, imported: str, module: str) -> str | None:
    """Why ``module`` of the unit ``importer`` must not import the module ``imported``, or None."""
    height, name, mutual = layer_of(importer)
    listed = any(importer in units for _, _, units in LAYERS)
    where = f"{importer} ({name}{'' if listed else '; not listed in LAYERS'})"
    owners = OWNERS.get(imported.split(".")[0])
    if owners is not None and not any(f"{module}.".startswith(f"{owner}.") for owner in owners):
        return f"{where} imports {imported}, which only {', '.join(sorted(owners))} may"
    if (imported + ".").startswith("torch.distributed.") and name in WITHOUT_PROCESS_GROUPS:
        return f"{where} imports {imported}, and layers up to copy know no process group"
    if name == "pure" and imported.split(".")[0] in NOT_PURE:
        return f"{where} imports {imported}, and pure layers have neither sockets nor threads nor tensors"
    if f"{imported}.".startswith(f"{ON_PAPER}.") and importer not in ON_PAPER_READERS:
        return f"{where} imports {imported}, which only {', '.join(sorted(ON_PAPER_READERS))} may"
    target = unit_of(imported)
    if target is None or target == importer or importer == "rlsync":
        return None if target not in ("workers", "examples") or target == importer else f"{where} imports {imported}, which is above it"
    target_height, target_name, _ = layer_of(target)
    if target_height > height:
        return f"{where} imports {imported} ({target_name}), which is above it"
    if target_height == height and not mutual:
        return f"{where} imports {imported}, and the units of {name} do not know each other"
    return None


def violations(root: Path) -> list[str]:
    """``path:line: reason`` for every forbidden import below rlsync/, workers/ and examples/ of a tree."""
    found = []
    for path in sorted(p for top in ("rlsync", "workers", "examples") for p in (root / top).rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        is_package = relative.name == "__init__"
        module = ".".join(relative.parent.parts if is_package else relative.parts)
        importer = unit_of(module)
        assert importer is not None
        for line, imported in imported_modules(path.read_text(encoding="utf-8"), module, is_package):
            reason = violation(importer, imported, module)
            if reason is not None:
                found.append(f"{path.relative_to(root)}:{line}: {reason}")
    return found


def test_imports_go_down_the_layers_only() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_layering_test_reads_the_sources() -> None:
    modules = [
        imported for path in (ROOT / "rlsync").rglob("*.py") for _, imported in imported_modules(path.read_text(), "rlsync.x", False)
    ]
    assert any(m.startswith("megatron.") for m in modules)
    assert any(m.startswith("rlsync.layout.geometry") for m in modules)


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("rlsync/layout/geometry.py", "import torch.distributed as dist", "no process group"),
        ("rlsync/copy/cuda.py", "import torch\n\n\ndef f():\n    torch.distributed.barrier()", "no process group"),
        ("rlsync/copy/cpu.py", "from torch import distributed", "no process group"),
        ("rlsync/models/llama.py", "from rlsync.megatron.model import build_model", "above it"),
        ("rlsync/models/llama.py", "from ..copy import cpu", "above it"),
        ("rlsync/engine/worker.py", "from rlsync.megatron import parallel", "do not know each other"),
        ("rlsync/transport/shm.py", "def f():\n    import rlsync.engine.worker", "above it"),
        ("rlsync/layout/geometry.py", "import threading", "neither sockets nor threads"),
        ("rlsync/plan/links.py", "from socket import gethostname", "neither sockets nor threads"),
        ("rlsync/models/stacks.py", "import zmq", "neither sockets nor threads"),
        ("rlsync/plan/packing.py", "from rlsync.coordinator.client import Client", "above it"),
        ("rlsync/bridge/auto_bridge.py", "from megatron.core import parallel_state", "only examples, rlsync.megatron may"),
        ("rlsync/sync.py", "import vllm", "only rlsync.engine.compat, rlsync.engine.handles.local, rlsync.engine.worker may"),
        ("rlsync/engine/handles/local.py", "import ray", "only examples, rlsync.engine.handles.ray, workers may"),
        ("rlsync/bridge/checkpoint.py", "from rlsync.cli import main", "above it"),
        ("rlsync/sync/planning.py", "from rlsync.models.paper import paper_workers", "only rlsync.bench, rlsync.cli may"),
        ("rlsync/cli/__init__.py", "import workers.loop", "above it"),
        ("rlsync/__init__.py", "from workers import loop", "above it"),
        ("rlsync/novelty.py", "from rlsync import AutoBridge", "not listed in LAYERS"),
        ("rlsync/engine/sinks/choice.py", "from vllm.platforms import current_platform", "only rlsync.engine.compat"),
        ("workers/actor.py", "from vllm import LLM", "only rlsync.engine.compat, rlsync.engine.handles.local, rlsync.engine.worker may"),
        ("workers/actor.py", "from examples.reasoning import main_grpo", "above it"),
    ],
)
def test_forbidden_import_is_found(tmp_path: Path, path: str, source: str, reason: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{path}:")
    assert reason in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rlsync/plan/planner.py", "from rlsync.layout.geometry import Box\nfrom rlsync import errors\nfrom . import topology"),
        (
            "rlsync/bridge/auto_bridge.py",
            "from rlsync.megatron.model import build_model\nfrom rlsync.transport import shm\nimport torch.distributed",
        ),
        ("rlsync/engine/worker.py", "from vllm import LLM\nfrom rlsync.engine import sinks\nfrom rlsync.transport.shm import Ring"),
        ("rlsync/coordinator/server.py", "import threading\nimport zmq"),
        ("workers/actor.py", "import ray\nfrom rlsync import AutoBridge\nfrom workers.data import load"),
    ],
)
def test_allowed_imports_are_not_found(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


def test_every_foreign_module_is_of_a_declared_package() -> None:
    """Not of one that another package happens to bring. What is not installed here, as CUDA's packages, is not looked at."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(package for extra in ("cpu", "cuda", "runner", "parquet") for package in extras[extra])]
    declared = {re.split(r"[^a-z0-9-]", package)[0] for package in asked}
    sources = [path for top in ("rlsync", "workers", "examples") for path in (ROOT / top).rglob("*.py")]
    imported = {name.split(".")[0] for path in sources for _, name in imported_modules(path.read_text(encoding="utf-8"), "m", False)}
    brought_by = packages_distributions()
    undeclared = {
        name: brought_by[name]
        for name in imported & brought_by.keys()
        if not declared & {d.lower().replace("_", "-") for d in brought_by[name]}
    }
    assert {name: found for name, found in undeclared.items() if unit_of(name) is None} == {}


def test_pure_layers_and_the_protocol_load_no_framework() -> None:
    """What the sources cannot show: an import that arrives through a third package or a package's ``__init__``."""
    files = [p for p in sorted((ROOT / "rlsync").rglob("*.py")) if p.name != "__main__.py"]
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    present = [m for m in modules if unit_of(m) in LAYERS[0][2] | LAYERS[1][2]]
    program = f"import sys, importlib\nfor m in {present!r}: importlib.import_module(m)\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert {"rlsync.plan.planner", "rlsync.plan.links", "rlsync.plan.packing", "rlsync.models.placement", "rlsync.models.stacks"} <= set(
        present
    )
    assert not loaded & {"megatron", "vllm", "ray", "torch"}


def test_checking_a_config_imports_plain_python_only() -> None:
    program = "import sys; from rlsync.models import check_config; assert check_config(SHAPE) == []; print(*sys.modules)"
    program = program.replace("SHAPE", repr(dict(SHAPES["qwen2.5-1.5b"])))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not loaded & {"torch", "transformers", "megatron", "numpy", "vllm"}
