"""Which of this machine's network addresses count as the office network's."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

import ifaddr

_NOT_THE_OFFICE: Final = re.compile(
    r"(docker|veth|virbr|cni|podman|lxcbr|lxdbr|flannel|cali|vboxnet|vmnet|tun|tap|wg|tailscale|zt).*"
    r"|br-[0-9a-f]{6,}"  # a Docker network; `br0` and `br-lan` carry the machine's own address
)
"""By name, not by driver: inside a container or a network namespace the office's interface is a veth called eth0."""

_PRIVATE: Final = tuple(map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16")))
"""RFC 1918 and link-local; 100.64.0.0/10 is left out: it belongs to providers and overlay networks."""

_ROUTES: Final = Path("/proc/net/route")
_ROUTE_IS_UP: Final = 1
"""RTF_UP of linux/route.h."""


@dataclass(frozen=True, slots=True)
class Interface:
    """One IPv4 address and the name of the interface that holds it."""

    name: str
    address: str


def lan_addresses(*, include_loopback: bool = False) -> list[str]:
    """IPv4 addresses under which the office reaches this machine, those with a default route first."""
    selected = select(read_interfaces(), default_route_names(_read_routes()))
    return [*selected, "127.0.0.1"] if include_loopback else selected


def chosen_addresses(chosen: Sequence[str] | None) -> list[str]:
    """IPv4 addresses of the interfaces that the owner chose by name or address; `lan_addresses()` where None."""
    return lan_addresses() if chosen is None else pick(read_interfaces(), chosen)


def select(interfaces: Iterable[Interface], default_routes: Collection[str]) -> list[str]:
    """Addresses that are private or on an interface with a default route, but not a container's, VM's or tunnel's."""
    counted = [
        interface
        for interface in interfaces
        if not _NOT_THE_OFFICE.fullmatch(interface.name)
        and not IPv4Address(interface.address).is_loopback
        and (interface.name in default_routes or _is_private(interface.address))
    ]
    counted.sort(key=lambda interface: (interface.name not in default_routes, interface.name))
    return list(dict.fromkeys(interface.address for interface in counted))


def pick(interfaces: Iterable[Interface], chosen: Collection[str]) -> list[str]:
    """Addresses that are chosen themselves or lie on a chosen interface."""
    picked = (interface for interface in interfaces if interface.name in chosen or interface.address in chosen)
    return list(dict.fromkeys(interface.address for interface in picked))


def default_route_names(routes: str) -> set[str]:
    """Names of the interfaces that /proc/net/route's text gives a default route."""
    names = set()
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            continue
        name, destination, flags, mask = fields[0], fields[1], fields[3], fields[7]
        if destination == mask == "00000000" and int(flags, 16) & _ROUTE_IS_UP:
            names.add(name)
    return names


def read_interfaces() -> list[Interface]:
    """All IPv4 addresses of this machine; an alias (`eth0:1`) goes by the name of its interface."""
    return [
        Interface(adapter.name.partition(":")[0], address.ip)
        for adapter in ifaddr.get_adapters()
        for address in adapter.ips
        if isinstance(address.ip, str)
    ]


def _read_routes() -> str:
    return _ROUTES.read_text() if _ROUTES.exists() else ""


def _is_private(address: str) -> bool:
    return any(IPv4Address(address) in network for network in _PRIVATE)
