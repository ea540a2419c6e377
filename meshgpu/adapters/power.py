"""Ends the machine that this agent runs on."""

import asyncio
from typing import Final

from meshgpu.errors import MeshgpuError

SHUTDOWN: Final = ("shutdown", "-P", "now")
CALL_S: Final = 20.0


async def power_off() -> None:
    """Ask the system to power off; raises MeshgpuError `no-power-off` where it does not take that."""
    shown = " ".join(SHUTDOWN)
    try:
        async with asyncio.timeout(CALL_S):
            process = await asyncio.create_subprocess_exec(
                *SHUTDOWN, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
            )
            code = await process.wait()
    except (OSError, TimeoutError) as error:
        raise MeshgpuError("no-power-off", f"cannot run {shown}: {error or 'it does not end'}") from error
    if code:
        raise MeshgpuError("no-power-off", f"cannot power off: {shown} ended with {code}")
