"""Measuring: real models, real caches, real bytes. Everything here may import torch."""

import os

from kvcalc.errors import MissingDependencyError

# torch's profiler announces each start and stop on standard error unless this is set before the
# first import of torch.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def require_torch() -> None:
    """Raise MissingDependencyError, with the command that installs them, unless torch and
    transformers can be imported.
    """
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        msg = (
            f"{' and '.join(missing)} not installed; run: pip install 'kvcalc[profile]' "
            "(in a checkout: pip install '.[profile]')"
        )
        raise MissingDependencyError(msg)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
