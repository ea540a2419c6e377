"""Executor port over a container engine: the job runs in a container of its image, under a guard like any other."""

import asyncio
import contextlib
import json
import os
import pwd
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from meshgpu import container
from meshgpu.adapters import fences, guards, inside, results
from meshgpu.adapters.guarded import KEEP_LOG, STOP_GRACE_S, Attempt, GuardedExecutor, Unseal, nothing_sealed
from meshgpu.container import Note
from meshgpu.errors import MeshgpuError
from meshgpu.guard import ExitRecord, LedgerBounds, Request
from meshgpu.model.doctor import EngineFacts
from meshgpu.model.ids import NodeId
from meshgpu.model.job import AttemptPlan, AttemptState, Phase
from meshgpu.model.resources import GB

LIBRARY: Final = Path("/meshgpu")
"""Where a container finds the module through which jobs report numbers."""
WORK: Final = "/work"
"""Where the job's tree lies inside, and the only thing of the machine that is there."""
NODE_LABEL, JOB_LABEL, EPOCH_LABEL = "meshgpu.node", "meshgpu.job", "meshgpu.epoch"
NODE_CHARACTERS: Final = 12
"""Of the node's id in a container's name: two agents of one computer share its engine."""
PROCESS_LIMIT: Final = 16_384
"""Threads count: a loader with many workers on a large machine needs thousands, a fork bomb more than these."""
LEAST_SHM_BYTES: Final = GB
"""An engine's own 64 MB are too few for PyTorch's loaders. Above this, an eighth of main memory for each GPU."""
SHM_SHARE: Final = 8
ENGINE_LIMIT_S: Final = 60.0
"""For one answer; while an image is pulled, for one line of progress."""
DOOR_LIMIT_S: Final = 5.0
PROGRESS_PAUSE_S: Final = 1.0
CLEAR_PAUSE_S: Final = 5.0
"""Between two tries to remove a container that still runs while its engine does not answer."""
CDI_KIND: Final = "nvidia.com/gpu"
"""Both what a CDI specification calls its devices, and how one is named: `nvidia.com/gpu=GPU-…`."""
TAKE_SECRETS: Final = ("sh", "-c", 'eval "$(cat)"; exec "$@" </dev/null', "meshgpu")
"""Reads variables at its stdin, then becomes the command: a job with secrets needs an image that has `sh` and `cat`."""
_OK: Final = 200
_NAME_TAKEN: Final = 409


