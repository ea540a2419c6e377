"""Model values as protobuf bytes and back, by reflection: a message has the name and the fields of its dataclass.

The .proto files close the set: what has no message there is never sent or stored. Absent scalars read as proto3's zero
values, never as a dataclass's defaults. Fields that are not known here are ignored.
"""

import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from typing import Any, Final, Generic, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model import (
    audit,
    bulk,
    cloud,
    enrolment,
    gossip,
    inventory,
    job,
    lending,
    logs,
    messages,
    pairing,
    receipt,
    records,
    resources,
    sweep,
    trust,
)
from meshgpu.model.constraints import Where, parse_constraint
from meshgpu.model.ids import Digest, JobId, MeshId
from meshgpu.wire.v1 import (
    audit_pb2,
    bulk_pb2,
    cloud_pb2,
    enrolment_pb2,
    envelope_pb2,
    gossip_pb2,
    inventory_pb2,
    job_pb2,
    lending_pb2,
    logs_pb2,
    messages_pb2,
    pairing_pb2,
    receipt_pb2,
    records_pb2,
    resources_pb2,
    sweep_pb2,
    trust_pb2,
)

PROTOCOL: Final = 1
"""Version of the wire that every frame names; raised only where old and new cannot understand each other."""

OLDEST_PROTOCOL: Final = 1
"""What an agent of this version speaks all the same to those that are not newer: PROTOCOL, or the one before it."""

ELEMENTS_LIMIT: Final = 65_536
"""List elements of one value, all levels together: 64 nodes need some thousands, and each may cost 1 kB here."""

T = TypeVar("T")

_MODULES: Final = (
    (trust, trust_pb2),
    (audit, audit_pb2),
    (resources, resources_pb2),
    (inventory, inventory_pb2),
    (gossip, gossip_pb2),
    (lending, lending_pb2),
    (logs, logs_pb2),
    (sweep, sweep_pb2),
    (job, job_pb2),
    (messages, messages_pb2),
    (pairing, pairing_pb2),
    (records, records_pb2),
    (receipt, receipt_pb2),
    (bulk, bulk_pb2),
    (cloud, cloud_pb2),
    (enrolment, enrolment_pb2),
)
_PAIR: Final = "Pair"
"""The one message without a class: a tuple of two strings."""

_FORMS: Final[dict[object, re.Pattern[str]]] = {
    JobId: re.compile(r"[a-z2-7]{26}"),
    Digest: re.compile(r"([0-9a-f]{64})?"),  # empty: there is nothing before the first entry of a chain
}
"""Ids that become names of files are checked on arrival."""

_SHOWN_CHARACTERS: Final = 60
"""How much of a wrong value an error shows: enough to recognise it, too little to flood a log."""


class _Budget:
    """Counts the elements of one value down."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = ELEMENTS_LIMIT

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise MeshgpuError("bad-message", f"cannot read a message: it has more than {ELEMENTS_LIMIT} elements")


_Write = Callable[[Any], Any]
_WriteField = Callable[[Any, dict[str, Any]], None]
_Read = Callable[[Any, _Budget], Any]


@dataclass(frozen=True, slots=True)
class _Codec(Generic[T]):
    """One class, compiled. write: value -> arguments of `proto`; read: message -> value."""

    proto: type[Proto]
    write: Callable[[T], dict[str, Any]]
    read: Callable[[Any, _Budget], T]


# -- values ----------------------------------------------------------------------------------------------------------


def kind_of(name: str) -> type:
    """The class that `Signed.kind` or a stored record names; raises MeshgpuError `unknown-kind`."""
    if (known := _PROTOS.get(name)) is None:
        raise MeshgpuError("unknown-kind", f"cannot read a {_shown(name)}: no such kind is known")
    return known[0]


def encode(value: object) -> bytes:
    """Bytes of the message that mirrors `value`.

    Raises MeshgpuError `bad-message` for what has no wire form: text that is not Unicode, a number out of range.
    """
    codec = _codec(type(value))
    return _serialise(codec.proto, codec.write(value), type(value).__name__)


def decode(kind: type[T], data: bytes) -> T:
    """Read bytes of the message that mirrors `kind`; raises MeshgpuError `bad-message`, and nothing else."""
    codec = _codec(kind)
    return codec.read(_parse(codec.proto, data, kind.__name__), _Budget())


# -- frames ----------------------------------------------------------------------------------------------------------


def common_protocol(newest: int, oldest: int) -> int | None:
    """The newest that this agent speaks and one that speaks `oldest` to `newest`; None where there is none."""
    spoken = min(PROTOCOL, newest)
    return spoken if spoken >= max(OLDEST_PROTOCOL, oldest) else None


def encode_frame(mesh: MeshId, message: messages.Message, protocol: int = PROTOCOL) -> bytes:
    """One message to a member of `mesh`, in the protocol that it speaks; raises as `encode` does."""
    kind = type(message)
    arguments = {"protocol": protocol, "mesh": mesh, field_name(kind): _codec(kind).write(message)}
    return _serialise(envelope_pb2.Frame, arguments, kind.__name__)


def decode_frame(data: bytes) -> tuple[MeshId, messages.Message]:
    """Read one frame.

    Raises MeshgpuError `bad-message`; `version` for another protocol; `unknown-message` for one that only a newer
    agent knows, which is to be ignored.
    """
    frame = cast(envelope_pb2.Frame, _parse(envelope_pb2.Frame, data, "frame"))
    if not OLDEST_PROTOCOL <= frame.protocol <= PROTOCOL:
        raise MeshgpuError(
            "version",
            f"cannot read a frame of protocol {frame.protocol}: this agent speaks protocol {PROTOCOL}",
            "install the same version of meshgpu on both machines",
        )
    body = frame.WhichOneof("body")
    if body is None:
        raise MeshgpuError("unknown-message", "cannot read a frame: it holds no message that this agent knows")
    return MeshId(frame.mesh), _MESSAGES[body].read(getattr(frame, body), _Budget())


def field_name(kind: type) -> str:
    """Field that holds a `kind` where there are alternatives: `AddNode` is in `add_node`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


