"""Configuration: file, environment and flags become one frozen value; an unknown key names the nearest valid one."""

import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from meshgpu.core.owner import OwnerPolicy
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address, UserName
from meshgpu.model.lending import Lending

DEFAULT_LINK_PORT = 7443
DEFAULT_PAIRING_PORT = 7444


@dataclass(frozen=True, slots=True)
class Config:
    """What `config.toml` may say. Each key may also come from the environment as MESHGPU_<KEY>.

    seeds: addresses that are tried besides mDNS, `host` or `host:port`. interfaces: where others come to this machine,
    by name or address; empty: those of the office network, as far as that can be told.
    advertise: `gpus`, `presence` or `off`.
    loopback: True shows this agent on the loopback interface only: for demonstrations and tests on one computer.
    link_port, pairing_port: 0 takes a free one. lend: False keeps every job away.
    trust: users whose jobs run here although nothing can shut them in.
    fence: `auto` takes the best that works to shut in other users' jobs, `none` lets no other user's job run here.
    policy: who comes first on the GPUs: `polite` (the owner), `shared` (nobody), `dedicated` (the mesh).
    require_containers: True runs jobs in containers only; those that name no image in default_image, if there is one.
    join_file: where a string may lie by which an agent in no mesh joins, before `join` in its home; empty: nowhere.
    keep_free_gb: chunks and results are refused below this much free disk; None: the larger of 10 GB and 5 %.
    keep_log_gb: the newest so much of what an attempt prints is kept; below keep_free_gb, and however little this is,
    its newest 16 MB.
    log: `info`, or `debug`, which also names every message that is heard, for whoever looks for a fault.
    """

    seeds: tuple[str, ...] = ()
    advertise: str = "gpus"
    interfaces: tuple[str, ...] = ()
    loopback: bool = False
    link_port: int = DEFAULT_LINK_PORT
    pairing_port: int = DEFAULT_PAIRING_PORT
    lend: bool = True
    trust: tuple[str, ...] = ()
    fence: str = "auto"
    policy: str = Lending.POLITE
    require_containers: bool = False
    default_image: str = ""
    join_file: str = "/etc/meshgpu/join"
    keep_free_gb: float | None = None
    keep_log_gb: float = 1.0
    log: str = "info"

    @property
    def seed_addresses(self) -> tuple[Address, ...]:
        return tuple(with_port(seed, DEFAULT_LINK_PORT) for seed in self.seeds)

    @property
    def owner_policy(self) -> OwnerPolicy:
        trusted = tuple(UserName(name) for name in self.trust)
        return OwnerPolicy(self.lend, trusted, Lending(self.policy), self.require_containers, self.default_image)


def load_config(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Environment over file over defaults. Raises MeshgpuError `bad-config`, which names key and file."""
    settings: dict[str, object] = {}
    if path.exists():
        try:
            settings = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise MeshgpuError("bad-config", f"cannot read {path}: {error}") from error
    names = [field.name for field in fields(Config)]
    for key in settings:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(names)}"
            raise MeshgpuError("bad-config", f"cannot use {path}: there is no setting {key!r}", hint)
    for name in names:
        text = environment.get(f"MESHGPU_{name.upper()}")
        if text is not None:
            settings[name] = _from_text(name, text)
    checked = {name: _checked(name, value, path) for name, value in settings.items()}
    config = Config(**checked)  # type: ignore[arg-type]  # _checked made the types true
    for name in ("link_port", "pairing_port"):
        if not 0 <= getattr(config, name) <= 65_535:
            raise MeshgpuError("bad-config", f"cannot use {name} = {getattr(config, name)}: expected 0 to 65535")
    for name in ("keep_free_gb", "keep_log_gb"):
        gigabytes = getattr(config, name)
        if gigabytes is not None and not 0 <= gigabytes < math.inf:
            raise MeshgpuError("bad-config", f"cannot use {name} = {gigabytes}: expected 0 or more")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            found = f"{name} = {getattr(config, name)!r}"
            raise MeshgpuError("bad-config", f"cannot use {found}: expected {', '.join(choices)}")
    return config


def with_port(address: str, port: int) -> Address:
    """`host` or `host:port`, as `host:port`."""
    host, colon, tail = address.rpartition(":")
    has_port = bool(colon) and tail.isdigit() and (":" not in host or host.startswith("["))
    return Address(address if has_port else f"{address}:{port}")


def host_of(address: str) -> str:
    """`host` or `host:port`, as `host`."""
    return with_port(address, DEFAULT_LINK_PORT).rpartition(":")[0]


_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_CHOICES = {
    "advertise": ("gpus", "presence", "off"),
    "fence": ("auto", "none"),
    "policy": tuple(Lending),
    "log": ("info", "debug"),
}
_KINDS: dict[str, type] = {
    "seeds": tuple,
    "interfaces": tuple,
    "advertise": str,
    "loopback": bool,
    "link_port": int,
    "pairing_port": int,
    "lend": bool,
    "trust": tuple,
    "fence": str,
    "policy": str,
    "require_containers": bool,
    "default_image": str,
    "join_file": str,
    "keep_free_gb": float,
    "keep_log_gb": float,
    "log": str,
}


def _from_text(name: str, text: str) -> object:
    kind = _KINDS[name]
    try:
        if kind is tuple:
            return [part for part in text.replace(",", " ").split() if part]
        if kind is bool:
            return _BOOLEANS[text.strip().lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        shown = f"MESHGPU_{name.upper()}={text}"
        raise MeshgpuError("bad-config", f"cannot use {shown}: expected {_expected(kind)}") from error


def _checked(name: str, value: object, path: Path) -> object:
    kind = _KINDS[name]
    if kind is tuple and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is not tuple and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise MeshgpuError("bad-config", f"cannot use {path}: {name} = {value!r}, expected {_expected(kind)}")


def _expected(kind: type) -> str:
    return {tuple: "a list of strings", bool: "true or false", int: "a whole number", float: "a number"}.get(
        kind, "text"
    )
