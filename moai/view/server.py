"""The server of `moai view`: one user, one process, this machine; it answers reading requests and nothing else.

    serve([Directory.open(path, key) for ...], host="127.0.0.1", port=0, announce=print)

Whoever asks must know the token of the URL that is printed, in a cookie from then on, and must ask for this host: a
page from elsewhere in the same browser knows neither. Text of a corpus reaches the page as JSON, and is shown there as
text: the content security policy lets no script and no style run but those in `static/`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from moai.core.errors import ConfigError, MoaiError, printable
from moai.view.directory import Directory

STATIC = Path(__file__).with_name("static")
FILES = {"app.js": "text/javascript", "style.css": "text/css"}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)

Send = Callable[[dict[str, Any]], Awaitable[None]]


def serve(
    directories: Sequence[Directory],
    *,
    host: str,
    port: int,
    announce: Callable[[str], None],
    hosts: Sequence[str] = (),
) -> None:
    """Answer until the process is told to stop. `announce` gets the URL with the token. Raises ConfigError."""
    import uvicorn

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; name another port, or none") from error
    port, token = listening.getsockname()[1], secrets.token_urlsafe(32)
    shown = f"[{host}]" if ":" in host else host
    guarded = Guard(application(directories), token=token, port=port, hosts=(*LOOPBACK, *hosts))
    announce(f"http://{shown}:{port}/?token={token}")
    config = uvicorn.Config(guarded, log_level="warning", access_log=False)  # a log of URLs would hold the token
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


class Guard:
    """Refuses what does not come from the page of whoever started the server (ASGI)."""

    def __init__(self, app: Any, *, token: str, port: int, hosts: Sequence[str]) -> None:
        self.app, self.token, self.hosts = app, token, set(hosts)
        self.cookie = f"moai_view_{port}"  # cookies know no ports: another viewer's would take this one's place

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        if given.get("host", "").rpartition(":")[0] not in self.hosts:
            await _answer(with_headers, 400, "this server answers on this machine only")
        elif scope["method"] not in ("GET", "HEAD"):
            await _answer(with_headers, 403, "this server answers reading requests only")
        elif given.get("sec-fetch-site", "none") not in ("none", "same-origin") and not self._is_visit(scope, given):
            await _answer(with_headers, 403, "asked for by a page from elsewhere")
        elif "token" in asked:
            await self._enter(with_headers, scope["path"], asked)
        elif not _same(self._cookie(given), self.token):
            await _answer(with_headers, 403, "open the address that `moai view` printed")
        else:
            await self.app(scope, receive, with_headers)

    @staticmethod
    def _is_visit(scope: dict[str, Any], given: dict[str, str]) -> bool:
        """A link to the front page, which holds no data."""
        return scope["path"] == "/" and given.get("sec-fetch-mode") == "navigate"

    async def _enter(self, send: Send, path: str, asked: dict[str, str]) -> None:
        """The token goes into a cookie, and out of the address."""
        if not _same(asked.pop("token"), self.token):
            await _answer(send, 403, "this is not the token of this server")
            return
        clean = f"/{path.lstrip('/')}" + (f"?{urlencode(asked)}" if asked else "")
        cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        await _answer(send, 303, "", [(b"location", clean.encode("latin-1")), (b"set-cookie", cookie.encode())])

    def _cookie(self, given: dict[str, str]) -> str:
        pairs = (pair.strip().partition("=") for pair in given.get("cookie", "").split(";"))
        return next((value for name, _, value in pairs if name == self.cookie), "")


def application(directories: Sequence[Directory]) -> Any:
    """The pages and what they ask for. Directories are named by keys made at the start: no path is taken from a URL."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response
    from starlette.routing import Route

    by_key = {directory.key: directory for directory in directories}

    def answer(value: Any) -> Response:
        return Response(json.dumps(value, ensure_ascii=True), media_type="application/json")

    def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        return FileResponse(STATIC / name, media_type=FILES[name]) if name in FILES else _missing()

    def home(request: Request) -> Response:
        return answer([directory.summary() for directory in directories])

    def look(request: Request) -> Response:
        directory = by_key.get(request.path_params["key"])
        if directory is None:
            return _missing()
        try:
            return answer(directory.answer(request.path_params["what"], dict(request.query_params)))
        except (KeyError, IndexError, ValueError) as error:
            said = error.args[0] if error.args else "not there"
            return PlainTextResponse(printable(str(said)), status_code=404)
        except (MoaiError, OSError) as error:  # a directory that was removed or damaged while it is looked at
            return PlainTextResponse(printable(str(error)), status_code=422)

    def _missing() -> Response:
        return PlainTextResponse("not there", status_code=404)

    routes = [
        Route("/static/{name}", static),
        Route("/api/home", home),
        Route("/api/d/{key}/{what}", look),
        Route("/", page),
        Route("/d/{rest:path}", page),
    ]
    return Starlette(routes=routes)


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted.encode())


async def _answer(send: Send, status: int, text: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    kind = (b"content-type", b"text/plain; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *headers]})
    await send({"type": "http.response.body", "body": text.encode()})