# -- bytes -----------------------------------------------------------------------------------------------------------


def _serialise(proto: type[Proto], arguments: Mapping[str, Any], name: str) -> bytes:
    try:
        return proto(**arguments).SerializeToString()
    except ValueError as error:  # UnicodeEncodeError is one
        raise MeshgpuError("bad-message", f"cannot write a {name}: {error}") from error


def _parse(proto: type[Proto], data: bytes, name: str) -> Proto:
    try:
        return proto.FromString(data)
    except DecodeError as error:
        raise MeshgpuError("bad-message", f"cannot read a {name}: its {len(data)} bytes are not one") from error


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"


# -- compiling -------------------------------------------------------------------------------------------------------


def _codec(kind: type[T]) -> _Codec[T]:
    if (codec := _COMPILED.get(kind)) is None:
        codec = _COMPILED[kind] = _compile(kind)
    return codec


def _compile(kind: type[T]) -> _Codec[T]:
    known = _PROTOS.get(kind.__name__)
    if known is None or known[0] is not kind:
        raise BrokenInvariant(f"{kind.__module__}.{kind.__name__} has no wire form")
    hints = get_type_hints(kind)
    compiled = [(name, *_field(f"{kind.__name__}.{name}", name, hint)) for name, hint in hints.items()]
    writes = [(name, write) for name, write, _ in compiled]
    reads = [read for _, _, read in compiled]

    def write_fields(value: T) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name, write in writes:
            write(getattr(value, name), arguments)
        return arguments

    def read_fields(message: Proto, budget: _Budget) -> T:
        return kind(*[read(message, budget) for read in reads])

    return _Codec(known[1], write_fields, read_fields)


def _field(where: str, name: str, hint: Any) -> tuple[_WriteField, _Read]:
    """How one field is written into a message's arguments and read from a message."""
    if get_origin(hint) is tuple:
        return _repeated(name, *_item(where, get_args(hint)[0]))
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not types.NoneType]
        if len(members) == 1:
            return _optional(name, *_item(where, members[0]))
        return _one_of(where, name, members)
    return _required(where, name, hint)