class DockerExecutor(GuardedExecutor):
    """Runs attempts in containers that carry the labels node, job and epoch. The engine is looked for when needed.

    engine: its Unix socket; DOCKER_HOST or the usual places where it is not given. grace_s: between SIGTERM and
    SIGKILL of a stop.
    """

    def __init__(
        self,
        jobs_dir: Path,
        node: NodeId,
        *,
        engine: Path | None = None,
        grace_s: float = STOP_GRACE_S,
        unseal: Unseal = nothing_sealed,
        ledger: LedgerBounds = KEEP_LOG,
    ) -> None:
        super().__init__(jobs_dir, unseal, ledger)
        self._node = node
        self._engine = engine
        self._grace_s = grace_s

    def fence(self) -> str:
        """Every container is shut in; whether other users' jobs are welcome is not for the engine to say."""
        return ""

    def guards(self) -> frozenset[int]:
        """Pids of live guards and of their containers' first processes, which the engine starts, not a guard."""
        live = [directory for directory, record in self._guards.items() if guards.is_alive(record)]
        notes = [_read_note(directory) for directory in live]
        return super().guards() | {note["pid"] for note in notes if note and note["pid"]}

    async def _stage(self, attempt: Attempt) -> Request:
        path = self._engine or find_engine()
        stopping = threading.Event()
        loop = asyncio.get_running_loop()

        def tell(detail: str) -> None:
            loop.call_soon_threadsafe(self._progress, attempt, Phase.STAGING, detail)

        name = self._name(attempt.plan)
        making = loop.run_in_executor(None, self._make, path, attempt, name, tell, stopping)
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            stopping.set()  # a thread cannot be cancelled, and what it is making must not be left
            await asyncio.gather(making, return_exceptions=True)
            await asyncio.to_thread(container.Engine(str(path)).remove, name)
            raise
        return _request(attempt, path, name, self._grace_s, self._ledger)

    def _make(
        self, path: Path, attempt: Attempt, name: str, tell: Callable[[str], None], stopping: threading.Event
    ) -> None:
        """Have the image here and the container made, not started. Blocks."""
        with _connected(path) as client:
            image = _find_image(client, attempt.plan.image, tell, stopping)
            facts = client.info()
            if attempt.plan.fenced and os.geteuid() == 0:
                fences.give_away(attempt.work)
            results.note_inputs(attempt.directory)
            results.note_staged(attempt.directory, image=image)
            settings = {
                **_settings(attempt, facts),
                "name": name,
                "labels": {
                    NODE_LABEL: self._node,
                    JOB_LABEL: attempt.plan.spec.job,
                    EPOCH_LABEL: str(attempt.plan.epoch),
                },
            }
            _create(client, path, image, settings)

    def containers(self) -> frozenset[str]:
        """Ids of the containers that run."""
        notes = [_read_note(directory) for directory in self._guards]
        return frozenset(note["container"] for note in notes if note and note["container"])

    def _name(self, plan: AttemptPlan) -> str:
        return f"meshgpu-{self._node[:NODE_CHARACTERS]}-{plan.spec.job}-{plan.epoch}"

    def _entrust(self, attempt: Attempt, request: Request, secrets: Mapping[str, str]) -> Request:  # noqa: ARG002
        """At the stdin of what runs the container, which hands it on; `docker inspect` shows none of it."""
        return {**request, "given": fences.exports(secrets)}

    async def _clear(self, attempt: Attempt, exited: ExitRecord | None) -> None:
        """Remove the container. While its engine does not answer and it still runs, the attempt has not ended."""
        if exited is None:
            await asyncio.to_thread(guards.kill_leftovers, attempt.work)
        try:
            engine = container.Engine(str(self._engine or find_engine()))
        except MeshgpuError:
            return
        while not await asyncio.to_thread(engine.remove, self._name(attempt.plan), 0.0):
            if not _still_runs(_read_note(attempt.directory)):
                return
            await asyncio.sleep(CLEAR_PAUSE_S)

    def _verdict(self, attempt: Attempt, exited: ExitRecord) -> tuple[AttemptState, str]:
        outcome, reason = super()._verdict(attempt, exited)
        note = _read_note(attempt.directory)
        if note and note["is_crash"] and exited["stopped_by"] is None:
            return AttemptState.CRASHED, note["reason"]
        return outcome, reason or (note["reason"] if note else "")


def _request(attempt: Attempt, engine: Path, name: str, grace_s: float, ledger: LedgerBounds) -> Request:
    run = [sys.executable, "-I", "-S", "-X", "utf8", container.__file__, str(engine)]
    return Request(
        directory=str(attempt.directory),
        work=str(attempt.directory),
        argv=[*run, "run", name, str(_note_path(attempt.directory))],
        env={"MESHGPU_OUTPUT_DIR": str(attempt.work)},  # by which what a killed guard leaves is found
        grace_s=grace_s,
        own_shm=False,
        enclosed=False,
        after=[*run, "remove", name],
        given="",
        timeout_s=attempt.plan.spec.timeout_s,
        ledger=ledger,
    )


# -- what a container left -------------------------------------------------------------------------------------------


def _note_path(directory: Path) -> Path:
    return directory / "container.json"


def _read_note(directory: Path) -> Note | None:
    try:
        note: Note = json.loads(_note_path(directory).read_bytes())
    except FileNotFoundError:
        return None
    return note


def _still_runs(note: Note | None) -> bool:
    """Whether the container's first process lives, told by its control group: numbers are used again."""
    if note is None or not note["pid"]:
        return False
    with contextlib.suppress(OSError):
        return note["container"] in Path(f"/proc/{note['pid']}/cgroup").read_text()
    return False


# -- the engine ------------------------------------------------------------------------------------------------------


def find_engine(environment: Mapping[str, str] = os.environ) -> Path:
    """The engine's socket: DOCKER_HOST, else root's, else this account's own. Raises MeshgpuError `no-engine`."""
    host = environment.get("DOCKER_HOST", "")
    if host and not host.startswith("unix://"):
        raise MeshgpuError(
            "no-engine",
            f"cannot run a container at {host}: the job's files lie here, so the engine must, too",
            "unset DOCKER_HOST",
        )
    if host:
        return Path(host.removeprefix("unix://"))
    usual = Path("/var/run/docker.sock")
    own = Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "docker.sock"
    return own if own.exists() and not os.access(usual, os.W_OK) else usual


