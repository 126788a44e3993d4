"""The official Standard Webhooks libraries on what Relay signs: a program per language in `tests/verifiers`.

Python and JavaScript always; the others with RELAY_THOROUGH, where their tools are and a library can be had.
"""

import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay import signature
from relay.body import compact
from tests.conftest import need
from tests.program import THOROUGH

FOLDER = Path(__file__).parent / "verifiers"


@dataclass(frozen=True)
class Language:
    """How a language's program is come by and run: `fetch` has the language's own tool bring the library.
    `{out}` is a folder for what is made of it."""

    run: Sequence[str]
    fetch: Sequence[str] = ()
    build: Sequence[str] = ()


LANGUAGES = {
    "python": Language([sys.executable, "verify.py"]),
    "javascript": Language(["node", "verify.mjs"]),
    "go": Language(
        ["{out}/verify"],
        ["go", "mod", "download"],
        ["go", "build", "-mod=readonly", "-o", "{out}/verify", "."],
    ),
    "rust": Language(
        ["{out}/debug/verify"],
        ["cargo", "fetch", "--quiet", "--locked"],
        ["cargo", "build", "--quiet", "--locked", "--offline", "--target-dir", "{out}"],
    ),
    "java": Language(
        ["java", "-cp", "{out}/*", "Verify.java"],
        ["mvn", "-B", "-q", "dependency:copy-dependencies", "-DoutputDirectory={out}"],
    ),
    "ruby": Language(["bundle", "exec", "ruby", "verify.rb"], ["bundle", "install", "--quiet"]),
    "php": Language(
        ["php", "-d", "display_errors=stderr", "verify.php", "{out}"],
        ["composer", "install", "--quiet", "--no-interaction"],
    ),
}
ALWAYS = ("python", "javascript")


@dataclass
class Verifier:
    """A running program: a question in, a verdict out."""

    process: subprocess.Popen[str]

    def says(self, secret: str, headers: dict[str, str], body: bytes) -> str:
        """`accepted`, or `refused: ` and why."""
        parts = [secret.encode(), *(value.encode() for value in headers.values()), body]
        self._to.write("\t".join(base64.b64encode(part).decode() for part in parts) + "\n")
        self._to.flush()
        verdict = self._from.readline().rstrip("\n")
        assert verdict == "accepted" or verdict.startswith("refused: "), verdict or "it is gone"
        return verdict

    @property
    def _to(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _from(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.xdist_group(name))
        for name in LANGUAGES
        if THOROUGH or name in ALWAYS
    ],
)
def verifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifier]:
    name: str = request.param
    language, folder, out = LANGUAGES[name], FOLDER / name, tmp_path_factory.mktemp(name)
    if name == "javascript":
        there = shutil.which("node") and (folder / "node_modules" / "standardwebhooks").is_dir()
        need(
            folder if there else None,
            f"the JavaScript verifier is missing: install Node.js, then npm ci --prefix {folder}",
        )
    programs = {command[0] for command in (language.fetch, language.build, language.run) if command}
    for program in sorted(programs):
        if not program.startswith("{out}") and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: the {name} library cannot verify")

    def spelled(command: Sequence[str]) -> list[str]:
        return [part.replace("{out}", str(out)) for part in command]

    # What Bundler and Composer would put beside the program goes there too.
    there = {"BUNDLE_PATH": str(out), "BUNDLE_FROZEN": "true", "COMPOSER_VENDOR_DIR": str(out)}
    place: dict[str, Any] = {"cwd": folder, "env": os.environ | there}
    if language.fetch:
        fetched = subprocess.run(  # noqa: S603 # our own commands
            spelled(language.fetch), **place, capture_output=True, text=True, timeout=300
        )
        if fetched.returncode != 0:
            said = (fetched.stderr + fetched.stdout).strip()[-300:]
            pytest.skip(f"the {name} library cannot be had here: {said}")
    if language.build:
        subprocess.run(spelled(language.build), **place, check=True, timeout=300)  # noqa: S603
    with subprocess.Popen(  # noqa: S603
        spelled(language.run),
        **place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="ascii",
        errors="replace",
    ) as process:
        yield Verifier(process)


def whsec(key: bytes) -> str:
    return "whsec_" + base64.b64encode(key).decode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)
