"""The HTTP endpoint: POST /segment, POST /objects, GET /health, GET /metrics."""

import asyncio
import json
import logging
import math
import re
import secrets
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Message

from dinoseg.core.objects import Objects
from dinoseg.extensions.annotations.rle import to_text
from dinoseg.extensions.serving.decoding import MIB
from dinoseg.extensions.serving.guard import SiteGuard
from dinoseg.extensions.serving.mask_editor import encode_mask
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.extensions.serving.work import OutOfTime, Work, WorkCancelled, run_in_thread
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_text

logger = logging.getLogger(__name__)
_MAX_FIELDS = 16  # of a form, beside its file; they are not read
_FIELD_BYTES = 2**16
_MAX_ANSWER = 8 * MIB  # of objects as JSON; smooth masks of 100 objects in 16 million pixels take about 2 MiB
_PLAIN_NUMBER = re.compile(r"[0-9.eE+ -]+")  # Python also reads 0_1, and the digits of other scripts
_POLL = 0.5  # seconds between two checks of work that runs


class TooLarge(UserError):
    """A request has more bytes than are allowed."""


class AnswerTooLarge(UserError):
    """An answer would have more bytes than are allowed."""


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
    seconds: dict[int, float] = defaultdict(float)  # over all requests of a status

    async def respond(request: Request, encode: Callable[[SharedModel, Path, QueryParams, Work], Response]) -> Response:
        """Return the response for the image in the body or a form, and count it."""
        start = time.perf_counter()
        path = uploads / secrets.token_hex(16)
        work = Work()
        response = Response(status_code=500)
        try:
            await save_image(request, path, max_mib)
            run = partial(encode, shared, path, request.query_params, work)
            response = await run_for_client(request, shared, work, run)
        except (UserError, OSError, ClientDisconnect, WorkCancelled) as error:
            response = error_response(error)
        finally:
            path.unlink(missing_ok=True)
            statuses[response.status_code] += 1
            seconds[response.status_code] += time.perf_counter() - start
        return response

    @app.post("/segment")
    async def segment(request: Request) -> Response:
        """Return the mask of an image.

        Class ids are a PNG with the classes' colours as its palette. Layers, of a multi-label model, are a TIFF with a
        page of 0 and 1 for each class. `class` names a class whose pixels alone are returned, a PNG of 0 and 1.
        """
        return await respond(request, encode_classes)

    @app.post("/objects")
    async def objects(request: Request) -> Response:
        """Return the objects of an image, best first, as a JSON list; `segmentation` is COCO's compressed run lengths.

        `score` sets the lowest score of an object, and `class` names a class whose objects alone are returned.
        """
        return await respond(request, encode_objects)

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
        for code, total in sorted(seconds.items()):
            lines.append(f'dinoseg_request_seconds_sum{{code="{code}"}} {total:.6f}')
            lines.append(f'dinoseg_request_seconds_count{{code="{code}"}} {statuses[code]}')
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    return app


