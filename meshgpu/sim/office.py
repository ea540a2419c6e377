"""The people and machines of a simulated office, and how their mesh came to be."""

import random
from dataclasses import dataclass, replace
from typing import Final

from meshgpu.core.owner import OwnerPolicy
from meshgpu.core.trust.meshlog import MeshLog, found
from meshgpu.model.ids import Address, GpuId, KeyId, MeshId, NodeId, UserName, key_id, node_id
from meshgpu.model.inventory import Gpu, Inventory
from meshgpu.model.lending import Lending
from meshgpu.model.resources import GB
from meshgpu.model.trust import AddNode, Genesis, LinkUser, Role, SetPolicy, SetRole, Signed
from meshgpu.sim.fakes import KeyRing, ToyNotary
from meshgpu.sim.machine import WALL_START_S, Setup

WRONG_CLOCK_S: Final = 9 * 3600.0
"""By which a wall clock is wrong at most where clocks are wrong: a time zone that was taken for another."""
CLOCK_OFFSET_S: Final = 55.0
"""Wall clocks are wrong by this at most: two of them differ by less than the 120 s that are allowed."""
LEASE_ENDS_WALL_S: Final = WALL_START_S + 1e6
"""Long after any world is over."""
MODELS: Final = (("NVIDIA GeForce RTX 4090", 24), ("NVIDIA GeForce RTX 3060", 12), ("NVIDIA A100-SXM4-80GB", 80))
USERS: Final = (UserName("ada"), UserName("bob"), UserName("eve"))


@dataclass(frozen=True, slots=True)
class Office:
    """A mesh before its agents start. notaries: one for each machine, in the order of `setups`."""

    mesh: MeshId
    log: tuple[Signed, ...]
    setups: tuple[Setup, ...]
    notaries: tuple[ToyNotary, ...]
    ring: KeyRing


def furnish(
    rng: random.Random,
    size: int,
    *,
    is_plain: bool = False,
    has_intruder: bool = False,
    instances: int = 0,
    has_wrong_clocks: bool = False,
) -> Office:
    """An office of `size` machines with up to two GPUs each; a plain one is the same for every seed.

    instances: rented machines that come after these; the second machine has let them in, and jobs may leave the office.

    Plain: one RTX 4090 in every machine, all owned by ada, all fenced, all clocks right; the last one alone holds jobs.
    The machine of the intruder is the last one. has_wrong_clocks: whether they are wrong by hours.
    """
    ring = KeyRing()
    setups: list[Setup] = []
    notaries: list[ToyNotary] = []
    bodies: list[AddNode | LinkUser] = []
    for number in range(size):
        name = f"rig{number}"
        public = ring.make(name)
        node = node_id(public)
        owner = USERS[0] if is_plain else USERS[number % len(USERS)]
        users = USERS[:1] if is_plain else [owner, *(user for user in USERS if user != owner and rng.random() < 0.3)]
        keys = {user: ring.make(f"{user}@{name}") for user in users}
        bodies.append(AddNode(node, public, b"ca " + public, name, Role.RIG, owner))
        bodies.extend(LinkUser(user, key, node, 1000 + uid) for uid, (user, key) in enumerate(keys.items()))
        accounts = {user: key_id(key) for user, key in keys.items()}
        notaries.append(ToyNotary(ring, (public, *keys.values())))
        setups.append(_setup(rng, node, name, owner, accounts, is_plain=is_plain))
    if is_plain:
        setups = [replace(setup, may_steward=setup is setups[-1]) for setup in setups]
    if has_intruder:
        setups[-1] = replace(setups[-1], policy=OwnerPolicy(lends=False), may_steward=False)
    if has_wrong_clocks:
        setups = [replace(s, wall_offset_s=rng.uniform(-WRONG_CLOCK_S, WRONG_CLOCK_S)) for s in setups]
    mesh, log = _found(notaries[0], setups[0], ring.make("recovery"), tuple(bodies))
    for number in range(instances):
        public = ring.make(f"cloud{number}")
        notaries.append(ToyNotary(ring, (public,)))
        setups.append(_instance(f"cloud{number}", node_id(public), setups[1].owner))
    if instances:
        log += _rent(notaries, setups, mesh, log, ring, instances)
    return Office(mesh, log, tuple(setups), tuple(notaries), ring)


def _setup(
    rng: random.Random, node: NodeId, name: str, owner: UserName, accounts: dict[UserName, KeyId], *, is_plain: bool
) -> Setup:
    models = [MODELS[0]] if is_plain else [rng.choice(MODELS) for _ in range(rng.choice((0, 1, 1, 2)))]
    gpus = tuple(
        Gpu(GpuId(f"GPU-{name}-{index}"), index, model, gigabytes * 2**30)
        for index, (model, gigabytes) in enumerate(models)
    )
    inventory = Inventory(rng.choice((4, 16)) if not is_plain else 8, 64 * GB, gpus)
    fence = "bubblewrap" if is_plain or rng.random() < 0.7 else ""
    trusted = () if is_plain or rng.random() < 0.7 else (rng.choice(USERS),)
    policy = OwnerPolicy(lends=is_plain or rng.random() < 0.95, trusted=trusted)
    offset_s = 0.0 if is_plain else rng.uniform(-CLOCK_OFFSET_S, CLOCK_OFFSET_S)
    return Setup(node, name, owner, accounts, inventory, fence, policy, Address(f"{name}:7443"), offset_s)


def _found(
    notary: ToyNotary, founder: Setup, recovery_key: bytes, bodies: tuple[AddNode | LinkUser, ...]
) -> tuple[MeshId, tuple[Signed, ...]]:
    """The founder's account is the admin, and lets everybody in."""
    admin = founder.accounts[founder.owner]
    linked = next(b for b in bodies if isinstance(b, LinkUser) and key_id(b.public_key) == admin)
    mesh, genesis = found(notary, admin, Genesis("office", linked.public_key, recovery_key, b"nonce"))
    log = MeshLog(notary)
    log.enter(mesh, (genesis,))
    return mesh, (genesis, *log.write(admin, bodies))


def _instance(name: str, node: NodeId, owner: UserName) -> Setup:
    gpu = Gpu(GpuId(f"GPU-{name}-0"), 0, MODELS[2][0], MODELS[2][1] * 2**30)
    policy = OwnerPolicy(lending=Lending.DEDICATED)
    inventory = Inventory(16, 64 * GB, (gpu,))
    address = Address(f"{name}:443")
    return Setup(
        node, name, owner, {}, inventory, "bubblewrap", policy, address, 0.0, may_steward=False, is_rented=True
    )


def _rent(
    notaries: list[ToyNotary],
    setups: list[Setup],
    mesh: MeshId,
    entries: tuple[Signed, ...],
    ring: KeyRing,
    instances: int,
) -> tuple[Signed, ...]:
    """The admin lets jobs leave and the second machine rent; that machine lets the instances in."""
    log = MeshLog(notaries[0])
    log.enter(mesh, entries)
    granted = log.write(
        setups[0].accounts[setups[0].owner], (SetPolicy(may_leave=True), SetRole(setups[1].node, Role.BURST))
    )
    own = MeshLog(notaries[1])
    own.enter(mesh, (*entries, *granted))
    added = []
    for setup in setups[-instances:]:
        public = ring.public(KeyId(setup.node))
        added.append(
            AddNode(setup.node, public, b"ca " + public, setup.name, Role.CLOUD, setup.owner, LEASE_ENDS_WALL_S)
        )
    return (*granted, *own.write(KeyId(setups[1].node), added))
