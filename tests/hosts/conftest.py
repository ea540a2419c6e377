"""An office for each module of tests that wants one."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts.office import Office, until
from tests.hosts.renting import Project, Story, renting


def needs_namespaces() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` (Debian: iproute2) to make network namespaces")
    name = f"mg-trial-{os.getpid()}"  # two workers may try at the same moment
    trial = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if trial.returncode != 0:
        pytest.skip("this system does not let us make network namespaces")
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture(scope="module")
def office() -> Iterator[Office]:
    needs_namespaces()
    office = Office()
    try:
        yield office
    finally:
        office.close()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return until


# -- renting ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(office: Office, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with renting(office, tmp_path_factory.mktemp("gpus")) as story:
        yield story


@pytest.fixture
def story(opened: Story) -> Iterator[Story]:
    with opened.at_rest():
        yield opened


@pytest.fixture
def project(story: Story, tmp_path: Path) -> Project:
    directory = tmp_path / "project"
    directory.mkdir()
    return Project(story.ada, directory)
