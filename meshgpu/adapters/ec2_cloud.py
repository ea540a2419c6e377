"""EC2 as the seller of instances: boto3, one request a call, never repeated by the SDK.

Tags are written at creation and say what an instance is for; a ClientToken makes a repeated request harmless. Only an
endpoint that AWS_ENDPOINT_URL names is spoken to: AWS itself is refused until the burst step is complete.

Sources: EC2 API reference (RunInstances, error codes, "Ensuring idempotency"), AWS Price List API, DLAMI release notes.
"""

import asyncio
import ipaddress
import json
import logging
import math
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from meshgpu import __version__
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import (
    INSTANCE_PORT,
    BurstSettings,
    Instance,
    InstanceState,
    LaunchId,
    LaunchRequest,
    Market,
    Rung,
)
from meshgpu.model.ids import JobId, MeshId, NodeId

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE: Final = "AWS_ENDPOINT_URL"
OWN_DOMAINS: Final = ("amazonaws.com", "amazonaws.com.cn", "api.aws")
"""Where AWS itself answers."""

CONNECT_S: Final = 5.0
READ_S: Final = 30.0
"""RunInstances takes seconds; the caller gives up at 60 s."""

PRICES_LIVE_S: Final = 86_400.0
"""On-demand prices change a few times a year."""

PRICE_PAUSE_S: Final = 600.0
"""Before a price is asked for again that could not be read."""

PRICING_REGION: Final = "us-east-1"
"""Prices of all regions are told there (AWS Price List API has endpoints in three regions)."""

EXTRA_USD_PER_HOUR: Final = 0.025
"""The root volume (100 GB of gp3 at most $0.15 a GB and month) and the public address ($0.005), rounded up."""

BID: Final = 1.5
"""A spot instance may get dearer by this factor before it is lost, but never dearer than on demand."""

GPU_IMAGE: Final = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""SSM parameter with the newest AMI that has NVIDIA's driver, Docker and its GPU runtime."""

GROUP: Final = "meshgpu"
GROUP_TAG: Final = "meshgpu:group"
"""Name of the security group that `admit_office` keeps, and what shows that it is ours."""

TAG: Final = "meshgpu:"
MIB: Final = 2**20

STATES: Final = {
    "pending": InstanceState.PENDING,
    "running": InstanceState.RUNNING,
    "shutting-down": InstanceState.ENDING,
    "terminated": InstanceState.TERMINATED,
}
"""Whatever else it says (a person stopped it) is one that lives and has to be ended."""

CODES: Final = {
    "no-capacity": (
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientFreeAddressesInSubnet",
        "InstanceLimitExceeded",
        "MaxSpotInstanceCountExceeded",
        "ReservationCapacityExceeded",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
        "VcpuLimitExceeded",
    ),
    "throttled": ("EC2ThrottledException", "RequestLimitExceeded", "SlowDown", "Throttling", "ThrottlingException"),
    "not-allowed": (
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "Blocked",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "OptInRequired",
        "PendingVerification",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "UnauthorizedOperation",
        "UnrecognizedClientException",
    ),
    "token-taken": ("IdempotentParameterMismatch",),
    "gone": ("InvalidInstanceID.NotFound",),
}
"""What EC2's errors mean for a burst peer. Others: unknown outcome where the server failed, else a bad request."""

CODE_OF: Final = {theirs: ours for ours, names in CODES.items() for theirs in names}

CREDENTIALS_HINT: Final = "aws sts get-caller-identity"

T = TypeVar("T")


def open_ec2(region: str, mesh: MeshId | None) -> "Ec2Cloud":
    """The instances of one mesh in a region; of every mesh if it is None. Raises MeshgpuError `not-served`."""
    return Ec2Cloud(region, mesh, _endpoint())


def admit_office(region: str) -> str:
    """Let this office reach rented machines, and nobody else: the id of the security group. Blocks for seconds.

    The group is ours, by its tag, in the default VPC; it is made where it is missing. It allows TCP to port 443 from
    the address that AWS sees, and what it allowed before is revoked. Raises MeshgpuError.
    """
    endpoint = _endpoint()
    with _translated(f"prepare the security group {GROUP!r} in {region}"):
        office = _public_address(endpoint)
        ec2 = _client("ec2", region, endpoint)
        try:
            vpc = _default_vpc(ec2)
            group = _find_group(ec2, vpc) or _make_group(ec2, vpc)
            ours = {"IpProtocol": "tcp", "FromPort": INSTANCE_PORT, "ToPort": INSTANCE_PORT}
            if not _admits(group, f"{office}/32"):
                spans = [{"CidrIp": f"{office}/32", "Description": "the office"}]
                ec2.authorize_security_group_ingress(
                    GroupId=group["GroupId"], IpPermissions=[ours | {"IpRanges": spans}]
                )
            if others := _others(group, f"{office}/32"):
                ec2.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=others)
        finally:
            ec2.close()
    return str(group["GroupId"])


