"""Known vulnerabilities in what the lock files name; `make audit` asks the same. A service in the network is
asked, so `make test` leaves it out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# It holds all that requirements.lock does, in the same versions.
LOCK = Path(__file__).parents[1] / "requirements-dev.lock"


@pytest.mark.timeout(600)
def test_nothing_that_is_locked_has_a_known_vulnerability():
    asked = [
        sys.executable,
        "-m",
        "pip_audit",
        "--disable-pip",
        "--require-hashes",
        "--format",
        "json",
        "-r",
        LOCK,
    ]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=500)  # noqa: S603
    if not done.stdout.strip():
        pytest.skip(f"the vulnerability service cannot be asked: {done.stderr.strip()[-300:]}")
    told = json.loads(done.stdout)["dependencies"]
    known = [one for one in told if "skip_reason" not in one]
    if not known:
        pytest.skip(f"the index asked here knows no vulnerabilities: {told[0]['skip_reason']}")
    assert [one for one in known if one["vulns"]] == []
    assert [one["name"] for one in told if one not in known] == []
