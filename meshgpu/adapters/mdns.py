"""Discovery port over multicast DNS: announces this node on the office network and sees the others."""

import asyncio
import contextlib
import logging
import math
import re
import socket
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import Final

from zeroconf import (  # type: ignore[attr-defined]  # it exports DNSPointer, but does not list it
    DNSPointer,
    IPVersion,
    NotRunningException,
    RecordUpdate,
    RecordUpdateListener,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from meshgpu.adapters.interfaces import chosen_addresses
from meshgpu.errors import MeshgpuError
from meshgpu.model.gossip import Sighting
from meshgpu.model.ids import Address, NodeId

SERVICE_TYPE: Final = "_meshgpu._tcp.local."
MDNS_PORT: Final = 5353

LABEL_CHARACTERS: Final = 12
"""Of the node id: 60 bits, enough to be unique on a link."""

MAX_TXT_BYTES: Final = 400
"""RFC 6763 §6.2: larger records do not fit beside the others in one packet; what is larger is not ours."""

MAX_MESH_NAME_CHARACTERS: Final = 40
"""As many bytes: names of meshes are of a-z, 0-9 and hyphens. Others' are cut, for zeroconf raises at 255."""
MAX_GPUS_BYTES: Final = 160
"""With the other keys at their longest (152 bytes) the record stays below MAX_TXT_BYTES."""

MAX_ADDRESSES: Final = 8
"""More than an office machine has; bounds what one announcement makes us dial."""

MAX_REQUESTS: Final = 64
"""Announcements resolved at once, so that a flood of names costs neither memory nor packets."""

HEARD_KEPT: Final = 512
"""Announcers whose latest packet is remembered: a flood of names forgets the oldest, and takes no more memory."""

RESOLVE_TIMEOUT_S: Final = 5.0
ANNOUNCE_TIMEOUT_S: Final = 5.0
"""Three goodbyes and three announcements take 0.7 s; before the first, the sockets start."""

STOP_TIMEOUT_S: Final = 3.0
POLL_PERIOD_S: Final = 30.0
"""How often interfaces are read: a laptop that changes networks is found again within this time."""

_LABEL: Final = re.compile(rf"[a-z2-7]{{{LABEL_CHARACTERS}}}")
_NODE: Final = re.compile(r"[a-z2-7]{52}")
_MESH_TAG: Final = re.compile(r"([0-9a-f]{12})?")
_NUMBER: Final = re.compile(r"[0-9]{1,5}")
_MAX_PORT: Final = 65535

_log = logging.getLogger(__name__)


class Mdns:
    """Uses `interfaces`, names (`eth0`) or addresses, or the office network's where it is None; loopback if named."""

    def __init__(self, interfaces: Sequence[str] | None = None, *, poll_period_s: float = POLL_PERIOD_S) -> None:
        self._interfaces = interfaces
        self._poll_period_s = poll_period_s
        self._addresses: list[str] = []
        self._zeroconf: AsyncZeroconf | None = None
        self._announcing = asyncio.Lock()
        self._own: ServiceInfo | None = None
        self._announced: Sighting | None = None
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._ear = _Ear()

    async def start(self, emit: Callable[[Sighting], None]) -> None:
        """Browse. Raises MeshgpuError `no-mdns` where UDP port 5353 cannot be opened; the rest then does nothing."""
        self._emit = emit
        self._addresses = await asyncio.to_thread(chosen_addresses, self._interfaces)
        try:
            _try_port(MDNS_PORT)
            zeroconf = AsyncZeroconf(interfaces=self._addresses, ip_version=IPVersion.V4Only)
        except OSError as error:
            raise MeshgpuError(
                "no-mdns",
                f"cannot listen for mDNS on UDP port {MDNS_PORT}: {error.strerror}",
                f"ss -ulpn sport = :{MDNS_PORT} (an avahi-daemon needs disallow-other-stacks=no)",
            ) from error
        self._zeroconf = zeroconf
        zeroconf.zeroconf.async_add_listener(self._ear, None)
        self._browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._notice])
        follow = self._follow_interfaces(zeroconf)
        self._follower = asyncio.get_running_loop().create_task(follow, name="mdns interfaces")

    async def announce(self, sighting: Sighting) -> None:
        """Register or replace our announcement. Without an IPv4 address in `sighting` there is none.

        Raises MeshgpuError `no-mdns` where the network does not take it within ANNOUNCE_TIMEOUT_S.
        """
        try:
            async with self._announcing, asyncio.timeout(ANNOUNCE_TIMEOUT_S):
                await self._replace(sighting)
        except (TimeoutError, OSError, ValueError, ZeroconfError) as error:
            found = str(error) or "the network did not take it in time"
            raise MeshgpuError("no-mdns", f"cannot announce this machine by mDNS: {found}") from error

    async def _replace(self, sighting: Sighting) -> None:
        info = announcement(sighting)
        if self._zeroconf is not None and sighting != self._announced:
            if self._own is not None:
                # A goodbye before each change: listeners keep an old record for seconds, and would not notice if we
                # came back to what it says.
                goodbye = await self._zeroconf.async_unregister_service(self._own)
                await goodbye
            self._own, self._announced = info, None
            if info is not None:
                # Without probing for the name: 60 bits of a hash meet no other by accident, and whoever claims our name
                # on purpose shall not silence us.
                sent = await self._zeroconf.async_register_service(info, cooperating_responders=True)
                await sent
            self._announced = sighting

    def remind(self) -> bool:
        """Say our announcement again, now: somebody listens for it. False where there is none.

        While one is being replaced it is on its way anyhow.
        """
        if self._zeroconf is None or self._own is None:
            return False
        if self._announced is None:
            return True
        self._zeroconf.zeroconf.async_send(self._zeroconf.zeroconf.generate_service_broadcast(self._own, None))
        return True

    def heard(self, node: NodeId, within_s: float) -> bool:
        """Whether a packet with the announcement of `node` came in the last `within_s` seconds, changed or not."""
        return self._ear.heard(node[:LABEL_CHARACTERS], within_s)

    async def stop(self) -> None:
        """Say goodbye and close."""
        if self._zeroconf is None:
            return
        await self._browser.async_cancel()
        tasks = [self._follower, *self._requests.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S), self._announcing:
                await self._zeroconf.async_close()
        except TimeoutError:
            _log.warning("mDNS did not close within %s s", STOP_TIMEOUT_S)

    def _notice(self, zeroconf: Zeroconf, name: str, state_change: ServiceStateChange, **_: object) -> None:
        """An announcement came, changed or went; that it went says nothing about life."""
        label = _label(name)
        own = self._own is not None and label == _label(self._own.name)
        if state_change is ServiceStateChange.Removed or own or label is None:
            return
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        if info.load_from_cache(zeroconf):
            self._see(info)
        elif name not in self._requests and len(self._requests) < MAX_REQUESTS:
            request = asyncio.get_running_loop().create_task(self._resolve(zeroconf, info), name=f"mdns {label}")
            self._requests[name] = request
            request.add_done_callback(lambda _: self._requests.pop(name))

    async def _resolve(self, zeroconf: Zeroconf, info: AsyncServiceInfo) -> None:
        with contextlib.suppress(NotRunningException):
            if await info.async_request(zeroconf, RESOLVE_TIMEOUT_S * 1000):
                self._see(info)

    def _see(self, info: ServiceInfo) -> None:
        on_loopback = any(IPv4Address(address).is_loopback for address in self._addresses)
        sighting = sighting_of(info, accept_loopback=on_loopback)
        if sighting is not None:
            self._emit(sighting)

    async def _follow_interfaces(self, zeroconf: AsyncZeroconf) -> None:
        while True:
            await asyncio.sleep(self._poll_period_s)
            try:
                addresses = await asyncio.to_thread(chosen_addresses, self._interfaces)
                if addresses != self._addresses:
                    _log.info("mDNS moves to %s", ", ".join(addresses) or "no interface")
                    await zeroconf.async_update_interfaces(addresses)
                    self._addresses = addresses
            except OSError as error:
                _log.warning("mDNS cannot follow the network interfaces: %s", error)


