"""Commands about the files that jobs leave: ls, cp."""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from meshgpu.cli.complete import job_places
from meshgpu.cli.files import beneath, fetch, inside, parse_source, replace
from meshgpu.cli.render import count, note, plain, print_table, size
from meshgpu.cli.watch import Json
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import FileView
from meshgpu.errors import MeshgpuError


def ls(
    place: Annotated[str, typer.Argument(metavar="runs/ID[/DIR]", autocompletion=job_places)], as_json: Json = False
) -> None:
    """Show the files that a job left."""
    job, path = parse_source(place)
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
    """
    *sources, last = places
    if not sources:
        raise MeshgpuError(
            "bad-request", "cannot copy: expected runs/ID/PATH and where to put it", "meshgpu cp runs/ID/PATH ."
        )
    client, destination = AgentClient.found(), Path(last)
    whole = 0
    for source in sources:
        job, path = parse_source(source)
        one_file = not recursive and len(sources) == 1 and not last.endswith("/") and not destination.is_dir()
        if not one_file and destination.exists() and not destination.is_dir():
            raise MeshgpuError(
                "bad-request", f"cannot copy several files to {destination}: it is no directory", "mkdir …"
            )
        plan = _plan(client, job, path, destination, recursive=recursive, rename=one_file)
        fetch(client, job, plan, replace)
        whole += len(plan)
    note(f"{count(whole, 'file')} copied to {plain(str(destination))}")


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


def _no_file(job: str, path: str) -> MeshgpuError:
    return MeshgpuError("unknown-file", f"job {job} left no {path or 'files'}", f"meshgpu ls runs/{job}")
