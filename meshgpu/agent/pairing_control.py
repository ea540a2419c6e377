"""The control API's part about joining by comparing digits: the admitter's window, the joiner's way in, a key press."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from aiohttp import web

from meshgpu.agent.bodies import read_body, role_of, text_of, texts_of
from meshgpu.agent.comparing import Admitted, Comparing, Failed, Shown
from meshgpu.agent.ndjson import error_document, stream, write
from meshgpu.agent.status import Status
from meshgpu.config import DEFAULT_PAIRING_PORT, host_of, with_port
from meshgpu.errors import MeshgpuError
from meshgpu.model.ids import Address, NodeId
from meshgpu.ports import PairingDialog


class Lines:
    """The answer to one call, begun with its first line: what fails before is an answer with an error's status."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response: web.StreamResponse | None = None

    async def tell(self, what: Shown | Failed | Admitted | None) -> None:
        """One line; None only says that the agent is here. Raises ConnectionError where the client has gone."""
        kinds = {Shown: "digits", Failed: "failed", Admitted: "admitted"}
        line = {"type": "wait"} if what is None else {"type": kinds[type(what)], **asdict(what)}
        await self.write(line)

    async def write(self, line: dict[str, Any]) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client went away")
        if self._response is None:
            self._response = await stream(self._request)
        await write(self._response, line)

    async def run(self, work: Callable[[], Awaitable[dict[str, Any]]]) -> web.StreamResponse:
        """Everything that `work` tells, then its last line or its error."""
        try:
            last = await work()
        except MeshgpuError as error:
            if self._response is None:
                raise
            last = {"type": "error", "error": error_document(error)}
        except ConnectionError:
            return self._response or web.Response(status=499)
        await self.write(last)
        assert self._response is not None
        await self._response.write_eof()
        return self._response


@dataclass(slots=True)
class PairingControl:
    """Answers for `Control`, which says who calls: uid_of any caller, own_uid of the account that runs the agent."""

    comparing: Comparing
    status: Status
    dial: Callable[[Any], Awaitable[PairingDialog]]
    uid_of: Callable[[web.Request], int]
    own_uid: Callable[[web.Request, str], int]

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/admit", self._admit),
            web.post("/v1/join/compare", self._join),
            web.post("/v1/press", self._press),
        ]

    async def _admit(self, request: web.Request) -> web.StreamResponse:
        """Hold a window open for as long as the client stays."""
        uid, body, lines = self.uid_of(request), await read_body(request), Lines(request)
        wanted, user = (None if body.get(key) is None else text_of(body, key) for key in ("name", "user"))
        role = role_of(body)

        async def work() -> dict[str, Any]:
            admitted = await self.comparing.admit(uid, wanted, user, role, lines.tell)
            return {"type": "admitted", **asdict(admitted)}

        return await lines.run(work)

    async def _join(self, request: web.Request) -> web.StreamResponse:
        uid = self.own_uid(request, "join a mesh")
        body, lines = await read_body(request), Lines(request)
        name, user = text_of(body, "name"), text_of(body, "user")
        addresses = [with_port(host_of(seed), DEFAULT_PAIRING_PORT) for seed in texts_of(body, "seeds")]
        if body.get("node") is not None:
            addresses = [*self._announced(NodeId(text_of(body, "node"))), *addresses]

        async def work() -> dict[str, Any]:
            joined = await self.comparing.join(uid, addresses, name, user, self.dial, lines.tell)
            me = self.status.agent(uid)
            return {
                "type": "joined",
                "mesh": joined.mesh_name,
                "name": joined.name,
                "node": me["node"],
                "user": joined.user,
                "inviter": joined.inviter,
                "role": joined.role.value,
                "fence": me["fence"],
                "gpus": self.status.gpu_names(),
            }

        return await lines.run(work)

    def _announced(self, node: NodeId) -> list[Address]:
        sighting = self.status.sightings.get(node)
        if sighting is None or not sighting.pairing_port:
            raise MeshgpuError("no-answer", "cannot join: that machine takes in none now", "meshgpu join")
        hosts = dict.fromkeys(address.rpartition(":")[0] for address in sighting.addresses)
        return [Address(f"{host}:{sighting.pairing_port}") for host in hosts]

    async def _press(self, request: web.Request) -> web.Response:
        """What a person said of the digits that it saw."""
        body = await read_body(request)
        self.comparing.press(self.uid_of(request), text_of(body, "digits"), same=body.get("same") is True)
        return web.json_response({})