@dataclass(frozen=True, slots=True)
class _Machine:
    """A type of instance that has NVIDIA GPUs, and the zones of a region that offer it."""

    name: str
    gpu_name: str
    gpus: int
    gpu_memory_bytes: int
    cpus: int
    memory_bytes: int
    zones: tuple[str, ...]


class Ec2Cloud:
    """Blocking calls run in threads. `close` drops the connections; what is under way ends by its own timeout."""

    def __init__(self, region: str, mesh: MeshId | None, endpoint: str) -> None:
        self._region = region
        self._mesh = mesh
        self._endpoint = endpoint
        self._making = threading.Lock()
        self._clients: dict[str, Any] = {}
        self._machines: dict[str, _Machine | None] = {}
        self._image = ""
        self._group = ""
        self._on_demand: dict[str, tuple[float, float | None]] = {}

    async def rungs(self, settings: BurstSettings) -> tuple[Rung, ...]:
        """Each type of the settings in each zone that has it: on spot where it is cheaper, and on demand."""
        return await self._call(f"look for prices in {self._region}", lambda: self._find_rungs(settings))

    async def launch(self, request: LaunchRequest) -> Instance:
        """One RunInstances, for one instance that terminates when it powers off."""
        rung = request.rung
        found = await self._call(
            f"rent {rung.instance_type} in {rung.zone}",
            lambda: self._client("ec2").run_instances(**self._parameters(request)),
        )
        return _instance(found["Instances"][0])

    async def instances(self) -> tuple[Instance, ...]:
        """Those with a tag of the mesh, in whatever state."""
        wanted = (
            {"Name": f"tag:{TAG}mesh", "Values": [self._mesh]}
            if self._mesh is not None
            else {"Name": "tag-key", "Values": [f"{TAG}launch"]}
        )

        def describe() -> tuple[Instance, ...]:
            pages = self._client("ec2").get_paginator("describe_instances").paginate(Filters=[wanted])
            return tuple(
                _instance(found)
                for page in pages
                for reservation in page["Reservations"]
                for found in reservation["Instances"]
            )

        return await self._call(f"list the instances in {self._region}", describe)

    async def terminate(self, instance: str) -> None:
        """TerminateInstances."""
        try:
            await self._call(f"end {instance}", lambda: self._client("ec2").terminate_instances(InstanceIds=[instance]))
        except MeshgpuError as error:
            if error.code != "gone":
                raise

    async def close(self) -> None:
        self._drop_clients()

    async def _call(self, what: str, call: Callable[[], T]) -> T:
        def translated() -> T:
            try:
                with _translated(what):
                    return call()
            except MeshgpuError as error:
                if error.code == "not-allowed":  # clients keep the credentials that they began with
                    self._drop_clients()
                raise

        return await asyncio.to_thread(translated)

    def _drop_clients(self) -> None:
        with self._making:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def _client(self, service: str) -> Any:  # Any: boto3 makes its clients' classes at run time
        with self._making:
            if service not in self._clients:
                region = PRICING_REGION if service == "pricing" else self._region
                self._clients[service] = _client(service, region, self._endpoint)
            return self._clients[service]

    # -- what can be asked for ----------------------------------------------------------------------------------------

    def _find_rungs(self, settings: BurstSettings) -> tuple[Rung, ...]:
        machines = self._gpu_machines(settings.instance_types)
        spot = self._spot_prices([machine.name for machine in machines]) if machines else {}
        rungs: list[Rung] = []
        for machine in machines:
            on_demand = self._on_demand_price(machine.name)
            for zone in machine.zones:
                now = spot.get((machine.name, zone))
                if on_demand is not None:
                    rungs.append(_rung(machine, zone, Market.ON_DEMAND, on_demand))
                if now is not None and (on_demand is None or now < on_demand):
                    bid = now * BID if on_demand is None else min(now * BID, on_demand)
                    rungs.append(_rung(machine, zone, Market.SPOT, bid))
        return tuple(rungs)

    def _gpu_machines(self, names: Iterable[str]) -> list[_Machine]:
        """Of these types the ones that can be rented here; asked once."""
        wanted = sorted(set(names))
        if any(name not in self._machines for name in wanted):
            self._machines = self._look_up(wanted)
        return [machine for name in wanted if (machine := self._machines[name]) is not None]

    def _look_up(self, names: list[str]) -> dict[str, _Machine | None]:
        ec2 = self._client("ec2")
        here = {
            zone["ZoneName"]
            for zone in ec2.describe_availability_zones()["AvailabilityZones"]
            if zone.get("ZoneType", "availability-zone") == "availability-zone" and zone["State"] == "available"
        }
        of_types = [{"Name": "instance-type", "Values": names}]
        offers = ec2.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="availability-zone", Filters=of_types
        )
        zones: dict[str, list[str]] = {name: [] for name in names}
        for offer in (offer for page in offers for offer in page["InstanceTypeOfferings"]):
            if offer["Location"] in here:
                zones[offer["InstanceType"]].append(offer["Location"])
        pages = ec2.get_paginator("describe_instance_types").paginate(Filters=of_types)
        described = {found["InstanceType"]: found for page in pages for found in page["InstanceTypes"]}
        machines = {
            name: _machine(described[name], sorted(zones[name])) if name in described else None for name in names
        }
        for name in (name for name, machine in machines.items() if machine is None):
            logger.warning("%s has no instance type %s with NVIDIA GPUs for x86-64", self._region, name)
        return machines

    def _spot_prices(self, names: list[str]) -> dict[tuple[str, str], float]:
        """{(type, zone): US dollars an hour, now}"""
        pages = (
            self._client("ec2")
            .get_paginator("describe_spot_price_history")
            .paginate(InstanceTypes=names, ProductDescriptions=["Linux/UNIX"], StartTime=time.time())
        )
        newest: dict[tuple[str, str], tuple[Any, float]] = {}
        for found in (found for page in pages for found in page["SpotPriceHistory"]):
            key = (found["InstanceType"], found["AvailabilityZone"])
            price = (found["Timestamp"], float(found["SpotPrice"]))
            newest[key] = max(newest.get(key, price), price)
        return {key: price for key, (_, price) in newest.items()}

    def _on_demand_price(self, name: str) -> float | None:
        """US dollars an hour; None where the price list does not say: then only spot instances of it are asked for."""
        until, price = self._on_demand.get(name, (0.0, None))
        if time.monotonic() < until:
            return price
        fields = {
            "instanceType": name,
            "regionCode": self._region,
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "capacitystatus": "Used",
        }
        filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in fields.items()]
        try:
            with _translated(f"read the price of {name}"):
                listed = self._client("pricing").get_products(ServiceCode="AmazonEC2", Filters=filters)["PriceList"]
        except MeshgpuError as error:
            logger.warning("%s", error.message)
            self._on_demand[name] = (time.monotonic() + PRICE_PAUSE_S, None)
            return None
        price = _price(listed)
        self._on_demand[name] = (time.monotonic() + PRICES_LIVE_S, price)
        return price

    # -- the request --------------------------------------------------------------------------------------------------

    def _parameters(self, request: LaunchRequest) -> dict[str, Any]:
        """RunInstances, the same for the same request: EC2 refuses a token with other parameters."""
        rung = request.rung
        tags = {
            "mesh": request.mesh,
            "launch": request.launch,
            "owner": request.owner,
            "need": request.need,
            "expires": repr(request.lease_ends_wall_s),
            "usd-per-hour": repr(rung.usd_per_hour),
            "version": __version__,
        }
        tagged = ["instance", "volume", "network-interface"]
        parameters: dict[str, Any] = {
            "ClientToken": request.token,
            "ImageId": request.image or self._gpu_image(),
            "InstanceType": rung.instance_type,
            "MinCount": 1,
            "MaxCount": 1,
            "Placement": {"AvailabilityZone": rung.zone},
            "UserData": request.user_data.decode(),
            "InstanceInitiatedShutdownBehavior": "terminate",
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        }
        parameters["SecurityGroupIds"] = [request.security_group or self._own_group()]
        if rung.market is Market.SPOT:
            tagged.append("spot-instances-request")
            parameters["InstanceMarketOptions"] = {
                "MarketType": "spot",
                "SpotOptions": {
                    "SpotInstanceType": "one-time",
                    "InstanceInterruptionBehavior": "terminate",
                    "MaxPrice": f"{rung.usd_per_hour - EXTRA_USD_PER_HOUR:.4f}",
                },
            }
        marks = [{"Key": TAG + key, "Value": str(value)} for key, value in tags.items()]
        marks.append({"Key": "Name", "Value": f"meshgpu {request.launch[:8]}"})
        parameters["TagSpecifications"] = [{"ResourceType": kind, "Tags": marks} for kind in tagged]
        return parameters

    def _own_group(self) -> str:
        """What `admit_office` made; raises MeshgpuError `bad-request` where it did not."""
        if not self._group:
            ec2 = self._client("ec2")
            group = _find_group(ec2, _default_vpc(ec2))
            if group is None:
                what = f"there is no security group {GROUP!r} of ours in {self._region}"
                raise MeshgpuError("bad-request", what, "meshgpu burst setup")
            self._group = str(group["GroupId"])
        return self._group

    def _gpu_image(self) -> str:
        """The same for as long as this client lives: a repeated request must not change."""
        if not self._image:
            self._image = str(self._client("ssm").get_parameter(Name=GPU_IMAGE)["Parameter"]["Value"])
        return self._image