def examine_engine() -> EngineFacts:
    """The engine as it is now, and whether it can hand out GPUs. Blocks; does without the library of 10 MB."""
    try:
        path = find_engine()
        if not path.exists():
            return EngineFacts()
        _knock(path)
        status, body = container.Engine(str(path)).call("GET", "/info")
        facts = json.loads(body)
        if status != _OK:
            return EngineFacts(fault=f"the engine at {path} says: {facts.get('message')}", remedy="docker info")
    except MeshgpuError as error:
        return EngineFacts(fault=error.message, remedy=error.hint)
    except (OSError, ValueError) as error:
        return EngineFacts(fault=f"the container engine does not answer: {error}", remedy="docker info")
    return EngineFacts(str(facts.get("ServerVersion", "?")), gives_gpus=gives_gpus(facts))


def gives_gpus(facts: Mapping[str, Any]) -> bool:
    """Whether the engine that says this of itself (`GET /info`) has a way to hand out GPUs."""
    return _knows_cdi(facts) or "nvidia" in (facts.get("Runtimes") or ())


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[Any]:
    """A client of the engine at `path`; its failures leave as MeshgpuError."""
    _knock(path)
    import docker  # 10 MB, which machines that run no container do not pay
    import requests

    try:
        client = docker.DockerClient(base_url=f"unix://{path}", timeout=ENGINE_LIMIT_S)
        try:
            yield client
        finally:
            client.close()
    except (docker.errors.DockerException, requests.RequestException) as error:
        said = getattr(error, "explanation", None) or str(error)
        raise MeshgpuError("engine", f"cannot make the container: the engine at {path} says: {said}") from error


def _knock(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DOOR_LIMIT_S)
        try:
            client.connect(str(path))
        except PermissionError as error:
            account = pwd.getpwuid(os.geteuid()).pw_name
            raise MeshgpuError(
                "no-engine",
                f"cannot run a container: {account} may not use the engine at {path}",
                f"usermod -aG docker {account}, then start the agent anew",
            ) from error
        except OSError as error:
            raise MeshgpuError(
                "no-engine",
                f"cannot run a container: no engine answers at {path} ({error.strerror or error})",
                "apt install docker.io",
            ) from error


def _create(client: Any, path: Path, image: str, settings: dict[str, Any]) -> None:
    """Make the container; one of the same name was left by an agent that died while it staged this attempt."""
    from docker.errors import APIError

    try:
        client.containers.create(image, **settings)
    except APIError as error:
        if error.status_code != _NAME_TAKEN:
            raise
        container.Engine(str(path)).remove(settings["name"])
        client.containers.create(image, **settings)


# -- image -----------------------------------------------------------------------------------------------------------


def _find_image(client: Any, name: str, tell: Callable[[str], None], stopping: threading.Event) -> str:
    """Id of the image, pulled where it is not here. Raises MeshgpuError `image` where it cannot be had."""
    from docker.errors import ImageNotFound

    try:
        image = client.images.get(name)
        tell(f"image {name} (cached)")
    except ImageNotFound:
        _pull(client, name, tell, stopping)
        image = client.images.get(name)
    return str(image.id)


def _pull(client: Any, name: str, tell: Callable[[str], None], stopping: threading.Event) -> None:
    from docker.errors import APIError
    from docker.utils import parse_repository_tag

    repository, tag = parse_repository_tag(name)
    tell(f"pulling {name}")
    sizes: dict[str, tuple[int, int]] = {}
    told = time.monotonic()
    try:
        for line in client.api.pull(repository, tag=tag or "latest", stream=True, decode=True):
            if stopping.is_set():
                return
            if "error" in line:
                raise _no_image(name, line["error"])
            facts = line.get("progressDetail") or {}
            if line.get("status") == "Downloading" and "total" in facts:
                sizes[line["id"]] = (facts["current"], facts["total"])
            if sizes and time.monotonic() - told >= PROGRESS_PAUSE_S:
                told = time.monotonic()
                done, total = (sum(pair[index] for pair in sizes.values()) / GB for index in (0, 1))
                tell(f"pulling {name}: {done:.1f} of {total:.1f} GB")
    except APIError as error:
        raise _no_image(name, error.explanation or str(error)) from error


