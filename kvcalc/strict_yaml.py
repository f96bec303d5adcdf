"""YAML that people write for us, read strictly: every value keeps its line and the keys above it.

Parsing events are read and nothing is constructed: a tag cannot run code (none is taken at all),
and `no`, `1:30`, `010` and `1_000` stay the text that stands there. A key stands once; `<<: *name`
merges, what is written beside it goes before. Size, nesting and what aliases stand for are bounded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from kvcalc.errors import InputError
from kvcalc.units import shown

if TYPE_CHECKING:
    from yaml import Event

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 100_000
"""Values that a file may stand for once its aliases are written out."""

_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands: file, line, and the keys above it."""

    file: str
    line: int
    path: str = ""

    def below(self, key: str, line: int) -> "Place":
        """The place of a key under this one."""
        return Place(self.file, line, f"{self.path}.{key}" if self.path else key)

    def __str__(self) -> str:
        """`checks.yaml:7: defaults.gpu`."""
        return f"{self.file}:{self.line}: {self.path}".removesuffix(": ")

    def wrong(self, what: str) -> "PlacedError":
        """The error for something here: `checks.yaml:7: defaults.gpu: …`."""
        return PlacedError(self, what)


class PlacedError(InputError):
    """An InputError that knows the line it is about."""

    def __init__(self, place: Place, what: str) -> None:
        super().__init__(f"{place}: {what}")
        self.place = place
        self.what = what


@dataclass(slots=True, eq=False)
class Scalar:
    """Text as it was written; `plain` without quotes."""

    line: int
    text: str
    plain: bool
    size: int = 1

    @property
    def is_null(self) -> bool:
        """Whether nothing stands there, or a plain `null`."""
        return self.plain and self.text in _NULLS


@dataclass(slots=True, eq=False)
class List:
    """A list; `size` counts the values in it, aliases written out."""

    line: int
    items: "list[Node]" = field(default_factory=list)
    size: int = 1


@dataclass(slots=True, eq=False)
class Fields:
    """Keys with their lines and values. `merged` are those of `<<`, which own keys go before."""

    line: int
    own: "dict[str, tuple[int, Node]]" = field(default_factory=dict)
    merged: "dict[str, tuple[int, Node]]" = field(default_factory=dict)
    size: int = 1

    @property
    def all(self) -> "Mapping[str, tuple[int, Node]]":
        """Every key once."""
        return {**self.merged, **self.own}


Node: TypeAlias = Scalar | List | Fields


def read(path: Path, *, remedy: str = "") -> tuple[Place, Node]:
    """The root of a file; InputError with line and keys for what is no YAML that we take, and with
    a `remedy` for a file that cannot be read or is empty.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        said = getattr(error, "strerror", None) or error
        msg = f"cannot read {path}: {said}{remedy}"
        raise InputError(msg) from None
    if len(raw) > MAX_BYTES:
        msg = f"the file is larger than {MAX_BYTES:,} bytes, which end here; split it"
        raise Place(str(path), raw.count(b"\n") + 1).wrong(msg)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = "not text in UTF-8"
        raise Place(str(path), raw.count(b"\n", 0, error.start) + 1).wrong(msg) from None
    return parse(text, file=str(path), remedy=remedy)


def parse(text: str, *, file: str, remedy: str = "") -> tuple[Place, Node]:
    """Like `read`, for a text."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is four times as fast
    composer = _Composer(file)
    try:
        for event in yaml.parse(text, Loader=loader):
            composer.take(event)
    except yaml.YAMLError as error:
        composer.refuse(error, text)
    if composer.root is None:
        msg = f"the file is empty{remedy}"
        raise Place(file, 1).wrong(msg)
    return Place(file, composer.root.line), composer.root


