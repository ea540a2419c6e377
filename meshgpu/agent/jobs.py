"""What local users do with jobs: submit, find, stop, follow, fetch. The control API is a thin skin over this."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from meshgpu.agent.runtime import Runtime
from meshgpu.agent.secrets import Vault
from meshgpu.agent.streams import Streams, decode_epochs, decode_files
from meshgpu.agent.views import display_names
from meshgpu.core import events as ev
from meshgpu.core.effects import Answered
from meshgpu.core.jobs.steward import only_shared
from meshgpu.core.trust.freshness import CHALLENGE_BYTES
from meshgpu.errors import MeshgpuError, StaleRequest, TrustError
from meshgpu.model.bulk import AttemptsWanted, BulkRequest, FilesWanted, FileWanted, LogsWanted, TailWanted
from meshgpu.model.clock import ClockGap
from meshgpu.model.gossip import MemberState
from meshgpu.model.ids import JobId, KeyId, NodeId, display_name
from meshgpu.model.job import Action, Draft, JobState, JobView, Register, StopMode
from meshgpu.model.logs import WHOLE_LOG, LogPiece, LogRecord, LogSelection
from meshgpu.model.trust import LENDING_ROLES, Signed
from meshgpu.ports import Transport
from meshgpu.wire.bulk import encode_bulk
from meshgpu.wire.logs import decode_pieces

RECONNECT_S: Final = 0.5
"""Pause before a broken log stream is opened again."""

LAST_WORDS_S: Final = 10.0
"""How long the log of a job that has ended is sought on a machine that does not answer."""

EPOCHS_LIMIT_S: Final = 5.0
"""For which a machine is asked what attempts it knows: as long as opening a connection may take."""

TAIL_LIMIT_S: Final = 5.0
"""For which a steward is asked for a tail."""

LISTING_LIMIT_BYTES: Final = 32 * 2**20
"""Of names of files that a job left: some 300,000."""

POSITION_BITS: Final = 40
"""A position counts bytes of one attempt's log (1 TB at most); above these bits stands the attempt's number."""


@dataclass(frozen=True, slots=True)
class Found:
    """One job of the asking user, with the name that tells it from the others."""

    view: JobView
    display: str


@dataclass(frozen=True, slots=True)
class Source:
    """One attempt's log, and the machine that has it."""

    job: JobId
    epoch: int
    node: NodeId


@dataclass(frozen=True, slots=True)
class Printed:
    """Some of a job's log, or what of it is no more; `position` is where to go on."""

    piece: LogPiece
    position: int


@dataclass(frozen=True, slots=True)
class OutOfTouch:
    """The machine that runs the job has not answered for `seconds`."""

    machine: NodeId
    seconds: float


@dataclass(frozen=True, slots=True)
class Tail:
    """What the machine of the newest attempt told others last; it has not answered for `seconds`."""

    machine: NodeId
    seconds: float
    records: tuple[LogRecord, ...]


Told = Register | Printed | OutOfTouch | Tail
Tell = Callable[[Told], Awaitable[None]]


