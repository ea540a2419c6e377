"""Errors on their way to another machine."""

import json

import pytest

from meshgpu.errors import MeshgpuError, StaleRequest
from meshgpu.wire.grpc_calls import read_error, write_error


def test_stale_request_brings_its_challenge_along() -> None:
    sent = StaleRequest("cannot accept a request", b"n" * 32, 1_800_000_000.5)
    came = read_error(write_error(sent))
    assert isinstance(came, StaleRequest)
    assert (came.code, came.message, came.hint) == (sent.code, sent.message, sent.hint)
    assert (came.challenge, came.wall_s) == (sent.challenge, sent.wall_s)


@pytest.mark.parametrize(
    "changes", [{"challenge": "no hexadecimal"}, {"challenge": 7}, {"wall_s": "now"}, {"wall_s": float("nan")}]
)
def test_garbled_challenge_is_none(changes: dict[str, object]) -> None:
    fields = json.loads(write_error(StaleRequest("stale", b"n" * 32, 1.0))) | changes
    came = read_error(json.dumps(fields).encode())
    assert type(came) is MeshgpuError
    assert came.code == "stale"
