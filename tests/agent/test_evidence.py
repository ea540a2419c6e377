"""Audit and receipts as they lie on disk and in files: whatever byte of them is altered, it is found and named."""

import asyncio
import base64
import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshgpu.adapters.key_files import KeyFiles
from meshgpu.adapters.sqlite_store import SqliteStore
from meshgpu.agent.audit import AuditTrail, Verdict, kept_audit
from meshgpu.agent.receipts import Receipts
from meshgpu.core.audit import AUDIT, AUDIT_START, AuditChain, audit_key
from meshgpu.core.effects import Persist, Warn
from meshgpu.core.jobs.attempt import Attempt
from meshgpu.core.node import Node, NodeConfig
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.errors import MeshgpuError
from meshgpu.model.audit import AuditEvent, AuditHead
from meshgpu.model.clock import Now
from meshgpu.model.ids import Digest, GpuId, HoldId, KeyId, MeshId, NodeId, UserName, digest, job_id, key_id, node_id
from meshgpu.model.inventory import Inventory
from meshgpu.model.job import AttemptState, EnvironmentRequest, JobSpec, Result
from meshgpu.model.receipt import Evidence, Proof
from meshgpu.model.records import MeshLogRecord, MeshRecord, Record
from meshgpu.model.resources import GpuRequest, GpuShare, Resources
from meshgpu.model.trust import AddNode, Genesis, LinkUser, Role
from meshgpu.wire.codec import encode
from meshgpu.wire.notary import WireNotary

WALL_S = 1_800_000_000.0
UID = 1000
ADA = UserName("ada")


@dataclass
class Rig:
    """One machine, its keys, its disk, and an attempt on it that has ended."""

    keys: KeyFiles
    notary: WireNotary
    node: Node
    attempt: Attempt
    store: SqliteStore

    @property
    def trail(self) -> AuditTrail:
        async def stored(read: Callable[[SqliteStore], object]) -> object:
            return read(self.store)

        runtime: Any = SimpleNamespace(node=self.node, stored=stored)
        return AuditTrail(runtime, self.notary, self.keys.node_key)

    def audit(self, count: int) -> None:
        """Write entries as an agent does."""
        for _ in range(count):
            effects = self.node.attempts.audit.wrote(AuditEvent.STARTED, self.attempt, WALL_S)
            persists = [effect for effect in effects if isinstance(effect, Persist)]
            self.store.write([(p.kind, p.key, encode(p.record) if p.record else None) for p in persists])

    def verify(self) -> Verdict:
        return asyncio.run(self.trail.verify())


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    keys = KeyFiles(tmp_path / "keys")
    notary = WireNotary(keys.sign, keys.verify)
    public, user = keys.node_key(), keys.user_key(UID)
    me = node_id(public)
    mesh, genesis = found(notary, key_id(user), Genesis("lab", user, bytes(32), b"nonce"))
    log = MeshLog(notary)
    log.enter(mesh, [genesis])
    member = AddNode(me, public, keys.device_ca(), "rig", Role.RIG, ADA)
    entries = (genesis, *log.write(key_id(user), (member, LinkUser(ADA, user, me, UID))))
    records: list[Record] = [MeshRecord(mesh, 1), *(MeshLogRecord(rank, entry) for rank, entry in enumerate(entries))]
    node = Node(me, Now(0.0, WALL_S, "boot"), notary, random.Random(1), NodeConfig("test"), records)
    node.start(Now(0.0, WALL_S, "boot"))
    attempt = ended_attempt(mesh, me, key_id(user), notary)
    with contextlib.closing(SqliteStore(tmp_path / "agent.db")) as store:
        yield Rig(keys, notary, node, attempt, store)


def ended_attempt(mesh: MeshId, me: NodeId, key: KeyId, notary: WireNotary) -> Attempt:
    nonce = bytes(16)
    spec = JobSpec(
        mesh,
        job_id(key, nonce),
        nonce,
        "train",
        ADA,
        me,
        ("python", "train.py"),
        False,
        (),
        EnvironmentRequest(),
        digest(b"tree"),
        10,
        1,
        Resources(GpuRequest(1)),
        None,
        (me,),
        WALL_S,
    )
    gpus = (GpuShare(GpuId("GPU-1"), 0),)
    signed = notary.sign(key, spec)
    attempt = Attempt(spec, signed, 1, AttemptState.EXITED, gpus, HoldId("h" * 26), me, 0.0)
    attempt.result, attempt.ended_wall_s = Result(AttemptState.EXITED, 0), WALL_S + 9
    evidence = Evidence("e" * 32, "", digest(b"log"))
    receipt = attempt.account(me, notary.digest(signed), Inventory(1, 1), evidence)
    attempt.receipt = notary.sign(KeyId(me), receipt)
    return attempt


# -- the audit ---------------------------------------------------------------------------------------------------------


def test_empty_and_whole_audits_are_whole(rig: Rig) -> None:
    assert rig.verify() == Verdict(0, None, "")
    rig.audit(5)
    assert rig.verify() == Verdict(5, rig.node.attempts.audit.head, "")


def test_every_bit_of_every_entry_matters(rig: Rig) -> None:
    rig.audit(2)
    for seq in range(2):
        key = audit_key(seq)
        ((_, data),) = rig.store.read(AUDIT, key, 1)
        for position in range(len(data)):
            altered = bytearray(data)
            altered[position] ^= 1 << position % 8
            rig.store.write([(AUDIT, key, bytes(altered))])
            fault = rig.verify().fault
            assert f"entry {seq} " in fault, (position, fault)
        rig.store.write([(AUDIT, key, data)])
    assert rig.verify().fault == ""


