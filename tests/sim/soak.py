"""Many more seeds than CI runs: `make sim-long`, or `python -m tests.sim.soak --seeds 10000 --from 220`.

Each seed is one mesh of seven machines under faults; with `--renting`, two burst peers and a failing provider. The
first that breaks an invariant is named and ends the run.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from meshgpu.sim.renting import RentingWorld
from meshgpu.sim.scenario import simulate


def play(seed: int) -> float:
    """Virtual seconds that this seed's world lived. Raises what its invariants raise, with the seed."""
    try:
        return simulate(seed).world.timeline.time_s
    except Exception as error:
        error.add_note(f"seed {seed}: rerun it with `python -m tests.sim.soak --from {seed} --seeds 1`")
        raise


def rent(seed: int) -> float:
    """The same of this seed's burst world."""
    world = RentingWorld(seed)
    try:
        world.play()
    except Exception as error:
        error.add_note(f"seed {seed}: rerun it with `python -m tests.sim.soak --renting --from {seed} --seeds 1`")
        raise
    return world.timeline.time_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="first", type=int, default=220, help="first seed; CI runs those below")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--renting", action="store_true", help="play the burst world instead")
    options = parser.parse_args()
    begin, virtual_s = time.monotonic(), 0.0
    with ProcessPoolExecutor() as pool:
        seeds = range(options.first, options.first + options.seeds)
        for number, lived_s in enumerate(pool.map(rent if options.renting else play, seeds, chunksize=10), start=1):
            virtual_s += lived_s
            if number % 500 == 0 or number == options.seeds:
                speed = virtual_s / (time.monotonic() - begin)
                print(f"{number} seeds, {virtual_s:,.0f} virtual seconds, {speed:,.0f} × real time", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
