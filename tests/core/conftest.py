"""A small office to decide in: four machines of ada's, one whole RTX 4090 each, keys and clocks by hand."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from meshgpu.core.trust.meshlog import MeshLog
from meshgpu.core.trust.requests import RequestRules
from meshgpu.model.clock import Now
from meshgpu.model.ids import UserName, digest, job_id
from meshgpu.model.job import EnvironmentRequest, JobSpec
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.model.trust import Signed
from meshgpu.sim.office import Office, furnish

WALL_S = 1_800_000_000.0


@pytest.fixture
def office() -> Office:
    return furnish(random.Random(1), 4, is_plain=True)


@pytest.fixture
def log(office: Office) -> MeshLog:
    """The mesh log as the first machine holds it."""
    log = MeshLog(office.notaries[0])
    log.enter(office.mesh, office.log)
    return log


@pytest.fixture
def at() -> Callable[[float], Now]:
    """The moment `boot_s` seconds after start."""
    return lambda boot_s: Now(boot_s, WALL_S + boot_s, "boot")


@pytest.fixture
def rules(office: Office, log: MeshLog) -> RequestRules:
    """The rules as the first machine applies them."""
    return RequestRules(office.notaries[0], log, office.setups[0].node)


@pytest.fixture
def signed(office: Office) -> Callable[..., tuple[JobSpec, Signed]]:
    """A job of ada's from the second machine, held by the first; `number` makes another id."""

    def make(number: int = 1, **changes: object) -> tuple[JobSpec, Signed]:
        submitter = office.setups[1]
        key, nonce = submitter.accounts[UserName("ada")], number.to_bytes(16, "big")
        spec = JobSpec(
            office.mesh,
            job_id(key, nonce),
            nonce,
            "train",
            UserName("ada"),
            submitter.node,
            ("python", "train.py"),
            False,
            (),
            EnvironmentRequest(),
            digest(b"tree"),
            1000,
            1,
            Resources(GpuRequest(1)),
            None,
            (office.setups[0].node,),
            WALL_S,
        )
        spec = replace(spec, **changes)  # type: ignore[arg-type]  # names and types are JobSpec's
        return spec, office.notaries[1].sign(key, spec)

    return make
