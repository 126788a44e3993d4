"""Secrets are blotted out, however they are written; the rest stays as it is."""

import base64
import html
import json
import logging
import re
import sys
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from relay.config import read_config
from relay.errors import ConfigError
from relay.logs import WideFormatter
from relay.redact import BLOT, Redactor, credentials, passwords, redact, traces

SECRET = st.text(st.characters(codec="utf-8"), min_size=6, max_size=60) | st.from_regex(
    r"[A-Za-z0-9+/=_\"'\\<& -]{6,60}", fullmatch=True
)
AROUND = st.text(st.characters(codec="utf-8"), max_size=80)
WRITTEN = {
    "as it is": str,
    "in a URL": lambda one: quote(one, safe=""),
    "in a path": quote,
    "in JSON": lambda one: json.dumps(one)[1:-1],
    "in JSON as it is": lambda one: json.dumps(one, ensure_ascii=False)[1:-1],
    "in PHP's JSON": lambda one: json.dumps(one)[1:-1].replace("/", "\\/"),
    "in JSON in JSON": lambda one: json.dumps(json.dumps(one))[3:-3],
    "in HTML": html.escape,
    "in Python": lambda one: repr(one)[1:-1],
    "in JSON in HTML": lambda one: html.escape(json.dumps(one)[1:-1]),
    "in a URL in JSON": lambda one: json.dumps(quote(one))[1:-1],
    "in a URL in a URL": lambda one: quote(quote(one, safe=""), safe=""),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@given(SECRET, st.lists(SECRET, max_size=5), AROUND, AROUND)
@example("whsec_" + "ab/c" * 8, [], "", "")
@example("0123456", ["1234567890"], "", "")
def test_a_known_secret_is_blotted_out(write, secret, others, before, after):
    written = write(secret)
    assume(written not in BLOT + BLOT)
    said = Redactor(*others, secret).blot(before + written + after)
    assert written not in said


@given(SECRET, AROUND.map(str.encode), AROUND.map(str.encode), st.booleans())
def test_a_known_secret_is_blotted_out_of_base64_wherever_it_stands(secret, before, after, for_urls):
    raw = secret.encode()
    assume(len(raw) >= 8)
    encode = base64.urlsafe_b64encode if for_urls else base64.b64encode
    said = Redactor(secret).blot(encode(before + raw + after).decode())
    assert BLOT in said


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@given(SECRET, AROUND, AROUND)
def test_where_no_trace_of_a_secret_is_there_is_no_secret(write, secret, before, after):
    assert any(trace in before + write(secret) + after for trace in traces(secret))


@given(SECRET, AROUND.map(str.encode), AROUND.map(str.encode))
def test_base64_has_its_traces_too(secret, before, after):
    assert any(
        trace in base64.b64encode(before + secret.encode() + after).decode() for trace in traces(secret)
    )


@given(st.text(min_size=0, max_size=5), AROUND)
def test_what_is_too_short_to_be_a_secret_is_left_alone(secret, text):
    assert Redactor(secret).blot(text + secret) == text + secret


@given(st.lists(st.binary(min_size=20, max_size=20).map(bytes.hex), max_size=20), AROUND)
def test_a_text_without_a_known_secret_stays_as_it_is(secrets, text):
    assume(not any(secret in text for secret in secrets))
    assert Redactor(*secrets).blot(text) == text


def test_a_secret_that_contains_another_is_blotted_out_whole():
    assert Redactor("password", "a-password-that-is-longer")("a-password-that-is-longer") == BLOT


LOOKS = [
    ("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "whsec_[redacted]"),
    ("whsec_C2FVsBQI%2FhrscChlQ%3D%3D more", "whsec_[redacted] more"),
    (r"whsec_C2FVsBQI\/hrscChlQIMVb5s", "whsec_[redacted]"),
    ("whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKk", "whsk_[redacted]"),
    ("key=rk_mOzpK9dD3VbV4L6kYw3ZbXqg0w8Xo1g7n8s", "key=rk_[redacted]"),
    ("Authorization: Bearer sk-proj-abcdef123456", "Authorization: Bearer [redacted]"),
    ("authorization: bearer eyJhbGciOiJIUzI1NiJ9.e30.abc-_~+/==;", "authorization: bearer [redacted];"),
    (r"Bearer sk-proj\/abcdef\/123456", "Bearer [redacted]"),
    ("POST /hooks/luma-eu/WyJsdW1hIiwiZ2VuXzEiXQ.ab_c-d HTTP/1.1", "POST /hooks/luma-eu/[redacted] HTTP/1.1"),
    ("https://relay.test/hooks/luma/WyJsdW1hIl0.abc?x=1", "https://relay.test/hooks/luma/[redacted]?x=1"),
    (
        "u=https%3A%2F%2Fr.test%2Fhooks%2Fluma%2FWyJsd.abc&",
        "u=https%3A%2F%2Fr.test%2Fhooks%2Fluma%2F[redacted]&",
    ),
    ("postgresql://relay:hunter2@db/relay", "postgresql://relay:[redacted]@db/relay"),
    ("http://:hunter2@proxy:4750", "http://:[redacted]@proxy:4750"),
    ("postgresql://relay:hunt@er2@db/relay", "postgresql://relay:[redacted]@db/relay"),
]
HARMLESS = [
    "delivery.attempted delivery=dlv_01KKVHBCB0Q2VBV3N8S0WZ6T1D event_id=evt_01KKVHBCB0Q2VBV3N8S0WZ6T1D",
    "send your API key: Authorization: Bearer <key>",
    "must begin with whsec_",
    "POST /hooks/luma HTTP/1.1",
    "https://hooks.example.com:8443/relay?mail=a@b.test",
    "network_work_of_somebody_else",
    "relay:relay@example.com",
    "key_01KKVHBCB0Q2VBV3N8S0WZ6T1D",
]


@pytest.mark.parametrize(("text", "expected"), LOOKS)
def test_what_looks_like_a_secret_of_ours_is_blotted_out(text, expected):
    assert Redactor()(text) == expected
    assert Redactor()(expected) == expected
    line = json.dumps({"event": text, "next": "value"})
    assert json.loads(Redactor()(line)) == {"event": expected, "next": "value"}


@pytest.mark.parametrize("text", HARMLESS)
def test_what_does_not_is_left_alone(text):
    assert Redactor("some-secret")(text) == text


@given(st.dictionaries(AROUND, AROUND | st.sampled_from([text for text, _ in LOOKS]), max_size=5))
@example({"event": 'https://a:b"c@d', "next": "/hooks/a/b\\"})
def test_a_line_of_json_stays_one(fields):
    assert isinstance(json.loads(Redactor("some-secret")(json.dumps(fields))), dict)


def test_values_are_cleaned_down_to_their_leaves_and_names():
    value = {
        "a-known-secret": ["a-known-secret!", {"x": "https://r/hooks/luma/abc.def?y", "n": 1}],
        "n": None,
    }
    assert redact(value, Redactor("a-known-secret"), capability="https://r/hooks/") == {
        BLOT: [f"{BLOT}!", {"x": f"https://r/hooks/{BLOT}?y", "n": 1}],
        "n": None,
    }


def test_every_capability_is_blotted_out_however_many_there_are_and_however_close():
    prefix = "https://r/hooks/"
    text = "".join(f"{prefix}luma/abc{number}.def" for number in range(10_000)) + " and more"
    assert redact(text, Redactor(), capability=prefix) == (prefix + BLOT) * 10_000 + " and more"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p%40ss@h/d", ["p%40ss", "p@ss"]),
        ("postgresql://u:p@ss@h/d", ["p@ss"]),
        ("postgresql:///d?user=u&password=p%2Fss&host=/s", ["p%2Fss", "p/ss"]),
        ("sqlite:///relay.db", []),
        ("http://proxy:4750", []),
    ],
)
def test_the_passwords_of_a_url_are_found(url, expected):
    assert list(dict.fromkeys(passwords(url))) == expected


