"""The web app: a page that segments uploaded images, and segments or tracks objects in short clips."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from dinoseg.report.palette import default_palette
from dinoseg.serving.answers import MaskStyle, areas, png
from dinoseg.serving.clips import (
    FRAME,
    MASKS,
    OVERLAY,
    Frames,
    check_objects,
    inspect_clip,
    kind_of,
    make_overlay,
    redraw,
)
from dinoseg.serving.endpoint import counted, endpoint
from dinoseg.serving.guard import Hosts
from dinoseg.serving.jobs import Jobs, UploadJob
from dinoseg.serving.limits import ClipLimits, HungUp, Refused, not_stored
from dinoseg.serving.requests import bounded
from dinoseg.serving.service import Service
from dinoseg.tracking.tracker import Tracker

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {"": "index.html", "style.css": "style.css", "app.js": "app.js", "paint.js": "paint.js"}
_RESULTS = (FRAME, OVERLAY, MASKS)
_SWEEP = 5.0  # seconds between two removals of abandoned uploads
_UPLOAD = 10  # a clip's upload timeout, as a multiple of an image's
_OBJECTS = default_palette(255)


class App:
    """Routes of the app, in addition to those of the endpoint.

    Args:
        service: the model and its limits.
        clips: limits of clips.
        folder: this server's own, for uploads.
        tracker: creates a tracker of painted objects; None: the model has no backbone for tracking.
    """

    def __init__(
        self, service: Service, clips: ClipLimits, folder: Path, tracker: Callable[[], Tracker] | None
    ) -> None:
        self._service, self._clips, self._tracker = service, clips, tracker
        self._jobs = Jobs(folder, clips)
        self._looking = ThreadPoolExecutor(clips.at_once, thread_name_prefix="looking")
        service.at_stop = self._jobs.interrupt_coming

    def application(self, hosts: Hosts) -> Starlette:
        """Return the app and the endpoint as an ASGI application."""
        pages = [Route(f"/{path}", partial(_page, name)) for path, name in _PAGE_FILES.items()]
        routes = [
            Route("/app/about", self.about),
            Route("/app/image", counted(self._service, self.image), methods=["POST"]),
            Route("/app/clip", self.clip, methods=["POST"]),
            Route("/app/{job}/segment", self.segment, methods=["POST"]),
            Route("/app/{job}/track", self.track, methods=["POST"]),
            Route("/app/{job}/redraw", self.redraw, methods=["POST"]),
            Route("/app/{job}/cancel", self.cancel, methods=["POST"]),
            Route("/app/{job}", self.state),
            Route("/app/{job}", self.remove, methods=["DELETE"]),
            Route("/app/{job}/{file}", self.result),
        ]
        return endpoint(self._service, hosts, [*pages, *routes], self._lifespan)

    async def about(self, request: Request) -> Response:
        """Return the classes, colours, features and limits for the page."""
        facts, limits = self._service.model.facts, self._service.limits
        return JSONResponse(
            {
                "classes": list(facts.classes),
                "palette": [list(colour) for colour in facts.palette],
                "objects": _OBJECTS[:32],
                "tracks": self._tracker is not None,
                "image_mib": limits.image_mib,
                "video_mib": self._clips.video_mib,
                "max_seconds": self._clips.max_seconds,
            }
        )

    async def image(self, request: Request) -> Response:
        """Segment an image; return its size, areas and mask, as PNGs of the classes' colours and of grey ids."""
        facts = self._service.model.facts

        def encode(ids: np.ndarray) -> Response:
            height, width = ids.shape
            pictures = {"mask": png(ids, facts.palette), "ids": png(ids, None)}
            texts = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
            return JSONResponse({"width": width, "height": height, "areas": areas(ids, facts), **texts})

        return await self._service.segment(request, encode)

    async def clip(self, request: Request) -> Response:
        """Receive a clip; return its size, its length and the id under which its first frame is served."""
        job = self._jobs.new()
        try:
            path = await self._received(job, request)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._looking, self._inspect, job, path)
        except BaseException as error:
            self._jobs.remove(job)
            if isinstance(error, OSError):
                raise not_stored(error) from error
            raise
        self._jobs.arrived(job)
        return self._state_of(job)

    async def segment(self, request: Request) -> Response:
        """Start segmenting each frame of a clip."""
        facts, worker = self._service.model.facts, self._service.worker

        def masks_of(frames: Frames) -> list[np.ndarray]:
            return [future.result() for future in [worker.submit(frame) for frame in frames]]

        style = MaskStyle(facts.classes.__getitem__, facts.palette, facts.ignore_index)
        return self._begin(request, style, partial(make_overlay, masks_of=masks_of))

    async def track(self, request: Request) -> Response:
        """Start tracking the objects of a mask through a clip; the body has one byte per pixel of the first frame."""
        if self._tracker is None:
            raise Refused(400, "no_tracker", "This model has no backbone for tracking objects.")
        job = self._jobs.get(request.path_params["job"])
        mask = check_objects(await self._service.uploaded(request), job.facts)
        tracker, worker, labels = self._tracker(), self._service.worker, [mask]

        def masks_of(frames: Frames) -> list[np.ndarray]:
            given = [labels.pop() if labels else None for _ in frames]
            return worker.call(lambda: tracker.track(frames, given)).result()

        return self._begin(request, MaskStyle(_object_name, _OBJECTS), partial(make_overlay, masks_of=masks_of))

    async def redraw(self, request: Request) -> Response:
        """Start redrawing the overlay from a clip's stored masks; `hidden` lists ids that are not shown."""
        style = self._jobs.get(request.path_params["job"]).style
        if style is None:
            raise Refused(400, "no_masks", "This clip has no masks yet: segment it first.")
        return self._begin(request, replace(style, hidden=_hidden(request)), redraw)

    async def state(self, request: Request) -> Response:
        """Return the state and progress of a clip."""
        return self._state_of(self._jobs.get(request.path_params["job"]))

    async def cancel(self, request: Request) -> Response:
        """Cancel the work on a clip, which can be started again."""
        job = self._jobs.get(request.path_params["job"])
        self._jobs.cancel(job)
        return self._state_of(job)

    async def remove(self, request: Request) -> Response:
        """Remove an upload, and cancel the work on it."""
        self._jobs.remove(self._jobs.get(request.path_params["job"]))
        return Response(status_code=204)

    async def result(self, request: Request) -> Response:
        """Return one of an upload's result files."""
        job, name = self._jobs.get(request.path_params["job"]), request.path_params["file"]
        path = job.folder / name
        if name not in _RESULTS or not path.is_file():
            raise Refused(404, "no_result", "This result does not exist, or is not ready.")
        return FileResponse(path)

    def _begin(
        self, request: Request, style: MaskStyle, make: Callable[[UploadJob, Path, ClipLimits, MaskStyle], None]
    ) -> Response:
        """Start making a clip's overlay, with the opacity in the request."""
        job, style = self._jobs.get(request.path_params["job"]), replace(style, opacity=_opacity(request))
        path = next(job.folder.glob("clip.*"))
        self._jobs.start(job, lambda job: make(job, path, self._clips, style))
        return self._state_of(job)

    def _inspect(self, job: UploadJob, path: Path) -> None:
        if self._service.stopping:
            raise Refused(503, "busy", "The server is stopping. Try again later.", retry_after=1)
        inspect_clip(job, path, self._clips, self._service.limits.max_pixels)

    def _state_of(self, job: UploadJob) -> Response:
        progress = {"state": job.state, "done": job.done, "total": job.total, "ahead": self._jobs.ahead_of(job)}
        return JSONResponse({"id": job.id, **job.facts, **progress, "error": job.error})

    async def _received(self, job: UploadJob, request: Request) -> Path:
        """Write a clip to its folder while it is received."""
        try:
            async with asyncio.timeout(_UPLOAD * self._service.limits.timeout):
                return await _written(bounded(request, self._clips.video_mib), job.folder)
        except TimeoutError as error:
            raise Refused(408, "timeout", "The upload of the clip timed out. Send a smaller one.") from error
        except ClientDisconnect as error:
            raise HungUp from error

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(self._sweep())
        yield
        sweeping.cancel()
        self._looking.shutdown()
        self._jobs.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            self._jobs.sweep()


