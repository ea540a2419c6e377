"""What can be shown afterwards: `audit`, and the receipts of `info --receipt` and `info --verify`."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from meshgpu.cli.render import RED, colour, count, note, plain, print_table, show_error
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_FAILED_CHECK
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import AuditEntryView, ReceiptCheckView, ReceiptFacts, ReceiptView
from meshgpu.errors import MeshgpuError

ENTRIES: Final = 20
KEPT_LIMIT_BYTES: Final = 2 * 2**20
"""Of a file with a receipt at most: the signed request is in it, which has 256 KiB."""

GPU_CHARACTERS: Final = 12
MARKS: Final = {True: "ok", False: "!!", None: "--"}


def audit(
    lines: Annotated[int, typer.Option("-n", min=1, max=10_000, help="How many of the newest entries.")] = ENTRIES,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every entry; exit code 1 if one does not hold.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show who ran what on this machine, as it signed it."""
    client = AgentClient.found()
    if verify:
        _verify_audit(client, as_json=as_json)
        return
    entries = client.audit(lines)
    if as_json:
        print(json.dumps({"entries": entries}))
    elif not entries:
        note("nothing has run on this machine yet")
    else:
        header = ("NO", "WHEN", "USER", "JOB", "WHAT", "GPU", "SHUT IN")
        print_table(header, [_entry_row(entry) for entry in entries], frozenset({"NO"}))


def _verify_audit(client: AgentClient, *, as_json: bool) -> None:
    verdict = client.verify_audit()
    if as_json:
        print(json.dumps(verdict))
    elif verdict["fault"] is None:
        end = f": sha256 {verdict['head']}" if verdict["head"] else ""
        print(f"{count(verdict['count'], 'entry', 'entries')}, whole{end}")
    else:
        show_error(MeshgpuError("audit-broken", verdict["fault"], "ask who had this machine since"))
    if verdict["fault"] is not None:
        raise typer.Exit(EXIT_FAILED_CHECK)


def _entry_row(entry: AuditEntryView) -> tuple[str, ...]:
    if entry["fault"] is not None:
        return ("!!", "", "", "", entry["fault"], "", "")
    what = entry["event"]
    if entry["outcome"] is not None:
        what = _ending(entry["outcome"], entry["exit_code"])
    job = f"{entry['name']}-{entry['job'][:3]}"
    return (
        str(entry["seq"]),
        _moment(entry["at"]),
        entry["user"],
        job if entry["epoch"] == 1 else f"{job} ({entry['epoch']})",
        what,
        ", ".join(gpu[:GPU_CHARACTERS] for gpu in entry["gpus"]) or "–",
        "yes" if entry["fenced"] else "no",
    )


def show_receipt(job: str, *, as_json: bool) -> None:
    """Fetch a job's receipt, check it, and print it."""
    _print_receipt(AgentClient.found().receipt(job), as_json=as_json)


def verify_receipt(path: Path) -> None:
    """Check a receipt that somebody kept."""
    _print_receipt(AgentClient.found().check_receipt(_kept(path)), as_json=False)


def _kept(path: Path) -> object:
    """What a file holds. Raises MeshgpuError `bad-request`."""
    fault = f"cannot check {path}: "
    hint = "meshgpu info ID --receipt --json > FILE makes one"
    try:
        with path.open("rb") as file:
            data = file.read(KEPT_LIMIT_BYTES + 1)
    except OSError as error:
        raise MeshgpuError("bad-request", f"{fault}{error.strerror}") from error
    if len(data) > KEPT_LIMIT_BYTES:
        raise MeshgpuError("bad-request", f"{fault}it is too large for a receipt", hint)
    try:
        document = json.loads(data)
    except ValueError as error:
        raise MeshgpuError("bad-request", f"{fault}it is no JSON: {error}", hint) from error
    if not isinstance(document, dict) or "proof" not in document:
        raise MeshgpuError("bad-request", f"{fault}it is no receipt", hint)
    return document


def _print_receipt(receipt: ReceiptView, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(receipt, indent=2))
    else:
        if receipt["facts"] is not None:
            lines = _lines(receipt["facts"])
            width = max(map(len, lines))
            for name, line in lines.items():
                if line:
                    print(f"{name:{width}}  {plain(line)}")
            print()
        for check in receipt["checks"]:
            print(_check_line(check))
    if not receipt["holds"]:
        show_error(MeshgpuError("bad-receipt", "this receipt does not hold"))
        raise typer.Exit(EXIT_FAILED_CHECK)


def _check_line(check: ReceiptCheckView) -> str:
    mark = MARKS[check["holds"]]
    shown = colour(mark, RED, sys.stdout) if check["holds"] is False else mark
    return f"{shown}  {check['about']:8}  {plain(check['found'])}"


def _lines(facts: ReceiptFacts) -> dict[str, str]:
    return {
        "job": f"{facts['name']} ({facts['job']})",
        "user": f"{facts['user']}, key {facts['user_key']}",
        "command": facts["command"],
        "came to": _ending(facts["outcome"], facts["exit_code"]),
        "attempt": str(facts["attempt"]),
        "machine": facts["node"],
        "started": _moment(facts["started_at"]) if facts["started_at"] is not None else "never",
        "ended": _moment(facts["ended_at"]),
        "GPUs": ", ".join(facts["gpus"]) or "none",
        "driver": facts["driver"],
        "shut in": "yes" if facts["fenced"] else "no",
        "request": f"sha256 {facts['request']}",
        "code": f"sha256 {facts['code']}",
        "environment": facts["environment"],
        "image": facts["image"],
        "log": f"sha256 {facts['log']}" if facts["log"] else "",
    }


def _ending(outcome: str, code: int | None) -> str:
    return outcome if code is None else f"{outcome}, code {code}"


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