# -- the SDK and its errors ------------------------------------------------------------------------------------------


def _endpoint() -> str:
    """Where EC2 answers. Raises MeshgpuError `not-served` for AWS itself."""
    endpoint = os.environ.get(ENDPOINT_VARIABLE, "")
    host = (urlsplit(endpoint).hostname or "").rstrip(".").lower()
    if not host or any(host == domain or host.endswith("." + domain) for domain in OWN_DOMAINS):
        raise MeshgpuError(
            "not-served",
            "cannot rent from AWS itself yet: this version serves only an EC2 look-alike that AWS_ENDPOINT_URL names",
            "make demo-burst",
        )
    return endpoint.rstrip("/")


def _client(service: str, region: str, endpoint: str) -> Any:
    """A client whose every call is exactly one request."""
    import boto3  # half a second and 30 MB that only burst peers need
    from botocore.config import Config

    return boto3.session.Session().client(
        service,
        region_name=region,
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=CONNECT_S,
            read_timeout=READ_S,
            retries={"total_max_attempts": 1},
            user_agent_extra=f"meshgpu/{__version__}",
        ),
    )


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """What goes wrong inside becomes a MeshgpuError that says what was tried."""
    from botocore import exceptions as theirs
    from botocore.parsers import ResponseParserError

    try:
        yield
    except theirs.ClientError as error:
        said = error.response.get("Error", {})
        name, text = said.get("Code", "?"), said.get("Message", "")
        has_failed = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
        code = CODE_OF.get(name, "unknown-outcome" if has_failed else "bad-request")
        hint = CREDENTIALS_HINT if code == "not-allowed" else ""
        raise MeshgpuError(code, f"cannot {what}: {text} ({name})", hint) from error
    except (theirs.NoCredentialsError, theirs.PartialCredentialsError) as error:
        raise MeshgpuError("not-allowed", f"cannot {what}: there are no AWS credentials", "aws configure") from error
    except (theirs.ParamValidationError, theirs.ProfileNotFound) as error:
        raise MeshgpuError("bad-request", f"cannot {what}: {error}") from error
    except (theirs.BotoCoreError, ResponseParserError, OSError) as error:
        raise MeshgpuError("unknown-outcome", f"cannot {what}: {error}") from error


