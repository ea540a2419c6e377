"""Every error that meshgpu raises on purpose, and how it looks over gRPC and HTTP.

MeshgpuError            code, message, hint: somebody can act on it
├── TrustError          a signature, a right or a proof does not hold
│   ├── StaleRequest    it was signed at another time by the receiver's clock; may be signed again
│   └── BadProof        a stranger showed no right to join; counts against the address that it came from
├── AgentUnreachable    the control socket does not answer (the CLI suggests `meshgpu up`)
└── BrokenInvariant     our own bug; carries the last events of the object it happened to
"""

from typing import Final


class MeshgpuError(Exception):
    """What was attempted, on what, what was found, what was expected.

    `code` is kebab-case and stable; `hint` is a command or a sentence that mends it.
    """

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class TrustError(MeshgpuError):
    """What arrived is not signed, not fresh or not allowed; nothing was changed."""


class StaleRequest(TrustError):
    """A signed request that is too old, or not yet made, by the clock of who got it.

    challenge: 32 random bytes; with them in it the request is fresh, once. Empty where none is offered.
    wall_s: the receiver's Unix time. refused: the challenge that was in the request; empty for none.
    """

    def __init__(self, message: str, challenge: bytes, wall_s: float, refused: bytes = b"") -> None:
        super().__init__("stale", message, "set the clocks of both machines: timedatectl set-ntp true")
        self.challenge = challenge
        self.wall_s = wall_s
        self.refused = refused


class BadProof(TrustError):
    """What a stranger sent at the pairing listener proves nothing."""


class AgentUnreachable(MeshgpuError):
    """No agent answers on the control socket."""


class BrokenInvariant(MeshgpuError):
    """A claim of our own does not hold: a bug of meshgpu, never of a peer or a user."""

    def __init__(self, message: str, story: tuple[str, ...] = ()) -> None:
        lines = "".join(f"\n  {line}" for line in story)
        super().__init__("broken-invariant", f"{message}{lines}", "please report this, with the lines above")
        self.story = story


HTTP_STATUS: Final[dict[str, int]] = {
    "bad-request": 400,
    "not-allowed": 403,
    "not-in-mesh": 409,
    "unknown-job": 404,
    "unknown-machine": 404,
    "unknown-user": 404,
    "unknown-file": 404,
    "no-receipt": 404,
    "ambiguous": 409,
    "already-in-mesh": 409,
    "missing-chunks": 409,
    "too-large": 413,
    "disk-full": 507,
    "busy": 503,
    "no-answer": 504,
    "broken-invariant": 500,
}
"""HTTP status by error code; a code that is not listed is answered with 422."""

GRPC_STATUS: Final[dict[str, str]] = {
    "bad-request": "INVALID_ARGUMENT",
    "not-allowed": "PERMISSION_DENIED",
    "not-in-mesh": "FAILED_PRECONDITION",
    "unknown-job": "NOT_FOUND",
    "unknown-file": "NOT_FOUND",
    "disk-full": "RESOURCE_EXHAUSTED",
    "busy": "RESOURCE_EXHAUSTED",
    "no-answer": "DEADLINE_EXCEEDED",
}
"""gRPC status name by error code; a code that is not listed is answered with FAILED_PRECONDITION."""
