"""Recorded answers and what they mean: a folder of `tests/providers/` per provider, a file per answer.

    {"about": "…", "source": "the document the answer is from",
     "reply": {"status": 200, "headers": {}, "body": <json> or "text": "<raw>"},
     "update": {every field of Update that is not None or empty, times as RFC 3339}
     or "error": {"code": "…", "retry_after": ms}}

`raw` is left out: it is always the answer itself. So is an error's `message` where the provider gives none.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay import event
from relay.errors import ProviderError
from relay.generation import Generation, LearnedBy, Status, Update
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


# What providers could say at their oddest: their own field names with anything in them.
WORDS = [
    "queued", "pending", "processing", "in-progress", "completed", "failed", "dreaming", "",
    "https://a.test/1.png", "https://[", "data:image/png;base64,AA", "2026-06-01T12:00:00Z",
    "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-23:59",
    "5000", "1e400", "nan", "-1", "١٢", "\ud800",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
    | st.integers()
    | st.sampled_from([10**400, -(2**63), 2**53, 2**53 - 1])
    | st.floats(allow_nan=False)  # infinity is written as 1e999, which is JSON
)
FIELDS = (
    "status state success data type model metadata output output_url output_urls url videoURL imageUrl"
    " arweaveUrl width height duration duration_ms progress renderProgress aiCreditsUsed credits_used error"
    " message error_code error_message failure_code failure_reason detail created_at createdAt completed_at"
    " completedAt elapsed_ms estimatedTime"
)
NAMES = st.sampled_from(FIELDS.split())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=12) | st.builds(
    lambda outer, data, status, state: {"status": status, "state": state, "data": data, **outer},
    st.dictionaries(NAMES, VALUES, max_size=8),
    st.dictionaries(NAMES, VALUES, max_size=8),
    *[st.sampled_from(["completed", "failed", "processing"])] * 2,
)
BODIES = st.binary(max_size=40) | (OBJECTS | VALUES).map(
    lambda value: json.dumps(value).replace("Infinity", "1e999").encode()
)
HEADERS = st.dictionaries(
    st.just("retry-after"),
    st.text(max_size=12)
    | st.integers().map(str)
    | st.from_regex(r"Mon, 01 Jun \d{1,25} 12:00:00 [+-]\d{1,25}"),
)
WATCHED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.QUEUED,
    created_at=NOW, deadline_at=NOW + 600_000, due_at=NOW,
)  # fmt: skip


def reject(constant: str):
    raise AssertionError(f"{constant} is not JSON")


def with_date(field: str, value: str) -> bytes:
    return json.dumps({"status": "processing", "state": "processing", field: value}).encode()


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(PROVIDERS)), status=st.integers(100, 999), body=BODIES, headers=HEADERS)
@example(name="luma", status=200, body=b'{"state": "queued", "x": 1e999}', headers={})
@example(name="luma", status=200, body=with_date("created_at", "0001-01-01T00:00:00+23:59"), headers={})
@example(name="vivix", status=200, body=with_date("completed_at", "9999-12-31T23:59:59-23:59"), headers={})
@example(name="luma", status=503, body=b"", headers={"retry-after": f"Mon, 01 Jun {10**20} 12:00:00 GMT"})
def test_any_reply_is_an_update_that_can_be_announced_or_a_provider_error(name, status, body, headers):
    check(name, status, body, headers)


@settings(max_examples=700, deadline=None)
@given(name=st.sampled_from(sorted(PROVIDERS)), answer=OBJECTS)
def test_any_object_is_an_update_that_can_be_announced_or_a_provider_error(name, answer):
    check(name, 200, json.dumps(answer).replace("Infinity", "1e999").encode(), {})


def check(name: str, status: int, body: bytes, headers: dict[str, str]) -> None:
    try:
        update = understand(load(name), Reply(status, body, headers), now=NOW)
    except ProviderError as error:
        assert error.retry_after is None or error.retry_after >= 0
        return
    assert isinstance(update, Update)
    ended = replace(
        WATCHED, status=Status.FAILED, update=update, known_at=NOW, learned_by=LearnedBy.POLL, due_at=None
    )
    for generation in (ended, replace(WATCHED, update=update)):
        announced = event.envelope("generation.failed", rfc3339(NOW), event.describe(generation))
        data = json.loads(announced.decode("utf-8"), parse_constant=reject)["data"]
        assert data["progress"] is None or 0 <= data["progress"] <= 1
        assert data["kind"] in {"image", "video", "audio", "3d", "text", None}
