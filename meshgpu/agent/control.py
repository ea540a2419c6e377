"""The control API: HTTP and JSON on a Unix socket, each call authorised by the kernel's word on who is calling."""

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from meshgpu.adapters.log_search import select
from meshgpu.agent.admins import Admins
from meshgpu.agent.audit import AuditTrail
from meshgpu.agent.bodies import (
    draft_of,
    number_of,
    read_body,
    role_of,
    secrets_of,
    selection_of,
    settings_of,
    text_of,
    texts_of,
    whole_of,
)
from meshgpu.agent.callers import descends_from
from meshgpu.agent.comparing import Comparing
from meshgpu.agent.doctor import Doctor
from meshgpu.agent.evidence_control import EvidenceControl
from meshgpu.agent.jobs import Found, Jobs, OutOfTouch, Printed, Source, Tail, Tell, Told, source_of
from meshgpu.agent.ndjson import error_document, stream, write
from meshgpu.agent.pairing import Pairing
from meshgpu.agent.pairing_control import PairingControl
from meshgpu.agent.receipts import Receipts
from meshgpu.agent.rekeying import Rekeying
from meshgpu.agent.status import Status
from meshgpu.agent.trust_control import TrustControl
from meshgpu.agent.views import (
    Document,
    JobDocuments,
    burst_document,
    machine_document,
    plan_document,
    verdict_document,
)
from meshgpu.config import DEFAULT_PAIRING_PORT, host_of, with_port
from meshgpu.core import events as ev
from meshgpu.core.trust.joining import INVITE_LIFE_S
from meshgpu.errors import HTTP_STATUS, MeshgpuError, TrustError
from meshgpu.model.cloud import BurstSettings, InstanceState
from meshgpu.model.ids import Digest, KeyId, as_name, display_name
from meshgpu.model.job import Draft, Register, StopMode
from meshgpu.model.lending import Pause
from meshgpu.model.logs import LogGap, LogPiece, LogSelection
from meshgpu.model.tree import CHUNK_BYTES, MANIFEST_LIMIT_BYTES, Manifest
from meshgpu.ports import ChunkStore, PairingDialog

KEEPALIVE_S: Final = 15.0
"""A followed job says something at least this often, so that a client can tell silence from a dead agent."""

PAUSE_LIMIT_S: Final = 366 * 86_400
"""A longer pause is one without an end."""

CLOCK_HEADER: Final = "Meshgpu-Clock"
"""Names the header that tells whose clock differs from this machine's: {"machine", "ahead_s"} in JSON."""

UNKNOWN_STATUS: Final = 422
"""For errors whose code is not in the table of HTTP statuses."""

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
Dial = Callable[[Any], Awaitable[PairingDialog]]


