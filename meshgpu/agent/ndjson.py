"""Answers of the control API that are told line by line: one JSON object each."""

import json
from collections.abc import Mapping

from aiohttp import web

from meshgpu.agent.views import Document
from meshgpu.errors import MeshgpuError


def error_document(error: MeshgpuError) -> Document:
    return {"code": error.code, "message": error.message, "hint": error.hint}


async def stream(request: web.Request, headers: Mapping[str, str] | None = None) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", **(headers or {})})
    await response.prepare(request)
    return response


async def write(response: web.StreamResponse, document: Document) -> None:
    await response.write(json.dumps(document).encode() + b"\n")
