"""Manifests: equal trees have equal bytes, and nothing that could leave its directory is read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Digest, digest
from meshgpu.model.tree import CHUNK_BYTES, FileKind, Manifest, TreeFile, decode_manifest, is_digest

CHUNK = digest(b"x")


def encoded(*rows: list[Any]) -> bytes:
    """Manifest bytes of rows that Manifest.encode would never write."""
    ordered = sorted(rows, key=lambda row: str(row[0]))
    return json.dumps({"version": 1, "files": ordered}, separators=(",", ":")).encode()


def file_row(path: str = "a", size: Any = 1, chunks: Any = (CHUNK,)) -> list[Any]:
    return [path, "file", 0, size, list(chunks), ""]


def refusal(data: bytes) -> str:
    with pytest.raises(MeshgpuError) as refused:
        decode_manifest(data)
    assert refused.value.code == "bad-manifest"
    return refused.value.message


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0") | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
    min_size=1,
    max_size=6,
).filter(lambda name: name not in (".", ".."))


@st.composite
def tree_files(draw: st.DrawFn) -> TreeFile:
    path = "/".join(draw(st.lists(names, min_size=1, max_size=3)))
    kind = draw(st.sampled_from(FileKind))
    if kind is FileKind.SYMLINK:
        return TreeFile(path, kind, target=draw(names))
    if kind is FileKind.DIRECTORY:
        return TreeFile(path, kind)
    size = draw(st.integers(0, 3 * CHUNK_BYTES))
    chunks = tuple(digest(bytes([index])) for index in range(-(-size // CHUNK_BYTES)))
    return TreeFile(path, kind, draw(st.booleans()), size, chunks)


@given(st.lists(tree_files(), max_size=5))
def test_what_is_encoded_reads_back_or_is_refused_for_its_paths(files: list[TreeFile]) -> None:
    paths = [file.path for file in files]
    clash = len(set(paths)) < len(paths) or any(a.startswith(f"{b}/") for a in paths for b in paths)
    manifest = Manifest(tuple(sorted(files, key=lambda file: file.path)))
    if clash:
        refusal(manifest.encode())
    else:
        assert decode_manifest(manifest.encode()) == manifest


@given(st.lists(tree_files(), max_size=4, unique_by=lambda file: file.path))
def test_the_order_of_files_does_not_change_the_name_of_a_tree(files: list[TreeFile]) -> None:
    assert Manifest(tuple(files)).digest == Manifest(tuple(reversed(files))).digest


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["a", "file", CHUNK]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["version", "files", "x"]), inner),
    max_leaves=12,
)


@given(json_values)
def test_any_document_is_read_or_refused(document: object) -> None:
    for candidate in (document, {"version": 1, "files": document}, {"version": 1, "files": [document]}):
        data = json.dumps(candidate, separators=(",", ":")).encode()
        if data == Manifest(()).encode():
            assert decode_manifest(data).files == ()
        else:
            refusal(data)


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data: bytes) -> None:
    refusal(data)


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b\0"]), min_size=1, max_size=4))
def test_a_path_that_leaves_the_tree_is_refused(parts: list[str]) -> None:
    path = "/".join(parts)
    if set(parts) <= {"a"}:
        assert decode_manifest(encoded(file_row(path))).files[0].path == path
    else:
        assert "is not inside it" in refusal(encoded(file_row(path)))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "a/", "/", ".", "", "\ud800", "a\0b"])
def test_a_hostile_path_is_refused(path: str) -> None:
    assert "is not inside it" in refusal(encoded(file_row(path)))


def test_a_path_beneath_a_symlink_is_refused() -> None:
    link = ["out", "symlink", 0, 0, [], "/etc"]
    assert "lies beneath" in refusal(encoded(link, file_row("out/passwd")))


def test_a_path_that_appears_twice_is_refused() -> None:
    assert "twice" in refusal(encoded(file_row("a"), file_row("a")))


@pytest.mark.parametrize("chunk", ["../../../etc/shadow", CHUNK.upper(), CHUNK + "\n", "", CHUNK[:-1]])
def test_a_chunk_that_is_no_digest_is_refused(chunk: str) -> None:
    assert "no SHA-256" in refusal(encoded(file_row(chunks=[chunk])))


@pytest.mark.parametrize(("size", "count"), [(-1, 1), (-1, 0), (CHUNK_BYTES + 1, 1), (0, 1), (1, 0)])
def test_chunks_that_do_not_fit_the_size_are_refused(size: int, count: int) -> None:
    assert "chunks, expected" in refusal(encoded(file_row(size=size, chunks=[CHUNK] * count)))


@pytest.mark.parametrize(
    "row",
    [
        ["d", "directory", 0, 1, [CHUNK], ""],
        ["d", "directory", 1, 0, [], ""],
        ["d", "directory", 0, 0, [], "/etc"],
        ["l", "symlink", 0, 1, [CHUNK], "t"],
        ["l", "symlink", 0, 0, [], ""],
        ["l", "symlink", 0, 0, [], "a\0b"],
        ["f", "file", 0, 0, [], "t"],
    ],
)
def test_content_that_its_kind_cannot_have_is_refused(row: list[Any]) -> None:
    assert "is no" in refusal(encoded(row))


@pytest.mark.parametrize(
    "row",
    [
        file_row(size=True),
        file_row(size=1.0),
        file_row(size="1"),
        file_row(chunks=[5]),
        ["a", "file", 2, 0, [], ""],
        ["a", "file", True, 0, [], ""],
        [5, "file", 0, 0, [], ""],
        ["a", "file", 0, 0, "", ""],
        ["l", "symlink", 0, 0, [], 5],
    ],
)
def test_values_of_another_type_are_refused(row: list[Any]) -> None:
    assert "canonical" in refusal(encoded(row))


def test_a_second_spelling_of_a_tree_is_refused() -> None:
    data = Manifest((TreeFile("a", FileKind.FILE), TreeFile("b", FileKind.FILE))).encode()
    assert decode_manifest(data)
    for other in (data + b" ", data.replace(b'"a"', b'"\\u0061"'), encoded()[:-1] + b',"more":1}'):
        assert "canonical" in refusal(other)


def test_a_later_version_is_refused_by_name() -> None:
    assert "version 2" in refusal(b'{"version":2,"files":[]}')


def test_deep_nesting_is_refused() -> None:
    refusal(b"[" * 100_000)


def test_chunks_are_counted_once_with_their_length() -> None:
    tail = digest(b"tail")
    files = (
        TreeFile("a", FileKind.FILE, size_bytes=CHUNK_BYTES + 4, chunks=(CHUNK, tail)),
        TreeFile("b", FileKind.FILE, size_bytes=4, chunks=(tail,)),
    )
    assert Manifest(files).chunks() == {CHUNK: CHUNK_BYTES, tail: 4}


def test_only_lower_case_sha256_is_a_digest() -> None:
    assert is_digest(CHUNK)
    assert not is_digest(Digest("x" * 64))
