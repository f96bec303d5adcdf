"""The command line of a serving engine, as somebody pastes it: which model it serves, and what of
it decides the size of the cache.

A flag is translated, known to change nothing about the cache, kept as a doubt that another option
may settle, or named in an error: none is guessed past. Nothing of a text is run: of a script, its
words are read, and variables that it sets itself are filled in. What a shell would compute is not.

How many requests an engine takes at once (`--max-num-seqs`, `--max_batch_size`) bounds the load
and does not say it: no concurrency follows from it.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvcalc.errors import InputError
from kvcalc.pasted._flags import IMAGES, LLAMA_CPP, STARTS, TAGGED, VLLM, Dialect, Doubt
from kvcalc.units import shown

MAX_CHARACTERS = 2**16
"""Of a text: a script is shorter."""

LONGEST_NAME = 255
"""Of a file, in Linux."""


class Pasted(NamedTuple):
    """What a command line says. `point` holds parameters of `kvcalc.size` by name, `options` those
    of the engine, `budget` what decides how much memory its cache gets (`share`, `kv_memory`) and
    how many requests use it at once (`max_requests`),
    `loading` how the model is loaded (`dtype`, `quantization`, `n_gpu_layers`), `doubts` what else
    must be settled, `typed` the flags that said it, by the names of all these, and `notes` what is
    to be known beside it.
    """

    engine: str
    model: str
    point: dict[str, str]
    options: dict[str, str]
    budget: dict[str, str]
    loading: dict[str, str]
    doubts: list[Doubt]
    typed: dict[str, str]
    notes: list[str]


_HUMAN = frozenset({"options.max_model_len", "options.max_num_batched_tokens", "budget.kv_memory"})
"""What vLLM reads by `human_readable_int` (engine/arg_utils.py, utils/argparse_utils.py)."""

_QUOTED = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\."""
_TARGET = rf"(?:{_QUOTED}|[^\s;&|'\"\\])+"
_NOISE = re.compile(rf"({_QUOTED})|(?<!\S)(?:#[^\n]*|(?:\d|&)?[<>]+&?[ \t]*{_TARGET})", re.DOTALL)
"""What is quoted, and comments and redirections."""

_SPLIT, _COMPUTED = "\ue000", "\ue001"
"""How the $ of a variable that is not quoted, and what a shell computes, stand among words."""

_SHOWN = str.maketrans({_SPLIT: "$", _COMPUTED: "$(…)"})
_VARIABLE = re.compile(rf"[${_SPLIT}](?:(\w+)|\{{(\w+)(?::?[-=]([^{{}}]*))?\}})")
_ELSEWHERE = re.compile(r"\$\(|\[[@*]\]")
"""What shows that a value is computed, or an array's."""

_SEPARATORS = ";&|()\n"
_NOT_SHELL = re.compile(
    r"""^[ \t{-]*["']?(?:command|args|entrypoint|apiVersion|services)["']?[ \t]*:(?=\s|$)"""
    r"""|^[ \t]*-[ \t]+["']?\w|\A\s*[\[{]\s*["']|^[ \t]*(?:CMD|ENTRYPOINT)[ \t]*\[""",
    re.MULTILINE,
)
"""YAML of Compose and Kubernetes, JSON, and lists of a Dockerfile."""

_AS_RUN = "paste the command as the shell runs it"
_COMPUTED_ARE_NOT_READ = f"what a shell computes, $(…), and arrays are not read; {_AS_RUN}"


def command_text(given: str) -> str:
    """The text that `--from` gives: standard input's for `-`, a file's if there is one of that
    name, else the argument itself. Raises InputError where it is empty.
    """
    path, text = Path(given), given
    try:
        if given == "-":
            text = sys.stdin.read(MAX_CHARACTERS + 1)
        elif 0 < len(given) <= LONGEST_NAME and path.is_dir():
            msg = f"--from {shown(given)} is a directory; give a script, or the command itself"
            raise InputError(msg)
        elif 0 < len(given) <= LONGEST_NAME and path.exists():
            with path.open(encoding="utf-8-sig") as file:
                text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read {shown(given)} as a script: {error}"
        raise InputError(msg) from None
    if not text.strip():
        msg = f"--from {shown(given)} is empty; give a server's command"
        raise InputError(msg)
    return text