SECRETS = st.lists(st.binary(min_size=24, max_size=64).map(whsec), min_size=1, max_size=3, unique=True)
IDS = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", min_size=1, max_size=40)
PLACES = st.lists(st.integers(0, 3), max_size=2)
ONE, TWO, THREE = (whsec(bytes([number]) * 24) for number in (1, 2, 3))


# Of the other scheme (`v1a`), which these libraries do not know and have to pass over.
PRIVATE = signature.new_private_key()


def signed(
    secrets: Sequence[str], id_: str, body: bytes, *, foreign: Sequence[int] = (), ahead: int = 0
) -> dict[str, str]:
    """Relay's headers, with a token of the other scheme at each of these places."""
    keys = list(secrets)
    for place in foreign:
        keys.insert(place, PRIVATE)
    return signature.headers(keys, id_, int(time.time()) + ahead, body)


@settings(max_examples=1000)
@given(SECRETS, IDS, JSON.map(compact), PLACES)
@example([ONE], "evt_1", b"", [])
@example([ONE], "evt_1", b"{}", [])
@example([ONE, TWO, THREE], "evt_1", compact({"data": "é𝄞\u2028\0\ufeff\U0010ffff"}), [0, 4])
@example([ONE, TWO], "evt_1", compact("é" * (128 * 1024 - 1)), [1])
def test_what_relay_signs_is_accepted_and_what_was_tampered_with_is_not(
    verifier: Verifier, secrets: list[str], id_: str, body: bytes, places: list[int]
):
    headers = signed(secrets, id_, body, foreign=places)
    for secret in secrets:
        assert verifier.says(secret, headers, body) == "accepted"
    secret, stamp = secrets[-1], headers["webhook-timestamp"]
    cut = " ".join(token[:8] for token in headers["webhook-signature"].split(" "))
    for what, wrong in {
        "another body": (secret, headers, body + b" "),
        "no body": (secret, headers, b"" if body else b"{}"),
        "another id": (secret, headers | {"webhook-id": id_ + "0"}, body),
        "another time": (secret, headers | {"webhook-timestamp": str(int(stamp) + 1)}, body),
        "another secret": (whsec(b"another" * 5), headers, body),
        "signatures cut short": (secret, headers | {"webhook-signature": cut}, body),
        "a version without a signature": (secret, headers | {"webhook-signature": "v1,"}, body),
        "no signature": (secret, headers | {"webhook-signature": ""}, body),
        "only a foreign one": (secret, signed([PRIVATE], id_, body), body),
    }.items():
        assert verifier.says(*wrong).startswith("refused: "), what


@pytest.mark.parametrize("size", [2, 20 * 1024, 256 * 1024])
def test_a_body_of_any_size_is_accepted(verifier: Verifier, size: int):
    body = compact("é" * (size // 2 - 1))
    assert len(body) == size
    assert verifier.says(ONE, signed([ONE], "evt_1", body), body) == "accepted"
    assert verifier.says(ONE, signed([ONE], "evt_1", body), body[:-2] + b'"').startswith("refused: ")


@pytest.mark.parametrize(
    ("tokens", "place"), [(count, place) for count in (1, 2, 3) for place in range(count + 1)]
)
def test_a_foreign_token_before_between_or_after_ours_does_no_harm(
    verifier: Verifier, tokens: int, place: int
):
    secrets = [ONE, TWO, THREE][:tokens]
    for foreign in ([place], [place, place], [0, place, tokens + 2]):
        for secret in secrets:
            headers = signed(secrets, "evt_1", b"{}", foreign=foreign)
            assert verifier.says(secret, headers, b"{}") == "accepted"


def within_a_second(ask: Callable[[], str]) -> str:
    """The answer of a try during which the clock stayed in one second."""
    while True:
        begun = int(time.time())
        answer = ask()
        if int(time.time()) == begun:
            return answer


@pytest.mark.parametrize("off", [-299, 0, 299])
def test_a_clock_that_is_nearly_five_minutes_off_is_tolerated(verifier: Verifier, off: int):
    ask = lambda: verifier.says(ONE, signed([ONE], "evt_1", b"{}", ahead=off), b"{}")  # noqa: E731
    assert within_a_second(ask) == "accepted"


@pytest.mark.parametrize("off", [-86_400, -301, 301, 86_400])
def test_a_clock_that_is_further_off_is_refused(verifier: Verifier, off: int):
    ask = lambda: verifier.says(ONE, signed([ONE], "evt_1", b"{}", ahead=off), b"{}")  # noqa: E731
    assert within_a_second(ask).startswith("refused: ")
