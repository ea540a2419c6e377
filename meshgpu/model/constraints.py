"""Which machines and GPUs a job accepts: the language of `--on` and `--not-on`.

A constraint is a comparison (`vram>=24GB`, `name~4090`, `machine!=rig7`), bare names of machines (`rig7,rig8`: one of
them), or several of these with `and`, `or`, `not` and parentheses; `and` binds tighter than `or`.
"""

import difflib
import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NewType

from meshgpu.errors import MeshgpuError

Where = NewType("Where", str)
"""A constraint that can be read."""

ANYWHERE: Final = Where("")

LENGTH_LIMIT: Final = 500
DEPTH_LIMIT: Final = 20
"""Of a constraint's characters, and of its parentheses: every machine reads it for every job."""

GPU_FIELDS: Final = ("name", "vram", "cc")
MACHINE_FIELDS: Final = ("machine", "owner", "cpus", "memory", "gpus", "driver")

_SIZES: Final = ("vram", "memory")
_VERSIONS: Final = ("cc", "driver")
_NUMBERS: Final = ("cpus", "gpus")
_UNITS: Final = {"mb": 0.001, "gb": 1.0, "tb": 1000.0, "": 1.0}
_ORDER: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TOKEN: Final = re.compile(r"""\s*(?:(>=|<=|!=|!~|[=<>~()])|"([^"]*)"|'([^']*)'|([^\s()<>=!~"']+))""")
_HINT: Final = "meshgpu run --on 'vram>=24GB and name~4090' …"

Fact = str | float | tuple[int, ...]
Facts = Mapping[str, Fact]
"""{field: what is there}; a fact that is not known is absent, and no comparison with it holds.

Sizes in GB, versions as tuples of numbers.
"""

Test = Callable[[Facts], bool]


@dataclass(frozen=True, slots=True)
class Constraint:
    """fields: that it speaks of. holds: whether a machine, or a GPU of one, is accepted."""

    fields: frozenset[str]
    holds: Test

    @property
    def is_about_gpus(self) -> bool:
        return not self.fields.isdisjoint(GPU_FIELDS)


@functools.lru_cache(maxsize=1024)
def parse_constraint(text: str) -> Constraint:
    """Read a constraint; the empty one accepts everything. Raises MeshgpuError `bad-request`, which says what fails."""
    if not text.strip():
        return Constraint(frozenset(), lambda _: True)
    if len(text) > LENGTH_LIMIT:
        raise _unreadable(text[:40] + "…", f"it is longer than {LENGTH_LIMIT} characters")
    return _Parser(text).whole()


def join(on: str, not_on: str) -> Where:
    """One constraint of what `--on` and `--not-on` say. Raises MeshgpuError where one of them cannot be read."""
    for part in (on, not_on):
        parse_constraint(part)
    unwanted = f"not ({not_on})" if not_on.strip() else ""
    return Where(f"({on}) and {unwanted}" if on.strip() and unwanted else on.strip() or unwanted)


def version(text: str) -> tuple[int, ...]:
    """`580.105.08` as numbers that compare; of what is none, nothing."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


class _Parser:
    """Recursive descent: or → and → not → one test."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._split(text))
        self._fields: set[str] = set()
        self._depth = 0

    def whole(self) -> Constraint:
        test = self._either()
        if self._tokens:
            raise self._error(f"{self._tokens[0]!r} is one too many")
        return Constraint(frozenset(self._fields), test)

    def _split(self, text: str) -> Iterator[str]:
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._error(f"nothing fits at {text[at:].strip()[:20]!r}")
            at = match.end()
            yield next(part for part in match.groups() if part is not None)

    def _either(self) -> Test:
        tests = [self._both()]
        while self._skip("or"):
            tests.append(self._both())
        return tests[0] if len(tests) == 1 else lambda facts: any(test(facts) for test in tests)

    def _both(self) -> Test:
        tests = [self._one()]
        while self._skip("and"):
            tests.append(self._one())
        return tests[0] if len(tests) == 1 else lambda facts: all(test(facts) for test in tests)

    def _one(self) -> Test:
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            raise self._error(f"it is nested more than {DEPTH_LIMIT} deep")
        try:
            if self._skip("not"):
                test = self._one()
                return lambda facts: not test(facts)
            if self._skip("("):
                inner = self._either()
                if not self._skip(")"):
                    raise self._error("a parenthesis is not closed")
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Test:
        field = self._word("a field or a machine's name")
        if not self._tokens or self._tokens[0] not in (*_ORDER, "~", "!~"):
            names = [self._compare("machine", "=", name) for name in field.split(",")]
            return lambda facts: any(is_named(facts) for is_named in names)
        sign = self._tokens.pop(0)
        if field not in (*GPU_FIELDS, *MACHINE_FIELDS):
            near = difflib.get_close_matches(field, (*GPU_FIELDS, *MACHINE_FIELDS), n=1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join((*GPU_FIELDS, *MACHINE_FIELDS))}"
            raise self._error(f"there is no field {field!r}: {known}")
        return self._compare(field, sign, self._word(f"what {field} is compared with"))

    def _compare(self, field: str, sign: str, text: str) -> Test:
        self._fields.add(field)
        if sign in ("~", "!~"):
            return self._contains(field, text.lower(), is_wanted=sign == "~")
        wanted, holds = self._value(field, sign, text), _ORDER[sign]

        def test(facts: Facts) -> bool:
            fact = facts.get(field)
            return fact is not None and holds(fact.lower() if isinstance(fact, str) else fact, wanted)

        return test

    def _contains(self, field: str, part: str, *, is_wanted: bool) -> Test:
        if field in (*_SIZES, *_NUMBERS, *_VERSIONS):
            raise self._error(f"{field} is a number: ~ compares words")
        return lambda facts: field in facts and (part in str(facts[field]).lower()) is is_wanted

    def _value(self, field: str, sign: str, text: str) -> Fact:
        if field in _VERSIONS:
            if not re.fullmatch(r"\d+(\.\d+)*", text):
                raise self._error(f"{field} is compared with a version, as {field}>=8.9")
            return version(text)
        if field in _NUMBERS or field in _SIZES:
            match = re.fullmatch(r"(\d+(?:\.\d+)?)(mb|gb|tb)?", text.lower())
            if match is None or (match[2] and field in _NUMBERS):
                raise self._error(f"{field} is compared with {'a size, as 24GB' if field in _SIZES else 'a number'}")
            return float(match[1]) * _UNITS[match[2] or ""]
        if sign not in ("=", "!="):
            raise self._error(f"{field} is a word: it is compared by = != ~ !~")
        return text.lower()

    def _skip(self, token: str) -> bool:
        if self._tokens and self._tokens[0].lower() == token:
            del self._tokens[0]
            return True
        return False

    def _word(self, what: str) -> str:
        if not self._tokens:
            raise self._error(f"it ends where {what} is expected")
        word = self._tokens.pop(0)
        if word in (*_ORDER, "~", "!~", "(", ")") or word.lower() in ("and", "or", "not"):
            raise self._error(f"{word!r} stands where {what} is expected")
        return word

    def _error(self, found: str) -> MeshgpuError:
        return _unreadable(self._text, found)


def _unreadable(text: str, found: str) -> MeshgpuError:
    return MeshgpuError("bad-request", f"cannot read the constraint {text!r}: {found}", _HINT)
