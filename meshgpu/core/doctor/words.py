"""How findings spell things."""

from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """`bob`, `bob and cyd`, `bob, cyd and dan`; each name once."""
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} and {last}" if first else last


def count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def span(seconds: float) -> str:
    """`40 s`, `3 min`, `5 h 10 min`, `3 days`; one unit below what matters."""
    whole = round(abs(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days"
