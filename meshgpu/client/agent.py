"""The control API's client: one method for each call of the agent."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final, Self, cast
from urllib.parse import quote, urlencode

from meshgpu.client.home import find_home, socket_path
from meshgpu.client.http import Answer, error_in, request
from meshgpu.client.views import (
    AdminsView,
    AdminView,
    AdmitEvent,
    AgentView,
    AuditEntryView,
    AuditVerdictView,
    BurstSettingsView,
    BurstView,
    ChecksView,
    CompareEvent,
    FileView,
    FollowEvent,
    FoundedView,
    InviteView,
    JobRequest,
    JobsView,
    JobView,
    JoinedView,
    LeftView,
    LogRequest,
    MachinesView,
    PlansView,
    ReceiptView,
    RenewedView,
    RevokedView,
    RoleView,
    SightingView,
    SubmitEvent,
    SweepView,
    TreeView,
    WhyView,
)
from meshgpu.errors import MeshgpuError

CALL_TIMEOUT_S: Final = 30.0
"""Longest silence within one call. The slowest, joining by invite, gives each of its exchanges 5 s."""

STREAM_TIMEOUT_S: Final = 60.0
"""Longest silence of a job that is followed; who follows it then asks again from the last position."""

WHOLE_LOG: Final[LogRequest] = {}

SHIPPING_TIMEOUT_S: Final = 120.0
"""Longest silence while the agent ships a tree: one chunk of 4 MiB over a poor line."""


class AgentClient:
    """Speaks to the agent whose home is `home`. Every call may raise AgentUnreachable or the agent's MeshgpuError."""

    on_clock: ClassVar[Callable[[str, float], None]] = staticmethod(lambda _machine, _ahead_s: None)
    """Told, perhaps often, that the clock of another machine differs from this one's, and by how much it is ahead."""

    def __init__(self, home: Path, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Nothing is opened before the first call; raises MeshgpuError `socket-path` for a home that is too long."""
        self.home = home
        self._socket = socket_path(home)
        self._timeout_s = timeout_s

    @classmethod
    def found(cls, timeout_s: float = CALL_TIMEOUT_S) -> Self:
        """The client of this user's agent on this machine."""
        return cls(find_home(), timeout_s)

    def agent(self) -> AgentView:
        return cast(AgentView, self._get("/v1/agent"))

    def down(self) -> None:
        """Stop the agent; jobs run on."""
        self._post("/v1/down", {})

    def init(self, mesh: str, name: str, user: str) -> FoundedView:
        return cast(FoundedView, self._post("/v1/init", {"mesh": mesh, "name": name, "user": user}))

    def invite(self, user: str | None, role: str, uses: int, life_s: float) -> InviteView:
        """Let `uses` machines of `user` (None: the caller's) join, each as a `role`, within `life_s` seconds."""
        body = {"user": user, "role": role, "uses": uses, "life_s": life_s}
        return cast(InviteView, self._post("/v1/invites", body))

    def join(self, invite: str, name: str, seeds: list[str]) -> JoinedView:
        return cast(JoinedView, self._post("/v1/join", {"invite": invite, "name": name, "seeds": seeds}))

    def audit(self, lines: int) -> list[AuditEntryView]:
        """The newest entries of this machine's audit, the oldest first."""
        return cast(list[AuditEntryView], self._get("/v1/audit", count=str(lines))["entries"])

    def verify_audit(self) -> AuditVerdictView:
        return cast(AuditVerdictView, self._get("/v1/audit/verdict"))

    def receipt(self, job: str) -> ReceiptView:
        """What the machine of the job's newest attempt that has ended signed, and what that is worth."""
        return cast(ReceiptView, self._get(f"/v1/jobs/{_part(job)}/receipt"))

    def check_receipt(self, kept: object) -> ReceiptView:
        """kept: what `receipt` once returned."""
        return cast(ReceiptView, self._post("/v1/receipts/check", kept))

    def admit(self, name: str | None, user: str | None, role: str) -> Iterator[AdmitEvent]:
        """Open a window for one machine; it closes when the iterator does. The last event is `admitted`."""
        body = {"name": name, "user": user, "role": role}
        for event in self._events("POST", "/v1/admit", _encode(body), STREAM_TIMEOUT_S):
            yield cast(AdmitEvent, event)

    def compare(self, node: str | None, seeds: list[str], name: str, user: str) -> Iterator[CompareEvent]:
        """Join at `node`, which announces a window, or at `seeds`. The last event is `joined`."""
        body = {"node": node, "seeds": seeds, "name": name, "user": user}
        for event in self._events("POST", "/v1/join/compare", _encode(body), STREAM_TIMEOUT_S):
            yield cast(CompareEvent, event)

    def press(self, digits: str, *, same: bool) -> None:
        """What the person here said of the digits on the screen."""
        self._post("/v1/press", {"digits": digits, "same": same})

    def revoke(self, name: str, *, stops_jobs: bool) -> RevokedView:
        """Take a machine out for ever."""
        return cast(RevokedView, self._post("/v1/revoke", {"name": name, "stops_jobs": stops_jobs}))

    def set_role(self, name: str, role: str) -> RoleView:
        return cast(RoleView, self._post("/v1/role", {"name": name, "role": role}))

    def admins(self) -> AdminsView:
        return cast(AdminsView, self._get("/v1/admins"))

    def add_admin(self, user: str) -> AdminView:
        """user: `bob`, or `bob@rig7`."""
        return cast(AdminView, self._post("/v1/admins/add", {"user": user}))

    def remove_admin(self, user: str) -> AdminView:
        return cast(AdminView, self._post("/v1/admins/remove", {"user": user}))

    def recover(self, recovery_key: str) -> AdminView:
        """Become an admin by the recovery key."""
        return cast(AdminView, self._post("/v1/recover", {"recovery_key": recovery_key}))

    def leave(self, *, anyway: bool) -> LeftView:
        """Take this machine out of its mesh; the agent ends by itself."""
        return cast(LeftView, self._post("/v1/leave", {"anyway": anyway}))

    def rekey(self) -> RenewedView:
        """Give this machine new keys; the agent begins anew by itself."""
        return cast(RenewedView, self._post("/v1/rekey", {}))

    def discover(self, seconds: float) -> list[SightingView]:
        """Machines that announce themselves nearby, after listening for `seconds`."""
        return cast(list[SightingView], self._get("/v1/discover", seconds=f"{seconds:g}")["machines"])

    def machines(self) -> MachinesView:
        return cast(MachinesView, self._get("/v1/machines"))

    def pause(self, seconds: float | None, *, let_run: bool) -> None:
        """Lend nothing for `seconds` (None: until `resume`)."""
        self._post("/v1/pause", {"seconds": seconds, "let_run": let_run})

    def resume(self) -> None:
        self._post("/v1/resume", {})

    def burst(self) -> BurstView:
        """How renting stands on this machine."""
        return cast(BurstView, self._get("/v1/burst"))

    def burst_plan(self) -> PlansView:
        """What this machine would rent now for each job that waits, and why or why not."""
        return cast(PlansView, self._get("/v1/burst/plan"))

    def set_up_burst(self, settings: BurstSettingsView, *, check: bool = False) -> BurstView:
        """Let this machine rent as `settings` say; with `check` only find out whether that may be."""
        return cast(BurstView, self._post("/v1/burst", {"settings": settings, "check": check}))

    def put_tree(self, manifest: bytes) -> TreeView:
        """Offer a tree; `manifest` is Manifest.encode()."""
        with self._ask("POST", "/v1/trees", manifest) as answer:
            return cast(TreeView, _document(answer))

    def put_chunk(self, chunk: bytes) -> None:
        with self._ask("PUT", "/v1/chunks", chunk) as answer:
            answer.read()

    def submit(self, job: JobRequest) -> Iterator[SubmitEvent]:
        """Submit a job whose chunks are all with the agent; the last event is the job, queued."""
        for event in self._events("POST", "/v1/jobs", _encode(job), SHIPPING_TIMEOUT_S):
            yield cast(SubmitEvent, event)

    def jobs(self, *, finished: bool = False, of_all_users: bool = False) -> JobsView:
        """The user's jobs that are not final, or with `finished` all; with `of_all_users` what others share, too."""
        users = {"users": "1"} if of_all_users else {}
        return cast(JobsView, self._get("/v1/jobs", all=str(int(finished)), **users))

    def job(self, job: str) -> JobView:
        """`job`: an id, a display name or any unique part of one."""
        return cast(JobView, self._get(f"/v1/jobs/{_part(job)}")["job"])

    def why(self, job: str) -> WhyView:
        """What each machine and each GPU would say to the job now."""
        return cast(WhyView, self._get(f"/v1/jobs/{_part(job)}/why"))

    def sweep(self, job: str) -> SweepView:
        """A sweep with its trials."""
        return cast(SweepView, self._get(f"/v1/sweeps/{_part(job)}"))

    def follow(
        self,
        job: str,
        position: int = 0,
        *,
        logs: bool = True,
        wanted: LogRequest = WHOLE_LOG,
        timeout_s: float = STREAM_TIMEOUT_S,
    ) -> Iterator[FollowEvent]:
        """Changes and log of a job from `position` on; EndEvent comes last, when the job is final, or at the end of the
        log of an attempt that is not the newest. Lines and time of `wanted` count at position 0 only.

        Raises AgentUnreachable where the stream breaks before that or is silent for `timeout_s`.
        """
        query = {"position": position, "logs": int(logs), "follow": 1, **wanted}
        return self._job_events(job, urlencode(query), timeout_s)

    def history(self, job: str, wanted: LogRequest = WHOLE_LOG) -> Iterator[FollowEvent]:
        """The log so far, then EndEvent, whatever state the job is in."""
        query = {"position": 0, "logs": 1, "follow": 0, **wanted}
        return self._job_events(job, urlencode(query), self._timeout_s)

    def stop(self, job: str, mode: str) -> JobView:
        """`mode`: `stop` (SIGTERM, 30 s, SIGKILL) or `kill`."""
        return cast(JobView, self._post(f"/v1/jobs/{_part(job)}/stop", {"mode": mode})["job"])

    def files(self, job: str) -> list[FileView]:
        """What the job left: new or changed files under its working directory."""
        return cast(list[FileView], self._get(f"/v1/jobs/{_part(job)}/files")["files"])

    def file(self, job: str, path: str) -> Iterator[bytes]:
        """The bytes of one of its files, in pieces."""
        with self._ask("GET", f"/v1/jobs/{_part(job)}/files/{quote(path, errors='surrogateescape')}") as answer:
            yield from answer.blocks()

    def doctor(self) -> ChecksView:
        return cast(ChecksView, self._get("/v1/doctor"))

    def _ask(self, method: str, target: str, body: bytes | None = None, timeout_s: float = 0.0) -> Answer:
        answer = request(self._socket, method, target, body, timeout_s=timeout_s or self._timeout_s)
        if answer.clock:
            self._tell_clock(_parse(answer.clock.encode()))
        return answer

    def _tell_clock(self, gap: dict[str, Any]) -> None:
        type(self).on_clock(str(gap.get("machine")), float(gap.get("ahead_s", 0.0)))

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        with self._ask("GET", f"{path}?{urlencode(query)}" if query else path) as answer:
            return _document(answer)

    def _post(self, path: str, document: object) -> dict[str, Any]:
        with self._ask("POST", path, _encode(document)) as answer:
            return _document(answer)

    def _job_events(self, job: str, query: str, timeout_s: float) -> Iterator[FollowEvent]:
        for event in self._events("GET", f"/v1/jobs/{_part(job)}/events?{query}", None, timeout_s):
            yield cast(FollowEvent, event)
            if event.get("type") == "end":
                return

    def _events(self, method: str, target: str, body: bytes | None, timeout_s: float) -> Iterator[dict[str, Any]]:
        with self._ask(method, target, body, timeout_s) as answer:
            for line in answer.lines():
                event = _parse(line)
                if event.get("type") == "error":
                    raise error_in(line, "the agent gave up without saying why")
                if isinstance(gap := event.pop("clock", None), dict):
                    self._tell_clock(gap)
                yield event


def _part(text: str) -> str:
    """A job's id, also as `runs/ID`, as one part of a URL's path: one with a slash must not reach another call."""
    return quote(text.removeprefix("runs/").rstrip("/") or text, safe="", errors="surrogateescape")


def _encode(document: object) -> bytes:
    return json.dumps(document).encode()


def _document(answer: Answer) -> dict[str, Any]:
    return _parse(answer.read() or b"{}")


def _parse(text: bytes) -> dict[str, Any]:
    try:
        document: Any = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise MeshgpuError("bad-answer", "the agent answered something else than a JSON object", "meshgpu doctor")
    return document
