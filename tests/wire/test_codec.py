import dataclasses
import importlib
import inspect
import random
import types
from enum import StrEnum
from itertools import pairwise
from typing import Any, NewType, Union, get_args, get_origin, get_type_hints

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model import (
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
    records,
    resources,
    sweep,
    trust,
)
from meshgpu.model.constraints import Where
from meshgpu.model.ids import Digest, GpuId, JobId, KeyId, MeshId, UserName
from meshgpu.wire.codec import ELEMENTS_LIMIT, PROTOCOL, decode, decode_frame, encode, encode_frame, field_name, kind_of
from meshgpu.wire.v1 import envelope_pb2, gossip_pb2, job_pb2, messages_pb2, resources_pb2, trust_pb2

MODELS = (trust, resources, inventory, lending, cloud, gossip, sweep, job, messages, pairing, records, bulk, enrolment)
LEFT_OUT = {
    trust.Member: "a view of the mesh log",
    trust.UserKey: "a view of the mesh log",
    gossip.Sighting: "travels as a TXT record",
    job.Draft: "stays in its agent",
    job.AttemptPlan: "stays in its agent",
    job.JobView: "made of what a SignedView says, once that is verified",
    pairing.InviteString: "travels as text",
    enrolment.InstanceTerms: "travels in user data",
    enrolment.BootTerms: "travels in user data",
}
CLASSES = [
    member
    for module in MODELS
    for member in vars(module).values()
    if inspect.isclass(member) and dataclasses.is_dataclass(member) and member.__module__ == module.__name__
]
KINDS = [kind for kind in CLASSES if kind not in LEFT_OUT]
MESSAGES = get_args(messages.Message)
MESH = MeshId("5e" * 32)
JOB = JobId("a" * 26)
SCALARS = {
    str: {FieldDescriptor.TYPE_STRING},
    bytes: {FieldDescriptor.TYPE_BYTES},
    bool: {FieldDescriptor.TYPE_BOOL},
    float: {FieldDescriptor.TYPE_DOUBLE},
    int: {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_INT32},
}
RANGES = {
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
}
UNKNOWN_FIELDS = b"\xc2\x3e\x03new" + b"\xc8\x3e\x07"  # field 1000: 3 bytes; field 1001: a number
OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def mirror(kind: type) -> Descriptor:
    module = importlib.import_module(f"meshgpu.wire.v1.{kind.__module__.rpartition('.')[2]}_pb2")
    found = module.DESCRIPTOR.message_types_by_name[kind.__name__]
    assert isinstance(found, Descriptor)
    return found


def alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [member for member in get_args(hint) if member is not types.NoneType]
    return [hint]


def is_optional(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def plain(hint: Any) -> Any:
    return hint.__supertype__ if isinstance(hint, NewType) else hint


def values(kind: type) -> st.SearchStrategy[Any]:
    """Any value of a model class, every number of its field's range."""
    proto = mirror(kind)
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: field_values(hint, proto.fields_by_name.get(name)) for name, hint in hints.items()})


def field_values(hint: Any, field: FieldDescriptor | None) -> st.SearchStrategy[Any]:
    if get_origin(hint) is tuple:
        if get_args(hint)[-1] is not Ellipsis:
            return st.tuples(*[field_values(part, field) for part in get_args(hint)])
        return st.lists(field_values(get_args(hint)[0], field), max_size=3).map(tuple)
    found = st.one_of([item_values(member, field) for member in alternatives(hint)])
    return st.none() | found if is_optional(hint) else found


def item_values(hint: Any, field: FieldDescriptor | None) -> st.SearchStrategy[Any]:
    if get_origin(hint) is tuple:
        return field_values(hint, field)
    if hint is JobId:
        return st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=26, max_size=26)
    if hint is Digest:
        return st.just("") | st.text("0123456789abcdef", min_size=64, max_size=64)
    if hint is Where:
        return st.sampled_from(["", "rig7,rig8", "vram>=24GB and not name~'rtx 3090'"])
    hint = plain(hint)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return values(hint)
    if hint is int:
        assert field is not None
        return RANGES[field.type]
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    return st.sampled_from(list(hint)) if issubclass(hint, StrEnum) else st.from_type(hint)


