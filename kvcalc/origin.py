"""Where a config came from."""

from typing import NamedTuple


class Origin(NamedTuple):
    """How a model was named, what that resolved to, and who says so.

    `kind` is one of `catalogue`, `file`, `hf-cache`, `hub`, `mapping`; `detail` a path, revision or
    source; `completeness` is `verbatim` for a whole config.json and `partial` for some of its
    fields. `commit` is that of a `hub` config.
    """

    requested: str
    resolved: str
    kind: str
    detail: str
    completeness: str = "verbatim"
    notes: tuple[str, ...] = ()
    commit: str = ""
