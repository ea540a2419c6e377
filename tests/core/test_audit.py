"""The audit chain: it goes on over restarts, lets the oldest go, and whatever was done to it is named."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from meshgpu.core.audit import AUDIT, AUDIT_START, AuditChain, AuditWalk, AuditWatch, audit_key
from meshgpu.core.effects import Effect, Persist, Warn
from meshgpu.core.jobs.attempt import Attempt
from meshgpu.errors import TrustError
from meshgpu.model.audit import AuditEntry, AuditEvent, AuditHead
from meshgpu.model.ids import Digest, GpuId, HoldId, KeyId, NodeId, UserName
from meshgpu.model.job import AttemptState, JobSpec, Result
from meshgpu.model.records import AuditRecord, AuditStartRecord, Record
from meshgpu.model.resources import GpuShare
from meshgpu.model.trust import Signed
from meshgpu.sim.office import Office

Sign = Callable[..., tuple[JobSpec, Signed]]


@dataclass
class Bench:
    """The fourth machine's chain, and its disk."""

    office: Office
    attempt: Attempt
    disk: dict[tuple[str, str], Record]
    chain: AuditChain
    before: tuple[NodeId, ...] = ()

    @property
    def node(self) -> NodeId:
        return self.office.setups[3].node

    def write(self, count: int = 1) -> list[Effect]:
        effects = [e for _ in range(count) for e in self.chain.wrote(AuditEvent.STARTED, self.attempt, 100.0)]
        self.keep(effects)
        return effects

    def keep(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Persist)
            if effect.record is None:
                del self.disk[effect.kind, effect.key]
            else:
                self.disk[effect.kind, effect.key] = effect.record

    @property
    def rows(self) -> list[tuple[str, AuditRecord]]:
        return [
            (key, r) for (kind, key), r in sorted(self.disk.items()) if kind == AUDIT and isinstance(r, AuditRecord)
        ]

    def walk(self, rows: list[tuple[str, AuditRecord]] | None = None, told: AuditHead | None = None) -> AuditWalk:
        start = self.disk.get((AUDIT_START, AUDIT_START))
        signed = start.start if isinstance(start, AuditStartRecord) else None
        public = self.office.ring.public
        own = {node: public(KeyId(node)) for node in (self.node, *self.before)}
        walk = AuditWalk(own.get, self.office.notaries[3], signed)
        for key, record in self.rows if rows is None else rows:
            walk.take(key, record)
        walk.finish(told or self.chain.head)
        return walk


@pytest.fixture
def bench(office: Office, signed: Sign) -> Bench:
    spec, envelope = signed()
    gpus = (GpuShare(GpuId("GPU-1"), 0),)
    node = office.setups[0].node
    attempt = Attempt(spec, envelope, 1, AttemptState.RUNNING, gpus, HoldId("h" * 26), node, 0.0, fenced=True)
    return Bench(office, attempt, {}, AuditChain(office.setups[3].node, office.notaries[3], kept=10, let_go=4))


def test_entry_says_who_ran_what_on_which_gpus(bench: Bench) -> None:
    bench.attempt.result = Result(AttemptState.EXITED, 3)
    bench.attempt.receipt = bench.attempt.signed
    bench.keep(bench.chain.wrote(AuditEvent.ENDED, bench.attempt, 105.5))
    ((key, record),) = bench.rows
    notary = bench.office.notaries[3]
    entry = notary.read(record.entry, bench.office.ring.public(KeyId(bench.node)), AuditEntry)
    spec = bench.attempt.spec
    assert key == audit_key(0)
    assert entry == AuditEntry(
        bench.node,
        0,
        Digest(""),
        105.5,
        AuditEvent.ENDED,
        spec.job,
        1,
        "train",
        spec.user,
        bench.attempt.signed.key,
        notary.digest(bench.attempt.signed),
        True,
        (GpuId("GPU-1"),),
        AttemptState.EXITED,
        3,
        notary.digest(bench.attempt.signed),
    )


