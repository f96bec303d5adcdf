"""A GPU's nine minutes: every claim about CUDA that this project makes, most important first.

    python benchmarks/gpu.py [--minutes 9] [--out FILE] [--only PART,…] [--tiny] [--plan]

Needs a checkout and what `kvcalc profile` needs, nothing installed; the model is Llama-3-8B with
random weights. Each row is printed, and written to profiles/measurements/DATE-DEVICE.jsonl, when it
is there, so that a cut loses the one in flight; what would not end in time is skipped; the last
thing printed is a table of goals. `--plan` prints what each part takes on an H200 by its published
figures, `--tiny` runs the same code on a CPU with a model of two layers.
"""

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from kvcalc.measure.workload import Workload

    Call = Callable[[Tensor], Tensor]

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROW_SCHEMA = "kvcalc.gpu-row/1"
KV_HEADS, QUERY_HEADS, WIDTH = 8, 32, 128
"""Of a layer of Llama-3-8B."""

REACHED = 0.5
"""The part of the compute ceiling that a prefill is supposed to reach when its time is guessed: the
flash attention of torch is that of GPUs before Hopper.
"""

STEP_SECONDS = 0.04
"""A decode step that is launched one by one, guessed likewise."""

COLD_BYTES = 2**30
"""Buffers that take turns are as many as have this size, many times a GPU's L2."""


class Point(NamedTuple):
    """A profile: prompt tokens, strategies, warm-up and timed runs."""

    tokens: int
    strategies: str
    warmup: int
    repeats: int


class Size(NamedTuple):
    """What differs between the real run and the tiny one."""

    model: str
    dtype: str
    decode: int
    points: tuple[Point, Point, Point]
    offload: tuple[int, int]


REAL = Size(
    "meta-llama/Meta-Llama-3-8B",
    "bf16",
    33,
    (
        Point(8192, "dynamic,static,int4,fp8,snapkv", 1, 3),
        Point(32768, "dynamic,static,int4", 0, 2),
        # Not here: h2o, none, ragged strategies; fp8 widens the whole cache in each step.
        Point(131_072, "dynamic,static,int4", 0, 1),
    ),
    (8192, 32768),
)
TINY = Size(
    "tiny",
    "fp32",
    6,
    (
        Point(48, "dynamic,static,int4:residual=0,fp8,snapkv:budget=24,window=8", 1, 3),
        Point(64, "dynamic,static,int4:residual=0", 0, 2),
        Point(80, "dynamic,static,int4:residual=0", 0, 1),
    ),
    (48, 64),
)
TINY_CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


class Goal(NamedTuple):
    """A goal, what was measured of it, and whether that meets it."""

    name: str
    measured: str
    met: bool | None


class Bench:
    """What the parts share: the file, the clock, the goals, and the model once it is loaded."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny: bool = options.tiny
        self.size = TINY if options.tiny else REAL
        self.deadline = STARTED + 60 * options.minutes
        self.out: Path = options.out
        self.goals: list[Goal] = []
        self.rows: list[dict[str, Any]] = []
        self.loaded: Any = None
        self.device: Any = None

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def write(self, part: str, **fields: object) -> None:
        """Keep a row of a part's own, with the state of the GPU at this moment, and print it."""
        from kvcalc.measure import nvml

        state = nvml.state(self.device) if self.device is not None else {}
        row = {"schema": ROW_SCHEMA, "part": part, **fields, "state": state}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        told = ", ".join(f"{name} {_short(value)}" for name, value in fields.items())
        say(f"{part}: {told}")

    def goal(self, name: str, measured: str, *, met: bool) -> None:
        """Note a goal for the last table."""
        self.goals.append(Goal(name, measured, met))

    def fast(self, name: str, measured: str, *, met: bool) -> None:
        """A goal that a CPU's times say nothing of."""
        self.goals.append(Goal(name, measured, None if self.tiny else met))


