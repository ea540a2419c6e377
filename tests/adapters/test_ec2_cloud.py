"""The EC2 adapter against a local EC2: real boto3, real HTTP, moto behind it."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import boto3
import pytest

from meshgpu.adapters.ec2_cloud import EXTRA_USD_PER_HOUR, Ec2Cloud, admit_office, open_ec2
from meshgpu.errors import MeshgpuError
from meshgpu.model.cloud import BurstSettings, Caps, InstanceState, LaunchId, LaunchRequest, Market
from meshgpu.model.ids import JobId, MeshId, NodeId
from tests.ec2.front import IMAGE, REGION, Fault, LocalEc2, default_group

MESH = MeshId("5e" * 32)
SETTINGS = BurstSettings(
    region=REGION,
    caps=Caps(5.0, 20.0, 100.0, 10.0, 2, True, 3600.0),
    instance_types=("g6.xlarge", "g5.xlarge"),
    burst_after_s=60.0,
    idle_s=600.0,
    no_contact_s=900.0,
    image="",
    security_group="",
    install="true",
)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalEc2]:
    local = LocalEc2()
    yield local
    local.close()


@pytest.fixture(scope="module")
def opened(local: LocalEc2) -> Iterator[Ec2Cloud]:
    """One client for many tests: to make one takes a second, for the SDK reads all of EC2's API."""
    opened = Ec2Cloud(REGION, MESH, local.url)
    yield opened
    asyncio.run(opened.close())


@pytest.fixture
def ec2(local: LocalEc2, monkeypatch: pytest.MonkeyPatch) -> LocalEc2:
    local.forget()
    for name, value in local.environment().items():
        monkeypatch.setenv(name, value)
    return local


@pytest.fixture
def cloud(ec2: LocalEc2, opened: Ec2Cloud) -> Ec2Cloud:
    return opened


async def request_of(cloud: Ec2Cloud, market: Market = Market.SPOT) -> LaunchRequest:
    rung = next(r for r in await cloud.rungs(SETTINGS) if r.market is market and r.instance_type == "g6.xlarge")
    return LaunchRequest(
        LaunchId("l" * 26),
        MESH,
        NodeId("o" * 52),
        JobId("n" * 26),
        "token-1",
        rung,
        time.time() + 3600.0,
        "",
        default_group(),
        b"#!/bin/sh\ntrue\n",
    )


# -- prices ----------------------------------------------------------------------------------------------------------


async def test_rungs_are_what_the_region_offers_at_todays_prices(cloud: Ec2Cloud) -> None:
    rungs = await cloud.rungs(SETTINGS)
    on_demand = [r for r in rungs if r.market is Market.ON_DEMAND and r.instance_type == "g6.xlarge"]
    spot = [r for r in rungs if r.market is Market.SPOT]
    assert {r.usd_per_hour for r in on_demand} == {round(0.8048 + EXTRA_USD_PER_HOUR, 4)}
    assert len(on_demand) > 2  # one for each zone
    assert {(r.instance_type, r.zone, r.usd_per_hour) for r in spot} == {
        ("g5.xlarge", "us-east-1a", round(0.4507 * 1.5 + EXTRA_USD_PER_HOUR, 4)),
        ("g6.xlarge", "us-east-1b", round(0.3311 * 1.5 + EXTRA_USD_PER_HOUR, 4)),
    }
    l4 = on_demand[0]
    assert (l4.gpu_name, l4.gpus, l4.cpus) == ("NVIDIA L4", 1, 4)
    assert 22 * 2**30 < l4.gpu_memory_bytes < 24 * 2**30


async def test_a_spot_price_above_the_one_on_demand_is_no_rung(ec2: LocalEc2, cloud: Ec2Cloud) -> None:
    ec2.spot = {("g6.xlarge", "us-east-1b"): 0.9, ("g5.xlarge", "us-east-1a"): 0.9}
    spot = [r for r in await cloud.rungs(SETTINGS) if r.market is Market.SPOT]
    assert [(r.instance_type, r.usd_per_hour) for r in spot] == [("g5.xlarge", round(1.006 + EXTRA_USD_PER_HOUR, 4))]


async def test_without_a_price_on_demand_only_spot_is_offered(ec2: LocalEc2) -> None:
    ec2.on_demand = {}
    fresh = open_ec2(REGION, MESH)
    assert {r.market for r in await fresh.rungs(SETTINGS)} == {Market.SPOT}
    await fresh.close()


async def test_a_type_without_nvidia_gpus_or_without_meaning_is_no_rung(cloud: Ec2Cloud) -> None:
    strange = replace(SETTINGS, instance_types=("m5.large", "g99.huge", "g5g.xlarge"))
    assert await cloud.rungs(strange) == ()


