"""What trust costs: checking a request beside a bare Ed25519 verification, and opening a Link among many members.

Pairs in one process on one machine; medians and the median of the pairs' ratios.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ed25519

from meshgpu.adapters.boot_clock import BootClock
from meshgpu.adapters.grpc_link import GrpcLink
from meshgpu.adapters.key_files import KeyFiles
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.core.trust.requests import RequestRules
from meshgpu.model.ids import Address, NodeId, UserName, key_id, node_id
from meshgpu.model.job import Action, JobRequest
from meshgpu.model.trust import AddNode, Genesis, LinkUser, Role
from meshgpu.ports import Anchor, LinkClosed, LinkEvent, LinkOpened
from meshgpu.wire.certificates import der, make_device_ca
from meshgpu.wire.dsse import pae
from meshgpu.wire.notary import WireNotary

REQUESTS: Final = 2_000
LINKS: Final = 30
MEMBERS: Final = (1, 16, 100)


def pair(ours: Callable[[], object], theirs: Callable[[], object], count: int) -> tuple[float, float, float]:
    """(our median, their median, median of the ratios), seconds a call."""
    rows = [(_timed(ours), _timed(theirs)) for _ in range(count)]
    return (
        statistics.median(a for a, _ in rows),
        statistics.median(b for _, b in rows),
        statistics.median(a / b for a, b in rows),
    )


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def request(directory: Path) -> None:
    """Everything that is asked of a user's signed request, against the one signature check in it."""
    keys = KeyFiles(directory / "keys")
    notary = WireNotary(keys.sign, keys.verify)
    admin, clock = keys.user_key(1000), BootClock()
    mesh, genesis = found(notary, key_id(admin), Genesis("lab", admin, b"r" * 32, b"n"))
    log = MeshLog(notary)
    log.enter(mesh, (genesis,))
    me = node_id(keys.node_key())
    added = AddNode(me, keys.node_key(), keys.device_ca(), "rig", Role.RIG, UserName("ada"))
    log.add(log.write(key_id(admin), (added, LinkUser(UserName("ada"), admin, me, 1000))))
    rules = RequestRules(notary, log, me)
    now = clock.now()
    signed = notary.sign(key_id(admin), JobRequest(mesh, UserName("ada"), Action.LIST, me, now.wall_s, "nonce", None))
    public, message = ed25519.Ed25519PublicKey.from_public_bytes(admin), pae(signed.kind, signed.payload)
    ours, theirs, ratio = pair(
        lambda: rules.verify_request(signed, now, me), lambda: public.verify(signed.signature, message), REQUESTS
    )
    print(f"| check a request | {ours * 1e3:.2f} | bare Ed25519 | {theirs * 1e3:.2f} | {ratio:.2f} | {REQUESTS} |")


async def links(directory: Path) -> None:
    """From a dial to LinkOpened on both sides, with as many device CAs in the listener's bundle."""

    async def nothing(_peer: NodeId, _request: bytes) -> AsyncIterator[bytes]:
        return
        yield b""

    first, second = KeyFiles(directory / "a"), KeyFiles(directory / "b")
    queues: list[asyncio.Queue[LinkEvent]] = [asyncio.Queue(), asyncio.Queue()]
    ends = [GrpcLink(keys, BootClock(), ["127.0.0.1"], 0) for keys in (first, second)]
    ports = [await end.start(queue.put_nowait, nothing) for end, queue in zip(ends, queues, strict=True)]
    anchors = [Anchor(node_id(keys.node_key()), keys.device_ca()) for keys in (first, second)]
    strangers = [_stranger() for _ in range(max(MEMBERS))]
    rows: dict[int, list[float]] = {count: [] for count in MEMBERS}
    for _ in range(LINKS):
        for count in MEMBERS:
            ends[0].trust([*anchors, *strangers[: count - 1]])
            ends[1].trust(anchors)
            start = time.perf_counter()
            ends[1].dial(anchors[0].node, Address(f"127.0.0.1:{ports[0]}"))
            for queue in queues:
                assert isinstance(await asyncio.wait_for(queue.get(), 10), LinkOpened)
            rows[count].append(time.perf_counter() - start)
            ends[1].close(anchors[0].node, "measured")
            for queue in queues:
                assert isinstance(await asyncio.wait_for(queue.get(), 10), LinkClosed)
            ends[1].trust([])  # the next Link is a handshake of its own
    for end in ends:
        await end.stop()
    few = rows[MEMBERS[0]]
    for count in MEMBERS[1:]:
        ratio = statistics.median(a / b for a, b in zip(rows[count], few, strict=True))
        ours, theirs = statistics.median(rows[count]) * 1e3, statistics.median(few) * 1e3
        print(f"| a Link, {count} members | {ours:.1f} | 1 member | {theirs:.1f} | {ratio:.2f} | {LINKS} |")


def _stranger() -> Anchor:
    key = ed25519.Ed25519PrivateKey.generate()
    return Anchor(node_id(key.public_key().public_bytes_raw()), der(make_device_ca(key)))


def main() -> None:
    print("| what | ms | beside | ms | ratio | pairs |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="meshgpu-bench-") as name:
        request(Path(name))
        asyncio.run(links(Path(name)))


if __name__ == "__main__":
    main()
