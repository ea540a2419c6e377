"""Enrolling an instance: the conversations around `core.trust.enrolling`, from both ends."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from cryptography import x509

from meshgpu import ports
from meshgpu.adapters.grpc_enrolment import GrpcEnrolDialog
from meshgpu.core.trust import enrolling
from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.errors import MeshgpuError
from meshgpu.model.enrolment import EnrolChallenge, EnrolGreeting, EnrolRequest, EnrolWelcome, InstanceKeys
from meshgpu.model.ids import Address, MeshId, digest, key_id
from meshgpu.model.trust import Notary, Signed
from meshgpu.wire.certificates import launch_of_bootstrap, node_of_ca
from meshgpu.wire.codec import PROTOCOL, decode, encode

NONCE_BYTES = 32


@dataclass(slots=True)
class InstanceDoor:
    """What an instance answers before it is a member.

    keep: makes the mesh log durable, before the burst peer hears that the instance has it.
    """

    enrolment: enrolling.Enrolment
    clock: ports.Clock
    rng: random.Random
    keep: Callable[[MeshLog], Awaitable[None]]
    enrolled: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, step: str, request: bytes) -> bytes:
        now = self.clock.now()
        if step == "greet":
            greeting = decode(EnrolGreeting, request)
            if greeting.protocol != PROTOCOL:
                found = f"this machine speaks protocol {PROTOCOL}, the burst peer {greeting.protocol}"
                raise MeshgpuError("version", f"cannot enrol: {found}", "see `install` in `meshgpu burst setup`")
            return encode(self.enrolment.challenge(now, greeting, self.rng.randbytes(NONCE_BYTES)))
        if step == "keys":
            return encode(self.enrolment.keys(now, decode(EnrolRequest, request)))
        if step == "welcome":
            await self.keep(self.enrolment.welcome(now, decode(EnrolWelcome, request)))
            self.enrolled.set()
            return b""
        raise MeshgpuError("bad-request", f"cannot enrol: there is no step {step!r}")


@dataclass(frozen=True, slots=True)
class InstanceDialog:
    """The burst peer's end, once the instance has shown its keys: node key (32 bytes) and device CA (DER)."""

    public_key: bytes
    device_ca: bytes
    _notary: Notary
    _clock: ports.Clock
    _mesh: MeshId
    _keys: InstanceKeys
    _conversation: bytes
    _dialog: GrpcEnrolDialog

    async def welcome(self, log: tuple[Signed, ...]) -> None:
        """Hand over the mesh log, in which it must be. When this returns the instance has it on its disk.

        Raises MeshgpuError; TrustError before anything is sent where the log does not name it as rented.
        """
        enrolling.check_log(self._notary, self._clock.now(), self._mesh, log, self._keys)
        await self._dialog.call("welcome", encode(EnrolWelcome(self._conversation, log)))

    async def close(self) -> None:
        await self._dialog.close()


@dataclass(frozen=True, slots=True)
class Enroller:
    """Dials instances that this node rents."""

    keys: ports.Keys
    notary: Notary
    clock: ports.Clock
    rng: random.Random
    mesh: Callable[[], MeshId | None]

    async def dial(self, address: Address, bootstrap: bytes) -> InstanceDialog:
        """Talk to whoever holds the key of `bootstrap` (DER) at `address`, and get its keys; within 16 s.

        Raises MeshgpuError: `no-answer` while it boots or where another machine answers, `expired` after 15 minutes.
        One launch may be dialled again; it is up to the caller's record to refuse another key than it showed before.
        """
        mesh = self.mesh()
        if mesh is None:
            raise MeshgpuError("not-in-mesh", "cannot enrol an instance: this machine is in no mesh")
        certificate = _certificate(bootstrap)
        enrolling.check_alive(self.clock.now(), certificate.not_valid_after_utc.timestamp())
        dialog = GrpcEnrolDialog(address, bootstrap)
        try:
            nonce = self.rng.randbytes(NONCE_BYTES)
            challenge = decode(EnrolChallenge, await dialog.call("greet", encode(EnrolGreeting(PROTOCOL, nonce))))
            request = enrolling.claim(
                self.notary,
                key_id(self.keys.node_key()),
                (mesh, launch_of_bootstrap(certificate)),
                digest(bootstrap),
                (nonce, challenge.nonce),
            )
            shown = decode(InstanceKeys, await dialog.call("keys", encode(request)))
            node = enrolling.check_keys(self.notary, request, shown)
            if node_of_ca(shown.device_ca) != node:
                raise MeshgpuError("bad-device-ca", "cannot enrol the instance: its certificate is another key's")
        except BaseException:
            await dialog.close()
            raise
        return InstanceDialog(
            shown.public_key, shown.device_ca, self.notary, self.clock, mesh, shown, challenge.nonce, dialog
        )


def _certificate(bootstrap: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(bootstrap)
    except ValueError as error:
        raise MeshgpuError("bad-request", "cannot enrol the instance: its bootstrap certificate is none") from error
