"""Everything Relay raises on purpose.

    RelayError
    ├─ ConfigError              the configuration is wrong: names the key and what to do; exit code 2
    │  └─ DatabaseInUse         another relay holds the database file
    ├─ Refused                  a request is refused: carries an HTTP status
    │  ├─ Malformed 400         not JSON at all, or not the protocol
    │  ├─ Unauthorized 401      no key or a wrong one
    │  ├─ Unsigned 401          a callback without its provider's signature
    │  ├─ Forbidden 403        a key that may not do this
  │  ├─ NotFound 404          unknown, or another tenant's
    │  ├─ Conflict 409          the state of the thing does not allow it
    │  ├─ TooLarge 413          over a limit
    │  ├─ Unsupported 415       a body in a form that is not taken
    │  ├─ Invalid 422           well-formed but wrong: names each field
    │  └─ Limited 429           too much for now: carries when to come back
    ├─ ProviderError            a provider could not be asked, or its answer could not be read
    ├─ SealBroken               a secret at rest cannot be opened
    ├─ CopyFailed               a copy of a database did not come to its end; exit code 1
    └─ StoreError               the database did not take it: nothing was acknowledged (503)
       └─ Collision             another relay's transaction was in the way

A failed attempt is not here: it is a value (`relay.delivery.Answer`), the product's daily bread.
"""

from dataclasses import dataclass
from typing import ClassVar


class RelayError(Exception):
    """The root: whatever is not below it is a bug."""


class ConfigError(RelayError):
    """The message names the key (`accounts.luma.api_key`) and says what to do."""


@dataclass(frozen=True, slots=True)
class FieldError:
    field: str
    message: str


class DatabaseInUse(ConfigError):
    """One SQLite file serves one process."""


class Refused(RelayError):
    """A request that is answered with `status` and problem+json; the message is the `detail`."""

    status: ClassVar[int] = 400
    title: ClassVar[str] = "Refused"


class Malformed(Refused):
    status = 400
    title = "Malformed request"


class Unauthorized(Refused):
    status = 401
    title = "No or bad key"


class Unsigned(Refused):
    status = 401
    title = "No or bad signature"


class Forbidden(Refused):
    status = 403
    title = "Not allowed"


class NotFound(Refused):
    status = 404
    title = "Not found"


class Conflict(Refused):
    status = 409
    title = "Conflict"


class TooLarge(Refused):
    status = 413
    title = "Too large"


class Unsupported(Refused):
    status = 415
    title = "Unsupported"


class Invalid(Refused):
    """Well-formed but wrong: `errors` names each field."""

    status = 422
    title = "Invalid request"

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(f"{error.field}: {error.message}" for error in errors))
        self.errors = errors


class Limited(Refused):
    """`retry_after` in milliseconds."""

    status = 429
    title = "Limited"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ProviderError(RelayError):
    """Asking a provider went wrong; never a generation's failure.

    `code` is one of `unreachable`, `unavailable`, `rate_limited`, `unauthorized`, `blocked`, `unreadable`,
    `refused` (the provider is there, and does not answer about this job).
    `retry_after` is in milliseconds, when the provider said.
    """

    def __init__(self, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class SealBroken(RelayError):
    """The message says what became of the secret."""


class CopyFailed(RelayError):
    """The message names the table and says what to do."""


class StoreError(RelayError):
    """The database did not take it; the driver's own error is the cause.

    `general`: it would not have taken anything else either (it is full, locked, gone).
    """

    def __init__(self, message: str, *, general: bool = True) -> None:
        super().__init__(message)
        self.general = general


class Collision(StoreError):
    """A transaction was undone because of another one: begun anew, it sees what that one has done."""

    def __init__(self, message: str) -> None:
        super().__init__(message, general=False)
