"""The control API's part about what can be shown afterwards: this machine's audit, and receipts of jobs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from meshgpu.agent.audit import AuditTrail
from meshgpu.agent.bodies import number_of, read_body
from meshgpu.agent.receipts import Receipts
from meshgpu.model.ids import KeyId

ENTRIES: Final = 20
"""Of the audit, where no number is asked for."""


@dataclass(slots=True)
class EvidenceControl:
    """Answers for `Control`, which says who calls: key_of any user, own_uid of the account that runs the agent."""

    audit: AuditTrail
    receipts: Receipts
    key_of: Callable[[web.Request], KeyId]
    own_uid: Callable[[web.Request, str], int]

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/audit", self._audit),
            web.get("/v1/audit/verdict", self._verdict),
            web.get("/v1/jobs/{job}/receipt", self._receipt),
            web.post("/v1/receipts/check", self._check),
        ]

    async def _audit(self, request: web.Request) -> web.Response:
        """Who ran what here is not for every account to know."""
        self.own_uid(request, "show the audit of this machine")
        count = max(int(number_of(request, "count", ENTRIES)), 1)
        return web.json_response({"entries": await self.audit.newest(count)})

    async def _verdict(self, request: web.Request) -> web.Response:
        self.own_uid(request, "verify the audit of this machine")
        verdict = await self.audit.verify()
        head = verdict.head.entry if verdict.head else None
        return web.json_response({"count": verdict.count, "head": head, "fault": verdict.fault or None})

    async def _receipt(self, request: web.Request) -> web.Response:
        key = self.key_of(request)
        found = await self.receipts.jobs.find(key, request.match_info["job"])
        return web.json_response(await self.receipts.of(key, found))

    async def _check(self, request: web.Request) -> web.Response:
        self.key_of(request)
        return web.json_response(self.receipts.check(await read_body(request)))
