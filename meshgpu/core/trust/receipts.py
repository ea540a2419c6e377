"""Receipts: what a node signs when an attempt has ended, and what must hold for one to be worth keeping.

A user signed what was to run; the node signs what ran, naming the digest of what the user signed. Neither can be
changed or paired with another afterwards, not even by those who keep it.
"""

from dataclasses import dataclass
from typing import Final

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import TrustError
from meshgpu.model.ids import Digest, NodeId
from meshgpu.model.job import JobSpec, Register, Result
from meshgpu.model.messages import AttemptReport
from meshgpu.model.receipt import Proof, Receipt
from meshgpu.model.trust import Notary, Signed

NAMED: Final = 12
"""Characters of a digest or a key that people are shown."""


def read_receipt(signed: Signed, log: MeshLog, notary: Notary) -> Receipt:
    """A receipt that a machine of the mesh, of now or before, really signed. Raises TrustError."""
    member = log.known(NodeId(signed.key))
    if member is None:
        raise TrustError("not-allowed", f"cannot trust a receipt: the mesh never had a machine {signed.key[:NAMED]}")
    receipt = notary.read(signed, member.public_key, Receipt)
    if receipt.node != member.node:
        raise TrustError("not-allowed", f"cannot trust a receipt: it was signed by {member.name}, of another machine")
    return receipt


def check_about(receipt: Receipt, spec: JobSpec, digest: Digest, log: MeshLog) -> None:
    """Raises TrustError unless the receipt is about this very request. digest: of the signed spec, as read from it."""
    is_elsewhere = spec.machine is not None and log.current(spec.machine) != log.current(receipt.node)
    for is_wrong, fault in (
        (receipt.mesh != spec.mesh, "of another mesh"),
        (receipt.job != spec.job, "of another job"),
        (receipt.spec != digest, "of a request with another text"),
        (receipt.tree != spec.tree, "of another working directory"),
        (is_elsewhere, "of a machine that the request does not name"),
        (receipt.epoch < 1, "of no attempt"),
    ):
        if is_wrong:
            raise TrustError("not-allowed", f"cannot trust a receipt: it is {fault}")


def check_told(receipt: Receipt, register: Register, report: AttemptReport, result: Result) -> None:
    """Raises TrustError unless the receipt says what its machine reports to the steward that holds `register`."""
    told = (report.epoch, result.outcome, result.exit_code, report.started_wall_s, report.ended_wall_s)
    signed = (
        receipt.epoch,
        receipt.outcome,
        receipt.exit_code,
        receipt.started_wall_s,
        receipt.ended_wall_s,
    )
    if receipt.node != register.node or signed != told or receipt.gpus != tuple(g.uuid for g in register.gpus):
        raise TrustError("not-allowed", "cannot trust a receipt: it says something else than the report it came with")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. holds: None where it could not be. found: what holds or what is wrong, in words."""

    about: str
    holds: bool | None
    found: str


@dataclass(frozen=True, slots=True)
class Examined:
    """What came of a proof; spec and receipt are None as far as they could not be trusted."""

    checks: tuple[Check, ...]
    spec: JobSpec | None
    receipt: Receipt | None


def examine(proof: Proof, rules: RequestRules, log: MeshLog, notary: Notary) -> Examined:
    """Check all of a proof that can be checked: each signature, and that the two are about each other."""
    checks: list[Check] = []
    spec: JobSpec | None = None
    receipt: Receipt | None = None
    try:
        spec = rules.verify_job(proof.spec, proof.trial)
        checks.append(Check("request", True, f"signed by {log.person(proof.spec.key)}"))
    except TrustError as error:
        checks.append(Check("request", False, error.message))
    try:
        receipt = read_receipt(proof.receipt, log, notary)
        checks.append(Check("run", True, f"signed by {log.name_of(receipt.node)}"))
    except TrustError as error:
        checks.append(Check("run", False, error.message))
    if spec is not None and receipt is not None:
        try:
            check_about(receipt, spec, notary.digest(proof.spec), log)
            checks.append(Check("together", True, "the run is of this very request"))
        except TrustError as error:
            checks.append(Check("together", False, error.message))
    return Examined(tuple(checks), spec, receipt)
