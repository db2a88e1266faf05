"""Room for a connection of many: each peer of a listener is an open file of its process, and many systems begin with 1,024."""

from __future__ import annotations

import logging
import os
import resource

from rlsync.errors import ConfigError

_log = logging.getLogger(__name__)
# A peer of this host is a connection and a descriptor of its process.
_EACH = 2
# What the process opens meanwhile.
_SPARE = 256


def make_room(num_peers: int) -> None:
    """Let this process hold open files for so many more peers. Raises ConfigError where it must not have as many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + _EACH * num_peers + _SPARE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(
            f"{num_peers:,} actor ranks and engine workers need {wanted:,} open files here, and this process may have {hard:,}; allow "
            f"more, as with ulimit -Hn {wanted} or, in containers, docker run --ulimit nofile=65536"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _log.info("this process may have %d open files now instead of %d: %d actor ranks and engine workers dial in", wanted, soft, num_peers)
