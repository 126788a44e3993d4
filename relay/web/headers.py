"""What every answer tells browsers and caches, errors included."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_EVERYWHERE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_CSP = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_NO_STORE = (b"cache-control", b"no-store")
_HSTS = (b"strict-transport-security", b"max-age=31536000")
_PRIVATE = ("/v1", "/hooks", "/metrics")


class SecurityHeaders:
    """Around a whole ASGI application. A page may bring a content-security-policy of its own."""

    def __init__(self, app: ASGIApp, *, https: bool) -> None:
        self._app = app
        self._page = [*_EVERYWHERE, *([_HSTS] if https else [])]
        self._other = [*self._page, _CSP]
        self._private = [*self._other, _NO_STORE]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_private = scope["path"].startswith(_PRIVATE)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                if is_private:
                    own = self._private
                else:
                    has_policy = any(name == _CSP[0] for name, _ in headers)
                    own = self._page if has_policy else self._other
                message["headers"] = [*headers, *own]
            await send(message)

        await self._app(scope, receive, send_with_headers)
