"""Real multicast on loopback, under mesh names of each test's own; the office network only inside namespaces."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import IPVersion, ServiceInfo
from zeroconf.asyncio import AsyncZeroconf

from meshgpu.adapters import mdns as mdns_module
from meshgpu.adapters.mdns import MAX_TXT_BYTES, SERVICE_TYPE, Mdns, announcement, sighting_of
from meshgpu.errors import MeshgpuError
from meshgpu.model.gossip import Sighting
from meshgpu.model.ids import Address, NodeId, base32

MACHINE = Path(__file__).with_name("mdns_machine.py")
DEADLINE_S = 20.0
STOP_LIMIT_S = 3.0


def new_node() -> NodeId:
    return NodeId(base32(os.urandom(33))[:52])


def sighting(**changes: Any) -> Sighting:
    """An announcement under a mesh name that no other test has."""
    node = new_node()
    usual = Sighting(node, "0123456789ab", f"lab-{node[:8]}", 1, (Address("127.0.0.1:7443"),), 0, "2x RTX 4090 24GB")
    return replace(usual, **changes)


class Listener:
    """A started Mdns on loopback and what it saw."""

    def __init__(self, mdns: Mdns) -> None:
        self.mdns = mdns
        self.seen: list[Sighting] = []
        self._news = asyncio.Event()

    def emit(self, sighting: Sighting) -> None:
        self.seen.append(sighting)
        self._news.set()

    async def until(self, holds: Callable[[Sighting], bool]) -> Sighting:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for one in self.seen:
                    if holds(one):
                        return one
                self._news.clear()
                await self._news.wait()


@pytest.fixture(autouse=True)
async def nothing_left_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - before == {asyncio.current_task()} - before


@asynccontextmanager
async def listening(*interfaces: str, poll_period_s: float = 30.0) -> AsyncIterator[Listener]:
    listener = Listener(Mdns(interfaces or ["lo"], poll_period_s=poll_period_s))
    await listener.mdns.start(listener.emit)
    try:
        yield listener
    finally:
        started = time.monotonic()
        await listener.mdns.stop()
        assert time.monotonic() - started < STOP_LIMIT_S


# -- on loopback -----------------------------------------------------------------------------------------------------


async def test_an_announcement_is_seen_as_it_was_made() -> None:
    announced = sighting(addresses=(Address("127.0.0.1:7450"), Address("127.0.0.2:7450")), pairing_port=7444)
    async with listening() as here, listening("127.0.0.1") as there:
        await here.mdns.announce(announced)
        assert await there.until(lambda one: one.node == announced.node) == announced


async def test_a_name_that_does_not_fit_is_cut() -> None:
    announced = sighting(mesh_name="ä" * 300)
    async with listening() as here, listening() as there:
        await here.mdns.announce(announced)
        assert (await there.until(lambda one: one.node == announced.node)).mesh_name == "ä" * 20


async def test_an_announcement_that_cannot_be_made_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Sighting) -> None:
        raise ValueError("a record of 300 bytes")

    monkeypatch.setattr(mdns_module, "announcement", refuse)
    async with listening() as here:
        with pytest.raises(MeshgpuError, match="300 bytes") as raised:
            await here.mdns.announce(sighting())
    assert raised.value.code == "no-mdns"


async def test_who_comes_later_sees_what_was_announced_before() -> None:
    announced = sighting()
    async with listening() as here:
        await here.mdns.announce(announced)
        async with listening() as there:
            assert await there.until(lambda one: one.node == announced.node) == announced


async def test_an_announcement_that_is_said_again_is_heard_though_it_is_no_news() -> None:
    announced, other = sighting(), sighting()
    async with listening() as here, listening() as there:
        assert not here.mdns.remind()
        await here.mdns.announce(announced)
        await there.until(lambda one: one.node == announced.node)
        async with asyncio.timeout(DEADLINE_S):
            while there.mdns.heard(announced.node, 1.5):  # noqa: ASYNC110  # zeroconf drops what is said twice in a second
                await asyncio.sleep(0.05)
            assert here.mdns.remind()
            while not there.mdns.heard(announced.node, 1.5):  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0.05)
        assert not there.mdns.heard(other.node, 1e6)
        assert len([one for one in there.seen if one.node == announced.node]) == 1


async def test_ones_own_announcement_is_not_emitted() -> None:
    mine, yours = sighting(), sighting()
    async with listening() as here, listening() as there:
        await here.mdns.announce(mine)
        await there.mdns.announce(yours)
        await there.until(lambda one: one.node == mine.node)
        await here.until(lambda one: one.node == yours.node)
        assert mine.node not in {one.node for one in here.seen}


async def test_a_change_is_emitted_and_so_is_the_way_back() -> None:
    closed = sighting()
    opened = replace(closed, pairing_port=7444)
    async with listening() as here, listening() as there:
        for announced in (closed, opened, closed, closed, replace(closed, addresses=(Address("127.0.0.3:7500"),))):
            await here.mdns.announce(announced)
        await there.until(lambda one: one.addresses == ("127.0.0.3:7500",))
        ours = [one for one in there.seen if one.node == closed.node]
        assert [one for at, one in enumerate(ours) if one not in ours[at - 1 : at]] == [
            closed,
            opened,
            closed,
            replace(closed, addresses=(Address("127.0.0.3:7500"),)),
        ]


async def test_without_an_address_the_announcement_is_withdrawn() -> None:
    announced = sighting()
    async with listening() as here:
        await here.mdns.announce(announced)
        await here.mdns.announce(replace(announced, addresses=()))
        async with listening() as there:
            other = sighting()
            await here.mdns.announce(
                replace(announced, addresses=(Address("[::1]:7443"), Address("rig7.example:7443")))
            )
            async with listening() as third:
                await third.mdns.announce(other)
                await there.until(lambda one: one.node == other.node)
            assert announced.node not in {one.node for one in there.seen}


async def test_stop_says_goodbye() -> None:
    announced = sighting()
    async with listening() as there:
        async with listening() as here:
            await here.mdns.announce(announced)
            await there.until(lambda one: one.node == announced.node)
        async with asyncio.timeout(DEADLINE_S):
            name = f"{announced.node[:12]}.{SERVICE_TYPE}"
            assert there.mdns._zeroconf is not None
            cache = there.mdns._zeroconf.zeroconf.cache
            while cache.async_entries_with_name(name):  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0.01)


async def test_three_processes_on_one_machine_see_each_other() -> None:
    nodes = [new_node() for _ in range(3)]
    async with AsyncExitStack() as stack:
        machines = [await stack.enter_async_context(machine([], node, "three", "lo")) for node in nodes]
        for me, output in zip(nodes, machines, strict=True):
            await output.until_seen(set(nodes) - {me})


async def test_strangers_and_their_nonsense_do_no_harm() -> None:
    good = sighting()
    node = new_node()
    bad = [
        ServiceInfo(
            SERVICE_TYPE, f"printer.{SERVICE_TYPE}", port=1, properties={"id": node}, addresses=[b"\x7f\0\0\1"]
        ),
        ServiceInfo(
            SERVICE_TYPE, f"{node[:12]}.{SERVICE_TYPE}", port=1, properties=b"\xff\xfe", addresses=[b"\x7f\0\0\1"]
        ),
        ServiceInfo(SERVICE_TYPE, f"{new_node()[:12]}.{SERVICE_TYPE}", port=0, properties={"x": "y" * 200}),
        ServiceInfo(SERVICE_TYPE, f"weird name \u2603 .{SERVICE_TYPE}", port=9, addresses=[b"\x7f\0\0\1"]),
    ]
    async with listening() as here, listening() as there:
        stranger = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
        for info in bad:
            await (await stranger.async_register_service(info, cooperating_responders=True, strict=False))
        await here.mdns.announce(good)
        await there.until(lambda one: one.node == good.node)
        assert node not in {one.node for one in there.seen}
        await stranger.async_close()


async def test_a_port_that_is_taken_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    mdns = Mdns(["lo"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        monkeypatch.setattr(mdns_module, "MDNS_PORT", holder.getsockname()[1])
        with pytest.raises(MeshgpuError, match="cannot listen for mDNS on UDP port") as error:
            await mdns.start(lambda _: None)
    assert error.value.code == "no-mdns"
    assert error.value.hint
    await mdns.announce(sighting())
    await mdns.stop()


async def test_interfaces_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[str] = []
    monkeypatch.setattr(mdns_module, "chosen_addresses", lambda _: list(addresses))
    announced = sighting()
    async with listening(poll_period_s=0.02) as here:
        await here.mdns.announce(announced)
        addresses.append("127.0.0.1")
        async with listening() as there:
            assert await there.until(lambda one: one.node == announced.node) == announced


# -- what goes out and what comes in ---------------------------------------------------------------------------------


def test_the_record_holds_these_facts_and_no_host_name() -> None:
    announced = sighting(pairing_port=7444)
    info = announcement(announced)
    assert info is not None
    label = announced.node[:12]
    assert info.properties == {
        b"txtvers": b"1",
        b"id": announced.node.encode(),
        b"mesh": b"0123456789ab",
        b"name": announced.mesh_name.encode(),
        b"p": b"1",
        b"pair": b"7444",
        b"gpus": b"2x RTX 4090 24GB",
    }
    assert (info.name, info.server) == (f"{label}.{SERVICE_TYPE}", f"{label}.local.")
    assert socket.gethostname() not in str(info)


def test_only_addresses_on_the_first_ones_port_are_announced() -> None:
    info = announcement(
        sighting(addresses=tuple(map(Address, ("rig7:1", "10.0.0.1:7443", "10.0.0.2:1", "10.0.0.3:7443"))))
    )
    assert info is not None
    assert (info.parsed_addresses(), info.port) == (["10.0.0.1", "10.0.0.3"], 7443)


def test_a_closed_pairing_port_is_absent() -> None:
    info = announcement(sighting())
    assert info is not None
    assert b"pair" not in info.properties


def test_the_longest_record_stays_below_the_limit() -> None:
    longest = sighting(mesh_name="m" * 40, protocol=99999, pairing_port=65535, gpus="8x Simulated Über-GPU 24GB, " * 20)
    info = announcement(longest)
    assert info is not None
    assert len(info.text) <= MAX_TXT_BYTES
    received = sighting_of(info, accept_loopback=True)
    assert received is not None
    assert longest.gpus.startswith(received.gpus)
    assert received == replace(longest, gpus=received.gpus)


def received(announced: Sighting, **facts: bytes | None) -> Sighting | None:
    """What a node makes of `announced` whose TXT has other `facts` (None: absent)."""
    info = announcement(announced)
    assert info is not None
    properties = info.properties | {key.encode(): value for key, value in facts.items()}
    info = ServiceInfo(
        SERVICE_TYPE,
        info.name,
        port=info.port,
        server=info.server,
        addresses=info.addresses,
        properties={key: value for key, value in properties.items() if value is not None},
    )
    return sighting_of(info, accept_loopback=True)


@pytest.mark.parametrize(
    "facts",
    [
        {"txtvers": b"2"},
        {"txtvers": None},
        {"id": b"a" * 52},
        {"id": b"A" * 52},
        {"id": None},
        {"mesh": b"short"},
        {"mesh": b"0123456789AB"},
        {"p": None},
        {"p": b"-1"},
        {"p": b"100000"},
        {"p": "٣".encode()},
        {"pair": b"65536"},
        {"pair": b""},
        {"pair": b"7444x"},
        {"x": b"y" * 200, "z": b"y" * 120},
    ],
)
def test_a_malformed_record_is_ignored(facts: dict[str, bytes | None]) -> None:
    announced = sighting()
    assert received(announced) == announced
    assert received(announced, **facts) is None


@pytest.mark.parametrize("rest", ["", "a" * 39, "a" * 41, "A" * 40, "1" * 40, "a" * 39 + "\n"])
def test_an_id_that_is_none_is_ignored(rest: str) -> None:
    announced = sighting()
    assert received(announced, id=(announced.node[:12] + rest).encode()) is None


def test_texts_are_cut_and_freed_of_control_characters() -> None:
    one = received(sighting(), name=b"lab\x1b[31m\n" + b"n" * 60, gpus=b"2x\x00RTX\xff\r\n" + b"g" * 190)
    assert one is not None
    assert one.mesh_name == "lab[31m" + "n" * 33
    assert one.gpus.startswith("2xRTX")
    assert len(one.gpus) <= 160
    assert (one.mesh_name + one.gpus).isprintable()


def test_a_mesh_that_is_none_is_empty() -> None:
    announced = sighting(mesh_tag="", mesh_name="")
    assert received(announced) == announced


@pytest.mark.parametrize("host", ["0.0.0.0", "224.0.0.251", "127.0.0.1"])
def test_addresses_that_lead_nowhere_are_left_out(host: str) -> None:
    info = announcement(sighting(addresses=(Address("10.0.0.7:7443"), Address(f"{host}:7443"))))
    assert info is not None
    one = sighting_of(info, accept_loopback=False)
    assert one is not None
    assert one.addresses == ("10.0.0.7:7443",)
    only = announcement(sighting(addresses=(Address(f"{host}:7443"),)))
    assert only is not None
    assert sighting_of(only, accept_loopback=False) is None


def test_a_flood_of_addresses_is_cut() -> None:
    node = new_node()
    info = announcement(sighting(node=node))
    assert info is not None
    info.addresses = [bytes((10, 0, 0, last)) for last in range(1, 200)]
    one = sighting_of(info, accept_loopback=False)
    assert one is not None
    assert len(one.addresses) == 8


@given(text=st.binary(max_size=500), label=st.text(max_size=20))
def test_no_record_makes_it_raise(text: bytes, label: str) -> None:
    node = new_node()
    for name in (node[:12], label):
        info = ServiceInfo(
            SERVICE_TYPE, f"{node[:12]}.{SERVICE_TYPE}", port=1, properties=text, addresses=[b"\x0a\0\0\1"]
        )
        info.name = f"{name}.{SERVICE_TYPE}"
        assert sighting_of(info, accept_loopback=False) is None


# -- machines of their own -------------------------------------------------------------------------------------------


class Output:
    """The lines of a machine."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.seen: dict[str, Any] = {}
        self.announced: list[str] | None = None

    async def until_seen(self, nodes: set[NodeId]) -> None:
        await self._read(lambda: self.announced is not None and nodes <= set(self.seen))

    async def _read(self, holds: Callable[[], bool]) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                line = json.loads(await self.process.stdout.readline())
                if "announced" in line:
                    self.announced = line["announced"]
                else:
                    self.seen[line["node"]] = line


