"""The commands `burst …`: let this machine rent instances; see what it rents, would rent, and spends; end everything.

`ls`, `reap` and `iam` need no agent and no mesh: only AWS credentials, or nothing at all.
"""

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Final, TypeVar, cast

import typer

from meshgpu import __version__
from meshgpu.cli.iam import iam_policy
from meshgpu.cli.launch import is_attended
from meshgpu.cli.render import ago, count, note, plain, print_table
from meshgpu.cli.spans import parse_span
from meshgpu.cli.watch import Json
from meshgpu.cli.words import EXIT_FAILED_CHECK, EXIT_MESH_FAILED
from meshgpu.client.agent import AgentClient
from meshgpu.client.views import BurstSettingsView, BurstView, CapsView, PlanView, RentedView
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import LIVE_STATES, Instance, InstanceState
from meshgpu.ports import Cloud

REGION_VARIABLES: Final = ("AWS_REGION", "AWS_DEFAULT_REGION")

INSTALL_COMMAND: Final = (
    "apt-get update -qq && apt-get install -yqq bubblewrap"
    " && curl -LsSf https://astral.sh/uv/install.sh | sh && uv tool install meshgpu=="
)
"""Of this version, without its number: an instance must speak as this machine does."""

FIRST_SETTINGS: Final[BurstSettingsView] = {
    "region": "",
    "caps": {
        "usd_per_hour": 2.0,
        "usd_per_day": 20.0,
        "usd_per_month": 100.0,
        "usd_per_job": 10.0,
        "instances": 2,
        "on_demand": False,
        "lease_s": 4 * 3600.0,
    },
    "instance_types": ["g6.xlarge", "g5.xlarge", "g4dn.xlarge"],
    "burst_after_s": 60.0,
    "idle_s": 600.0,
    "no_contact_s": 900.0,
    "image": "",
    "security_group": "",
    "install": INSTALL_COMMAND + __version__,
}
"""Where nothing is said: a month that does not hurt, one GPU with 16 to 24 GB, and nets that end what is forgotten."""

STATE_WORDS: Final = {
    "asked": "asked for",
    "pending": "boots",
    "rented": "boots",
    "enrolled": "joins",
    "joined": "works",
    "running": "runs",
    "ending": "ends",
}

T = TypeVar("T")

Dollars = float | None
Region = Annotated[
    str | None, typer.Option("--region", metavar="REGION", help="As eu-central-1 (what AWS_REGION says).")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

burst = typer.Typer(
    name="burst",
    help="Rent machines at AWS for jobs that the office has no room for.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
)


@burst.command("setup")
def setup(
    region: Region = None,
    instance_type: Annotated[
        list[str] | None, typer.Option("--instance-type", metavar="TYPE", help="May be rented; may be given again.")
    ] = None,
    usd_per_hour: Annotated[
        Dollars, typer.Option("--usd-per-hour", min=0, metavar="USD", help="All instances together (2).")
    ] = None,
    usd_per_day: Annotated[Dollars, typer.Option("--usd-per-day", min=0, metavar="USD", help="In UTC (20).")] = None,
    usd_per_month: Annotated[
        Dollars, typer.Option("--usd-per-month", min=0, metavar="USD", help="In UTC (100).")
    ] = None,
    usd_per_job: Annotated[
        Dollars, typer.Option("--usd-per-job", min=0, metavar="USD", help="All that is rented for one job (10).")
    ] = None,
    instances: Annotated[
        int | None, typer.Option("--instances", min=0, metavar="N", help="At a time (2); 0: rent no more.")
    ] = None,
    on_demand: Annotated[
        bool | None, typer.Option("--on-demand/--no-on-demand", help="Also what is dearer than spot (no).")
    ] = None,
    lease: Annotated[
        str | None, typer.Option("--lease", metavar="TIME", help="How long one instance lives at most (4h).")
    ] = None,
    burst_after: Annotated[
        str | None, typer.Option("--burst-after", metavar="TIME", help="A job waits for the office first (60s).")
    ] = None,
    idle: Annotated[
        str | None, typer.Option("--idle", metavar="TIME", help="An instance without work ends after this (10m).")
    ] = None,
    no_contact: Annotated[
        str | None, typer.Option("--no-contact", metavar="TIME", help="One out of touch ends after this (15m).")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="AMI", help="What it boots ('': the newest for NVIDIA GPUs).")
    ] = None,
    security_group: Annotated[
        str | None,
        typer.Option("--security-group", metavar="SG", help="An own one ('': one that admits this office alone)."),
    ] = None,
    install: Annotated[
        str | None, typer.Option("--install", metavar="CMD", help="Brings meshgpu onto an instance, as root.")
    ] = None,
    as_json: Json = False,
    yes: Yes = False,
) -> None:
    """Let this machine rent instances at AWS, within caps. Again: change what is said, keep the rest.

    Needs an admin of the mesh, as it lets jobs leave the office, and AWS credentials that the agent finds.
    """
    client = AgentClient.found()
    before = client.burst()
    said_caps = {
        "usd_per_hour": usd_per_hour,
        "usd_per_day": usd_per_day,
        "usd_per_month": usd_per_month,
        "usd_per_job": usd_per_job,
        "instances": instances,
        "on_demand": on_demand,
        "lease_s": _span(lease, "--lease 4h"),
    }
    said = {
        "instance_types": instance_type,
        "burst_after_s": _span(burst_after, "--burst-after 60s"),
        "idle_s": _span(idle, "--idle 10m"),
        "no_contact_s": _span(no_contact, "--no-contact 15m"),
        "image": image,
        "security_group": security_group,
        "install": install,
    }
    settings = _changed(_kept(before["settings"], region), said, said_caps)
    client.set_up_burst(settings, check=True)
    for line in _consent(before, settings):
        note(plain(line))
    _ask(f"Let {before['machine']} rent like this?", yes=yes)
    if not settings["security_group"] and settings["caps"]["instances"]:
        note(f"the security group {_admit_office(settings['region'])} admits this office, and nobody else")
    view = client.set_up_burst(settings)
    if as_json:
        print(json.dumps(view))
        return
    print(plain(_settled(view)))
    if settings["caps"]["instances"]:
        note("next: meshgpu burst status, meshgpu run --cloud ok -- python train.py")