def _public_address(endpoint: str) -> ipaddress.IPv4Address:
    """This office's address as the provider sees it. Raises MeshgpuError or OSError.

    A look-alike answers GET / with it; AWS has checkip.amazonaws.com for that.
    """
    with urllib.request.urlopen(endpoint + "/", timeout=CONNECT_S) as answer:  # noqa: S310 - AWS_ENDPOINT_URL's scheme
        text = answer.read(64).decode("ascii", "replace").strip()
    try:
        return ipaddress.IPv4Address(text)
    except ValueError as error:
        raise MeshgpuError(
            "unknown-outcome", f"cannot learn this office's address: {endpoint} says {text!r}"
        ) from error


def _default_vpc(ec2: Any) -> str:
    """Raises MeshgpuError `bad-request` where the account has none."""
    found = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not found:
        raise MeshgpuError("bad-request", "there is no default VPC in this region", "aws ec2 create-default-vpc")
    return str(found[0]["VpcId"])


def _find_group(ec2: Any, vpc: str) -> dict[str, Any] | None:
    """Ours; a group that only has its name may let in anybody."""
    wanted = {"vpc-id": vpc, "group-name": GROUP, "tag-key": GROUP_TAG}
    filters = [{"Name": name, "Values": [value]} for name, value in wanted.items()]
    found = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    return dict(found[0]) if found else None


