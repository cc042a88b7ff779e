"""The page's server, which listens on this machine only and reads files on request."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tlcapture.captures.notes import NoteChangedError
from tlcapture.errors import InputError, TlcaptureError
from tlcapture.page.assets import POLICY, plotly_script, served_page, static_file
from tlcapture.page.contents import RESOURCES, Contents, from_address
from tlcapture.page.long_reading import SHORT_REQUESTS
from tlcapture.page.missing import MissingError
from tlcapture.page.note_contents import READ_ONLY, ClosedError
from tlcapture.storage.remote.roots import FRESH, refresh
from tlcapture.text import printable

HOST = "127.0.0.1"
DEFAULT_PORT = 8765
_LONGEST_REQUEST = 2**17  # bytes
_LONG = ("overview", "average", "samples", "compared_set")  # what reads a whole prompt set
_NOT_CACHED = {"Cache-Control": "no-store"}
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def page_app(root: Path, *, read_only: bool = False) -> Starlette:
    """The ASGI application: the page, its scripts, and the resources of `Contents` below `/api/`.

    `read_only` refuses notes.
    """
    contents = Contents(root, notes_closed=READ_ONLY if read_only else "")
    routes = [
        Route(f"/api/{RESOURCES['notes']}", _writing(root, contents.add_note), methods=["POST"]),
        Route(f"/api/{RESOURCES['notes']}/{{note}}", _writing(root, contents.change_note), methods=["PUT"]),
    ]
    routes += [Route(f"/api/{path}", _resource(root, getattr(contents, name))) for name, path in RESOURCES.items()]
    routes += [Route("/", _page), Route("/plotly.js", _plotly), Route("/static/{name}", _static)]
    middleware = [
        Middleware(_Headers),
        # Otherwise pages of other sites could send requests under their own host name (DNS rebinding).
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
        Middleware(GZipMiddleware, minimum_size=4096, compresslevel=1),
    ]
    return Starlette(routes=routes, middleware=middleware)


def listen(port: int | None) -> socket.socket:
    """A listening socket on the loopback address.

    Args:
        port: the port; by default `DEFAULT_PORT`, or any free port if that is in use.

    Raises `InputError` if the port cannot be used.
    """
    for wanted in [port] if port is not None else [DEFAULT_PORT, 0]:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, wanted))
            listening.listen()
        except OSError as error:
            listening.close()
            if port is not None:
                raise InputError(f"--port {port}: {error.strerror}: choose another, or omit the option") from None
        else:
            return listening
    raise InputError(f"no port of {HOST} is free")


def serve(root: Path, listening: socket.socket, *, read_only: bool = False) -> None:
    """Serve the page of the experiments below `root` until interrupted; `read_only` refuses notes."""
    import uvicorn

    config = uvicorn.Config(
        page_app(root, read_only=read_only),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    logging.getLogger("uvicorn.error").addFilter(lambda record: "timeout graceful shutdown" not in record.getMessage())
    with suppress(KeyboardInterrupt):  # the normal way to stop
        uvicorn.Server(config).run(sockets=[listening])


class _Headers:
    """Adds security headers to every response."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._added = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self._added]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _writing(root: Path, write: Callable[..., Any]) -> Callable[[Request], Any]:
    """An endpoint that changes files, only for requests from this page: browsers state the origin of a request."""
    answered = _answered(root, write)

    async def endpoint(request: Request) -> Response:
        if request.headers.get("origin") != f"http://{request.headers.get('host')}":
            return _refusal(403, "refused: only this page itself may change notes")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refusal(415, "refused: expected JSON")
        data = b""
        async for piece in request.stream():
            data += piece
            if len(data) > _LONGEST_REQUEST:
                return _refusal(413, f"refused: more than {_LONGEST_REQUEST} bytes")
        try:
            sent = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            return _refusal(422, f"not valid JSON: {error}")
        return await run_in_threadpool(answered, **from_address(request.path_params), sent=sent)

    return endpoint


def _resource(root: Path, read: Callable[..., Any]) -> Callable[[Request], Any]:
    answered = _answered(root, read)
    is_long = read.__name__ in _LONG

    async def endpoint(request: Request) -> Response:
        with nullcontext() if is_long else SHORT_REQUESTS.answering():
            return await run_in_threadpool(answered, **from_address(request.path_params))

    return endpoint


def _answered(root: Path, read: Callable[..., Any]) -> Callable[..., Response]:
    """A function whose result, or error, is a response."""

    def answer(**parameters: Any) -> Response:
        try:
            refresh(root, FRESH)
            return _json(200, read(**parameters))
        except MissingError as error:
            # Not a failure: the page shows what is missing and the command that creates it.
            return _json(200, {"absent": error.to_json()})
        except NoteChangedError as error:
            return _refusal(409, str(error))
        except ClosedError as error:
            return _refusal(403, str(error))
        except TlcaptureError as error:
            return _refusal(404 if isinstance(error, InputError) else 422, str(error))
        except OSError as error:
            return _refusal(422, f"{error.filename}: cannot be read: {error.strerror}")
        except orjson.JSONEncodeError as error:
            return _refusal(422, f"a file has content that cannot be shown: {error}")

    return answer


def _refusal(status: int, what: str) -> Response:
    return _json(status, {"what": printable(what)})


def _json(status: int, value: Any) -> Response:
    return Response(orjson.dumps(value), status, _NOT_CACHED, "application/json")


async def _page(request: Request) -> Response:
    return Response(served_page(), headers=_NOT_CACHED, media_type="text/html")


async def _plotly(request: Request) -> Response:
    return Response(plotly_script(), headers={"Cache-Control": "max-age=86400"}, media_type="text/javascript")


async def _static(request: Request) -> Response:
    found = static_file(request.path_params["name"])
    if found is None:
        return Response("no such file", 404)
    content, media_type = found
    return Response(content, headers=_NOT_CACHED, media_type=media_type)
