"""The weights of a model that was found: from its own files where there are any.

Local safetensors and GGUF files, snapshots of the local Hugging Face cache, and the headers of a
repository whose config came from the Hub in this run are exact whatever the model; what is left is
computed from the config. A catalogued model never asks the Hub.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvcalc.engines import Same
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.families import decoder_level
from kvcalc.origin import Origin
from kvcalc.sources import local, quantization
from kvcalc.units import shown
from kvcalc.weights import Weights, weights_of, weights_of_files

__all__ = ["weights_of_model"]

_PREDICTING = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")

_asked: dict[tuple[str, str], Weights | None] = {}
"""What the Hub said in this run: its configs are cached, and found there from then on."""


def weights_of_model(config: Mapping[str, Any], origin: Origin) -> Weights:
    """Parameters and bytes of the model that a config and its origin are of.

    Raises InputError for files that were given and are damaged or incomplete, the errors of the
    Hub, and UnsupportedError where weights must be computed and are not known exactly.
    """
    found: Weights | None = None
    reason, why = "", ""
    match origin.kind:
        case "file":
            found = _given(Path(origin.detail))
        case "hf-cache" | "catalogue":
            found, why = _cached(origin)
            if why:
                reason = "computed, as the cached files are not complete"
        case "hub":
            found = _published(origin)
            if found is None:
                reason = "computed, as the repository has no safetensors files"
    if found is not None:
        return _with_notes(found, config)
    if word := quantization.contradicted(config, origin):
        msg = (
            f"the name {shown(quantization.name_of(origin), most=120)} says {word}, its config no "
            f"quantisation, so that the bytes of its weights are not known; give a folder with its "
            f"{quantization.FILE} or safetensors files"
        )
        raise UnsupportedError(msg)
    weights = _computed(Same(config), complete=origin.completeness == "verbatim")
    if not reason:
        return weights
    said = f"{reason}: {weights.origin}"
    return weights._replace(origin=said, notes=(*weights.notes, *([why] if why else [])))


@lru_cache(maxsize=16)
def _computed(config: Same[Mapping[str, Any]], *, complete: bool) -> Weights:
    """Added up once for a config: a plan asks hundreds of times."""
    try:
        return weights_of(config.it, complete=complete)
    except UnsupportedError:
        found = None if complete else _of_excerpt(config.it)
        if found is None:
            raise
        return found


def _of_excerpt(config: Mapping[str, Any]) -> Weights | None:
    """The range of what an excerpt of a config may have, which leaves out the dtype (then bf16, as
    for the cache) or whether the head is the embedding; None where it leaves out more.
    """
    levels = (config, decoder_level(config).config)
    assumed: dict[str, Any] = {}
    said = []
    if not any(level.get(key) for level in levels for key in ("dtype", "torch_dtype")):
        assumed["dtype"] = "bfloat16"
        said.append("bf16")
    heads: list[dict[str, Any]] = [{}]
    if all(level.get("tie_word_embeddings") is None for level in levels):
        heads = [{"tie_word_embeddings": tied} for tied in (False, True)]
        said.append("a head beside the embedding or none")
    try:
        found = [weights_of({**config, **assumed, **head}, complete=False) for head in heads]
    except UnsupportedError:
        return None
    most = max(found, key=lambda one: one.num_bytes)
    return most._replace(
        origin=f"assumed, where an excerpt of a config does not say: {'; '.join(said)}",
        least_bytes=min(one.num_bytes for one in found),
    )


def _given(path: Path) -> Weights | None:
    """The weights beside a config.json or in a GGUF file that the user gave."""
    if local.is_gguf(path):
        from kvcalc.sources.gguf_weights import weights_of_gguf

        return _read(weights_of_gguf, path, _stamp(path, *path.parent.glob("*.gguf")))
    if path.name == "config.json" and _has_weights(path.parent):
        return _of_folder(path.parent)
    return None


def _of_folder(folder: Path) -> Weights:
    return _read(weights_of_files, folder, _stamp(*folder.glob("*.safetensors*")))


@lru_cache(maxsize=64)
def _read(reader: Callable[[Path], Weights], path: Path, _: tuple[object, ...]) -> Weights:
    """Read headers once, as long as the files stay as they are: a plan asks hundreds of times."""
    return reader(path)


def _stamp(*paths: Path) -> tuple[object, ...]:
    """Names, sizes and times of files."""
    stamps = []
    for path in sorted(paths):
        try:
            status = path.stat()
            stamps.append((path.name, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append((path.name, 0, 0))
    return tuple(stamps)


def _cached(origin: Origin) -> tuple[Weights | None, str]:
    """The weights in the local Hugging Face cache, or why its files will not do, if it has any."""
    path: Path | None = Path(origin.detail)
    if origin.kind == "catalogue":
        path = local.find_in_hf_cache(origin.resolved, revision="main")
    if path is None:
        return None, ""
    asked = _asked.get((origin.resolved, path.parent.name))
    if asked is not None:
        return asked, ""
    if not _has_weights(path.parent):
        return None, ""
    try:
        return _of_folder(path.parent), ""
    except InputError as error:
        return None, str(error)


def _published(origin: Origin) -> Weights | None:
    """The weights in the repository on the Hub that the config is of."""
    from kvcalc.sources import hub

    key = origin.resolved, origin.commit
    if key not in _asked:
        _asked[key] = hub.weights(origin.resolved, commit=origin.commit)
    return _asked[key]


def _has_weights(folder: Path) -> bool:
    """Whether a model's safetensors files, or some of them, or their index lie in a folder."""
    return any(folder.glob("model*.safetensors")) or any(folder.glob("model.safetensors.index.*"))


def _with_notes(weights: Weights, config: Mapping[str, Any]) -> Weights:
    text = config.get("text_config")
    levels = (config, text) if isinstance(text, Mapping) else (config,)
    if not any(level.get(key) for level in levels for key in _PREDICTING):
        return weights
    note = (
        "modules of multi-token prediction are counted where the files have them; engines load "
        "them when asked to"
    )
    return weights._replace(notes=(*weights.notes, note))
