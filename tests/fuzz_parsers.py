"""Everything that reads bytes of strangers, fed with anything: `make fuzz`.

Under Atheris, where it is installed (`uv pip install --group fuzz`), the inputs follow what code they reach; else they
are real bytes, mutated at random. Either way each input gives a value or a MeshgpuError, and a value that was read is
written and read again as itself. `python -m tests.fuzz_parsers --inputs 200000 --seed 1` prints which of both ran, how
many inputs, and what came of them.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from meshgpu.errors import MeshgpuError

HEADER: Final = re.compile(rb"DSSEv1 (\d+) ")
INPUT_LIMIT_BYTES: Final = 4096
SEEDS_OF_A_KIND: Final = 4


@contextmanager
def instrumented() -> Iterator[Any]:
    """Atheris while the parsers are imported, so that it follows their branches; None where it is not installed."""
    if importlib.util.find_spec("atheris") is None:
        yield None
        return
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["meshgpu.wire"], exclude=["meshgpu.wire.v1"]):
        yield atheris


class Parsers:
    """Each way of reading, chosen by the first byte of an input. came: how often what came of it."""

    def __init__(self) -> None:
        from meshgpu.wire import codec, dsse, grpc_calls, notary

        self._codec, self._dsse, self._grpc_calls, self._notary = codec, dsse, grpc_calls, notary
        self.kinds: list[type] = [kind for kind, _ in codec._PROTOS.values()]
        self.ways: list[tuple[str, Callable[[bytes], object]]] = [
            ("frame", self._frame),
            ("error", self._error),
            ("DSSE", self._pae),
            ("signed", self._signed),
            *((kind.__name__, self._value(kind)) for kind in self.kinds),
        ]
        self.came: Counter[str] = Counter()

    def read(self, data: bytes) -> None:
        """Raises AssertionError where something was read otherwise than written, and whatever else a parser raises."""
        if not data:
            return
        _, way = self.ways[data[0] % len(self.ways)]
        try:
            way(data[1:])
        except MeshgpuError:
            self.came["refused"] += 1
        else:
            self.came["read"] += 1

    def input(self, way: str, data: bytes) -> bytes:
        return bytes([[name for name, _ in self.ways].index(way)]) + data

    def _frame(self, data: bytes) -> None:
        mesh, message = self._codec.decode_frame(data)
        with what_was_read(message):
            again = self._codec.decode_frame(self._codec.encode_frame(mesh, message))
            assert again == (mesh, message)

    def _value(self, kind: type) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            value = self._codec.decode(kind, data)
            with what_was_read(value):
                assert self._codec.decode(kind, self._codec.encode(value)) == value

        return read

    def _error(self, data: bytes) -> None:
        if (error := self._grpc_calls.read_error(data)) is not None:
            assert isinstance(error, MeshgpuError)

    def _pae(self, data: bytes) -> None:
        """No two (kind, payload) have one encoding: what was encoded is found again in it."""
        length = data[0] % 64 if data else 0
        kind = data[1 : 1 + length].decode("utf-8", "replace")
        payload = data[1 + length :]
        assert unpack(self._dsse.pae(kind, payload)) == (kind, payload)

    def _signed(self, data: bytes) -> None:
        """What anybody may send as signed: with a signature that holds, its payload is still read or refused."""
        from meshgpu.model.ids import key_id
        from meshgpu.model.trust import Signed

        signed = self._codec.decode(Signed, data)
        notary = self._notary.WireNotary(lambda _, message: b"", lambda key, message, signature: True)
        for kind in self.kinds:
            if kind.__name__ == signed.kind:
                key = b"k" * 32
                notary.read(Signed(signed.kind, signed.payload, key_id(key), signed.signature), key, kind)
                return
        raise MeshgpuError("wrong-kind", "cannot read it: there is no such kind")


@contextmanager
def what_was_read(value: object) -> Iterator[None]:
    """It must be possible to write it: a refusal here is a failure."""
    try:
        yield
    except (MeshgpuError, AssertionError) as error:
        raise AssertionError(f"it was read, and is not written as itself: {value}") from error


def unpack(encoded: bytes) -> tuple[str, bytes]:
    """DSSE's encoding read backwards; meshgpu itself never does."""
    begun = HEADER.match(encoded)
    assert begun, encoded
    end = begun.end() + int(begun[1])
    kind, rest = encoded[begun.end() : end], encoded[end:]
    length = re.match(rb" (\d+) ", rest)
    assert length, encoded
    assert len(rest) - length.end() == int(length[1])
    return kind.decode(), rest[length.end() :]


