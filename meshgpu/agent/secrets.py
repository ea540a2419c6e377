"""The values of secrets while they pass through the agent: from a person's request into a box, and out of one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from meshgpu.adapters.key_files import KeyFiles
from meshgpu.core.trust.sealing import SECRETS_LIMIT_BYTES, binding_of
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import NodeId
from meshgpu.model.job import AttemptPlan, SecretBox
from meshgpu.wire.sealing import seal, unseal


class Vault:
    """Values that wait to be sealed, by the query that submits their job. In memory only, and only until it ends."""

    def __init__(self) -> None:
        self._values: dict[str, Mapping[str, str]] = {}

    @contextmanager
    def keeping(self, query: str, values: Mapping[str, str]) -> Iterator[None]:
        """Keep `values` ({name: value}) for as long as the query is open."""
        self._values[query] = values
        try:
            yield
        finally:
            del self._values[query]

    def seal(self, query: str, binding: bytes, names: tuple[str, ...], keys: Mapping[NodeId, bytes]) -> SecretBox:
        """See core.trust.sealing.Seal."""
        values = self._values.get(query, {})
        if set(values) != set(names):
            raise MeshgpuError("no-secrets", "cannot seal secrets: not all of their values are here")
        return seal({name: values[name] for name in names}, binding, keys)


class Opener:
    """Opens boxes with this machine's sealing key: for an executor, just before a job's process starts."""

    def __init__(self, node: NodeId, keys: KeyFiles) -> None:
        self._node = node
        self._keys = keys

    def open(self, plan: AttemptPlan) -> dict[str, str]:
        """{name: value} of the plan's job; empty where it has none. Raises TrustError `sealed`. Blocks."""
        box = plan.spec.secrets
        if box is None:
            return {}
        assert plan.key is not None
        return unseal(box, binding_of(plan.spec, plan.key), self._node, self._keys.exchange)


def checked(values: Mapping[str, str]) -> Mapping[str, str]:
    """Raises MeshgpuError for values that no environment can hold; it names them and shows none."""
    for name, value in values.items():
        if "\0" in value or not _is_text(value):
            raise MeshgpuError("bad-request", f"cannot pass the secret {name}: its value is no UTF-8 text without NUL")
    if sum(len(name.encode()) + len(value.encode()) for name, value in values.items()) > SECRETS_LIMIT_BYTES:
        raise MeshgpuError("too-large", f"cannot pass the secrets: more than {SECRETS_LIMIT_BYTES} bytes in all")
    return values


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)
