"""Every order of the burst planner ends in exactly one event, however the provider or the instance behaves."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from meshgpu.agent import burst as burst_module
from meshgpu.agent.burst import Burst
from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import (
    BurstSettings,
    Caps,
    Instance,
    InstanceState,
    LaunchId,
    LaunchRequest,
    Market,
    Rung,
)
from meshgpu.model.ids import Address, JobId, KeyId, MeshId, NodeId
from meshgpu.model.trust import Signed

RUNG = Rung("g6.xlarge", "a", Market.SPOT, "L4", 1, 22 * 2**30, 4, 16 * 10**9, 0.40)
SETTINGS = BurstSettings(
    "eu-central-1", Caps(5.0, 20.0, 50.0, 10.0, 3, False, 3600.0), ("g6.xlarge",), 60.0, 300.0, 900.0, "", "", "true"
)
LAUNCH = LaunchId("l" * 26)
REQUEST = LaunchRequest(
    LAUNCH, MeshId("5e" * 32), NodeId("m" * 52), JobId("j" * 26), "token", RUNG, 2e9, "", "", b"data"
)
INSTANCE = Instance(
    "i-1", LAUNCH, REQUEST.mesh, REQUEST.owner, REQUEST.need, InstanceState.RUNNING, "198.51.100.7", 1.9e9, 2e9,
    "g6.xlarge", Market.SPOT, 0.4,
)  # fmt: skip
LOG = (Signed("LogEntry", b"log", KeyId("k" * 52), b""),)

SURVEY = fx.SurveyCloud(SETTINGS)
PREPARE = fx.PrepareLaunch(LAUNCH, "cloud-llllllll", RUNG, REQUEST.need, 2e9, SETTINGS)
ENROL = fx.Enrol(LAUNCH, Address("198.51.100.7:443"), b"bootstrap")
WELCOME = fx.Welcome(LAUNCH, LOG)
ORDERS: list[fx.BurstEffect] = [SURVEY, PREPARE, fx.Launch(REQUEST), fx.Terminate("i-1"), ENROL, WELCOME]


class World:
    """Provider, user data and instance in one: answers as told, or does what `trouble` does."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.trouble: Callable[[], None] | None = None
        self.hangs = False
        self.instance = INSTANCE
        self.public_key, self.device_ca = b"k" * 32, b"ca"

    async def _do(self, what: str) -> None:
        self.lines.append(what)
        if self.hangs:
            await asyncio.sleep(3600)
        if self.trouble is not None:
            self.trouble()

    async def rungs(self, settings: BurstSettings) -> tuple[Rung, ...]:
        await self._do(f"rungs {settings.region}")
        return (RUNG,)

    async def instances(self) -> tuple[Instance, ...]:
        await self._do("instances")
        return (self.instance,)

    async def launch(self, request: LaunchRequest) -> Instance:
        await self._do(f"launch {request.token}")
        return INSTANCE

    async def terminate(self, instance: str) -> None:
        await self._do(f"terminate {instance}")

    async def close(self) -> None:
        self.lines.append("close")

    async def user_data(self, order: fx.PrepareLaunch) -> tuple[bytes, bytes]:
        await self._do(f"user data of {order.name}")
        return b"user data", b"bootstrap"

    async def dial(self, address: Address, bootstrap: bytes) -> "World":
        await self._do(f"dial {address}")
        return self

    async def welcome(self, log: tuple[Signed, ...]) -> None:
        await self._do(f"welcome {len(log)}")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def burst(world: World) -> Burst:
    return Burst(lambda _settings: world, world.user_data, world.dial)


async def ready(burst: Burst, world: World) -> None:
    """The provider is open, and so is a dialog."""
    await burst.perform(SURVEY)
    await burst.perform(ENROL)
    world.lines.clear()


async def test_orders_end_as_they_should(burst: Burst, world: World) -> None:
    assert [await burst.perform(order) for order in ORDERS] == [
        ev.CloudSurveyed((RUNG,), (INSTANCE,)),
        ev.LaunchPrepared(LAUNCH, b"user data", b"bootstrap"),
        ev.LaunchEnded(LAUNCH, INSTANCE),
        ev.TerminateEnded("i-1"),
        ev.Enrolled(LAUNCH, b"k" * 32, b"ca"),
        ev.WelcomeEnded(LAUNCH),
    ]
    assert world.lines[-2:] == ["welcome 1", "close"]  # the dialog is over


