"""What `doctor` looks at outside the agent: interfaces, kernel, ports, firewall, disk, socket. All of it blocks."""

import contextlib
import ctypes
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final

import ifaddr

from meshgpu.model.doctor import Interface, InterfaceKind, SocketFacts

MDNS_PORT: Final = 5353
TUNNELS: Final = ("tun", "tap", "ppp", "wg", "tailscale", "zt", "utun", "ipsec", "vpn", "nordlynx", "gpd", "cscotun")
"""By these names, where the kernel's type of an interface does not tell: some clients put their own behind a veth."""
CONTAINERS: Final = (
    "docker",
    "veth",
    "virbr",
    "cni",
    "podman",
    "lxcbr",
    "lxdbr",
    "flannel",
    "cali",
    "vboxnet",
    "vmnet",
)

_TUNNEL_TYPES: Final = frozenset({512, 65534, 768, 769, 776, 778})
"""ARPHRD_PPP, NONE (tun, WireGuard), TUNNEL, TUNNEL6, SIT and IPGRE of linux/if_arp.h."""
_ATF_COM: Final = 0x2
"""Of linux/if_arp.h: the entry is complete."""
_TIME_ERROR: Final = 5
"""Of adjtimex(2): no server keeps the clock."""
_TIMEX_BYTES: Final = 512
"""More than struct timex has anywhere; its first word, `modes`, is 0: only read."""
_UFW: Final = Path("etc/ufw/ufw.conf")
_USERNS: Final = Path("proc/sys/kernel/apparmor_restrict_unprivileged_userns")


def read_networks(system: Path = Path("/sys/class/net")) -> tuple[Interface, ...]:
    """All IPv4 addresses of this machine, and what kind of interface each is on."""
    found = []
    for adapter in ifaddr.get_adapters():
        name = adapter.name.partition(":")[0]
        for address in adapter.ips:
            if isinstance(address.ip, str):
                network = IPv4Interface(f"{address.ip}/{address.network_prefix}")
                found.append(Interface(name, network, interface_kind(name, network, system)))
    return tuple(found)


def interface_kind(name: str, network: IPv4Interface, system: Path) -> InterfaceKind:
    """A bridge counts as the office's where a network card is in it; one with halves of cables only is containers'."""
    if network.is_loopback or name == "lo":
        return InterfaceKind.LOOPBACK
    place = system / name
    if (place / "tun_flags").exists() or _number(place / "type") in _TUNNEL_TYPES or name.startswith(TUNNELS):
        return InterfaceKind.TUNNEL
    if name.startswith(CONTAINERS):
        return InterfaceKind.CONTAINERS
    ports = place / "brif"
    if ports.exists() and not any(_leads_out(system / port.name) for port in ports.iterdir()):
        return InterfaceKind.CONTAINERS
    return InterfaceKind.OFFICE


def _leads_out(port: Path) -> bool:
    """Whether a bridge's port is a network card, or is made of one: a bond, a VLAN."""
    return (port / "device").exists() or any(port.glob("lower_*"))


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


def neighbours(arp: Path = Path("/proc/net/arp")) -> frozenset[str]:
    """Addresses that answered ARP within the last minutes: machines on this very network, which may be off by now."""
    try:
        rows = [line.split() for line in arp.read_text().splitlines()[1:]]
    except OSError:
        return frozenset()
    return frozenset(row[0] for row in rows if len(row) > 3 and int(row[2], 16) & _ATF_COM)


def restricts_userns(root: Path = Path("/")) -> bool:
    """Whether AppArmor keeps programs without a profile from user namespaces, as on Ubuntu since 24.04."""
    return _number(root / _USERNS) > 0


def firewall_here(root: Path = Path("/")) -> str:
    """`ufw` where it is enabled, `firewalld` where it runs, else empty: rules may be there all the same."""
    if (root / "run/firewalld.pid").exists() or (root / "run/firewalld").exists():
        return "firewalld"
    try:
        lines = (root / _UFW).read_text().lower().split()
    except OSError:
        return ""
    return "ufw" if "enabled=yes" in lines else ""


def is_clock_kept() -> bool | None:
    """Whether the kernel's clock follows a time server; None where the kernel does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    state = int(libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
    return None if state < 0 else state != _TIME_ERROR


def mdns_fault() -> str:
    """Why UDP port 5353 cannot be opened together with others; empty where it can."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            trial.bind(("", MDNS_PORT))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def udp_holder(port: int = MDNS_PORT, proc: Path = Path("/proc")) -> str:
    """The program that has a UDP port, where this account can see it; empty otherwise."""
    inodes = {f"socket:[{inode}]" for inode in _inodes(port, proc)}
    for directory in proc.glob("[0-9]*") if inodes else ():
        if not inodes.isdisjoint(_open_files(directory / "fd")):
            with contextlib.suppress(OSError):
                return (directory / "comm").read_text().strip()
    return ""


def _open_files(directory: Path) -> Iterator[str]:
    """What the descriptors of a process lead to; nothing of one that is gone, or is not for this account to see."""
    with contextlib.suppress(OSError):
        for entry in list(directory.iterdir()):
            with contextlib.suppress(OSError):  # closed meanwhile
                yield str(entry.readlink())


def _inodes(port: int, proc: Path) -> Iterator[str]:
    for name in ("udp", "udp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if len(fields) > 9 and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def disk_room(directory: Path) -> tuple[int, int]:
    """(free, total) bytes of the disk that holds `directory`, or will once it is made."""
    while not directory.exists():
        directory = directory.parent
    usage = shutil.disk_usage(directory)
    return usage.free, usage.total


def socket_facts(path: Path) -> SocketFacts | None:
    """The control socket as the file system shows it to this account; None where there is none.

    One that this account may not even look at belongs to another.
    """
    try:
        facts = path.lstat()
    except PermissionError:
        return SocketFacts(str(path), 0, is_own=False)
    except OSError:
        return None
    return SocketFacts(str(path), stat.S_IMODE(facts.st_mode), os.geteuid() in (0, facts.st_uid))


def has_program(name: str) -> bool:
    return shutil.which(name) is not None
