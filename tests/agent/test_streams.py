"""Who may read logs and files over a bulk stream: the job's user, and everybody where the signed spec says so."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from meshgpu.agent.home import Home
from meshgpu.agent.streams import Streams
from meshgpu.core.jobs.attempt import Attempt
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.errors import TrustError
from meshgpu.guard import LEDGER_HEADER
from meshgpu.model.bulk import AttemptsWanted, BulkRequest, FilesWanted, FileWanted, LogsWanted, TailWanted
from meshgpu.model.clock import Now
from meshgpu.model.ids import HoldId, JobId, NodeId, UserName, digest, job_id
from meshgpu.model.job import (
    Action,
    AttemptState,
    EnvironmentRequest,
    JobRequest,
    JobSpec,
    JobState,
    JobView,
    Register,
)
from meshgpu.model.logs import LogChunk, LogGap, LogRecord, LogSelection, LogStream
from meshgpu.model.resources import NO_GPU, Resources
from meshgpu.model.trust import Role, Signed
from meshgpu.sim.office import Office, furnish
from meshgpu.wire.logs import decode_pieces

NOW = Now(1.0, 1_800_000_001.0, "boot")
ADA, EVE = UserName("ada"), UserName("eve")


@dataclass
class Rooms:
    """The third machine, which is eve's, and on which a job of ada's has run."""

    office: Office
    log: MeshLog
    rules: RequestRules
    attempt: Attempt
    home: Home

    @property
    def attempts(self) -> "Rooms":
        return self

    @property
    def stewardship(self) -> "Rooms":
        return self

    def latest(self, job: JobId) -> Attempt | None:
        return self.find(job, 1)

    def find(self, job: JobId, epoch: int) -> Attempt | None:
        return self.attempt if (job, epoch) == (self.attempt.spec.job, 1) else None

    def epochs(self, job: JobId) -> list[int]:
        return [1] if job == self.attempt.spec.job else []

    def view(self, job: JobId) -> JobView | None:
        return JobView(self.attempt.spec, Register(job, JobState.ACTIVE)) if job == self.attempt.spec.job else None

    def tail(self, job: JobId) -> LogChunk:
        return LogChunk(0, 5, f"the end of {job}".encode())

    def now(self) -> Now:
        return NOW

    @property
    def streams(self) -> Streams:
        stub: Any = self
        return Streams(stub, self.home, stub, stub)

    def request(self, user: UserName, action: Action, job: JobId | None = None) -> tuple[NodeId, Signed]:
        """A request of the user's, from a machine where it has an account, to the third."""
        seat = next(setup for setup in self.office.setups if user in setup.accounts)
        request = JobRequest(
            self.office.mesh,
            user,
            action,
            self.office.setups[2].node,
            NOW.wall_s,
            "nonce",
            job or self.attempt.spec.job,
        )
        return seat.node, self.office.ring.sign(seat.accounts[user], request)

    async def read(self, user: UserName, job: JobId | None = None) -> list[bytes]:
        """What the user gets of log, list and file."""
        answers = []
        for kind in (LogsWanted, FilesWanted, FileWanted):
            peer, signed = self.request(user, Action.LOGS if kind is LogsWanted else Action.FILES, job)
            rest = {LogsWanted: (0, False), FilesWanted: (), FileWanted: ("left",)}[kind]
            wanted: BulkRequest = kind(signed, *rest)  # type: ignore[arg-type]  # each has its own
            answers.append(b"".join([message async for message in self.streams.answer(peer, wanted)]))
        return answers


@pytest.fixture
def rooms(tmp_path: Path) -> Rooms:
    office = furnish(random.Random(1), 3)
    assert office.setups[2].owner == EVE
    log = MeshLog(office.notaries[2])
    log.enter(office.mesh, office.log)
    submitter = office.setups[0]
    key, nonce = submitter.accounts[ADA], b"n" * 16
    spec = JobSpec(
        office.mesh,
        job_id(key, nonce),
        nonce,
        "train",
        ADA,
        submitter.node,
        ("true",),
        False,
        (),
        EnvironmentRequest(),
        digest(b"tree"),
        1,
        1,
        Resources(NO_GPU),
        None,
        (submitter.node,),
        NOW.wall_s,
    )
    attempt = Attempt(
        spec, office.ring.sign(key, spec), 1, AttemptState.DELIVERED, (), HoldId("h"), submitter.node, 0.0
    )
    home = Home(tmp_path)
    directory = home.attempt(spec.job, 1)
    (directory / "work").mkdir(parents=True)
    (directory / "work" / "left").write_text("result")
    (directory / "outputs.json").write_text('[["left", 6]]')
    (directory / "log").write_bytes(LEDGER_HEADER.pack(1, NOW.wall_s, 5) + b"hello")
    return Rooms(office, log, RequestRules(office.notaries[2], log, office.setups[2].node), attempt, home)


