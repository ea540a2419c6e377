"""What the shell completes: machines and jobs, as the agent knows them."""

from typing import Final

from meshgpu.client.agent import AgentClient
from meshgpu.errors import MeshgpuError

TIMEOUT_S: Final = 1.0
"""Whoever pressed Tab does not wait longer."""


def machine_names(incomplete: str) -> list[str]:
    try:
        names = [machine["name"] for machine in AgentClient.found(TIMEOUT_S).machines()["machines"]]
    except MeshgpuError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def job_names(incomplete: str) -> list[str]:
    try:
        names = [job["display"] for job in AgentClient.found(TIMEOUT_S).jobs(finished=True)["jobs"]]
    except MeshgpuError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def job_places(incomplete: str) -> list[str]:
    return [place for place in (f"runs/{name}/" for name in job_names("")) if place.startswith(incomplete)]
