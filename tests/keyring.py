"""The keys that the tests seal with."""

from relay.keyring import KeyRing

SECRET_KEY = "the tests' own secret key, which is long enough"
KEYRING = KeyRing([SECRET_KEY])
