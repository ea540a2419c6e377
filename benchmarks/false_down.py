"""How often a machine that lives is held for down, over many simulated node seconds, each seed a mesh of its own.

A fifth of the machines starve, and every 30 s one stands still for 20 s: the last row of `make sim` at length, without
memberlist, whose every pause is a false alarm. Equal options give equal figures.
"""

import argparse
import sys

from meshgpu.sim.meshes import OurMesh
from meshgpu.sim.study import Plan, starving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3125.0, help="of each seed, virtual")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    options = parser.parse_args()
    downs, node_seconds = 0, 0.0
    for seed in range(options.first, options.first + options.seeds):
        plan = Plan(seconds=options.seconds, seed=seed)
        found, lasted_s = starving(OurMesh(seed, options.nodes, plan.weather, None), plan)
        downs, node_seconds = downs + found, node_seconds + lasted_s
        print(f"seed {seed}: {found} false DOWN; {downs} in {node_seconds:,.0f} so far", file=sys.stderr, flush=True)
    print(f"{downs} false DOWN in {node_seconds:,.0f} node seconds of meshes of {options.nodes}")


if __name__ == "__main__":
    main()