def say(text: str) -> None:
    """Print a line at once, with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# The parts, in their order.


def machine(bench: Bench) -> None:
    """Imports, versions, ceilings, and the model built on the device."""
    start = time.monotonic()
    import torch

    from kvcalc.measure import require_torch

    require_torch()
    from kvcalc.measure import light, models, record

    bench.device = torch.device("cpu" if bench.tiny else "cuda")
    imports = time.monotonic() - start
    conditions = record.conditions(bench.device)
    triton = _version("triton")
    start = time.monotonic()
    ceilings = light.device_ceilings(bench.device, bench.size.dtype)
    probe = time.monotonic() - start
    bench.write(
        "machine",
        import_seconds=imports,
        probe_seconds=probe,
        bytes_per_second=ceilings.bytes_per_second,
        flops_per_second=ceilings.flops_per_second,
        ceilings=ceilings.source,
        triton=triton,
        cudnn=torch.backends.cudnn.version(),
        conditions=conditions,
    )
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = bench.size.model
        if bench.tiny:
            model = str(Path(folder) / "config.json")
            Path(model).write_text(json.dumps(TINY_CONFIG), encoding="utf-8")
        bench.loaded = models.load_model(
            model,
            weights="random",
            num_layers=None,
            dtype=bench.size.dtype,
            device=bench.device,
            seed=0,
            revision=None,
        )
    if not bench.tiny:
        torch.cuda.synchronize()
    built = time.monotonic() - start
    parameters = sum(weight.numel() for weight in bench.loaded.model.parameters())
    bench.write("model", build_seconds=built, parameters=parameters)
    bench.fast("model built on the device in ≤ 15 s", f"{built:.1f} s", met=built <= 15)


def kernels(bench: Bench) -> None:
    """Both decode kernels against fp64, and a captured step against an eager one."""
    import torch

    worst = 0.0
    query, tokens = _query(bench), 100 if bench.tiny else 4133
    for name, kernel in _attentions(bench).items():
        if name.startswith(("flash", "cudnn")):
            continue
        made = kernel(query, tokens)
        found, expected = made.call(query), made.exact(query)
        error = ((found.double() - expected).norm() / expected.norm()).item()
        worst = max(worst, error)
        bench.write("kernel", kernel=name, tokens=tokens, relative_error=error)
    if worst:
        # bf16 rounds scores, weights and values to 8 bits each.
        most = 1e-4 if bench.tiny else 1e-2
        bench.goal(f"decode kernels within {most} of fp64", f"{worst:.1e}", met=0 <= worst <= most)
    from kvcalc.measure.feeds import random_feed
    from kvcalc.measure.session import Session, undisturbed
    from kvcalc.measure.workload import Workload
    from kvcalc.strategies import load_strategy

    workload = Workload(100, 5, batch=1, repeats=1, warmup=0, seed=1)
    feed = random_feed(bench.loaded, workload)
    answers = []
    for capture in (False, True):
        chosen = load_strategy("static")
        with undisturbed(bench.loaded, chosen):
            session = Session(bench.loaded, chosen, workload)
            logits = session.prefill(feed.prompt)
            if capture:
                session.prepare_decode(logits)
            answers.append(torch.stack([session.decode(step) for step in feed.steps]).float())
            mode = session.mode
    difference = (answers[0] - answers[1]).abs().max().item()
    bench.write("capture", mode=mode, max_logit_difference=difference)
    met = difference <= 1e-2 and (mode == "CUDA graph" or bench.tiny)
    bench.goal("a captured step answers as an eager one", f"{mode}, Δ {difference:.1e}", met=met)


def attention(bench: Bench) -> None:
    """One layer's decode step at three lengths: packed and static kernels, flash and cuDNN."""
    import torch

    best: dict[tuple[int, str], float] = {}
    ceiling = next(row for row in bench.rows if row["part"] == "machine")["bytes_per_second"]
    query = _query(bench)
    for point in bench.size.points:
        for name, kernel in _attentions(bench).items():
            made = [kernel(query, point.tokens)]
            num_bytes = made[0].num_bytes
            while len(made) * num_bytes < COLD_BYTES and not bench.tiny:
                made.append(kernel(query, point.tokens))
            try:
                seconds = _seconds([partial(one.call, query) for one in made])
            except RuntimeError as error:  # a shape or a build that a backend does not take
                reason = str(error).partition("\n")[0][:120]
                bench.write("attention", kernel=name, tokens=point.tokens, failed=reason)
                continue
            bench.write(
                "attention",
                kernel=name,
                tokens=point.tokens,
                seconds=seconds,
                num_bytes=num_bytes,
                of_bandwidth=num_bytes / seconds / ceiling,
                buffers=len(made),
            )
            kind = point.tokens, name.partition(",")[0]
            best[kind] = min(seconds, best.get(kind, seconds))
            del made
            if not bench.tiny:
                torch.cuda.empty_cache()
    longest = bench.size.points[-1].tokens
    if {(longest, "flash"), (longest, "int4")} <= best.keys():
        ratio = best[longest, "int4"] / best[longest, "flash"]
        bench.fast(f"int4 attention ≤ 1.0× flash at {longest:,}", f"{ratio:.2f}×", met=ratio <= 1)


