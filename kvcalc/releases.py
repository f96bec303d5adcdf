"""What differs between the releases of transformers, torch and Triton that kvcalc runs on: one line
for each difference, with where it was seen. Nothing else asks for a version, and nothing is
imported to learn one.
"""

from collections.abc import Mapping
from functools import cache
from importlib import metadata

from kvcalc.errors import MissingDependencyError

CHECKED = "5.23.0"
"""The transformers whose rules kvcalc implements; older and newer ones differ as told here."""

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "cache")
"""What the forward of a model calls its cache: the first before 5.24.0, the second where there are
states alone, the third from then on in all (the old names warn there, and go at 5.40.0).
"""

PROMISED: Mapping[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "torch": ((2, 6), None),
    "transformers": ((5, 15), (6, 0)),
}
"""The oldest release that is run, and the first that is not, as pyproject.toml has them."""


@cache
def transformers_version() -> str:
    """The installed transformers, else the one that kvcalc's rules were checked against."""
    return _installed("transformers") or CHECKED


LATENTS_KEPT = (5, 15)
INDEXED_LATENTS_KEPT = (5, 18)
INDEXED = frozenset({"axk2", "deepseek_v32", "glm5_next_text", "glm_moe_dsa", "hy_v4"})
"""MLA is stored as latent and rotary key since the first of these releases, in types with an
indexer since the second; before that as K and V of every head (5.9.0 to 5.24.0 were run).
"""

KEEP_OTHERWISE_BEFORE = {"qwen4_exp": (5, 21), "qwen4_exp_text": (5, 21)}
"""Types that keep other states before these releases (5.17.0 and 5.20.2 were run)."""

STATIC_SINCE = {
    "big_bird": (5, 18),
    "bloom": (5, 21),
    "hy_v4": (5, 18),
    "megatron-bert": (5, 18),
    "rembert": (5, 18),
    "roformer": (5, 18),
}
"""Types whose static cache before these releases fails (bloom takes the length of the keys for that
of the sequence), answers otherwise than a growing one, or holds a counter more in layers that share
an indexer (hy_v4).
"""

LONGROPE_STAYS_ON_DEVICE = (5, 21)
"""LongRoPE compares the length on the device since then; before, in Python."""


def latents_are_kept(model_type: str) -> bool:
    """Whether a type's MLA is stored as latent and rotary key in the installed release."""
    since = INDEXED_LATENTS_KEPT if model_type in INDEXED else LATENTS_KEPT
    return _release(transformers_version()) >= since


def keeps_otherwise(model_type: str) -> str | None:
    """The first release that keeps what kvcalc counts, where the installed one is before it."""
    return _too_early(KEEP_OTHERWISE_BEFORE.get(model_type))


def static_needs(model_type: str) -> str | None:
    """The first release whose static cache takes a type, where the installed one is before it."""
    return _too_early(STATIC_SINCE.get(model_type))


def longrope_is_capturable() -> bool:
    """Whether a decode step with LongRoPE reads nothing back from the device."""
    return _too_early(LONGROPE_STAYS_ON_DEVICE) is None


def has_triton() -> bool:
    """Whether Triton is installed and compiles our kernels: before 3.5, of torch 2.9, its dot
    products had 16 columns at least.
    """
    found = _installed("triton") or _installed("pytorch-triton")
    return found is not None and _release(found) >= (3, 5)


def check_promised() -> None:
    """Raise MissingDependencyError, with what to install, for a torch or transformers that is not
    run.
    """
    for package, (oldest, first_not) in PROMISED.items():
        found = _installed(package)
        if found is None:
            continue
        release = _release(found)
        if release < oldest or (first_not is not None and release >= first_not):
            msg = (
                f"{package} {found} is not a release that kvcalc runs on; "
                f"run: pip install {wanted(package)!r}"
            )
            raise MissingDependencyError(msg)


def wanted(package: str) -> str:
    """The releases of a package that are run, as pip takes them."""
    oldest, first_not = PROMISED[package]
    return f"{package}>={_dotted(oldest)}" + (f",<{_dotted(first_not)}" if first_not else "")


def _too_early(since: tuple[int, int] | None) -> str | None:
    if since is None or _release(transformers_version()) >= since:
        return None
    return _dotted(since)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, int]:
    """Major and minor, of `5.15.0`, `2.11.0+cu130` or `5.24.0.dev0`."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _dotted(release: tuple[int, int]) -> str:
    major, minor = release
    return f"{major}.{minor}" if minor else f"{major}"
