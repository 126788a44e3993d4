"""Standard Webhooks 1.0.0 signatures: what subscribers verify.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import binascii
import hashlib
import hmac
import secrets as randomness
from collections.abc import Sequence

from itsdangerous.signer import HMACAlgorithm

PREFIX = "whsec_"
TOLERANCE = 300
_SHORTEST, _LONGEST = 24, 64
# The Signer defaults of itsdangerous (SHA-1, derived keys, URL-safe base64) are not the standard's.
_HMAC = HMACAlgorithm(hashlib.sha256)


class BadSignature(ValueError):
    """What `verify` found wrong, for people."""


def new_secret() -> str:
    """A fresh `whsec_…`: 24 random bytes, whose base64 needs no padding."""
    return PREFIX + base64.b64encode(randomness.token_bytes(24)).decode()


def secret_key(secret: str) -> bytes:
    """The key in a `whsec_…`. Raises ValueError unless it is standard base64 of 24 to 64 bytes."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("must be whsec_ followed by standard base64") from error
    # Surplus padding is read by some decoders and refused by others.
    if base64.b64encode(key).decode() != secret.removeprefix(PREFIX):
        raise ValueError("must be whsec_ followed by standard base64")
    if not _SHORTEST <= len(key) <= _LONGEST:
        raise ValueError(f"must hold {_SHORTEST} to {_LONGEST} bytes, not {len(key)}")
    return key


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """One `v1,…` token; `timestamp` is unix seconds of the attempt, `body` the bytes that are sent."""
    content = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(_HMAC.get_signature(secret_key(secret), content)).decode()


def headers(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of an attempt, signed with every secret, newest first."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(sign(secret, message_id, timestamp, body) for secret in secrets),
    }


def verify(secret: str, message_id: str, timestamp: str, signatures: str, body: bytes, *, now: int) -> None:
    """Raises BadSignature unless one `v1` token is right and `timestamp` within 300 s of `now` (seconds)."""
    try:
        at = int(timestamp)
    except ValueError as error:
        raise BadSignature("webhook-timestamp is not a number of seconds") from error
    if abs(now - at) > TOLERANCE:
        raise BadSignature(f"webhook-timestamp is {abs(now - at)} s off; {TOLERANCE} s are allowed")
    expected = sign(secret, message_id, at, body).encode()
    if not any(hmac.compare_digest(expected, token.encode()) for token in signatures.split()):
        raise BadSignature("no signature in webhook-signature matches this secret and this body")
