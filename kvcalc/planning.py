"""Which machines serve so many requests: every GPU whose memory is known, in as few as fit.

Prices are the user's, from a YAML that is read strictly; none is bundled.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

from kvcalc import api
from kvcalc.budget import engine_defaults
from kvcalc.device import AUTO, IN_FP16, kept_dtype, this_machine
from kvcalc.dtypes import storage_format
from kvcalc.errors import InputError, KvcalcError, UnsupportedError
from kvcalc.fitting import FitReport
from kvcalc.hardware import (
    Gpu,
    Price,
    file_path,
    gpu_ids,
    is_file,
    named_gpu,
    no_figure,
    read_amount,
    read_currency,
)
from kvcalc.sizing import rank_bytes
from kvcalc.strict_yaml import Place, fields, read, record
from kvcalc.units import ceil_div, check_count

SCHEMA = "kvcalc.plan/1"

MAX_GPUS = 64
"""The most GPUs that a plan tries of a kind."""


class Deployment(NamedTuple):
    """`tp` × `pp` GPUs of a kind that hold the requests; `memory_bytes` is what their drivers
    report of all of them together, `fit` the report of each rank, `price_per_hour` that of all.
    """

    gpu: str
    tp: int
    pp: int
    kv_dtype: str
    memory_bytes: int
    fit: FitReport
    price_per_hour: Price | None = None

    @property
    def num_gpus(self) -> int:
        """How many GPUs it takes."""
        return self.tp * self.pp

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        price = self.price_per_hour
        return {
            "gpu": self.gpu,
            "num_gpus": self.num_gpus,
            "tp": self.tp,
            "pp": self.pp,
            "kv_dtype": self.kv_dtype,
            "memory_bytes": self.memory_bytes,
            "price_per_hour": price
            and {
                "value": float(price.value),
                "currency": price.currency,
                "source": price.source,
                "date": price.date and price.date.isoformat(),
            },
            "fit": self.fit.to_dict(),
        }


class LeftOut(NamedTuple):
    """What could not be computed, and the first reason: these KV dtypes of these GPUs."""

    gpus: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    reason: str
    said: str

    def __str__(self) -> str:
        """`l40, l40s: the default depends on …`."""
        return f"{self.said}: {self.reason}"


class PlanReport(NamedTuple):
    """The `deployments` in their order, what is `left_out`, the ids of GPUs whose memory no driver
    is known to have told (`unknown`), how far it is not prices that order them (`unpriced`), the
    ids of GPUs whose rows are fp16 in place of bf16 (`in_fp16`), and of those where the server
    must be told to run so many requests at once (`max_num_seqs`).
    """

    deployments: tuple[Deployment, ...]
    left_out: tuple[LeftOut, ...] = ()
    unknown: tuple[str, ...] = ()
    unpriced: str = ""
    in_fp16: tuple[str, ...] = ()
    max_num_seqs: tuple[str, ...] = ()

    def remarks(self) -> Iterator[str]:
        """What is not told by the deployments, line by line."""
        if self.unpriced:
            yield self.unpriced
        if self.in_fp16:
            yield f"{_enumerated(self.in_fp16)}: {IN_FP16}"
        if self.max_num_seqs:
            requests = self.deployments[0].fit.concurrency
            yield (
                f"{_enumerated(self.max_num_seqs)}: with --max-num-seqs {requests}, for the server "
                "runs fewer at once by itself"
            )
        for one in self.left_out:
            yield f"left out: {one}"
        if self.unknown:
            yield f"left out: {_enumerated(self.unknown)}: no driver's figure of their memory"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; the schema is `kvcalc.plan/1`."""
        return {
            "schema": SCHEMA,
            "deployments": [one.to_dict() for one in self.deployments],
            "left_out": [
                {"gpus": one.gpus, "kv_dtypes": one.kv_dtypes, "reason": one.reason}
                for one in self.left_out
            ],
            "without_known_memory": self.unknown,
            "in_fp16": self.in_fp16,
            "max_num_seqs": self.max_num_seqs,
            "unpriced": self.unpriced,
        }


