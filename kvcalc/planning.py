"""Which machines serve so many requests: every GPU whose memory is known, in as few as fit.

Prices are the user's, from a YAML that is read strictly; none is bundled.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvcalc import api
from kvcalc.budget import engine_defaults
from kvcalc.device import AUTO, this_machine
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.fitting import FitReport
from kvcalc.hardware import (
    Gpu,
    Price,
    gpu_ids,
    is_file,
    load_gpu,
    named_gpu,
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


def plan(
    model: str,
    *,
    gpus: Sequence[str] = (),
    kv_dtypes: Sequence[str] = ("auto", "fp8"),
    max_gpus: int = 8,
    prices: Path | None = None,
    revision: str | None = None,
    **point: Any,  # noqa: ANN401 - parameters of `fit`
) -> list[Deployment]:
    """For each GPU and KV dtype the fewest ranks that hold the requests, least memory first; where
    all of them have a price in one currency, lowest price first.

    `gpus` are ids, YAML files or `auto`, none for all whose memory a driver has reported; up to
    `max_gpus` of each are tried, as tensor-parallel ranks before pipeline stages. Raises what
    `fit` raises for a model, an engine or a value that no deployment can take.
    """
    check_count(max_gpus, name="--max-gpus", most=MAX_GPUS)
    priced = read_prices(prices) if prices else {}
    kinds = {name: _kind(name, max_gpus, priced) for name in gpus or gpu_ids()}
    unknown = [kind.gpu.id for kind in kinds.values() if not kind.gpu.total_bytes]
    if gpus and unknown:
        msg = (
            f"no driver's figure of the memory of {', '.join(unknown)} is known; leave it out, or "
            "give a YAML with usable_bytes"
        )
        raise InputError(msg)
    search = _Search(api.read_model(model, revision=revision), point)
    found: dict[tuple[str, str], Deployment] = {}
    for kv_dtype in kv_dtypes:
        for name, kind in kinds.items():
            if (fit := search.fewest(kind, kv_dtype)) is not None:
                found[name, fit.size.kv_dtype] = _deployment(kind, fit)
    if not found and search.first is None:
        raise search.refusals[0]
    return _ordered(list(found.values()))


def _ordered(found: list[Deployment]) -> list[Deployment]:
    found.sort(key=lambda one: (one.memory_bytes, one.num_gpus, one.gpu, one.kv_dtype))
    prices = [one.price_per_hour for one in found if one.price_per_hour]
    if len(prices) == len(found) and len({price.currency for price in prices}) == 1:
        found.sort(key=lambda one: one.price_per_hour.value if one.price_per_hour else 0)
    return found


class _Kind(NamedTuple):
    """A GPU, how many of it may be taken, and the price of one."""

    gpu: Gpu
    most: int
    price: Price | None

    @property
    def total_bytes(self) -> int:
        return self.gpu.total_bytes.value if self.gpu.total_bytes else 0


def _kind(given: str, most: int, priced: Mapping[str, Price]) -> _Kind:
    if given == AUTO:
        machine = this_machine()
        return _Kind(machine.gpu, min(most, machine.num_gpus), priced.get(machine.gpu.id))
    gpu = named_gpu(given)
    return _Kind(gpu, most, priced.get(_price_key(given), gpu.price_per_hour))


def _deployment(kind: _Kind, fit: FitReport) -> Deployment:
    tp, pp, price = fit.size.tp, fit.size.pp, kind.price
    return Deployment(
        gpu=kind.gpu.id,
        tp=tp,
        pp=pp,
        kv_dtype=fit.size.kv_dtype,
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
        self.refusals: list[UnsupportedError] = []
        self._model = model
        self._point = point
        self._heads = api.attention_heads(model)
        self._refused: set[tuple[str, int, int]] = set()
        self._least: dict[tuple[Any, ...], int] = {}

    def fewest(self, kind: _Kind, kv_dtype: str) -> FitReport | None:
        """The report of the fewest GPUs that hold the requests, if any number does."""
        for tp, pp in self._shapes(kind.most):
            least = self._least_bytes(kind, kv_dtype, tp, pp)
            if least is None or least > kind.total_bytes:
                continue
            try:
                fit = api.fit(
                    self._model, gpu=kind.gpu, kv_dtype=kv_dtype, tp=tp, pp=pp, **self._point
                )
            except UnsupportedError as error:
                self._refuse(error, kv_dtype, tp, pp)
                continue
            self.first = self.first or fit
            if fit.fits:
                return fit
        return None

    def _shapes(self, most: int) -> Iterator[tuple[int, int]]:
        """1, 2, … GPUs as tensor-parallel ranks × pipeline stages, most ranks first. Engines give
        each rank whole query heads; which KV heads go with them is for the sizing to refuse.
        """
        for num_gpus in range(1, most + 1):
            for tp in range(num_gpus, 0, -1):
                if num_gpus % tp == 0 and self._heads % tp == 0:
                    yield tp, num_gpus // tp

    def _least_bytes(self, kind: _Kind, kv_dtype: str, tp: int, pp: int) -> int | None:
        """A bound: an even part of the weights, and the cache unless they alone are too much.
        None for a shape that is refused; nothing is known before the first report.
        """
        if (kv_dtype, tp, pp) in self._refused:
            return None
        if self.first is None:
            return 0
        weights = ceil_div(self.first.weights_bytes or 0, tp * pp)
        if weights > kind.total_bytes:
            return weights
        engine = self.first.size.engine
        defaults = engine_defaults(engine, kind.gpu)
        key = (kv_dtype, tp, pp, *defaults.values())
        if key not in self._least:
            try:
                cache, _ = rank_bytes(
                    self._model.architecture,
                    kv_dtype=kv_dtype,
                    engine=engine,
                    tp=tp,
                    pp=pp,
                    options=defaults | (self._point.get("options") or {}),
                )
            except UnsupportedError as error:
                self._refuse(error, kv_dtype, tp, pp)
                return None
            requested = (self.first.size.seq_tokens, self.first.concurrency)
            self._least[key] = weights + cache(*requested)
        return self._least[key]

    def _refuse(self, error: UnsupportedError, kv_dtype: str, tp: int, pp: int) -> None:
        """A refusal is about the shape, whatever the GPU."""
        self.refusals.append(error)
        self._refused.add((kv_dtype, tp, pp))


def read_prices(path: Path) -> dict[str, Price]:
    """What an hour of one GPU costs, by its id or the resolved path of its file.

        currency: USD
        per_gpu_hour:
          h100-sxm-80gb: 2.49
          ./my-gpu.yaml: 0.80

    A file's path counts from that of the prices. InputError with line and key for what is wrong.
    """
    place, root = read(path)
    at = record(place, root, ("currency", "per_gpu_hour"))
    currency = read_currency(*at["currency"])
    prices: dict[str, Price] = {}
    for said, here, node in fields(*at["per_gpu_hour"]):
        key = _price_key(said, path.parent)
        if key in prices:
            msg = f"the same file as above: {key}"
            raise here.wrong(msg)
        _check_named(here, said, key)
        prices[key] = Price(read_amount(here, node), currency, source=here.file)
    return prices


def _check_named(place: Place, said: str, key: str) -> None:
    try:
        named_gpu(key) if is_file(said) else load_gpu(said)
    except InputError as error:
        raise place.wrong(str(error)) from None


def _price_key(said: str, folder: Path = Path()) -> str:
    return str((folder / Path(said).expanduser()).resolve()) if is_file(said) else said