def seeds(parsers: Parsers, directory: Path) -> list[bytes]:
    """Real frames and what is in them, as three nodes sent them to each other; some of each kind."""
    from meshgpu.model.trust import Signed
    from meshgpu.wire.codec import decode_frame, encode
    from tests.fuzz import Trio

    trio = Trio(directory)
    trio.work()
    found: list[bytes] = []
    number: Counter[str] = Counter()
    for frame in trio.frames:
        message: Any = decode_frame(frame.data)[1]
        name = type(message).__name__
        number[name] += 1
        if number[name] > SEEDS_OF_A_KIND:
            continue
        found += [parsers.input("frame", frame.data), parsers.input(name, encode(message))]
        for part in (getattr(message, field) for field in message.__dataclass_fields__):
            for signed in part if isinstance(part, tuple) else (part,):
                if isinstance(signed, Signed):
                    found += [parsers.input("signed", encode(signed)), parsers.input(signed.kind, signed.payload)]
    found += [
        parsers.input("DSSE", b"\x08JobSpec payload"),
        parsers.input("error", b'{"code": "busy", "message": "m"}'),
    ]
    return found


def mutated(rng: random.Random, inputs: list[bytes]) -> bytes:
    """A real input, changed in one to four places; now and then under another parser, or no more than noise."""
    data = bytearray(rng.choice(inputs))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(1, len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                other = rng.choice(inputs)
                data[at:] = other[rng.randrange(len(other)) :]
            case 4:
                data[at : at + 1] = rng.choice((b"\xff" * 10, b"\x80" * 9 + b"\x01", b"\x00", b"\x7f", b"\xff\xff\x03"))
            case 5:
                data[0] = rng.randrange(256)
    return bytes(data[:INPUT_LIMIT_BYTES])


def at_random(count: int, seed: int, directory: Path) -> Counter[str]:
    """Returns what came of it. Raises what a parser raises, with the input."""
    rng = random.Random(seed)
    parsers = Parsers()
    inputs = seeds(parsers, directory)
    for data in inputs:
        parsers.read(data)
    assert parsers.came == {"read": len(inputs)}, "the real ones are read"
    parsers.came.clear()
    for number in range(count):
        data = mutated(rng, inputs)
        try:
            parsers.read(data)
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {data.hex()}") from error
    return parsers.came


def guided(atheris: Any, count: int, seed: int, directory: Path) -> None:
    """Lets libFuzzer choose the inputs; it ends this process, with a code other than 0 where a parser failed."""
    parsers = Parsers()
    corpus = directory / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(parsers, directory)):
        (corpus / str(number)).write_bytes(data)
    done, began = 0, time.monotonic()

    def read(data: bytes) -> None:
        nonlocal done
        parsers.read(data)
        done += 1
        if done == count:
            how = f"guided by coverage (Atheris {importlib.metadata.version('atheris')}, seed {seed})"
            report(how, done, parsers.came, began)
            sys.stdout.flush()
            shutil.rmtree(directory)
            os._exit(0)  # libFuzzer's own end says nothing of what came of it

    options = [f"-seed={seed}", f"-max_len={INPUT_LIMIT_BYTES}", "-timeout=10", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read)
    atheris.Fuzz()


def report(how: str, count: int, came: Counter[str], began: float) -> None:
    took_s = time.monotonic() - began
    print(f"{count:>9,}  inputs to the parsers, {how}")
    for what, number in sorted(came.items()):
        print(f"{number:>9,}  {what}")
    print(f"        0  crashes, {took_s:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="mutate at random even where Atheris is installed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        with instrumented() as atheris:
            Parsers()
        if atheris is not None and not options.plain:
            guided(atheris, options.inputs, options.seed, Path(directory))
        began = time.monotonic()
        came = at_random(options.inputs, options.seed, Path(directory))
        why = "" if atheris is not None else "; Atheris is not installed"
        report(f"mutated at random (seed {options.seed}{why})", options.inputs, came, began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