@burst.command("status")
def status(as_json: Json = False) -> None:
    """Show what this machine rents, what that costs, and its caps."""
    view = AgentClient.found().burst()
    if as_json:
        print(json.dumps(view))
        return
    if not _is_set_up(view):
        return
    facts = _facts(view)
    width = max(map(len, facts))
    print("\n".join(plain(f"{name:{width}}  {fact}") for name, fact in facts.items()))
    if view["rented"]:
        print()
        header = ("INSTANCE", "MACHINE", "TYPE", "MARKET", "$/H", "JOB", "SINCE", "LEASE", "STATE")
        now = time.time()
        print_table(
            header, [_rented_row(rented, view, now) for rented in view["rented"]], frozenset({"$/H", "SINCE", "LEASE"})
        )


@burst.command("plan")
def plan(as_json: Json = False) -> None:
    """Show what this machine would rent now for each job that waits, at which price, or why it rents nothing."""
    view = AgentClient.found().burst_plan()
    if as_json:
        print(json.dumps(view))
        return
    if not _is_set_up(view):
        return
    if not view["plans"]:
        note("nothing waits that may leave the office and for which no machine of the mesh has room")
        return
    now = time.time()
    header = ("JOB", "GPU", "WAITS", "$/H", "AT WORST", "RENTS(WHY NOT)")
    rows = [_plan_row(plan, now) for plan in view["plans"]]
    print_table(header, rows, frozenset({"WAITS", "$/H", "AT WORST"}))
    if view["problem"]:
        note(plain(f"the last problem: {view['problem']}"))


@burst.command("ls")
def ls(region: Region = None, as_json: Json = False) -> None:
    """List the instances of every mesh in a region, as AWS knows them. Needs only AWS credentials."""
    where = _region(region)
    found = [i for i in _at_seller(where, _instances) if i.state is not InstanceState.TERMINATED]
    if as_json:
        print(json.dumps({"region": where, "instances": [_instance(i) for i in found]}))
    elif found:
        _list(found)
    else:
        note(plain(f"no instance of meshgpu lives in {where}"))


@burst.command("reap")
def reap(region: Region = None, yes: Yes = False) -> None:
    """End every instance of every mesh in a region, and what runs there. Needs only AWS credentials."""
    where = _region(region)
    found = [i for i in _at_seller(where, _instances) if i.state in LIVE_STATES]
    if not found:
        note(plain(f"no instance of meshgpu lives in {where}"))
        return
    _list(found)
    _ask(f"End {'it' if len(found) == 1 else f'all {len(found)}'}, and what runs there?", yes=yes)
    failures = _at_seller(where, lambda cloud: _end_all(cloud, found))
    note(f"{count(len(found) - len(failures), 'instance')} told to end")
    if failures:
        for failure in failures:
            note(plain(failure))
        raise typer.Exit(EXIT_MESH_FAILED)


@burst.command("iam")
def iam() -> None:
    """Print an IAM policy with the least rights that renting needs, for the user whose credentials the agent has."""
    print(json.dumps(iam_policy(), indent=2))


# -- setup -----------------------------------------------------------------------------------------------------------