def plan(
    model: str,
    *,
    gpus: Sequence[str] = (),
    kv_dtypes: Sequence[str] = ("auto", "fp8"),
    max_gpus: int = 8,
    prices: Path | None = None,
    revision: str | None = None,
    **point: Any,  # noqa: ANN401 - parameters of `fit`
) -> PlanReport:
    """For each GPU and KV dtype the fewest ranks that hold the requests, least memory first; those
    that have a price before all others, lowest price first, each currency by itself.

    `gpus` are what `--gpu` takes, none for all whose memory a driver has reported; up to `max_gpus`
    of each are tried, as tensor-parallel ranks before pipeline stages, and where the fewest are
    stages, the fewest ranks alone, too, up to twice as many. A GPU that computes in fp16 alone has
    a cache in fp16. What one GPU or dtype does not allow to compute is left out; raises what `fit`
    raises for a question that none allows.
    """
    check_count(max_gpus, name="--max-gpus", most=MAX_GPUS)
    for kv_dtype in kv_dtypes:
        if kv_dtype.strip().lower() != "auto":
            storage_format(kv_dtype)
    priced = read_prices(prices) if prices else {}
    kinds = {kind.key: kind for kind in (_kind(one, max_gpus, priced) for one in gpus or gpu_ids())}
    unknown = tuple(kind.gpu.id for kind in kinds.values() if not kind.gpu.total_bytes)
    if gpus and unknown and len(unknown) == len(kinds):
        raise no_figure(*unknown)
    known = [kind for kind in kinds.values() if kind.gpu.total_bytes]
    search = _Search(api.read_model(model, revision=revision), point)
    found: dict[tuple[str, str], list[Deployment]] = {}
    for kv_dtype, kind in product(kv_dtypes, known):
        if fits := search.fewest(kind, kv_dtype):
            found[kind.key, fits[0].kv_dtype] = [_deployment(kind, fit) for fit in fits]
    deployments = [one for of_a_kind in found.values() for one in of_a_kind]
    deployments.sort(key=_by_price_and_memory)
    listed = {one.gpu for one in deployments}
    fp16 = {one.gpu for one in deployments if one.kv_dtype == "fp16"}
    return PlanReport(
        tuple(deployments),
        search.left_out(known, kv_dtypes),
        unknown,
        _unpriced(deployments, prices),
        tuple(gpu for gpu in search.in_fp16 if gpu in fp16),
        tuple(gpu for gpu in search.more_requests if gpu in listed),
    )


def _by_price_and_memory(one: Deployment) -> tuple[Any, ...]:
    price = one.price_per_hour
    priced = (0, price.currency, price.value) if price else (1,)
    return (*priced, one.memory_bytes, one.num_gpus, one.gpu, one.kv_dtype)


def _unpriced(found: Sequence[Deployment], prices: Path | None) -> str:
    """How far deployments are not ordered by price although there are prices."""
    priced = [one.price_per_hour for one in found if one.price_per_hour]
    if not found or not (priced or prices):
        return ""
    if not priced:
        return "none has a price: ordered by memory"
    said = []
    if len(currencies := sorted({price.currency for price in priced})) > 1:
        said.append(f"prices in {' and '.join(currencies)}, each ordered by itself")
    if without := len(found) - len(priced):
        said.append(f"without a price: {without} of {len(found)}, last and ordered by memory")
    return "; ".join(said)


def _enumerated(gpus: Sequence[str]) -> str:
    """The GPUs by name where there are few of them."""
    return ", ".join(gpus) if len(gpus) <= 4 else f"{len(gpus)} GPUs"


class _Kind(NamedTuple):
    """A GPU, what tells it from others, how many of it may be taken, and the price of one."""

    gpu: Gpu
    key: str
    most: int
    price: Price | None

    @property
    def total_bytes(self) -> int:
        return self.gpu.total_bytes.value if self.gpu.total_bytes else 0


def _kind(given: str, most: int, priced: Mapping[str, Price]) -> _Kind:
    if given == AUTO:
        machine = this_machine()
        price = priced.get(machine.gpu.id)
        return _Kind(machine.gpu, AUTO, min(most, machine.num_gpus), price)
    gpu = named_gpu(given)
    key = _key(given, gpu)
    return _Kind(gpu, key, most, priced.get(key, gpu.price_per_hour))


def _key(said: str, gpu: Gpu) -> str:
    """A GPU's id, or the resolved path of its file."""
    return str(file_path(said).resolve()) if is_file(said) else gpu.id


