"""Finding a model's config: catalogue, local files, the local Hugging Face cache, the Hub.

The first of these that applies answers: a config mapping; a path that exists; the catalogue (not
when a revision is asked for, since an entry has none); the local Hugging Face cache; the Hub.
Only the last imports huggingface_hub.
"""

import re
from collections.abc import Mapping
from typing import Any

from kvcalc.errors import InputError, ModelNotFoundError
from kvcalc.origin import Origin
from kvcalc.sources import catalogue, local, quantization
from kvcalc.units import shown

__all__ = ["resolve"]


def resolve(
    model: str | Mapping[str, Any], *, revision: str | None = None
) -> tuple[Mapping[str, Any], Origin]:
    """The config of a model and where it came from.

    Raises ModelNotFoundError, ConfigError, GatedModelError or HubUnavailableError.
    """
    config, origin = _find(model, revision=revision)
    word = quantization.contradicted(config, origin)
    if not word:
        return config, origin
    note = f"the name says {word}, the config no quantisation: auto is a plain model's KV dtype"
    return config, origin._replace(notes=(*origin.notes, note))


def _find(
    model: str | Mapping[str, Any], *, revision: str | None
) -> tuple[Mapping[str, Any], Origin]:
    """The first of the places that has the model."""
    if isinstance(model, Mapping):
        name = str(model.get("_name_or_path") or "config")
        return model, Origin(
            requested=name, resolved=name, kind="mapping", detail="given by the caller"
        )
    path = local.existing_path(model)
    if revision is not None:
        _check_revision(revision, is_path=path is not None)
    if path is not None:
        return local.read(model, path)
    entry = catalogue.find(model)
    if entry is not None:
        if revision is None:
            return entry.config, _catalogue_origin(model, entry)
        model = entry.name  # a revision is of the published repository
    if not local.is_repository_id(model):
        raise ModelNotFoundError(_no_such_model(model))
    cached = local.find_in_hf_cache(model, revision=revision or "main")
    if cached is not None:
        return local.read(model, cached, kind="hf-cache")
    from kvcalc.sources import hub

    hint = "" if entry else f" It is not in the catalogue.{_did_you_mean(model)}"
    return hub.download(model, revision=revision, hint=hint)


def _check_revision(revision: str, *, is_path: bool) -> None:
    if is_path:
        msg = "--revision is for models on the Hub; a path has none"
        raise InputError(msg)
    if not re.fullmatch(r"[\w.-][\w./-]{0,199}", revision) or ".." in revision:
        msg = f"--revision {shown(revision)} is no branch, tag or commit"
        raise InputError(msg)


def _catalogue_origin(requested: str, entry: catalogue.CatalogueEntry) -> Origin:
    notes = []
    if entry.name.lower() != requested.lower():
        notes.append(f"{requested} is published as {entry.name}")
    if entry.completeness == "partial":
        notes.append("catalogue entry from a partial source, not the whole config.json")
    return Origin(
        requested=requested,
        resolved=entry.name,
        kind="catalogue",
        detail=f"{entry.source}, {entry.date}",
        completeness=entry.completeness,
        notes=tuple(notes),
    )


def _no_such_model(model: str) -> str:
    return (
        f"no model {shown(model, most=80)}: not a file or folder here, not in the catalogue, and "
        f"no Hugging Face id (org/name).{_did_you_mean(model)} Try: kvcalc models"
    )


def _did_you_mean(model: str) -> str:
    close = catalogue.suggestions(model[:100])
    return f" Did you mean {' or '.join(close)}?" if close else ""