ANY_VALUE = st.sampled_from(KINDS).flatmap(values)
ANY_MESSAGE = st.sampled_from(MESSAGES).flatmap(values)


# -- the mirror ------------------------------------------------------------------------------------------------------


def test_every_class_of_the_model_has_a_message_or_a_reason_not_to() -> None:
    unknown = [kind.__name__ for kind in KINDS if kind.__name__ not in registered()]
    assert unknown == []
    assert registered() - {kind.__name__ for kind in KINDS} == {"Pair"}


def registered() -> set[str]:
    mirrors = [importlib.import_module(f"meshgpu.wire.v1.{model.__name__.rpartition('.')[2]}_pb2") for model in MODELS]
    return {name for module in mirrors for name in module.DESCRIPTOR.message_types_by_name}


@OF_EVERY_KIND
def test_a_message_has_exactly_the_fields_of_its_class(kind: type) -> None:
    proto = mirror(kind)
    choices = {name for name in proto.oneofs_by_name if not name.startswith("_")}  # `optional` makes `_name`
    chosen = {field.name for name in choices for field in proto.oneofs_by_name[name].fields}
    assert (set(proto.fields_by_name) - chosen) | choices == set(get_type_hints(kind))


@OF_EVERY_KIND
def test_a_field_has_the_type_and_the_presence_of_its_hint(kind: type) -> None:
    proto = mirror(kind)
    for name, hint in get_type_hints(kind).items():
        members = alternatives(hint)
        if len(members) > 1:
            found = {field.name: field.message_type for field in proto.oneofs_by_name[name].fields}
            assert found == {field_name(member): mirror(member) for member in members}, name
            continue
        field = proto.fields_by_name[name]
        is_list = get_origin(hint) is tuple
        item = plain(get_args(hint)[0] if is_list else members[0])
        assert field.is_repeated == is_list, name
        if dataclasses.is_dataclass(item):
            assert field.message_type is mirror(item), name  # type: ignore[arg-type]  # it is a class
        elif get_origin(item) is tuple:
            assert field.message_type is job_pb2.Pair.DESCRIPTOR, name
        else:
            assert field.has_presence == is_optional(hint), name
            assert field.type in SCALARS[str if issubclass(item, StrEnum) else item], name


def test_a_frame_has_a_body_for_every_message() -> None:
    found = {field.name: field.message_type for field in envelope_pb2.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}
    assert found == {field_name(kind): mirror(kind) for kind in MESSAGES}


@OF_EVERY_KIND
def test_a_kind_is_found_by_its_name(kind: type) -> None:
    assert kind_of(kind.__name__) is kind


@pytest.mark.parametrize("name", ["", "Pair", "Frame", "Sighting", "object", "os.system", "x" * 9000])
def test_a_name_that_is_no_kind_is_refused(name: str) -> None:
    with pytest.raises(MeshgpuError) as caught:
        kind_of(name)
    assert caught.value.code == "unknown-kind"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("value", [object(), logs.LogRecord(logs.LogStream.STDOUT, 0.0, b"", 0)])
def test_a_class_without_a_message_is_our_own_bug(value: object) -> None:
    with pytest.raises(BrokenInvariant, match="has no wire form"):
        encode(value)


# -- values ----------------------------------------------------------------------------------------------------------


@OF_EVERY_KIND
def test_a_value_survives_the_wire(kind: type) -> None:
    @settings(max_examples=30, deadline=None)
    @given(values(kind))
    def survives(value: object) -> None:
        again: object = decode(kind, encode(value))
        assert again == value
        assert repr(again) == repr(value)  # an enum's member equals its text, but is not written like it

    survives()


@OF_EVERY_KIND
def test_unknown_fields_are_ignored(kind: type) -> None:
    @settings(max_examples=5, deadline=None)
    @given(values(kind))
    def ignores(value: object) -> None:
        assert decode(kind, encode(value) + UNKNOWN_FIELDS) == value

    ignores()