def profiles(number: int) -> Callable[[Bench], None]:
    """One of the points, with the real profiler."""

    def part(bench: Bench) -> None:
        point = bench.size.points[number]
        _profile(bench, point.tokens, point.strategies, point.warmup, point.repeats)

    part.__doc__ = "Prefill and decode of each strategy at one length."
    return part


def offload(bench: Bench) -> None:
    """Host memory is locked and let go in a process of its own, away from other rows' times."""
    command = [sys.executable, __file__, "--only", "machine,offloaded", "--out", str(bench.out)]
    command += ["--minutes", f"{bench.left / 60:.2f}"] + ["--tiny"] * bench.tiny
    before = bench.out.stat().st_size
    try:
        subprocess.run(command, check=False, timeout=max(bench.left, 1))
    finally:
        with bench.out.open(encoding="utf-8") as file:
            file.seek(before)
            bench.rows += [row for row in map(json.loads, file) if row["schema"] != ROW_SCHEMA]


def offloaded(bench: Bench) -> None:
    """What `offload` runs in its process."""
    for tokens in bench.size.offload:
        _profile(bench, tokens, "offload", 0, 1)


PARTS: dict[str, tuple[int, Callable[[Bench], None]]] = {
    "machine": (50, machine),
    "kernels": (40, kernels),
    "attention": (60, attention),
    "8k": (60, profiles(0)),
    "32k": (60, profiles(1)),
    "128k": (150, profiles(2)),
    "offload": (40, offload),
}
"""Seconds that each may take on an H200; 80 of nine minutes are spare."""

INNER = {"offloaded": (0, offloaded)}


# What the parts are made of.


class Attention(NamedTuple):
    """One layer's keys and values: what attends to them, the same in fp64, and their bytes."""

    call: "Call"
    exact: "Call"
    num_bytes: int


def _query(bench: Bench) -> "Tensor":
    """A query of one token [1, query heads, 1, width]."""
    import torch

    kind = torch.float32 if bench.tiny else torch.bfloat16
    return torch.randn(1, QUERY_HEADS, 1, WIDTH, dtype=kind, device=bench.device)


def _rows_of(query: "Tensor", tokens: int) -> "tuple[Tensor, Tensor]":
    """Random keys and values [1, KV heads, tokens, width], alike in dtype and place."""
    keys, values = (query.new_empty(1, KV_HEADS, tokens, WIDTH).normal_() for _ in range(2))
    return keys, values


def _exact(keys: "Tensor", values: "Tensor") -> "Call":
    """Attention to them in fp64."""
    return lambda query: _sdpa(query.double(), keys.double(), values.double())


def _sdpa(query: "Tensor", keys: "Tensor", values: "Tensor") -> "Tensor":
    from torch.nn.functional import scaled_dot_product_attention

    output = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    return output.transpose(1, 2)


