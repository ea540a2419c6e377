"""Ignore rules in gitignore syntax (gitignore(5)), for `.meshgpuignore` and for directories without git."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_CLASS_NAMES: Final = {
    "alpha": "a-zA-Z",
    "digit": "0-9",
    "alnum": "a-zA-Z0-9",
    "upper": "A-Z",
    "lower": "a-z",
    "space": r"\s",
    "xdigit": "0-9a-fA-F",
}
_NEVER: Final = r"(?!)"
"""What git does with a pattern that it cannot read: it matches nothing."""


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    negated: bool
    directories_only: bool


class IgnoreRules:
    """The rules of one file at the root of a tree; the last one that matches a path decides.

    What lies in an ignored directory is ignored, whatever a negated rule says of it, as in git.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._rules = [rule for line in lines if (rule := _parse(line)) is not None]
        self._directories: dict[str, bool] = {"": False}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def ignores(self, path: str, *, is_directory: bool) -> bool:
        """Whether the relative `path`, or a directory above it, is ignored."""
        parent = path.rpartition("/")[0]
        ignored = self._directories.get(parent)
        if ignored is None:
            ignored = self._directories[parent] = self.ignores(parent, is_directory=True)
        return ignored or self._matches(path, is_directory=is_directory)

    def _matches(self, path: str, *, is_directory: bool) -> bool:
        for rule in reversed(self._rules):
            if (is_directory or not rule.directories_only) and rule.pattern.fullmatch(path):
                return not rule.negated
        return False


def _parse(line: str) -> _Rule | None:
    text = _strip_trailing_spaces(line.removesuffix("\r"))
    if not text or text.startswith("#"):
        return None
    negated = text.startswith("!")
    text = text.removeprefix("!")
    directories_only = text.endswith("/")
    text = text.removesuffix("/")
    anchored = "/" in text
    text = text.removeprefix("/")
    if not text:
        return None
    expression = _translate(text)
    if not anchored:
        expression = f"(?:.*/)?{expression}"
    return _Rule(re.compile(expression, re.DOTALL), negated, directories_only)


def _strip_trailing_spaces(line: str) -> str:
    """Without the spaces at the end, but for one that a backslash keeps."""
    stripped = line.rstrip(" ")
    backslashes = len(stripped) - len(stripped.rstrip("\\"))
    return stripped + " " if backslashes % 2 and len(stripped) < len(line) else stripped


def _translate(glob: str) -> str:
    """The regular expression of a gitignore pattern without its leading and trailing slash."""
    pieces: list[str] = []
    position = 0
    while position < len(glob):
        piece, position = _translate_one(glob, position)
        if piece is None:
            return _NEVER
        pieces.append(piece)
    return "".join(pieces)


def _translate_one(glob: str, start: int) -> tuple[str | None, int]:
    """(expression, position after it) of what begins at `start`; None where the pattern is broken."""
    character = glob[start]
    if character == "*":
        return _translate_stars(glob, start)
    if character == "?":
        return "[^/]", start + 1
    if character == "[":
        return _translate_class(glob, start)
    if character == "\\":
        return (re.escape(glob[start + 1]), start + 2) if start + 1 < len(glob) else (None, start)
    return re.escape(character), start + 1


def _translate_stars(glob: str, start: int) -> tuple[str, int]:
    """Two stars or more mean any number of directories, but only where they stand alone between slashes."""
    end = start
    while end < len(glob) and glob[end] == "*":
        end += 1
    alone = end - start >= 2 and (start == 0 or glob[start - 1] == "/")
    if alone and glob[end : end + 1] == "/":
        return "(?:.*/)?", end + 1
    if alone and end == len(glob):
        return ".*" if start == 0 else ".+", end
    return "[^/]*", end


def _translate_class(glob: str, start: int) -> tuple[str | None, int]:
    position = start + 1
    negated = glob[position : position + 1] in ("!", "^")
    position += negated
    members: list[str] = []
    first = True
    while position < len(glob):
        if glob[position] == "]" and not first:
            body = "".join(members)
            return f"(?!/)[{'^' if negated else ''}{body}]", position + 1
        first = False
        member, position = _translate_member(glob, position)
        if member is None:
            return None, position
        members.append(member)
    return None, position


def _translate_member(glob: str, start: int) -> tuple[str | None, int]:
    """One character, range or named class inside brackets."""
    if glob.startswith("[:", start) and (end := glob.find(":]", start + 2)) != -1:
        return _CLASS_NAMES.get(glob[start + 2 : end]), end + 2
    low, position = _read_member(glob, start)
    if glob[position : position + 1] == "-" and glob[position + 1 : position + 2] not in ("", "]"):
        high, position = _read_member(glob, position + 1)
        # git reads a range that runs backwards as its first character.
        return (f"{re.escape(low)}-{re.escape(high)}" if low <= high else re.escape(low)), position
    return re.escape(low), position


def _read_member(glob: str, start: int) -> tuple[str, int]:
    if glob[start] == "\\" and start + 1 < len(glob):
        return glob[start + 1], start + 2
    return glob[start], start + 1
