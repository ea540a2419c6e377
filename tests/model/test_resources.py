"""The grammar of `-g`."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import GpuId
from meshgpu.model.resources import GB, GpuRequest, GpuShare, parse_gpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", GpuRequest(0)),
        ("1", GpuRequest(1)),
        (" 2 ", GpuRequest(2)),
        ("8GB", GpuRequest(1, 8 * GB, shared=True)),
        ("1.5gb", GpuRequest(1, GB * 3 // 2, shared=True)),
        ("2x24GB", GpuRequest(2, 24 * GB)),
        ("4090", GpuRequest(1, model="4090")),
        ("4090:2", GpuRequest(2, model="4090")),
        ("A100", GpuRequest(1, model="a100")),
        ("rtx_4090:4", GpuRequest(4, model="rtx 4090")),
        ("rtx 4090", GpuRequest(1, model="rtx 4090")),
    ],
)
def test_grammar(text: str, expected: GpuRequest) -> None:
    assert parse_gpus(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "0GB", "0.0GB", "4090:", ":2", "1.5", "8 GB!", "4090:200"])
def test_what_cannot_be_read_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(MeshgpuError) as caught:
        parse_gpus(text)
    assert caught.value.code == "bad-request"
    assert "4090:2" in caught.value.message
    assert caught.value.hint


@given(
    st.one_of(
        st.builds(GpuRequest, st.integers(0, 99)),
        st.builds(lambda gb: GpuRequest(1, gb * GB, shared=True), st.integers(1, 999)),
        st.builds(lambda count, gb: GpuRequest(count, gb * GB), st.integers(1, 99), st.integers(1, 999)),
        st.builds(
            lambda count, model: GpuRequest(count, model=model),
            st.integers(1, 99),
            st.sampled_from(["a100", "rtx 4090"]),
        ),
    )
)
def test_request_reads_as_it_is_printed(request: GpuRequest) -> None:
    assert parse_gpus(str(request)) == request


@given(st.text(max_size=30))
def test_no_text_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(MeshgpuError):
        assert parse_gpus(text).count >= 0


def test_share_of_no_bytes_is_a_whole_gpu() -> None:
    assert GpuShare(GpuId("GPU-1")).is_whole
    assert not GpuShare(GpuId("GPU-1"), GB).is_whole