class Jobs:
    """For all local users; each call names the key that speaks for one."""

    def __init__(self, runtime: Runtime, streams: Streams, transport: Transport, vault: Vault) -> None:
        self._runtime = runtime
        self._node = runtime.node
        self._streams = streams
        self._transport = transport
        self._vault = vault
        self.clock_gap: ClockGap | None = None
        """Whose clock differed too much from this machine's in the last exchange; None if nobody's did."""

    async def submit(
        self, key: KeyId, draft: Draft, secrets: Mapping[str, str], progress: Callable[[int, int], None]
    ) -> JobView:
        """Returns once the job is durable where it is held. secrets: {name of draft.secrets: value}.

        Raises MeshgpuError.
        """
        with contextlib.ExitStack() as keeping:

            def asked(query: str) -> ev.RunAsked:
                keeping.enter_context(self._vault.keeping(query, secrets))
                return ev.RunAsked(query, key, draft)

            answer = await self._ask(asked, progress)
        return answer.views[0]

    async def all(self, key: KeyId) -> tuple[list[Found], list[NodeId]]:
        """All jobs of a user that can be found now, newest first, and the members that did not answer."""
        own, _, silent = await self.visible(key)
        return own, silent

    async def visible(self, key: KeyId) -> tuple[list[Found], list[Found], list[NodeId]]:
        """The user's own jobs, those that others share, newest first, and the members that did not answer."""
        answer = await self._ask(lambda query: ev.JobsAsked(query, key))
        views = sorted(answer.views, key=lambda view: -view.register.submitted_wall_s)
        user = self._node.log.user_of(key)
        own = [view for view in views if view.spec.user == user]
        names = display_names(views) | display_names(own)  # what others share makes no name of one's own longer
        found = [Found(view, names[view.spec.job]) for view in views]
        mine = [job for job in found if job.view.spec.user == user]
        return mine, [job for job in found if job.view.spec.user != user], list(answer.silent)

    async def sweep(self, key: KeyId, text: str) -> tuple[Found, list[Found], list[NodeId]]:
        """A sweep, its trials by number, and the members that did not answer. Raises as `find`, and `not-a-sweep`."""
        own, shared, silent = await self.visible(key)
        jobs = [*own, *shared]
        wholes = ([job for job in own if job.view.trial is None], [job for job in shared if job.view.trial is None])
        found = self._pick_visible(text, *wholes, silent)
        if found.view.spec.sweep is None:
            raise MeshgpuError(
                "not-a-sweep", f"cannot show trials of {found.display}: it is no sweep", "meshgpu sweep ls"
            )
        trials = [job for job in jobs if job.view.sweep is not None and job.view.sweep.job == found.view.spec.job]
        return found, sorted(trials, key=_number), silent

    async def find(self, key: KeyId, text: str) -> Found:
        """By id, display name or any unique part of either; one's own, else one that somebody shares.

        Raises `unknown-job` or `ambiguous`.
        """
        return self._pick_visible(text, *await self.visible(key))

    async def find_own(self, key: KeyId, text: str) -> Found:
        """The same, for what only its user may do. Raises `not-allowed` for a job that is only shared."""
        found = await self.find(key, text)
        if found.view.spec.user != self._node.log.user_of(key):
            raise TrustError("not-allowed", f"cannot stop {found.display}: {only_shared(found.view.spec)}")
        return found

    def _pick_visible(self, text: str, own: list[Found], shared: list[Found], silent: list[NodeId]) -> Found:
        try:
            return self._pick(text, own, silent)
        except MeshgpuError as error:
            if error.code != "unknown-job" or not shared:
                raise
            unknown = error
        try:
            return self._pick(text, shared, silent)
        except MeshgpuError as error:
            raise (unknown if error.code == "unknown-job" else error) from None

    def _pick(self, text: str, jobs: list[Found], silent: list[NodeId]) -> Found:
        exact = [job for job in jobs if text in (job.view.spec.job, job.display)]
        by_id = [job for job in jobs if job.view.spec.job.startswith(text.rpartition("-")[2])]
        matches = exact or [job for job in by_id if _fits(job, text)] or [job for job in jobs if text in job.display]
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(job.display for job in matches[:8]) + (", …" if len(matches) > 8 else "")
            raise MeshgpuError("ambiguous", f"cannot tell which job {text} is: it fits {shown}", "meshgpu ps -a")
        names = ", ".join(sorted(self._node.log.name_of(node) for node in silent))
        missing = f" ({names} did not answer)" if names else ""
        hint = "meshgpu machines" if names else "meshgpu ps -a"
        raise MeshgpuError("unknown-job", f"cannot find a job {text} among yours{missing}", hint)

    async def stop(self, key: KeyId, job: JobView, mode: StopMode) -> JobView:
        return await self.act(key, job, Action(mode.value))

    async def act(self, key: KeyId, job: JobView, action: Action) -> JobView:
        """Ask `action` of who holds the job; returns how it stands then. Raises MeshgpuError."""
        stewards = job.spec.stewards
        answer = await self._ask(lambda query: ev.ActionAsked(query, key, action, job.spec.job, stewards))
        return answer.views[0]

    async def _ask(
        self, event: Callable[[str], ev.Event], progress: Callable[[int, int], None] | None = None
    ) -> Answered:
        answer = await self._runtime.ask(event, progress)
        self.clock_gap = answer.clock
        return answer

    # -- following ----------------------------------------------------------------------------------------------------

    async def follow(
        self, key: KeyId, job: JobView, position: int, tell: Tell, *, logs: bool, selection: LogSelection = WHOLE_LOG
    ) -> Register:
        """Tell every change of the register and the log from `position` on; returns the final register.

        Where the selection begins counts for the attempt that is the newest at first; all that follow are whole.
        """
        register = job.register
        updates = self._runtime.watch(ev.WatchStarted(key, job.spec.job, job.spec.stewards))
        log: asyncio.Task[None] | None = None
        log_epoch = 0
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    source = source_of(register) if _may_have_printed(register) else None
                    if logs and register.epoch > log_epoch and source is not None:
                        if log is not None:  # an attempt before this one: its log comes first
                            await _finish_log(log)
                            selection = LogSelection(stream=selection.stream)
                        log_epoch = register.epoch
                        log = group.create_task(self._print(key, source, position, tell, selection))
                    if register.state.is_final:
                        break
                    register = await updates.get()
                    await tell(register)
                if log is not None:
                    await _finish_log(log)
        except* MeshgpuError as group_error:
            raise group_error.exceptions[0] from None
        finally:
            self._runtime.unwatch(job.spec.job, updates)
        return register

    async def _print(self, key: KeyId, source: Source, position: int, tell: Tell, selection: LogSelection) -> None:
        """One attempt's log to its end, however often the connection breaks."""
        loop = asyncio.get_running_loop()
        lost_at: float | None = None
        while True:
            try:
                async for printed in self.log(key, source, position, follow=True, selection=selection):
                    lost_at, position = None, printed.position
                    await tell(printed)
                return
            except MeshgpuError as error:
                if error.code == "unknown-job":  # it never started there
                    return
                if error.code != "no-answer":
                    raise
                lost_at = lost_at if lost_at is not None else loop.time()
                await tell(OutOfTouch(source.node, loop.time() - lost_at))
            await asyncio.sleep(RECONNECT_S)

    async def log(
        self, key: KeyId, source: Source, position: int, *, follow: bool, selection: LogSelection = WHOLE_LOG
    ) -> AsyncIterator[Printed]:
        """An attempt's log from `position` on; raises `no-answer` where its machine is away."""
        epoch = source.epoch << POSITION_BITS
        offset = min(position - epoch, 2**POSITION_BITS) if position >= epoch else 0

        def wanted(signed: Signed) -> LogsWanted:
            return LogsWanted(signed, offset, follow, source.epoch, selection)

        async for message in self._read(key, Action.LOGS, source.job, source.node, wanted):
            for piece in decode_pieces(message):
                yield Printed(piece, epoch + piece.position)

    async def tail(self, key: KeyId, job: JobView) -> Tail | None:
        """What the machine of the newest attempt told the job's stewards last; None where none of them has anything."""
        node = job.register.node
        if node is None:
            return None
        for steward in map(self._node.log.current, job.spec.stewards):
            if steward == self._node.log.current(node) or self._node.state(steward) is MemberState.DOWN:
                continue
            try:
                async with asyncio.timeout(TAIL_LIMIT_S):
                    messages = [part async for part in self._read(key, Action.LOGS, job.spec.job, steward, TailWanted)]
            except (MeshgpuError, TimeoutError):
                continue
            pieces = (piece for message in messages for piece in decode_pieces(message))
            if records := tuple(piece for piece in pieces if isinstance(piece, LogRecord)):
                return Tail(node, self._silence_s(node), records)
        return None

    def _silence_s(self, node: NodeId) -> float:
        """For how long a machine has not been heard here; 0 where that is not known."""
        now = self._runtime.outside.clock.now()
        for machine in self._node.machines(now):
            if machine.member.node == self._node.log.current(node):
                return machine.down_s or machine.heard_s or 0.0
        return 0.0

    async def attempt(self, key: KeyId, found: Found, epoch: int) -> Source:
        """Where the log of an attempt is, however old. Raises `unknown-attempt`, and says which there are."""
        if epoch == found.view.register.epoch and (newest := source_of(found.view.register)) is not None:
            return newest
        log, job = self._node.log, found.view.spec.job
        runners = [member.node for member in log.members.values() if member.role in LENDING_ROLES]
        asked = [node for node in runners if self._node.state(node) is not MemberState.DOWN]
        answers = await asyncio.gather(*(self._epochs(key, job, node) for node in asked))
        there = {number: node for node, epochs in zip(asked, answers, strict=True) for number in epochs or ()}
        if epoch in there:
            return Source(job, epoch, there[epoch])
        kept = ", ".join(f"{number} ({log.name_of(node)})" for number, node in sorted(there.items())) or "none"
        silent = {*runners} - {*asked} | {node for node, epochs in zip(asked, answers, strict=True) if epochs is None}
        names = ", ".join(sorted(map(log.name_of, silent)))
        raise MeshgpuError(
            "unknown-attempt",
            f"cannot find a log of attempt {epoch} of {found.display}: there are {kept}"
            + (f"; {names} did not answer" if names else ""),
            f"meshgpu logs {found.display}" + (f" --attempt {max(there)}" if there else ""),
        )

    async def _epochs(self, key: KeyId, job: JobId, node: NodeId) -> list[int] | None:
        """Attempts of a job with a log on a machine; None where it does not answer."""
        answer = b""
        try:
            async with asyncio.timeout(EPOCHS_LIMIT_S):
                async for message in self._read(key, Action.LOGS, job, node, AttemptsWanted):
                    answer += message
            return decode_epochs(answer)
        except MeshgpuError as error:
            return [] if error.code == "unknown-job" else None
        except TimeoutError:
            return None

    # -- files --------------------------------------------------------------------------------------------------------

    async def files(self, key: KeyId, job: JobView) -> list[tuple[str, int]]:
        """[(path, bytes)] of what the job's newest attempt left."""
        node = job.register.node
        if node is None:
            return []
        listing = bytearray()
        async for message in self._read(key, Action.FILES, job.spec.job, node, FilesWanted):
            listing += message
            if len(listing) > LISTING_LIMIT_BYTES:
                raise MeshgpuError("too-large", f"cannot list what the job left: more than {LISTING_LIMIT_BYTES} bytes")
        return decode_files(bytes(listing))

    async def file(self, key: KeyId, job: JobView, path: str) -> tuple[int, AsyncIterator[bytes]]:
        """Size and bytes of one file of the job's working directory."""
        node = job.register.node
        if node is None:
            hint = f"meshgpu wait {display_name(job.spec.name, job.spec.job)}"
            raise MeshgpuError("unknown-file", f"cannot fetch {path}: the job has not run yet", hint)
        stream = self._read(key, Action.FILES, job.spec.job, node, lambda signed: FileWanted(signed, path))
        return int(await anext(stream)), stream

    async def _read(
        self, key: KeyId, action: Action, job: JobId, node: NodeId, wanted: Callable[[Signed], BulkRequest]
    ) -> AsyncIterator[bytes]:
        """Messages of a bulk stream; a request that is stale there is signed again, once."""
        node = self._node.log.current(node)
        now, challenge = self._runtime.outside.clock.now(), b""
        while True:
            signed = self._node.asking.sign_request(now, key, action, job, node, challenge)
            try:
                async for message in self._open(node, wanted(signed)):
                    yield message
            except StaleRequest as error:
                if challenge or len(error.challenge) != CHALLENGE_BYTES:
                    raise
                challenge = error.challenge
                self.clock_gap = ClockGap(node, error.wall_s - now.wall_s)
            else:
                return

    def _open(self, node: NodeId, request: BulkRequest) -> AsyncIterator[bytes]:
        if node == self._node.node:
            return self._streams.answer(node, request)
        return self._transport.fetch(node, self._node.addresses(node), encode_bulk(request))


def _number(job: Found) -> int:
    return job.view.trial.number if job.view.trial else 0


def source_of(register: Register) -> Source | None:
    """The log of the newest attempt; None before there is one."""
    return None if register.node is None else Source(register.job, register.epoch, register.node)


def _may_have_printed(register: Register) -> bool:
    return register.state not in (JobState.QUEUED, JobState.PLACING)


def _fits(job: Found, text: str) -> bool:
    name, dash, part = text.rpartition("-")
    return job.view.spec.job.startswith(part) and (not dash or job.view.spec.name == name)


async def _finish_log(log: "asyncio.Task[None]") -> None:
    """Wait for the rest of the log of a job that has ended, but not for ever."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            await asyncio.shield(log)
    except TimeoutError:
        log.cancel()