def _kept(settings: BurstSettingsView | None, region: str | None) -> BurstSettingsView:
    """What holds where nothing else is said: the settings so far, else the first ones."""
    kept: BurstSettingsView = json.loads(json.dumps(settings or FIRST_SETTINGS))
    if kept["install"].startswith(INSTALL_COMMAND):
        kept["install"] = INSTALL_COMMAND + __version__
    wanted = region if region is not None else kept["region"] or _region(None)
    if wanted != kept["region"]:
        kept["image"] = kept["security_group"] = ""  # they are of one region
        kept["region"] = wanted
    return kept


def _changed(kept: BurstSettingsView, said: Mapping[str, object], said_caps: Mapping[str, object]) -> BurstSettingsView:
    """The settings with what was said; None says nothing."""
    caps = {**kept["caps"], **_without_none(said_caps)}
    return cast(BurstSettingsView, {**kept, **_without_none(said), "caps": caps})


def _without_none(said: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in said.items() if value is not None}


def _span(text: str | None, example: str) -> float | None:
    return None if text is None else parse_span(text, f"meshgpu burst setup {example}")


def _consent(before: BurstView, settings: BurstSettingsView) -> list[str]:
    """What it means: where, what, how much, for whom, with whose credentials."""
    caps = settings["caps"]
    if before["rents"] and not caps["instances"]:
        return [f"{before['machine']} will rent no more instances; those that live end as they would."]
    policy = "may leave the office" if before["may_leave"] else "may then leave the office"
    return [
        f"{before['machine']} will rent instances at AWS and pay for them:",
        f"  where        {settings['region']}",
        f"  what         {_types(settings)}",
        f"  at most      {_caps(caps)}",
        f"  for          jobs that wait for more than {ago(settings['burst_after_s'])} and fit no machine of the mesh",
        f"  each ends    {_nets(settings)}",
        f"  boots        {settings['image'] or 'the newest image for NVIDIA GPUs'}, then runs: {settings['install']}",
        f"  reached by   {_group(settings)}",
        f"Jobs of this mesh {policy}, with their code and environment variables, unless they say --cloud never.",
        "AWS credentials are those that the agent finds in ~/.aws or its environment; meshgpu stores none.",
    ]


def _caps(caps: CapsView) -> str:
    """`$2.00 an hour, $20.00 a day, $100.00 a month, $10.00 for a job; 2 instances at a time, spot only`."""
    amounts = (
        f"${caps['usd_per_hour']:,.2f} an hour, ${caps['usd_per_day']:,.2f} a day, "
        f"${caps['usd_per_month']:,.2f} a month, ${caps['usd_per_job']:,.2f} for a job"
    )
    market = "spot or on demand" if caps["on_demand"] else "spot only"
    return f"{amounts}; {count(caps['instances'], 'instance')} at a time, {market}"


def _types(settings: BurstSettingsView) -> str:
    *others, last = settings["instance_types"]
    return f"{', '.join(others)} or {last}" if others else last


def _nets(settings: BurstSettingsView) -> str:
    idle, silent, lease = settings["idle_s"], settings["no_contact_s"], settings["caps"]["lease_s"]
    return f"after {ago(idle)} without work, after {ago(silent)} out of touch, after {ago(lease)} in any case"


def _group(settings: BurstSettingsView) -> str:
    group = settings["security_group"]
    if not group:
        return "this office's public address alone, TCP port 443 (a security group is found or made)"
    return f"whom the security group {group} admits"


def _ask(question: str, *, yes: bool) -> None:
    """Go on only with a yes that somebody typed, or with --yes: this is about money, or about others' work."""
    if yes:
        return
    if not is_attended():
        raise MeshgpuError("bad-request", "cannot ask whether to do this: no terminal is here", "--yes")
    if not typer.confirm(question, default=False, err=True):
        note("nothing was changed")
        raise typer.Exit(EXIT_FAILED_CHECK)


def _settled(view: BurstView) -> str:
    settings = view["settings"]
    if settings is None or not settings["caps"]["instances"]:
        return f"{view['machine']} rents no more instances."
    return f"{view['machine']} rents in {settings['region']}, at most {_caps(settings['caps'])}."


# -- status and plan -------------------------------------------------------------------------------------------------


def _is_set_up(view: BurstView) -> bool:
    """Whether there is anything to tell of; else it is told how there would be."""
    if view["settings"] is not None:
        return True
    note(plain(f"{view['machine']} is no burst peer: it rents nothing. To let it: meshgpu burst setup"))
    return False