def _deployment(kind: _Kind, fit: FitReport) -> Deployment:
    tp, pp, price = fit.plan.tp, fit.plan.pp, kind.price
    return Deployment(
        gpu=kind.gpu.id,
        tp=tp,
        pp=pp,
        kv_dtype=fit.kv_dtype,
        memory_bytes=tp * pp * kind.total_bytes,
        fit=fit,
        price_per_hour=price and price._replace(value=tp * pp * price.value),
    )


class _Search:
    """Looks for the fewest GPUs. `first` is the first report there was, None while everything was
    refused: it knows the weights, and from then on what cannot fit is not fitted.
    """

    def __init__(self, model: api.Model, point: Mapping[str, Any]) -> None:
        self.first: FitReport | None = None
        self._model = model
        self._point = point
        self._engine = point.get("engine") or "vllm"
        self._heads = api.attention_heads(model)
        self._layers = len(model.architecture.layers)
        self._least: dict[tuple[Any, ...], int | UnsupportedError] = {}
        self._dtypes: set[str] = set()
        self._answered: dict[tuple[str, str], int] = {}
        self._refusals: dict[tuple[str, str], KvcalcError] = {}
        self.in_fp16: dict[str, None] = {}
        """The GPUs that were asked for fp16 in place of bf16."""
        self.more_requests: dict[str, None] = {}
        """The GPUs whose server was asked for more requests at once than it runs by itself."""

    def fewest(self, kind: _Kind, kv_dtype: str) -> list[FitReport]:
        """The report of the fewest GPUs that hold the requests, if any number does; where these are
        pipeline stages, also that of the fewest tensor-parallel ranks alone, up to twice as many.
        """
        fits = list(islice(self._fitting(kind, kv_dtype, self._shapes(kind.most)), 1))
        if fits and fits[0].plan.pp > 1:
            fewest = fits[0].plan.tp * fits[0].plan.pp
            more = range(fewest + 1, min(2 * fewest, kind.most) + 1)
            alone = ((tp, 1) for tp in more if self._heads % tp == 0)
            fits += islice(self._fitting(kind, kv_dtype, alone), 1)
        if fits:
            self._refusals.pop((kind.key, kv_dtype), None)
        return fits

    def _fitting(
        self, kind: _Kind, kv_dtype: str, shapes: Iterable[tuple[int, int]]
    ) -> Iterator[FitReport]:
        """The reports of those shapes that hold the requests. What is refused is passed over."""
        asked = kind.key, kv_dtype
        try:
            kept = kept_dtype(kind.gpu, self._engine, kv_dtype, self._model.architecture)
        except UnsupportedError as error:
            self._refuse(asked, 0, error)
            return
        if kept != kv_dtype:
            self.in_fp16[kind.gpu.id] = None
        for tp, pp in shapes:
            try:
                if self._least_bytes(kind, kept, tp, pp) > kind.total_bytes:
                    self._answer(asked, tp * pp)
                    continue
                point = {**self._point, "options": self._options(kind.gpu)}
                fit = api.fit(self._model, gpu=kind.gpu, kv_dtype=kept, tp=tp, pp=pp, **point)
            except UnsupportedError as error:
                self._refuse(asked, tp * pp, error)
                continue
            except InputError as error:
                if type(error) is not InputError:  # of the model, the Hub, or what is installed
                    raise
                self._refuse(asked, tp * pp, error)
                return
            self._answer(asked, tp * pp)
            self._dtypes.add(kv_dtype)
            self.first = self.first or fit
            if fit.fits:
                yield fit

    def _options(self, gpu: Gpu) -> dict[str, Any]:
        """The engine's options on this GPU: the user's, else what its server takes, with room for
        as many requests as are asked for.
        """
        options = engine_defaults(self._engine, gpu)
        asked = self._point.get("concurrency") or 1
        given = self._point.get("options") or {}
        if options.get("max_num_seqs", asked) < asked and "max_num_seqs" not in given:
            options["max_num_seqs"] = asked
            self.more_requests[gpu.id] = None
        return {**options, **given}

    def _answer(self, asked: tuple[str, str], num_gpus: int) -> None:
        """So many could be computed: a refusal of fewer, or of another split, decides nothing."""
        self._answered[asked] = num_gpus
        self._refusals.pop(asked, None)

    def _refuse(self, asked: tuple[str, str], num_gpus: int, error: KvcalcError) -> None:
        if self._answered.get(asked) != num_gpus:
            self._refusals.setdefault(asked, error)

    def _shapes(self, most: int) -> Iterator[tuple[int, int]]:
        """1, 2, … GPUs as tensor-parallel ranks × pipeline stages, most ranks first. Engines give
        each rank whole query heads, and each stage a layer; which KV heads go with them is for the
        sizing to refuse.
        """
        for num_gpus in range(1, most + 1):
            for tp in range(num_gpus, 0, -1):
                pp = num_gpus // tp
                if tp * pp == num_gpus and self._heads % tp == 0 and pp <= self._layers:
                    yield tp, pp

    def _least_bytes(self, kind: _Kind, kv_dtype: str, tp: int, pp: int) -> int:
        """A bound: an even part of the weights, and the cache unless they alone are too much.
        Nothing is known before the first report.
        """
        if self.first is None:
            return 0
        weights = ceil_div(self.first.weights_bytes or 0, tp * pp)
        if weights > kind.total_bytes:
            return weights
        options = self._options(kind.gpu)
        key = (kv_dtype, tp, pp, *options.values())
        if key not in self._least:
            try:
                self._least[key] = self._cache_bytes(self.first, kv_dtype, tp, pp, options)
            except UnsupportedError as error:
                self._least[key] = error
        least = self._least[key]
        if isinstance(least, UnsupportedError):
            raise least
        return weights + least

    def _cache_bytes(
        self, first: FitReport, kv_dtype: str, tp: int, pp: int, options: Mapping[str, Any]
    ) -> int:
        """What the requests take of each rank."""
        cache, _ = rank_bytes(
            self._model.architecture,
            kv_dtype=kv_dtype,
            engine=first.engine,
            tp=tp,
            pp=pp,
            options=options,
        )
        return cache(first.seq_tokens, first.concurrency)

    def left_out(self, kinds: Sequence[_Kind], kv_dtypes: Sequence[str]) -> tuple[LeftOut, ...]:
        """The GPUs and dtypes that were refused before any number of them did; raises the first
        reason where nothing at all could be computed.
        """
        if self.first is None and self._refusals:
            raise next(iter(self._refusals.values()))
        ids = {kind.key: kind.gpu.id for kind in kinds}
        reasons: dict[str, dict[tuple[str, str], None]] = {}
        for asked, error in self._refusals.items():
            reasons.setdefault(str(error), {})[asked] = None
        left = []
        for reason, refused in reasons.items():
            gpus = tuple(dict.fromkeys(ids[key] for key, _ in refused))
            dtypes = tuple(dict.fromkeys(kv_dtype for _, kv_dtype in refused))
            said = [_enumerated(gpus)] if self._dtypes & {*dtypes} else []
            if {*dtypes} != {*kv_dtypes}:
                said.append(f"--kv-dtype {', '.join(dtypes)}")
            left.append(LeftOut(gpus, dtypes, reason, " with ".join(said)))
        return tuple(left)


