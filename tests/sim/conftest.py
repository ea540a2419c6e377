"""Options of the simulated world's tests."""

from pathlib import Path

import pytest

TRANSCRIPTS = Path(__file__).parent / "transcripts"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write tests/sim/transcripts anew, to be reviewed as a diff"
    )


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> "Compare":
    return Compare(rewrite=bool(request.config.getoption("--rewrite")))


class Compare:
    """Compares a story with its transcript, or writes it."""

    def __init__(self, *, rewrite: bool) -> None:
        self._rewrite = rewrite

    def __call__(self, name: str, text: str) -> None:
        path = TRANSCRIPTS / f"{name}.txt"
        if self._rewrite:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: write it with pytest {Path(__file__).parent.name} --rewrite"
        assert text == path.read_text(), f"the story of {name} changed: review it with pytest --rewrite and git diff"
