"""A stranger who tries strings that he does not have: his address is not heard any more, and others join."""

from dataclasses import replace
from typing import Any

import pytest

from meshgpu.core.trust.joining import read_invite, write_invite
from meshgpu.core.trust.strangers import FAILURES_LIMIT

pytestmark = [pytest.mark.hosts]


def test_stranger_with_false_strings_mutes_only_himself(office: Any) -> None:
    ada, mallory, bob = (office.host(name) for name in ("ada", "mallory", "bob"))
    ada.meshgpu("init", "--mesh", "lab", "--name", "ada", "--yes")
    true = ada.meshgpu("invite").stdout.strip()
    false = write_invite(replace(read_invite(true), secret="a" * 20))
    for _ in range(FAILURES_LIMIT):
        refused = mallory.meshgpu("join", "--yes", "--name", "mallory", false, code=125)
        assert "the invite was used before, has expired, or is not from here" in refused.stderr
    refused = mallory.meshgpu("join", "--yes", "--name", "mallory", true, code=125)
    assert f"too many tries that came to nothing were made from {mallory.address}" in refused.stderr
    bob.meshgpu("join", "--yes", "--name", "bob", true)
    assert {machine["name"] for machine in bob.json("machines")["machines"]} == {"ada", "bob"}