def _make_group(ec2: Any, vpc: str) -> dict[str, Any]:
    made = ec2.create_security_group(
        GroupName=GROUP,
        Description="machines that meshgpu rents: reached from the office only",
        VpcId=vpc,
        TagSpecifications=[{"ResourceType": "security-group", "Tags": [{"Key": GROUP_TAG, "Value": "1"}]}],
    )
    return {"GroupId": made["GroupId"], "IpPermissions": []}


def _admits(group: Mapping[str, Any], cidr: str) -> bool:
    return any(span["CidrIp"] == cidr for rule in group["IpPermissions"] if _is_ours(rule) for span in rule["IpRanges"])


def _is_ours(rule: Mapping[str, Any]) -> bool:
    """Whether it is about the port at which instances listen, and no other."""
    return bool(rule["IpProtocol"] == "tcp" and rule.get("FromPort") == rule.get("ToPort") == INSTANCE_PORT)


def _others(group: Mapping[str, Any], cidr: str) -> list[dict[str, Any]]:
    """What the group allows beside our port to this office, in the form in which it can be revoked."""
    rules = []
    for rule in group["IpPermissions"]:
        spans = [span for span in rule["IpRanges"] if not (_is_ours(rule) and span["CidrIp"] == cidr)]
        kinds = {
            "IpRanges": spans,
            "Ipv6Ranges": rule.get("Ipv6Ranges"),
            "UserIdGroupPairs": rule.get("UserIdGroupPairs"),
        }
        found = {kind: values for kind, values in kinds.items() if values}
        if found:
            rules.append({key: rule[key] for key in ("IpProtocol", "FromPort", "ToPort") if key in rule} | found)
    return rules


def _machine(found: dict[str, Any], zones: list[str]) -> _Machine | None:
    """What DescribeInstanceTypes says; None for what cannot run CUDA, or has only a part of a GPU (it counts 0)."""
    gpus = found.get("GpuInfo", {}).get("Gpus", [])
    is_usable = (
        len(gpus) == 1
        and gpus[0].get("Manufacturer") == "NVIDIA"
        and gpus[0].get("Count", 0) > 0
        and "x86_64" in found["ProcessorInfo"]["SupportedArchitectures"]
    )
    if not is_usable:
        return None
    return _Machine(
        found["InstanceType"],
        f"NVIDIA {gpus[0]['Name']}",
        gpus[0]["Count"],
        gpus[0]["MemoryInfo"]["SizeInMiB"] * MIB,
        found["VCpuInfo"]["DefaultVCpus"],
        found["MemoryInfo"]["SizeInMiB"] * MIB,
        tuple(zones),
    )


def _rung(machine: _Machine, zone: str, market: Market, usd_per_hour: float) -> Rung:
    """usd_per_hour: of the instance alone."""
    return Rung(
        machine.name,
        zone,
        market,
        machine.gpu_name,
        machine.gpus,
        machine.gpu_memory_bytes,
        machine.cpus,
        machine.memory_bytes,
        round(usd_per_hour + EXTRA_USD_PER_HOUR, 4),
    )


def _price(listed: list[str]) -> float | None:
    """The dearest US dollar price an hour that the price list's documents name."""
    prices = [
        float(dimension["pricePerUnit"]["USD"])
        for document in map(json.loads, listed)
        for term in document.get("terms", {}).get("OnDemand", {}).values()
        for dimension in term["priceDimensions"].values()
        if dimension.get("unit") == "Hrs" and "USD" in dimension["pricePerUnit"]
    ]
    return max(prices, default=0.0) or None


def _instance(found: dict[str, Any]) -> Instance:
    """As its tags say; a number that cannot be read is 0, so that a lease that nobody can read is over."""
    tags = {tag["Key"].removeprefix(TAG): tag["Value"] for tag in found.get("Tags", [])}
    return Instance(
        found["InstanceId"],
        LaunchId(tags.get("launch", "")),
        MeshId(tags.get("mesh", "")),
        NodeId(tags.get("owner", "")),
        JobId(tags.get("need", "")),
        STATES.get(found["State"]["Name"], InstanceState.RUNNING),
        found.get("PublicIpAddress", ""),
        found["LaunchTime"].timestamp(),
        _number(tags.get("expires", "")),
        found["InstanceType"],
        Market.SPOT if found.get("InstanceLifecycle") == "spot" else Market.ON_DEMAND,
        _number(tags.get("usd-per-hour", "")),
    )


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