async def _page(name: str, request: Request) -> Response:
    return FileResponse(_PAGE / name)


async def _written(request: Request, folder: Path) -> Path:
    """Stream a request's body to clip.SUFFIX, with the suffix that its first bytes determine."""
    chunks, start = request.stream(), b""
    async for chunk in chunks:
        start += chunk
        if len(start) >= 16:
            break
    path = folder / f"clip{kind_of(start)}"
    with path.open("wb") as file:
        file.write(start)
        async for chunk in chunks:
            file.write(chunk)
    return path


def _object_name(label: int) -> str:
    return f"object {label}" if label else "background"


def _opacity(request: Request) -> float:
    try:
        opacity = float(request.query_params.get("opacity", 0.5))
    except ValueError:
        opacity = -1.0
    if not 0 <= opacity <= 1:
        raise Refused(400, "opacity", "opacity is a number from 0 (frame only) to 1 (colours only).")
    return opacity


def _hidden(request: Request) -> frozenset[int]:
    given = request.query_params.get("hidden", "")
    words = given.split(",") if given else []
    if not all(re.fullmatch("[0-9]{1,3}", word) and int(word) < 256 for word in words):
        raise Refused(400, "hidden", "hidden is a comma-separated list of ids from 0 to 255, such as 0,3.")
    return frozenset(map(int, words))