def test_unknown_fields_are_ignored_inside_of_others() -> None:
    update = messages.JobUpdate(job.Register(JOB, job.JobState.QUEUED))
    newer = messages_pb2.JobUpdate.FromString(encode(update))
    newer.register.MergeFromString(UNKNOWN_FIELDS)
    assert decode(messages.JobUpdate, newer.SerializeToString()) == update


def test_no_bytes_give_the_zero_values_of_proto3() -> None:
    assert decode(job.EnvironmentRequest, b"") == job.EnvironmentRequest((), "", from_project=False)


def test_a_zero_that_may_be_absent_differs_from_absence() -> None:
    zero = inventory.GpuReading(GpuId("GPU-1"), memory_free_bytes=0, power_w=0.0)
    absent = inventory.GpuReading(GpuId("GPU-1"))
    assert decode(inventory.GpuReading, encode(zero)) == zero
    assert decode(inventory.GpuReading, encode(absent)) == absent


@pytest.mark.parametrize(
    "value",
    [
        trust.Invite("s", UserName("\udcff"), trust.Role.RIG, KeyId("k"), 0.0),
        trust.Invite("s", UserName("ada"), trust.Role.RIG, KeyId("k"), float("nan")),
        resources.GpuRequest(-1),
        resources.GpuRequest(2**32),
        resources.GpuShare(GpuId("GPU-1"), 2**64),
        inventory.GpuReading(GpuId("GPU-1"), temperature_c=2**31),
        gossip.Incarnation(0, -1),
    ],
    ids=repr,
)
def test_what_has_no_wire_form_is_refused_at_the_sender(value: object) -> None:
    with pytest.raises(MeshgpuError, match="cannot write") as caught:
        encode(value)
    assert caught.value.code == "bad-message"


# -- bad bytes -------------------------------------------------------------------------------------------------------


def refused(kind: type, data: bytes) -> MeshgpuError:
    with pytest.raises(MeshgpuError) as caught:
        decode(kind, data)
    assert caught.value.code == "bad-message"
    return caught.value


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(kind: type, data: bytes) -> None:
    read_or_refuse(kind, data)


@settings(max_examples=500, deadline=None)
@given(ANY_VALUE, st.integers(0, 2**32))
def test_mutated_bytes_are_read_or_refused(value: object, seed: int) -> None:
    read_or_refuse(type(value), mutated(encode(value), random.Random(seed)))


@settings(max_examples=500, deadline=None)
@given(ANY_VALUE, st.sampled_from(KINDS))
def test_bytes_of_another_kind_are_read_or_refused(value: object, kind: type) -> None:
    read_or_refuse(kind, encode(value))


def read_or_refuse(kind: type, data: bytes) -> None:
    try:
        value: object = decode(kind, data)
    except MeshgpuError as error:
        assert error.code == "bad-message"  # noqa: PT017  # either outcome is right
    else:
        assert decode(kind, encode(value)) == value


def mutated(data: bytes, chance: random.Random) -> bytes:
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(4))
    pieces = [data[a:b] for a, b in pairwise([0, *cuts, len(data)])]
    changes = (
        lambda piece: piece,
        lambda piece: b"",
        lambda piece: piece + piece,
        lambda piece: bytes(byte ^ (1 << chance.randrange(8)) for byte in piece[:1]) + piece[1:],
        lambda piece: chance.randbytes(len(piece)),
    )
    return b"".join(chance.choice(changes)(piece) for piece in pieces)


def test_text_that_is_not_unicode_is_refused() -> None:
    refused(trust.Head, b"\x0a\x01\xff")


@pytest.mark.parametrize("text", ["", "QUEUED", "queued ", "newer"])
def test_an_unknown_state_is_refused(text: str) -> None:
    error = refused(job.Register, job_pb2.Register(job=JOB, state=text).SerializeToString())
    assert "Register.state" in error.message
    assert "succeeded" in error.message


def test_an_entry_without_its_value_is_refused() -> None:
    entry = gossip_pb2.GossipEntry(incarnation=gossip_pb2.Incarnation(epoch=1))
    assert "node_record, capacity" in refused(gossip.GossipEntry, entry.SerializeToString()).message


