"""What the burst planner orders, carried out: calls to the provider, user data, and the dialog with a new instance.

Every order ends in exactly one event, in time, whatever happens: a call that does not come back in time may have
happened, and says so.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, assert_never

from meshgpu import ports
from meshgpu.core import effects as fx
from meshgpu.core import events as ev
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import BurstSettings, InstanceState, LaunchId
from meshgpu.model.ids import Address
from meshgpu.model.trust import Signed

logger = logging.getLogger(__name__)

CALL_S: Final = 60.0
"""One exchange with the provider, prices included; it throttles rather than hangs."""

DIALOG_S: Final = 30.0
"""A handshake with an instance that is still booting, or a mesh log of some megabytes."""

CLOSE_S: Final = 5.0


class EnrolDialog(Protocol):
    """The connection to an instance that proved that it booted our user data."""

    @property
    def public_key(self) -> bytes:
        """The node key that it made, 32 raw bytes."""
        ...

    @property
    def device_ca(self) -> bytes: ...

    async def welcome(self, log: tuple[Signed, ...]) -> None:
        """Hand the mesh log over; returns once the instance listens as a member. Raises MeshgpuError."""
        ...

    async def close(self) -> None: ...


MakeUserData = Callable[[fx.PrepareLaunch], Awaitable[tuple[bytes, bytes]]]
"""(user data, bootstrap certificate as DER) of an instance to be; raises MeshgpuError."""

DialInstance = Callable[[Address, bytes], Awaitable[EnrolDialog]]
"""(address, bootstrap certificate) -> dialog; raises MeshgpuError `no-answer` while the instance boots."""

OpenCloud = Callable[[BurstSettings], ports.Cloud]
"""The provider as the settings name it; raises MeshgpuError."""


class Burst:
    """Owns the provider's client and the dialogs. `close` ends both."""

    def __init__(self, open_cloud: OpenCloud, make_user_data: MakeUserData, dial: DialInstance) -> None:
        self._open_cloud = open_cloud
        self._make_user_data = make_user_data
        self._dial = dial
        self._settings: BurstSettings | None = None
        self._cloud: ports.Cloud | None = None
        self._dialogs: dict[LaunchId, EnrolDialog] = {}

    async def close(self) -> None:
        for launch in list(self._dialogs):
            await self._hang_up(launch)
        cloud, self._cloud = self._cloud, None
        if cloud is not None:
            await cloud.close()

    async def perform(self, order: fx.BurstEffect) -> ev.BurstEvent:
        """Carry out one order. Never raises but for cancellation."""
        try:
            async with asyncio.timeout(DIALOG_S if isinstance(order, fx.Enrol | fx.Welcome) else CALL_S):
                return await self._carry_out(order)
        except TimeoutError:
            return failed(order, "unknown-outcome", "there was no answer in time")
        except MeshgpuError as error:
            return failed(order, error.code, _words(error))
        except Exception as error:
            logger.exception("a burst order failed")
            return failed(order, "unknown-outcome", f"{type(error).__name__}: {error}")

    async def _carry_out(self, order: fx.BurstEffect) -> ev.BurstEvent:
        match order:
            case fx.SurveyCloud(settings=settings):
                cloud = await self._cloud_of(settings)
                instances = await cloud.instances()
                living = {i.launch for i in instances if i.state is not InstanceState.TERMINATED}
                for launch in self._dialogs.keys() - living:
                    await self._hang_up(launch)
                try:
                    return ev.CloudSurveyed(await cloud.rungs(settings), instances)
                except MeshgpuError as error:  # what lives must be looked after all the same
                    return ev.CloudSurveyed((), instances, reason=_words(error))
            case fx.PrepareLaunch(launch=launch):
                user_data, bootstrap = await self._make_user_data(order)
                return ev.LaunchPrepared(launch, user_data, bootstrap)
            case fx.Launch(request=request):
                return ev.LaunchEnded(request.launch, await self._opened().launch(request))
            case fx.Terminate(instance=instance):
                await self._opened().terminate(instance)
                return ev.TerminateEnded(instance)
            case fx.Enrol(launch=launch, address=address, bootstrap=bootstrap):
                await self._hang_up(launch)
                dialog = self._dialogs[launch] = await self._dial(address, bootstrap)
                return ev.Enrolled(launch, dialog.public_key, dialog.device_ca)
            case fx.Welcome(launch=launch, log=log):
                return await self._welcome(launch, log)
            case _:
                assert_never(order)

    async def _welcome(self, launch: LaunchId, log: tuple[Signed, ...]) -> ev.WelcomeEnded:
        dialog = self._dialogs.get(launch)
        if dialog is None:
            raise MeshgpuError("no-answer", "cannot welcome the instance: its dialog is closed")
        try:
            await dialog.welcome(log)
        finally:
            await self._hang_up(launch)
        return ev.WelcomeEnded(launch)

    async def _cloud_of(self, settings: BurstSettings) -> ports.Cloud:
        """The provider's client, opened anew where the settings changed."""
        if self._cloud is not None and self._settings == settings:
            return self._cloud
        before, self._cloud = self._cloud, self._open_cloud(settings)
        self._settings = settings
        if before is not None:
            await before.close()
        return self._cloud

    def _opened(self) -> ports.Cloud:
        if self._cloud is None:
            raise MeshgpuError("unknown-outcome", "cannot ask the provider: it was not surveyed yet")
        return self._cloud

    async def _hang_up(self, launch: LaunchId) -> None:
        dialog = self._dialogs.pop(launch, None)
        if dialog is None:
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                await dialog.close()
        except (TimeoutError, MeshgpuError) as error:
            logger.debug("a dialog was left open: %s", error)


def _words(error: MeshgpuError) -> str:
    return f"{error.message} (hint: {error.hint})" if error.hint else error.message


def failed(order: fx.BurstEffect, code: str, reason: str) -> ev.BurstEvent:
    """The event in which the order ends when it fails."""
    match order:
        case fx.SurveyCloud():
            return ev.CloudSurveyed(code=code, reason=reason)
        case fx.PrepareLaunch(launch=launch):
            return ev.LaunchPrepared(launch, code=code, reason=reason)
        case fx.Launch(request=request):
            return ev.LaunchEnded(request.launch, code=code, reason=reason)
        case fx.Terminate(instance=instance):
            return ev.TerminateEnded(instance, code, reason)
        case fx.Enrol(launch=launch):
            return ev.Enrolled(launch, code=code, reason=reason)
        case fx.Welcome(launch=launch):
            return ev.WelcomeEnded(launch, code, reason)
        case _:
            assert_never(order)