class _Ear(RecordUpdateListener):
    """Remembers who spoke last when. The browser tells only of news, and an announcement said again is none."""

    def __init__(self) -> None:
        self._heard: dict[str, float] = {}  # {label: time.monotonic(), who spoke last is last}

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        del zc, now
        for update in records:
            record = update.new
            if isinstance(record, DNSPointer) and record.name == SERVICE_TYPE and record.ttl:
                label = _label(record.alias)
                if label is not None:
                    self._heard.pop(label, None)
                    self._heard[label] = time.monotonic()
                    if len(self._heard) > HEARD_KEPT:
                        del self._heard[next(iter(self._heard))]

    def async_update_records_complete(self) -> None:
        """Nothing waits for it."""

    def heard(self, label: str, within_s: float) -> bool:
        return time.monotonic() - self._heard.get(label, -math.inf) <= within_s


def announcement(sighting: Sighting) -> ServiceInfo | None:
    """The records that announce `sighting` on the port of its first address; None without an IPv4 address.

    The host name in them is made of the node id, so that the machine's own does not leak.
    """
    addresses, port = _hosts_and_port(sighting.addresses)
    if not addresses:
        return None
    label = sighting.node[:LABEL_CHARACTERS]
    facts = {
        "txtvers": "1",
        "id": sighting.node,
        "mesh": sighting.mesh_tag,
        "name": _cut(sighting.mesh_name, MAX_MESH_NAME_CHARACTERS),
        "p": str(sighting.protocol),
        "gpus": _cut(sighting.gpus, MAX_GPUS_BYTES),
    }
    if sighting.pairing_port:
        facts["pair"] = str(sighting.pairing_port)
    return ServiceInfo(
        SERVICE_TYPE,
        f"{label}.{SERVICE_TYPE}",
        port=port,
        properties=facts,
        server=f"{label}.local.",
        addresses=[socket.inet_aton(address) for address in addresses],
    )


