"""Who may see the workbench: whoever has the address that was printed, on this machine alone.

Gradio's server has neither a secret nor a look at the Host of a request, so a page of another site
could reach it through a name of its choice (DNS rebinding), and so could the machine's other users.
"""

import secrets
from collections.abc import Set
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEY = "key"
"""Name of the secret in the address."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' "
    "data:; connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'; "
    "form-action 'self'; object-src 'none'"
)
"""What the page may load: nothing from elsewhere."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_OPEN = ("/gradio_api/startup-events", "/manifest.json")
"""Asked for without any cookie, by Gradio when it starts and by browsers; both say nothing."""


class Guard:
    """Passes on requests that have the secret, in the address once and then in a cookie.

    Attributes:
        app: what is guarded.
        secret: of this server.
        hosts: names by which it may be called; None: any, for an address that is not local.
    """

    def __init__(self, app: ASGIApp, secret: str, hosts: Set[str] | None) -> None:
        self.app, self.secret, self.hosts = app, secret, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = self._refusal(scope)
        if answer is not None and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await (answer or self.app)(scope, receive, closed)

    def _refusal(self, scope: Scope) -> Response | None:
        """What is answered in place of the page; None if the request may have it."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
            return PlainTextResponse("the request is for another host", 403)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("the request is from another page", 403)
        if scope["path"] in _OPEN:
            return None
        cookie = f"flatdepth-{(scope.get('server') or ('', 0))[1]}"
        if self._is_secret(_cookies(headers).get(cookie, "")):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        if not self._is_secret(dict(query).get(KEY, "")):
            return PlainTextResponse("open the address that flatdepth serve printed", 401)
        rest = urlencode([pair for pair in query if pair[0] != KEY])
        answer = RedirectResponse(f"{scope['path']}{'?' if rest else ''}{rest}", 303)
        answer.set_cookie(cookie, self.secret, httponly=True, samesite="lax")
        return answer

    def _is_secret(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.secret.encode())


def _cookies(headers: Headers) -> dict[str, str]:
    jar = SimpleCookie()
    try:
        jar.load(headers.get("cookie", ""))
    except CookieError:
        return {}
    return {name: one.value for name, one in jar.items()}