# -- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("market", list(Market))
async def test_what_is_rented_says_in_its_tags_what_it_is_for(ec2: LocalEc2, cloud: Ec2Cloud, market: Market) -> None:
    request = await request_of(cloud, market)
    rented = await cloud.launch(request)
    (listed,) = await cloud.instances()
    assert listed.state in (InstanceState.PENDING, InstanceState.RUNNING)
    assert replace(listed, state=rented.state, address=rented.address) == rented
    assert listed.address
    assert (listed.launch, listed.mesh, listed.owner, listed.need) == (
        request.launch,
        request.mesh,
        request.owner,
        request.need,
    )
    assert listed.lease_ends_wall_s == request.lease_ends_wall_s
    assert (listed.instance_type, listed.market, listed.usd_per_hour) == (
        "g6.xlarge",
        market,
        request.rung.usd_per_hour,
    )


async def test_the_request_asks_for_one_instance_that_cannot_outlive_its_power_switch(
    ec2: LocalEc2, cloud: Ec2Cloud
) -> None:
    request = await request_of(cloud)
    await cloud.launch(request)
    (call,) = ec2.actions("RunInstances")
    expected = {
        "ClientToken": "token-1",
        "ImageId": IMAGE,
        "MinCount": "1",
        "MaxCount": "1",
        "Placement.AvailabilityZone": request.rung.zone,
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions.HttpTokens": "required",
        "MetadataOptions.HttpPutResponseHopLimit": "1",
        "InstanceMarketOptions.SpotOptions.SpotInstanceType": "one-time",
        "InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior": "terminate",
        "InstanceMarketOptions.SpotOptions.MaxPrice": f"{0.3311 * 1.5:.4f}",
    }
    assert {name: call.get(name) for name in expected} == expected
    assert not [name for name in call if "KeyName" in name or "IamInstanceProfile" in name]
    kinds = {value for name, value in call.items() if name.endswith(".ResourceType")}
    assert kinds == {"instance", "volume", "network-interface", "spot-instances-request"}


async def test_the_same_request_again_is_the_same_instance(ec2: LocalEc2, cloud: Ec2Cloud) -> None:
    request = await request_of(cloud)
    first, second = await cloud.launch(request), await cloud.launch(request)
    assert first == second
    assert len(ec2.live()) == 1


async def test_a_lost_reply_leaves_one_instance_when_the_request_is_repeated(ec2: LocalEc2, cloud: Ec2Cloud) -> None:
    request = await request_of(cloud)
    ec2.faults.append(Fault("RunInstances", loses_reply=True))
    with pytest.raises(MeshgpuError) as lost:
        await cloud.launch(request)
    assert lost.value.code == "unknown-outcome"
    assert (await cloud.launch(request)).launch == request.launch
    assert len(ec2.live()) == 1


async def test_a_token_that_another_request_used_is_taken(ec2: LocalEc2, cloud: Ec2Cloud) -> None:
    request = await request_of(cloud)
    await cloud.launch(request)
    with pytest.raises(MeshgpuError) as taken:
        await cloud.launch(replace(request, launch=LaunchId("m" * 26)))
    assert taken.value.code == "token-taken"
    assert len(ec2.live()) == 1


@pytest.mark.parametrize(
    ("theirs", "status", "ours"),
    [
        ("InsufficientInstanceCapacity", 500, "no-capacity"),
        ("MaxSpotInstanceCountExceeded", 400, "no-capacity"),
        ("VcpuLimitExceeded", 400, "no-capacity"),
        ("RequestLimitExceeded", 503, "throttled"),
        ("InternalError", 500, "unknown-outcome"),
        ("UnauthorizedOperation", 403, "not-allowed"),
        ("IdempotentParameterMismatch", 400, "token-taken"),
        ("Unsupported", 400, "bad-request"),
        ("InvalidAMIID.NotFound", 400, "bad-request"),
    ],
)
async def test_each_error_says_what_to_do_and_is_asked_for_once(
    ec2: LocalEc2, cloud: Ec2Cloud, theirs: str, status: int, ours: str
) -> None:
    request = await request_of(cloud)
    ec2.faults.append(Fault("RunInstances", theirs, status, times=-1))
    with pytest.raises(MeshgpuError) as refused:
        await cloud.launch(request)
    assert refused.value.code == ours
    assert theirs in refused.value.message
    assert "g6.xlarge in us-east-1b" in refused.value.message
    assert len(ec2.actions("RunInstances")) == 1  # the SDK alone would have sent it three times