async def run_for_client(
    request: Request, shared: SharedModel, work: Work, function: Callable[[], Response]
) -> Response:
    """Return the result of a function in a thread, unless the client leaves or the work must end.

    An operation of the model that is not interrupted does not delay the answer.

    Raises:
        WorkCancelled: the client has left.
        OutOfTime: as `SharedModel.check`.
    """
    running = asyncio.ensure_future(run_in_thread(function))
    leaving = asyncio.ensure_future(wait_until_left(request))
    try:
        while not running.done():
            await asyncio.wait({running, leaving}, timeout=_POLL, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                work.is_cancelled = leaving.done()
                shared.check(work)
        return running.result()
    finally:
        work.is_cancelled = True
        running.cancel()
        leaving.cancel()


async def wait_until_left(request: Request) -> None:
    """Return when the client of a request, whose body is read, closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def encode_classes(shared: SharedModel, path: Path, query: QueryParams, work: Work) -> Response:
    """Return the mask of an image file, or that of the class in the query.

    Raises:
        UserError: if the query is invalid, or the file is no valid image.
    """
    facts = shared.facts
    index = find_class(shared, parse_query(query, "class"))
    with shared.hold_place(work):
        mask = shared.segment([shared.decode(path)], work)[0]
        if index is not None:
            mask = mask[index] if shared.has_layers else (mask == index).astype(np.uint8)
        palette = facts.palette if index is None else ((0, 0, 0), (255, 255, 255))
        kind = "tiff" if mask.ndim > 2 else "png"
        return Response(encode_mask(mask, palette), media_type=f"image/{kind}")


def encode_objects(shared: SharedModel, path: Path, query: QueryParams, work: Work) -> Response:
    """Return the objects of an image file, of the score and the class in the query.

    Raises:
        UserError: if the model predicts none, the query is invalid, or the file is no valid image.
        AnswerTooLarge: as `write_objects`.
    """
    if not shared.things:
        raise UserError("This model predicts classes, and no single objects. POST /segment returns them.")
    options = parse_query(query, "class", "score")
    index = find_class(shared, options)
    min_score = parse_score(options["score"]) if "score" in options else shared.min_score
    with shared.hold_place(work):
        _, found = shared.predict(shared.decode(path), work)
        assert found is not None  # of a model with things
        found = found.select_distinct(min_score)
        if index is not None:
            found = found.select(np.flatnonzero(found.classes == index))
        return Response(write_objects(found, shared.facts.classes), media_type="application/json")


def parse_query(query: QueryParams, *names: str) -> dict[str, str]:
    """Return the parameters of an address.

    Raises:
        UserError: if one is unknown, or is given more than once.
    """
    for name, count in Counter(name for name, _ in query.multi_items()).items():
        if name not in names:
            raise UserError(f"The parameter {format_text(name)} is unknown. This address takes {' and '.join(names)}.")
        if count > 1:
            raise UserError(f"{name} is given {count} times. Give it once, and send a request for each value.")
    return dict(query)


def find_class(shared: SharedModel, options: Mapping[str, str]) -> int | None:
    """Return the index of the class that a query names; None if it names none.

    Raises:
        UserError: if the class is not one of the model.
    """
    name = options.get("class")
    if name is None:
        return None
    if name not in shared.facts.classes:
        raise UserError(f"class={format_text(name)} is unknown to this model. GET /health lists its classes.")
    return shared.facts.classes.index(name)


def parse_score(text: str) -> float:
    """Return the lowest score of objects that a query sets.

    Raises:
        UserError: if it is no number from 0 to 1.
    """
    try:
        score = float(text) if _PLAIN_NUMBER.fullmatch(text) else math.nan
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise UserError(f"score={format_text(text)} is not a number from 0 to 1. Give one, or leave score out.")
    return score


def write_objects(found: Objects, classes: Sequence[str]) -> str:
    """Return objects as JSON.

    Raises:
        AnswerTooLarge: if that has more than `_MAX_ANSWER` bytes; masks of noise may have millions of runs.
    """
    height, width = found.size
    entries: list[str] = []
    rest = _MAX_ANSWER
    columns = (found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), found.masks)
    for label, score, box, mask in zip(*columns, strict=True):
        letters = 2 * len(mask.starts)  # at least: one of each run length
        rest -= letters
        if rest >= 0:
            segmentation = {"size": [height, width], "counts": to_text(mask.to_counts(height * width))}
            facts = {"class": classes[label], "class_id": label, "score": score, "box": box, "area": mask.area}
            entries.append(json.dumps(facts | {"segmentation": segmentation}))
            rest -= len(entries[-1]) + 2 - letters  # with its comma and space, or the brackets
        if rest < 0:
            raise AnswerTooLarge(
                f"The {len(found)} objects take more than {_MAX_ANSWER // MIB} MiB as JSON. Ask for fewer, by a higher "
                "score=0.9 or by class=NAME, or send a smaller image."
            )
    return f"[{', '.join(entries)}]"


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
    if isinstance(error, ClientDisconnect | WorkCancelled):
        return Response(status_code=499)  # nginx's number, for the metrics
    if isinstance(error, UserError):
        statuses = {TooLarge: 413, AnswerTooLarge: 422, OutOfTime: 503}
        return JSONResponse({"detail": str(error)}, statuses.get(type(error), 400))
    logger.error("Cannot store an upload: %s", error)
    return JSONResponse({"detail": "The server cannot store the file. Try again later."}, 507)
