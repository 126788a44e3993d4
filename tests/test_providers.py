"""Recorded answers and what they mean: a folder of `tests/providers/` per provider, a file per answer.

    {"about": "…", "source": "the document the answer is from",
     "reply": {"status": 200, "headers": {}, "body": <json> or "text": "<raw>"},
     "update": {every field of Update that is not None or empty, times as RFC 3339}
     or "error": {"code": "…", "retry_after": ms}}

`raw` is left out: it is always the answer itself. So is an error's `message` where the provider gives none.
"""

import json
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from relay.errors import ProviderError
from relay.generation import Update
from relay.providers import PROVIDERS, Account, Reply, load, understand
from relay.times import parse_rfc3339, rfc3339

NOW = parse_rfc3339("2026-06-01T12:00:00Z")
FOLDER = Path(__file__).parent / "providers"
CASES = [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in sorted(FOLDER.glob("*/*.json"))]


def read(path: Path) -> tuple[dict, Reply]:
    case = json.loads(path.read_text(encoding="utf-8"))
    reply = case["reply"]
    body = reply["text"] if "text" in reply else json.dumps(reply["body"], ensure_ascii=False)
    return case, Reply(reply["status"], body.encode(), reply["headers"])


def said(fields: dict) -> dict:
    """The fields that say something, times readable."""
    return {
        name: rfc3339(value) if name.endswith("_at") else value
        for name, value in fields.items()
        if value is not None and value != () and name != "raw"
    }


def recorded(update: Update) -> dict:
    shown = said(asdict(update))
    if update.error:
        shown["error"] = said(asdict(update.error))
    if update.outputs:
        shown["outputs"] = [said(asdict(output)) for output in update.outputs]
    return shown


def test_every_provider_has_recorded_answers():
    assert {path.parent.name for path in FOLDER.glob("*/*.json")} == set(PROVIDERS)


@pytest.mark.parametrize("path", CASES)
def test_recorded_answer_means_what_the_contract_says(path):
    case, reply = read(path)
    provider = load(path.parent.name)
    if "error" in case:
        with pytest.raises(ProviderError) as caught:
            understand(provider, reply, now=NOW)
        for name, value in case["error"].items():
            assert getattr(caught.value, name) == value
        return
    update = understand(provider, reply, now=NOW)
    shown = recorded(update)
    if "error" in shown and "message" not in case["update"].get("error", {}):
        assert shown["error"].pop("message").strip()
    assert shown == case["update"]
    assert update.raw == case["reply"].get("body")


ASKED = {
    "pixellabs": ("https://api.pixellabsai.app/v1/generate/J", "Bearer K"),
    "vivix": ("https://vivix-atelier.vercel.app/api/v1/generations/J", "Bearer K"),
    "pictory": ("https://api.pictory.ai/pictoryapis/v1/jobs/J", "K"),
    "luma": ("https://agents.lumalabs.ai/v1/generations/J", "Bearer K"),
}


def account(name: str) -> Account:
    provider = load(name)
    return Account(name, provider, "K-secret", provider.base_url, provider.pace)


@pytest.mark.parametrize("name", ASKED)
def test_each_provider_is_asked_where_and_how_its_document_says(name):
    assert (account(name).url("J"), load(name).authorization("K")) == ASKED[name]


def test_what_pixellabs_estimates_counts_from_the_beginning_of_the_job():
    answer = {"status": "queued", "estimatedTime": 15, "createdAt": rfc3339(NOW - 4_000)}
    assert load("pixellabs").read(answer, now=NOW).remaining_ms == 11_000
    assert load("pixellabs").read(answer, now=NOW + 60_000).remaining_ms == 0


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("job_id", ["a/../../b", "a?b=c", "a#b", "%2e%2e", "a\\b"])
def test_a_job_id_cannot_lead_to_another_resource(name, job_id):
    asked, usual = httpx.URL(account(name).url(job_id)), httpx.URL(account(name).url("J"))
    assert asked.host == usual.host and not asked.query and not asked.fragment
    assert asked.raw_path.rpartition(b"/")[0] == usual.raw_path.rpartition(b"/")[0]


@pytest.mark.parametrize("job_id", ["", "a b", "é", ".", "..", "a" * 256])
def test_what_is_no_job_id_is_not_asked_about(job_id):
    with pytest.raises(ValueError, match="not a job id"):
        account("luma").url(job_id)


def test_an_account_never_shows_its_credential():
    assert "K-secret" not in repr(account("luma"))


@pytest.mark.parametrize(
    ("name", "callback", "claimed"),
    [
        ("pictory", {"job_id": "4d82d040", "success": True, "data": {}}, "4d82d040"),
        ("pictory", {"job_id": 7}, None),
        ("pictory", {}, None),
        ("pictory", ["job_id"], None),
        ("pictory", None, None),
        ("vivix", {"generation_id": "5b91a581", "status": "completed"}, "5b91a581"),
        ("vivix", {"generation_id": 7}, None),
        ("vivix", ["generation_id"], None),
        ("luma", {"id": "182bd5e5"}, None),
    ],
)
def test_a_callback_claims_a_job_only_where_the_provider_calls_back(name, callback, claimed):
    assert load(name).claimed_job(callback) == claimed


SIGNED = b'{"generation_id": "5b91a581"}'
# By another tool: printf '{"generation_id": "5b91a581"}' | openssl dgst -sha256 -hmac secret
SIGNATURE = "sha256=f7224107c972aa7dba3bd1b940fbf9e5b93e62410d663f497520c4c49cef61f2"


def test_a_vivix_callback_is_signed_over_its_bytes_with_one_of_the_secrets():
    vivix, headers = load("vivix"), {"x-vivix-signature": SIGNATURE}
    assert vivix.signed(headers, SIGNED, ["secret"])
    assert vivix.signed(headers, SIGNED, ["another", "secret"])
    assert not vivix.signed(headers, SIGNED, ["another"])
    assert not vivix.signed(headers, SIGNED, [])
    assert not vivix.signed(headers, SIGNED + b" ", ["secret"])
    assert not vivix.signed({}, SIGNED, ["secret"])


@pytest.mark.parametrize("name", sorted(set(PROVIDERS) - {"vivix"}))
def test_nothing_is_taken_as_signed_by_a_provider_that_does_not_sign(name):
    provider = load(name)
    assert not provider.signs
    assert not provider.signed({"x-vivix-signature": SIGNATURE}, SIGNED, ["secret"])
