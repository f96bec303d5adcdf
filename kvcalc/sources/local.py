"""Configs on this machine: config.json, model folder, GGUF file, the local Hugging Face cache."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcalc.errors import ConfigError, ModelNotFoundError
from kvcalc.origin import Origin
from kvcalc.sources import quantization
from kvcalc.units import shown

MAX_CONFIG_BYTES = 16 * 2**20
"""Largest config.json read; published ones stay below 1 MB."""

SUFFIXES = (".json", ".safetensors", ".gguf")
"""How names end that can only be meant as files."""

_REPOSITORY_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def existing_path(model: str) -> Path | None:
    """The path that `model` names, when it exists or can only be meant as one."""
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith(SUFFIXES)
    if not model:
        return None
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):
        return None
    if exists:
        return path
    if looks_like_path:
        msg = (
            f"no file or folder {shown(model, most=120)}; give a config.json, a model folder, a "
            "GGUF file or a model id"
        )
        raise ModelNotFoundError(msg)
    return None


def is_repository_id(model: str) -> bool:
    """Whether `model` could be a repository on the Hub: `org/name`, or a plain old `name`."""
    return _REPOSITORY_ID.fullmatch(model) is not None and ".." not in model and "--" not in model


def read(requested: str, path: Path, *, kind: str = "file") -> tuple[Mapping[str, Any], Origin]:
    """Read the config that `path` stands for: itself, or the config.json of its folder."""
    config: Mapping[str, Any]
    try:
        config_path = _config_path(path)
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}"
        raise ConfigError(msg) from None
    notes: tuple[str, ...] = ()
    if is_gguf(config_path):
        from kvcalc.sources import gguf_config

        config, notes = gguf_config.read(config_path)
    else:
        config, notes = read_with_quantization(config_path)
    return config, Origin(
        requested=requested,
        resolved=requested,
        kind=kind,
        detail=str(config_path),
        notes=notes,
    )


def is_gguf(path: Path) -> bool:
    """By its name, or by its first bytes: Ollama's files have no suffix."""
    if path.suffix == ".gguf":
        return True
    try:
        if not path.is_file():
            return False  # a pipe can be read only once
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def read_with_quantization(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Parse a config.json with the `hf_quant_config.json` beside it, and a note where that counts.

    ConfigError when either cannot be read.
    """
    config = read_config(path)
    beside = path.with_name(quantization.FILE)
    if path.name != "config.json" or not (beside.is_file() or beside.is_symlink()):
        return config, ()
    if quantization.is_declared(config):
        return config, ()
    said = read_config(beside, what=quantization.FILE)
    return quantization.merged(config, said, name=str(beside)), (quantization.NOTE,)


def read_config(path: Path, *, what: str = "config.json") -> Mapping[str, Any]:
    """Parse a config.json; ConfigError when it is too large, not JSON, or not an object."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            msg = f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes, which no {what} is"
            raise ConfigError(msg)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise ConfigError(msg) from None
    except UnicodeDecodeError:
        msg = f"{path} is not text; give a model's {what}"
        raise ConfigError(msg) from None
    return parse_config(text, name=str(path))


def parse_config(text: str, *, name: str) -> Mapping[str, Any]:
    """Parse the text of a config.json; ConfigError naming `name` when it is no JSON object."""
    try:
        config = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        msg = f"{name} is not JSON: {str(error) or type(error).__name__:.100}"
        raise ConfigError(msg) from None
    if not isinstance(config, dict):
        kind = "an array" if isinstance(config, list) else shown(config)
        msg = f"{name} holds {kind}, not a JSON object of config fields"
        raise ConfigError(msg)
    return config


def find_in_hf_cache(model: str, *, revision: str) -> Path | None:
    """The cached config.json of a repository, read off the cache's own layout.

    `models--org--name/refs/<revision>` names a commit and `snapshots/<commit>/` holds its files
    (huggingface_hub, "Understand caching").
    """
    repository = hf_cache_folder() / f"models--{model.replace('/', '--')}"
    commit = revision
    ref = repository / "refs" / revision
    try:
        if ref.is_file():
            commit = ref.read_text(encoding="utf-8").strip()
        path = repository / "snapshots" / commit / "config.json"
        return path if path.is_file() else None
    except (OSError, ValueError):
        return None


def hf_cache_folder() -> Path:
    """Where huggingface_hub keeps repositories: its environment variables, else its default."""
    if explicit := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return _expanded(explicit)
    if home := os.environ.get("HF_HOME"):
        return _expanded(home) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expanded(path: str) -> Path:
    """As huggingface_hub reads it: a home that nobody has stays as it is written."""
    return Path(os.path.expandvars(os.path.expanduser(path)))  # noqa: PTH111 - never raises


def _config_path(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    if not path.is_dir():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    snapshots = sorted((path / "snapshots").glob("*/config.json"))
    if len(snapshots) == 1:
        return snapshots[0]
    if snapshots:
        msg = f"{path} holds {len(snapshots)} snapshots; give one, e.g. {snapshots[-1].parent}"
        raise ModelNotFoundError(msg)
    msg = f"no config.json in {path}; give a model folder or the config.json itself"
    raise ModelNotFoundError(msg)


def _refuse_constant(name: str) -> None:
    msg = f"{name} is no number that JSON knows"
    raise ValueError(msg)
