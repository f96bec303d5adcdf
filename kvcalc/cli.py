"""The command line: each command resolves its input, calls one library function and renders.

`main` holds the only `except`: it prints one line and turns each kind of error into its exit
status (0 done, 1 a check or prediction failed, 2 bad input, 3 refused, 70 a bug).
"""

import gc
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from kvcalc import __version__, streams
from kvcalc.errors import EXIT_BUG, InputError, KvcalcError, OutputError, UnsupportedError
from kvcalc.units import check_count, parse_tokens, shown

EXIT_INTERRUPTED = 130
EXIT_FAILED = 1

ALL = "all"
"""What users type for every engine or strategy."""

OPTION_ALIASES = {
    "--context": "--seq",
    "--ctx": "--seq",
    "--max-model-len": "--seq",
    "--kv-cache-dtype": "--kv-dtype",
    "--batch-size": "--batch",
    "--tensor-parallel-size": "--tp",
    "--pipeline-parallel-size": "--pp",
    "--gpus": "--tp",
}
"""Names from other tools that are taken for ours; kept out of the help to keep it readable."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Weights(StrEnum):
    """Where a profiled model's weights come from."""

    CHECKPOINT = "checkpoint"
    RANDOM = "random"


def size(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Catalogue name, config.json, GGUF or HF id."),
    ],
    seq: Annotated[
        list[str] | None, typer.Option(help="Tokens of a sequence: 128k, 1M; repeat for several.")
    ] = None,
    decode: Annotated[
        int, typer.Option(help="Tokens decoded after --seq, where that is a prompt.")
    ] = 0,
    batch: Annotated[
        list[str] | None, typer.Option(help="Sequences at once; repeat for several.")
    ] = None,
    kv_dtype: Annotated[
        list[str] | None, typer.Option(help="auto, bf16, fp8, q8_0, …; repeat for several.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Whose layout: model, vllm, llama.cpp; all.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="The engine's own: n_ubatch=2048,swa_full=true.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="Cache strategy, see kvcalc strategies.")] = (
        "dynamic"
    ),
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    encoder_seq: Annotated[
        str | None, typer.Option(help="Tokens of the encoder's output (T5, Whisper).")
    ] = None,
    mtp: Annotated[int, typer.Option(help="Prediction (MTP) layers to count.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show each formula.")] = False,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Size the KV cache of one or several models, exact to the byte."""
    from kvcalc import api

    if json + csv + markdown > 1:
        msg = "choose one of --json, --csv and --markdown"
        raise InputError(msg)
    engines = api.engines(_items(engine, "--engine"))
    table = api.size_table(
        models,
        seqs=[str(parse_tokens(item)) for item in _items(seq, "--seq")],
        batches=[_count(item, "--batch") for item in _items(batch, "--batch")] or [1],
        kv_dtypes=_items(kv_dtype, "--kv-dtype") or ["auto"],
        revision=revision,
        engines=engines,
        options=api.engine_options(_items(option, "--option")),
        strategy=strategy,
        tp=tp,
        pp=pp,
        encoder_seq=encoder_seq,
        mtp=mtp,
        decode=decode,
    )
    if len(models) == 1 and table.errors and not table.reports:
        raise table.errors[0][1]
    if json or csv or markdown:
        from kvcalc.render import data

        if json:
            one_point = len(models) == len(table.reports) == 1 and seq
            data.write_json(table.reports[0].to_dict() if one_point else table.to_dict())
        else:
            (data.write_csv if csv else data.write_markdown)(table.reports)
    elif table.reports:
        from kvcalc.render import text

        text.print_sizes(
            table.reports,
            explain=explain,
            lengths=not (seq or batch or kv_dtype or len(engines) > 1),
        )
    for model, error in table.errors:
        _complain(f"{model}: {error}")
    errors = [error for _, error in table.errors]
    if ALL in (engine or ()) and table.reports:  # of all, some will not run a model
        errors = [error for error in errors if not isinstance(error, UnsupportedError)]
    if errors:
        raise typer.Exit(max(error.exit_code for error in errors))


def fit(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Name, config.json, GGUF or HF id; not with --from."
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="An id of kvcalc gpus, a YAML like theirs, or auto.")
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="Instead: each rank's memory for its cache: 30GiB, or vLLM's line of it."
        ),
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="The engine's share of the GPU, 0.9; else its default.")
    ] = None,
    reserve: Annotated[
        str | None, typer.Option(help="What activations and graphs take: 3GiB; else estimated.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bytes of the model's weights: 140GB; else counted.")
    ] = None,
    seq: Annotated[
        str | None, typer.Option(help="Tokens of a request; else the model's maximum.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Whose rules; else vllm, of a GGUF llama.cpp.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="The engine's own: block_size=32.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="auto, bf16, fp8, q8_0, …")] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs (--gpus), as tensor-parallel ranks.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.")] = None,
    command: Annotated[
        str | None, typer.Option("--from", help="A server's command or script; - reads one.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json: Json = False,
) -> None:
    """Tell what fits on a GPU, line by line: requests, tokens and headroom.

    Exit status: 0 it fits, 1 it does not, 2 bad input, 3 refused, or estimates leave it open.
    """
    from kvcalc import api

    given: dict[str, Any] = {
        "kv_memory": kv_memory,
        "gpu": gpu,
        "share": share,
        "reserve": reserve,
        "weights": weights,
        "seq": seq,
        "concurrency": concurrency,
        "kv_dtype": kv_dtype,
        "tp": tp,
        "pp": pp,
        "revision": revision,
        "options": api.engine_options(_items(option, "--option")),
    }
    if command is not None and (model or engine):
        msg = "--from names model and engine: leave MODEL and --engine out"
        raise InputError(msg)
    if command is not None:
        from kvcalc.pasted import command_text
        from kvcalc.pasted.deployment import pasted_deployment

        model, given, notes = pasted_deployment(command_text(command), **given)
        for note in notes:
            _complain(note)
    elif model is None:
        msg = "give MODEL, or a server's command line with --from"
        raise InputError(msg)
    else:
        given = {name: value for name, value in given.items() if value is not None}
        given["engine"] = engine or ("llama.cpp" if model.endswith(".gguf") else "vllm")
    read = api.read_model(model, revision=given.pop("revision", None))
    report = api.fit(read, **given)
    changes = [] if report.fits else api.changes_that_fit(read, report, **given)
    if json:
        from kvcalc.render import data

        data.write_json(report.to_dict() | {"changes_that_fit": changes})
    else:
        from kvcalc.render import text

        text.print_fit(report, changes)
    if not report.sure:
        raise typer.Exit(UnsupportedError.exit_code)
    raise typer.Exit(0 if report.fits else EXIT_FAILED)


def check(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="YAML, see --init; else kvcalc.yaml."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="JSON of an earlier run: show what changed.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report here.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON here, whatever is shown.")
    ] = None,
    init: Annotated[
        bool, typer.Option("--init", help="Write a file to start from: FILE or kvcalc.yaml.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON Schema of FILE, for editors.")
    ] = False,
    json: Json = False,
) -> None:
    """Hold deployments to what is required of them, in CI or before a commit.

    Exit status: 0 all of it holds, 1 something does not, 2 a file or a model is bad, 3 something
    has no exact size, or estimates leave it open.
    """
    from kvcalc import checking
    from kvcalc.render import checked, data

    starter = Path(checking.STARTER)
    if init:
        for file in files or [starter]:
            checking.write_starter(file)
            _complain(f"wrote {file}; edit it, then: kvcalc check {file}")
    elif schema:
        data.write_json(checking.json_schema())
    elif not files and not starter.exists():
        msg = f"give a FILE of deployments; kvcalc check --init writes {starter}"
        raise InputError(msg)
    else:
        files = files or [starter]
        _check_apart((junit, out), files)
        told = json or out is not None or baseline is not None
        gc.freeze()  # what is loaded stays: it need not be looked through again and again
        report = checking.check(files, baseline=baseline, every_figure=told)
        _check_apart((junit, out), report.files())
        checked.publish(report, json=json, junit=junit, out=out)
        raise typer.Exit(report.exit_code)


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, config.json or HF id.")],
    seq: Annotated[
        str | None, typer.Option(help="Tokens of a request; else the model's maximum.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    gpu: Annotated[
        list[str] | None, typer.Option(help="An id, a YAML or auto; repeat. Else all known.")
    ] = None,
    max_gpus: Annotated[int, typer.Option(help="Most GPUs of a deployment.")] = 8,
    prices: Annotated[
        Path | None,
        typer.Option(help="Cheapest first, by a YAML: currency: USD, per_gpu_hour: {l4: 0.71}"),
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose rules.")] = "vllm",
    option: Annotated[
        list[str] | None, typer.Option(help="The engine's own: block_size=32.")
    ] = None,
    share: Annotated[str | None, typer.Option(help="The engine's share of a GPU.")] = None,
    reserve: Annotated[
        str | None, typer.Option(help="What activations and graphs take: 3GiB; else estimated.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bytes of the model's weights: 140GB; else counted.")
    ] = None,
    kv_dtype: Annotated[list[str] | None, typer.Option(help="Tried: auto and fp8.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json: Json = False,
) -> None:
    """List the GPUs, and how many of them, that serve so many requests: least memory first.

    Exit status: 0 some are listed, 1 none is, 2 bad input, 3 refused.
    """
    from kvcalc import api, planning

    report = planning.plan(
        model,
        gpus=_items(gpu, "--gpu"),
        kv_dtypes=_items(kv_dtype, "--kv-dtype") or ("auto", "fp8"),
        max_gpus=max_gpus,
        prices=prices,
        revision=revision,
        weights=weights,
        seq=seq,
        concurrency=concurrency,
        engine=engine,
        share=share,
        reserve=reserve,
        options=api.engine_options(_items(option, "--option")),
    )
    if json:
        from kvcalc.render import data

        data.write_json(report.to_dict())
    elif report.deployments:
        from kvcalc.render import text

        text.print_plan(report)
    if not report.deployments:
        none = (
            f"no GPU that is known holds them, with up to {max_gpus} of it; give fewer or shorter "
            "requests, or more --max-gpus"
        )
        _complain("; ".join((none, *report.remarks())))
        raise typer.Exit(EXIT_FAILED)


def models(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILTER...]", help="Parts of a name, type or family, or: refused."),
    ] = None,
    json: Json = False,
) -> None:
    """List and search the bundled catalogue."""
    from kvcalc import api

    rows = api.list_models(words or ())
    if json:
        from kvcalc.render import data

        data.write_json({"schema": "kvcalc.models/1", "models": rows})
        return
    from kvcalc.render import text

    text.print_models(rows, pattern=" ".join(words or ()))


def gpus(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILTER...]", help="Parts of an id, name, vendor or architecture."),
    ] = None,
    yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the file of one, to start your own from.")
    ] = False,
    json: Json = False,
) -> None:
    """List and search the accelerators whose figures are known."""
    if yaml:
        from kvcalc.hardware import gpu_yaml
        from kvcalc.render import data

        data.write(gpu_yaml(" ".join(words or ())))
        return
    from kvcalc import api

    rows = api.list_gpus(words or ())
    if json:
        from kvcalc.render import data

        data.write_json({"schema": "kvcalc.gpus/1", "gpus": rows})
        return
    from kvcalc.render import text

    text.print_gpus(rows, pattern=" ".join(words or ()))


def strategies(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Tell about one strategy.")] = "",
    json: Json = False,
) -> None:
    """List the cache strategies, or tell about one: what it keeps, needs and promises."""
    from kvcalc import api

    rows = api.list_strategies(name)
    if json:
        from kvcalc.render import data

        data.write_json({"schema": "kvcalc.strategies/1", "strategies": rows})
        return
    from kvcalc.render import text

    text.print_strategies(rows)


def profile(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Like size; none: built in.")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies: dynamic,int4:group=64; all.")
    ] = None,
    seq: Annotated[str, typer.Option(help="Tokens of the prompt.")] = "2k",
    decode: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 33,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the config's), fp32, bf16, fp16.")] = "auto",
    weights: Annotated[
        Weights, typer.Option(help="Load a checkpoint, or random from the config.")
    ] = Weights.CHECKPOINT,
    layers: Annotated[
        int | None, typer.Option(help="Only the first N layers (random weights).")
    ] = None,
    chunk: Annotated[str, typer.Option(help="Prefill in pieces of N tokens.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed runs.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before the timed ones.")] = 1,
    depth: Annotated[float, typer.Option(help="Place of the built-in model's needle.")] = 0.5,
    text: Annotated[Path | None, typer.Option(help="A text to feed; gives perplexity.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and tokens.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Append each row to this JSONL file.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out has already.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Try what will not fit in memory.")
    ] = False,
) -> None:
    """Run a real model under cache strategies: bytes, peak, TTFT, TPOT, fidelity."""
    from kvcalc.measure import require_torch
    from kvcalc.measure.workload import checked_workload
    from kvcalc.strategies import load_strategies

    chosen = load_strategies(strategy or ["dynamic,static,int4"])
    workload = checked_workload(
        seq=seq,
        decode=decode,
        batch=batch,
        repeats=repeats,
        warmup=warmup,
        seed=seed,
        chunk=chunk,
        depth=depth,
    )
    if resume and out is None:
        msg = "--resume goes on with a file: give --out"
        raise InputError(msg)
    require_torch()
    from kvcalc.measure import profile as profiling
    from kvcalc.render import data, measured

    file = profiling.RowFile(out, resume=resume) if out else None
    loaded = profiling.load_model(
        model,
        weights=weights,
        num_layers=layers,
        dtype=dtype,
        device=profiling.pick_device(device),
        seed=seed,
        revision=revision,
        least_cache_bytes=profiling.no_cache if force else profiling.least_cache(chosen, workload),
    )
    rows: list[dict[str, Any]] = []
    try:
        with (
            profiling.claimed(loaded.device) as alone,
            profiling.interrupts() as check,
            measured.progress() as show,
        ):
            if not alone:
                _complain(f"another profile runs on {loaded.device}: both disturb each other")

            def tell(what: str) -> None:
                check()
                show(what)

            rows.extend(
                profiling.profile(
                    loaded, chosen, workload, text=text, file=file, force=force, tell=tell
                )
            )
    finally:  # after Ctrl-C too: what was measured is shown
        if json:
            data.write_json({"schema": profiling.SCHEMA, "rows": rows})
        elif rows:
            measured.print_profile(rows)
        finished = sum(row["status"] != "interrupted" for row in rows)
        if finished < len(chosen):
            _complain(f"{finished} of {len(chosen)} strategies measured")
    if ALL in ",".join(strategy or []).split(","):  # of all, some will not apply
        rows = [row for row in rows if row["status"] != "refused"]
    raise typer.Exit(profiling.exit_status(rows))


COMMANDS: dict[str, Callable[..., None]] = {
    "size": size,
    "fit": fit,
    "plan": plan,
    "check": check,
    "profile": profile,
    "models": models,
    "gpus": gpus,
    "strategies": strategies,
}


def application(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The Typer application with these commands."""
    app = typer.Typer(
        help="How big is the KV cache, exactly, and what does a cache strategy really cost?",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_global_options)
    for name in names:
        app.command(name)(COMMANDS[name])
    return app


def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"kvcalc {__version__}\n")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    streams.take_over()
    status = run(sys.argv[1:] or ["--help"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is near, and its status known
    if "torch" in sys.modules:
        sys.exit(status)
    # Nothing is left to clean up, and taking the interpreter apart object by object would cost a
    # sixth of the whole run.
    os._exit(status)


def run(arguments: list[str]) -> int:
    """Run with these arguments; returns the exit status."""
    # Typer reads every option of every command it has: give it only the one that is called.
    called = [name for name in arguments[:1] if name in COMMANDS]
    try:
        app = application(called or COMMANDS)
        status = app(_canonical(arguments), prog_name="kvcalc", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = EXIT_INTERRUPTED
    except Exception as error:
        status = _told(error)
    if status == EXIT_INTERRUPTED:  # Typer makes an exit of Ctrl-C, too
        _complain("interrupted")
    return status if isinstance(status, int) else 0


def _told(error: Exception) -> int:
    """Tell an error in one line; returns its exit status."""
    with suppress(OutputError):  # the graver one is told
        sys.stdout.flush()
    if isinstance(error, KvcalcError):
        _complain(str(error))
        return error.exit_code
    if hasattr(error, "format_message"):  # a usage error of Typer's
        command = getattr(getattr(error, "ctx", None), "command_path", "kvcalc")
        _complain(f"{error.format_message().rstrip('.')}. Try: {command} --help")
        return InputError.exit_code
    if os.environ.get("KVCALC_DEBUG"):
        raise error
    _complain(
        f"bug: {type(error).__name__}: {str(error)[:200]}. Please report it; KVCALC_DEBUG=1 "
        "shows where"
    )
    return EXIT_BUG


def _complain(message: str) -> None:
    sys.stderr.write("kvcalc: " + " ".join(message.split()) + "\n")


def _check_apart(written: Iterable[Path | None], read: Iterable[Path]) -> None:
    """Raise InputError where a file that is written is one of the others, or is read."""
    outputs = [_identity(path) for path in written if path is not None]
    if len(set(outputs)) < len(outputs) or not {_identity(path) for path in read}.isdisjoint(
        outputs
    ):
        msg = "--junit and --out must name files of their own, which are written over"
        raise InputError(msg)


def _identity(path: Path) -> object:
    """What tells whether two paths name one file, by links of either kind."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # it is not there, its links go round in circles, it has a NUL
        return os.path.abspath(path)  # noqa: PTH100 - never raises
    if not stat.S_ISREG(status.st_mode):
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _canonical(arguments: list[str]) -> list[str]:
    def rename(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return OPTION_ALIASES.get(name, name) + equals + value

    return [rename(argument) for argument in arguments]


def _items(values: list[str] | None, name: str) -> list[str]:
    """Repeated options and comma lists as one list; `131,072` could be either and is refused."""
    items: list[str] = []
    for value in values or []:
        if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", value):
            parts = [part.lstrip("0") or "0" for part in value.split(",")]
            msg = (
                f"{name} {value}: one number or several? Write {name} {value.replace(',', '_')} "
                f"or {name} {f' {name} '.join(parts)}"
            )
            raise InputError(msg)
        items += value.split(",")
    return items


def _count(text: str, name: str) -> int:
    digits = text.strip().replace("_", "")
    if not re.fullmatch(r"-?[0-9]{1,18}", digits):
        msg = f"{name} {shown(text)} is not a whole number"
        raise InputError(msg)
    return check_count(int(digits), name=name, most=2**31 - 1)
