"""Secrets at rest: sealed with AES-256-GCM, each bound to its place, so that none can be moved to another."""

import binascii
import hmac
import secrets as randomness
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Sequence
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from relay.errors import SealBroken

_VERSION = "v1"
_NONCE = 12
# What is longer is opened anew each time: tenants choose how long a credential is, and how often it changes.
_REMEMBERED, _LONGEST_REMEMBERED = 20_000, 4096


class KeyRing:
    """Keys that are made of the `secret_key`s of the configuration, the newest first: that one seals, any of
    them opens. A key's id is made of the key itself, so that nobody has to name it."""

    def __init__(self, secret_keys: Sequence[str]) -> None:
        self._keys = {
            _key_id(secret): AESGCM(_derive(secret, b"relay.at-rest", 32)) for secret in secret_keys
        }
        self._marks = [_derive(secret, b"relay.fingerprint", 32) for secret in secret_keys]
        self.newest = _key_id(secret_keys[0])
        # The hot path reads the same rows over and over.
        self._opened = lru_cache(_REMEMBERED)(self._open)

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    def seal(self, text: str, *place: str) -> str:
        """`v1.<key id>.<base64 of nonce, ciphertext and tag>`; `place` is table, column, row and tenant."""
        nonce = randomness.token_bytes(_NONCE)
        sealed = nonce + self._keys[self.newest].encrypt(nonce, text.encode(), _bound_to(place))
        return f"{_VERSION}.{self.newest}.{urlsafe_b64encode(sealed).decode()}"

    def open(self, sealed: str, *place: str) -> str:
        """What was sealed for this place. Raises SealBroken."""
        return (self._opened if len(sealed) <= _LONGEST_REMEMBERED else self._open)(sealed, place)

    def fingerprints(self, what: bytes) -> Sequence[str]:
        """What may be kept of something that may hold secrets, to know it again: one made with each key, the
        newest first. Who has no key learns nothing from it, not even by guessing."""
        return [hmac.digest(key, what, "sha256").hex() for key in self._marks]

    def _open(self, sealed: str, place: tuple[str, ...]) -> str:
        key_id = sealed_with(sealed)
        if key_id is None:
            raise SealBroken("is not sealed as this version of Relay does it")
        if key_id not in self._keys:
            raise SealBroken(
                f"was sealed with another secret_key ({key_id}): put that into previous_secret_keys"
            )
        try:
            raw = b64decode(sealed.rpartition(".")[2], altchars=b"-_", validate=True)
            return self._keys[key_id].decrypt(raw[:_NONCE], raw[_NONCE:], _bound_to(place)).decode()
        except (InvalidTag, ValueError, binascii.Error) as error:
            raise SealBroken("was changed, or moved from another row") from error


def sealed_with(sealed: str) -> str | None:
    """The id of the key that a text was sealed with; None when it is not sealed."""
    version, *rest = sealed.split(".")
    return rest[0] if version == _VERSION and len(rest) == 2 else None


def _bound_to(place: Sequence[str]) -> bytes:
    # None of them can hold a NUL: the database would not take it.
    return "\0".join(place).encode()


def _key_id(secret: str) -> str:
    return _derive(secret, b"relay.key-id", 4).hex()


def _derive(secret: str, purpose: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=purpose).derive(secret.encode())
