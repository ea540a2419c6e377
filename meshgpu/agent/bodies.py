"""What the command line asks for: JSON bodies of the control API become values.

Everything here raises MeshgpuError `bad-request` for what makes no sense.
"""

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from meshgpu.adapters.metrics import compile_pattern
from meshgpu.core.sweep import grid_size
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest, as_name
from meshgpu.model.job import CloudUse, Draft, EnvironmentRequest
from meshgpu.model.resources import Resources, parse_gpus
from meshgpu.model.sweep import Method, Objective, Space, parse_objective, parse_param
from meshgpu.model.tree import Manifest


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


def draft_of(body: Mapping[str, Any], tree: Digest, manifest: Manifest) -> Draft:
    """A job or a sweep as it was asked for; its tree is here."""
    gpus = body.get("gpus")
    cpus, memory_bytes = whole_of(body, "cpus"), whole_of(body, "memory_bytes")
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
        Resources(parse_gpus(str(gpus)), cpus, memory_bytes) if gpus is not None else None,
        cpus,
        memory_bytes,
        str(body.get("image", "")),
        _cloud(body),
        whole_of(body, "retries"),
        _space(body),
        _objective(body),
    )


def _cloud(body: Mapping[str, Any]) -> CloudUse | None:
    text = body.get("cloud")
    if text is not None and text not in list(CloudUse):
        raise MeshgpuError("bad-request", f"cannot submit: cloud is {text!r}, expected never, ok or only")
    return None if text is None else CloudUse(text)


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
