"""What others notice of a machine that did something to its audit."""

from meshgpu.core.audit import AUDIT
from meshgpu.model.resources import GpuRequest, Resources
from meshgpu.sim.world import World, WorldConfig


def test_machine_that_forgets_is_named_by_those_who_heard_of_it_before() -> None:
    world = World(1, WorldConfig(size=3, is_plain=True))
    world.start()
    world.run(10.0)
    ada, rig = world.named("rig0"), world.named("rig1")
    world.people.run(ada, next(iter(ada.setup.accounts.values())), "rig1", Resources(GpuRequest(1)))
    world.run(200.0)
    assert ada.warnings == []
    rig.crash_agent()
    newest = max(key for key in rig.disk if key[0] == AUDIT)
    del rig.disk[newest]
    rig.start_agent()
    world.run(30.0)
    assert ada.warnings == ["its audit went back from entry 2 to 1"]
    assert ada.agent is not None
    assert [fault.node for fault in ada.agent.audits.faults] == [rig.node]
