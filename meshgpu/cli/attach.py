"""Follows a job: its log as it was written, and what happens to it on stderr, through restarts of the agent."""

import re
import time
from collections.abc import Iterator
from typing import Final

from meshgpu.cli.log_printer import LogPrinter
from meshgpu.cli.progress import StatusLine
from meshgpu.cli.render import ago, count, note, plain, size
from meshgpu.cli.words import ending, goes_on, headline, is_final, waiting
from meshgpu.client.agent import STREAM_TIMEOUT_S, WHOLE_LOG, AgentClient
from meshgpu.client.views import FollowEvent, JobView, LogEvent, LogRequest, OutOfTouchEvent
from meshgpu.errors import AgentUnreachable, MeshgpuError

RECONNECT_LIMIT_S: Final = 10.0
"""How long an agent may be away: an upgrade restarts it within seconds."""

RECONNECT_PAUSE_S: Final = 0.2
SILENCES_S: Final = (2.0, 10.0, 60.0)
"""When a machine's silence is told; what is shorter is an agent that restarts."""

LONG_SILENCE_S: Final = 600.0
"""How often a longer silence is told again."""

TAIL_BYTES: Final = 4096
"""How much of stderr is kept to find out why a job failed: the end of a traceback."""

_MISSING_MODULE: Final = re.compile(rb"ModuleNotFoundError: No module named '([A-Za-z0-9_]+)")
_DISTRIBUTIONS: Final = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Modules whose distribution has another name, as far as training code imports them often."""


def events(
    client: AgentClient,
    job: str,
    *,
    logs: bool = True,
    wanted: LogRequest = WHOLE_LOG,
    until_s: float | None = None,
) -> Iterator[FollowEvent]:
    """Everything that happens to `job` until it ends, each piece of its log once, though the agent may restart.

    until_s: time.monotonic() at which to give up; the events then end without EndEvent.
    Raises MeshgpuError `agent-gone` where the agent stays away for RECONNECT_LIMIT_S.
    """
    position = 0
    name, state = job, "goes on"
    away_since_s: float | None = None
    while until_s is None or time.monotonic() < until_s:
        silence_s = STREAM_TIMEOUT_S if until_s is None else min(STREAM_TIMEOUT_S, until_s - time.monotonic())
        error: MeshgpuError = AgentUnreachable("agent-gone", "the agent broke off its answer")
        try:
            for event in client.follow(job, position, logs=logs, wanted=wanted, timeout_s=max(silence_s, 0.01)):
                away_since_s = None
                if event["type"] in ("log", "dropped"):
                    position = event["position"]
                elif event["type"] == "job":
                    name, state = event["job"]["display"], goes_on(event["job"])
                yield event
                if event["type"] == "end":
                    return
        except AgentUnreachable as broken:
            error = broken
        except MeshgpuError as refused:
            if away_since_s is None:
                raise
            error = refused  # an agent that has just started may not have found the job again
        if away_since_s is None:
            away_since_s = time.monotonic()
        if time.monotonic() - away_since_s > RECONNECT_LIMIT_S:
            hint = f"meshgpu up && meshgpu logs -f {name}"
            raise MeshgpuError("agent-gone", f"cannot follow {name} any more: {error.message}; the job {state}", hint)
        time.sleep(RECONNECT_PAUSE_S)


class Attachment:
    """One job on this terminal: its log byte for byte, and words about it on stderr, each once."""

    def __init__(self, job: JobView, *, speak: bool = True, printer: LogPrinter | None = None) -> None:
        """speak: whether to say where it runs and why it waits. printer: of its log, byte for byte by default."""
        self.job = job
        self._printer = printer or LogPrinter()
        self._speak = speak
        self._headline_said = False
        self._last_said = ""
        self._silent_machine = ""
        self._next_silence_s = SILENCES_S[0]
        self._line = StatusLine()
        self._tail = b""

    def follow(self, client: AgentClient, wanted: LogRequest = WHOLE_LOG) -> JobView:
        """Until the job is final; returns it as it ended."""
        try:
            for event in events(client, self.job["id"], wanted=wanted):
                self.take(event)
        finally:
            self._line.clear()
        return self.job

    def take(self, event: FollowEvent) -> None:
        if event["type"] == "log":
            self._write(event)
        elif event["type"] == "dropped":
            self._line.clear()
            self._printer.tell_gap(event)
        elif event["type"] == "tail":
            self._printer.tell_tail(event)
        elif event["type"] == "out-of-touch":
            self._tell_silence(event)
        else:
            was_unknown = self.job["state"] == "unknown"
            self.job = event["job"]
            if was_unknown and self.job["state"] != "unknown":
                self._tell_return()
            self._tell_job()

    def missing_module(self) -> str:
        """The distribution whose module a failed job did not find; empty where that was not its last error."""
        found = _MISSING_MODULE.findall(self._tail)
        module = found[-1].decode("ascii") if found else ""
        return _DISTRIBUTIONS.get(module, module)

    def _tell_job(self) -> None:
        job = self.job
        if not self._speak:
            return
        if job["started_at"] is not None or (is_final(job) and job["machine"]):
            self._tell_headline()
        line = "" if is_final(job) else waiting(job)
        if not line or line == self._last_said:
            return
        self._last_said = line
        if job["phase"] == "staging":
            self._line.show(line)
        else:
            self._say(line)

    def _tell_headline(self) -> None:
        if self._speak and not self._headline_said:
            self._headline_said = True
            self._say(headline(self.job))

    def _tell_silence(self, event: OutOfTouchEvent) -> None:
        seconds = event["seconds"]
        if seconds < self._next_silence_s:
            return
        later = (moment for moment in SILENCES_S if moment > seconds)
        self._next_silence_s = next(later, (seconds // LONG_SILENCE_S + 1) * LONG_SILENCE_S)
        self._silent_machine = event["machine"]
        self._say(plain(f"{event['machine']} has been out of touch for {ago(seconds)}; the job is taken to run on"))

    def _tell_return(self) -> None:
        self._next_silence_s = SILENCES_S[0]
        if self._silent_machine:
            self._say(plain(f"{self._silent_machine} is back"))
            self._silent_machine = ""

    def _write(self, event: LogEvent) -> None:
        self._tell_return()
        self._tell_headline()
        self._line.clear()
        if event["stream"] == "stderr":
            self._tail = (self._tail + event["data"].encode("utf-8", "surrogateescape"))[-TAIL_BYTES:]
        self._printer.write(event)

    def _say(self, line: str) -> None:
        self._line.clear()
        note(line)


def detached(job: JobView) -> None:
    """Say what can be done with a job that goes on without this terminal."""
    name = job["display"]
    note(f"{name} {goes_on(job)}. To see its log: meshgpu logs -f {name}   to stop it: meshgpu stop {name}")


def conclude(client: AgentClient, job: JobView, missing_module: str, *, tell_outputs: bool = True) -> None:
    """Say how it ended, what it left and what might help."""
    if line := ending(job):
        note(line)
    if job["state"] == "failed" and missing_module:
        note(
            f"hint: this environment has no {missing_module}: add --pip {missing_module}, or --pip-req requirements.txt"
        )
    if job["state"] == "failed" and job["exit_code"] is None and job["detail"].startswith("environment: "):
        note("hint: is everything spelt right that --pip, --pip-req or the project's own files ask for?")
    if job["output_files"] and tell_outputs:
        note(outputs(client, job))


def outputs(client: AgentClient, job: JobView) -> str:
    """`3 files, 1.2 MB · meshgpu cp -r runs/train-k7q/ .`; a single file is named."""
    source, flag = f"runs/{job['display']}/", "-r "
    if job["output_files"] == 1:
        try:
            source += client.files(job["id"])[0]["path"]
            flag = ""
        except (MeshgpuError, IndexError):
            pass  # the machine may have gone; the general form stays true
    return plain(
        f"{count(job['output_files'], 'file')}, {size(job['output_bytes'])} · meshgpu cp {flag}{_quoted(source)} ."
    )


def _quoted(text: str) -> str:
    """For a shell, as shlex.quote does."""
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII) else "'" + text.replace("'", "'\"'\"'") + "'"
