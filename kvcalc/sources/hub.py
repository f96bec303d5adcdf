"""Configs and headers of weights from the Hugging Face Hub, through huggingface_hub (imported here
and nowhere else).

Its own settings apply: HF_TOKEN or a stored login, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_CACHE,
HF_HUB_ETAG_TIMEOUT. Tokens never appear in a message. A Hub is bounded by `hub_limits`.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from kvcalc.errors import (
    GatedModelError,
    HubUnavailableError,
    InputError,
    KvcalcError,
    ModelNotFoundError,
    OutputError,
)
from kvcalc.origin import Origin
from kvcalc.sources import quantization
from kvcalc.sources.hub_limits import bounded_answers, check_header, within_time
from kvcalc.sources.local import (
    MAX_CONFIG_BYTES,
    hf_cache_folder,
    read_config,
    read_with_quantization,
)
from kvcalc.units import shown

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsRepoMetadata

    from kvcalc.weights import Weights

Result = TypeVar("Result")

ATTEMPTS = 3
FIRST_WAIT_SECONDS = 0.5

MAX_HEADERS_BYTES = 256 * 2**20
"""Largest answer about weights: an index, or the header of a file, which may be sent whole."""

_BAD_ADDRESS = ("UnsupportedProtocol", "InvalidURL", "InvalidSchema", "MissingSchema")
_NETWORK_MODULES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def download(
    model: str, *, revision: str | None, hint: str = ""
) -> tuple[Mapping[str, Any], Origin]:
    """Fetch a repository's config.json, retrying what may pass, and where that says nothing of a
    quantisation, its hf_quant_config.json, if it has one.

    Raises ModelNotFoundError (no such repository, revision or file), GatedModelError and
    HubUnavailableError (offline, time-out, rate limit, server error).
    """
    _check_settings()
    ask = partial(_download, model, revision=revision, hint=hint)
    path = within_time(lambda deadline: ask(deadline=deadline), model)
    config, notes = read_with_quantization(path)
    return config, Origin(
        requested=model,
        resolved=model,
        kind="hub",
        detail=f"config.json at {revision or 'main'} ({path.parent.name[:12]})",
        notes=notes,
        commit=path.parent.name,
    )


def _download(model: str, *, revision: str | None, hint: str, deadline: float) -> Path:
    """The path of a config.json in the local cache, with its hf_quant_config.json beside it."""
    from huggingface_hub import hf_hub_download

    def fetch() -> str:
        return hf_hub_download(model, "config.json", revision=revision)

    def fetch_quantization() -> None:
        try:
            _ask(model, quantization.FILE, revision=path.parent.name)
        except Exception as error:
            if _status(error) == 404:
                return
            raise
        hf_hub_download(model, quantization.FILE, revision=path.parent.name)

    _reach(model, revision=revision, hint=hint, deadline=deadline)
    bounds = Bounds(MAX_CONFIG_BYTES, deadline)
    path = Path(_with_retries(fetch, model, revision, hint, bounds))
    if not quantization.is_declared(read_config(path)):
        _with_retries(fetch_quantization, model, revision, hint, bounds)
    return path


def weights(model: str, *, commit: str) -> "Weights | None":
    """The weights that a repository's safetensors files have at a commit, from their headers; None
    when it has no such files.

    Raises InputError for files that are damaged or missing, and what `download` raises.
    """
    _check_settings()
    from huggingface_hub import HfApi, errors

    from kvcalc.weights import weights_of_headers

    def fetch() -> "SafetensorsRepoMetadata | None":
        try:
            return HfApi().get_safetensors_metadata(model, revision=commit)
        except errors.NotASafetensorsRepoError:
            return None
        except errors.LocalEntryNotFoundError:  # no connection
            raise
        except errors.EntryNotFoundError:
            msg = f"{model} lacks safetensors files that its index names; give a local folder"
        except (errors.SafetensorsParsingError, ValueError, TypeError, AttributeError):
            msg = f"the safetensors files of {model} have headers that cannot be read"
        raise InputError(msg)

    found = within_time(
        lambda deadline: _with_retries(
            fetch, model, commit, "", Bounds(MAX_HEADERS_BYTES, deadline)
        ),
        model,
    )
    if found is None:
        return None
    if not found.files_metadata:
        msg = f"the safetensors index names no files that {model} has; give a local folder"
        raise InputError(msg)
    headers = {
        file: {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": list(tensor.data_offsets),
            }
            for name, tensor in header.tensors.items()
        }
        for file, header in found.files_metadata.items()
    }
    return weights_of_headers(headers, found.weight_map, where=f"{model} on the Hub")


def check_reachable(model: str, *, revision: str | None, hint: str = "") -> None:
    """Ask the Hub for a repository's config.json, and raise as `download` does when it says no.

    A download that cannot connect retries for half a minute on its own; this fails in seconds.
    """
    _check_settings()
    ask = partial(_reach, model, revision=revision, hint=hint)
    within_time(lambda deadline: ask(deadline=deadline), model)


def _reach(model: str, *, revision: str | None, hint: str, deadline: float) -> None:
    from huggingface_hub import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    _with_retries(
        lambda: _ask(model, "config.json", revision=revision),
        model,
        revision,
        hint,
        Bounds(MAX_CONFIG_BYTES, deadline),
    )


def _ask(model: str, file: str, *, revision: str | None) -> None:
    """Ask for a file's header, once."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(model, file, revision=revision)
    found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    fields = {"X-Repo-Commit": found.commit_hash, "ETag": found.etag, "X-Linked-Size": found.size}
    check_header(model, fields, names=("X-Repo-Commit", "ETag"), most_bytes=MAX_CONFIG_BYTES)


