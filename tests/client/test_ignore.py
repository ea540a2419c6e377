"""Ignore rules say what git says."""

import itertools
import random
import subprocess
from pathlib import Path

import pytest

from meshgpu.client.ignore import IgnoreRules


@pytest.mark.parametrize(
    ("lines", "ignored", "kept"),
    [
        (["*.log"], ["a.log", "deep/b.log"], ["a.logs", "log"]),
        (["/data"], ["data", "data/x"], ["src/data"]),
        (["out/x"], ["out/x"], ["a/out/x"]),
        (["build/"], ["build/x", "a/build/x"], ["build"]),
        (["*.pt", "!best.pt"], ["last.pt"], ["best.pt"]),
        (["data/", "!data/keep"], ["data/keep"], []),
        (["# a comment", "", r"\#file", r"\!bang"], ["#file", "!bang"], ["# a comment"]),
        (["**/logs"], ["logs", "a/logs", "a/b/logs"], ["a/logsx"]),
        (["a/**"], ["a/x", "a/b/c"], ["b/a/x"]),
        (["a/**/z"], ["a/z", "a/b/c/z"], ["a/bz"]),
        (["f?[0-9]"], ["fx1"], ["f/1", "fxx"]),
        (["[!a]x"], ["bx"], ["ax", "/x"]),
        (["trailing   "], ["trailing"], []),
        (["kept\\ "], ["kept "], ["kept"]),
        (["dos\r"], ["dos"], []),
        (["[unclosed"], [], ["[unclosed", "u"]),
    ],
)
def test_rules_follow_gitignore(lines: list[str], ignored: list[str], kept: list[str]) -> None:
    rules = IgnoreRules(lines)
    assert [path for path in ignored if not rules.ignores(path, is_directory=False)] == []
    assert [path for path in kept if rules.ignores(path, is_directory=False)] == []


def test_rules_agree_with_git_on_random_patterns(tmp_path: Path) -> None:
    seed = 20240601
    draw = random.Random(seed)
    paths = _make_tree(tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    parts = ["a", "b", "ab", "*", "**", "a*", "?b", "[ab]", "[!a]", "*.py", "\\a", "[a-b]*", "#"]
    for _ in range(300):
        lines = [_random_line(draw, parts) for _ in range(draw.randint(1, 3))]
        (tmp_path / ".git/info/exclude").write_text("\n".join(lines) + "\n")
        rules = IgnoreRules(lines)
        ours = {path for path in paths if rules.ignores(path, is_directory=(tmp_path / path).is_dir())}
        assert ours == _git_ignored(tmp_path, paths), (seed, lines)


def _make_tree(root: Path) -> list[str]:
    names = ["a", "b", "ab", "bb", "a.py", "#"]
    for first, second, third in itertools.product(names, names, names[:5]):
        path = root / first / second / f"{third}x"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return [str(path.relative_to(root)) for path in sorted(root.rglob("*"))]


def _random_line(draw: random.Random, parts: list[str]) -> str:
    body = "/".join(draw.choice(parts) for _ in range(draw.randint(1, 3)))
    return draw.choice(["", "", "", "!"]) + draw.choice(["", "", "/"]) + body + draw.choice(["", "", "/"])


def _git_ignored(root: Path, paths: list[str]) -> set[str]:
    command = ["git", "-C", str(root), "check-ignore", "-z", "--stdin"]
    done = subprocess.run(command, input="\0".join(paths), capture_output=True, text=True, timeout=10, check=False)
    return set(done.stdout.split("\0")) - {""}
