"""``rlsync compare``: do Megatron and transformers compute the same from a model's weights, and if not, from which layer on?

Owns arguments and output; ``rlsync.convert.precision`` compares.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsync.cli.convert import SHORT_DTYPES
from rlsync.errors import ConfigError
from rlsync.models import model_of
from rlsync.models.base_keys import DTYPES

if TYPE_CHECKING:
    from rlsync.convert.precision import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "exit code: 0 as near as --tolerance asks, 1 not"
    parser.add_argument("folder", metavar="MODEL", type=Path, help="Hugging Face folder, whose weights transformers loads")
    parser.add_argument("--weights", type=Path, help="what Megatron loads instead: shards of any layout, or another folder")
    parser.add_argument("--dtype", choices=(*DTYPES, *SHORT_DTYPES), default="float32", help="of both models")
    parser.add_argument("--tolerance", type=float, help="share of the logits' norm; default 1e-4 in float32, 3e-2 in bfloat16")
    parser.add_argument("--tokens", type=Path, help="JSON file with a row of token ids, or rows of one length; default: random ones")
    parser.add_argument("--rows", type=int, help="random rows; default: 2")
    parser.add_argument("--length", type=int, help="tokens of a random row; default: 32")
    parser.add_argument("--prompt-length", type=int, default=0, help="tokens of a row that are counted as its prompt, apart")
    parser.add_argument("--pictures", type=int, help="random pictures in each row; default: 1 of a model that takes them")
    parser.add_argument("--seed", type=int, help="of what is random; default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; returns 0 where the logits are as near as the tolerance asks, else 1. Raises RlsyncError."""
    from rlsync.bridge.model_folder import read_config

    model = model_of(read_config(arguments.folder)[1])
    if not any(path.suffix in (".safetensors", ".bin") for path in arguments.folder.iterdir()):
        raise ConfigError(
            f"{arguments.folder} has no weights that transformers loads; name a folder with some, and Megatron's by --weights"
        )
    given = [f"--{name}" for name in ("rows", "length", "seed", "pictures") if getattr(arguments, name) is not None]
    if arguments.tokens is not None and given:
        raise ConfigError(f"{', '.join(given)} are of random rows, and --tokens gives the rows; leave one of them out")
    tokens = None if arguments.tokens is None else _tokens(arguments.tokens, model.dims["vocab"])
    _check_numbers(arguments, 32 if tokens is None else tokens.size(1))
    from rlsync.convert.precision import compare_logits, random_batch

    if tokens is None:
        sizes = {"rows": 2, "length": 32, "seed": 0, "pictures": int(model.vision is not None)}
        sizes |= {name: getattr(arguments, name) for name in sizes if getattr(arguments, name) is not None}
        batch = random_batch(model, **sizes)
    else:
        batch = {"tokens": tokens}
    found = compare_logits(
        arguments.folder,
        batch,
        weights=arguments.weights,
        dtype=SHORT_DTYPES.get(arguments.dtype, arguments.dtype),
        prompt_length=arguments.prompt_length,
        tolerance=arguments.tolerance,
    )
    print(json.dumps({"within": found.is_within, **asdict(found)}) if arguments.json else shown(found))
    return 0 if found.is_within else 1


def _check_numbers(arguments: argparse.Namespace, length: int) -> None:
    """Raise ConfigError for numbers out of their bounds; ``length`` is that of rows where ``--length`` says nothing."""
    for name, least in (("rows", 1), ("length", 1), ("pictures", 0), ("tolerance", 0)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name} is {value}; it must be at least {least}")
    if arguments.seed is not None and not -(2**63) <= arguments.seed < 2**63:
        raise ConfigError(f"--seed is {arguments.seed}; it must be a number of 64 bits")
    length = length if arguments.length is None else arguments.length
    if not 0 <= arguments.prompt_length < length:
        raise ConfigError(f"--prompt-length is {arguments.prompt_length}, of rows of {length} tokens; it must be from 0 to {length - 1}")


def _tokens(path: Path, vocabulary: int) -> Any:
    import torch

    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        tokens = torch.tensor(rows if rows and isinstance(rows[0], list) else [rows])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"--tokens {path}: not a JSON list of token ids, or of such lists of one length ({error})") from None
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel() or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ConfigError(f"--tokens {path}: ids must be whole numbers from 0 to {vocabulary - 1}, in rows of one length")
    return tokens


def shown(found: Precision) -> str:
    """A table for people."""
    lines = [f"{'logits of':<12}{'positions':>10}{'mean':>11}{'largest':>11}{'relative':>11}{'top-1':>9}"]
    lines += [
        f"{row.positions:<12}{row.count:>10,}{row.mean:>11.2e}{row.largest:>11.2e}{row.relative:>11.2e}{row.top1:>9.2%}"
        for row in found.logits
    ]
    lines += [f"{'after':<12}{'':>21}{'largest':>11}{'relative':>11}"]
    lines += [
        f"{layer.after:<12}{'':>21}{layer.largest:>11.2e}{layer.relative:>11.2e}{'  <- first' if layer.after == found.first_layer else ''}"
        for layer in found.layers
    ]
    verdict = "within" if found.is_within else "beyond"
    return "\n".join([*lines, f"{verdict} the tolerance of {found.tolerance:g} in {found.dtype}: {found.logits[0].relative:.2e}"])
