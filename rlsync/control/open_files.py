"""Room for a connection of many: each peer of a listener is an open file of its process, and many systems begin with 1,024."""

from __future__ import annotations

import logging
import os
import resource

from rlsync.errors import ConfigError

_log = logging.getLogger(__name__)
# A peer of this host is a connection and a descriptor of its process.
_EACH = 2
# What the process may open meanwhile.
_SPARE = 256


def make_room(num_peers: int) -> None:
    """Let this process hold open files for so many more peers. Raises ConfigError where it must not have as many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + _EACH * num_peers
    if soft == resource.RLIM_INFINITY or needed + _SPARE <= soft:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{num_peers:,} actor ranks and engine workers need {needed:,} open files here, and this process may have {hard:,}; allow "
            f"more, as with ulimit -Hn {needed + _SPARE} or, in containers, docker run --ulimit nofile=65536"
        )
    wanted = needed + _SPARE if hard == resource.RLIM_INFINITY else min(needed + _SPARE, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _log.info("this process may have %d open files now instead of %d: %d actor ranks and engine workers dial in", wanted, soft, num_peers)
