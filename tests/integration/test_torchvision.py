"""Claims about torchvision beside a CPU torch: every process can import it, and nothing is made of one that works."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = "import vllm.v1.engine.core; from transformers import AutoProcessor, Qwen2ForCausalLM, Qwen2VLImageProcessor"
UNWATCHED = "import sys; sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != '_Finder']; "
USE = "import torch; from torchvision import ops; from torchvision.transforms.v2 import functional as F; "
RESIZED = "print(F.resize(torch.zeros(3, 8, 8), [4, 2]).shape); "
OPERATOR = "ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is not for CPU")


def python(program: str, *paths: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, as anybody's."""
    path = os.pathsep.join(filter(None, (*paths, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.skipif(util.find_spec("torchvision") is None, reason="torchvision is not installed in this environment")
def test_engines_and_processors_can_be_imported_and_an_operator_says_what_is_wrong() -> None:
    """An engine's core imports it before vLLM loads plug-ins. Without what the set-up installed the import fails: the claim can."""
    run = python(f"{IMPORTS}; {USE}{RESIZED}{OPERATOR}")
    assert "torch.Size([3, 4, 2])" in run.stdout
    assert "Couldn't load custom C++ ops" in run.stderr
    assert "operator torchvision::nms does not exist" in python(f"{UNWATCHED}import torchvision").stderr


@pytest.mark.parametrize("has_operators", [True, False])
def test_a_torchvision_that_has_its_operators_is_left_alone(tmp_path: Path, has_operators: bool) -> None:
    """Stands in for a build for the torch that is installed, which defines them itself: a second definition would be an error."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import extension, _meta_registrations")
    (package / "extension.py").write_text(f"def _has_ops(): return {has_operators}")
    (package / "_meta_registrations.py").write_text('"""register_fake("torchvision::shell")"""')
    watched = "import torchvision_on_cpu; torchvision_on_cpu.watch(); torchvision_on_cpu.watch(); "
    program = f"{UNWATCHED}{watched}import torch, torchvision; print(hasattr(torch.ops.torchvision, 'shell'))"
    run = python(program, str(tmp_path), str(ROOT / "scripts"))
    assert run.stdout == f"{not has_operators}\n", run.stderr
