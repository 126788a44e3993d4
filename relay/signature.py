"""Standard Webhooks 1.0.0 signatures: what subscribers verify.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import binascii
import hashlib
import hmac
import secrets as randomness
from collections.abc import Sequence
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from itsdangerous.signer import HMACAlgorithm

PREFIX = "whsec_"
PRIVATE_PREFIX, PUBLIC_PREFIX = "whsk_", "whpk_"
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


def new_private_key() -> str:
    """A fresh Ed25519 key, `whsk_…`: 32 bytes of seed and 32 of the public key."""
    seed = randomness.token_bytes(32)
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return PRIVATE_PREFIX + base64.b64encode(seed + public).decode()


def public_key(private: str) -> str:
    """The `whpk_…` with which everybody can verify what a `whsk_…` has signed."""
    return PUBLIC_PREFIX + base64.b64encode(_private_key(private).public_key().public_bytes_raw()).decode()


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """One token, `v1,…` of a `whsec_…` or `v1a,…` of a `whsk_…`; `timestamp` is unix seconds of the attempt,
    `body` the bytes that are sent."""
    content = _content(message_id, timestamp, body)
    if secret.startswith(PRIVATE_PREFIX):
        return "v1a," + base64.b64encode(_private_key(secret).sign(content)).decode()
    return "v1," + base64.b64encode(_HMAC.get_signature(secret_key(secret), content)).decode()


def headers(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of an attempt, signed with every secret, in their order."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(sign(secret, message_id, timestamp, body) for secret in secrets),
    }


def verify(secret: str, message_id: str, timestamp: str, signatures: str, body: bytes, *, now: int) -> None:
    """Raises BadSignature unless one token is right, a `v1` for a `whsec_…`, a `v1a` for a `whpk_…`, and
    `timestamp` within 300 s of `now` (seconds). Raises ValueError for what is no secret."""
    try:
        at = int(timestamp)
    except ValueError as error:
        raise BadSignature("webhook-timestamp is not a number of seconds") from error
    if abs(now - at) > TOLERANCE:
        raise BadSignature(f"webhook-timestamp is {abs(now - at)} s off; {TOLERANCE} s are allowed")
    tokens = signatures.split()
    if secret.startswith(PUBLIC_PREFIX):
        public, content = _public_key(secret), _content(message_id, at, body)
        good = any(_is_signed(public, token, content) for token in tokens)
    else:
        expected = sign(secret, message_id, at, body).encode()
        good = any(hmac.compare_digest(expected, token.encode()) for token in tokens)
    if not good:
        raise BadSignature("no signature in webhook-signature matches this secret and this body")


def _content(message_id: str, timestamp: int, body: bytes) -> bytes:
    return b"%s.%d.%s" % (message_id.encode(), timestamp, body)


@lru_cache(10_000)
def _private_key(private: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(base64.b64decode(private.removeprefix(PRIVATE_PREFIX))[:32])


def _public_key(public: str) -> Ed25519PublicKey:
    try:
        raw = base64.b64decode(public.removeprefix(PUBLIC_PREFIX), validate=True)
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise ValueError("must be whpk_ followed by standard base64 of 32 bytes") from error


def _is_signed(public: Ed25519PublicKey, token: str, content: bytes) -> bool:
    version, _, signature = token.partition(",")
    if version != "v1a":
        return False
    try:
        public.verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, ValueError):
        return False
    return True
