"""Signatures: the published vectors, and what the official Python library signs and verifies."""

import base64
import time
from datetime import UTC, datetime

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from relay import signature
from relay.body import compact
from relay.signature import BadSignature

# Published in the test suites of the official libraries.
A = (
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330,
    b'{"test": 2432232314}', "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
)  # fmt: skip
B = (
    "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk", 1649367553,
    b'{"email":"test@example.com","username":"test_user"}', "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
)  # fmt: skip
SECRET, ID, AT, BODY, TOKEN = A
WRONG = "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc="


def verify(signatures: str, *, timestamp: str = str(AT), now: int = AT) -> None:
    signature.verify(SECRET, ID, timestamp, signatures, BODY, now=now)


@pytest.mark.parametrize(("secret", "id_", "at", "body", "token"), [A, B], ids="AB")
def test_published_vectors(secret, id_, at, body, token):
    assert signature.sign(secret, id_, at, body) == token
    assert signature.headers([secret], id_, at, body) == {
        "webhook-id": id_, "webhook-timestamp": str(at), "webhook-signature": token,
    }  # fmt: skip
    signature.verify(secret, id_, str(at), token, body, now=at)


@pytest.mark.parametrize(
    "signatures",
    [f"{WRONG} {TOKEN}", f"{TOKEN} {WRONG}", f"{WRONG.replace('v1', 'v2')} v1a,AAAA garbage {TOKEN}"],
)
def test_one_right_token_among_others_is_enough(signatures):
    verify(signatures)


@pytest.mark.parametrize(
    "signatures",
    [
        WRONG, WRONG.replace("v1", "v2"), f"{WRONG} {WRONG}", TOKEN.replace("v1", "v2"),
        TOKEN.replace("v1", "v1a"), TOKEN[:8], TOKEN[:-1], TOKEN + "=", TOKEN[3:], TOKEN.lower(),
        f"{TOKEN},{WRONG}", "", " ", "v1", "v1,", "v1,é",
    ],
)  # fmt: skip
def test_wrong_partial_and_empty_signatures_are_refused(signatures):
    with pytest.raises(BadSignature):
        verify(signatures)


@pytest.mark.parametrize("off", [-300, -299, 0, 299, 300])
def test_a_clock_that_is_five_minutes_off_is_tolerated(off):
    verify(TOKEN, now=AT + off)


@pytest.mark.parametrize("off", [-86400, -301, 301, 86400])
def test_a_clock_that_is_further_off_is_not(off):
    with pytest.raises(BadSignature):
        verify(TOKEN, now=AT + off)


@pytest.mark.parametrize(
    "timestamp", ["", "now", f"{AT}.5", hex(AT), "9" * 5000, str(AT + 1), str(AT - 1), f"-{AT}"]
)
def test_another_timestamp_than_the_signed_one_is_refused(timestamp):
    with pytest.raises(BadSignature):
        verify(TOKEN, timestamp=timestamp)


@pytest.mark.parametrize(
    ("id_", "body", "secret"),
    [("msg_other", BODY, SECRET), (ID, BODY + b" ", SECRET), (ID, b"", SECRET), (ID, BODY, B[0])],
)
def test_another_id_body_or_secret_is_refused(id_, body, secret):
    with pytest.raises(BadSignature):
        signature.verify(secret, id_, str(AT), TOKEN, body, now=AT)


def whsec(key: bytes) -> str:
    return "whsec_" + base64.b64encode(key).decode()


@pytest.mark.parametrize("size", [24, 25, 32, 48, 64])
def test_a_secret_of_24_to_64_bytes_is_taken(size):
    assert signature.secret_key(whsec(bytes(range(size)))) == bytes(range(size))


@pytest.mark.parametrize(
    "secret",
    [
        whsec(bytes(23)), whsec(bytes(65)), whsec(bytes(1000)), whsec(b""), "", "whsec_", "whsec_" + "?" * 32,
        "whsec_" + base64.urlsafe_b64encode(b"\xff" * 24).decode(),  # another alphabet
        whsec(bytes(25)).rstrip("="),  # no padding: most official libraries cannot read it
        whsec(bytes(24)) + "=", whsec(bytes(24)) + "==",  # too much of it: likewise
        whsec(bytes(24)) + "\n", " " + whsec(bytes(24)), "whsec_" + "é" * 32,
    ],
)  # fmt: skip
def test_any_other_secret_is_refused(secret):
    with pytest.raises(ValueError):
        signature.secret_key(secret)


def test_new_secrets_are_long_enough_unpadded_and_never_twice_the_same():
    secrets = {signature.new_secret() for _ in range(100)}
    assert len(secrets) == 100
    for secret in secrets:
        assert secret.startswith("whsec_") and "=" not in secret
        assert len(signature.secret_key(secret)) >= 24


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)
SECRETS = st.lists(st.binary(min_size=24, max_size=64).map(whsec), min_size=1, max_size=2, unique=True)
IDS = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", min_size=1, max_size=40)
CASES = st.tuples(SECRETS, IDS, JSON.map(compact))


@given(CASES)
def test_the_official_python_verifier_accepts_ours_and_refuses_a_tampered_body(case):
    secrets, id_, body = case
    headers = signature.headers(secrets, id_, int(time.time()), body)
    for secret in secrets:
        official = standardwebhooks.Webhook(secret)
        official.verify(body, headers, json_parse=False)
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            official.verify(body + b" ", headers, json_parse=False)


@given(CASES)
def test_ours_accepts_what_the_official_python_signer_made(case):
    secrets, id_, body = case
    token = standardwebhooks.Webhook(secrets[0]).sign(id_, datetime.fromtimestamp(AT, UTC), body.decode())
    signature.verify(secrets[0], id_, str(AT), token, body, now=AT)


# Ed25519: the vector of the Svix server's tests, which is the example in the specification too.
VECTOR_C = (
    "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg==",
    "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg==",
)


def test_the_published_ed25519_vector():
    private, token = VECTOR_C
    id_, at, body = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    assert signature.sign(private, id_, at, body) == token
    public = signature.public_key(private)
    signature.verify(public, id_, str(at), f"v1,AAAA {token}", body, now=at)
    for wrong in (body + b" ", b""):
        with pytest.raises(signature.BadSignature):
            signature.verify(public, id_, str(at), token, wrong, now=at)


@pytest.mark.parametrize("token", ["", "v1a,", "v1a,AAAA", "v1a,!", "v1,AAAA", "v1a", VECTOR_C[1][4:]])
def test_what_is_no_ed25519_signature_is_refused(token):
    with pytest.raises(signature.BadSignature):
        signature.verify(signature.public_key(VECTOR_C[0]), "m", str(AT), token, b"", now=AT)


@pytest.mark.parametrize("public", ["whpk_", "whpk_AAAA", "whpk_!", "whpk_" + "A" * 44])
def test_what_is_no_public_key_is_refused(public):
    with pytest.raises(ValueError, match="whpk_"):
        signature.verify(public, "m", str(AT), "v1a,AAAA", b"", now=AT)


def test_new_private_keys_differ_and_carry_their_public_half():
    one, other = signature.new_private_key(), signature.new_private_key()
    assert one != other
    raw = base64.b64decode(one.removeprefix("whsk_"))
    assert len(raw) == 64
    assert signature.public_key(one) == "whpk_" + base64.b64encode(raw[32:]).decode()
