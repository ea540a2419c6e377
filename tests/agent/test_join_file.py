"""What an agent does with a string that was laid onto its machine."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from meshgpu.adapters.join_files import JoinFiles
from meshgpu.agent import join_file
from meshgpu.agent.join_file import FileJoiner
from meshgpu.agent.status import JoinNote
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address
from tests.agent.pairing_lab import Dialog, Lab, Machine, lab


@dataclass
class Rig:
    """A machine with a file on it. silent: how many tries find nobody. said: what `doctor` was told."""

    machine: Machine
    office: Lab
    directory: Path
    silent: int = 0
    said: list[JoinNote | None] = field(default_factory=list)
    before_dial: Callable[[], None] = lambda: None

    @property
    def path(self) -> Path:
        return self.directory / f"join-{self.machine.name}"

    def lay(self, text: str, mode: int = 0o600) -> None:
        self.path.write_text(f"{text}\n")
        self.path.chmod(mode)

    async def dial(self, address: Address) -> Dialog:
        self.before_dial()
        if self.silent:
            self.silent -= 1
            raise MeshgpuError("no-answer", "nobody is there")
        return Dialog(self.office.ada.listener)

    def start(self) -> Awaitable[None]:
        files = JoinFiles([self.path], self.directory / f"used-{self.machine.name}")
        luck, pairing = random.Random(1), self.machine.pairing
        own = self.path.stat().st_uid if self.path.exists() else 0
        return FileJoiner(files, pairing, self.dial, own, self.machine.name, luck, self.said.append).run()

    @property
    def is_member(self) -> bool:
        return self.machine.node.log.mesh is not None


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_file, "pause_s", lambda tries, luck: 0.0)


async def test_two_rigs_join_by_copies_of_one_file_and_remove_them(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite(uses=2, user="bob")
        for name in ("rig-1", "rig-2"):
            rig = Rig(office.make(name), office, tmp_path)
            rig.lay(invite)
            await rig.start()
            assert (rig.is_member, rig.path.exists(), rig.said) == (True, False, [None])
        assert office.ada.names() == {"ada", "rig-1", "rig-2"}
        assert {m.owner for m in office.ada.node.log.members.values()} == {"ada", "bob"}


async def test_account_that_runs_the_agent_becomes_the_invited_user(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path)
        rig.lay(await office.invite(user="bob"))
        await rig.start()
        account = office.ada.node.log.account(rig.machine.node.node, rig.path.parent.stat().st_uid)
        assert account is not None
        assert account.user == "bob"


async def test_rig_whose_name_is_taken_joins_under_a_longer_one(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite(uses=2)
        await office.make("rig").join(invite, office.ada.listener)
        other = Rig(office.make("other"), office, tmp_path)
        other.machine.name = "rig"
        other.lay(invite)
        await other.start()
        assert office.ada.names() == {"ada", "rig", f"rig-{other.machine.node.node[:4]}"}


async def test_rig_tries_again_until_the_inviter_answers(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path, silent=3)
        rig.lay(await office.invite())
        await rig.start()
        assert rig.is_member
        tried, joined = rig.said[:-1], rig.said[-1]
        assert [note.ok for note in tried if note] == [None] * 3
        assert joined is None
        assert all("mgpu1" not in note.found for note in tried if note)


async def test_rig_stops_trying_when_the_file_is_gone(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path, silent=1)
        rig.lay(await office.invite())
        rig.before_dial = rig.path.unlink
        await rig.start()
        assert (rig.is_member, rig.silent) == (False, 0)


async def test_rig_gives_a_string_up_that_was_used_before(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        invite = await office.invite()
        await office.invite()  # so that the listener stays
        await office.make("bob").join(invite, office.ada.listener)
        rig = Rig(office.make("rig"), office, tmp_path)
        rig.lay(invite)
        await rig.start()
        assert (rig.is_member, rig.path.exists()) == (False, False)
        note = rig.said[-1]
        assert note is not None
        assert (note.ok, "was used before" in note.found) == (False, True)


async def test_garbled_string_is_given_up(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path)
        rig.lay("mgpu1-half")
        await rig.start()
        assert (rig.is_member, rig.path.exists()) == (False, False)


async def test_file_that_others_may_read_is_not_used_and_doctor_hears_it(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path)
        rig.lay(await office.invite(), 0o644)
        await rig.start()
        assert (rig.is_member, rig.path.exists()) == (False, True)
        note = rig.said[-1]
        assert note is not None
        assert (note.ok, "0644" in note.found) == (False, True)
        assert note.hint is not None
        assert f"chmod 600 {rig.path}" in note.hint


async def test_machine_in_a_mesh_uses_no_file_and_doctor_hears_it(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path)
        await rig.machine.pairing.found(0, "own", "rig", "bob")
        rig.lay(await office.invite())
        await rig.start()
        assert (rig.machine.node.log.mesh_name, rig.path.exists()) == ("own", True)
        note = rig.said[-1]
        assert note is not None
        assert note.hint == f"rm {rig.path}"


async def test_machine_without_a_file_does_nothing(tmp_path: Path) -> None:
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path)
        await rig.start()
        assert (rig.is_member, rig.said) == (False, [])


async def test_string_that_can_neither_be_removed_nor_remembered_is_not_tried_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again after a pause, as if nobody had answered."""
    pauses: list[int] = []

    def pause(tries: int, luck: float) -> float:
        pauses.append(tries)
        if tries == 3:
            rig.path.unlink()
        return 0.0

    def fail(files: JoinFiles, file: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(join_file, "pause_s", pause)
    monkeypatch.setattr(JoinFiles, "discard", fail)
    async with lab(tmp_path) as office:
        rig = Rig(office.make("rig"), office, tmp_path)
        rig.lay("mgpu1-half")
        await rig.start()
        assert pauses == [1, 2, 3]
