"""The short names by which people tell their jobs apart."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshgpu.agent.views import display_names
from meshgpu.model.ids import JobId


def views(*jobs: tuple[str, str]) -> list[Any]:
    return [SimpleNamespace(spec=SimpleNamespace(name=name, job=JobId(job))) for name, job in jobs]


def test_name_has_as_many_characters_of_the_id_as_it_takes() -> None:
    jobs = (("train", "abcde"), ("train", "abcdf"), ("train", "xyzzy"), ("eval", "abcde"))
    named = display_names(views(*jobs[:3]))
    assert named == {"abcde": "train-abcde", "abcdf": "train-abcdf", "xyzzy": "train-xyz"}
    assert display_names(views(jobs[0], jobs[3])) == {"abcde": "train-abc"}, "other names do not matter"


@given(
    st.lists(
        st.tuples(st.sampled_from(["train", "eval"]), st.text("ab", min_size=8, max_size=8)),
        unique_by=lambda job: job[1],
    )
)
def test_no_other_job_of_that_name_fits_and_no_shorter_name_would_do(jobs: list[tuple[str, str]]) -> None:
    named = display_names(views(*jobs))
    for name, job in jobs:
        part = named[JobId(job)].removeprefix(f"{name}-")
        alike = [other for other_name, other in jobs if other_name == name and other.startswith(part)]
        assert alike == [job]
        shorter = [other for other_name, other in jobs if other_name == name and other.startswith(part[:-1])]
        assert len(part) == 3 or len(shorter) > 1
