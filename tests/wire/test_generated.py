import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "proto/meshgpu/wire/v1").glob("*.proto"))
GENERATED = ROOT / "meshgpu/wire/v1"
FIELD = re.compile(r"\s+(?:optional |repeated )?[A-Za-z0-9]+ [a-z_]+ = \d+;")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the .proto files generate now."""
    out = tmp_path_factory.mktemp("generated")
    plugin = Path(sys.executable).parent / "protoc-gen-mypy"
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"--plugin=protoc-gen-mypy={plugin}",
            f"--python_out={out}", f"--mypy_out=quiet:{out}", *map(str, PROTOS),
        ],
        check=True,
        timeout=60,
    )  # fmt: skip
    return out / "meshgpu/wire/v1"


def test_generated_code_is_committed_as_generated(fresh: Path) -> None:
    committed = {path.name: path.read_text() for path in GENERATED.glob("*_pb2.py*")}
    assert {path.name: path.read_text() for path in fresh.iterdir()} == committed, "run `make proto`"


def test_every_proto_file_is_generated() -> None:
    assert PROTOS
    assert {path.stem for path in PROTOS} == {path.stem.removesuffix("_pb2") for path in GENERATED.glob("*_pb2.py")}


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_every_message_and_field_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("// ")
    for before, line in pairwise(lines):
        if FIELD.match(line) or line.startswith("message "):
            assert before.strip().startswith("// "), f"{path.name}: {line}"
