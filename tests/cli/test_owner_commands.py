"""pause and resume, as an owner types them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from typer.testing import Result

if TYPE_CHECKING:
    from tests.cli.conftest import StubAgent

Cli = Callable[..., Result]


@pytest.mark.parametrize(
    ("arguments", "seconds", "let_run", "says"),
    [
        ((), None, False, "nothing until: meshgpu resume; what runs leaves within 30 s"),
        (("2h",), 7200, False, "for 2 h 0 m, or until: meshgpu resume"),
        (("30m", "--let-run"), 1800, True, "what runs may end by itself"),
    ],
)
def test_pause_says_for_how_long_and_what_becomes_of_jobs(
    cli: Cli, stub: "StubAgent", arguments: tuple[str, ...], seconds: float | None, let_run: bool, says: str
) -> None:
    stub.on("POST /v1/pause", {"until": None})
    result = cli("pause", *arguments)
    assert result.exit_code == 0
    assert says in result.stderr
    assert stub.body("POST /v1/pause") == {"seconds": seconds, "let_run": let_run}


@pytest.mark.parametrize("span", ["soon", "0", "-1h"])
def test_pause_for_nonsense_is_a_usage_error_with_an_example(cli: Cli, stub: "StubAgent", span: str) -> None:
    result = cli("pause", "--", span)
    assert result.exit_code == 2
    assert "hint: meshgpu pause 2h" in result.stderr


def test_resume_lends_again(cli: Cli, stub: "StubAgent") -> None:
    stub.on("POST /v1/resume", {})
    assert "lends again" in cli("resume").stderr