async def test_user_reads_what_the_job_printed_and_left(rooms: Rooms) -> None:
    log, files, file = await rooms.read(ADA)
    assert log.endswith(b"hello")
    assert (files, file) == (b'[["left", 6]]', b"6result")


async def test_owner_of_the_machine_reads_nothing_of_another_users_job(rooms: Rooms) -> None:
    """And cannot tell a job that is not hers from one that does not exist."""
    kinds: list[tuple[Action, Callable[[Signed], BulkRequest]]] = [
        (Action.LOGS, lambda signed: LogsWanted(signed, 0, follow=False)),
        (Action.LOGS, lambda signed: LogsWanted(signed, 0, follow=False, epoch=1)),
        (Action.LOGS, AttemptsWanted),
        (Action.LOGS, TailWanted),
        (Action.FILES, FilesWanted),
    ]
    for action, wanted in kinds:
        said = []
        for job in (rooms.attempt.spec.job, JobId("z" * 26)):
            peer, signed = rooms.request(EVE, action, job)
            request = wanted(signed)
            with pytest.raises(TrustError) as caught:
                await anext(rooms.streams.answer(peer, request))
            said.append((caught.value.code, caught.value.message))
        assert said[0] == said[1]
        assert said[0][0] == "unknown-job"


async def test_user_reads_the_end_that_a_steward_keeps_and_which_attempts_there_are(rooms: Rooms) -> None:
    peer, signed = rooms.request(ADA, Action.LOGS)
    job = rooms.attempt.spec.job
    assert [part async for part in rooms.streams.answer(peer, TailWanted(signed))] == [f"the end of {job}".encode()]
    peer, signed = rooms.request(ADA, Action.LOGS)
    assert [part async for part in rooms.streams.answer(peer, AttemptsWanted(signed))] == [b"[1]"]
    peer, signed = rooms.request(ADA, Action.FILES)
    with pytest.raises(TrustError, match="cannot find that job"):
        await anext(rooms.streams.answer(peer, TailWanted(signed)))


async def test_attempt_that_never_was_here_is_not_found(rooms: Rooms) -> None:
    peer, signed = rooms.request(ADA, Action.LOGS)
    with pytest.raises(TrustError, match="cannot find that job"):
        rooms.streams.answer(peer, LogsWanted(signed, 0, follow=False, epoch=2))


@pytest.mark.parametrize("data", [bytes(range(256)) * 40, b"\x1b[2J\x00\r\xff", b"x" * 65_536])
async def test_every_byte_passes(rooms: Rooms, data: bytes) -> None:
    ledger = rooms.home.attempt(rooms.attempt.spec.job, 1) / "log"
    ledger.write_bytes(LEDGER_HEADER.pack(2, NOW.wall_s, len(data)) + data)
    peer, signed = rooms.request(ADA, Action.LOGS)
    message = b"".join([part async for part in rooms.streams.answer(peer, LogsWanted(signed, 0, follow=False))])
    (record,) = decode_pieces(message)
    assert record == LogRecord(LogStream.STDERR, NOW.wall_s, data, LEDGER_HEADER.size + len(data))


async def test_who_wants_nothing_old_is_told_where_it_begins(rooms: Rooms) -> None:
    peer, signed = rooms.request(ADA, Action.LOGS)
    wanted = LogsWanted(signed, 0, follow=False, selection=LogSelection(lines=0))
    message = b"".join([part async for part in rooms.streams.answer(peer, wanted)])
    assert list(decode_pieces(message)) == [LogGap(0, LEDGER_HEADER.size + 5)]


async def test_everybody_reads_what_is_shared(rooms: Rooms) -> None:
    rooms.attempt.spec = replace(rooms.attempt.spec, shared=True)
    assert await rooms.read(EVE) == await rooms.read(ADA)


async def test_stranger_reads_nothing_and_a_rented_machine_no_logs(rooms: Rooms) -> None:
    peer, signed = rooms.request(ADA, Action.LOGS)
    member = rooms.log.members.pop(peer)
    with pytest.raises(TrustError, match="stranger"):
        rooms.streams.answer(peer, LogsWanted(signed, 0, follow=False))
    rooms.log.members[peer] = replace(member, role=Role.CLOUD)
    with pytest.raises(TrustError, match="to a cloud"):
        rooms.streams.answer(peer, LogsWanted(signed, 0, follow=False))