class _Composer:
    """Puts events together, without recursion. `open` are the collections that are not closed yet,
    each with the place it stands at, its anchor, and the key that waits for its value.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.root: Node | None = None
        self.open: list[_Open] = []
        self.anchors: dict[str, Node] = {}
        self.documents = 0
        self.handlers: dict[type, Callable[[Any], None] | None] = {}

    def take(self, event: "Event") -> None:
        """One event of the parser's."""
        kind = type(event)
        if kind not in self.handlers:
            self.handlers[kind] = getattr(self, f"_{kind.__name__}", None)
        handle = self.handlers[kind]
        if handle is not None:
            handle(event)

    def here(self, line: int) -> Place:
        """The place of what comes now."""
        if not self.open:
            return Place(self.file, line)
        top = self.open[-1]
        if isinstance(top.node, List):
            return Place(self.file, line, f"{top.place.path}[{len(top.node.items)}]")
        return top.place if top.key is None else top.place.below(top.key, line)

    def wrong(self, line: int, what: str) -> PlacedError:
        """The error at this line, under the keys that are open."""
        place = self.here(line)
        return Place(self.file, line, place.path).wrong(what)

    def refuse(self, error: Any, text: str) -> NoReturn:  # noqa: ANN401 - one of PyYAML's
        """The parser's own complaint, with a word on the usual reason."""
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        if mark is None:  # a sign that YAML does not have, by its place in the text
            position = getattr(error, "position", 0)
            line = text.count("\n", 0, position) + 1
            raise self.wrong(line, "a control character or broken text: not YAML") from None
        lines = text.splitlines()
        written = lines[mark.line] if mark.line < len(lines) else ""
        indent = written[: len(written) - len(written.lstrip())]
        what = f"not YAML: {error.problem or error.context}"
        if "\t" in indent or written[mark.column : mark.column + 1] == "\t":
            what = "a tab: indent with spaces"
        raise self.wrong(mark.line + 1, what) from None

    # The handlers are named after the parser's events.

    def _DocumentStartEvent(self, event: Any) -> None:  # noqa: ANN401, N802
        self.documents += 1
        if self.documents > 1:
            msg = "a second document: put everything into one"
            raise self.wrong(event.start_mark.line + 1, msg)

    def _ScalarEvent(self, event: Any) -> None:  # noqa: ANN401, N802
        line = self._line(event)
        plain = event.style is None or event.style == ""
        self._put(Scalar(line, event.value, plain), event.anchor)

    def _SequenceStartEvent(self, event: Any) -> None:  # noqa: ANN401, N802
        self._start(List(self._line(event)), event)

    def _MappingStartEvent(self, event: Any) -> None:  # noqa: ANN401, N802
        self._start(Fields(self._line(event)), event)

    def _SequenceEndEvent(self, event: Any) -> None:  # noqa: ANN401, N802
        self._end(event)

    def _MappingEndEvent(self, event: Any) -> None:  # noqa: ANN401, N802
        self._end(event)

    def _AliasEvent(self, event: Any) -> None:  # noqa: ANN401, N802
        line = event.start_mark.line + 1
        node = self.anchors.get(event.anchor)
        if node is None:
            raise self.wrong(line, f"no anchor &{event.anchor} stands above (or it is still open)")
        self._put(node, None, line)

    def _line(self, event: Any) -> int:  # noqa: ANN401
        line: int = event.start_mark.line + 1
        if event.tag is not None:
            raise self.wrong(line, f"a tag, {shown(event.tag)}: none is taken here")
        return line

    def _start(self, node: List | Fields, event: Any) -> None:  # noqa: ANN401
        if self.open and isinstance(self.open[-1].node, Fields) and self.open[-1].key is None:
            raise self.wrong(node.line, "a key must be text")
        if len(self.open) >= MAX_DEPTH:
            raise self.wrong(node.line, f"nested deeper than {MAX_DEPTH} levels")
        self.open.append(_Open(node, self.here(node.line), event.anchor))

    def _end(self, event: Any) -> None:  # noqa: ANN401
        del event
        done = self.open.pop()
        self._put(done.node, done.anchor)

    def _put(self, node: Node, anchor: str | None, line: int | None = None) -> None:
        """Give a finished value to the collection it belongs to."""
        if anchor:
            self.anchors[anchor] = node
        if not self.open:
            self.root = node
            return
        top = self.open[-1]
        line = node.line if line is None else line
        if isinstance(top.node, List):
            top.node.items.append(node)
        elif top.key is None:
            self._key(top, top.node, node, line)
            return
        elif top.key == "<<":
            if top.node.merged:
                raise self.wrong(line, "duplicate key '<<'; merge a list, <<: [*one, *other]")
            self._merge(top.node, node, line)
        else:
            top.node.own[top.key] = (top.line, node)
        top.key = None
        top.node.size += node.size
        if top.node.size > MAX_VALUES:
            raise self.wrong(line, f"aliases stand for more than {MAX_VALUES:,} values")

    def _key(self, top: "_Open", fields: Fields, node: Node, line: int) -> None:
        if not isinstance(node, Scalar) or not node.text:
            raise self.wrong(line, "a key must be text")
        if node.text in fields.own:
            first = fields.own[node.text][0]
            msg = f"duplicate key {shown(node.text)}; it stands in line {first}, too"
            raise self.wrong(line, msg)
        top.key, top.line = node.text, line

    def _merge(self, fields: Fields, node: Node, line: int) -> None:
        """`<<` takes one mapping or a list of them, of which the first goes before."""
        for one in reversed(node.items) if isinstance(node, List) else (node,):
            if not isinstance(one, Fields):
                raise self.wrong(line, "<< takes an alias of keys and values")
            fields.merged.update(one.all)


