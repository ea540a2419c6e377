"""What the command line asks for: JSON bodies of the control API become values.

Everything here raises MeshgpuError `bad-request` for what makes no sense.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web

from meshgpu.adapters.metrics import compile_pattern
from meshgpu.agent.secrets import checked
from meshgpu.core.sweep import grid_size
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import BurstSettings, Caps
from meshgpu.model.constraints import join
from meshgpu.model.ids import Digest, as_name
from meshgpu.model.job import CloudUse, Draft, EnvironmentRequest, Priority
from meshgpu.model.logs import LogSelection, LogStream
from meshgpu.model.resources import Resources, parse_gpus
from meshgpu.model.sweep import Method, Objective, Space, parse_objective, parse_param
from meshgpu.model.tree import Manifest
from meshgpu.model.trust import Role

SETTING_NAMES: Final = {
    "region": r"[a-z]{2}(-[a-z0-9]+)+",
    "instance_types": r"[a-z0-9-]+\.[a-z0-9-]+",
    "image": r"(ami-[a-z0-9]+)?",
    "security_group": r"(sg-[a-z0-9]+)?",
}
"""{setting: what EC2's names for it look like}."""

INSTALL_BYTES: Final = 8 * 1024
"""Of the install command at most: half of the user data into which it has to fit."""

SPAN_LIMIT_S: Final = 366 * 86_400
"""Of what a job's time is limited to: longer means for ever."""

MOMENT_LIMIT: Final = 2.0**40
"""Unix time: some 35,000 years from now."""

INSTANCES_LIMIT: Final = 1000
AMOUNT_LIMIT: Final = 1e9
"""US dollars or seconds: more than anybody means."""


async def read_body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read() or b"{}")
    except ValueError as error:
        raise MeshgpuError("bad-request", f"cannot read the request: {error}") from error
    if not isinstance(body, dict):
        raise MeshgpuError("bad-request", "cannot read the request: expected a JSON object")
    return body


