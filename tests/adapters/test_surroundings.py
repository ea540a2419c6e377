"""What `doctor` reads from the system, from files laid out as the kernel has them, and from this very machine."""

import os
import socket
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from meshgpu.adapters import surroundings
from meshgpu.adapters.surroundings import (
    disk_room,
    firewall_here,
    interface_kind,
    is_clock_kept,
    neighbours,
    read_networks,
    restricts_userns,
    socket_facts,
    udp_holder,
)
from meshgpu.model.doctor import InterfaceKind, SocketFacts

LAN = IPv4Interface("192.168.1.20/24")
ETHERNET, PPP, WIREGUARD = 1, 512, 65534


def card(system: Path, name: str, kind: int = ETHERNET, **parts: bool) -> None:
    """An interface in sysfs. parts: `device`, `tun_flags`, `brif`, `lower_eno1`: what else lies there."""
    place = system / name
    place.mkdir()
    (place / "type").write_text(f"{kind}\n")
    for part in parts:
        (place / part).mkdir()


@pytest.mark.parametrize(
    ("name", "kind", "parts", "expected"),
    [
        ("eth0", ETHERNET, ("device",), InterfaceKind.OFFICE),
        ("eth0", ETHERNET, (), InterfaceKind.OFFICE),  # in a container or a network namespace
        ("wlp2s0", ETHERNET, ("device",), InterfaceKind.OFFICE),
        ("office", WIREGUARD, (), InterfaceKind.TUNNEL),
        ("corp", PPP, (), InterfaceKind.TUNNEL),
        ("corp0", ETHERNET, ("tun_flags",), InterfaceKind.TUNNEL),
        ("ppp0", ETHERNET, (), InterfaceKind.TUNNEL),
        ("docker0", ETHERNET, ("brif",), InterfaceKind.CONTAINERS),
        ("br0", ETHERNET, ("brif",), InterfaceKind.CONTAINERS),
    ],
)
def test_kind_of_an_interface_is_the_kernels_word_or_its_name(
    tmp_path: Path, name: str, kind: int, parts: tuple[str, ...], expected: InterfaceKind
) -> None:
    card(tmp_path, name, kind, **dict.fromkeys(parts, True))
    assert interface_kind(name, LAN, tmp_path) is expected


@pytest.mark.parametrize(
    ("port", "parts", "expected"),
    [
        ("eno1", ("device",), InterfaceKind.OFFICE),
        ("bond0", ("lower_eno1",), InterfaceKind.OFFICE),
        ("veth12", (), InterfaceKind.CONTAINERS),
    ],
)
def test_bridge_is_the_offices_where_a_network_card_is_in_it(
    tmp_path: Path, port: str, parts: tuple[str, ...], expected: InterfaceKind
) -> None:
    card(tmp_path, "br0", brif=True)
    (tmp_path / "br0" / "brif" / port).mkdir()
    card(tmp_path, port, **dict.fromkeys(parts, True))
    assert interface_kind("br0", LAN, tmp_path) is expected


def test_loopback_is_known_by_its_address() -> None:
    (lo,) = [one for one in read_networks() if one.address == IPv4Interface("127.0.0.1/8")]
    assert lo.kind is InterfaceKind.LOOPBACK


def test_only_who_answered_arp_is_a_neighbour(tmp_path: Path) -> None:
    table = tmp_path / "arp"
    table.write_text(
        "IP address       HW type     Flags       HW address            Mask     Device\n"
        "10.0.0.2         0x1         0x2         52:54:00:12:34:56     *        eth0\n"
        "10.0.0.3         0x1         0x0         00:00:00:00:00:00     *        eth0\n"
        "10.0.0.4         0x1         0x0         52:54:00:12:34:57     *        eth0\n"
    )
    assert neighbours(table) == frozenset({"10.0.0.2"})
    assert neighbours(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(("text", "expected"), [("1\n", True), ("0\n", False), (None, False)])
def test_apparmors_restriction_is_what_the_kernel_says(tmp_path: Path, text: str | None, expected: bool) -> None:
    switch = tmp_path / "proc/sys/kernel/apparmor_restrict_unprivileged_userns"
    switch.parent.mkdir(parents=True)
    if text is not None:
        switch.write_text(text)
    assert restricts_userns(tmp_path) is expected


def test_firewall_is_the_one_that_is_switched_on(tmp_path: Path) -> None:
    assert firewall_here(tmp_path) == ""
    (tmp_path / "etc/ufw").mkdir(parents=True)
    (tmp_path / "etc/ufw/ufw.conf").write_text("# comment\nENABLED=no\nLOGLEVEL=low\n")
    assert firewall_here(tmp_path) == ""
    (tmp_path / "etc/ufw/ufw.conf").write_text("# comment\nENABLED=yes\nLOGLEVEL=low\n")
    assert firewall_here(tmp_path) == "ufw"
    (tmp_path / "run/firewalld").mkdir(parents=True)
    assert firewall_here(tmp_path) == "firewalld"


def test_kernel_tells_of_its_clock() -> None:
    assert is_clock_kept() in (True, False, None)


def test_holder_of_a_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        monkeypatch.setattr(surroundings, "MDNS_PORT", port)
        assert udp_holder(port) == Path("/proc/self/comm").read_text().strip()
        assert surroundings.mdns_fault() == "Address already in use"
    assert udp_holder(port) == ""
    assert surroundings.mdns_fault() == ""


def test_room_is_that_of_the_disk_where_a_directory_will_be(tmp_path: Path) -> None:
    free, total = disk_room(tmp_path / "not" / "yet")
    assert 0 < free <= total == disk_room(tmp_path)[1]


def test_socket_of_another_account_is_not_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.sock"
    assert socket_facts(path) is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    path.chmod(0o600)
    assert socket_facts(path) == SocketFacts(str(path), 0o600, is_own=True)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert socket_facts(path) == SocketFacts(str(path), 0o600, is_own=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert socket_facts(path) == SocketFacts(str(path), 0o600, is_own=True)