def test_entry_that_the_agent_never_wrote_is_named(rig: Rig) -> None:
    rig.audit(2)
    ((_, data),) = rig.store.read(AUDIT, audit_key(1), 1)
    rig.store.write([(AUDIT, audit_key(2), data)])
    assert rig.verify().fault == ("cannot trust the audit: entry 2 is on disk, and the running agent never wrote it")


def test_every_bit_of_where_the_audit_begins_matters(rig: Rig) -> None:
    rig.node.attempts.audit._kept = rig.node.attempts.audit._let_go = 2
    rig.audit(4)
    assert rig.verify() == Verdict(2, rig.node.attempts.audit.head, "")
    ((_, data),) = rig.store.last(AUDIT_START, 1)
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        rig.store.write([(AUDIT_START, AUDIT_START, bytes(altered))])
        assert "cannot trust the audit" in rig.verify().fault, position


def test_agent_goes_on_after_a_newest_entry_that_cannot_be_read(rig: Rig) -> None:
    rig.audit(3)
    rig.store.write([(AUDIT, audit_key(2), b"\xff\xff")])
    again = AuditChain(rig.node.node, rig.notary)
    again.restore(kept_audit(rig.store))
    assert again.count == 3
    rig.node.attempts.audit = again
    rig.audit(1)
    assert rig.verify().fault == "cannot trust the audit: entry 2 cannot be read: its bytes were changed"
    assert [row["fault"] is None for row in asyncio.run(rig.trail.newest(10))] == [True, True, False, True]


def test_agent_goes_on_where_the_beginning_cannot_be_read(rig: Rig) -> None:
    rig.audit(3)
    rig.store.write([(AUDIT_START, AUDIT_START, b"\xff\xff")])
    again = AuditChain(rig.node.node, rig.notary)
    (warning,) = again.restore(kept_audit(rig.store))
    assert isinstance(warning, Warn)
    assert "start of the audit cannot be read" in warning.reason
    assert again.count == 3
    assert "where it begins cannot be read" in rig.verify().fault


def test_long_audit_is_read_in_steps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshgpu.agent.audit.STEP", 2)
    rig.audit(7)
    assert rig.verify().count == 7
    ((_, data),) = rig.store.read(AUDIT, audit_key(5), 1)
    rig.store.write([(AUDIT, audit_key(5), data[:-1])])
    assert "entry 5 " in rig.verify().fault


def test_agent_that_wrote_more_than_lies_on_disk_says_so(rig: Rig) -> None:
    rig.audit(3)
    rig.node.attempts.audit.head = AuditHead(3, Digest("f" * 64))
    assert rig.verify().fault == "cannot trust the audit: entry 3 is missing: the running agent wrote entries up to 3"


# -- receipts ----------------------------------------------------------------------------------------------------------


def kept(rig: Rig) -> dict[str, Any]:
    """The file that `info --receipt --json` makes."""
    assert rig.attempt.receipt is not None
    text = base64.b64encode(encode(Proof(rig.attempt.signed, rig.attempt.receipt))).decode()
    document = checked(rig, {"proof": text})
    return json.loads(json.dumps({"proof": text, "facts": document["facts"]}))  # type: ignore[no-any-return]


def checked(rig: Rig, document: dict[str, Any]) -> dict[str, Any]:
    jobs: Any = None
    return Receipts(rig.node, jobs).check(document)


def test_kept_receipt_holds(rig: Rig) -> None:
    document = checked(rig, kept(rig))
    assert document["holds"]
    assert [(check["about"], check["holds"]) for check in document["checks"]] == [
        ("request", True),
        ("run", True),
        ("together", True),
        ("text", True),
    ]
    assert document["facts"]["exit_code"] == 0


def test_every_bit_of_a_proof_matters(rig: Rig) -> None:
    document = kept(rig)
    data = base64.b64decode(document["proof"])
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        proof = base64.b64encode(bytes(altered)).decode()
        with contextlib.suppress(MeshgpuError):
            found = checked(rig, document | {"proof": proof})
            assert [check["found"] for check in found["checks"] if check["holds"] is False], position
            assert not found["holds"]


def test_every_character_of_a_proof_matters(rig: Rig) -> None:
    """Also those that base64 has no use for."""
    document = kept(rig)
    proof = document["proof"]
    for position in range(len(proof)):
        other = "B" if proof[position] != "B" else "C"
        altered = proof[:position] + other + proof[position + 1 :]
        with contextlib.suppress(MeshgpuError):
            assert not checked(rig, document | {"proof": altered})["holds"], position
    for altered in (f"{proof}\n", f" {proof}", proof + "AAAA", ""):
        with pytest.raises(MeshgpuError, match="cannot check the receipt"):
            checked(rig, document | {"proof": altered})


def test_proof_that_says_more_than_a_proof_does_is_none(rig: Rig) -> None:
    document = kept(rig)
    longer = base64.b64encode(base64.b64decode(document["proof"]) + b"\xa0\x06\x01").decode()  # a field of tomorrow
    with pytest.raises(MeshgpuError, match="its proof is not written as a proof is"):
        checked(rig, document | {"proof": longer})


def test_every_fact_beside_the_proof_is_compared(rig: Rig) -> None:
    document = kept(rig)
    for name, value in document["facts"].items():
        altered = document["facts"] | {name: "another" if value != "another" else "one"}
        (fault,) = [c for c in checked(rig, document | {"facts": altered})["checks"] if not c["holds"]]
        assert (fault["about"], fault["found"]) == ("text", f"it does not say what was signed: {name}")
    strange: tuple[object, ...] = (None, [], {}, document["facts"] | {"bonus": 1})
    for facts in strange:
        assert not checked(rig, document | {"facts": facts})["holds"]
