"""What secrets a job may have, and what a sealed box is bound to. Values never come here."""

import re
from collections.abc import Callable, Mapping
from typing import Final

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import JobId, KeyId, MeshId, NodeId, job_id
from meshgpu.model.job import CloudUse, Draft, JobSpec, SecretBox

SECRETS_LIMIT: Final = 64
"""Names in one job: more than programs read, few enough to look over."""

SECRETS_LIMIT_BYTES: Final = 64 * 1024
"""Names and values of one job: keys and certificates fit, data does not; the signed spec has room for them."""

SEALING_KEY_BYTES: Final = 32

NO_WRAP: Final = "has no key to the job's secrets: they were sealed before it could take any"

Seal = Callable[[str, bytes, tuple[str, ...], Mapping[NodeId, bytes]], SecretBox]
"""(query, binding, names, {node: sealing key}) → the values that the agent keeps under `query`, sealed.

Raises MeshgpuError where it keeps none of these names.
"""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def is_variable(name: str) -> bool:
    """Whether a secret can have this name: that of a variable which meshgpu does not set itself."""
    return _NAME.fullmatch(name) is not None and not name.startswith("MESHGPU_")


def no_seal(query: str, _binding: bytes, _names: tuple[str, ...], _keys: Mapping[NodeId, bytes]) -> SecretBox:
    """For who keeps no values."""
    raise MeshgpuError("no-secrets", f"cannot seal secrets: no values are kept for {query}")


def binding(mesh: MeshId, job: JobId, key: KeyId, names: tuple[str, ...]) -> bytes:
    """What a box is sealed to besides its machines, so that it opens in no other job, for no other user or names."""
    parts = (mesh, job, key, *names)
    return b"meshgpu secrets 1" + b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)


def binding_of(spec: JobSpec, key: KeyId) -> bytes:
    """The binding of the box in `spec`, which `key` signed. A trial's box is its sweep's: their nonce is one."""
    assert spec.secrets is not None
    return binding(spec.mesh, job_id(key, spec.nonce), key, spec.secrets.names)


def check_draft(draft: Draft) -> None:
    """Raises MeshgpuError for secrets that no job can have."""
    names = draft.secrets
    if len(names) > SECRETS_LIMIT:
        raise MeshgpuError("too-large", f"cannot run with {len(names)} secrets: expected {SECRETS_LIMIT} at most")
    for name in names:
        if not is_variable(name):
            raise MeshgpuError(
                "bad-request", f"cannot pass the secret {name!r}: expected the name of a variable", "--secret HF_TOKEN"
            )
    both = sorted(set(names) & {name for name, _ in draft.env})
    if len(set(names)) != len(names) or both:
        twice = both[0] if both else next(name for name in names if names.count(name) > 1)
        raise MeshgpuError("bad-request", f"cannot pass the secret {twice}: it is set twice", f"--secret {twice}")
    if names and draft.cloud is CloudUse.ONLY:
        raise MeshgpuError(
            "impossible",
            "cannot run with --secret and --cloud only: secrets are sealed when a job is submitted, and a machine that"
            " is rented for it does not exist yet",
            "--cloud ok, on machines that exist now; or leave out --secret",
        )
