"""What strangers meet at the pairing listener before anything of theirs is answered, and what is held against them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from meshgpu import ports
from meshgpu.core.trust.strangers import Strangers
from meshgpu.errors import BadProof, MeshgpuError

NONSENSE: Final = frozenset({"bad-message", "bad-name", "bad-request"})
"""Codes of what no agent of ours sends."""


@dataclass(frozen=True, slots=True)
class Door:
    """A ports.PairingDoor. respond: answers (host, step, request), or raises MeshgpuError."""

    clock: ports.Clock
    strangers: Strangers
    respond: Callable[[str, str, bytes], Awaitable[bytes]]

    def check(self, host: str) -> None:
        self.strangers.check(self.clock.now(), host)

    async def answer(self, host: str, step: str, request: bytes) -> bytes:
        try:
            return await self.respond(host, step, request)
        except MeshgpuError as error:
            if isinstance(error, BadProof) or error.code in NONSENSE:
                self.strangers.failed(self.clock.now(), host)
            raise

    def broke_off(self, host: str) -> None:
        self.strangers.failed(self.clock.now(), host)
