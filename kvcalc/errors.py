"""Every error kvcalc raises on purpose, one class for each different thing the user does next.

    KvcalcError
    ├── InputError                 2   fix the option, number or name that was given
    │   ├── ConfigError            2   fix the model's config.json (names the key and its value)
    │   ├── ModelNotFoundError     2   check the name, or use a suggested one
    │   ├── GatedModelError        2   ask for access and log in
    │   ├── HubUnavailableError    2   go online, wait, or give a local file
    │   ├── OutputError            2   choose another output path
    │   └── MissingDependencyError 2   install the extra that the message names
    ├── UnsupportedError           3   kvcalc cannot be exact here and says which fields decide it
    └── PredictionBrokenError      1   the measurement ran and did not hold the prediction

The number is the exit status of the command line. Messages are one line: the thing, then the
remedy. Nothing in the library catches these; `kvcalc.cli.main` is the only place that does.
"""

from typing import ClassVar

EXIT_BUG = 70
"""Exit status of what kvcalc did not foresee."""


class KvcalcError(Exception):
    """Base of all errors that kvcalc raises on purpose."""

    exit_code: ClassVar[int] = 2


class InputError(KvcalcError):
    """What the user gave is not usable."""


class ConfigError(InputError):
    """A model's config is malformed; the message names the key and the value found."""


class ModelNotFoundError(InputError):
    """No such model, folder, revision or file."""


class GatedModelError(InputError):
    """The repository exists but this user may not read it."""


class HubUnavailableError(InputError):
    """The hub could not be reached or would not answer (offline, time-out, rate limit)."""


class OutputError(InputError):
    """A result could not be written where the user asked."""


class MissingDependencyError(InputError):
    """An optional package that the command needs is not installed."""


class UnsupportedError(KvcalcError):
    """Refused: the exact size is not known for this model, strategy or engine combination."""

    exit_code: ClassVar[int] = 3


class PredictionBrokenError(KvcalcError):
    """A running cache held other bytes than were predicted."""

    exit_code: ClassVar[int] = 1
