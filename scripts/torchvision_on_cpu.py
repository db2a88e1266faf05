"""Lets PyPI's torchvision be imported beside a CPU build of torch.

vLLM's Qwen-VL models and transformers' processors import torchvision. PyPI has it built for CUDA only: beside a CPU torch its library
of operators cannot be loaded, and its Python half then fails at ``import torchvision`` with "operator torchvision::nms does not
exist", because it describes operators that are not there. With them stand empty shells, everything that needs no operator works, which
is all that those models use (``torchvision.transforms``); an operator that is called says that the library could not be loaded.

Where torchvision is installed, transformers and vLLM import it in most processes, long before vLLM loads its plug-ins. So it is the
environment that is mended and not a program: run as a file, this one puts itself beside the packages of its interpreter, with a
``.pth`` file by which Python calls ``watch`` whenever it starts there. It does nothing unless torchvision is imported, and then
nothing where torchvision has its operators (a build for the torch that is installed).

Goes when the CPU lock can name a torchvision for CPU, as ``torch==...+cpu``, that package indexes carry.
"""

from __future__ import annotations

import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

_NAME = "_torchvision_on_cpu"
# Loaded by torchvision behind its library; describes what the operators in there return.
_DESCRIPTIONS = "torchvision._meta_registrations"


def watch() -> None:
    """Have the shells made when torchvision is imported. Takes microseconds, imports nothing. Idempotent."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module, where it is anyway, for a loader that makes the shells first."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _DESCRIPTIONS else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Loads the descriptions of operators when there is something to describe."""

    def exec_module(self, module: Any) -> None:
        import torch

        if not sys.modules["torchvision.extension"]._has_ops():
            described = re.findall(r'register_fake\("torchvision::(\w+)"', self.get_source(self.name) or "")
            # Kept by the module: operators go with the library that defines them.
            module.operator_shells = library = torch.library.Library("torchvision", "FRAGMENT")
            for name in dict.fromkeys(described):
                library.define(f"{name}(Tensor a) -> Tensor")
        super().exec_module(module)


def install() -> str:
    """Copy this file into the environment of this interpreter, to be run whenever it starts. Returns where."""
    import shutil
    import sysconfig
    from pathlib import Path

    packages = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, packages / f"{_NAME}.py")
    (packages / f"{_NAME}.pth").write_text(f"import {_NAME}; {_NAME}.watch()\n", encoding="utf-8")
    return str(packages)


if __name__ == "__main__":
    print(f"torchvision can be imported beside a CPU torch from now on: {install()}")