def text_of(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise MeshgpuError("bad-request", f"cannot read the request: {key} is missing or no text")
    return value


def number_of(request: web.Request, key: str, default: float) -> float:
    """A number of the query, not below 0."""
    try:
        return min(max(float(request.query.get(key, default)), 0.0), 2.0**62)
    except ValueError as error:
        raise MeshgpuError("bad-request", f"cannot read the request: {key} is no number") from error


def selection_of(request: web.Request) -> LogSelection:
    """Which part of a log is asked for: `lines`, `since` (Unix time in seconds), `stream`."""
    stream = request.query.get("stream")
    if stream not in (None, *LogStream):
        raise MeshgpuError("bad-request", f"cannot read the request: there is no stream {stream!r}")
    lines = int(number_of(request, "lines", 0)) if "lines" in request.query else None
    return LogSelection(lines, number_of(request, "since", 0.0), LogStream(stream) if stream else None)


def texts_of(body: Mapping[str, Any], key: str) -> list[str]:
    value = body.get(key, [])
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise MeshgpuError("bad-request", f"cannot read the request: {key} is no list of texts")
    return value


def whole_of(body: Mapping[str, Any], key: str) -> int:
    value = body.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MeshgpuError("bad-request", f"cannot read the request: {key} is no whole number from 0")
    return value


def role_of(body: Mapping[str, Any]) -> Role:
    """The role that a machine is to get; a rig's where nothing is said."""
    role = body.get("role", Role.RIG.value)
    if role not in list(Role):
        raise MeshgpuError("bad-request", f"there is no role {role!r}: expected rig, submitter or viewer")
    return Role(role)


def draft_of(body: Mapping[str, Any], tree: Digest, manifest: Manifest) -> Draft:
    """A job or a sweep as it was asked for; its tree is here."""
    gpus = body.get("gpus")
    cpus, memory_bytes = whole_of(body, "cpus"), whole_of(body, "memory_bytes")
    on = join(str(body.get("on", "")), str(body.get("not_on", "")))
    env = body.get("env", {})
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise MeshgpuError("bad-request", "cannot submit: env is no object of texts")
    command = tuple(texts_of(body, "command"))
    if not command:
        raise MeshgpuError("bad-request", "cannot submit: there is no command", "meshgpu run -- python train.py")
    return Draft(
        as_name(text_of(body, "name"), "job"),
        command,
        body.get("shell") is True,
        tuple(sorted(env.items())),
        EnvironmentRequest(
            tuple(texts_of(body, "pip")), str(body.get("requirements", "")), body.get("from_project") is not False
        ),
        tree,
        manifest.size_bytes,
        len(manifest.files),
        str(body.get("machine", "")),
        Resources(parse_gpus(str(gpus)), cpus, memory_bytes, on) if gpus is not None else None,
        cpus,
        memory_bytes,
        str(body.get("image", "")),
        _cloud(body),
        whole_of(body, "retries"),
        _space(body),
        _objective(body),
        tuple(sorted(secrets_of(body))),
        body.get("shared") is True,
        on,
        _priority(body),
        body.get("preemptible") is True,
        _limit_of(body, "timeout_s"),
        _moment_of(body, "start_by"),
    )


def _limit_of(body: Mapping[str, Any], key: str) -> float | None:
    """A span of a job's time, None where nothing is said."""
    seconds = body.get(key)
    if seconds is None:
        return None
    if type(seconds) not in (int, float) or not 0 < seconds <= SPAN_LIMIT_S:
        raise MeshgpuError(
            "bad-request", f"cannot submit: {key} is {seconds!r}, expected more than 0 and at most {SPAN_LIMIT_S} s"
        )
    return float(seconds)


def _moment_of(body: Mapping[str, Any], key: str) -> float | None:
    """Unix time, None where nothing is said."""
    moment = body.get(key)
    if moment is not None and (type(moment) not in (int, float) or not 0 <= moment <= MOMENT_LIMIT):
        raise MeshgpuError("bad-request", f"cannot submit: {key} is {moment!r}, expected Unix time in seconds")
    return None if moment is None else float(moment)


def secrets_of(body: Mapping[str, Any]) -> Mapping[str, str]:
    """{name: value} of a job's secrets. An error about them shows none of the values."""
    asked = body.get("secrets", {})
    if not isinstance(asked, dict) or not all(isinstance(value, str) for value in asked.values()):
        raise MeshgpuError("bad-request", "cannot submit: secrets is no object of texts")
    return checked(asked)


def _cloud(body: Mapping[str, Any]) -> CloudUse | None:
    text = body.get("cloud")
    if text is not None and text not in list(CloudUse):
        raise MeshgpuError("bad-request", f"cannot submit: cloud is {text!r}, expected never, ok or only")
    return None if text is None else CloudUse(text)


def _priority(body: Mapping[str, Any]) -> Priority:
    text = body.get("priority") or Priority.NORMAL.value
    if text not in list(Priority):
        raise MeshgpuError("bad-request", f"cannot submit: priority is {text!r}, expected low, normal or high")
    return Priority(text)


def _space(body: Mapping[str, Any]) -> Space | None:
    """The space of a sweep, as the command line tells it; None for a job of its own. trials: 0 for a whole grid."""
    asked = body.get("sweep")
    if asked is None:
        return None
    if not isinstance(asked, dict) or asked.get("method") not in list(Method):
        raise MeshgpuError("bad-request", "cannot sweep: expected the method grid or random", "meshgpu sweep --help")
    params = tuple(parse_param(text) for text in texts_of(asked, "params"))
    trials, parallel = whole_of(asked, "trials"), whole_of(asked, "parallel")
    return Space(Method(asked["method"]), params, trials or grid_size(params), parallel, whole_of(asked, "seed"))


def _objective(body: Mapping[str, Any]) -> Objective | None:
    if not body.get("metric"):
        return None
    objective = parse_objective(text_of(body, "metric"), str(body.get("metric_pattern", "")))
    if objective.pattern:
        compile_pattern(objective.pattern)
    return objective


def settings_of(body: Mapping[str, Any]) -> BurstSettings:
    """How this machine is to rent."""
    asked, caps = body.get("settings"), None
    if isinstance(asked, dict):
        caps = asked.get("caps")
    if not isinstance(asked, dict) or not isinstance(caps, dict):
        raise MeshgpuError("bad-request", "cannot set up renting: settings or their caps are missing")
    instances = whole_of(caps, "instances")
    if instances > INSTANCES_LIMIT:
        raise MeshgpuError("bad-request", f"cannot rent {instances} instances: at most {INSTANCES_LIMIT}")
    types = tuple(_ec2_name("instance_types", name) for name in texts_of(asked, "instance_types"))
    if not types:
        raise MeshgpuError("bad-request", "cannot rent: there is no instance type", "--instance-type g6.xlarge")
    return BurstSettings(
        _ec2_name("region", text_of(asked, "region")),
        Caps(
            _amount_of(caps, "usd_per_hour"),
            _amount_of(caps, "usd_per_day"),
            _amount_of(caps, "usd_per_month"),
            _amount_of(caps, "usd_per_job"),
            instances,
            caps.get("on_demand") is True,
            _span_of(caps, "lease_s"),
        ),
        tuple(dict.fromkeys(types)),
        _amount_of(asked, "burst_after_s"),
        _span_of(asked, "idle_s"),
        _span_of(asked, "no_contact_s"),
        _ec2_name("image", text_of(asked, "image")),
        _ec2_name("security_group", text_of(asked, "security_group")),
        _install_of(asked),
    )


def _amount_of(body: Mapping[str, Any], key: str) -> float:
    value = body.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= AMOUNT_LIMIT:
        raise MeshgpuError("bad-request", f"cannot rent: {key} is {value!r}, expected a number from 0")
    return float(value)


def _span_of(body: Mapping[str, Any], key: str) -> float:
    seconds = _amount_of(body, key)
    if seconds == 0:
        raise MeshgpuError("bad-request", f"cannot rent: {key} is no time at all")
    return seconds


def _ec2_name(what: str, text: str) -> str:
    if not re.fullmatch(SETTING_NAMES[what], text):
        raise MeshgpuError(
            "bad-request", f"cannot rent: {text!r} is no {what.replace('_', ' ').removesuffix('s')} of EC2"
        )
    return text


def _install_of(asked: Mapping[str, Any]) -> str:
    install = text_of(asked, "install").strip()
    size_bytes = len(install.encode(errors="replace"))
    if not install or size_bytes > INSTALL_BYTES or not install.replace("\n", "").replace("\t", "").isprintable():
        raise MeshgpuError(
            "bad-request",
            f"cannot rent: install has {size_bytes} bytes, expected a shell command of 1 to {INSTALL_BYTES}",
        )
    return install
