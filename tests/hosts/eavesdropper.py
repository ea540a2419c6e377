"""Who listens on the office's network and says everything again; only the standard library, run in a namespace.

`record FILE` keeps every frame on eth0 until SIGTERM. `replay FILE` sends all of it again: each frame as it was, the
bytes of each TCP client over connections of its own, whole and cut, and each mDNS message; it prints what it did, as
JSON. FILE: each frame after its length in 4 bytes.
"""

import json
import signal
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

INTERFACE: Final = "eth0"
ALL_PROTOCOLS: Final = 3
IPV4: Final = 0x0800
TCP: Final = 6
UDP: Final = 17
SYN, ACK = 0x02, 0x10
MDNS: Final = ("224.0.0.251", 5353)
SEGMENT_BYTES: Final = 1400
"""A virtual cable carries pieces of 64 KiB and leaves checksums to a network card; a real one has seen them done."""

ANSWER_S: Final = 1.0
"""For the answer to what was sent again: a listener on the same switch needs milliseconds."""


@dataclass(frozen=True)
class Flow:
    """One direction of a TCP connection."""

    source: tuple[str, int]
    target: tuple[str, int]

    @property
    def back(self) -> "Flow":
        return Flow(self.target, self.source)


@dataclass
class Capture:
    """A recording, read. streams: what each direction said, in order; clients: the directions that began with SYN."""

    frames: list[bytes]
    streams: dict[Flow, bytes] = field(default_factory=dict)
    clients: list[Flow] = field(default_factory=list)
    mdns: list[bytes] = field(default_factory=list)


def frames_in(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    at = 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("!I", data, at)
        yield data[at + 4 : at + 4 + length]
        at += 4 + length


def read(path: Path) -> Capture:
    capture = Capture(list(frames_in(path)))
    first: dict[Flow, int] = {}
    parts: defaultdict[Flow, dict[int, bytes]] = defaultdict(dict)
    for frame in capture.frames:
        if len(frame) < 34 or struct.unpack_from("!H", frame, 12)[0] != IPV4:
            continue
        header = (frame[14] & 0x0F) * 4
        packet = frame[14 : 14 + struct.unpack_from("!H", frame, 16)[0]]
        source, target = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
        ports = struct.unpack_from("!HH", packet, header)
        if packet[9] == UDP and ports[1] == MDNS[1]:
            capture.mdns.append(packet[header + 8 :])
        if packet[9] != TCP:
            continue
        flow = Flow((source, ports[0]), (target, ports[1]))
        sequence, flags = struct.unpack_from("!I", packet, header + 4)[0], packet[header + 13]
        if flags & SYN:
            first[flow] = sequence + 1
            if not flags & ACK and flow not in capture.clients:
                capture.clients.append(flow)
        payload = packet[header + (packet[header + 12] >> 4) * 4 :]
        if payload and flow in first:
            parts[flow].setdefault((sequence - first[flow]) % 2**32, payload)
    capture.streams = {flow: _in_order(pieces) for flow, pieces in parts.items()}
    return capture


def _in_order(pieces: dict[int, bytes]) -> bytes:
    """Up to the first gap."""
    whole = b""
    for at, piece in sorted(pieces.items()):
        if at > len(whole):
            break
        whole += piece[len(whole) - at :]
    return whole


def as_sent(frame: bytes) -> Iterator[bytes]:
    """A frame as a real cable would have carried it: in segments, with the right checksums."""
    if len(frame) < 34 or struct.unpack_from("!H", frame, 12)[0] != IPV4 or frame[23] not in (TCP, UDP):
        yield frame
        return
    body = 14 + (frame[14] & 0x0F) * 4
    end = 14 + struct.unpack_from("!H", frame, 16)[0]
    if frame[23] == UDP:
        yield _sealed(bytearray(frame[:end]), body, 6)
        return
    data = body + (frame[body + 12] >> 4) * 4
    for at in range(data, max(end, data + 1), SEGMENT_BYTES):
        segment = bytearray(frame[:data] + frame[at : min(end, at + SEGMENT_BYTES)])
        struct.pack_into("!H", segment, 16, len(segment) - 14)
        sequence = struct.unpack_from("!I", frame, body + 4)[0] + at - data
        struct.pack_into("!I", segment, body + 4, sequence % 2**32)
        yield _sealed(segment, body, 16)


def _sealed(frame: bytearray, body: int, field_at: int) -> bytes:
    """With the checksums of IP and of what it carries; field_at: where in the latter its own stands."""
    struct.pack_into("!H", frame, 24, 0)
    struct.pack_into("!H", frame, 24, _checksum(bytes(frame[14:body])))
    struct.pack_into("!H", frame, body + field_at, 0)
    pseudo = bytes(frame[26:34]) + struct.pack("!BBH", 0, frame[23], len(frame) - body)
    struct.pack_into("!H", frame, body + field_at, _checksum(pseudo + bytes(frame[body:])) or 0xFFFF)
    return bytes(frame)


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _packets() -> socket.socket:
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))


