"""The keys that the tests seal with."""

from relay.keyring import KeyRing

KEYRING = KeyRing(["the tests' own secret key, which is long enough"])
