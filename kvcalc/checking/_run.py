"""Deployments are fitted and held to their requirements, in whole numbers or fractions."""

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from kvcalc import api
from kvcalc.checking._report import Deployment, Outcome, Requirement, Result
from kvcalc.errors import (
    ConfigError,
    GatedModelError,
    HubUnavailableError,
    KvcalcError,
    ModelNotFoundError,
    UnsupportedError,
)
from kvcalc.fitting import FitReport
from kvcalc.layers import FullAttention, LatentAttention
from kvcalc.layers.mixed import IndexKeys, NoCache
from kvcalc.sizing import MAX_BATCH, beyond_maximum, rank_bytes
from kvcalc.strict_yaml import PlacedError

_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}

_Figures = dict[str, int | bool | None]


class Runs:
    """Reads each model once, and fits alike deployments once."""

    def __init__(self, *, every_figure: bool) -> None:
        self._every_figure = every_figure
        self._models: dict[tuple[str, str | None], Any] = {}
        self._fits: dict[str, FitReport | KvcalcError] = {}
        self._taken: dict[tuple[Any, ...], Callable[[int, int], int]] = {}

    def result(self, deployment: Deployment) -> Result:
        """Fit a deployment and hold it to its requirements."""
        try:
            model = self._model(deployment)
            report = self._fit(deployment, model)
            figures, *ends = self._figures(deployment, model, report)
            outcomes = tuple(_outcome(one, figures, ends) for one in deployment.requirements)
        except KvcalcError as error:
            about_model = (
                ModelNotFoundError,
                ConfigError,
                GatedModelError,
                HubUnavailableError,
                UnsupportedError,
            )
            place = deployment.model_place if isinstance(error, about_model) else deployment.place
            if isinstance(error, PlacedError):
                place = error.place
            return Result(deployment, {}, {}, (), error, place)
        facts = {
            "resolved_model": report.origin.resolved,
            "gpu": deployment.gpu or None,
            "engine": report.engine,
            "kv_dtype": report.kv_dtype,
            "tp": report.plan.tp,
            "pp": report.plan.pp,
            "seq_tokens": report.seq_tokens,
            "concurrency": report.concurrency,
            "prefix_share": float(deployment.prefix_share),
        }
        note = beyond_maximum(model.architecture, report.seq_tokens)
        return Result(deployment, figures, facts, outcomes, note=note)

    def _model(self, deployment: Deployment) -> api.Model:
        key = (deployment.model, deployment.given.get("revision"))
        if key not in self._models:
            try:
                self._models[key] = api.read_model(key[0], revision=key[1])
            except KvcalcError as error:
                self._models[key] = error
        found = self._models[key]
        if isinstance(found, KvcalcError):
            raise found
        model: api.Model = found
        return model

    def _fit(self, deployment: Deployment, model: api.Model) -> FitReport:
        given = {name: value for name, value in deployment.given.items() if name != "revision"}
        key = json.dumps([deployment.model, deployment.given], sort_keys=True)
        if key not in self._fits:
            try:
                self._fits[key] = api.fit(model, **given)
            except KvcalcError as error:
                self._fits[key] = error
        found = self._fits[key]
        if isinstance(found, KvcalcError):
            raise found
        return found

    def _figures(
        self, deployment: Deployment, model: api.Model, report: FitReport
    ) -> list[_Figures]:
        """The figures, and where terms are estimates, what they are at worst and at best."""
        fixed = {
            "kv_bytes_per_token": self._bytes_per_token(deployment, model, report),
            "weights": report.weights_bytes,
        }
        shared = _shared_bytes(deployment, model, report) if deployment.prefix_share else None
        ends = () if report.balance_range == (report.balance_bytes,) * 2 else (0, 1)
        longest = self._every_figure or any(
            requirement.figure == "max_tokens" for requirement in deployment.requirements
        )
        return [_at(report, end, shared, longest=longest) | fixed for end in (None, *ends)]

    def _bytes_per_token(
        self, deployment: Deployment, model: api.Model, report: FitReport
    ) -> int | None:
        key = (deployment.model, deployment.given.get("revision"), report.kv_dtype)
        tokens = report.seq_tokens
        try:
            if key not in self._taken:
                self._taken[key], _ = rank_bytes(
                    model.architecture,
                    kv_dtype=report.kv_dtype,
                    engine="model",
                    tp=1,
                    pp=1,
                    options={},
                )
            taken = self._taken[key]
            return taken(tokens + 1, 1) - taken(tokens, 1)
        except KvcalcError:  # what it needs (an encoder's length) is not asked here
            return None


