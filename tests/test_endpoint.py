"""An endpoint's URL, filter, secrets and headers."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.endpoint import Endpoint, Secret, canonical_url, header_problem
from relay.event import Event

NETWORKS = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


def canonical(text: str, *, allow_http: bool = False, allow=()) -> str:
    return canonical_url(text, allow_http=allow_http, allow=allow)


NAME_253 = ".".join(["a" * 63] * 3 + ["b" * 61])


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("https://example.com/hook", "https://example.com/hook"),
        ("HTTPS://EXAMPLE.com:443/Hook?A=1", "https://example.com/Hook?A=1"),
        ("https://example.com:8443/", "https://example.com:8443/"),
        ("https://example.com:1/", "https://example.com:1/"),
        ("https://example.com:65535/", "https://example.com:65535/"),
        ("https://example.com./x", "https://example.com/x"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://example。com/", "https://example.com/"),
        ("https://xn--bcher-kva.example/", "https://xn--bcher-kva.example/"),
        ("https://9gag.example/", "https://9gag.example/"),
        ("https://93.184.216.34/", "https://93.184.216.34/"),
        ("https://[2606:2800:220::1]:8443/x", "https://[2606:2800:220::1]:8443/x"),
        ("https://example.com/@me?to=a@b.example", "https://example.com/@me?to=a@b.example"),
        ("https://example.com?to=a@b.example", "https://example.com?to=a@b.example"),
        ("https://example.com/%00%23", "https://example.com/%00%23"),
        (f"https://{NAME_253}/", f"https://{NAME_253}/"),
        ("https://example.com/" + "a" * 2028, "https://example.com/" + "a" * 2028),
    ],
)
def test_a_good_url_is_stored_in_its_one_spelling(text, stored):
    assert canonical(text) == stored
    assert canonical(stored) == stored


REFUSED = """
    example.com  //example.com/  /hook  https:example.com  https:/example.com/
    http://example.com/  http://127.0.0.1/  http://10.0.0.1/
    ftp://example.com/  file:///etc/passwd  javascript:alert(1)  gopher://example.com/  httpss://example.com/
    https://  https:///x  https://:443/  https://?x  https://./
    https://user@example.com/  https://user:pw@example.com/  https://@example.com/  https://:@example.com/
    https://good.test@127.0.0.1/  https://user%40x@example.com/
    https://example.com/#  https://example.com/#f  https://example.com#@127.0.0.1/
    https://127.0.0.1\\@good.test/  https://good.test\\.evil.test/  https:\\\\example.com/
    https://ex%61mple.com/  https://example.com%00.evil.test/  https://127%2e0.0.1/  https://example.com%2fx/
    https://[fe80::1%25eth0]/  https://[fe80::1%eth0]/
    https://[::1/  https://::1/  https://[]/  https://[127.0.0.1]/  https://[g::1]/
    https://example.com:0/  https://example.com:65536/  https://example.com:-1/  https://example.com:https/
    https://example.com:99999999999/
    https://127.1/  https://0x7f.1/  https://0x7f000001/  https://2130706433/  https://017700000001/
    https://0177.0.0.1/  https://0/  https://127.0.0.1./  https://256.256.256.256/  https://1.2.3.4.5/
    https://0X7F.0.0.1/  https://127.0.0.0x1/  https://00000177.1/  https://127.0x0.1/  https://1.2.3/
    https://１２７.0.0.1/  https://①②⑦.0.0.1/  https://exa\u200bmple.com/  https://example.com／evil/
    https://a..b/  https://.example.com/  https://example.com../  https://-a.example/  https://a-.example/
