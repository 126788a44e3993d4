"""`relay`, and `python -m relay`."""

import signal
import sys


def main() -> None:
    """The entry point."""
    # As process 1 of a container, nothing would end the program before it listens to signals itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from relay.cli import main as run

    run()


if __name__ == "__main__":
    main()