def read_command(text: str) -> Pasted:
    """What a server's command line says about its cache; it may stand in a script or be wrapped.

    Raises InputError for a text without such a command or with several, a flag that is not known,
    one without its value, and a command without a model.
    """
    if len(text) > MAX_CHARACTERS:
        msg = f"--from has more than {MAX_CHARACTERS:,} characters; give the server's command alone"
        raise InputError(msg)
    text = text.removeprefix("\ufeff")
    if sign := _NOT_SHELL.search(text):
        msg = f"--from: YAML, JSON and lists ({shown(sign[0].strip())}) are not read; {_AS_RUN}"
        raise InputError(msg)
    dialect, words, notes = _the_command(text)
    found = Pasted(dialect.engine, "", {}, {}, {}, {}, [], {}, notes)
    models: list[str] = []
    for flag, value in _flags(dialect, words):
        target = "model" if flag in ("", dialect.model) else dialect.flags.get(flag, "")
        if not target:
            found.doubts.extend(_doubts(dialect, flag, value))
            continue
        if "$" in value:
            msg = f"--from: {shown(value)} is a variable that the text does not set; write it out"
            if _ELSEWHERE.search(value):
                msg = f"--from: {f'{flag} {shown(value)}'.strip()}: {_COMPUTED_ARE_NOT_READ}"
            raise InputError(msg)
        if flag in ("-hf", "-hfr", "--hf-repo") and ":" in value:
            msg = f"--from: {flag} {shown(value)} is a file on the Hub by its type; download it, "
            msg += "and give -m FILE.gguf"
            raise InputError(msg)
        if target == "model":
            models.append(value)
            continue
        target, _, fixed = target.partition("=")
        part, _, name = target.partition(".")
        getattr(found, part)[name] = fixed or _value(dialect, target, flag, value)
        found.typed[name] = flag
    if len(models) != 1:
        named = f"several: {', '.join(map(shown, models[:4]))}" if models else "none"
        msg = f"--from {shown(text)} should name one model, and names {named}"
        raise InputError(msg)
    return found._replace(model=models[0])


def _the_command(text: str) -> tuple[Dialect, list[str], list[str]]:
    """Whose command a text holds, the words after its beginning, and what is to be known of it."""
    values: dict[str, str] = {}
    lines = _expanded(_lines(text), values)
    commands = [found for line in lines if (found := _command(line))]
    if not commands:  # bash -c '…'
        quoted = [word for line in lines for word in line if re.search(r"\s", word)]
        inner = _expanded((line for word in quoted for line in _lines(word)), values)
        commands = [found for line in inner if (found := _command(line))]
    if not commands:
        if any("$(…)" in word for line in lines for word in line):
            msg = f"--from {shown(text)}: {_COMPUTED_ARE_NOT_READ}"
            raise InputError(msg)
        known = ", ".join(" ".join(start) for start, _ in STARTS).replace("-m", "python -m")
        alone = "" if re.search(r"\s", text) else ", and no such file is here"
        msg = f"--from {shown(text)} has no server's command in it{alone}; known are: {known}"
        raise InputError(msg)
    if len(commands) > 1:
        each = "; ".join(shown(" ".join((one.engine, *words[:3]))) for one, words in commands[:4])
        msg = f"--from has {len(commands)} servers' commands; give one of them: {each}"
        raise InputError(msg)
    if broken := [line[0] for line in lines if _is_flag(line[0])]:
        msg = f"--from: a line begins with {shown(broken[0])}; does the one before lack a \\?"
        raise InputError(msg)
    ((dialect, words),) = commands
    if dialect is LLAMA_CPP and (variable := re.search(r"\bLLAMA_ARG_\w+", text)):
        msg = f"--from: {shown(variable[0])} is not read; write it as a flag"
        raise InputError(msg)
    notes = [note for line in lines for word in line for note in _other_release(dialect, word)]
    return dialect, words, notes[:1]