"""


@pytest.mark.parametrize(
    "text",
    [
        *REFUSED.split(),
        "", " https://example.com/", "https://example.com/ ", "https://exa mple.com/",
        "https://example.com/a b", "https://example.com/\r\nx: y", "https://exa\tmple.com/",
        "https://example.com/\x00", "https://example.com/\x7f",
        "https://" + "a" * 64 + ".example/", "https://" + ".".join(["a" * 63] * 4) + "/",
        "https://example.com/" + "a" * 2029,
    ],
)  # fmt: skip
def test_a_bad_url_is_refused(text):
    with pytest.raises(ValueError):
        canonical(text)


@pytest.mark.parametrize("text", ["https://127。0。0。1/", "https://127．0．0．1/", "https://127｡0｡0｡1/"])
def test_a_disguised_address_is_refused_or_stored_undisguised(text):
    try:
        host = httpx.URL(canonical(text)).host
    except ValueError:
        return
    assert ip_address(host) == ip_address("127.0.0.1")


@pytest.mark.parametrize(
    ("text", "allow_http", "allow", "good"),
    [
        ("http://example.com/", False, NETWORKS, False),  # where a name leads is not known here
        ("http://example.com/", True, (), True),
        ("http://10.1.2.3/", False, NETWORKS, True),
        ("http://11.1.2.3/", False, NETWORKS, False),
        ("http://[fd00::1]/", False, NETWORKS, True),
        ("http://[fe00::1]/", False, NETWORKS, False),
        ("http://0xa.1.2.3/", True, NETWORKS, False),
        ("ftp://10.1.2.3/", True, NETWORKS, False),
    ],
)
def test_plain_http_is_for_who_allows_it(text, allow_http, allow, good):
    if good:
        assert canonical(text, allow_http=allow_http, allow=allow) == text
    else:
        with pytest.raises(ValueError):
            canonical(text, allow_http=allow_http, allow=allow)


@given(st.text() | st.from_regex(r"https?://[^\s/]{1,20}(:\d{0,6})?(/.*)?", fullmatch=True))
def test_any_text_is_a_url_in_its_one_spelling_or_refused(text):
    try:
        stored = canonical(text)
    except ValueError:
        return
    url = httpx.URL(stored)
    assert url.scheme == "https" and url.host and not url.userinfo and not url.fragment
    assert canonical(stored) == stored


ENDPOINT = Endpoint(
    id="ep_1", tenant="t", url="https://a.test/", secrets=(Secret("new"),), created_at=0, updated_at=0
)


def event(type_: str, account: str | None = "luma") -> Event:
    return Event("evt_1", "t", type_, b"{}", 0, account=account)


FOUR = ["generation.completed", "generation.failed", "generation.canceled", "generation.timed_out"]
OTHERS = [
    "generation.processing", "generation.progress", "generation.unknown_status", "account.failing",
    "account.recovered", "endpoint.disabled", "endpoint.test", "order.paid",
]  # fmt: skip


@pytest.mark.parametrize(
    ("event_types", "wanted"),
    [
        ((), FOUR),
        (("generation.failed",), ["generation.failed"]),
        (("order.paid", "account.failing"), ["order.paid", "account.failing"]),
        (("generation.progress", "generation.completed"), ["generation.progress", "generation.completed"]),
        (("generation",), []),
    ],
)
def test_an_endpoint_wants_its_types_and_without_any_the_four_endings(event_types, wanted):
    endpoint = replace(ENDPOINT, event_types=event_types)
    assert {type_ for type_ in FOUR + OTHERS if endpoint.wants(event(type_))} == set(wanted)


@pytest.mark.parametrize(
    ("accounts", "account", "wanted"),
    [
        ((), "luma", True), ((), None, True), (("luma",), "luma", True), (("luma", "vivix"), "vivix", True),
        (("luma",), "luma-eu", False), (("luma",), None, False),
    ],
)  # fmt: skip
def test_an_endpoint_wants_its_accounts_and_without_any_all(accounts, account, wanted):
    assert replace(ENDPOINT, accounts=accounts).wants(event("generation.completed", account)) is wanted


@pytest.mark.parametrize(
    ("previous", "expires_at", "secrets"),
    [
        (None, None, ("new",)),
        ("old", 1000, ("new", "old")),
        ("old", 501, ("new", "old")),
        ("old", 500, ("new",)),
        ("old", 0, ("new",)),
    ],
)
def test_after_a_rotation_the_old_secret_signs_second_until_it_expires(previous, expires_at, secrets):
    older = [Secret(previous, expires_at=expires_at)] if previous else []
    endpoint = replace(ENDPOINT, secrets=(Secret("new"), *older))
    assert endpoint.signing(500) == secrets


@pytest.mark.parametrize(
    ("name", "value"),
    [("Authorization", "Bearer abc"), ("X-Api-Key", "k"), ("x-trace", 'a b, c="d"'), ("X-A", "~" * 1024)],
)
def test_a_header_of_one_s_own_may_be_sent(name, value):
    assert header_problem(name, value) is None


FORBIDDEN = """
    Host Connection Content-Length Content-Type Content-Encoding Transfer-Encoding TE Trailer Upgrade Expect
    Keep-Alive Cookie User-Agent Proxy-Authorization Metadata Metadata-Flavor X-aws-ec2-metadata-token
    X-aws-ec2-metadata-token-ttl-seconds X-Aws-Ec2-Metadata-Token-X webhook-id Webhook-Signature
    webhook-timestamp webhook-x X-Amz-Date x-goog-api-key X-Azure-Ref Forwarded X-Forwarded X-Forwarded-Host
    X-Real-IP X-Original-URL X-Original-Host X-Rewrite-URL X-HTTP-Method X-HTTP-Method-Override
    X-Method-Override
"""


@pytest.mark.parametrize("name", FORBIDDEN.split())
def test_a_header_that_means_something_to_the_way_may_not_be_sent(name):
    assert header_problem(name, "x")


@pytest.mark.parametrize("name", ["", " ", "a b", "a:", "a\r\nb", "a\nHost: b", "é", "a(b)", "a\x00", "a\n"])
def test_what_is_not_a_header_name_is_refused(name):
    assert header_problem(name, "x")


@pytest.mark.parametrize(
    "value", ["", " ", " a", "a ", "a\r\nb: c", "a\nb", "a\rb", "a\tb", "a\x00", "é", "€", "a\n", "x" * 1025]
)
def test_what_is_not_a_visible_header_value_is_refused(value):
    assert header_problem("X-A", value)


def test_no_secret_and_no_header_is_in_what_is_written_of_an_endpoint():
    secret = Secret("whsec_hidden", "whsk_hidden")
    text = repr(replace(ENDPOINT, secrets=(secret,), headers={"x-token": "hidden"}))
    assert "ep_1" in text
    assert "hidden" not in text
