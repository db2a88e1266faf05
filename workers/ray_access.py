"""The Ray cluster of a run, before Ray is imported: which one it is, whether it answers, and the token of one that the run starts.

Must not import Ray, which reads the variables of its authentication when it is imported. The entry point calls ``protect_own_cluster``.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import MutableMapping

from rlsync.errors import ConfigError

LOCAL = "local"
_AUTHENTICATION = "RAY_AUTH_"
_CONNECT_S = 5.0
_REMEDY = (
    "start Ray there (ray start --head; on other nodes ray start --address=HEAD:6379) or correct RAY_ADDRESS; "
    "unset it for a cluster of the run's own on this machine"
)
# Of a whole process that imports Ray, which takes seconds, on a busy machine many.
_ANSWER_S = 40.0


def cluster_address(num_nodes: int) -> str:
    """``RAY_ADDRESS``; else ``auto`` (the cluster running on this machine) for several nodes, and for one a cluster of the run's own."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if num_nodes > 1 else LOCAL)


def protect_own_cluster(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let nobody without a fresh token into the cluster that a run starts: its servers listen on all addresses and run what they are sent.

    The token stays in the environment of the run's processes: no argument, file or log has it. A cluster that the run only joins
    (``address`` is not ``local``) and ``RAY_AUTH_*`` variables of the user stay as they are. Call it before Ray is imported.
    """
    if address != LOCAL or is_protected(environment):
        return
    assert "ray" not in sys.modules, "Ray reads the variables when it is imported"
    environment["RAY_AUTH_MODE"] = "token"
    environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def is_protected(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether somebody decided on Ray's authentication: ``protect_own_cluster`` or the user."""
    return any(name.startswith(_AUTHENTICATION) for name in environment)


def check_answers(address: str) -> None:
    """Ask a cluster for its status, because Ray itself waits ten minutes for one that is gone. In seconds where nothing listens there.

    Raises ConfigError that names the address.
    """
    if address == LOCAL:
        return
    check_listens(address)
    if address.startswith("ray://"):
        return
    named, remedy = _named(address), _REMEDY
    try:
        # Ray's own command, since its client cannot be interrupted.
        asked = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_ANSWER_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{named}: no Ray cluster answered within {_ANSWER_S:g} s; {remedy}") from None
    if asked.returncode != 0:
        said = [line.strip() for line in asked.stdout.splitlines() if line.strip()]
        cause = next((line for line in reversed(said) if re.match(r"[\w.]+: ", line)), said[-1] if said else "no reason given")
        raise ConfigError(f"{named}: Ray refused ({cause}); {remedy}")


def check_listens(address: str) -> None:
    """Whether somebody listens at a cluster's address, be it Ray or not. Raises ConfigError that names the address."""
    if address in (LOCAL, "auto"):
        return
    named = _named(address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{named} is no address; write HOST:PORT, as `ray start --head` prints it, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{named}: nothing answers there ({error}); {_REMEDY}") from None


def _named(address: str) -> str:
    return f"RAY_ADDRESS={address}" if os.environ.get("RAY_ADDRESS") else "a Ray cluster on this machine"
