"""Findings about the network: loopback, the host's addresses, free ports, and proxies that would catch local calls."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlsync.cli.doctor.finding import Finding, ok

# Engines, actor ranks, Ray and gloo take some dozens on a host.
MIN_FREE_PORTS = 1000
_SIOCGIFADDR = 0x8915
_LOCAL_NAMES = ("127.0.0.1", "localhost")


def examine() -> Iterator[Finding]:
    yield examine_loopback("127.0.0.1")
    yield examine_addresses(addresses(), socket.gethostname())
    yield examine_ports(Path("/proc"))
    yield from examine_proxies(os.environ)


def examine_loopback(host: str) -> Finding:
    """Listen, connect and exchange a byte, as peers of one host do."""
    try:
        with socket.create_server((host, 0)) as listener, socket.create_connection(listener.getsockname(), timeout=5) as ours:
            theirs, _ = listener.accept()
            with theirs:
                ours.sendall(b"x")
                theirs.settimeout(5)
                heard = theirs.recv(1)
    except OSError as error:
        return Finding("problem", f"{host} cannot be used: {error}", "bring the loopback interface up (ip link set lo up)")
    assert heard == b"x"
    return ok(f"{host} works: actor and engines of this host can talk")


def addresses() -> dict[str, str]:
    """IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def examine_addresses(found: Mapping[str, str], hostname: str) -> Finding:
    """What other hosts could reach, where weight_sync listens there at all."""
    others = {name: address for name, address in found.items() if not address.startswith("127.")}
    if not others:
        return ok(f"{hostname} has no address but loopback: engines on other hosts cannot reach it")
    named = ", ".join(f"{address} ({name})" for name, address in others.items())
    return ok(f"{hostname} has {named}; rlsync listens on loopback unless told otherwise")


def examine_ports(proc: Path) -> Finding:
    """Ports that the system gives out by itself, without those that are taken."""
    first, last = map(int, (proc / "sys/net/ipv4/ip_local_port_range").read_text().split())
    taken = {port for table in ("tcp", "tcp6") for port in _ports(proc / "net" / table) if first <= port <= last}
    free = last - first + 1 - len(taken)
    text = f"{free:,} ports are free of {first} to {last}"
    if free < MIN_FREE_PORTS:
        return Finding("warning", text, "widen net.ipv4.ip_local_port_range, or end what holds them (ss -tan)")
    return ok(text)


def _ports(table: Path) -> Iterator[int]:
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        yield int(line.split()[1].rpartition(":")[2], 16)


def examine_proxies(environment: Mapping[str, str]) -> Iterator[Finding]:
    """A proxy that is asked for 127.0.0.1 answers for another machine's."""
    lowered = {name.lower(): value for name, value in environment.items()}
    if not (lowered.get("http_proxy") or lowered.get("all_proxy")):
        return
    spared = {name.strip() for name in lowered.get("no_proxy", "").split(",")}
    missing = [name for name in _LOCAL_NAMES if name not in spared and "*" not in spared]
    if missing:
        yield Finding(
            "warning",
            f"a proxy is set and no_proxy lacks {', '.join(missing)}: calls to local engines may go there",
            "add them to no_proxy",
        )
