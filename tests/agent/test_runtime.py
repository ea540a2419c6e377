"""The runtime carries out effects in order, and nothing before what must be on disk is."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from meshgpu.agent.runtime import Outside, Runtime, sendable
from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.errors import MeshgpuError
from meshgpu.model.clock import Now
from meshgpu.model.ids import JobId, MeshId, NodeId
from meshgpu.model.messages import ReportAck
from meshgpu.model.records import MeshRecord


class Clock:
    def now(self) -> Now:
        return Now(asyncio.get_running_loop().time(), 1000.0, "boot")


class Script:
    """A node that answers each event with the effects that a test wrote down."""

    def __init__(self, respond: Callable[[ev.Event], list[fx.Effect]]) -> None:
        self.log = type("Log", (), {"mesh": MeshId("m" * 64)})()
        self._respond = respond

    def start(self, now: Now) -> list[fx.Effect]:
        return []

    def step(self, now: Now, event: ev.Event) -> list[fx.Effect]:
        return self._respond(event)

    def deadline(self) -> float | None:
        return None


class Diary:
    """Transport and store that write down what happened, in order. `gate` holds up the disk while it is clear."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.batches: list[int] = []
        self.is_slow = False
        self.may_write = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def write(self, records: Sequence[tuple[str, str, bytes | None]]) -> None:
        if self.is_slow:
            asyncio.run_coroutine_threadsafe(self.may_write.wait(), self.loop).result(timeout=10)
        self.batches.append(len(records))
        self.lines.extend(f"disk {key}" for _, key, _ in records)

    def send(self, peer: NodeId, frame: bytes) -> None:
        self.lines.append(f"send {peer}")


async def with_runtime(
    diary: Diary, respond: Callable[[ev.Event], list[fx.Effect]], drive: Callable[[Runtime], Any]
) -> None:
    class Done(Exception):
        pass

    stub: Any = diary
    script: Any = Script(respond)
    try:
        async with asyncio.TaskGroup() as tasks:
            runtime = Runtime(script, Outside(Clock(), stub, stub, stub, stub, stub), stub, tasks)
            tasks.create_task(runtime.run())
            async with asyncio.timeout(10):
                await drive(runtime)
            raise Done
    except* Done:
        pass


def keep(key: str) -> fx.Persist:
    return fx.Persist("mesh", key, MeshRecord(MeshId("m" * 64), 1))


def tell(peer: str) -> fx.Send:
    return fx.Send(NodeId(peer), ReportAck(JobId("a" * 26), 1))


def sighted(name: str) -> ev.LinkOpened:
    return ev.LinkOpened(NodeId(name))


async def test_nothing_is_sent_before_its_step_is_on_disk() -> None:
    diary = Diary()
    diary.is_slow = True

    async def drive(runtime: Runtime) -> None:
        settling = asyncio.ensure_future(runtime.settle(sighted("a")))
        await asyncio.sleep(0.05)
        assert diary.lines == []
        diary.may_write.set()
        await settling
        assert diary.lines == ["disk a", "send a"]

    await with_runtime(diary, lambda event: [keep("a"), tell("a")], drive)


async def test_agent_without_a_seller_says_so_to_whatever_the_planner_orders() -> None:
    told: asyncio.Queue[ev.Event] = asyncio.Queue()

    def respond(event: ev.Event) -> list[fx.Effect]:
        if isinstance(event, ev.LinkOpened):
            return [fx.Terminate("i-1")]
        told.put_nowait(event)
        return []

    async def drive(runtime: Runtime) -> None:
        await runtime.settle(sighted("a"))
        assert await told.get() == ev.TerminateEnded("i-1", "not-served", "this agent knows no seller")

    await with_runtime(Diary(), respond, drive)


async def test_steps_that_gather_behind_a_slow_disk_share_one_transaction_and_keep_their_order() -> None:
    diary = Diary()
    diary.is_slow = True

    def respond(event: ev.Event) -> list[fx.Effect]:
        assert isinstance(event, ev.LinkOpened)
        return [keep(event.peer), tell(event.peer)]

    async def drive(runtime: Runtime) -> None:
        runtime.post(sighted("first"))
        await asyncio.sleep(0.05)
        names = [f"n{number}" for number in range(20)]
        for name in names:
            runtime.post(sighted(name))
        settling = asyncio.ensure_future(runtime.settle(sighted("last")))
        await asyncio.sleep(0.05)
        diary.may_write.set()
        await settling
        assert diary.batches == [1, 21]
        assert [line for line in diary.lines if line.startswith("send")] == [
            f"send {name}" for name in ("first", *names, "last")
        ]

    await with_runtime(diary, respond, drive)


async def test_refusal_of_a_question_is_raised_with_its_hint() -> None:
    def respond(event: ev.Event) -> list[fx.Effect]:
        assert isinstance(event, ev.JobsAsked)
        return [fx.Answered(event.query, code="not-allowed", reason="cannot ask", hint="meshgpu version")]

    async def drive(runtime: Runtime) -> None:
        key: Any = "key"
        with pytest.raises(MeshgpuError, match="cannot ask") as caught:
            await runtime.ask(lambda query: ev.JobsAsked(query, key))
        assert (caught.value.code, caught.value.hint) == ("not-allowed", "meshgpu version")

    await with_runtime(Diary(), respond, drive)


def test_text_that_utf8_cannot_hold_is_spelt_out() -> None:
    assert sendable("no \udcff file") == "no \\udcff file"
    assert len(sendable("x" * 10_000)) == 4_000