def _by_backend(backend: str, query: "Tensor", tokens: int) -> Attention:
    """SDPA by one of its backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    keys, values = _rows_of(query, tokens)

    def call(query: "Tensor") -> "Tensor":
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return _sdpa(query, keys, values)

    return Attention(call, _exact(keys, values), keys.nbytes + values.nbytes)


def _by_counter(query: "Tensor", tokens: int) -> Attention:
    """The kernel of the static cache, which reads the number of tokens on the device."""
    import torch

    from kvcalc.strategies._plain_attention import attend

    keys, values = _rows_of(query, tokens)
    visible = torch.tensor([tokens], device=query.device)

    def call(query: "Tensor") -> "Tensor":
        return attend(query, keys, values, visible, scaling=WIDTH**-0.5)

    return Attention(call, _exact(keys, values), keys.nbytes + values.nbytes)


def _by_packed(bits: int, warps: int | None, query: "Tensor", tokens: int) -> Attention:
    """The kernel of packed caches: groups of 32 tokens, and a tail of one to two groups."""
    from kvcalc.strategies._packed_attention import PackedTokens, attend
    from kvcalc.strategies._packed_cache import Packed

    sides = []
    for states, per_channel in zip(_rows_of(query, tokens), (True, False), strict=True):
        tail = 32 + tokens % 32
        done, rest = states.split([tokens - tail, tail], dim=2)
        packed = Packed.of(done, bits=bits, group=32, per_channel=per_channel)
        sides.append(PackedTokens(packed, rest.contiguous(), bits))
    keys, values = sides
    settings = {"num_warps": warps} if warps else None

    def call(query: "Tensor") -> "Tensor":
        return attend(query, keys, values, scaling=WIDTH**-0.5, settings=settings)

    num_bytes = sum(part.nbytes for side in sides for part in (*side.packed, side.tail))
    return Attention(call, _exact(keys, values), num_bytes)  # which dequantises them


def _attentions(bench: Bench) -> "dict[str, Callable[[Tensor, int], Attention]]":
    """The ways to attend to all tokens of a layer, each for a query and a number of tokens.

    Kernels of Triton run on CUDA, and on a CPU in its interpreter; without Triton there are none.
    """
    found: dict[str, Callable[[Tensor, int], Attention]] = {}
    if not bench.tiny:
        found["flash"] = partial(_by_backend, "FLASH_ATTENTION")
        found["cudnn"] = partial(_by_backend, "CUDNN_ATTENTION")
    if _version("triton") is None:
        return found
    found["static"] = _by_counter
    for bits in (4,) if bench.tiny else (4, 8, 2):
        for warps in (None,) if bench.tiny else (None, 1, 2, 4):
            name = f"int{bits}" + (f", {warps} warps" if warps else "")
            found[name] = partial(_by_packed, bits, warps)
    return found


def _seconds(calls: list[Callable[[], Any]]) -> float:
    """The median time of one of the calls, which take turns; on CUDA in a graph, so that launching
    is no part of it.
    """
    import torch

    if not torch.cuda.is_available():
        calls[0]()
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[3]


def _profile(bench: Bench, tokens: int, strategies: str, warmup: int, repeats: int) -> None:
    """Rows of the profiler at one length, those left out that would not end in time."""
    from kvcalc.measure.profile import RowFile, profile
    from kvcalc.measure.workload import Workload
    from kvcalc.strategies import load_strategies

    workload = Workload(tokens, bench.size.decode, 1, repeats, warmup, seed=0)
    chosen = load_strategies([strategies])
    expected = _guess(bench, workload)
    fitting = chosen[: max(0, int(bench.left / expected))]
    for skipped in chosen[len(fitting) :]:
        bench.write("skipped", strategy=skipped.name, tokens=tokens, guessed_seconds=expected)

    def tell(what: str) -> None:
        if bench.left < 0:
            msg = f"the time is over before {what}"
            raise TimeoutError(msg)

    file = RowFile(bench.out)
    try:
        for row in profile(bench.loaded, fitting, workload, file=file, in_turns=False, tell=tell):
            bench.rows.append(row)
            _tell_row(row)
    finally:
        file.close()


def _guess(bench: Bench, workload: "Workload") -> float:
    """Seconds that a strategy takes at a workload."""
    from kvcalc.measure import light

    ceilings = light.device_ceilings(bench.device, bench.size.dtype)
    prefill = light.prefill_work(bench.loaded, workload.prompt_tokens, workload.batch)
    return _seconds_of(workload, prefill.seconds(ceilings))


def _seconds_of(workload: "Workload", prefill_seconds: float) -> float:
    """Of one strategy: a run that counts, warm-up and timed runs."""
    runs = 1 + workload.warmup + workload.repeats
    steps = workload.decode_tokens * STEP_SECONDS
    return float(runs * (prefill_seconds / REACHED + steps))


def _tell_row(row: dict[str, Any]) -> None:
    """A row of the profiler against its floor."""
    name, tokens = row["strategy"], row["conditions"]["prompt_tokens"]
    if row["tpot_seconds"] is None:
        say(f"{name} at {tokens:,}: {row['status']}: {row['reason']}")
        return
    light = row["speed_of_light"]
    busy = "" if row["busy_seconds"] is None else f", busy {row['busy_seconds'] * 1e3:.2f}"
    say(
        f"{name} at {tokens:,}: {row['status']}, TTFT {row['ttft_seconds']['median']:.3f} s "
        f"(floor {light['ttft_seconds']:.3f}), TPOT {row['tpot_seconds']['median'] * 1e3:.2f} ms"
        f"{busy} (floor {light['tpot_seconds'] * 1e3:.2f}, expected "
        f"{light['expected_tpot_seconds'] * 1e3:.2f}), {row['decode_mode']}, {row['attention']}"
    )


def _version(package: str) -> str | None:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return None


def _judge(bench: Bench) -> None:
    """The goals that are about rows of the profiler."""
    rows = {
        (row["strategy"], row["conditions"]["prompt_tokens"]): row
        for row in bench.rows
        if row.get("tpot_seconds")
    }
    shortest, _, longest = (point.tokens for point in bench.size.points)
    static = rows.get(("static", shortest))
    if static:
        ratio = static["tpot_seconds"]["median"] / static["speed_of_light"]["tpot_seconds"]
        bench.fast(
            f"static TPOT ≤ 1.5× its floor at {shortest:,}", f"{ratio:.2f}×", met=ratio <= 1.5
        )
    int4, dynamic = rows.get(("int4", longest)), rows.get(("dynamic", longest))
    if int4 and dynamic:
        ratio = int4["tpot_seconds"]["median"] / dynamic["tpot_seconds"]["median"]
        busy = ""
        if int4["busy_seconds"] and dynamic["busy_seconds"]:
            busy = f" (busy {int4['busy_seconds'] / dynamic['busy_seconds']:.2f}×)"
        bench.fast(
            f"int4 TPOT ≤ 1.0× dynamic at {longest:,}", f"{ratio:.2f}×{busy}", met=ratio <= 1
        )
    near = []
    for row in rows.values():
        measured = row["busy_seconds"] or row["tpot_seconds"]["median"]
        if row["strategy"] != "offload":
            near.append(abs(row["speed_of_light"]["expected_tpot_seconds"] / measured - 1) <= 0.2)
    if near:
        bench.fast(
            "expected TPOT within 20 % of the device's for most rows",
            f"{sum(near)} of {len(near)}",
            met=2 * sum(near) > len(near),
        )
    broken = [row["strategy"] for row in rows.values() if row["status"] != "ok"]
    bench.goal("predicted = held in every row", ", ".join(broken) or "all", met=not broken)


def _print_rows(bench: Bench) -> None:
    """Each row of the profiler against its floor, in milliseconds but for the prefill."""
    named = f"{'TTFT s':>8} {'floor':>7} {'TPOT':>8} {'busy':>8} {'expected':>8} {'floor':>7}"
    print(f"\n{'tokens':>8} {'strategy':<10} {named}  decode")
    for row in bench.rows:
        if row.get("tpot_seconds"):
            light, tokens = row["speed_of_light"], row["conditions"]["prompt_tokens"]
            busy = f"{row['busy_seconds'] * 1e3:8.2f}" if row["busy_seconds"] else f"{'-':>8}"
            print(
                f"{tokens:>8,} {row['strategy']:<10} {row['ttft_seconds']['median']:>8.3f} "
                f"{light['ttft_seconds']:>7.3f} {row['tpot_seconds']['median'] * 1e3:>8.2f} {busy} "
                f"{light['expected_tpot_seconds'] * 1e3:>8.2f} {light['tpot_seconds'] * 1e3:>7.2f}"
                f"  {row['decode_mode']}"
            )


def _print_goals(bench: Bench) -> None:
    print(f"\n{'goal':<56} {'measured':<26} met")
    for goal in bench.goals:
        met = {True: "yes", False: "no", None: "-"}[goal.met]
        print(f"{goal.name:<56} {goal.measured:<26} {met}")
    print(f"\n{time.monotonic() - STARTED:.0f} s in all; rows in {bench.out}")


def print_plan() -> None:
    """What the profiled parts take on an H200 by its published figures, nine and eight tenths of
    which are reached, beside the time that they are given.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from kvcalc import sources
    from kvcalc.families import describe
    from kvcalc.hardware import find_gpu
    from kvcalc.measure import light, models
    from kvcalc.measure.workload import Workload
    from kvcalc.strategies import load_strategies

    gpu = find_gpu("NVIDIA H200")
    if not gpu or not gpu.bandwidth_bytes_per_second or not gpu.bf16_flops:
        sys.exit("no figures of an H200")
    ceilings = light.Ceilings(
        0.9 * (gpu.bandwidth_bytes_per_second.value or 0), 0.8 * (gpu.bf16_flops.value or 0), ""
    )
    config, origin = sources.resolve(REAL.model, revision=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            models._hf_config(config),  # noqa: SLF001 - as the profiler makes it
            dtype=torch.bfloat16,
        )
    loaded = models.LoadedModel(
        REAL.model, model, describe(config), origin, "random", "bf16", torch.device("meta")
    )
    guessed = {}
    for name, point in zip(("8k", "32k", "128k"), REAL.points, strict=True):
        work = Workload(point.tokens, REAL.decode, 1, point.repeats, point.warmup, seed=0)
        prefill = light.prefill_work(loaded, point.tokens, 1).seconds(ceilings)
        each = _seconds_of(work, prefill)
        guessed[name] = each * len(load_strategies([point.strategies]))
        print(f"{name}: prefill {prefill:.2f} s at the ceiling, {each:.0f} s a strategy")
    print(f"\n{'part':<12} {'given':>6} {'guessed':>8}")
    for name, (given, _) in PARTS.items():
        print(f"{name:<12} {given:>4} s {guessed.get(name, given):>6.0f} s")
    total = sum(guessed.get(name, given) for name, (given, _) in PARTS.items())
    print(f"{'all':<12} {sum(given for given, _ in PARTS.values()):>4} s {total:>6.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - (PARTS | INNER).keys()
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def _file(*, tiny: bool) -> Path:
    """profiles/measurements/DATE-DEVICE.jsonl."""
    import torch

    name = "tiny" if tiny else re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    date = datetime.datetime.now(datetime.UTC).date()
    return ROOT / "profiles" / "measurements" / f"{date}-{name}.jsonl"


def main() -> None:
    """Run the parts that there is time for."""
    options = _options()
    if options.plan:
        print_plan()
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.tiny:  # before Triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    if not options.tiny and not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device here; --tiny runs the same code on the CPU")
    options.out = options.out or _file(tiny=options.tiny)
    bench = Bench(options)
    for name in options.only.split(","):
        given, part = (PARTS | INNER)[name]
        if bench.left < 0 or (given > bench.left and name not in ("128k", "offload")):
            bench.write("skipped", skipped=name, left_seconds=bench.left)
            continue
        start = time.monotonic()
        try:
            part(bench)
        except Exception as error:  # noqa: BLE001 - the parts after it still count
            bench.write("failed", failed=name, reason=f"{type(error).__name__}: {error}"[:300])
            bench.goal(f"part {name} ends", type(error).__name__, met=False)
        bench.write("part", name=name, given_seconds=given, seconds=time.monotonic() - start)
    if "offloaded" in options.only:  # what started this process prints the tables
        return
    _judge(bench)
    _print_rows(bench)
    _print_goals(bench)
    sys.exit(0 if all(goal.met is not False for goal in bench.goals) or not options.tiny else 1)


if __name__ == "__main__":
    main()
