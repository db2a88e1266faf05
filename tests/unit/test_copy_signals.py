"""Handlers of signals that a library has put back its own way; see rlsync.copy.signals."""

from __future__ import annotations

from tests.signals import ends_a_wait

# What NVRTC does while it compiles.
TAKE_AND_GIVE_BACK = """
libc = ctypes.CDLL(None)
libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
libc.signal(signal.SIGTERM, libc.signal(signal.SIGTERM, None))
"""


def test_a_signal_is_heard_at_once_though_a_library_took_it_meanwhile() -> None:
    calls = TAKE_AND_GIVE_BACK.replace("\n", "\n    ")
    assert ends_a_wait(f"from rlsync.copy.signals import heard_afterwards\nwith heard_afterwards():{calls}", wait_s=60)


def test_without_that_it_waits_for_the_lock() -> None:
    """The negative control."""
    assert not ends_a_wait(TAKE_AND_GIVE_BACK, wait_s=0.5)
