"""Drives one node for real: events in, effects out, nothing decided here.

Effects leave in the order of their steps. Those of a step that persists something wait until that is on disk; all
that has gathered meanwhile goes into the next transaction (group commit).
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar, assert_never

from meshgpu import ports
from meshgpu.agent.burst import Burst, failed
from meshgpu.agent.trees import Trees
from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.core.node import Node
from meshgpu.errors import BrokenInvariant, MeshgpuError
from meshgpu.model.ids import Address, JobId, NodeId
from meshgpu.model.job import AttemptPlan, AttemptState, Phase, Register, Result
from meshgpu.model.messages import Message
from meshgpu.model.trust import Member, Role
from meshgpu.wire.codec import PROTOCOL, decode_frame, encode, encode_frame

logger = logging.getLogger(__name__)

T = TypeVar("T")

DISK_FULL_PAUSE_S: Final = 2.0
"""Between two tries to write to a full disk."""

QUERY_DEADLINE_S: Final = 3600.0
"""A submission may ship gigabytes; the core ends every query long before this."""


REASON_CHARACTERS: Final = 4_000
"""Of a reason or detail that people read: the last lines of a failed build fit."""

SETTLE_S: Final = 30.0
"""One step and one fsync: milliseconds, seconds on a disk that is busy."""


@dataclass(slots=True)
class Query:
    """A local question on its way through the core."""

    answer: asyncio.Future[fx.Answered]
    progress: Callable[[int, int], None] | None = None


@dataclass(slots=True)
class _Mark:
    """Goes through both queues behind an event, to tell when its effects have been carried out."""

    passed: asyncio.Future[None]

    def pass_by(self) -> None:
        if not self.passed.done():
            self.passed.set_result(None)


@dataclass(slots=True)
class Outside:
    """The adapters that this runtime moves."""

    clock: ports.Clock
    transport: ports.Transport
    store: ports.Store
    executor: ports.Executor
    announce: Callable[[], Awaitable[None]]
    discard: Callable[[JobId, int], None]
    burst: Burst | None = None
    power_off: Callable[[], Awaitable[None]] | None = None
    """Of a rented machine only."""
    knock_back: Callable[[NodeId, tuple[Address, ...]], Awaitable[ev.KnockedBack]] | None = None
    """Not of a rented machine, which is never asked."""


@dataclass(slots=True)
class Runtime:
    """Owns the node. `run` ends only by cancellation; everything it starts lives in `tasks`."""

    node: Node
    outside: Outside
    trees: Trees
    tasks: asyncio.TaskGroup
    _inbox: asyncio.Queue[ev.Event | _Mark] = field(default_factory=asyncio.Queue)
    _outbox: asyncio.Queue[list[fx.Effect | _Mark]] = field(default_factory=asyncio.Queue)
    _protocols: dict[NodeId, int] = field(default_factory=dict)
    _queries: dict[str, Query] = field(default_factory=dict)
    _query_count: int = 0
    _watchers: dict[JobId, list[asyncio.Queue[Register]]] = field(default_factory=dict)
    _staging: dict[tuple[JobId, int], asyncio.Task[None]] = field(default_factory=dict)
    _disk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "store"))
    rejected: int = 0

    # -- events in ----------------------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        """Tell the node that something happened. Must be called on the event loop."""
        self._inbox.put_nowait(event)

    async def settle(self, event: ev.Event) -> None:
        """Tell it, and return when what follows from it is on disk and on its way."""
        mark = _Mark(asyncio.get_running_loop().create_future())
        self._inbox.put_nowait(event)
        self._inbox.put_nowait(mark)
        async with asyncio.timeout(SETTLE_S):
            await mark.passed

    def link_event(self, event: ports.LinkEvent) -> None:
        match event:
            case ports.LinkOpened(peer=peer, protocol=protocol, instance=instance):
                logger.info("link opened: %s", peer[:12])
                self._protocols[peer] = protocol
                self.post(ev.LinkOpened(peer, instance))
            case ports.LinkClosed(peer=peer, reason=reason):
                logger.info("link closed: %s: %s", peer[:12], reason)
                self._protocols.pop(peer, None)
                self.post(ev.LinkClosed(peer, reason))
            case ports.DialFailed(peer=peer, address=address, reason=reason):
                logger.debug("dial failed: %s at %s: %s", peer[:12], address, reason)
                self.post(ev.DialFailed(peer, address, reason))
            case ports.FrameReceived(peer=peer, frame=frame):
                self._frame(peer, frame)
            case _:
                assert_never(event)

    def _frame(self, peer: NodeId, frame: bytes) -> None:
        try:
            mesh, message = decode_frame(frame)
        except MeshgpuError as error:
            self._rejected(peer, error.message)
            return
        if mesh != self.node.log.mesh:
            self._rejected(peer, "a frame of another mesh")
            return
        logger.debug("heard %s of %s", type(message).__name__, peer[:12])
        self.post(ev.MessageArrived(peer, message))

    def executor_event(self, event: ports.ExecutorEvent) -> None:
        match event:
            case ports.AttemptStarted():
                self.post(ev.AttemptBegan(event.job, event.epoch, event.started_wall_s))
            case ports.AttemptEnded(result=result):
                told = replace(result, reason=sendable(result.reason))
                self.post(ev.AttemptFinished(event.job, event.epoch, event.ended_wall_s, told, event.evidence))
            case ports.AttemptProgress():
                self.post(ev.AttemptProgressed(event.job, event.epoch, event.phase, sendable(event.detail)))
            case ports.AttemptPrinted():
                self.post(ev.AttemptPrinted(event.job, event.epoch, event.chunk))
            case ports.AttemptMeasured():
                self.post(ev.AttemptMeasured(event.job, event.epoch, event.metric))
            case _:
                assert_never(event)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self.tasks.create_task(self._carry_out(), name="effects")
        self._emit(self.node.start(self.outside.clock.now()))
        while True:
            event = await self._next_event()
            if isinstance(event, _Mark):
                self._outbox.put_nowait([event])
            else:
                self._emit(self.node.step(self.outside.clock.now(), event))

    async def _next_event(self) -> ev.Event | _Mark:
        deadline = self.node.deadline()
        if not self._inbox.empty() or deadline is None:
            return await self._inbox.get()
        wait_s = deadline - self.outside.clock.now().boot_s
        try:
            async with asyncio.timeout(max(wait_s, 0.0)):
                return await self._inbox.get()
        except TimeoutError:
            return ev.Ticked()

    def _emit(self, effects: list[fx.Effect]) -> None:
        if effects:
            self._outbox.put_nowait(list(effects))

    async def _carry_out(self) -> None:
        while True:
            batch = await self._outbox.get()
            while not self._outbox.empty():
                batch = batch + self._outbox.get_nowait()
            records = [
                (effect.kind, effect.key, encode(effect.record) if effect.record is not None else None)
                for effect in batch
                if isinstance(effect, fx.Persist)
            ]
            if records:
                await self._write(records)
            for effect in batch:
                if isinstance(effect, _Mark):
                    effect.pass_by()
                else:
                    self._perform(effect)

    async def _write(self, records: list[tuple[str, str, bytes | None]]) -> None:
        """One transaction, in a thread of its own. A full disk holds everything up until there is room: nothing leaves
        that is not kept, and no job ends because of it."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._disk, self.outside.store.write, records)
            except MeshgpuError as error:
                if error.code != "disk-full":
                    raise
                logger.error("nothing can be recorded: %s; trying again", error.message)
                await asyncio.sleep(DISK_FULL_PAUSE_S)

    async def stored(self, read: Callable[[ports.Store], T]) -> T:
        """What `read` finds in the store, in the thread that owns it, with all on disk that was decided before."""
        await self.settle(ev.Ticked())
        return await asyncio.get_running_loop().run_in_executor(self._disk, read, self.outside.store)

    def _perform(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Persist():
                pass
            case fx.Send(peer=peer, message=message):
                self._send(peer, message)
            case fx.Dial(peer=peer, address=address):
                self.outside.transport.dial(peer, address)
            case fx.Knock(peer=peer, address=address):
                self._start(self._knock(peer, address))
            case fx.CloseLink(peer=peer, reason=reason):
                self.outside.transport.close(peer, reason)
            case fx.Identify(address=address):
                self._start(self._identify(address))
            case fx.KnockBack(peer=peer, addresses=addresses):
                self._start(self._knock_back(peer, addresses))
            case fx.TrustMembers(members=members):
                self.outside.transport.trust(anchors(members))
            case fx.NoteState(name=name, node=node, state=state):
                logger.info("%s is %s: %s", name, state, node[:12])
            case fx.NoteNewKeys(name=name, before=before, after=after):
                logger.info("%s goes on under new keys: %s, before that %s", name, after, before)
            case fx.Announce():
                self._start(self.announce())
            case fx.FetchTree():
                self._start(self._fetch_tree(effect))
            case fx.StartAttempt(plan=plan):
                key = (plan.spec.job, plan.epoch)
                self._staging[key] = self._start(self._stage(effect))
            case fx.AdoptAttempt(plan=plan):
                self.outside.executor.adopt(plan)
            case fx.EndAttempt(job=job, epoch=epoch, mode=mode):
                if (staging := self._staging.get((job, epoch))) is not None:
                    staging.cancel()
                self.outside.executor.stop(job, epoch, mode)
            case fx.DiscardAttempt(job=job, epoch=epoch):
                self._start(self._discard(job, epoch))
            case fx.Answered(query=query):
                if (found := self._queries.get(query)) is not None and not found.answer.done():
                    found.answer.set_result(effect)
            case fx.QueryProgressed(query=query):
                if (found := self._queries.get(query)) is not None and found.progress is not None:
                    found.progress(effect.done_bytes, effect.total_bytes)
            case fx.TellWatchers(register=register):
                for queue in self._watchers.get(register.job, ()):
                    queue.put_nowait(register)
            case fx.Reject(peer=peer, reason=reason):
                self._rejected(peer, reason)
            case fx.Warn(node=node, reason=reason):
                logger.warning("about %s: %s", node[:12], reason)
            case fx.SurveyCloud() | fx.PrepareLaunch() | fx.Launch() | fx.Terminate() | fx.Enrol() | fx.Welcome():
                self._start(self._rent(effect))
            case fx.PowerOff(reason=reason):
                self._start(self._power_off(reason))
            case _:
                assert_never(effect)

    def _send(self, peer: NodeId, message: Message) -> None:
        """A message that does not fit the wire is our own bug, but no reason to end the jobs' agent."""
        assert self.node.log.mesh is not None
        protocol = self._protocols.get(peer, PROTOCOL)
        try:
            self.outside.transport.send(peer, encode_frame(self.node.log.mesh, message, protocol))
        except MeshgpuError:
            logger.exception("cannot send a %s to %s", type(message).__name__, peer[:12])

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return self.tasks.create_task(work)

    def _rejected(self, peer: NodeId, reason: str) -> None:
        self.rejected += 1
        logger.debug("rejected from %s: %s", peer[:12], reason)

    # -- effects that take time ---------------------------------------------------------------------------------------

    async def _identify(self, address: Address) -> None:
        try:
            node = await _contained(self.outside.transport.identify(address))
        except MeshgpuError as error:
            logger.debug("no answer at seed %s: %s", address, error.message)
            self.post(ev.IdentifyFailed(address, error.message))
        else:
            self.post(ev.AddressIdentified(address, node))

    async def _knock_back(self, peer: NodeId, addresses: tuple[Address, ...]) -> None:
        found = ev.KnockedBack(peer, ())
        try:
            if self.outside.knock_back is not None:
                found = await _contained(self.outside.knock_back(peer, addresses))
        except MeshgpuError as error:
            logger.warning("cannot knock for %s: %s", peer[:12], error.message)
        finally:
            self.post(found)

    async def _knock(self, peer: NodeId, address: Address) -> None:
        self.post(ev.Knocked(peer, await self.outside.transport.knock(address)))

    async def announce(self) -> None:
        """Let mDNS say how things stand; where it cannot, the mesh goes on without."""
        try:
            await _contained(self.outside.announce())
        except MeshgpuError as error:
            logger.warning("cannot announce this machine: %s", error.message)

    async def _fetch_tree(self, order: fx.FetchTree) -> None:
        def progress(done_bytes: int, total_bytes: int) -> None:
            self.post(ev.TreeProgressed(order.job, done_bytes, total_bytes))

        try:
            await _contained(self.trees.fetch(order.job, order.tree, order.sources, progress))
        except MeshgpuError as error:
            self.post(ev.TreeFailed(order.job, error.code, sendable(error.message)))
        else:
            self.post(ev.TreeArrived(order.job))

    async def _stage(self, order: fx.StartAttempt) -> None:
        """Tree and working directory, then the executor. Every way this ends becomes an event."""
        plan = order.plan
        key = (plan.spec.job, plan.epoch)
        try:
            tell = functools.partial(self._staging_progress, plan)
            work = await _contained(self.trees.stage(plan, order.sources, tell))
        except asyncio.CancelledError:
            self._never_started(plan, AttemptState.ABANDONED, "stopped before it started")
        except MeshgpuError as error:
            self._never_started(plan, AttemptState.CRASHED, error.message)
        else:
            self.outside.executor.run(plan, work)
        finally:
            del self._staging[key]

    async def _rent(self, order: fx.BurstEffect) -> None:
        burst = self.outside.burst
        if burst is None:
            self.post(failed(order, "not-served", "this agent knows no seller"))
        else:
            self.post(await burst.perform(order))

    async def _discard(self, job: JobId, epoch: int) -> None:
        try:
            await _contained(asyncio.to_thread(self.outside.discard, job, epoch))
        except MeshgpuError as error:
            logger.warning("cannot remove what is left of %s/%d: %s", job, epoch, error.message)

    async def _power_off(self, reason: str) -> None:
        if self.outside.power_off is None:
            raise BrokenInvariant("a machine that is not rented ends itself")
        logger.warning("this machine powers off: %s", reason)
        try:
            await _contained(self.outside.power_off())
        except MeshgpuError as error:
            logger.error("cannot power off, the nets below will: %s", error.message)

    def _staging_progress(self, plan: AttemptPlan, text: str) -> None:
        self.post(ev.AttemptProgressed(plan.spec.job, plan.epoch, Phase.STAGING, text))

    def _never_started(self, plan: AttemptPlan, outcome: AttemptState, reason: str) -> None:
        now = self.outside.clock.now()
        self.post(ev.AttemptFinished(plan.spec.job, plan.epoch, now.wall_s, Result(outcome, None, sendable(reason))))

    # -- local questions ----------------------------------------------------------------------------------------------

    async def ask(
        self, event: Callable[[str], ev.Event], progress: Callable[[int, int], None] | None = None
    ) -> fx.Answered:
        """Put a question to the node; raises MeshgpuError where the answer is a refusal."""
        self._query_count += 1
        name = f"q{self._query_count}"
        query = Query(asyncio.get_running_loop().create_future(), progress)
        self._queries[name] = query
        try:
            self.post(event(name))
            async with asyncio.timeout(QUERY_DEADLINE_S):
                answer = await query.answer
        except TimeoutError as error:
            raise MeshgpuError("no-answer", "cannot go on: there was no end to it within an hour") from error
        finally:
            del self._queries[name]
        if answer.code:
            raise MeshgpuError(answer.code, answer.reason, answer.hint)
        return answer

    def watch(self, start: ev.WatchStarted) -> asyncio.Queue[Register]:
        """Follow a job's register; each watch is ended by `unwatch`."""
        queue: asyncio.Queue[Register] = asyncio.Queue()
        self._watchers.setdefault(start.job, []).append(queue)
        self.post(start)
        return queue

    def unwatch(self, job: JobId, queue: asyncio.Queue[Register]) -> None:
        queues = self._watchers[job]
        queues.remove(queue)
        if not queues:
            del self._watchers[job]
            self.post(ev.WatchStopped(job))


async def _contained(work: Awaitable[T]) -> T:
    """Carry out an effect. Whatever a user's or a peer's input makes of it, it becomes an error with words: one job or
    one announcement fails, never the agent with everybody's jobs."""
    try:
        return await work
    except MeshgpuError:
        raise
    except Exception as error:
        logger.exception("an effect failed")
        raise MeshgpuError("failed", f"{type(error).__name__}: {error}") from error


def sendable(text: str) -> str:
    """`text` with what UTF-8 cannot hold (undecodable bytes of file names) spelt out, and not endless."""
    return text.encode("utf-8", "backslashreplace").decode()[:REASON_CHARACTERS]


def anchors(members: Iterable[Member]) -> list[ports.Anchor]:
    """The members as a transport trusts them."""
    return [ports.Anchor(member.node, member.device_ca, member.role is Role.CLOUD) for member in members]
