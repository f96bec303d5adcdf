"""Settings of the whole test run."""

import os

# No test may reach the Hub; the ones about it talk to a server of their own in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def pytest_configure() -> None:
    """Tiny models have no room for published token ids; their warnings say only that."""
    from transformers.utils import logging

    logging.set_verbosity_error()
