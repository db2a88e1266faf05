"""A second host on this machine: namespaces of its own for network, mounts, processes and host name, and a cable to them.

Linux only. The cable is a veth pair, made through netlink because not every container has ``ip``.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

from tests.deadlines import HANG_S

_UNSHARE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
# From linux/rtnetlink.h, if_link.h, if_addr.h and veth.h.
_NEWLINK, _NEWADDR = 16, 20
_REQUEST, _ACK, _CREATE, _EXCLUSIVE = 1, 4, 0x400, 0x200
_IFNAME, _LINKINFO, _NET_NS_PID, _INFO_KIND, _INFO_DATA, _PEER, _ADDRESS, _LOCAL, _UP = 3, 18, 19, 1, 2, 1, 1, 2, 1


def unshare_command(*, new_user: bool) -> list[str]:
    """The command behind which a program runs on a host of its own; ``new_user`` where this process is not root."""
    return [*_UNSHARE, *(("--user", "--map-root-user") if new_user else ()), sys.executable]


def refusal() -> str | None:
    """Why the kernel (or the container's profile) allows no second host here, or None."""
    program = "from tests.integration import hosts; hosts.settle('probe'); hosts.lay_cable('probe0', 'probe1', 1)"
    command = [*unshare_command(new_user=os.geteuid() != 0), "-c", program]
    probe = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=Path(__file__).parents[2])
    return None if probe.returncode == 0 else (probe.stderr.strip().splitlines() or [f"exit {probe.returncode}"])[-1]


def settle(name: str) -> None:
    """Make the namespaces this process is in a host: a name, a loopback device, and a /dev/shm that nobody else sees."""
    socket.sethostname(name)
    set_link("lo", up=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4g"):
        raise OSError(ctypes.get_errno(), "mount /dev/shm")


def lay_cable(here: str, there: str, pid: int) -> None:
    """A pair of network devices, ``here`` in this process's namespace and ``there`` in that of process ``pid``."""
    peer = _interface() + _attribute(_IFNAME, there.encode() + b"\0") + _attribute(_NET_NS_PID, struct.pack("I", pid))
    info = _attribute(_INFO_KIND, b"veth\0") + _attribute(_INFO_DATA, _attribute(_PEER, peer))
    _tell(_NEWLINK, _interface() + _attribute(_IFNAME, here.encode() + b"\0") + _attribute(_LINKINFO, info), _CREATE | _EXCLUSIVE)


def set_address(device: str, address: str) -> None:
    """Give a device an IPv4 address in a network of 256."""
    packed = socket.inet_aton(address)
    head = struct.pack("BBBBI", socket.AF_INET, 24, 0, 0, socket.if_nametoindex(device))
    _tell(_NEWADDR, head + _attribute(_LOCAL, packed) + _attribute(_ADDRESS, packed), _CREATE | _EXCLUSIVE)
    set_link(device, up=True)


def set_link(device: str, *, up: bool) -> None:
    """Switch a device on, or off: packets are then lost without a word."""
    _tell(_NEWLINK, _interface(socket.if_nametoindex(device), _UP if up else 0, _UP), 0)


def carried_bytes(device: str) -> tuple[int, int]:
    """Bytes received and sent by a device, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            counters = numbers.split()
            return int(counters[0]), int(counters[8])
    raise KeyError(device)


def listeners() -> set[tuple[str, int]]:
    """IPv4 addresses and ports on which anything of this host listens."""
    found = set()
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        if state == "0A":
            address, port = local.split(":")
            found.add((socket.inet_ntoa(struct.pack("<I", int(address, 16))), int(port, 16)))
    return found


def _interface(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("BxHiII", socket.AF_UNSPEC, 0, index, flags, change)


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _tell(kind: int, payload: bytes, flags: int) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(payload), kind, _REQUEST | _ACK | flags, 1, 0) + payload)
        code = struct.unpack_from("i", kernel.recv(65536), 16)[0]
    if code:
        raise OSError(-code, f"netlink: {os.strerror(-code)}")