PRICES = "; such as currency: USD, per_gpu_hour: {h100-sxm-80gb: 2.49, ./mine.yaml: 0.80}"
"""What a message on a file of prices ends in."""


def read_prices(path: Path) -> dict[str, Price]:
    """What an hour of one GPU costs, by its id or the resolved path of its file.

        currency: USD
        per_gpu_hour:
          h100-sxm-80gb: 2.49
          ./my-gpu.yaml: 0.80

    A file's path counts from that of the prices. InputError with line and key for what is wrong.
    """
    place, root = read(path, remedy=PRICES)
    at = record(place, root, ("currency", "per_gpu_hour"), remedy=PRICES)
    currency = read_currency(*at["currency"])
    prices: dict[str, Price] = {}
    for said, here, node in fields(*at["per_gpu_hour"], remedy=PRICES):
        named = str(path.parent / file_path(said)) if is_file(said) else said
        key = _key(named, _priced_gpu(here, named))
        if key in prices:
            msg = f"the same GPU as above: {key}"
            raise here.wrong(msg)
        prices[key] = Price(read_amount(here, node), currency, source=here.file)
    return prices


def _priced_gpu(place: Place, named: str) -> Gpu:
    try:
        return named_gpu(named)
    except InputError as error:
        raise place.wrong(str(error)) from None
