"""What each user had of a machine lately."""

from collections.abc import Callable

import pytest

from meshgpu.core.effects import Persist
from meshgpu.core.jobs.usage import HALF_LIFE_S, KEEP_S, Usage
from meshgpu.model.clock import Now
from meshgpu.model.gossip import Allocation, Used
from meshgpu.model.ids import GpuId, JobId, UserName
from meshgpu.model.records import UsageRecord
from meshgpu.model.resources import GpuShare

Clock = Callable[[float], Now]
ADA = UserName("ada")
RUNS = (Allocation(JobId("j" * 26), 1, "train", ADA, (GpuShare(GpuId("a")), GpuShare(GpuId("b")))),)
HOUR_S = 3600.0


def test_what_runs_is_counted_until_it_ends(at: Clock) -> None:
    usage = Usage()
    usage.step(at(0), ())
    usage.step(at(100), RUNS)
    usage.step(at(100 + HOUR_S / 2), RUNS)
    usage.step(at(100 + HOUR_S), ())
    (told,) = usage.told()
    usage.step(at(200 + HOUR_S), ())
    assert told == Used(ADA, 2 * HOUR_S)
    assert usage.told() == (told,)


def test_what_was_used_fades(at: Clock) -> None:
    usage = Usage()
    usage.step(at(0), RUNS)
    usage.step(at(HOUR_S), ())
    usage.step(at(HOUR_S + HALF_LIFE_S), ())
    assert usage.told() == (Used(ADA, HOUR_S),)
    usage.step(at(HOUR_S + 20 * HALF_LIFE_S), ())
    assert usage.told() == ()


def test_count_outlives_the_agent_and_fades_meanwhile(at: Clock) -> None:
    usage = Usage()
    usage.step(at(0), RUNS)
    (kept,) = usage.step(at(HOUR_S), RUNS)
    assert isinstance(kept, Persist)
    assert isinstance(kept.record, UsageRecord)
    later = Usage()
    later.restore(at(HOUR_S + HALF_LIFE_S), kept.record)
    assert later.told() == (Used(ADA, HOUR_S),)
    wrong = Usage()
    wrong.restore(at(0), kept.record)  # by a clock that was set back
    assert wrong.told() == (Used(ADA, 2 * HOUR_S),)


@pytest.mark.parametrize("steps", [10, 1000])
def test_disk_is_written_once_a_minute_at_most(at: Clock, steps: int) -> None:
    usage = Usage()
    usage.step(at(0), ())
    written = [usage.step(at(1 + 5 * KEEP_S * number / steps), RUNS) for number in range(steps)]
    assert 4 <= sum(bool(effects) for effects in written) <= 6
    assert Usage().step(at(0), ()) == []
