"""The browser app: its page for each visitor, and the routes of their uploads and results."""

import asyncio
import mimetypes
import secrets
import warnings
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response
from nicegui import Client, ui
from nicegui import app as nicegui_app
from starlette.requests import ClientDisconnect

from dinoseg.extensions.serving.endpoint import error_response, save_body
from dinoseg.extensions.serving.page import Page, PageContext
from dinoseg.extensions.serving.sockets import restrict_sockets
from dinoseg.utils.errors import UserError

_RECONNECT = 30.0  # seconds after which the work of a closed page is cancelled and its files are removed
_HISTORY = 100  # messages to a page that are stored until it confirms them


class App:
    """The pages of the app, on the application of the endpoint."""

    def __init__(self, context: PageContext) -> None:
        self.pages: dict[str, Page] = {}  # by the unguessable name in the addresses of their files
        self._context = context
        self._encoding = asyncio.Lock()  # one image at a time, which bounds their memory

    def mount(self, application: FastAPI) -> None:
        """Add the page, and the routes of its uploads and results."""
        # NiceGUI searches all objects for its server, and torch's deprecated ones warn when they are inspected
        warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
        application.post("/upload/{token}")(self.receive_upload)
        application.get("/files/{token}/{name}")(self.send_file)
        ui.page("/")(self.build_page)
        restrict_sockets()
        # NiceGUI's answer to an unknown address is a page, and a line with that address in the log
        nicegui_app.exception_handler(404)(lambda request, error: JSONResponse({"detail": "Not Found."}, 404))
        nicegui_app.on_shutdown(self.close)
        ui.run_with(
            application,
            title="dinoseg",
            favicon="🦕",
            dark=None,
            tailwind=False,
            reconnect_timeout=_RECONNECT,
            message_history_length=_HISTORY,
            show_welcome_message=False,
        )

    def build_page(self, client: Client) -> None:
        """Build the page of a new visitor."""
        token = secrets.token_urlsafe(24)
        page = Page(self._context, token)
        self.pages[token] = page
        client.on_delete(lambda: self.pages.pop(token).close())

    async def receive_upload(self, token: str, request: Request) -> Response:
        """Store the file in a request's body in the folder of its page, which opens it next."""
        page = self.pages.get(token)
        if page is None or page.is_busy or page.is_receiving:
            raise HTTPException(409, "This page is closed or busy. Reload it.")
        path = page.folder / secrets.token_hex(16)
        page.is_receiving = True
        try:
            page.folder.mkdir(mode=0o700, exist_ok=True)
            await save_body(request, path, self._context.max_mib)
        except (UserError, OSError, ClientDisconnect) as error:
            path.unlink(missing_ok=True)
            return error_response(error)
        finally:
            page.is_receiving = False
        page.add_upload(path)
        return Response(status_code=204)

    async def send_file(self, token: str, name: str) -> Response:
        """Return a result of a page by the name that the page gave it."""
        page = self.pages.get(token)
        content = None if page is None else page.files.get(name)
        if content is None:
            raise HTTPException(404, "This file does not exist.")
        headers = {"cache-control": "no-store", "content-type": mimetypes.guess_type(name)[0] or ""}
        if isinstance(content, Path):
            return FileResponse(content, headers=headers)
        if not isinstance(content, bytes):
            async with self._encoding:
                content = await run_in_threadpool(content)
        return Response(content, headers=headers)

    def close(self) -> None:
        """Cancel the work of all pages, and remove their files."""
        for page in self.pages.values():
            page.close()
