"""What can be said of the binding to NCCL without a GPU; tests/gpu calls it."""

from __future__ import annotations

import ctypes

import pytest

from rlsync.errors import ConfigError
from rlsync.transport import nccl


def test_structures_have_the_layout_of_the_header() -> None:
    """``ncclUniqueId`` is 128 bytes; ``ncclConfig_t`` of 2.17 begins with its size and has one pointer, at its end."""
    config = nccl._Config
    assert ctypes.sizeof(nccl._UniqueId) == nccl.UNIQUE_ID_BYTES == 128
    offsets = {"size": 0, "magic": 8, "version": 12, "blocking": 16, "cga_cluster_size": 20, "min_ctas": 24, "max_ctas": 28, "net_name": 32}
    assert {name: getattr(config, name).offset for name, *_ in config._fields_} == offsets
    assert ctypes.sizeof(config) == 40


def test_a_machine_without_nccl_is_told_what_it_needs() -> None:
    try:
        ctypes.CDLL("libnccl.so.2")
    except OSError:
        with pytest.raises(ConfigError, match="the nccl transport needs NCCL, which comes with a CUDA build of torch"):
            nccl.nccl_version()
    else:
        assert int(nccl.nccl_version().split(".")[0]) >= 2
