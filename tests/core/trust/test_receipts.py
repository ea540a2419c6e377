"""Receipts: which a steward keeps, and what is found wrong with one that somebody shows."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.receipts import check_told, examine
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, GpuId, HoldId, JobId, KeyId, MeshId, NodeId, digest
from meshgpu.model.job import AttemptState, JobSpec, JobState, Register, Result
from meshgpu.model.messages import AttemptReport
from meshgpu.model.receipt import Proof, Receipt
from meshgpu.model.resources import GpuShare
from meshgpu.model.trust import Revoke, Signed
from meshgpu.sim.office import Office

Sign = Callable[..., tuple[JobSpec, Signed]]
GPU = GpuShare(GpuId("GPU-1"), 0)


@dataclass
class Bench:
    """A job that the fourth machine ran, and the log by which it is judged."""

    office: Office
    log: MeshLog
    rules: RequestRules
    spec: JobSpec
    signed: Signed

    @property
    def node(self) -> NodeId:
        return self.office.setups[3].node

    def receipt(self, **changes: object) -> Receipt:
        receipt = Receipt(
            self.office.mesh,
            self.spec.job,
            1,
            self.node,
            self.office.notaries[0].digest(self.signed),
            self.spec.tree,
            True,
            (GPU.uuid,),
            "580.1",
            "k" * 32,
            "",
            digest(b"log"),
            AttemptState.EXITED,
            0,
            10.0,
            20.0,
        )
        return replace(receipt, **changes)  # type: ignore[arg-type]  # names and types are Receipt's

    def sign(self, receipt: Receipt, seat: int = 3) -> Signed:
        return self.office.notaries[seat].sign(KeyId(self.office.setups[seat].node), receipt)

    def faults(self, receipt: Signed, spec: Signed | None = None) -> list[str]:
        found = examine(Proof(spec or self.signed, receipt), self.rules, self.log, self.office.notaries[0])
        return [f"{check.about}: {check.found}" for check in found.checks if check.holds is not True]


@pytest.fixture
def bench(office: Office, log: MeshLog, rules: RequestRules, signed: Sign) -> Bench:
    return Bench(office, log, rules, *signed())


def test_receipt_that_holds_says_who_asked_and_who_ran(bench: Bench) -> None:
    proof = Proof(bench.signed, bench.sign(bench.receipt()))
    found = examine(proof, bench.rules, bench.log, bench.office.notaries[0])
    assert [(check.about, check.holds, check.found) for check in found.checks] == [
        ("request", True, "signed by ada on rig1"),
        ("run", True, "signed by rig3"),
        ("together", True, "the run is of this very request"),
    ]
    assert (found.spec, found.receipt) == (bench.spec, bench.receipt())


def test_receipt_holds_after_machine_and_user_have_left(bench: Bench) -> None:
    admin = bench.office.setups[0].accounts[bench.spec.user]
    for seat in (1, 3):
        entries = bench.log.write(admin, [Revoke(bench.office.setups[seat].node, (), stops_jobs=True)])
        bench.log.add(entries)
    assert bench.node not in bench.log.members
    assert bench.faults(bench.sign(bench.receipt())) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"mesh": MeshId("f" * 64)}, "of another mesh"),
        ({"job": JobId("a" * 26)}, "of another job"),
        ({"spec": Digest("f" * 64)}, "of a request with another text"),
        ({"tree": Digest("f" * 64)}, "of another working directory"),
        ({"epoch": 0}, "of no attempt"),
    ],
)
def test_receipt_of_something_else_is_named(bench: Bench, changes: dict[str, object], fault: str) -> None:
    assert bench.faults(bench.sign(bench.receipt(**changes))) == [f"together: cannot trust a receipt: it is {fault}"]


def test_receipt_of_a_machine_that_was_not_asked_for_is_named(office: Office, bench: Bench, signed: Sign) -> None:
    bench.spec, bench.signed = signed(machine=office.setups[2].node)
    fault = "together: cannot trust a receipt: it is of a machine that the request does not name"
    assert bench.faults(bench.sign(bench.receipt())) == [fault]


def test_receipt_that_one_machine_signs_for_another_is_named(bench: Bench) -> None:
    (fault,) = bench.faults(bench.sign(bench.receipt(), seat=2))
    assert fault == "run: cannot trust a receipt: it was signed by rig2, of another machine"


def test_receipt_of_a_machine_that_never_was_a_member_is_named(bench: Bench) -> None:
    stranger = bench.office.ring.make("stranger")
    receipt = replace(bench.sign(bench.receipt()), key=KeyId("s" * 52))
    (fault,) = bench.faults(receipt)
    assert fault == "run: cannot trust a receipt: the mesh never had a machine ssssssssssss"
    assert stranger


def test_forged_signatures_are_named_each_on_its_own(bench: Bench) -> None:
    receipt = bench.sign(bench.receipt())
    forged = replace(receipt, signature=bytes(32))
    assert [fault.split(":")[0] for fault in bench.faults(forged)] == ["run"]
    assert [fault.split(":")[0] for fault in bench.faults(receipt, replace(bench.signed, signature=bytes(32)))] == [
        "request"
    ]


def test_request_and_run_of_two_jobs_do_not_go_together(bench: Bench, signed: Sign) -> None:
    _, other = signed(2)
    assert bench.faults(bench.sign(bench.receipt()), other) == [
        "together: cannot trust a receipt: it is of another job"
    ]


REPORT = AttemptReport(JobId("j" * 26), 1, None, "", 10.0, 20.0, Result(AttemptState.EXITED, 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 2},
        {"outcome": AttemptState.CRASHED},
        {"exit_code": 1},
        {"started_wall_s": None},
        {"ended_wall_s": 21.0},
        {"gpus": ()},
        {"node": NodeId("n" * 52)},
    ],
)
def test_receipt_says_what_its_machine_reports(bench: Bench, changes: dict[str, object]) -> None:
    register = Register(bench.spec.job, JobState.ACTIVE, 1, bench.node, HoldId("h" * 26), (GPU,))
    assert REPORT.result is not None
    check_told(bench.receipt(), register, REPORT, REPORT.result)
    with pytest.raises(TrustError, match="says something else than the report"):
        check_told(bench.receipt(**changes), register, REPORT, REPORT.result)


def test_machine_that_was_asked_for_may_have_new_keys_since(office: Office, bench: Bench, signed: Sign) -> None:
    old = office.setups[2].node
    bench.spec, bench.signed = signed(machine=old)
    bench.log.heirs = {old: bench.node}
    assert bench.faults(bench.sign(bench.receipt())) == []