def sighting_of(info: ServiceInfo, *, accept_loopback: bool) -> Sighting | None:
    """What resolved records announce, None where they are not ours or not well formed. Never raises."""
    label = _label(info.name)
    if len(info.text) > MAX_TXT_BYTES or label is None or not info.port:
        return None
    facts = {key: (value or b"").decode(errors="replace") for key, value in info.properties.items()}
    node, mesh_tag, protocol = facts.get(b"id", ""), facts.get(b"mesh", ""), facts.get(b"p", "")
    pairing_port = facts.get(b"pair", "0")
    well_formed = (
        facts.get(b"txtvers") == "1"
        and _NODE.fullmatch(node)
        and node.startswith(label)
        and _MESH_TAG.fullmatch(mesh_tag)
        and _NUMBER.fullmatch(protocol)
        and _NUMBER.fullmatch(pairing_port)
        and int(pairing_port) <= _MAX_PORT
    )
    hosts = [
        host
        for host in info.parsed_addresses(IPVersion.V4Only)
        if _can_be_dialled(host, accept_loopback=accept_loopback)
    ]
    if not well_formed or not hosts:
        return None
    return Sighting(
        node=NodeId(node),
        mesh_tag=mesh_tag,
        mesh_name=_printable(facts.get(b"name", ""))[:MAX_MESH_NAME_CHARACTERS],
        protocol=int(protocol),
        addresses=tuple(Address(f"{host}:{info.port}") for host in sorted(hosts)[:MAX_ADDRESSES]),
        pairing_port=int(pairing_port),
        gpus=_printable(facts.get(b"gpus", ""))[:MAX_GPUS_BYTES],
    )


def _try_port(port: int) -> None:
    """Open `port` as zeroconf does and close it again: zeroconf leaks the socket where this fails."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        trial.bind(("", port))


def _label(name: str) -> str | None:
    """The instance of a service name (`<12 characters>._meshgpu._tcp.local.`), None where it cannot be a node's."""
    label, _, service = name.partition(".")
    return label if service == SERVICE_TYPE and _LABEL.fullmatch(label) else None


def _hosts_and_port(addresses: Sequence[Address]) -> tuple[list[str], int]:
    """IPv4 hosts of those addresses that share the first one's port; mDNS has one port for all."""
    hosts: list[str] = []
    first_port = ""
    for address in addresses:
        host, _, port = address.rpartition(":")
        with contextlib.suppress(ValueError):
            IPv4Address(host)
            first_port = first_port or port
            if port == first_port:
                hosts.append(host)
    return hosts[:MAX_ADDRESSES], int(first_port or 0)


def _can_be_dialled(host: str, *, accept_loopback: bool) -> bool:
    address = IPv4Address(host)
    return not (address.is_unspecified or address.is_multicast) and (accept_loopback or not address.is_loopback)


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())


def _cut(text: str, limit_bytes: int) -> str:
    return text.encode()[:limit_bytes].decode(errors="ignore")
