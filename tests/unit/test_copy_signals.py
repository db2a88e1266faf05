"""Handlers of signals that a library has put back its own way; see rlsync.copy.signals."""

from __future__ import annotations

from tests.signals import WAIT_S, seconds_until_heard

# What NVRTC does while it compiles.
TAKE_AND_GIVE_BACK = """
libc = ctypes.CDLL(None)
libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
libc.signal(signal.SIGTERM, libc.signal(signal.SIGTERM, None))
"""


def test_a_signal_is_heard_at_once_though_a_library_took_it_meanwhile() -> None:
    calls = TAKE_AND_GIVE_BACK.replace("\n", "\n    ")
    assert seconds_until_heard(f"from rlsync.copy.signals import heard_afterwards\nwith heard_afterwards():{calls}") < WAIT_S / 2


def test_without_that_it_waits_for_the_lock() -> None:
    """The negative control."""
    assert seconds_until_heard(TAKE_AND_GIVE_BACK) > WAIT_S / 2