def _other_release(dialect: Dialect, word: str) -> Iterator[str]:
    """That an image's tag is another release than the rules are of."""
    if (image := TAGGED.fullmatch(word)) is None:
        return
    rules = dialect.release.rpartition(" ")[2]
    if not f"{image[1].removeprefix('v')}.".startswith(f"{rules}."):
        yield f"--from: the image is {image[1]}; the rules are those of {dialect.release}"


def _lines(text: str) -> list[list[str]]:
    """The words of each command of a text, without comments and redirections."""
    marked = _marked(text.replace("\r\n", "\n"))
    plain = _NOISE.sub(lambda match: match[1] or "", marked)
    lexer = shlex.shlex(plain.replace("\\\n", " "), posix=True, punctuation_chars=_SEPARATORS)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    lines: list[list[str]] = [[]]
    try:
        for word in lexer:
            if word and not word.strip(_SEPARATORS):
                lines.append([])
            else:
                lines[-1].append(word)
    except ValueError as error:
        msg = f"--from {shown(text)} cannot be read: {error}"
        raise InputError(msg) from None
    return [line for line in lines if line]


def _marked(text: str) -> str:
    """A text without comments, with marks for what a shell computes (`$(…)`, `$((…))`, backquotes,
    arrays) and for the $ of variables that it splits.
    """
    parts: list[str] = []
    quote, at = "", 0
    while at < len(text):
        sign, before = text[at], parts[-1][-1] if parts else "\n"
        end = at + 1
        if sign == "\\" and quote != "'":
            end += 1
            sign = text[at:end]
        elif sign == "#" and not quote and before.isspace():
            end = text.find("\n", at)
            end, sign = len(text) if end < 0 else end, " "
        elif sign in "'\"" and quote in ("", sign):
            quote = "" if quote else sign
        elif (quote != "'" and (sign == "`" or text.startswith("$(", at))) or (
            not quote and sign == "(" and before == "="
        ):
            end, sign = _closing(text, at), _COMPUTED
        elif not quote and sign == "$":
            sign = _SPLIT
        parts.append(sign)
        at = end
    return "".join(parts)


def _closing(text: str, at: int) -> int:
    """Where the backquotes or parentheses end that begin at a place."""
    if text[at] == "`":
        return text.find("`", at + 1) + 1 or len(text)
    depth = 0
    for match in re.compile("[()]").finditer(text, at):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _expanded(lines: Iterable[Sequence[str]], values: dict[str, str]) -> list[list[str]]:
    """Lines with the variables that they set, which join the `values`, and defaults filled in; what
    is not quoted is split into words.
    """
    room = MAX_CHARACTERS

    def fill(match: re.Match[str]) -> str:
        nonlocal room
        value = values.get(match[1] or match[2], match[0] if match[3] is None else match[3])
        room -= len(value)
        if room < 0:
            msg = f"--from has more than {MAX_CHARACTERS:,} characters with its variables filled in"
            raise InputError(msg)
        return value

    expanded = []
    for line in lines:
        words: list[str] = []
        for word in line:
            filled = _VARIABLE.sub(fill, word).translate(_SHOWN)
            name, equals, value = filled.partition("=")
            own = name.removesuffix("+")
            if equals and own.isidentifier():
                values[own] = values.get(own, "") + value if own != name else value
                words.append(filled)
            else:
                words += filled.split() if _SPLIT in word else [filled]
        expanded.append(words)
    return [words for words in expanded if words]


def _command(line: Sequence[str]) -> tuple[Dialect, list[str]] | None:
    """Whose command a line is, wherever in it that begins, and the words after the beginning."""
    for at, word in enumerate(line):
        for image, dialect in IMAGES:
            if image.fullmatch(word):
                return dialect, list(line[at + 1 :])
    for at, word in enumerate(line):
        plain = (word.rpartition("/")[2], *line[at + 1 : at + 3])
        for start, dialect in STARTS:
            if plain[: len(start)] == start:
                return dialect, list(line[at + len(start) :])
    return None