def _at(
    report: FitReport, end: int | None, shared: tuple[int, int] | None, *, longest: bool
) -> _Figures:
    """The figures that depend on how much memory there is: as it is estimated, or at an `end` of
    its range; `shared` are one sequence's bytes and those of them that all share.
    """
    balance = report.balance_bytes if end is None else report.balance_range[end]
    needed, available = report.needed_bytes, max(balance, 0)
    tokens: int | None = None
    if shared is None:
        most = report.max_concurrency if end is None else report.max_concurrency_range[end]
        if longest:
            tokens = report.max_tokens if end is None else report.max_tokens_range[end]
    else:
        one, common = shared

        def needs(requests: int) -> int:
            return requests * one - (requests - 1) * common

        needed = needs(report.concurrency)
        most = report.plan.options["max_num_seqs"] or MAX_BATCH
        most = min((available - common) // (one - common), most) if available >= one else 0
        if not report.fits_in(available, needs(1)):
            most = 0
        while most and not report.fits_in(available, needs(most)):  # beside a block never used
            most -= 1
    return {
        "fits": report.fits_in(available, needed),
        "headroom": balance - needed,
        "max_concurrency": most,
        "max_tokens": tokens,
        "needed": needed,
        "kv_memory": available,
    }


def _shared_bytes(deployment: Deployment, model: api.Model, report: FitReport) -> tuple[int, int]:
    """Bytes on a rank of one sequence, and those of its blocks that all requests share.

    vLLM's prefix caching shares whole blocks, so that C requests of S tokens, once the prefix is
    cached, take C × blocks(S) - (C - 1) × (prefix // block) (get_computed_blocks of
    v1/core/kv_cache_manager.py: full blocks alone, and not the last token's). Windows and states
    keep other blocks, drafts give up the last shared one, and other engines share by other rules:
    refused.
    """
    parts = [part for layer in model.architecture.layers for part in layer.parts()]
    plain = all(
        isinstance(part, FullAttention | LatentAttention | IndexKeys | NoCache) for part in parts
    )
    told = report.plan.options
    reasons = {
        f"engine {report.engine}": report.engine != "vllm",
        "windows or states": not plain,
        "prefix caching off": told.get("enable_prefix_caching") is False,
        "drafted tokens": bool(told.get("num_speculative_tokens") or told.get("mtp")),
    }
    for why, holds in reasons.items():
        if holds:
            msg = f"prefix_share is exact for vllm and full attention alone, not for {why}"
            raise UnsupportedError(msg)
    from kvcalc.engines.vllm import pool

    block = pool(model.architecture, report.plan).block_size
    prefix = int(report.seq_tokens * deployment.prefix_share) // block * block
    shared = report.needed_for(prefix, 1) if prefix else 0
    return report.needed_for(report.seq_tokens, 1), shared


def _outcome(requirement: Requirement, figures: _Figures, ends: Sequence[_Figures]) -> Outcome:
    found, *outer = (_found(requirement, one) for one in (figures, *ends))
    holds, *others = (_holds(requirement, one) for one in (figures, *ends))
    decided = all(other == holds for other in others)
    return Outcome(requirement, holds, found, None if decided else (outer[0], outer[1]))


def _holds(requirement: Requirement, figures: _Figures) -> bool:
    """Headroom that nothing fits into, since the engine's pools are smaller, is none."""
    if requirement.figure == "headroom" and ">" in requirement.comparison and not figures["fits"]:
        return False
    return _COMPARISONS[requirement.comparison](_found(requirement, figures), requirement.bound)


def _found(requirement: Requirement, figures: _Figures) -> int | Fraction:
    found = figures[requirement.figure]
    if found is None:
        msg = f"{requirement.text}: that figure is not known for this deployment"
        raise UnsupportedError(msg)
    if isinstance(requirement.bound, Fraction):
        memory = figures["kv_memory"]
        return Fraction(found, memory) if memory else Fraction(-1)
    return found