def test_a_header_is_secret_with_and_without_its_scheme():
    assert credentials("Bearer some-token") == ["Bearer some-token", "some-token"]
    assert credentials("some-token") == ["some-token"]
    assert credentials("some, words") == ["some, words"]


def test_the_settings_know_their_secrets_and_do_not_show_them():
    document = {
        "secret_key": "the-secret-key",
        "admin_key": "the-admin-key",
        "database": "postgresql://relay:the%2Fpassword@db/relay?sslpassword=the-other",
        "network": {"proxy": "http://relay:the-proxy-password@proxy:4750"},
        "accounts": {
            "a": {
                "provider": "vivix",
                "api_key": "the-api-key",
                "webhook_secret": ["the-first", "the-second"],
            }
        },
    }
    settings = read_config(document, {})
    assert set(settings.secrets) >= {
        *("the-secret-key", "the-admin-key", "the%2Fpassword", "the/password", "the-other"),
        *("the-proxy-password", "the-api-key", "the-first", "the-second"),
    }
    assert not [secret for secret in settings.secrets if secret in repr(settings)]
    assert not any("://" in secret or secret == "vivix" for secret in settings.secrets)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_whole_log_line_is_clean_its_traceback_too(as_json):
    redactor = Redactor("the-api-key")
    formatter = WideFormatter(as_json=as_json, clean=redactor)
    try:
        try:
            raise ValueError("the-api-key is wrong: whsec_C2FVsBQIhrscChlQIMVb5sSY")
        except ValueError as error:
            raise ConfigError("POST /hooks/luma/WyJsdW1hIl0.abc failed") from error
    except ConfigError:
        record = logging.LogRecord("a", logging.ERROR, "", 1, "said %s", ("the-api-key",), sys.exc_info())
    record.url = "postgresql://relay:hunter2@db/relay"
    line = formatter.format(record)
    assert not re.search(r"the-api-key|C2FVsBQ|WyJsdW|hunter2", line)
    assert line.count(BLOT) >= 5
    assert not as_json or json.loads(line)["event"] == f"said {BLOT}"


SAID = st.recursive(
    AROUND | st.integers() | st.none() | st.sampled_from(["delivery.attempted", "http_status"]),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(AROUND, one, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(['"event":', '", "level', "delivery.attempted", '{"at": "20', "http_status"]),
    st.dictionaries(st.sampled_from(["status", "reason", "error"]), SAID),
)
@example('"event":', {"error": 'said "event": and more' + "x" * 2000})
def test_whatever_is_a_secret_a_log_line_stays_one_json_object(secret, fields):
    record = logging.makeLogRecord({"msg": "delivery.attempted", "levelname": "INFO", **fields})
    line = json.loads(WideFormatter(as_json=True, clean=Redactor(secret)).format(record))
    assert line.keys() == {"at", "level", "event", *(name for name in fields if fields[name] is not None)}
    assert not [text for text in texts(line) if secret in text]


def texts(value):
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) else []