def _no_image(name: str, found: str) -> MeshgpuError:
    return MeshgpuError("image", f"cannot run in {name}: no such image here, and pulling it failed: {found}")


# -- settings --------------------------------------------------------------------------------------------------------


def _settings(attempt: Attempt, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine is asked for, besides image, name and labels. facts: what it says of itself."""
    from docker.types import LogConfig, Mount

    plan = attempt.plan
    argv = ["sh", "-c", plan.spec.command[0]] if plan.spec.shell else [*plan.spec.command]
    takes_secrets = plan.spec.secrets is not None
    if takes_secrets:
        argv = [*TAKE_SECRETS, *argv]
    owner = attempt.work.stat()
    # Without root of its own, the engine's uid 0 is this very account.
    user = "0:0" if "name=rootless" in (facts.get("SecurityOptions") or ()) else f"{owner.st_uid}:{owner.st_gid}"
    limit = plan.spec.resources.memory_bytes
    requests = [] if not plan.gpus else [_gpu_request(facts, [share.uuid for share in plan.gpus])]
    return {
        "entrypoint": argv[:1],  # the command is what runs, whatever the image would begin with
        "command": argv[1:],
        "environment": _variables(attempt, requests),
        "working_dir": WORK,
        "mounts": [
            Mount(WORK, str(attempt.work), type="bind"),
            Mount(str(LIBRARY), str(inside.LIBRARY), type="bind", read_only=True),
        ],
        "user": user,
        "init": True,
        "stdin_open": takes_secrets,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "network_mode": "bridge",
        "pids_limit": PROCESS_LIMIT,
        "shm_size": max(LEAST_SHM_BYTES, int(facts.get("MemTotal", 0)) // SHM_SHARE * len(plan.gpus)),
        "log_config": LogConfig(type="none"),
        "healthcheck": {"test": ["NONE"]},
        "device_requests": requests,
        **({"mem_limit": limit, "memswap_limit": limit} if limit else {}),
    }


def _gpu_request(facts: Mapping[str, Any], uuids: Sequence[str]) -> Any:
    """These GPUs, asked for in a way that the engine knows. Raises MeshgpuError `no-gpu-runtime` where it has none."""
    from docker.types import DeviceRequest

    if _knows_cdi(facts):
        return DeviceRequest(driver="cdi", device_ids=[f"{CDI_KIND}={uuid}" for uuid in uuids])
    if "nvidia" in (facts.get("Runtimes") or ()):
        return DeviceRequest(driver="nvidia", device_ids=[*uuids], capabilities=[["gpu", "compute", "utility"]])
    raise MeshgpuError(
        "no-gpu-runtime",
        "cannot give a container the GPUs of this machine: its engine has no NVIDIA runtime",
        "apt install nvidia-container-toolkit; nvidia-ctk runtime configure; systemctl restart docker",
    )


def _knows_cdi(facts: Mapping[str, Any]) -> bool:
    """Whether the engine takes CDI devices and NVIDIA's toolkit has described the GPUs to it."""
    devices = [str(device.get("ID", "")) for device in facts.get("DiscoveredDevices") or ()]
    if any(device.startswith(CDI_KIND) for device in devices):
        return True
    for directory in facts.get("CDISpecDirs") or ():
        for path in Path(directory).glob("*.[jy][sa][om]*"):
            with contextlib.suppress(OSError):
                if CDI_KIND in path.read_text(errors="replace"):
                    return True
    return False


def _variables(attempt: Attempt, requests: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    plan = attempt.plan
    asked = dict(plan.spec.env)
    gpus = ",".join(share.uuid for share in plan.gpus)
    by_runtime = any(request["Driver"] == "nvidia" for request in requests)
    return {
        "HOME": "/tmp",  # noqa: S108 - the container's own; the image need not know this account
        "USER": "meshgpu",
        **asked,
        **inside.variables(LIBRARY, Path(WORK), asked),
        "MESHGPU_JOB_ID": plan.spec.job,
        "MESHGPU_MACHINE": plan.machine,
        "MESHGPU_OUTPUT_DIR": WORK,
        "CUDA_VISIBLE_DEVICES": gpus,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "NVIDIA_VISIBLE_DEVICES": gpus if by_runtime else "void",  # images say `all`, which a default runtime obeys
        "PYTHONUNBUFFERED": "1",
        "TINI_KILL_PROCESS_GROUP": "1",  # a stop reaches all of `sh -c`, as it does without a container
    }