def test_chain_goes_on_after_a_restart_with_nothing_but_its_newest_entry(bench: Bench) -> None:
    bench.write(3)
    again = AuditChain(bench.node, bench.office.notaries[3])
    assert again.restore([bench.rows[-1][1]]) == []
    assert (again.head, again.count) == (bench.chain.head, 3)
    bench.chain = again
    bench.write()
    assert bench.walk().count == 4


def test_oldest_entries_go_and_the_rest_still_verifies(bench: Bench) -> None:
    bench.write(13)
    assert (len(bench.rows), bench.chain.count) == (13, 13)
    bench.write()
    assert [key for key, _ in bench.rows] == [audit_key(seq) for seq in range(4, 14)]
    assert bench.walk().count == bench.chain.count == 10
    again = AuditChain(bench.node, bench.office.notaries[3], kept=10, let_go=4)
    start = bench.disk[AUDIT_START, AUDIT_START]
    again.restore([start, bench.rows[-1][1]])
    assert again.count == 10


def test_start_that_cannot_be_read_is_told_and_the_chain_goes_on(bench: Bench) -> None:
    bench.write(14)
    again = AuditChain(bench.node, bench.office.notaries[3])
    broken = replace(bench.attempt.signed, kind="JobSpec")
    (warning,) = again.restore([AuditStartRecord(broken), bench.rows[-1][1]])
    assert isinstance(warning, Warn)
    assert again.head == bench.chain.head


def test_every_entry_left_out_is_named(bench: Bench) -> None:
    bench.write(6)
    for gone in range(6):
        rows = bench.rows[:gone] + bench.rows[gone + 1 :]
        with pytest.raises(TrustError, match=f"entry {gone} is (not there|missing)"):
            bench.walk(rows)


def test_chain_that_was_cut_short_or_is_gone_is_named(bench: Bench) -> None:
    bench.write(6)
    for kept in range(6):
        with pytest.raises(TrustError, match=f"entry {kept} is missing: the running agent wrote entries up to 5"):
            bench.walk(bench.rows[:kept])


def test_entries_that_change_places_are_named(bench: Bench) -> None:
    bench.write(6)
    for one in range(5):
        rows = bench.rows
        rows[one], rows[one + 1] = (rows[one][0], rows[one + 1][1]), (rows[one + 1][0], rows[one][1])
        with pytest.raises(TrustError, match=f"entry {one} says that it is entry {one + 1}"):
            bench.walk(rows)


def test_number_beside_an_entry_changes_nothing_of_what_was_signed(bench: Bench) -> None:
    bench.write(3)
    key, record = bench.rows[1]
    with pytest.raises(TrustError, match="entry 1 was signed as entry 2"):
        bench.walk([bench.rows[0], (key, replace(bench.rows[2][1], seq=1))])
    assert record.seq == 1


def test_entry_that_is_signed_anew_breaks_the_next(bench: Bench) -> None:
    """Who has the node's key can change an entry, and all that follow; not one alone."""
    bench.write(4)
    public = bench.office.ring.public(KeyId(bench.node))
    notary, rows = bench.office.notaries[3], bench.rows
    entry = notary.read(rows[1][1].entry, public, AuditEntry)
    rows[1] = (rows[1][0], AuditRecord(1, notary.sign(KeyId(bench.node), replace(entry, user=UserName("mallory")))))
    with pytest.raises(TrustError, match="entry 2 does not follow from the entry before it"):
        bench.walk(rows)


def test_whole_chain_that_is_written_anew_does_not_end_where_the_agent_was(bench: Bench) -> None:
    bench.write(3)
    told = bench.chain.head
    other = AuditChain(bench.node, bench.office.notaries[3])
    bench.disk, bench.chain = {}, other
    bench.attempt.epoch = 2
    bench.write(3)
    with pytest.raises(TrustError, match="entry 2 is not the one that the running agent wrote"):
        bench.walk(told=told)


def test_chain_goes_on_under_new_keys(bench: Bench) -> None:
    """The machine was the third before it became the fourth."""
    old = bench.office.setups[2].node
    bench.chain = AuditChain(old, bench.office.notaries[2])
    bench.write(2)
    bench.chain = AuditChain(bench.node, bench.office.notaries[3])
    bench.chain.restore([bench.rows[-1][1]])
    bench.write(2)
    with pytest.raises(TrustError, match=r"entry 0 does not hold: it was signed by .* which this machine never was"):
        bench.walk()
    bench.before = (old,)
    assert bench.walk().count == 4


