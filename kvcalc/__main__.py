"""`python -m kvcalc`, and what the command `kvcalc` calls: Ctrl-C has its status from the first."""

import os
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Load the command line, which takes most of the time of a short command, and run it."""
    try:
        from kvcalc.cli import main as run

        run()
    except KeyboardInterrupt:
        with suppress(OSError):
            os.write(2, b"kvcalc: interrupted\n")
        os._exit(130)


if __name__ == "__main__":
    main()