def _repeated(name: str, write: _Write, read: _Read) -> tuple[_WriteField, _Read]:
    def write_field(value: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        arguments[name] = [write(item) for item in value]

    def read_field(message: Proto, budget: _Budget) -> tuple[Any, ...]:
        items = getattr(message, name)
        budget.take(len(items))
        return tuple([read(item, budget) for item in items])

    return write_field, read_field


def _optional(name: str, write: _Write, read: _Read) -> tuple[_WriteField, _Read]:
    def write_field(value: Any, arguments: dict[str, Any]) -> None:
        if value is not None:
            arguments[name] = write(value)

    def read_field(message: Proto, budget: _Budget) -> Any:
        return read(getattr(message, name), budget) if message.HasField(name) else None

    return write_field, read_field


def _one_of(where: str, name: str, members: list[type]) -> tuple[_WriteField, _Read]:
    names = {member: field_name(member) for member in members}
    codecs: dict[str, _Codec[Any]] = {field_name(member): _codec(member) for member in members}

    def write_field(value: Any, arguments: dict[str, Any]) -> None:
        chosen = names[type(value)]
        arguments[chosen] = codecs[chosen].write(value)

    def read_field(message: Proto, budget: _Budget) -> Any:
        chosen = message.WhichOneof(name)
        if chosen is None:
            raise _unreadable(where, "nothing that this agent knows", f"one of {', '.join(codecs)}")
        return codecs[chosen].read(getattr(message, chosen), budget)

    return write_field, read_field


def _required(where: str, name: str, hint: Any) -> tuple[_WriteField, _Read]:
    write, read = _item(where, hint)

    def write_field(value: Any, arguments: dict[str, Any]) -> None:
        arguments[name] = write(value)

    def read_plain(message: Proto, budget: _Budget) -> Any:
        return read(getattr(message, name), budget)

    def read_message(message: Proto, budget: _Budget) -> Any:
        if not message.HasField(name):
            raise _unreadable(where, "nothing", "a value")
        return read(getattr(message, name), budget)

    return write_field, read_message if is_dataclass(hint) else read_plain


def _item(where: str, hint: Any) -> tuple[_Write, _Read]:
    """How one value is written as an argument and read."""
    if is_dataclass(hint):
        codec = _codec(cast(type[Any], hint))
        return codec.write, codec.read
    if get_origin(hint) is tuple:
        return (lambda pair: {"key": pair[0], "value": pair[1]}), (lambda pair, _: (pair.key, pair.value))
    if hint in _FORMS:
        return _same, _form(where, _FORMS[hint])
    if hint is Where:
        return _same, _constraint(where)
    if isinstance(hint, NewType):
        hint = hint.__supertype__
    if hint is float:
        return _finite_out(where), _finite_in(where)
    if issubclass(hint, StrEnum):
        return _same, _choice(where, hint)
    if hint not in (str, bytes, int, bool):
        raise BrokenInvariant(f"{where} has no wire form")
    return _same, _as_is


def _same(value: Any) -> Any:
    return value


def _as_is(value: Any, _: _Budget) -> Any:
    return value


def _form(where: str, pattern: re.Pattern[str]) -> _Read:
    def read(text: str, _: _Budget) -> str:
        if pattern.fullmatch(text) is None:
            raise _unreadable(where, text, f"the form {pattern.pattern}")
        return text

    return read


def _constraint(where: str) -> _Read:
    """What every machine reads for every job is looked at once, on arrival."""

    def read(text: str, _: _Budget) -> str:
        try:
            parse_constraint(text)
        except MeshgpuError as error:
            raise _unreadable(where, text, "a constraint") from error
        return text

    return read


def _choice(where: str, kind: type[StrEnum]) -> _Read:
    members = {member.value: member for member in kind}

    def read(text: str, _: _Budget) -> StrEnum:
        if (member := members.get(text)) is None:
            raise _unreadable(where, text, f"one of {', '.join(members)}")
        return member

    return read


def _finite_out(where: str) -> _Write:
    def write(number: float) -> float:
        if not math.isfinite(number):
            raise MeshgpuError("bad-message", f"cannot write {where}: found {number}, expected a finite number")
        return number

    return write


def _finite_in(where: str) -> _Read:
    def read(number: float, _: _Budget) -> float:
        if not math.isfinite(number):  # every comparison with NaN is false, so it would pass for fresh
            raise _unreadable(where, number, "a finite number")
        return number

    return read


def _unreadable(where: str, found: object, expected: str) -> MeshgpuError:
    return MeshgpuError("bad-message", f"cannot read {where}: found {_shown(found)}, expected {expected}")


_PROTOS: Final[dict[str, tuple[type, type[Proto]]]] = {
    name: (getattr(model, name), getattr(mirror, name))
    for model, mirror in _MODULES
    for name in mirror.DESCRIPTOR.message_types_by_name
    if name != _PAIR
}
_COMPILED: Final[dict[type, _Codec[Any]]] = {}
_MESSAGES: Final[dict[str, _Codec[Any]]] = {field_name(kind): _codec(kind) for kind in get_args(messages.Message)}
