"""Commands about the files that jobs leave: ls, cp."""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from meshgpu.cli.complete import job_places
from meshgpu.cli.files import PREFIX, beneath, fetch, inside, parse_source, replace
from meshgpu.cli.render import count, note, plain, print_table, size
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_MESH_FAILED
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import FileView
from meshgpu.errors import MeshgpuError


def ls(
    place: Annotated[str, typer.Argument(metavar="runs/ID[/DIR]", autocompletion=job_places)], as_json: Json = False
) -> None:
    """Show the files that a job left; runs/ may be left out."""
    job, path = parse_source(place if place.startswith(PREFIX) else PREFIX + place)
    files = beneath(AgentClient.found().files(job), path)
    if as_json:
        print(json.dumps({"files": files}))
    elif files:
        print_table(("SIZE", "PATH"), [(size(file["size_bytes"]), file["path"]) for file in files], frozenset({"SIZE"}))
    elif path:
        raise _no_file(job, path)
    else:
        note(f"{plain(job)} left no files")


def cp(
    places: Annotated[list[str], typer.Argument(metavar="runs/ID/PATH… DEST", autocompletion=job_places)],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Whole directories; runs/ID/ is all that the job left.")
    ] = False,
) -> None:
    """Copy files that jobs left to this machine, over what lies there.

    A directory keeps its name at DEST; with a slash at its end only what is in it is copied, and so it is for runs/ID.
    Symbolic links that a job leaves are not copied.
    """
    *sources, last = places
    if not sources:
        raise MeshgpuError(
            "bad-request", "cannot copy: expected runs/ID/PATH and where to put it", "meshgpu cp runs/ID/PATH ."
        )
    if last == "-":
        raise MeshgpuError("bad-request", "cannot copy to standard output: expected a file or a directory", "cp … .")
    client, destination = AgentClient.found(), Path(last)
    plans: list[tuple[str, list[tuple[FileView, Path]]]] = []
    for source in sources:
        job, path = parse_source(source)
        one_file = not recursive and len(sources) == 1 and not last.endswith("/") and not destination.is_dir()
        if not one_file and destination.exists() and not destination.is_dir():
            raise MeshgpuError(
                "bad-request", f"cannot copy several files to {destination}: it is no directory", "mkdir …"
            )
        plans.append((job, _plan(client, job, path, destination, recursive=recursive, rename=one_file)))
    _check_distinct([target for _, plan in plans for _, target in plan], destination)
    came = sum(len(fetch(client, job, plan, replace)) for job, plan in plans)
    note(f"{count(came, 'file')} copied to {plain(str(destination))}")
    if came < sum(len(plan) for _, plan in plans):
        raise typer.Exit(EXIT_MESH_FAILED)


def _plan(
    client: AgentClient, job: str, path: str, destination: Path, *, recursive: bool, rename: bool
) -> list[tuple[FileView, Path]]:
    """Which files go where; raises MeshgpuError where there are none, or a directory without `-r`."""
    files = beneath(client.files(job), path)
    if not files:
        raise _no_file(job, path)
    if not recursive:
        if [file["path"] for file in files] != [path]:
            raise MeshgpuError(
                "bad-request", f"cannot copy runs/{job}/{path}: it is a directory", f"meshgpu cp -r runs/{job}/{path} …"
            )
        return [(files[0], destination if rename else inside(destination, PurePosixPath(path).name))]
    clean = path.strip("/")
    contents_only = path.endswith("/") or not clean
    above = clean if contents_only else clean.rpartition("/")[0]
    skip = len(above) + 1 if above else 0
    return [(file, inside(destination, file["path"][skip:])) for file in files]


def _check_distinct(targets: list[Path], destination: Path) -> None:
    """Raise MeshgpuError where one file would overwrite another of the same call."""
    seen: set[Path] = set()
    for target in targets:
        if target in seen:
            name = target.relative_to(destination)
            raise MeshgpuError(
                "bad-request",
                f"cannot copy to {destination}: two sources are called {name}",
                f"copy them one by one, into {destination}/1/ and {destination}/2/",
            )
        seen.add(target)


def _no_file(job: str, path: str) -> MeshgpuError:
    return MeshgpuError("unknown-file", f"job {job} left no {path or 'files'}", f"meshgpu ls runs/{job}")
