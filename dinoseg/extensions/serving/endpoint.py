"""The HTTP endpoint: POST /segment, POST /objects, GET /health, GET /metrics."""

import logging
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Message

from dinoseg.extensions.serving.decoding import MIB
from dinoseg.extensions.serving.guard import SiteGuard
from dinoseg.extensions.serving.mask_editor import encode_mask
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_text

logger = logging.getLogger(__name__)
_MAX_FIELDS = 16  # of a form, beside its file; they are not read
_FIELD_BYTES = 2**16


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

    async def respond(request: Request, encode: Callable[[Path], Response]) -> Response:
        """Return the response for the image in the body or a form, and count it."""
        start = time.perf_counter()
        path = uploads / secrets.token_hex(16)
        response = Response(status_code=500)
        try:
            await save_image(request, path, max_mib)
            response = await run_in_threadpool(encode, path)
        except (UserError, OSError, ClientDisconnect) as error:
            response = error_response(error)
        finally:
            path.unlink(missing_ok=True)
            statuses[response.status_code] += 1
            seconds["total"] += time.perf_counter() - start
        return response

    @app.post("/segment")
    async def segment(request: Request, chosen: Annotated[str | None, Query(alias="class")] = None) -> Response:
        """Return the mask of an image.

        Class ids are a PNG with the classes' colours as its palette. Layers, of a multi-label model, are a TIFF with a
        page of 0 and 1 for each class. `class` names a class whose pixels alone are returned, a PNG of 0 and 1.
        """
        return await respond(request, partial(encode_classes, shared, chosen=chosen))

    @app.post("/objects")
    async def objects(request: Request) -> Response:
        """Return the objects of an image, best first, as a JSON list; `segmentation` is COCO's run lengths."""
        return await respond(request, partial(encode_objects, shared))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return the task, the classes and their colours, in the order of their ids or layers, and the things."""
        facts = shared.facts
        things = [facts.classes[label] for label in sorted(shared.things)]
        classes = {"classes": facts.classes, "palette": facts.palette, "things": things}
        return {"status": "ok", "task": shared.task, **classes}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters of images in Prometheus's text format."""
        lines = [f'dinoseg_requests_total{{code="{code}"}} {count}' for code, count in sorted(statuses.items())]
        lines.append(f"dinoseg_request_seconds_sum {seconds['total']:.6f}")
        lines.append(f"dinoseg_request_seconds_count {statuses.total()}")
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    return app


def encode_classes(shared: SharedModel, path: Path, chosen: str | None) -> Response:
    """Return the mask of an image file, or that of the chosen class.

    Raises:
        UserError: if the model has no such class, or as `SharedModel.segment_file`.
    """
    facts, has_layers = shared.facts, shared.has_layers
    if chosen is not None and chosen not in facts.classes:
        raise UserError(f"class={format_text(chosen)} is unknown to this model. GET /health lists its classes.")
    mask = shared.segment_file(path)
    if chosen is not None:
        index = facts.classes.index(chosen)
        mask = mask[index] if has_layers else (mask == index).astype(np.uint8)
    palette = facts.palette if chosen is None else ((0, 0, 0), (255, 255, 255))
    kind = "tiff" if mask.ndim > 2 else "png"
    return Response(encode_mask(mask, palette), media_type=f"image/{kind}")


def encode_objects(shared: SharedModel, path: Path) -> Response:
    """Return the objects of an image file.

    Raises:
        UserError: if the model predicts none, or as `SharedModel.predict_file`.
    """
    if not shared.things:
        raise UserError("This model predicts classes, and no single objects. POST /segment returns them.")
    _, _, found = shared.predict_file(path)
    assert found is not None  # of a model with things
    columns = (found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), found.masks)
    height, width = found.size
    return JSONResponse(
        [
            {
                "class": shared.facts.classes[label],
                "class_id": label,
                "score": score,
                "box": box,
                "area": mask.area,
                "segmentation": {"size": [height, width], "counts": mask.to_counts(height * width).tolist()},
            }
            for label, score, box, mask in zip(*columns, strict=True)
        ]
    )


async def save_image(request: Request, path: Path, max_mib: float) -> None:
    """Write the image of a request to a file: the body, or the only file of a form.

    Raises:
        TooLarge: if more than `max_mib` MiB are announced or received.
        UserError: if a form has no file, or is invalid.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        await save_body(request, path, max_mib)
        return
    try:
        limited = limit_body(request, max_mib)
        async with limited.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_FIELD_BYTES) as form:
            files = [part.file for part in form.values() if isinstance(part, UploadFile)]
            if not files:
                raise UserError("The form has no file. Send the image as one, such as curl -F file=@photo.jpg.")
            with path.open("wb") as file:
                await run_in_threadpool(shutil.copyfileobj, files[0], file)
    except HTTPException as error:
        raise UserError(f"The form cannot be read: {error.detail}") from error


async def save_body(request: Request, path: Path, max_mib: float) -> None:
    """Write a request's body to a file while it is received.

    Raises:
        TooLarge: if more than `max_mib` MiB are announced or received.
    """
    with path.open("wb") as file:
        async for chunk in limit_body(request, max_mib).stream():
            file.write(chunk)


def limit_body(request: Request, max_mib: float) -> Request:
    """Return a request whose body raises `TooLarge` where it exceeds `max_mib` MiB.

    Raises:
        TooLarge: if more are announced.
    """
    limit = int(max_mib * MIB)
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise TooLarge(f"The file is larger than {max_mib:g} MiB. Send a smaller one.")
        return message

    if int(request.headers.get("content-length", 0)) > limit:  # digits only: uvicorn refuses others
        raise TooLarge(f"The file is larger than {max_mib:g} MiB. Send a smaller one.")
    return Request(request.scope, receive)


def error_response(error: Exception) -> Response:
    """Return the response for a refused request: a status and one sentence."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nginx's number, for the metrics
    if isinstance(error, UserError):
        return JSONResponse({"detail": str(error)}, 413 if isinstance(error, TooLarge) else 400)
    logger.error("Cannot store an upload: %s", error)
    return JSONResponse({"detail": "The server cannot store the file. Try again later."}, 507)
