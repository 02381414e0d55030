"""The HTTP endpoint: POST /segment, GET /health, GET /metrics."""

import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from dinoseg.serving.decoding import MIB
from dinoseg.serving.guard import SiteGuard
from dinoseg.serving.mask_editor import encode_mask
from dinoseg.serving.shared import SharedModel
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)


class TooLarge(UserError):
    """A request has more bytes than are allowed."""


def build_endpoint(shared: SharedModel, uploads: Path, *, hosts: Sequence[str], max_mib: float) -> FastAPI:
    """Return the endpoint as a FastAPI application.

    Args:
        shared: the model.
        uploads: folder where images are stored while they are decoded.
        hosts: accepted host names; `*` accepts any.
        max_mib: largest request, in MiB.
    """
    app = FastAPI(title="dinoseg", docs_url=None, redoc_url=None)  # these pages load scripts from other hosts
    app.add_middleware(SiteGuard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    statuses: Counter[int] = Counter()
    seconds = {"total": 0.0}  # over all requests

    @app.post("/segment")
    async def segment(request: Request) -> Response:
        """Return the class ids of the image in the body, as a PNG with the classes' colours as its palette."""
        start = time.perf_counter()
        path = uploads / secrets.token_hex(16)
        response = Response(status_code=500)
        try:
            await save_body(request, path, max_mib)
            _, mask = await run_in_threadpool(shared.segment_file, path)
            content = await run_in_threadpool(encode_mask, mask, shared.facts.palette)
            response = Response(content, media_type="image/png")
        except (UserError, OSError, ClientDisconnect) as error:
            response = error_response(error)
        finally:
            path.unlink(missing_ok=True)
            statuses[response.status_code] += 1
            seconds["total"] += time.perf_counter() - start
        return response

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return the model's classes and their colours, in the order of their ids."""
        return {"status": "ok", "classes": shared.facts.classes, "palette": shared.facts.palette}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters of /segment in Prometheus's text format."""
        lines = [f'dinoseg_requests_total{{code="{code}"}} {count}' for code, count in sorted(statuses.items())]
        lines.append(f"dinoseg_request_seconds_sum {seconds['total']:.6f}")
        lines.append(f"dinoseg_request_seconds_count {statuses.total()}")
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    return app


async def save_body(request: Request, path: Path, max_mib: float) -> None:
    """Write a request's body to a file while it is received.

    Raises:
        TooLarge: if more than `max_mib` MiB are announced or received.
    """
    limit = int(max_mib * MIB)
    size = int(request.headers.get("content-length", 0))  # digits only: uvicorn refuses others
    with path.open("wb") as file:
        if size <= limit:
            async for chunk in request.stream():
                file.write(chunk)
                size = max(size, file.tell())
                if size > limit:
                    break
    if size > limit:
        raise TooLarge(f"The file is larger than {max_mib:g} MiB. Send a smaller one.")


def error_response(error: Exception) -> Response:
    """Return the response for a refused request: a status and one sentence."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nginx's number, for the metrics
    if isinstance(error, UserError):
        return JSONResponse({"detail": str(error)}, 413 if isinstance(error, TooLarge) else 400)
    logger.error("Cannot store an upload: %s", error)
    return JSONResponse({"detail": "The server cannot store the file. Try again later."}, 507)
