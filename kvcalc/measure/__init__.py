"""Measuring: real models, real caches, real bytes. Everything here may import torch."""

import os

from kvcalc.errors import MissingDependencyError
from kvcalc.releases import check_promised

# torch's profiler announces each start and stop on standard error unless this is set before the
# first import of torch.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def require_torch() -> None:
    """Raise MissingDependencyError, with the command that installs them, unless torch and
    transformers can be imported, in releases that kvcalc runs on.
    """
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        msg = (
            f"{' and '.join(missing)} not installed; run: pip install 'kvcalc[profile]' "
            "(in a checkout: pip install '.[profile]')"
        )
        raise MissingDependencyError(msg)
    check_promised()
    try:
        from transformers.utils import logging
    except Exception as error:  # noqa: BLE001 - versions that do not go together fail in any way
        reason = " ".join(str(error).split())
        msg = (
            f"torch and transformers cannot be imported here ({reason:.160}); run: "
            "pip install --upgrade 'kvcalc[profile]'"
        )
        raise MissingDependencyError(msg) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
