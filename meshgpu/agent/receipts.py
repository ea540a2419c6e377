"""Receipts as people keep them: a signed proof, the facts in it as text, and what was checked."""

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshgpu.adapters.log_ledger import as_written
from meshgpu.agent.jobs import Found, Jobs, source_of
from meshgpu.agent.views import Document, command_text
from meshgpu.core.node import Node
from meshgpu.core.trust.receipts import Check, Examined
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import KeyId
from meshgpu.model.job import Action, JobView
from meshgpu.model.logs import LogRecord
from meshgpu.model.receipt import Proof, Receipt
from meshgpu.wire.codec import decode, encode

LOG_LIMIT_BYTES: Final = 256 * 2**20
"""Of a log that is fetched to be compared: some seconds over a 1 GbE line."""

LOG_LIMIT_S: Final = 20.0
"""For which it may take: below the patience of the command line."""


@dataclass(slots=True)
class Receipts:
    """Fetches receipts from where jobs are held, and checks them by the mesh log of this machine."""

    node: Node
    jobs: Jobs

    async def of(self, key: KeyId, job: Found) -> Document:
        """The receipt of a job's newest attempt that has ended. Raises MeshgpuError `no-receipt`."""
        proof = await self._proof(key, job)
        examined = self.node.examine(proof)
        checks = [*examined.checks]
        if examined.receipt is not None and examined.receipt.log:
            checks.append(await self._compare_log(key, job, examined.receipt))
        return _document(proof, _facts(examined, proof), checks)

    async def _proof(self, key: KeyId, job: Found) -> Proof:
        view = await self.jobs.act(key, job.view, Action.RECEIPT)
        if view.signed is None or view.receipt is None:
            raise MeshgpuError(
                "no-receipt", f"{job.display} has no receipt: {_why_none(view)}", f"meshgpu info {job.display}"
            )
        return Proof(view.signed, view.receipt, view.trial)

    async def _compare_log(self, key: KeyId, job: Found, receipt: Receipt) -> Check:
        """Whether the log that is told now is the one that the receipt names."""
        source = source_of(job.view.register)
        if source is None or source.epoch != receipt.epoch:
            return Check("log", None, f"not compared: it is of attempt {receipt.epoch}")
        found = hashlib.sha256()
        try:
            async with asyncio.timeout(LOG_LIMIT_S):
                async for printed in self.jobs.log(key, source, 0, follow=False):
                    if isinstance(printed.piece, LogRecord):  # what is not kept any more was not signed for
                        found.update(as_written(printed.piece))
                    if printed.piece.position > LOG_LIMIT_BYTES:
                        return Check("log", None, "not compared: it is too long")
        except (MeshgpuError, TimeoutError) as error:
            return Check("log", None, f"not compared: {error or 'its machine is too slow'}")
        if found.hexdigest() != receipt.log:
            return Check("log", False, "it is not the log that the machine signed for")
        return Check("log", True, "it is the log that the machine signed for")

    def check(self, kept: Mapping[str, Any]) -> Document:
        """What a kept receipt is worth. Raises MeshgpuError `bad-request` for what is none."""
        proof = _read_proof(kept.get("proof"))
        examined = self.node.examine(proof)
        facts, checks = _facts(examined, proof), [*examined.checks]
        if facts is not None:
            checks.append(_compare_facts(kept.get("facts"), facts))
        return _document(proof, facts, checks)


def _why_none(view: JobView) -> str:
    if view.spec.sweep is not None:
        return "it is a sweep, whose trials have one each"
    return "it never ran" if view.register.state.is_final else "no attempt of it has ended"


def _read_proof(text: object) -> Proof:
    try:
        data = base64.b64decode(text if isinstance(text, str) else "", validate=True)
        proof = decode(Proof, data)
    except (binascii.Error, ValueError, MeshgpuError) as error:
        raise MeshgpuError(
            "bad-receipt",
            f"cannot check the receipt: its proof cannot be read: {error}",
            "meshgpu info ID --receipt --json",
        ) from error
    if _written(proof) != text:  # so that no bit of it can be changed, not even one without a meaning
        raise MeshgpuError("bad-receipt", "cannot check the receipt: its proof is not written as a proof is")
    return proof


def _written(proof: Proof) -> str:
    return base64.b64encode(encode(proof)).decode()


def _compare_facts(kept: object, signed: Document) -> Check:
    if not isinstance(kept, dict):
        return Check("text", False, "there is none beside the proof")
    wrong = sorted(name for name in kept.keys() | signed.keys() if kept.get(name, ...) != signed.get(name, ...))
    if not wrong:
        return Check("text", True, "it says what was signed")
    return Check("text", False, f"it does not say what was signed: {', '.join(map(str, wrong[:8]))}")


def _document(proof: Proof, facts: Document | None, checks: list[Check]) -> Document:
    return {
        "facts": facts,
        "proof": _written(proof),
        "checks": [{"about": check.about, "holds": check.holds, "found": check.found} for check in checks],
        "holds": all(check.holds is not False for check in checks),
    }


def _facts(examined: Examined, proof: Proof) -> Document | None:
    """What is signed, as text, and nothing else: so it is the same whenever it is read. None where one part is not."""
    spec, receipt = examined.spec, examined.receipt
    if spec is None or receipt is None:
        return None
    return {
        "mesh": receipt.mesh,
        "job": receipt.job,
        "name": spec.name,
        "user": spec.user,
        "user_key": proof.spec.key,
        "command": command_text(spec),
        "image_asked": spec.image,
        "attempt": receipt.epoch,
        "node": receipt.node,
        "fenced": receipt.fenced,
        "gpus": list(receipt.gpus),
        "driver": receipt.driver,
        "request": receipt.spec,
        "code": receipt.tree,
        "environment": receipt.environment,
        "image": receipt.image,
        "outcome": receipt.outcome.value,
        "exit_code": receipt.exit_code,
        "started_at": receipt.started_wall_s,
        "ended_at": receipt.ended_wall_s,
        "log": receipt.log,
    }