async def test_no_server_is_an_unknown_outcome(cloud: Ec2Cloud) -> None:
    request = await request_of(cloud)
    lonely = Ec2Cloud(REGION, MESH, "http://127.0.0.1:9")
    with pytest.raises(MeshgpuError) as lost:
        await asyncio.wait_for(lonely.launch(replace(request, image=IMAGE)), 30.0)
    await lonely.close()
    assert lost.value.code == "unknown-outcome"


# -- ends ------------------------------------------------------------------------------------------------------------


async def test_an_ended_instance_is_listed_for_a_while_and_ending_it_again_is_no_error(
    ec2: LocalEc2, cloud: Ec2Cloud
) -> None:
    rented = await cloud.launch(await request_of(cloud))
    await cloud.terminate(rented.instance)
    await cloud.terminate(rented.instance)
    assert [i.state for i in await cloud.instances()] == [InstanceState.TERMINATED]
    ec2.vanish_s = 0.0
    assert await cloud.instances() == ()
    await cloud.terminate(rented.instance)


async def test_other_meshes_are_seen_only_by_who_asks_for_all(cloud: Ec2Cloud) -> None:
    await cloud.launch(await request_of(cloud))
    stranger, everybody = open_ec2(REGION, MeshId("0" * 64)), open_ec2(REGION, None)
    try:
        assert await stranger.instances() == ()
        assert len(await everybody.instances()) == 1
    finally:
        await stranger.close()
        await everybody.close()


# -- who may be asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["", "https://ec2.us-east-1.amazonaws.com", "https://ec2.cn-north-1.amazonaws.com.cn.", "nonsense"]
)
async def test_aws_itself_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for ask in (lambda: open_ec2(REGION, MESH), lambda: admit_office(REGION)):
        with pytest.raises(MeshgpuError) as refused:
            ask()
        assert refused.value.code == "not-served"


async def test_without_credentials_it_says_so(ec2: LocalEc2, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    poor = open_ec2(REGION, MESH)
    with pytest.raises(MeshgpuError) as refused:
        await poor.instances()
    await poor.close()
    assert refused.value.code == "not-allowed"
    assert "no AWS credentials" in refused.value.message


def test_the_office_is_admitted_once_and_nobody_else_is(ec2: LocalEc2) -> None:
    group = admit_office(REGION)
    api = boto3.client("ec2")
    strange = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "203.0.113.9/32"}]}
    api.authorize_security_group_ingress(GroupId=group, IpPermissions=[strange])
    assert admit_office(REGION) == group
    (found,) = api.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    rules = [(r["FromPort"], r["ToPort"], s["CidrIp"]) for r in found["IpPermissions"] for s in r["IpRanges"]]
    assert rules == [(443, 443, "127.0.0.1/32")]
    api.close()


def test_group_that_only_has_our_name_is_not_ours(ec2: LocalEc2) -> None:
    api = boto3.client("ec2")
    vpc = api.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    other = api.create_security_group(GroupName="meshgpu", Description="of somebody else", VpcId=vpc)["GroupId"]
    assert admit_office(REGION) != other
    api.close()


async def test_without_our_group_nothing_is_rented(cloud: Ec2Cloud) -> None:
    fresh = open_ec2(REGION, MESH)
    with pytest.raises(MeshgpuError) as refused:
        await fresh.launch(replace(await request_of(cloud), security_group=""))
    await fresh.close()
    assert (refused.value.code, refused.value.hint) == ("bad-request", "meshgpu burst setup")


async def test_renewed_credentials_are_used(ec2: LocalEc2, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = open_ec2(REGION, MESH)
    await fresh.instances()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    ec2.faults.append(Fault("DescribeInstances", "ExpiredToken"))
    with pytest.raises(MeshgpuError):
        await fresh.instances()
    await fresh.instances()
    await fresh.close()
    assert "Credential=renewed/" in ec2.calls[-1]["Authorization"]


@pytest.mark.parametrize(("text", "number"), [("nan", 0.0), ("inf", 0.0), ("-5", 0.0), ("x", 0.0), ("0.5", 0.5)])
async def test_tags_that_make_no_sense_count_as_none(ec2: LocalEc2, cloud: Ec2Cloud, text: str, number: float) -> None:
    rented = await cloud.launch(await request_of(cloud))
    api = boto3.client("ec2")
    tags = [{"Key": f"meshgpu:{key}", "Value": text} for key in ("usd-per-hour", "expires")]
    api.create_tags(Resources=[rented.instance], Tags=tags)
    api.close()
    (found,) = await cloud.instances()
    assert (found.usd_per_hour, found.lease_ends_wall_s) == (number, number)
