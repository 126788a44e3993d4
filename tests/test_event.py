"""What subscribers receive, byte for byte."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay import event
from relay.generation import ENDINGS, Code, Generation, LearnedBy, Output, Problem, Status, Update
from relay.times import parse_rfc3339, rfc3339

CREATED, COMPLETED = "2026-03-16T14:30:00.000Z", "2026-03-16T14:30:12.000Z"
PNG = "https://cdn.pixellabsai.app/images/gen_8f7b2c9a1e3d.png"
RAW = {"generationId": "gen_8f7b2c9a1e3d", "status": "completed", "metadata": {"prompt": "ein Kätzchen 🐈"}}
DONE = Generation(
    id="gen_01KKV4Q5W0ZZZZZZZZZZZZZZZZ", tenant="t", account="pixellabs", provider="pixellabs",
    job_id="gen_8f7b2c9a1e3d", status=Status.COMPLETED, created_at=parse_rfc3339("2026-03-16T14:29:59Z"),
    deadline_at=parse_rfc3339("2026-03-16T14:45:00Z"), due_at=None, metadata={"order": 42},
    known_at=parse_rfc3339("2026-03-16T14:30:15Z"), learned_by=LearnedBy.POLL,
    update=Update(
        Status.COMPLETED, "completed", kind="image", model="synthetix-v2.1", progress=1.0,
        outputs=(Output(PNG, "image", "image/png", permanent_url="https://arweave.net/abc"),),
        created_at=parse_rfc3339(CREATED), completed_at=parse_rfc3339(COMPLETED), raw=RAW,
    ),
)  # fmt: skip
NOW = parse_rfc3339("2026-03-16T14:30:15Z")


def body(generation: Generation) -> dict:
    return json.loads(event.ending(generation, now=NOW).body)


def told(**fields) -> Generation:
    return replace(DONE, update=replace(DONE.update, **fields))


@given(st.dictionaries(st.text(), st.recursive(st.integers() | st.text(), st.lists, max_leaves=5)))
@example({"data": {"data": {}}, ',"data":{}': '{"data":{}}'})
def test_what_a_body_tells_is_found_without_parsing_it(data):
    made = event.published("t", "a.b", data, None, now=NOW)
    at, written = event.told(made)
    assert (at, json.loads(written)) == (rfc3339(NOW), json.loads(made.body)["data"])
    assert made.body.endswith(b',"data":' + written + b"}")


def test_the_body_is_the_contract_s_example():
    expected = {
        "type": "generation.completed",
        "timestamp": COMPLETED,
        "data": {
            "id": "gen_01KKV4Q5W0ZZZZZZZZZZZZZZZZ",
            "provider": "pixellabs",
            "account": "pixellabs",
            "job_id": "gen_8f7b2c9a1e3d",
            "status": "completed",
            "provider_status": "completed",
            "kind": "image",
            "model": "synthetix-v2.1",
            "progress": 1.0,
            "outputs": [
                {
                    "url": PNG,
                    "kind": "image",
                    "content_type": "image/png",
                    "width": None,
                    "height": None,
                    "expires_at": None,
                    "permanent_url": "https://arweave.net/abc",
                }
            ],
            "error": None,
            "usage": {"credits": None},
            "created_at": CREATED,
            "completed_at": COMPLETED,
            "duration_ms": 12000,
            "late": False,
            "learned_by": "poll",
            "metadata": {"order": 42},
            "raw": RAW,
        },
    }
    compact = json.dumps(expected, ensure_ascii=False, separators=(",", ":")).encode()
    assert event.ending(DONE, now=NOW).body == compact


def test_an_error_has_the_contract_s_four_fields():
    problem = Problem(Code.CONTENT_MODERATED, "no", retryable=False, provider_code="content_moderated")
    failed = replace(told(status=Status.FAILED, outputs=(), error=problem), status=Status.FAILED)
    assert list(body(failed)["data"]["error"].items()) == [
        ("code", "content_moderated"),
        ("message", "no"),
        ("retryable", False),
        ("provider_code", "content_moderated"),
    ]


@pytest.mark.parametrize("status", sorted(ENDINGS))
def test_every_ending_has_its_own_type_and_is_announced_once(status):
    announced = event.ending(replace(DONE, status=status), now=NOW)
    assert announced.type == json.loads(announced.body)["type"] == f"generation.{status.value}"
    assert (announced.generation_id, announced.announces) == (DONE.id, status.value)
    assert (announced.tenant, announced.account, announced.created_at) == ("t", "pixellabs", NOW)
    assert re.fullmatch(r"evt_[0-9A-HJKMNP-TV-Z]{26}", announced.id)


def test_an_output_s_expiry_is_a_time():
    expiring = told(outputs=(Output(PNG, width=8, height=9, expires_at=NOW),))
    output = body(expiring)["data"]["outputs"][0]
    assert (output["expires_at"], output["width"], output["height"]) == (rfc3339(NOW), 8, 9)


def test_what_the_provider_does_not_say_about_time_relay_does():
    data = body(told(created_at=None, completed_at=None))["data"]
    assert (data["created_at"], data["completed_at"]) == (rfc3339(DONE.created_at), rfc3339(DONE.known_at))
    assert data["duration_ms"] == DONE.known_at - DONE.created_at


def test_the_provider_s_own_duration_goes_before_the_difference():
    assert body(told(duration_ms=12420))["data"]["duration_ms"] == 12420


def test_a_clock_that_runs_backwards_makes_no_negative_duration():
    assert body(told(completed_at=DONE.update.created_at - 1))["data"]["duration_ms"] == 0


def test_a_generation_that_runs_has_no_completion():
    running = replace(DONE, status=Status.PROCESSING, known_at=None, learned_by=None, update=None)
    data = event.describe(running)
    assert data.keys() == event.describe(DONE).keys()
    assert [data[key] for key in ("completed_at", "duration_ms", "learned_by", "error", "raw")] == [None] * 5
    assert data["outputs"] == []


def test_a_late_ending_is_marked():
    assert body(replace(DONE, late=True))["data"]["late"] is True


def test_the_test_event_names_its_endpoint():
    made = event.test("t", "ep_1", now=NOW)
    sent = json.loads(made.body)
    assert made.type == sent["type"] == "endpoint.test"
    assert (sent["timestamp"], sent["data"]["endpoint_id"]) == (rfc3339(NOW), "ep_1")


def test_lone_surrogates_do_not_keep_an_event_from_being_told():
    sent = event.ending(told(model="\ud800", raw={"\udfff": "a\ud800b"}), now=NOW).body
    data = json.loads(sent.decode("utf-8"))["data"]
    assert data["model"] and data["raw"]
    assert data["id"] == DONE.id


@given(st.text(), st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers() | st.text()))
def test_any_text_makes_a_body_that_every_verifier_can_decode(text, metadata):
    sent = event.ending(replace(told(model=text), metadata=metadata), now=NOW).body
    assert json.loads(sent.decode("utf-8"))["data"]["metadata"].keys() == metadata.keys()


@pytest.mark.parametrize("type_", ["a", "generation.completed", "order_2.Paid.X9"])
def test_event_types_are_words_separated_by_dots(type_):
    assert event.TYPE.fullmatch(type_)


@pytest.mark.parametrize("type_", ["", ".", "a.", ".a", "a..b", "a-b", "a b", "é", "a.b\n"])
def test_other_event_types_are_not(type_):
    assert not event.TYPE.fullmatch(type_)