@dataclass(slots=True)
class Control:
    """Serves local users. Everything it does goes through the rooms it is handed."""

    status: Status
    jobs: Jobs
    pairing: Pairing
    admins: Admins
    rekeying: Rekeying
    chunks: ChunkStore
    dial_pairing: Dial
    guards: Callable[[], frozenset[int]]
    settle: Callable[[ev.Event], Awaitable[None]]
    stop_agent: Callable[[], None]
    tasks: asyncio.TaskGroup
    audit: AuditTrail
    doctor: Doctor

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guarded], client_max_size=MANIFEST_LIMIT_BYTES)
        app.add_routes(
            [
                web.get("/v1/agent", self._agent),
                web.post("/v1/init", self._init),
                web.post("/v1/invites", self._invite),
                web.post("/v1/join", self._join),
                web.get("/v1/discover", self._discover),
                web.get("/v1/machines", self._machines),
                web.get("/v1/doctor", self._doctor),
                web.post("/v1/down", self._down),
                web.post("/v1/pause", self._pause),
                web.post("/v1/resume", self._resume),
                web.get("/v1/burst", self._burst),
                web.post("/v1/burst", self._set_up_burst),
                web.get("/v1/burst/plan", self._burst_plan),
                web.post("/v1/trees", self._put_tree),
                web.put("/v1/chunks", self._put_chunk),
                web.post("/v1/jobs", self._submit),
                web.get("/v1/jobs", self._list),
                web.get("/v1/jobs/{job}", self._job),
                web.get("/v1/jobs/{job}/why", self._why),
                web.get("/v1/sweeps/{job}", self._sweep),
                web.get("/v1/jobs/{job}/events", self._events),
                web.post("/v1/jobs/{job}/stop", self._stop),
                web.get("/v1/jobs/{job}/files", self._files),
                web.get("/v1/jobs/{job}/files/{path:.+}", self._file),
                *PairingControl(
                    Comparing(self.pairing), self.status, self.dial_pairing, self._uid, self._check_own
                ).routes(),
                *EvidenceControl(
                    self.audit, Receipts(self.status.node, self.jobs), self._key, self._check_own
                ).routes(),
                *TrustControl(self.admins, self.rekeying, self._uid, self._check_own, self.stop_agent).routes(),
            ]
        )
        return app

    # -- who calls ----------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Answer) -> web.StreamResponse:
        """Turn errors into answers, and refuse every process that a job started."""
        try:
            pid, _ = _peer(request)
            if descends_from(pid, self.guards()):
                raise TrustError("not-allowed", "cannot obey a job: the control socket is for people")
            response = await handler(request)
            if not response.prepared:
                response.headers.update(self._clock_header())
            return response
        except MeshgpuError as error:
            status = HTTP_STATUS.get(error.code, UNKNOWN_STATUS)
            return web.json_response({"error": error_document(error)}, status=status)

    def _clock_header(self) -> dict[str, str]:
        """Tells that clocks differ, where they did in the last exchange with other machines."""
        gap = self._clock_document()
        return {CLOCK_HEADER: json.dumps(gap)} if gap else {}

    def _clock_document(self) -> Document | None:
        gap = self.jobs.clock_gap
        member = self.status.node.log.members.get(gap.member) if gap else None
        return {"machine": member.name, "ahead_s": gap.ahead_s} if gap and member else None

    def _uid(self, request: web.Request) -> int:
        """The OS account that calls; root may act for the account that runs the agent."""
        _, uid = _peer(request)
        own = os.geteuid()
        return own if uid == 0 else uid

    def _key(self, request: web.Request) -> KeyId:
        """The key that speaks for the caller. Raises `not-in-mesh` or `not-allowed`."""
        return self.status.account(self._uid(request)).key

    def _check_own(self, request: web.Request, what: str) -> int:
        uid = self._uid(request)
        if uid != os.geteuid():
            raise TrustError("not-allowed", f"cannot {what}: only the account that runs this agent may")
        return uid

    # -- the agent and its mesh ---------------------------------------------------------------------------------------

    async def _agent(self, request: web.Request) -> web.Response:
        return web.json_response(self.status.agent(self._uid(request)))

    async def _init(self, request: web.Request) -> web.Response:
        uid = self._check_own(request, "make a mesh")
        body = await read_body(request)
        mesh, name, user = (text_of(body, key) for key in ("mesh", "name", "user"))
        founded = await self.pairing.found(uid, mesh, name, as_name(user, "owner"))
        document = self.status.agent(uid)
        return web.json_response(
            {
                "mesh": founded.mesh_name,
                "name": name,
                "node": document["node"],
                "user": document["user"],
                "recovery_key": founded.recovery_key,
            }
        )

    async def _invite(self, request: web.Request) -> web.Response:
        """user: whose the machines will be, null: the caller's. role, uses, life_s: as `joining.Grant`."""
        body = await read_body(request)
        user, life_s = body.get("user"), body.get("life_s", INVITE_LIFE_S)
        if user is not None and not isinstance(user, str):
            raise MeshgpuError("bad-request", "cannot invite: the user's name is no text")
        if type(life_s) not in (int, float):
            raise MeshgpuError("bad-request", "cannot invite: life_s is no number")
        uses = whole_of(body, "uses") if "uses" in body else 1
        text, invite = await self.pairing.invite(self._uid(request), user, role_of(body), uses, life_s)
        return web.json_response(
            {
                "invite": text,
                "expires_at": invite.expires_wall_s,
                "user": invite.user,
                "role": invite.role.value,
                "uses": invite.uses,
            }
        )

    async def _join(self, request: web.Request) -> web.Response:
        uid = self._check_own(request, "join a mesh")
        body = await read_body(request)
        seeds = texts_of(body, "seeds")
        pairing_hosts = [with_port(host_of(seed), DEFAULT_PAIRING_PORT) for seed in seeds]
        joined = await self.pairing.join(
            uid, text_of(body, "invite"), text_of(body, "name"), pairing_hosts, self.dial_pairing
        )
        me = self.status.agent(uid)
        return web.json_response(
            {
                "mesh": joined.mesh_name,
                "name": joined.name,
                "node": me["node"],
                "user": joined.user,
                "inviter": joined.inviter,
                "role": joined.role.value,
                "fence": me["fence"],
                "gpus": self.status.gpu_names(),
            }
        )

    async def _discover(self, request: web.Request) -> web.Response:
        seconds = min(number_of(request, "seconds", 1.5), 30.0)
        return web.json_response({"machines": await self.status.discover(seconds)})

    async def _machines(self, request: web.Request) -> web.Response:
        self._key(request)
        views = self.status.node.machines(self.status.clock.now())
        return web.json_response({"machines": [machine_document(view) for view in views]})

    async def _doctor(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({"checks": await self.doctor.findings()})

    async def _down(self, request: web.Request) -> web.Response:
        self._check_own(request, "stop the agent")
        asyncio.get_running_loop().call_later(0.05, self.stop_agent)
        return web.json_response({})

    async def _pause(self, request: web.Request) -> web.Response:
        """Lend nothing; seconds: for how long, null without end. let_run: what runs may end by itself."""
        self._check_own(request, "pause the lending")
        body = await read_body(request)
        seconds = body.get("seconds")
        if not (seconds is None or (type(seconds) in (int, float) and 0 < seconds <= PAUSE_LIMIT_S)):
            raise MeshgpuError("bad-request", f"cannot pause for {seconds!r} s: expected up to {PAUSE_LIMIT_S}")
        until = None if seconds is None else self.status.clock.now().wall_s + seconds
        await self.settle(ev.LendingPaused(Pause(until, body.get("let_run") is True)))
        return web.json_response({"until": until})

    async def _resume(self, request: web.Request) -> web.Response:
        self._check_own(request, "lend again")
        await self.settle(ev.LendingResumed())
        return web.json_response({})

    # -- renting ------------------------------------------------------------------------------------------------------

    async def _burst(self, request: web.Request) -> web.Response:
        self._key(request)
        return web.json_response(burst_document(self.status.node, self.status.clock.now()))

    async def _set_up_burst(self, request: web.Request) -> web.Response:
        """Rent as the settings say from now on. check: only find out whether that may be."""
        uid = self._check_own(request, "let this machine rent")
        self._key(request)
        body = await read_body(request)
        settings = settings_of(body)
        self._check_region(settings)
        if body.get("check") is True:
            self.pairing.check_renting(uid)
        else:
            await self.pairing.let_rent(uid)
            await self.settle(ev.BurstConfigured(settings))
        return web.json_response(burst_document(self.status.node, self.status.clock.now()))

    def _check_region(self, settings: BurstSettings) -> None:
        """What lives in one region must be given back there."""
        status = self.status.node.burst.status(self.status.clock.now())
        if status is None or status.settings.region == settings.region:
            return
        before = status.settings
        if status.launches or any(i.state is not InstanceState.TERMINATED for i in status.instances):
            raise MeshgpuError(
                "bad-request",
                f"cannot rent in {settings.region} while instances of this mesh live in {before.region}",
                "meshgpu burst setup --instances 0, and again when `meshgpu burst status` shows none",
            )

    async def _burst_plan(self, request: web.Request) -> web.Response:
        self._key(request)
        now = self.status.clock.now()
        plans = [plan_document(plan, now) for plan in self.status.node.burst.plan(now)]
        return web.json_response(burst_document(self.status.node, now) | {"plans": plans})

    # -- jobs ---------------------------------------------------------------------------------------------------------

    async def _put_tree(self, request: web.Request) -> web.Response:
        self._key(request)
        data = await request.read()

        def keep() -> tuple[Digest, list[Digest]]:
            tree = self.chunks.put(data)
            return tree, self.chunks.missing(list(self.chunks.manifest(tree).chunks()))

        tree, missing = await asyncio.to_thread(keep)
        return web.json_response({"tree": tree, "missing": missing})

    async def _put_chunk(self, request: web.Request) -> web.Response:
        self._key(request)
        data = await request.read()
        if len(data) > CHUNK_BYTES:
            raise MeshgpuError(
                "bad-request", f"cannot keep a chunk of {len(data)} bytes: expected {CHUNK_BYTES} at most"
            )
        return web.json_response({"digest": await asyncio.to_thread(self.chunks.put, data)})

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        key = self._key(request)
        body = await read_body(request)
        draft, secrets = await self._draft(body), secrets_of(body)
        lines: asyncio.Queue[Document] = asyncio.Queue()

        def shipped(done_bytes: int, total_bytes: int) -> None:
            lines.put_nowait({"type": "shipping", "done_bytes": done_bytes, "total_bytes": total_bytes})

        async def submit() -> None:
            try:
                view = await self.jobs.submit(key, draft, secrets, shipped)
                document = self._document(Found(view, display_name(view.spec.name, view.spec.job)))
                lines.put_nowait({"type": "job", "job": document, "clock": self._clock_document()})
            except MeshgpuError as error:
                lines.put_nowait({"type": "error", "error": error_document(error)})

        submission = self.tasks.create_task(submit())
        try:
            response = await stream(request)
            while (line := await lines.get())["type"] == "shipping":
                await write(response, line)
            await write(response, line)
            await response.write_eof()
        finally:
            submission.cancel()
        return response

    async def _draft(self, body: Mapping[str, Any]) -> Draft:
        tree = Digest(text_of(body, "tree"))
        manifest: Manifest = await asyncio.to_thread(self.chunks.manifest, tree)
        missing = await asyncio.to_thread(self.chunks.missing, list(manifest.chunks()))
        if missing:
            raise MeshgpuError("missing-chunks", f"cannot submit: {len(missing)} chunks of the tree are not here yet")
        await asyncio.to_thread(self.chunks.sync)
        return draft_of(body, tree, manifest)

    async def _list(self, request: web.Request) -> web.Response:
        """The caller's jobs; finished ones with all=1, those that others share with users=1."""
        own, shared, silent = await self.jobs.visible(self._key(request))
        found = [*own, *(shared if request.query.get("users") == "1" else ())]
        if request.query.get("all") != "1":
            found = [job for job in found if not job.view.register.state.is_final]
        documents = JobDocuments(self.status.node, self.status.clock.now())
        names = [self.status.node.log.name_of(node) for node in silent]
        jobs = [documents.document(job.view, job.display) for job in found]
        return web.json_response({"jobs": jobs, "silent": sorted(names)})

    async def _job(self, request: web.Request) -> web.Response:
        found = await self.jobs.find(self._key(request), request.match_info["job"])
        return web.json_response({"job": self._document(found)})

    async def _why(self, request: web.Request) -> web.Response:
        found = await self.jobs.find(self._key(request), request.match_info["job"])
        verdicts = [verdict_document(verdict) for verdict in self.status.node.why(found.view.spec)]
        before = self.status.node.ahead_of(found.view)
        return web.json_response({"job": self._document(found), "machines": verdicts, "before": before})

    async def _sweep(self, request: web.Request) -> web.Response:
        """A sweep with its trials, by number."""
        sweep, trials, silent = await self.jobs.sweep(self._key(request), request.match_info["job"])
        documents = JobDocuments(self.status.node, self.status.clock.now())
        names = sorted(self.status.node.log.name_of(node) for node in silent)
        rows = [documents.document(job.view, job.display) for job in trials]
        return web.json_response(
            {"sweep": documents.document(sweep.view, sweep.display), "trials": rows, "silent": names}
        )

    async def _stop(self, request: web.Request) -> web.Response:
        key = self._key(request)
        mode = text_of(await read_body(request), "mode")
        if mode not in list(StopMode):
            raise MeshgpuError("bad-request", f"cannot stop with mode {mode!r}: expected stop or kill")
        found = await self.jobs.find_own(key, request.match_info["job"])
        view = await self.jobs.stop(key, found.view, StopMode(mode))
        return web.json_response({"job": self._document(Found(view, found.display))})

    async def _files(self, request: web.Request) -> web.Response:
        key = self._key(request)
        found = await self.jobs.find(key, request.match_info["job"])
        files = await self.jobs.files(key, found.view)
        return web.json_response({"files": [{"path": path, "size_bytes": size} for path, size in files]})

    async def _file(self, request: web.Request) -> web.StreamResponse:
        key = self._key(request)
        found = await self.jobs.find(key, request.match_info["job"])
        size, data = await self.jobs.file(key, found.view, request.match_info["path"])
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)})
        await response.prepare(request)
        async for part in data:
            await response.write(part)
        await response.write_eof()
        return response

    # -- following ----------------------------------------------------------------------------------------------------

    async def _events(self, request: web.Request) -> web.StreamResponse:
        key = self._key(request)
        found = await self.jobs.find(key, request.match_info["job"])
        position = int(number_of(request, "position", 0))
        logs, selection = request.query.get("logs", "1") == "1", selection_of(request)
        source = source_of(found.view.register)
        is_followed = request.query.get("follow", "1") == "1"
        if "attempt" in request.query:
            source = await self.jobs.attempt(key, found, int(number_of(request, "attempt", 0)))
            is_followed &= source.epoch == found.view.register.epoch
        response = await stream(request, self._clock_header())
        writing = asyncio.Lock()
        current = {"type": "job", "job": self._document(found)}
        await write(response, current)

        async def tell(item: Told) -> None:
            event = self._event(found, item)
            if event["type"] == "job":
                current.update(event)
            async with writing:
                await write(response, event)

        pulse = self.tasks.create_task(_pulse(response, writing, current))
        last: Document
        try:
            register = found.view.register
            if is_followed:
                register = await self.jobs.follow(key, found.view, position, tell, logs=logs, selection=selection)
            elif logs and source is not None:
                await self._tell_log(key, found, source, selection, tell)
            last = {"type": "end", "job": self._document(_with_register(found, register))}
        except MeshgpuError as error:
            last = {"type": "error", "error": error_document(error)}
        finally:
            pulse.cancel()
        await write(response, last)
        await response.write_eof()
        return response

    async def _tell_log(self, key: KeyId, found: Found, source: Source, selection: LogSelection, tell: Tell) -> None:
        """The log so far; where its machine is away, what that told others last."""
        has_begun = False
        try:
            async for printed in self.jobs.log(key, source, 0, follow=False, selection=selection):
                has_begun = True
                await tell(printed)
        except MeshgpuError as error:
            if error.code != "no-answer" or has_begun or source.epoch != found.view.register.epoch:
                raise
            if (tail := await self.jobs.tail(key, found.view)) is None:
                raise
            await tell(tail)
            for record in select(tail.records, selection):
                await tell(Printed(record, record.position))

    def _event(self, found: Found, item: Told) -> Document:
        match item:
            case Register():
                return {"type": "job", "job": self._document(_with_register(found, item))}
            case Printed(piece=piece, position=position):
                return {**_piece_document(piece), "position": position}
            case OutOfTouch(machine=machine, seconds=seconds):
                name = self.status.node.log.name_of(machine)
                return {"type": "out-of-touch", "machine": name, "seconds": seconds}
            case Tail(machine=machine, seconds=seconds, records=records):
                name = self.status.node.log.name_of(machine)
                size = sum(len(record.data) for record in records)
                return {"type": "tail", "machine": name, "seconds": seconds, "bytes": size}

    def _document(self, found: Found) -> Document:
        return JobDocuments(self.status.node, self.status.clock.now()).document(found.view, found.display)


