"""What every answer says of itself, errors included."""

from typing import Any

import httpx
import pytest

from relay.app import build
from relay.config import read_config
from relay.web import ops
from tests.conftest import ADMIN_KEY, World
from tests.serving import serving

ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'"
PRIVATE = [
    ("GET", "/v1/endpoints", 200),
    ("GET", "/v1/endpoints/ep_unknown", 404),
    ("GET", "/v1/nothing", 404),
    ("PUT", "/v1/endpoints", 405),
    ("POST", "/v1/endpoints", 400),
    ("POST", "/hooks/luma/forged", 404),
    ("GET", "/hooks/luma/forged", 405),
]
PUBLIC = [("GET", "/healthz", 200), ("GET", "/readyz", 200), ("GET", "/openapi.json", 200), ("GET", "/", 404)]


@pytest.mark.parametrize(("method", "path", "status"), PRIVATE + PUBLIC)
async def test_every_answer_has_them(world: World, method: str, path: str, status: int) -> None:
    relay = await world.relay()
    answer = await relay.api.request(method, path)
    assert answer.status_code == status
    assert {name: answer.headers.get(name) for name in ALWAYS} == ALWAYS
    assert answer.headers["content-security-policy"] == NOTHING
    assert answer.headers.get("cache-control") == ("no-store" if (method, path, status) in PRIVATE else None)
    assert "strict-transport-security" not in answer.headers


async def test_a_refusal_of_the_key_has_them(world: World) -> None:
    relay = await world.relay()
    answer = await relay.api.get("/v1/endpoints", headers={"authorization": "Bearer wrong"})
    assert (answer.status_code, answer.headers["cache-control"]) == (401, "no-store")
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_page_for_readers_may_have_its_styles_and_nothing_else(world: World) -> None:
    relay = await world.relay()
    [policy] = (await relay.api.get("/docs")).headers.get_list("content-security-policy")
    assert policy.startswith("default-src 'none';")
    assert "style-src 'unsafe-inline'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script" not in policy
    assert (await relay.api.post("/docs")).headers["content-security-policy"] == NOTHING


@pytest.mark.parametrize(
    ("public_url", "expected"),
    [("https://relay.example.com", "max-age=31536000"), ("http://relay.example.com", None)],
)
async def test_https_is_insisted_on_where_the_public_url_has_it(
    world: World, public_url: str, expected: str | None
) -> None:
    relay = await world.relay(public_url=public_url)
    for path in ("/healthz", "/docs", "/v1/endpoints", "/nothing"):
        assert (await relay.api.get(path)).headers.get("strict-transport-security") == expected


async def test_an_answer_to_our_own_mistake_has_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ops, "pending", broken)
    app = build(read_config(world.document(), {}))
    async with serving(app) as origin, httpx.AsyncClient(base_url=origin) as client:
        answer = await client.get("/readyz", headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert answer.status_code == 500
    assert {name: answer.headers.get(name) for name in ALWAYS} == ALWAYS
    assert answer.headers["content-security-policy"] == NOTHING