def test_a_message_that_is_required_is_missed() -> None:
    assert "Submit.spec" in refused(messages.Submit, messages_pb2.Submit(job=JOB).SerializeToString()).message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_time_that_is_no_number_is_refused(number: float) -> None:
    register = job_pb2.Register(job=JOB, state="queued")
    register.started_wall_s = number
    assert "Register.started_wall_s" in refused(job.Register, register.SerializeToString()).message


@pytest.mark.parametrize("text", ["", "../../etc", JOB.upper(), JOB + "a", JOB + "\n", "1" * 26])
def test_a_job_id_that_could_leave_its_directory_is_refused(text: str) -> None:
    refused(messages.Release, messages_pb2.Release(job=text, hold="h").SerializeToString())


@pytest.mark.parametrize("text", ["..", "0" * 63, "A" * 64, "0" * 64 + "\n", "../" + "0" * 61])
def test_a_digest_that_is_none_is_refused(text: str) -> None:
    refused(trust.Head, encode(trust.Head(KeyId("k"), 0, Digest(text))))


@pytest.mark.parametrize(
    ("known", "heads", "is_read"),
    [(ELEMENTS_LIMIT, 0, True), (ELEMENTS_LIMIT + 1, 0, False), (ELEMENTS_LIMIT, 1, False)],
)
def test_elements_are_limited_in_total(known: int, heads: int, is_read: bool) -> None:
    one = messages_pb2.Known(incarnation=gossip_pb2.Incarnation())
    data = messages_pb2.GossipDigest(known=[one] * known, heads=[trust_pb2.Head()] * heads).SerializeToString()
    if is_read:
        assert len(decode(messages.GossipDigest, data).known) == known
    else:
        assert "elements" in refused(messages.GossipDigest, data).message


def test_elements_of_elements_count() -> None:
    readings = inventory.GpuReading(
        GpuId("GPU-1"), processes=(inventory.GpuProcess(1, inventory.ProcessKind.COMPUTE),) * 1000
    )
    assert decode(gossip.Capacity, encode(gossip.Capacity((readings,) * 65, ())))
    assert "elements" in refused(gossip.Capacity, encode(gossip.Capacity((readings,) * 66, ()))).message


# -- frames ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(ANY_MESSAGE, st.text())
def test_a_message_survives_its_frame(message: messages.Message, mesh: str) -> None:
    assert decode_frame(encode_frame(MeshId(mesh), message)) == (mesh, message)


def test_a_frame_of_another_protocol_is_refused_with_both_versions() -> None:
    frame = envelope_pb2.Frame(protocol=PROTOCOL + 1, mesh=MESH, gossip_delta=messages_pb2.GossipDelta())
    with pytest.raises(MeshgpuError, match=f"protocol {PROTOCOL + 1}.* protocol {PROTOCOL}") as caught:
        decode_frame(frame.SerializeToString())
    assert caught.value.code == "version"


@pytest.mark.parametrize("rest", [b"", UNKNOWN_FIELDS])
def test_a_frame_without_a_known_message_says_so(rest: bytes) -> None:
    frame = envelope_pb2.Frame(protocol=PROTOCOL, mesh=MESH)
    with pytest.raises(MeshgpuError) as caught:
        decode_frame(frame.SerializeToString() + rest)
    assert caught.value.code == "unknown-message"


@settings(max_examples=300, deadline=None)
@given(ANY_MESSAGE, st.integers(0, 2**32))
def test_a_mutated_frame_is_read_or_refused(message: messages.Message, seed: int) -> None:
    try:
        decode_frame(mutated(encode_frame(MESH, message), random.Random(seed)))
    except MeshgpuError as error:
        assert error.code in {"bad-message", "version", "unknown-message"}  # noqa: PT017  # either outcome is right


def test_a_constraint_that_cannot_be_read_is_refused_on_arrival() -> None:
    data = resources_pb2.Resources(gpus=resources_pb2.GpuRequest(count=1), on="vram>>24").SerializeToString()
    with pytest.raises(MeshgpuError) as caught:
        decode(resources.Resources, data)
    assert caught.value.code == "bad-message"
    assert "vram>>24" in caught.value.message
