"""What EC2 tells an instance of itself, by the second version of its metadata service (a token before every question).

Sources: EC2 User Guide, "Use the Instance Metadata Service", "Spot Instance interruption notices", "EC2 instance
rebalance recommendations".
"""

import asyncio
import json
from datetime import datetime
from typing import Final

import aiohttp

from meshgpu.errors import MeshgpuError
from meshgpu.ports import Interruption

ENDPOINT: Final = "http://169.254.169.254"
ENDPOINT_VARIABLE: Final = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Names another endpoint, as for AWS's own tools."""

ANSWER_S: Final = 2.0
"""It answers on the machine itself, in milliseconds."""

TOKEN_LIFE_S: Final = 21_600
ANSWER_LIMIT_BYTES: Final = 4096


class Imds:
    """Raises MeshgpuError `no-metadata` where it does not answer, or says what cannot be understood."""

    def __init__(self, endpoint: str = ENDPOINT) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = ""
        self._session: aiohttp.ClientSession | None = None

    async def public_address(self) -> str:
        """The IPv4 address at which the Internet reaches this machine; empty if it has none."""
        return await self._get("meta-data/public-ipv4") or ""

    async def interruption(self) -> Interruption | None:
        """Whether the provider is about to take this machine back."""
        notice = await self._get("meta-data/spot/instance-action")
        if notice is not None:
            try:
                return Interruption(datetime.fromisoformat(json.loads(notice)["time"]).timestamp())
            except (ValueError, KeyError, TypeError) as error:
                raise MeshgpuError("no-metadata", f"cannot read a spot notice: found {notice[:80]!r}") from error
        recommended = await self._get("meta-data/events/recommendations/rebalance")
        return Interruption(None) if recommended is not None else None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _get(self, path: str) -> str | None:
        """What is at `path`; None if nothing is."""
        try:
            async with asyncio.timeout(ANSWER_S):
                status, text = await self._ask("GET", path, {"X-aws-ec2-metadata-token": self._token})
                if status == 401:
                    await self._renew()
                    status, text = await self._ask("GET", path, {"X-aws-ec2-metadata-token": self._token})
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            reason = str(error) or "timed out"
            raise MeshgpuError("no-metadata", f"cannot ask {self._endpoint} for {path}: {reason}") from error
        if status == 404:
            return None
        if status != 200:
            raise MeshgpuError("no-metadata", f"cannot ask {self._endpoint} for {path}: it answers {status}")
        return text

    async def _renew(self) -> None:
        lives = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFE_S)}
        status, text = await self._ask("PUT", "api/token", lives)
        self._token = text.strip() if status == 200 else ""

    async def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if self._session is None:  # made here: a session belongs to the loop that runs
            self._session = aiohttp.ClientSession(trust_env=False)
        url = f"{self._endpoint}/latest/{path}"
        async with self._session.request(method, url, headers=headers, allow_redirects=False) as answer:
            body = await answer.content.read(ANSWER_LIMIT_BYTES)
            return answer.status, body.decode()