def _facts(view: BurstView) -> dict[str, str]:
    settings = view["settings"]
    assert settings is not None
    caps = settings["caps"]
    survey = "never" if view["surveyed_s"] is None else f"{ago(view['surveyed_s'])} ago"
    if view["role"] != "burst":
        rents = f"nothing: the mesh does not let {view['machine']} rent"
    elif not view["may_leave"]:
        rents = "nothing: this mesh lets no job leave the office"
    elif not view["rents"]:
        rents = "nothing more; what lives ends"
    elif not caps["instances"]:
        rents = "nothing more: the cap is 0 instances"
    else:
        rents = f"{_types(settings)} in {settings['region']}, for jobs that wait {ago(settings['burst_after_s'])}"
    facts = {
        "rents": rents,
        "at most": _caps(caps),
        "now": f"${view['usd_per_hour']:,.2f} an hour, {count(len(view['rented']), 'instance')}",
        "today": f"${view['usd_today']:,.2f} of ${caps['usd_per_day']:,.2f} are spent or promised (UTC)",
        "this month": f"${view['usd_this_month']:,.2f} of ${caps['usd_per_month']:,.2f} are spent or promised (UTC)",
        "each ends": _nets(settings),
        "AWS asked": survey,
    }
    if view["problem"]:
        facts["problem"] = view["problem"]
    return facts


def _rented_row(rented: RentedView, view: BurstView, now: float) -> tuple[str, ...]:
    state = STATE_WORDS.get(rented["state"], rented["state"])
    because = f": {rented['reason']}" if rented["reason"] else ""
    other = f" ({rented['owner'] or 'another machine'} rents it)" if rented["owner"] != view["machine"] else ""
    return (
        rented["instance"] or "-",
        rented["machine"] or "-",
        rented["instance_type"],
        rented["market"],
        f"{rented['usd_per_hour']:.2f}",
        rented["job"][:8],
        ago(now - rented["since"]),
        ago(rented["lease_left_s"]),
        f"{state}{because}{other}",
    )


def _plan_row(plan: PlanView, now: float) -> tuple[str, ...]:
    rung = plan["rung"]
    price = (f"{rung['usd_per_hour']:.2f}", f"${plan['usd']:,.2f}") if rung else ("-", "-")
    again = f" (again in {ago(plan['again_s'])})" if plan["again_s"] else ""
    words = plan["words"] if rung else f"({plan['words']}){again}"
    return plan["job"][:8], plan["gpu_request"], ago(now - plan["waits_since"]), *price, words


# -- at the seller ---------------------------------------------------------------------------------------------------


def _region(region: str | None) -> str:
    found = region or next((os.environ[name] for name in REGION_VARIABLES if os.environ.get(name)), "")
    if not found:
        raise MeshgpuError(
            "bad-request",
            f"cannot tell which region is meant: {REGION_VARIABLES[0]} is not set",
            "--region eu-central-1",
        )
    return found


def _admit_office(region: str) -> str:
    from meshgpu.adapters import ec2_cloud  # DESIGN §2: no other command needs that room

    return ec2_cloud.admit_office(region)


def _at_seller(region: str, call: Callable[[Cloud], Awaitable[T]]) -> T:
    """What `call` makes of the seller's client, which sees every mesh."""
    import asyncio

    from meshgpu.adapters import ec2_cloud

    async def run() -> T:
        cloud: Cloud = ec2_cloud.open_ec2(region, None)
        try:
            return await call(cloud)
        finally:
            await cloud.close()

    return asyncio.run(run())


async def _instances(cloud: Cloud) -> Sequence[Instance]:
    return sorted(await cloud.instances(), key=lambda instance: (instance.launched_wall_s, instance.instance))


async def _end_all(cloud: Cloud, instances: Sequence[Instance]) -> list[str]:
    """End each, whatever becomes of the others; returns what went wrong."""
    failures: list[str] = []
    for instance in instances:
        try:
            await cloud.terminate(instance.instance)
        except MeshgpuError as error:
            failures.append(error.message)
    return failures


def _list(instances: Sequence[Instance]) -> None:
    now = time.time()
    rows = [
        (
            instance.instance,
            instance.instance_type,
            instance.market.value,
            f"{instance.usd_per_hour:.2f}",
            ago(now - instance.launched_wall_s),
            ago(instance.lease_ends_wall_s - now),
            STATE_WORDS[instance.state.value],
            instance.mesh[:12],
            instance.need[:8],
        )
        for instance in instances
    ]
    header = ("INSTANCE", "TYPE", "MARKET", "$/H", "SINCE", "LEASE", "STATE", "MESH", "JOB")
    print_table(header, rows, frozenset({"$/H", "SINCE", "LEASE"}))
    sys.stdout.flush()


def _instance(instance: Instance) -> dict[str, object]:
    return {
        "instance": instance.instance,
        "instance_type": instance.instance_type,
        "market": instance.market.value,
        "state": instance.state.value,
        "usd_per_hour": instance.usd_per_hour,
        "address": instance.address,
        "since": instance.launched_wall_s,
        "lease_ends_at": instance.lease_ends_wall_s,
        "mesh": instance.mesh,
        "owner": instance.owner,
        "job": instance.need,
        "launch": instance.launch,
    }
