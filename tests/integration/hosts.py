"""A second host on this machine: namespaces of its own for network, mounts, processes and host name, and a cable to them.

Linux only. The cable is a veth pair, made through netlink because not every container has ``ip``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
from multiprocessing import connection, forkserver
from pathlib import Path

from tests.deadlines import HANG_S

HOST = ("net", "uts")
# From linux/sched.h, prctl.h and mount.h.
_CLONE = {"mount": 0x20000, "uts": 0x4000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
_PR_SET_PDEATHSIG = 1
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
# From linux/rtnetlink.h, if_link.h, if_addr.h and veth.h.
_NEWLINK, _NEWADDR = 16, 20
_REQUEST, _ACK, _CREATE, _EXCLUSIVE = 1, 4, 0x400, 0x200
_IFNAME, _LINKINFO, _NET_NS_PID, _INFO_KIND, _INFO_DATA, _PEER, _ADDRESS, _LOCAL, _UP = 3, 18, 19, 1, 2, 1, 1, 2, 1


def refusal() -> str | None:
    """Why the kernel (or the container's profile) allows no second host here, or None."""
    return why_not("hosts.enter_namespaces(*hosts.HOST); hosts.settle('probe'); hosts.lay_cable('probe0', 'probe1', 1)")


def why_not(attempt: str) -> str | None:
    """Why a line of Python that uses this module fails in a process of its own, or None."""
    command = [sys.executable, "-c", f"from tests.integration import hosts; {attempt}"]
    probe = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=Path(__file__).parents[2])
    return None if probe.returncode == 0 else (probe.stderr.strip().splitlines() or [f"exit {probe.returncode}"])[-1]


def enter_namespaces(*kinds: str) -> None:
    """Go on in namespaces of our own for mounts and processes, and for ``kinds`` of ``HOST``; as their root, where we are not root.

    It is a child that goes on, with which all processes in these namespaces end; this process waits for it and ends as it does, and may
    have one thread only. Raises OSError where the kernel refuses.
    """
    user, group = os.geteuid(), os.getegid()
    flags = sum(_CLONE[kind] for kind in ("mount", "pid", *kinds, *(("user",) if user else ())))
    _call("unshare", flags)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", b"proc", b"/proc", b"proc", 0, None)


def fork_here() -> None:
    """Where this process was forked from a server outside of its namespaces: have its own, too, forked from one within, which is this."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_address is None:
        return
    address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    # Whoever was forked holds its other end, as this process does: when all have ended the server does, too.
    alive_r, alive_w = os.pipe()
    if os.fork() == 0:
        os.close(alive_w)
        try:
            forkserver.main(listener.detach(), alive_r, [])
        finally:
            os._exit(0)
    os.close(alive_r)
    listener.close()
    server._forkserver_address, server._forkserver_alive_fd = address, alive_w


def settle(name: str) -> None:
    """Make the namespaces this process is in a host: a name, a loopback device, and a /dev/shm that nobody else sees."""
    socket.sethostname(name)
    set_link("lo", up=True)
    mount_shm("4g")


def mount_shm(size: str) -> None:
    """Have a /dev/shm of that size of our own."""
    _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode())


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


def _call(function: str, *arguments: int | bytes | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}{arguments}: {os.strerror(ctypes.get_errno())}")


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