def failures(code: str, reason: str) -> list[ev.BurstEvent]:
    return [
        ev.CloudSurveyed((), (), code, reason),
        ev.LaunchPrepared(LAUNCH, b"", b"", code, reason),
        ev.LaunchEnded(LAUNCH, None, code, reason),
        ev.TerminateEnded("i-1", code, reason),
        ev.Enrolled(LAUNCH, b"", b"", code, reason),
        ev.WelcomeEnded(LAUNCH, code, reason),
    ]


@pytest.mark.parametrize("number", range(len(ORDERS)))
async def test_refusal_comes_back_with_its_code(burst: Burst, world: World, number: int) -> None:
    await ready(burst, world)

    def refuse() -> None:
        raise MeshgpuError("no-capacity", "not today")

    world.trouble = refuse
    assert await burst.perform(ORDERS[number]) == failures("no-capacity", "not today")[number]


async def test_what_lives_is_told_although_prices_are_not(burst: Burst, world: World) -> None:
    def refuse() -> None:
        if world.lines[-1].startswith("rungs"):
            raise MeshgpuError("throttled", "no prices", "wait")

    world.trouble = refuse
    assert await burst.perform(SURVEY) == ev.CloudSurveyed((), (INSTANCE,), reason="no prices (hint: wait)")


@pytest.mark.parametrize("number", range(len(ORDERS)))
async def test_silence_ends_in_time_as_an_unknown_outcome(
    burst: Burst, world: World, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ready(burst, world)
    monkeypatch.setattr(burst_module, "CALL_S", 0.01)
    monkeypatch.setattr(burst_module, "DIALOG_S", 0.01)
    world.hangs = True
    expected = failures("unknown-outcome", "there was no answer in time")[number]
    assert await burst.perform(ORDERS[number]) == expected


async def test_bug_in_an_adapter_is_an_unknown_outcome(burst: Burst, world: World) -> None:
    await ready(burst, world)

    def break_down() -> None:
        raise ZeroDivisionError("oops")

    world.trouble = break_down
    event = await burst.perform(fx.Launch(REQUEST))
    assert event == ev.LaunchEnded(LAUNCH, None, "unknown-outcome", "ZeroDivisionError: oops")


async def test_call_before_the_first_survey_fails_and_may_be_repeated(burst: Burst, world: World) -> None:
    event = await burst.perform(fx.Terminate("i-1"))
    assert isinstance(event, ev.TerminateEnded)
    assert event.code == "unknown-outcome"
    assert world.lines == []


async def test_welcome_without_a_dialog_asks_for_another_dial(burst: Burst, world: World) -> None:
    await ready(burst, world)
    await burst.perform(WELCOME)
    event = await burst.perform(WELCOME)
    assert isinstance(event, ev.WelcomeEnded)
    assert event.code == "no-answer"


async def test_new_dial_closes_the_dialog_before(burst: Burst, world: World) -> None:
    await ready(burst, world)
    await burst.perform(ENROL)
    assert world.lines == ["close", "dial 198.51.100.7:443"]


async def test_dialog_of_an_instance_that_is_gone_is_closed(burst: Burst, world: World) -> None:
    await ready(burst, world)
    world.instance = replace(INSTANCE, state=InstanceState.TERMINATED)
    await burst.perform(SURVEY)
    assert "close" in world.lines


async def test_changed_settings_open_the_provider_anew_and_closing_ends_all(world: World) -> None:
    opened: list[str] = []

    def open_cloud(settings: BurstSettings) -> World:
        opened.append(settings.region)
        return world

    burst = Burst(open_cloud, world.user_data, world.dial)
    await burst.perform(SURVEY)
    await burst.perform(SURVEY)
    await burst.perform(fx.SurveyCloud(replace(SETTINGS, region="us-east-1")))
    assert opened == ["eu-central-1", "us-east-1"]
    await burst.perform(ENROL)
    world.lines.clear()
    await burst.close()
    assert world.lines == ["close", "close"]  # a dialog, and the provider's client
