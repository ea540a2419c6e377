"""The metadata service of an instance, as EC2 answers: a token first, and nothing where there is nothing."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from meshgpu.adapters.imds import Imds
from meshgpu.errors import MeshgpuError
from meshgpu.ports import Interruption


@dataclass
class Service:
    """facts: {path: text}. tokens: those that are good now."""

    facts: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    status: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        path = request.path.removeprefix("/latest/")
        self.asked.append(f"{request.method} {path}")
        if self.status:
            return web.Response(status=self.status)
        if request.method == "PUT" and path == "api/token":
            assert 0 < int(request.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21_600
            token = f"token{len(self.tokens)}"
            self.tokens.add(token)
            return web.Response(text=token)
        if request.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return web.Response(status=401)
        found = self.facts.get(path)
        return web.Response(text=found) if found is not None else web.Response(status=404)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def imds(service: Service) -> AsyncIterator[Imds]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", service.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    imds = Imds(f"http://127.0.0.1:{port}/")
    yield imds
    await imds.close()
    await runner.cleanup()


async def test_public_address_behind_a_token(service: Service, imds: Imds) -> None:
    service.facts["meta-data/public-ipv4"] = "54.1.2.3"
    assert await imds.public_address() == "54.1.2.3"
    assert await imds.public_address() == "54.1.2.3"
    assert service.asked.count("PUT api/token") == 1


async def test_no_public_address_is_empty(imds: Imds) -> None:
    assert await imds.public_address() == ""


async def test_token_that_ran_out_is_renewed(service: Service, imds: Imds) -> None:
    assert await imds.interruption() is None
    service.tokens.clear()
    assert await imds.interruption() is None
    assert service.asked.count("PUT api/token") == 2


async def test_spot_notice_and_recommendation(service: Service, imds: Imds) -> None:
    service.facts["meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2026-11-25T08:22:00Z"}'
    assert await imds.interruption() == Interruption(None)
    service.facts["meta-data/spot/instance-action"] = '{"action": "terminate", "time": "2026-11-25T08:24:00Z"}'
    assert await imds.interruption() == Interruption(1_795_595_040.0)


@pytest.mark.parametrize("notice", ["", "nonsense", "[]", "{}", '{"time": 7}', '{"time": "soon"}'])
async def test_notice_that_cannot_be_read_is_an_error(service: Service, imds: Imds, notice: str) -> None:
    service.facts["meta-data/spot/instance-action"] = notice
    with pytest.raises(MeshgpuError) as raised:
        await imds.interruption()
    assert raised.value.code == "no-metadata"


@pytest.mark.parametrize("status", [401, 403, 500])
async def test_refusal_is_an_error(service: Service, imds: Imds, status: int) -> None:
    service.status = status
    with pytest.raises(MeshgpuError, match=str(status)) as raised:
        await imds.public_address()
    assert raised.value.code == "no-metadata"


async def test_nobody_there_is_an_error() -> None:
    imds = Imds("http://127.0.0.1:9")
    with pytest.raises(MeshgpuError) as raised:
        await imds.public_address()
    assert raised.value.code == "no-metadata"
    await imds.close()
