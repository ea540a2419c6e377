"""Tests that the documents name as proof exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def functions_of(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_tests_that_a_document_names_exist(document: str) -> None:
    named = NAMED.findall((ROOT / "docs" / document).read_text())
    known = {file: functions_of(ROOT / file) if (ROOT / file).exists() else None for file, _ in named}
    assert [file for file, names in known.items() if names is None] == []
    assert [f"{file}::{test}" for file, test in named if test and test not in (known[file] or ())] == []
    assert document != "trust.md" or len(named) > 100
