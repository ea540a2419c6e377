"""The control API's part about who is in the mesh and what they may: revoke, roles, admins, leaving, new keys."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from meshgpu.agent.admins import Admins
from meshgpu.agent.bodies import read_body, role_of, text_of
from meshgpu.agent.rekeying import Rekeying
from meshgpu.agent.views import Document
from meshgpu.model.trust import UserKey


@dataclass(slots=True)
class TrustControl:
    """Answers for `Control`, which says who calls: uid_of any caller, own_uid of the account that runs the agent."""

    admins: Admins
    rekeying: Rekeying
    uid_of: Callable[[web.Request], int]
    own_uid: Callable[[web.Request, str], int]
    stop_agent: Callable[[], None]

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/revoke", self._revoke),
            web.post("/v1/role", self._role),
            web.get("/v1/admins", self._list),
            web.post("/v1/admins/add", self._add),
            web.post("/v1/admins/remove", self._remove),
            web.post("/v1/recover", self._recover),
            web.post("/v1/leave", self._leave),
            web.post("/v1/rekey", self._rekey),
        ]

    async def _revoke(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        name = text_of(body, "name")
        member = await self.admins.revoke(self.uid_of(request), name, stops_jobs=body.get("stops_jobs") is True)
        return web.json_response({"name": member.name, "node": member.node, "owner": member.owner})

    async def _role(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        role = role_of({"role": text_of(body, "role")})  # where nothing is said, nothing changes
        member = await self.admins.set_role(self.uid_of(request), text_of(body, "name"), role)
        return web.json_response({"name": member.name, "node": member.node, "role": role.value})

    async def _list(self, request: web.Request) -> web.Response:
        self.admins.account(self.uid_of(request))
        log = self.admins.node.log
        admins, candidates = ([self._document(user) for user in users] for users in (log.admins(), log.candidates()))
        return web.json_response({"admins": admins, "candidates": candidates})

    async def _add(self, request: web.Request) -> web.Response:
        user = await self.admins.add_admin(self.uid_of(request), text_of(await read_body(request), "user"))
        return web.json_response(self._document(user))

    async def _remove(self, request: web.Request) -> web.Response:
        user = await self.admins.remove_admin(self.uid_of(request), text_of(await read_body(request), "user"))
        return web.json_response(self._document(user))

    async def _recover(self, request: web.Request) -> web.Response:
        uid = self.own_uid(request, "use the recovery key")
        user = await self.admins.recover(uid, text_of(await read_body(request), "recovery_key"))
        return web.json_response(self._document(user))

    async def _leave(self, request: web.Request) -> web.Response:
        uid = self.own_uid(request, "leave the mesh")
        mesh = await self.admins.leave(uid, anyway=(await read_body(request)).get("anyway") is True)
        asyncio.get_running_loop().call_later(0.05, self.stop_agent)
        return web.json_response({"mesh": mesh})

    async def _rekey(self, request: web.Request) -> web.Response:
        self.own_uid(request, "give this machine new keys")
        renewed = await self.rekeying.rekey()
        asyncio.get_running_loop().call_later(0.05, self.rekeying.begin_anew)
        return web.json_response(
            {"name": renewed.name, "node": renewed.node, "before": renewed.before, "away": list(renewed.away)}
        )

    def _document(self, user: UserKey) -> Document:
        return {"user": user.user, "machine": self.admins.node.log.name_of(user.node), "key": user.key}