def test_entries_of_another_machine_are_named(bench: Bench) -> None:
    bench.write(2)
    notary, other = bench.office.notaries[2], bench.office.setups[2].node
    chain = AuditChain(other, notary)
    (persist,) = chain.wrote(AuditEvent.STARTED, bench.attempt, 1.0)
    assert isinstance(persist, Persist)
    assert isinstance(persist.record, AuditRecord)
    with pytest.raises(TrustError, match="entry 0 does not hold"):
        bench.walk([(audit_key(0), persist.record), bench.rows[1]])


def test_start_of_another_machine_is_refused(bench: Bench) -> None:
    bench.write(14)
    other = AuditChain(bench.office.setups[2].node, bench.office.notaries[2], kept=10, let_go=4)
    effects = [e for _ in range(14) for e in other.wrote(AuditEvent.STARTED, bench.attempt, 1.0)]
    bench.disk[AUDIT_START, AUDIT_START] = next(
        e.record for e in effects if isinstance(e, Persist) and isinstance(e.record, AuditStartRecord)
    )
    with pytest.raises(TrustError, match="cannot trust the audit: its start"):
        bench.walk()


# -- what others notice ------------------------------------------------------------------------------------------------


def heads(*numbers: int) -> list[AuditHead]:
    return [AuditHead(number, Digest(f"{number:064x}")) for number in numbers]


NODE = NodeId("n" * 52)


def test_head_that_goes_forward_is_no_fault() -> None:
    watch = AuditWatch()
    for head in (None, *heads(0, 0, 1, 5, 5)):
        assert watch.heard(NODE, head) is None
    assert (watch.faults, watch.watched) == ((), 1)


def test_head_that_goes_back_changes_or_vanishes_is_named_once_each_time() -> None:
    watch = AuditWatch()
    other = AuditHead(5, Digest("f" * 64))
    told = [watch.heard(NODE, head) for head in (*heads(5), *heads(3, 3, 4), None, *heads(5), other)]
    assert [fault.reason if fault else "" for fault in told] == [
        "",
        "its audit went back from entry 5 to 3",
        "",
        "",
        "its audit is gone: it had 5 entries",
        "",
        "its audit was rewritten: entry 5 is another than it was",
    ]
    (last,) = watch.faults
    assert last.reason == "its audit was rewritten: entry 5 is another than it was"


HEIR = NodeId("h" * 52)


def test_member_under_new_keys_goes_on_with_its_audit() -> None:
    watch = AuditWatch()
    watch.heard(NODE, heads(5)[0])
    assert watch.go_on(NODE, HEIR) is None
    assert watch.heard(HEIR, heads(6)[0]) is None
    assert watch.watched == 1


@pytest.mark.parametrize("is_told_first", [False, True])
def test_who_rewrites_its_audit_and_takes_new_keys_is_named(is_told_first: bool) -> None:
    watch = AuditWatch()
    watch.heard(NODE, heads(5)[0])
    told = [watch.heard(HEIR, heads(0)[0])] if is_told_first else []
    told += [watch.go_on(NODE, HEIR)]
    told += [] if is_told_first else [watch.heard(HEIR, heads(0)[0])]
    assert [fault.node for fault in told if fault] == [HEIR]
    assert [fault.reason for fault in watch.faults] == ["its audit went back from entry 5 to 0"]


def test_fault_stays_with_a_member_that_takes_new_keys() -> None:
    watch = AuditWatch()
    watch.heard(NODE, heads(5)[0])
    watch.heard(NODE, heads(3)[0])
    assert watch.go_on(NODE, HEIR) is None
    assert [fault.node for fault in watch.faults] == [HEIR]


def test_heads_of_any_order_are_faults_exactly_where_they_do_not_grow() -> None:
    rng = random.Random(1)
    for _ in range(200):
        watch, before = AuditWatch(), -1
        for number in (rng.randrange(6) for _ in range(8)):
            assert (watch.heard(NODE, heads(number)[0]) is not None) == (number < before)
            before = number
