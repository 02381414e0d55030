"""The browser app: its page for each visitor, and the routes of their uploads and results."""

import mimetypes
import secrets
import warnings
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, Response
from nicegui import Client, ui
from nicegui import app as nicegui_app
from starlette.requests import ClientDisconnect

from dinoseg.serving.endpoint import error_response, save_body
from dinoseg.serving.page import Page, PageContext
from dinoseg.utils.errors import UserError

_RECONNECT = 30.0  # seconds after which the work of a closed page is cancelled and its files are removed


class App:
    """The pages of the app, on the application of the endpoint."""

    def __init__(self, context: PageContext) -> None:
        self.pages: dict[str, Page] = {}  # by the unguessable name in the addresses of their files
        self._context = context

    def mount(self, application: FastAPI) -> None:
        """Add the page, and the routes of its uploads and results."""
        # NiceGUI searches all objects for its server, and torch's deprecated ones warn of being looked at
        warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
        application.post("/upload/{token}")(self.receive_upload)
        application.get("/files/{token}/{name}")(self.send_file)
        ui.page("/")(self.build_page)
        nicegui_app.on_shutdown(self.close)
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
        page = Page(self._context, token)
        self.pages[token] = page
        client.on_delete(lambda: self.pages.pop(token).close())

    async def receive_upload(self, token: str, request: Request) -> Response:
        """Store the file in a request's body in the folder of its page."""
        page = self.pages.get(token)
        if page is None or page.is_busy:
            raise HTTPException(409, "This page is closed or busy. Reload it.")
        try:
            page.folder.mkdir(mode=0o700, exist_ok=True)
            await save_body(request, page.upload, self._context.max_mib)
        except (UserError, OSError, ClientDisconnect) as error:
            return error_response(error)
        return Response(status_code=204)

    async def send_file(self, token: str, name: str) -> Response:
        """Return a result of a page by the name that the page gave it."""
        page = self.pages.get(token)
        content = None if page is None else page.files.get(name)
        if content is None:
            raise HTTPException(404, "This file does not exist.")
        headers = {"cache-control": "no-store", "content-type": mimetypes.guess_type(name)[0] or ""}
        return (
            FileResponse(content, headers=headers) if isinstance(content, Path) else Response(content, headers=headers)
        )

    def close(self) -> None:
        """Cancel the work of all pages, and remove their files."""
        for page in self.pages.values():
            page.close()
