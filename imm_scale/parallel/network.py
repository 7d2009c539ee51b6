"""Which network interface gloo talks over, on a machine that has several.

NCCL looks for links between the nodes by itself. Gloo takes the address that the machine's own name stands for: often
one of a management network, or of none at all (127.0.1.1).
"""

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def interfaces() -> dict[str, list[str]]:
    """{name: its IP addresses} of the interfaces that are up and lead out of this machine."""
    states = psutil.net_if_stats()
    addresses_of = {
        name: [_plain(entry.address) for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }
    return {
        name: addresses
        for name, addresses in addresses_of.items()
        if addresses and not any(ipaddress.ip_address(address).is_loopback for address in addresses)
    }


def _plain(address: str) -> str:
    """Without the scope of a link-local address, and an IPv4 address as such."""
    return address.split("%")[0].removeprefix("::ffff:")


def allows(pattern: str, name: str) -> bool:
    """Whether NCCL may use an interface by NCCL_SOCKET_IFNAME: beginnings of names, `=` whole names, `^` all others."""
    others = pattern.startswith("^")
    listed = pattern.removeprefix("^")
    whole = listed.startswith("=")
    names = [entry.split(":")[0] for entry in listed.removeprefix("=").split(",") if entry]
    return any(name == entry if whole else name.startswith(entry) for entry in names) != others


def _source_address(host: str) -> str | None:
    """This machine's address from which packets to a host leave (none is sent), None for a name without an address."""
    try:
        family, *_, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            return _plain(probe.getsockname()[0])
    except OSError:
        return None


def gloo_interface(hosts: Sequence[str], env: Mapping[str, str]) -> str | None:
    """One interface for gloo, which knows neither beginnings of names nor `^`.

    Args:
        hosts: of the job, as far as they are known; rank 0's may stand for this machine's loopback on its own node.
        env: GLOO_SOCKET_IFNAME decides where it is set; else NCCL_SOCKET_IFNAME says which may be taken.

    Returns:
        The one on the way to the first host that is not reached inside this machine; else the first that
        NCCL_SOCKET_IFNAME names; None where all is inside this machine: gloo needs no word then.
    """
    if env.get(GLOO):
        return env[GLOO]
    pattern = env.get(NCCL, "")
    usable = {name: addresses for name, addresses in interfaces().items() if not pattern or allows(pattern, name)}
    sources = [_source_address(host) for host in hosts]
    routed = [name for source in sources for name, addresses in usable.items() if source in addresses]
    named = list(usable) if pattern and not pattern.startswith("^") else []
    return next(iter(routed + named), None)


def describe() -> str:
    """This machine's interfaces, for a person who has to choose one."""
    return ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in interfaces().items()) or "none but loopback"