@dataclass(slots=True, eq=False)
class _Open:
    node: List | Fields
    place: Place
    anchor: str | None
    key: str | None = None
    line: int = 0


def fields(
    place: Place, node: Node, known: Mapping[str, Any] | None = None, *, remedy: str = ""
) -> Iterator[tuple[str, Place, Node]]:
    """Every key with its place and value; with `known`, InputError for any other key, which ends in
    the `remedy`.
    """
    if not isinstance(node, Fields):
        msg = f"must be keys and values, not {kind_of(node)}{remedy}"
        raise place.wrong(msg)
    for key, (line, value) in node.all.items():
        if known is not None and key not in known:
            msg = f"unknown key {shown(key)}{did_you_mean(key, known, remedy)}"
            raise Place(place.file, line, place.path).wrong(msg)
        yield key, place.below(key, line), value


def record(
    place: Place,
    node: Node,
    keys: Sequence[str],
    optional: Sequence[str] = (),
    *,
    remedy: str = "",
) -> dict[str, tuple[Place, Node]]:
    """Each key's place and value, of keys and values that have all of `keys`, perhaps those that
    are `optional`, and no other; an InputError ends in the `remedy`.
    """
    known = dict.fromkeys((*keys, *optional))
    found = {key: (at, value) for key, at, value in fields(place, node, known, remedy=remedy)}
    if missing := [repr(key) for key in keys if key not in found]:
        msg = f"missing key{'s' * (len(missing) > 1)} {', '.join(missing)}{remedy}"
        raise place.wrong(msg)
    return found


def did_you_mean(word: str, known: Mapping[str, Any], remedy: str = "") -> str:
    """`; did you mean gpu?`, or all that there is; with a `remedy`, that instead."""
    import difflib

    near = [one for one in known if one.startswith(word)]
    near += difflib.get_close_matches(word[:60], known, n=1)
    if remedy:
        return f" (perhaps {near[0]}){remedy}" if near else remedy
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def text(place: Place, node: Node, *, wanted: str = "text") -> str:
    """The text of a value that must have one."""
    if not isinstance(node, Scalar) or node.is_null or not node.text.strip():
        msg = f"must be {wanted}, not {kind_of(node)}"
        raise place.wrong(msg)
    if "\0" in node.text:
        msg = f"{shown(node.text)} holds a NUL, which no name does"
        raise place.wrong(msg)
    return node.text.strip()


def items(place: Place, node: Node) -> Iterator[tuple[Place, Node]]:
    """The values of a list with their places; one value stands for a list of it."""
    if isinstance(node, Fields):
        msg = f"must be a list, not {kind_of(node)}"
        raise place.wrong(msg)
    for index, item in enumerate(node.items if isinstance(node, List) else [node]):
        yield Place(place.file, item.line, f"{place.path}[{index}]"), item


def kind_of(node: Node) -> str:
    """What stands there, as a message says it."""
    if isinstance(node, Fields):
        return "keys and values"
    if isinstance(node, List):
        return "a list"
    return "empty" if node.is_null or not node.text.strip() else shown(node.text)
