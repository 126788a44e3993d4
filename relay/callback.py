"""Signed callback URLs: what a provider gets to call, and whose call it is."""

import hashlib
from collections.abc import Sequence

from itsdangerous import BadSignature, URLSafeSerializer

_SALT = "relay.callback"


class Callbacks:
    """Makes and reads the URLs of generations. A URL is a capability: it only ever makes Relay ask.

    `secret_keys`, newest first: the first makes URLs, those of all of them are read.
    """

    def __init__(self, public_url: str, secret_keys: Sequence[str]) -> None:
        self._base = public_url.rstrip("/")
        self._serializer = URLSafeSerializer(
            # It signs with the last one.
            [key.encode() for key in reversed(secret_keys)],
            salt=_SALT,
            signer_kwargs={"digest_method": hashlib.sha256, "key_derivation": "hmac"},
        )

    def url(self, account: str, generation_id: str) -> str:
        token = self._serializer.dumps([account, generation_id])
        return f"{self._base}/hooks/{account}/{token if isinstance(token, str) else token.decode()}"

    def account_url(self, account: str) -> str:
        """Where callbacks about any job of an account come, which must be signed by its provider."""
        return f"{self._base}/hooks/{account}"

    def generation(self, account: str, token: str) -> str | None:
        """The generation that a token was made for, None when it was not made by us for this account."""
        try:
            named, generation_id = self._serializer.loads(token)
        except (BadSignature, ValueError, TypeError):
            return None
        return str(generation_id) if named == account else None