@asynccontextmanager
async def machine(prefix: list[str], node: NodeId, *arguments: str) -> AsyncIterator[Output]:
    command = [*prefix, sys.executable, "-W", "error", str(MACHINE), node, *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Output(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()
    assert process.returncode == 0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=DEADLINE_S)


@pytest.fixture
def office() -> Iterator[tuple[str, str]]:
    """Two namespaces on one switch, each with a docker0 of the same address."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` to make network namespaces")
    switch, *rigs = (f"mdns{os.getpid()}-{name}" for name in ("switch", "1", "2"))
    made: list[str] = []
    try:
        for name in (switch, *rigs):
            ip("netns", "add", name)
            made.append(name)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, rig in enumerate(rigs, start=1):
            ip("-n", rig, "link", "set", "lo", "up")
            ip("link", "add", "eth0", "netns", rig, "type", "veth", "peer", "name", f"port{number}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
            ip("-n", rig, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", rig, "link", "add", "docker0", "type", "bridge")
            ip("-n", rig, "addr", "add", "172.17.0.1/16", "dev", "docker0")
            for interface in ("eth0", "docker0"):
                ip("-n", rig, "link", "set", interface, "up")
        yield rigs[0], rigs[1]
    finally:
        for name in made:
            ip("netns", "delete", name)


@pytest.mark.hosts
async def test_two_machines_find_each_other_without_any_address(office: tuple[str, str]) -> None:
    first, second = new_node(), new_node()
    enter = [["ip", "netns", "exec", rig] for rig in office]
    async with machine(enter[0], first, "office") as here, machine(enter[1], second, "office") as there:
        await here.until_seen({second})
        await there.until_seen({first})
        assert there.seen[first]["addresses"] == ["10.77.0.1:7443"]
        assert here.seen[second]["addresses"] == ["10.77.0.2:7443"]
        assert there.seen[first]["mesh_name"] == "office"
        assert set(here.seen) == {second}
