import pytest

from meshgpu.adapters.interfaces import Interface, chosen_addresses, default_route_names, lan_addresses, pick, select

HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def test_default_routes_are_those_that_lead_everywhere_and_are_up() -> None:
    routes = HEADER + (
        "eth0\t00000000\t010A0A0A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
        "eth0\t000A0A0A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n"
        "wlan0\t00000000\t0101A8C0\t0002\t0\t0\t600\t00000000\t0\t0\t0\n"
        "wg0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n"
        "broken\n"
    )
    assert default_route_names(routes) == {"eth0"}


def test_no_route_table_means_no_default_route() -> None:
    assert default_route_names("") == set()


@pytest.mark.parametrize("name", ["eth0", "enp5s0", "wlan0", "br0", "br-lan", "bond0", "vmbr0", "eno1.20", "z0"])
@pytest.mark.parametrize("address", ["10.1.2.3", "172.16.0.9", "172.31.255.1", "192.168.1.7", "169.254.3.4"])
def test_a_private_address_counts(name: str, address: str) -> None:
    assert select([Interface(name, address)], set()) == [address]


@pytest.mark.parametrize(
    "name",
    [
        "docker0",
        "docker_gwbridge",
        "br-0f1e2d3c4b5a",
        "veth12ab34c",
        "virbr0",
        "cni0",
        "tun0",
        "tap1",
        "wg0",
        "tailscale0",
        "ztabcdef12",
        "podman1",
    ],
)
def test_containers_virtual_machines_and_tunnels_do_not_count_even_with_a_default_route(name: str) -> None:
    assert select([Interface(name, "172.17.0.1")], {name}) == []


@pytest.mark.parametrize("address", ["8.8.8.8", "100.64.0.1", "172.32.0.1", "192.169.0.1"])
def test_a_public_address_counts_only_with_a_default_route(address: str) -> None:
    assert select([Interface("eth0", address)], set()) == []
    assert select([Interface("eth0", address)], {"eth0"}) == [address]


def test_the_default_route_comes_first_and_nothing_comes_twice() -> None:
    interfaces = [
        Interface("eth1", "10.0.0.5"),
        Interface("wlan0", "192.168.0.5"),
        Interface("eth0", "10.0.0.9"),
        Interface("wlan0", "192.168.0.5"),
    ]
    assert select(interfaces, {"wlan0"}) == ["192.168.0.5", "10.0.0.9", "10.0.0.5"]


def test_loopback_never_counts_by_itself() -> None:
    assert select([Interface("lo", "127.0.0.1"), Interface("eth0", "127.1.2.3")], {"lo", "eth0"}) == []


def test_what_is_chosen_counts_by_name_or_address() -> None:
    interfaces = [Interface("lo", "127.0.0.1"), Interface("wg0", "10.8.0.2"), Interface("eth0", "10.0.0.9")]
    assert pick(interfaces, ["lo"]) == ["127.0.0.1"]
    assert pick(interfaces, ["10.8.0.2", "lo"]) == ["127.0.0.1", "10.8.0.2"]
    assert pick(interfaces, []) == []


def test_this_machine_has_loopback_only_when_asked() -> None:
    assert "127.0.0.1" not in lan_addresses()
    assert lan_addresses(include_loopback=True) == [*lan_addresses(), "127.0.0.1"]
    assert chosen_addresses(["lo"])[0] == "127.0.0.1"
    assert chosen_addresses(None) == lan_addresses()