def record(path: Path) -> None:
    is_over: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: is_over.append(number))
    with _packets() as wire, path.open("wb") as file:
        wire.bind((INTERFACE, 0))
        wire.setsockopt(socket.SOL_SOCKET, 33, 2**27)  # SO_RCVBUFFORCE: nothing is to be missed
        promiscuous = struct.pack("iHH8s", socket.if_nametoindex(INTERFACE), 1, 0, b"")
        wire.setsockopt(263, 1, promiscuous)  # SOL_PACKET, PACKET_ADD_MEMBERSHIP
        wire.settimeout(0.1)
        print("listening", flush=True)
        while True:
            try:
                frame = wire.recv(2**17)
            except TimeoutError:
                if is_over:
                    return
                continue
            file.write(struct.pack("!I", len(frame)) + frame)


def replay(path: Path) -> dict[str, Any]:
    """Returns how much of each was sent: frames, mDNS messages, and by `host:port` [streams, noticed]."""
    capture = read(path)
    with _packets() as wire:
        wire.bind((INTERFACE, 0))
        sent = [piece for frame in capture.frames for piece in as_sent(frame)]
        for frame in sent:
            wire.send(frame)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        speaker.bind(("", MDNS[1]))
        own = struct.pack("4s4si", b"", b"", socket.if_nametoindex(INTERFACE))
        speaker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
        for message in capture.mdns:
            speaker.sendto(message, MDNS)
    said = [(flow.target, part) for flow in capture.clients for part in _cuts(capture.streams.get(flow, b""))]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda one: _say(*one), said))
    streams: dict[str, list[int]] = {}
    for ((host, port), _), answer in zip(said, answers, strict=True):
        counts = streams.setdefault(f"{host}:{port}", [0, 0])
        counts[0] += 1
        counts[1] += answer
    return {"frames": len(sent), "mdns": len(capture.mdns), "streams": streams}


def _cuts(stream: bytes) -> Iterator[bytes]:
    """The whole of it, and what an end at several places leaves: in the first record, between, before the last byte."""
    if stream:
        ends = {len(stream), 1, 5, len(stream) // 4, len(stream) // 2, len(stream) * 3 // 4, len(stream) - 1}
        yield from (stream[:end] for end in sorted(ends, reverse=True) if end > 0)


def _say(target: tuple[str, int], data: bytes) -> bool:
    """Whether the other side took notice: it answered, or ended the connection before we did."""
    try:
        with socket.create_connection(target, 3) as connection:
            connection.settimeout(ANSWER_S)
            connection.sendall(data)
            connection.recv(65536)
    except ConnectionRefusedError:
        return False  # nobody listens there any more
    except ConnectionError:
        return True
    except TimeoutError:
        return False  # it waits for the rest
    return True


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]))
    else:
        print(json.dumps(replay(Path(sys.argv[2]))))
