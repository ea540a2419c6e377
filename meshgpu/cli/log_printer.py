"""Puts a job's log on this terminal or into a pipe: byte for byte, with the time before each line, or as JSON."""

import codecs
import json
import sys
from datetime import datetime

from meshgpu.cli.render import ago, note, plain, size
from meshgpu.client.views import DroppedEvent, LogEvent, TailEvent


class LogPrinter:
    """What the job wrote to stdout goes to stdout, what it wrote to stderr to stderr.

    Bytes are passed on as they are: escape sequences too, as `cat` would. timestamps: each line begins with when its
    machine took it. as_json: one object a piece, all on stdout, in which U+FFFD stands for what is not UTF-8.
    """

    def __init__(self, *, timestamps: bool = False, as_json: bool = False) -> None:
        self._timestamps = timestamps
        self._as_json = as_json
        self._in_line = {"stdout": False, "stderr": False}
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"stdout": decoder("replace"), "stderr": decoder("replace")}

    def write(self, event: LogEvent) -> None:
        data = event["data"].encode("utf-8", "surrogateescape")
        if self._as_json:
            text = self._decoders[event["stream"]].decode(data)
            print(json.dumps({"at": event["at"], "stream": event["stream"], "text": text}), flush=True)
            return
        if self._timestamps:
            data = self._stamped(event, data)
        stream = sys.stdout if event["stream"] == "stdout" else sys.stderr
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()

    def tell_gap(self, event: DroppedEvent) -> None:
        if event["bytes"]:
            note(f"… {size(event['bytes'])} of earlier output were dropped")

    def tell_tail(self, event: TailEvent) -> None:
        away = f"{plain(event['machine'])} has been out of touch for {ago(event['seconds'])}"
        note(f"{away}; these are the last {size(event['bytes'])} that it sent to others")

    def _stamped(self, event: LogEvent, data: bytes) -> bytes:
        stamp = f"{moment(event['at'])} ".encode()
        lines = _lines(data)
        begun, self._in_line[event["stream"]] = self._in_line[event["stream"]], not data.endswith(b"\n")
        first = lines[0] if begun else stamp + lines[0]
        return b"".join([first, *(stamp + line for line in lines[1:])])


def moment(wall_s: float) -> str:
    """Local time with its offset, to the millisecond: `2026-11-27T10:00:00.123+01:00`."""
    return datetime.fromtimestamp(wall_s).astimezone().isoformat(timespec="milliseconds")


def _lines(data: bytes) -> list[bytes]:
    """Lines with their ends; only a line feed ends one."""
    *whole, rest = data.split(b"\n")
    return [*(line + b"\n" for line in whole), *([rest] if rest else [])]