async def serve(application: web.Application, path: Path) -> web.AppRunner:
    """Listen on a Unix socket that only this account can open; the caller cleans the runner up."""
    runner = web.AppRunner(
        application, handle_signals=False, access_log=None, shutdown_timeout=1.0, handler_cancellation=True
    )
    await runner.setup()
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        await web.UnixSite(runner, str(path)).start()
    finally:
        os.umask(mask)
    return runner


def _piece_document(piece: LogPiece) -> Document:
    if isinstance(piece, LogGap):
        return {"type": "dropped", "bytes": piece.size_bytes}
    text = piece.data.decode("utf-8", "surrogateescape")
    return {"type": "log", "stream": piece.stream.value, "at": piece.wall_s, "data": text}


def _with_register(found: Found, register: Register) -> Found:
    return Found(replace(found.view, register=register), found.display)


def _peer(request: web.Request) -> tuple[int, int]:
    """(pid, uid) of the calling process, by SO_PEERCRED."""
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None:
        raise TrustError("not-allowed", "cannot tell who calls: the connection is gone")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


async def _pulse(response: web.StreamResponse, writing: asyncio.Lock, current: Document) -> None:
    """Say again how the job stands, so that silence is told from a dead agent."""
    with contextlib.suppress(ConnectionError):  # the follower left; its handler ends by itself
        while True:
            await asyncio.sleep(KEEPALIVE_S)
            async with writing:
                await write(response, current)