def _flags(dialect: Dialect, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags that may count, with their values; the model alone comes with an empty flag."""
    unknown: list[str] = []
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if not _is_flag(word):
            yield "", word
            continue
        typed, equals, value = re.sub(r"^-O(\d)$", r"-O=\1", word).partition("=")
        name, _, key = typed.replace("_", "-").partition(".")  # --json-flag.key value
        takes = _takes(dialect, name)
        if takes != 0 and not equals:
            value = _values(rest, takes, typed)
        if name == dialect.model or name in dialect.flags or dialect.doubt(name):
            yield name, f"{key}={value}" if key else value
        elif name not in dialect.harmless:
            unknown.append(typed)
    if unknown:
        raise InputError(_unknown(dialect, unknown))


def _takes(dialect: Dialect, name: str) -> int | None:
    """How many values a flag takes; None for any number, as where it is not known."""
    if name == dialect.model or name in dialect.flags:
        return 0 if "=" in dialect.flags.get(name, "") else 1
    return None if dialect.doubt(name) else dialect.harmless.get(name)


def _values(rest: list[str], takes: int | None, flag: str) -> str:
    """Takes the values of a flag from the reversed `rest`."""
    values: list[str] = []
    while rest and not _is_flag(rest[-1]) and (takes is None or not values):
        values.append(rest.pop())
    if takes and not values:
        if flag in ("-fa", "--flash-attn"):  # alone until August 2025
            return "on"
        msg = f"--from: {flag} has no value"
        raise InputError(msg)
    return " ".join(values)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-(\d.*)?", word)


def _doubts(dialect: Dialect, flag: str, value: str) -> Iterator[Doubt]:
    """What is doubtful of a flag, unless its value is fine."""
    doubt = dialect.doubt(flag)
    if doubt and not re.fullmatch(doubt.fine, value):
        said = f"{_named(flag)} {shown(value)}" if value else _named(flag)
        yield doubt._replace(about=f"--from: {said}: {doubt.about}")


def _named(flag: str) -> str:
    """A flag as an error names it."""
    return flag if re.fullmatch(r"[\w.-]{1,50}", flag) else shown(flag)


def _unknown(dialect: Dialect, unknown: Sequence[str]) -> str:
    from difflib import get_close_matches

    known = [*dialect.flags, *dialect.doubtful, *dialect.harmless]
    first = unknown[:12]
    named = ", ".join(map(_named, first))
    alike = [close for flag in first for close in get_close_matches(flag, known, 1, 0.85)]
    meant = f"did you mean {', '.join(alike)}? Else " if alike else ""
    return (
        f"--from: flags of {dialect.engine} that kvcalc does not know: {named}; "
        f"{meant}leave out those that do not concern the cache"
    )


def _value(dialect: Dialect, target: str, flag: str, value: str) -> str:
    """A value as kvcalc reads it."""
    if target == "options.flash_attn":
        return "false" if value in ("off", "false", "0") else "true"
    if (target, value) == ("options.max_model_len", "-1"):
        return "auto"
    return _number(flag, value) if dialect is VLLM and target in _HUMAN else value


def _number(flag: str, value: str) -> str:
    """A number as vLLM reads it: `25.6k` is 25,600, `1K` is 1,024."""
    match = re.fullmatch(r"([0-9]{1,15})(\.[0-9]{1,9})?([kKmMgGtT])", value)
    if match is None:
        return value
    whole, part, suffix = match.groups()
    power = "kmgt".index(suffix.lower()) + 1
    if suffix.islower():
        return str(int(float(whole + (part or "")) * 1000**power))
    if part:
        msg = f"--from: {flag} {value} is refused by vLLM; did you mean {value.lower()}?"
        raise InputError(msg)
    return str(int(whole) * 1024**power)
