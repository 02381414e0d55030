"""The browser app: its page for each visitor, and the routes of their uploads and results."""

import asyncio
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, Response
from nicegui import Client, ui
from starlette.requests import ClientDisconnect

from dinoseg.serving.endpoint import error_response, save_body
from dinoseg.serving.page import Page
from dinoseg.serving.shared import SharedModel
from dinoseg.tracking.tracker import Tracker
from dinoseg.utils.errors import UserError

_RECONNECT = 30.0  # seconds after which the work of a closed page is cancelled and its files are removed


@dataclass
class App:
    """The pages of the app, on the application of the endpoint.

    Args:
        shared: the model.
        uploads: this server's own folder.
        make_tracker: creates a tracker of masks; None: the model has no backbone for tracking.
        max_mib: largest upload, in MiB.
        max_seconds: longest video.
    """

    shared: SharedModel
    uploads: Path
    make_tracker: Callable[[], Tracker] | None
    max_mib: float
    max_seconds: float
    pages: dict[str, Page] = field(default_factory=dict)  # by the unguessable name in the addresses of their files
    video_queue: asyncio.Lock = field(default_factory=asyncio.Lock)  # images are segmented between a video's batches

    def mount(self, application: FastAPI) -> None:
        """Add the page, and the routes of its uploads and results."""
        # NiceGUI searches all objects for its server, and torch's deprecated ones warn of being looked at
        warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
        application.post("/upload/{token}")(self.receive_upload)
        application.get("/files/{token}/{name}")(self.send_file)
        ui.page("/")(self.build_page)
        ui.run_with(
            application,
            title="dinoseg",
            favicon="🦕",
            dark=None,
            tailwind=False,
            reconnect_timeout=_RECONNECT,
            show_welcome_message=False,
        )

    def build_page(self, client: Client) -> None:
        """Build the page of a new visitor."""
        token = secrets.token_urlsafe(24)
        page = Page(
            self.shared,
            self.uploads / secrets.token_hex(16),
            token,
            make_tracker=self.make_tracker,
            max_mib=self.max_mib,
            max_seconds=self.max_seconds,
            video_queue=self.video_queue,
        )
        self.pages[token] = page
        client.on_delete(lambda: self.pages.pop(token).close())

    async def receive_upload(self, token: str, request: Request) -> Response:
        """Store the file in a request's body in the folder of its page."""
        page = self.pages.get(token)
        if page is None or page.is_busy:
            raise HTTPException(409, "This page is closed or busy. Reload it.")
        try:
            page.folder.mkdir(mode=0o700, exist_ok=True)
            await save_body(request, page.upload, self.max_mib)
        except (UserError, OSError, ClientDisconnect) as error:
            return error_response(error)
        return Response(status_code=204)

    async def send_file(self, token: str, name: str) -> Response:
        """Return a result of a page by the name that the page gave it."""
        page = self.pages.get(token)
        content = None if page is None else page.files.get(name)
        if content is None:
            raise HTTPException(404, "This file does not exist.")
        return FileResponse(content) if isinstance(content, Path) else Response(content)

    def close(self) -> None:
        """Cancel the work of all pages, and remove their files."""
        for page in self.pages.values():
            page.close()
