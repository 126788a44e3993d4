"""Blotting out: what must not travel further, in text that anybody wrote."""

import base64
import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

BLOT = "[redacted]"
# A shorter one would blot out half of every text.
_SHORTEST = 6
# Of a text only every so many places are looked at, whether such a piece of a secret stands there.
_STEP, _PIECE = 16, 8
# What is longer is not looked for as it is written after it was written once.
_LONG = 256


class Redactor:
    """Text without the secrets that it was told of, as they are and as they look in URLs, JSON, HTML and
    base64, and without what looks like a secret of ours; what is shorter than six characters is no secret.
    How long it takes depends on how many short secrets there are, and hardly on how many others."""

    def __init__(self, *secrets: str) -> None:
        self._short: set[str] = set()
        self._pieces: dict[str, set[str]] = {}
        for secret in secrets:
            for form in _forms(secret) if len(secret) >= _SHORTEST else ():
                if len(form) < _STEP + _PIECE - 1:
                    self._short.add(form)
                    continue
                for place in range(_STEP):
                    self._pieces.setdefault(form[place : place + _PIECE], set()).add(form)

    def __call__(self, text: str) -> str:
        """The text without secrets and without what looks like one; a line of JSON stays one."""
        if self._pieces or self._short:
            text = self.blot(text)
        for hint, pattern, rest in _LOOKS:
            if hint in text:
                text = pattern.sub(rest, text)
        return text

    def blot(self, text: str) -> str:
        """The text without the secrets that it was told of, and otherwise as it is."""
        found = {secret for secret in self._short if secret in text}
        seen = [text[place : place + _PIECE] for place in range(0, len(text) - _PIECE + 1, _STEP)]
        for piece in self._pieces.keys() & seen if not self._pieces.keys().isdisjoint(seen) else ():
            found |= {secret for secret in self._pieces[piece] if secret in text}
        for secret in sorted(found, key=len, reverse=True):
            text = text.replace(secret, BLOT)
        return text


def redact(value: Any, known: Redactor, *, capability: str) -> Any:
    """The JSON value without `known` secrets, and without what follows the URL prefix `capability`."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            value = known.blot(value)
            return _without_capability(value, capability) if capability in value else value
        if isinstance(value, list):
            return [clean(one) for one in value]
        if isinstance(value, Mapping):
            return {clean(name): clean(one) for name, one in value.items()}
        return value

    return clean(value)


def without_password(url: str) -> str:
    """The URL of a database as it may be shown and stored."""
    # Up to the last @: whoever forgot to quote a password meant all of it.
    url = _PASSWORD.sub(r"\1@", url)
    return _PASSWORD_OPTION.sub(rf"\1={BLOT}", url)


def passwords(url: str) -> list[str]:
    """The passwords in a URL, as they stand there and as they are meant."""
    found = [match[2] for match in _PASSWORD.finditer(url)]
    found += [match[2] for match in _PASSWORD_OPTION.finditer(url)]
    return [form for one in found for form in (one, unquote(one))]


def credentials(header: str) -> list[str]:
    """What is secret of a header's value: all of it, and what follows a scheme such as Bearer."""
    scheme, _, rest = header.partition(" ")
    return [header, rest.strip()] if rest and scheme.isalnum() else [header]


def _without_capability(text: str, capability: str) -> str:
    head, *tails = text.split(capability)
    return head + "".join(capability + BLOT + tail.lstrip(_URL_CHARACTERS) for tail in tails)


def traces(secret: str) -> list[str]:
    """Short texts, one of which is in every text that holds the secret in some form: who finds none need not
    look further."""
    bare = secret.removeprefix("whsec_")
    plain = max(re.findall(r"[A-Za-z0-9_.-]+", bare), key=len, default="")
    if len(plain) < _SHORTEST:
        return [""]
    return [plain[:_STEP], *(one[:_STEP] for one in _base64(bare.encode("utf-8", "replace")))]


def _forms(secret: str) -> Iterator[str]:
    """How a secret may be written."""
    plain = {secret, secret.removeprefix("whsec_")} if len(secret) > 20 else {secret}
    forms = set(plain)
    # A page shows JSON, a log line holds JSON that holds JSON.
    for _ in range(2 if len(secret) <= _LONG else 1):
        forms |= {written for one in forms for written in _written(one)}
    for one in plain:
        forms |= set(_base64(one.encode("utf-8", "replace")))
    return (one for one in forms if len(one) >= _SHORTEST)


def _written(text: str) -> Iterator[str]:
    in_json = json.dumps(text)[1:-1]
    in_url = quote(text, safe="", errors="replace")
    yield from (in_json, in_json.replace("/", "\\/"), in_url, in_url.replace("%2F", "/"))
    yield from (html.escape(text), repr(text)[1:-1])
    if not text.isascii():
        yield json.dumps(text, ensure_ascii=False)[1:-1]


def _base64(raw: bytes) -> Iterator[str]:
    """Those characters of it that do not depend on what stands before and behind."""
    for before in range(3):
        first, last = -(-8 * before // 6), 8 * (before + len(raw)) // 6
        padded = bytes(before) + raw
        yield base64.b64encode(padded).decode()[first:last]
        yield base64.urlsafe_b64encode(padded).decode()[first:last]


_PASSWORD = re.compile(r"(://[^:/?#@]*):(.*)@", re.DOTALL)
_PASSWORD_OPTION = re.compile(r"(?i)([?&][^=&]*pass[^=&]*)=([^&]*)")
_URL_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/%"
_SLASH = r"(?:\\{0,3}/|%2[Ff])"
_BASE64 = rf"(?:[A-Za-z0-9+=_-]|{_SLASH}|%[0-9A-Fa-f]{{2}})"
# What to look for before anything else, the pattern, and what is left of it. None of them ends at a backslash
# or a quotation mark.
_LOOKS = (
    ("whsec_", re.compile(f"whsec_{_BASE64}{{8,}}"), f"whsec_{BLOT}"),
    ("whsk_", re.compile(f"whsk_{_BASE64}{{8,}}"), f"whsk_{BLOT}"),
    ("rk_", re.compile(r"(?<![A-Za-z0-9])rk_[A-Za-z0-9_-]{16,}"), f"rk_{BLOT}"),
    (
        "earer",
        re.compile(rf"([Bb]earer(?:\s+|%20|\+))(?:[A-Za-z0-9._~+=%-]|{_SLASH}){{8,}}"),
        rf"\1{BLOT}",
    ),
    (
        "hooks",
        re.compile(rf"({_SLASH}hooks{_SLASH}[A-Za-z0-9_.-]+{_SLASH})[A-Za-z0-9_.~%-]+"),
        rf"\1{BLOT}",
    ),
    ("@", re.compile(r"(://[^\s:/?#@\"'\\]*:)[^\s/\"'\\]+@"), rf"\1{BLOT}@"),
)
