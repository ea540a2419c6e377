"""What a rented machine comes to when its keys, its link to the office or the provider fail it."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from tests.ec2.cloud import PROGRAMS
from tests.hosts.office import until
from tests.hosts.renting import AGAIN_S, RENTED_S, Project, Story, Strike

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

SPOT_NOTICE_S: Final = 60.0
NO_CONTACT_S: Final = 15.0
DRAINED_S: Final = 120.0
"""From the moment the line is cut until the instance is down: its link must fail, then NO_CONTACT_S, then 60 s."""

FORGETFUL: Final = f"""#!{sys.executable}
import os, shutil, sys
from pathlib import Path
from meshgpu.agent import enrolment
from meshgpu.cli.main import main
async def answer(self, step, request, answer=enrolment.InstanceDoor.answer):
    if step == "welcome":
        print("forgets its key", flush=True)
        os._exit(1)
    return await answer(self, step, request)
enrolment.InstanceDoor.answer = answer
shutil.rmtree(Path(os.environ["MESHGPU_HOME"]) / "keys", ignore_errors=True)
sys.exit(main())
"""
"""A `meshgpu` for instances: as if at each dial another machine answered that booted the same user data."""


def test_one_launch_makes_one_member_however_many_boot_its_user_data(
    story: Story, project: Project, tmp_path: Path
) -> None:
    """The burst peer is killed between its two dials: what refuses the second key is its journal."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "meshgpu").write_text(FORGETFUL)
    (tmp_path / "bin" / "meshgpu").chmod(0o755)
    story.settings["PATH"] = f"{tmp_path}/bin:{PROGRAMS}"
    with story.filled(project):
        strike = Strike(story.ada)
        name = project.submit("1")
        try:
            strike.when(lambda: "forgets its key\n" in story.consoles)
            until(strike.is_over.is_set, "nobody was welcomed", RENTED_S)
        finally:
            strike.is_over.set()
            story.settings.clear()
        first = story.machine()
        until(strike.is_dead)
        story.ada.meshgpu("up")
        until(lambda: not first.is_alive, "another key was taken")
        assert first.console.read_text().count("forgets its key") == 1
        assert len(story.members()) <= 2
        assert len(story.cloud.ec2.actions("TerminateInstances")) == 1
        assert story.job(name)["state"] == "queued"


def test_instance_that_is_out_of_touch_ends_itself_and_its_job_runs_again(story: Story, project: Project) -> None:
    story.ada.meshgpu("burst", "setup", "--yes", "--no-contact", f"{NO_CONTACT_S:.0f}s")
    try:
        with story.filled(project):
            name = project.submit("600,1", "--retries", "1")
            until(lambda: project.times("begins") == 1, "no machine was rented", RENTED_S)
            machine = story.machine()
            story.cloud.internet.cut_office()
            try:
                until(lambda: not machine.is_alive, "it lives on", DRAINED_S)
                until(lambda: story.cloud.ec2.live() == [])
                assert "TerminateInstances" not in {call["Action"] for call in story.cloud.ec2.calls}
                assert story.job(name)["state"] not in ("failed", "succeeded")
            finally:
                story.cloud.internet.heal_office()
        until(lambda: story.is_done(name), "the job was lost", 120)
        assert project.words() == ["begins", "asked", "begins", "ends"]
    finally:
        story.ada.meshgpu("burst", "setup", "--yes", "--no-contact", "2m")


def test_job_leaves_a_machine_that_the_provider_takes_back(story: Story, project: Project) -> None:
    with story.filled(project):
        name = project.submit("600,1")
        until(lambda: project.times("begins") == 1, "no machine was rented", RENTED_S)
        machine = story.machine()
        notice = datetime.now(UTC) + timedelta(seconds=SPOT_NOTICE_S)
        machine.notice_spot(f"{notice:%Y-%m-%dT%H:%M:%SZ}")
        until(lambda: not machine.is_alive, "it stays", SPOT_NOTICE_S)
        until(lambda: story.is_done(name), "the job did not run again", AGAIN_S)
    assert project.words() == ["begins", "asked", "begins", "ends"]
    assert len({host for _, who, host, _ in project.diary() if who == "job"}) == 2
    assert story.cloud.ec2.most_live == 1