class Bounds(NamedTuple):
    """Bytes of one answer, and when the last must have come, in seconds of `time.monotonic`."""

    most_bytes: int
    deadline: float


def _with_retries(
    action: Callable[[], Result], model: str, revision: str | None, hint: str, bounds: Bounds
) -> Result:
    def bounded() -> Result:
        with bounded_answers(model, most_bytes=bounds.most_bytes, deadline=bounds.deadline):
            return action()

    wait_seconds = FIRST_WAIT_SECONDS
    for _ in range(ATTEMPTS - 1):
        try:
            return bounded()
        except KvcalcError:
            raise
        except Exception as error:  # noqa: BLE001 - every failure becomes one sentence
            failure, may_pass = _explain(error, model, revision, hint)
            if not may_pass:
                raise failure from None
        time.sleep(wait_seconds)
        wait_seconds *= 2
    try:
        return bounded()
    except KvcalcError:
        raise
    except Exception as error:  # noqa: BLE001 - likewise
        raise _explain(error, model, revision, hint)[0] from None


def _explain(
    error: Exception, model: str, revision: str | None, hint: str
) -> tuple[Exception, bool]:
    """The sentence for a failure, and whether another try may succeed."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        msg = (
            f"{model} is gated: ask for access at its page on the Hub, then log in with "
            "`hf auth login` (or set HF_TOKEN) and try again"
        )
        return GatedModelError(msg), False
    if isinstance(error, errors.RevisionNotFoundError):
        msg = f"{model} has no revision {shown(revision)}; leave --revision out for its main branch"
        return ModelNotFoundError(msg), False
    if isinstance(error, errors.RepositoryNotFoundError):
        msg = (
            f"no model {model} on the Hub, or it is private: check the name, or log in with "
            f"`hf auth login`.{hint} Try: kvcalc models"
        )
        return ModelNotFoundError(msg), False
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        msg = f"{model} has no config.json, so it is no transformers model; give a config.json file"
        return ModelNotFoundError(msg), False
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"{shown(model)} is no Hugging Face model id (org/name)"), False
    return _unavailable(error, model, revision, hint)


def _unavailable(
    error: Exception, model: str, revision: str | None, hint: str
) -> tuple[Exception, bool]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        what = f"revision {revision} of {model}" if revision else model
        msg = (
            f"{what} is not in the local Hugging Face cache, and HF_HUB_OFFLINE is set: unset it, "
            f"or give a config.json file.{hint}"
        )
        return HubUnavailableError(msg), False
    status = _status(error)
    if status == 429:
        msg = (
            f"the Hub's rate limit was reached while reading {model}: wait some minutes, or log in "
            "with `hf auth login` for a higher limit"
        )
        return HubUnavailableError(msg), True
    if status in (401, 403):
        msg = (
            f"the Hub refused access to {model} ({status}): check HF_TOKEN, or log in again with "
            "`hf auth login`"
        )
        return GatedModelError(msg), False
    if status:
        advice = "try again later, or give" if status >= 500 else "check HF_ENDPOINT, or give"
        msg = f"the Hub answered {status} for {model}: {advice} a config.json file"
        return HubUnavailableError(msg), status >= 500
    return _unreachable(error, model, hint)


def _unreachable(error: Exception, model: str, hint: str) -> tuple[Exception, bool]:
    """No answer at all: a setting that cannot work, the disk, or the network."""
    links = _chain(error)
    if any(isinstance(link, UnicodeError) for link in links):
        msg = "HF_TOKEN holds characters that no token has: set it again, or unset it"
        return InputError(msg), False
    if any(isinstance(link, ValueError) or type(link).__name__ in _BAD_ADDRESS for link in links):
        return _no_address(error, model), False
    if isinstance(error, OSError) and error.filename is not None:
        msg = (
            f"cannot write to the Hugging Face cache: {error.strerror}; set HF_HUB_CACHE to a "
            "folder that can be written"
        )
        return OutputError(msg), False
    if not any(isinstance(link, OSError) or _is_network(link) for link in links):
        return error, False
    msg = (
        f"cannot reach the Hub for {model} ({type(links[-1]).__name__}): go online, or give a "
        f"config.json file.{hint}"
    )
    return HubUnavailableError(msg), True


def _no_address(error: Exception, model: str) -> InputError:
    """The sentence for an address, or another word, that cannot be used: whose it is."""
    if "proxy" in str(error).lower():
        msg = "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY is no address of a proxy: correct or unset it"
        return InputError(msg)
    return HubUnavailableError(
        f"the Hub's answer for {model} cannot be followed ({type(error).__name__}): check "
        "HF_ENDPOINT, or give a config.json file"
    )


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port above 65,535, half a bracket
        return False


def _check_settings() -> None:
    """Raise InputError for a setting that huggingface_hub would not start with."""
    if not _is_address(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        msg = "HF_ENDPOINT is no address such as https://huggingface.co: correct it, or unset it"
        raise InputError(msg)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        said = os.environ.get(name, "")
        if said and not re.fullmatch(r"[1-9][0-9]{0,5}", said.strip()):
            msg = f"{name} {shown(said)} is no number of seconds from 1: correct it, or unset it"
            raise InputError(msg)
    folder = hf_cache_folder()
    try:
        folder.expanduser().resolve()
    except (OSError, RuntimeError):  # nobody's home, links that go round in circles
        msg = (
            f"the Hugging Face cache cannot be at {shown(str(folder), most=120)}: correct HF_HOME, "
            "HF_HUB_CACHE or XDG_CACHE_HOME, or unset it"
        )
        raise InputError(msg) from None


def _is_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK_MODULES


def _status(error: BaseException | None) -> int:
    """HTTP status somewhere along the chain of causes; 0 when no answer came."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    return 0


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links
