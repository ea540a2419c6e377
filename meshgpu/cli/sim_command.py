"""The command `sim`: what a mesh of some size does, in virtual time, with memberlist beside it. It loads `sim` itself.

The simulator must not know the wire, so what messages weigh is given to it from here.
"""

import gc
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Final

import typer

from meshgpu.cli.render import note, table
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import MeshId
from meshgpu.model.messages import Message
from meshgpu.sim.meshes import Sizes
from meshgpu.sim.plot import draw
from meshgpu.sim.study import Pair, Plan, Row, rows, study
from meshgpu.sim.weather import Weather
from meshgpu.wire.codec import encode, encode_frame

NODES_LIMIT: Final = 1000
"""A node is watched by all others: the work grows with the square."""
COLUMNS: Final = ("", "meshgpu", "memberlist", "ratio", "")
RIGHT: Final = frozenset({"meshgpu", "memberlist", "ratio"})


def sim(
    nodes: Annotated[str, typer.Option("--nodes", metavar="N,N,…", help="Sizes of the mesh.")] = "4,16,64",
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds", min=10.0, help="Virtual seconds of news, and of trouble; without, 300, of 256 machines 75."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides all that is drawn.")] = 1,
    delay: Annotated[str, typer.Option("--delay", metavar="LOW:HIGH", help="Of a packet, milliseconds.")] = "0.2:3",
    jitter: Annotated[float, typer.Option("--jitter", min=0.0, help="Mean of what comes on top, milliseconds.")] = 0.0,
    loss: Annotated[float, typer.Option("--loss", min=0.0, max=0.9, help="Part of the packets that are lost.")] = 0.0,
    cut: Annotated[
        list[str] | None, typer.Option("--cut", metavar="FROM:TO", help="Halve the mesh, seconds; may be repeated.")
    ] = None,
    starve: Annotated[
        float, typer.Option("--starve", min=0.0, max=1.0, help="Part of the machines without CPU.")
    ] = 0.2,
    pause: Annotated[
        float, typer.Option("--pause", min=0.0, help="One machine after the other stops, seconds.")
    ] = 20.0,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the figures into an SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Simulate meshes, beside memberlist: how fast news spreads, what that costs, and who is held for down."""
    sizes = _sizes(nodes)
    shortest_s = Plan(seconds=seconds).lasts_s(max(sizes))
    low, high = _range("--delay", delay)
    plan = Plan(
        seconds=seconds,
        seed=seed,
        weather=Weather((low / 1e3, high / 1e3), jitter / 1e3, loss),
        cuts=tuple(_range("--cut", text, shortest_s) for text in cut or ()),
        starved=starve,
        pause_s=pause,
    )
    if plot is not None and plot.suffix != ".svg":
        raise MeshgpuError("bad-request", f"cannot draw into {plot}: expected a name that ends in .svg")
    began = time.monotonic()
    with _processors() as processors:
        pairs = study(plan, sizes, WEIGHTS, processors.map)
    note(f"took {time.monotonic() - began:.0f} s")
    if as_json:
        print(json.dumps([_as_json(pair) for pair in pairs]))
    else:
        print("\n".join(_page(caption(plan, sizes), pairs)))
    if plot is not None:
        plot.write_text(draw(pairs, caption(plan, sizes)))
        note(f"drawn into {plot}")


def value_bytes(value: object) -> int:
    return len(encode(value))


def frame_bytes(message: Message) -> int:
    return len(encode_frame(MeshId("0" * 64), message))


WEIGHTS: Final = Sizes(value_bytes, frame_bytes)


def _processors() -> ProcessPoolExecutor:
    """A process for each of this machine's. Worlds leave few cycles, and looking for them takes long in large ones."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), initializer=gc.disable)


# -- what was asked for -----------------------------------------------------------------------------------------------


def _sizes(text: str) -> tuple[int, ...]:
    """`4,16` as numbers. Raises MeshgpuError `bad-request`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 2 <= int(part) <= NODES_LIMIT for part in parts):
        raise MeshgpuError(
            "bad-request",
            f"cannot simulate {text!r} machines: expected numbers from 2 to {NODES_LIMIT:,} with commas between",
            "meshgpu sim --nodes 4,16,64",
        )
    return tuple(sorted({int(part) for part in parts}))


def _range(flag: str, text: str, limit: float = math.inf) -> tuple[float, float]:
    """`60:90` as two numbers that rise. Raises MeshgpuError `bad-request`."""
    first, _, second = text.partition(":")
    try:
        low, high = float(first), float(second)
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= limit or math.isinf(high):
        within = f", at most {limit:g}" if limit < math.inf else ""
        raise MeshgpuError(
            "bad-request",
            f"cannot read {text!r} as {flag}: expected two numbers that do not fall{within}",
            f"meshgpu sim {flag} {'60:90' if flag == '--cut' else '0.2:3'}",
        )
    return low, high


# -- what is shown ----------------------------------------------------------------------------------------------------


def caption(plan: Plan, sizes: Sequence[int]) -> str:
    """What the figures are of, in one line."""
    lasts = {size: f"{plan.lasts_s(size):g} s" for size in sizes}
    usual = lasts[min(sizes)]
    shorter = [f"{lasts_s} of {size}" for size, lasts_s in lasts.items() if lasts_s != usual]
    low, high = (f"{value * 1e3:g}" for value in plan.weather.delay_s)
    parts = [f"delay {low} to {high} ms"]
    if plan.weather.jitter_s:
        parts.append(f"jitter {plan.weather.jitter_s * 1e3:g} ms")
    parts.append(f"loss {plan.weather.loss:.0%}" if plan.weather.loss else "no loss")
    parts += [f"halved from {begins:g} to {ends:g} s" for begins, ends in plan.cuts]
    if plan.starved:
        parts.append(f"{plan.starved:.0%} starved")
    if plan.pause_s:
        parts.append(f"pauses of {plan.pause_s:g} s")
    return " · ".join([*parts, ", ".join([usual, *shorter]), f"seed {plan.seed}"])


def _page(about: str, pairs: Sequence[Pair]) -> Iterator[str]:
    yield about
    lines: list[tuple[str, ...]] = []
    for pair in pairs:
        lines.append((f"{pair.nodes} machines", "", "", "", ""))
        lines += [_line(row) for row in rows(pair)]
    for line in table(COLUMNS, lines, RIGHT):
        yield line if line.startswith(" ") else f"\n{line}"


def _line(row: Row) -> tuple[str, ...]:
    what = f"  {row.what}, {row.unit}" if row.unit else f"  {row.what}"
    is_known = 0 < row.memberlist < math.inf and row.ours < math.inf
    ratio = figure(row.ours / row.memberlist) if is_known else ""
    return what, figure(row.ours), figure(row.memberlist), ratio, row.note


def figure(value: float) -> str:
    """Three digits that count; `never` where something did not happen in time, `-` where nothing was measured."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "never"
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    digits = 3 - math.ceil(math.log10(value))  # no power of ten may be rounded up to one more
    return f"{value:.{min(digits, 4)}f}"


def _as_json(pair: Pair) -> dict[str, object]:
    """Infinite is null: not in time."""
    figures = [
        {"what": row.what, "unit": row.unit, "meshgpu": _finite(row.ours), "memberlist": _finite(row.memberlist)}
        for row in rows(pair)
    ]
    return {"nodes": pair.nodes, "figures": figures}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
