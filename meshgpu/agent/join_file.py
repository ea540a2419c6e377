"""Joining by a file: what an agent in no mesh does at its start with a string that was laid onto its machine."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from meshgpu import ports
from meshgpu.adapters.join_files import JoinFile, JoinFiles
from meshgpu.agent.pairing import Joined, Pairing
from meshgpu.agent.status import JoinNote
from meshgpu.core.trust.join_file import fault_of, is_over, names_for, pause_s
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class FileJoiner:
    """uid: the account that runs the agent; it becomes the invited user's.

    tell: what `doctor` is to say, None for nothing. Only the addresses in the string are tried: whoever answers
    elsewhere does not know it, and would be taken for its maker, who knows it no more.
    """

    files: JoinFiles
    pairing: Pairing
    dial: Callable[[Address], Awaitable[ports.PairingDialog]]
    uid: int
    host_name: str
    rng: random.Random
    tell: Callable[[JoinNote | None], None]

    async def run(self) -> None:
        """Until this machine is in a mesh, or there is no file that may be used. Never raises MeshgpuError."""
        tries = 0
        while (file := self._usable()) is not None:
            try:
                joined = await self._join(file.text)
            except MeshgpuError as error:
                if is_over(error.code) and self._refused(file, error):
                    continue
                found = error.message
            except TimeoutError:
                found = "this machine's disk is too slow"
            else:
                logger.info("joined the mesh %s by %s, as a machine of %s", joined.mesh_name, file.path, joined.user)
                self.tell(None)
                self._discard(file)
                return
            tries += 1
            wait_s = pause_s(tries, self.rng.random())
            logger.info("cannot join by %s yet, again in %.0f s: %s", file.path, wait_s, found)
            self.tell(JoinNote(None, f"{file.path}: {found}; tried again for as long as the file is there"))
            await asyncio.sleep(wait_s)

    def _usable(self) -> JoinFile | None:
        """The first file that may be used; says what is wrong with one before it."""
        is_member = self.pairing.node.log.mesh is not None
        for file in self.files.present():
            if is_member:
                unused = f"{file.path} was not used: this machine is in a mesh already"
                self.tell(JoinNote(None, unused, f"rm {file.path}"))
                return None
            fault = file.fault or fault_of(file.mode, file.owner, self.uid)
            if not fault:
                return file
            logger.warning("cannot join by %s: %s", file.path, fault)
            mend = f"chown {self.uid} {file.path} && chmod 600 {file.path}; then meshgpu down && meshgpu up"
            self.tell(JoinNote(False, f"cannot join by {file.path}: {fault}", mend))
        return None

    async def _join(self, text: str) -> Joined:
        first, second = names_for(self.host_name, self.pairing.node.node)
        try:
            return await self.pairing.join(self.uid, text, first, (), self.dial)
        except MeshgpuError as error:
            if error.code != "name-taken":
                raise
        return await self.pairing.join(self.uid, text, second, (), self.dial)

    def _refused(self, file: JoinFile, error: MeshgpuError) -> bool:
        """Whether this file is done with, so that another may be looked for."""
        logger.warning("cannot join by %s, and it is not tried again: %s", file.path, error.message)
        self.tell(JoinNote(False, f"{file.path} did not work: {error.message}", "meshgpu invite --out join, there"))
        return self._discard(file)

    def _discard(self, file: JoinFile) -> bool:
        try:
            self.files.discard(file)
        except OSError as error:
            logger.warning("cannot remove %s, nor remember that it was used: %s", file.path, error.strerror)
            return False
        return True
