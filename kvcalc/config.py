"""Reading a model's `config.json`: one accessor that knows aliases, class defaults and provenance.

Foreign JSON is read leniently (further keys are fine), but a field that is used must have the
right type: the error names the key and the value found. Every field read is recorded with where
its value came from, so a report can show it.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

from kvcalc.data import profiles_folder
from kvcalc.errors import ConfigError
from kvcalc.units import shown

MAX_FIELD: Final = 2**31 - 1
"""Largest integer that a config field may hold; a larger one is malformed."""

MAX_LAYERS: Final = 10_000
"""Most layers of a model: building one object for each must stay cheap for a hostile config."""


_LEGACY_NAMES = {
    # Old names that the configuration classes of 5.23.0 take in code, outside their attribute map.
    "bloom": {"hidden_size": "n_embed"},
    "falcon": {"hidden_size": "n_embed"},
    "nemotron_h": {
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
        "expand": "mamba_expand",
    },
}


class FieldUse(NamedTuple):
    """A config field that decided the answer, its value and where the value came from."""

    key: str
    value: object
    origin: str


class NestedDecoder(NamedTuple):
    """Where a wrapper's configuration class keeps that of its decoder.

    `key` is the config field, `model_type` the decoder's when the config does not say (`fixed`:
    whatever it says), `values` the decoder's fields when the config has none of it.
    """

    key: str
    model_type: str
    fixed: bool
    values: Mapping[str, Any]


class ClassDefaults(NamedTuple):
    """What the configuration class of a model type fills in.

    `aliases` maps standard names to the class's own (`num_hidden_layers` → `n_layer`); `decoder`
    says where a wrapper's decoder is; `generates` is False for types that have no model which
    generates, and so none that keeps a cache; `in_transformers` is False for classes that live in
    model repositories.
    """

    label: str
    values: Mapping[str, Any]
    aliases: Mapping[str, str]
    decoder: NestedDecoder | None = None
    generates: bool = True
    in_transformers: bool = True


NO_CLASS = ClassDefaults("no class", {}, {}, in_transformers=False)


@cache
def class_defaults(model_type: str) -> ClassDefaults | None:
    """Defaults of a model type; None for a type that neither transformers, as tabulated, nor the
    table of repository classes knows.
    """
    entry, head = _table_entry("class_defaults.jsonl", model_type)
    if not entry:
        entry, head = _table_entry("repository_classes.jsonl", model_type)
        if not entry:
            return None
    nested = entry.get("decoder")
    version = head.get("transformers")
    return ClassDefaults(
        label=f"{entry['class']}, transformers {version}" if version else entry["class"],
        values=entry["defaults"],
        aliases=entry.get("aliases", {}),
        decoder=NestedDecoder(**nested) if nested else None,
        generates=entry.get("generates", True),
        in_transformers=version is not None,
    )


def _table_entry(name: str, model_type: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A model type's line of a table, or an empty one, and the table's first line.

    A table has one model type a line, so only the line that is wanted is parsed.
    """
    table = _table_text(name)
    start = table.find(f'\n{{"model_type": {json.dumps(model_type)},')
    if start < 0:
        return {}, {}
    entry = json.loads(table[start : table.index("\n", start + 1)])
    return entry, json.loads(table[: table.index("\n")])


@cache
def _table_text(name: str) -> str:
    return (profiles_folder() / name).read_text(encoding="utf-8")


class ConfigFields:
    """One level of a config (the decoder's), read through aliases and class defaults.

    `prefix` is the path of this level in the file (`text_config.`), for messages.
    """

    def __init__(self, data: Mapping[str, Any], *, model_type: str, prefix: str = "") -> None:
        self.data = data
        self.model_type = model_type
        self.prefix = prefix
        self.defaults = class_defaults(model_type) or NO_CLASS
        self._own_names = {**self.defaults.aliases, **_LEGACY_NAMES.get(model_type, {})}
        self._used: dict[str, FieldUse] = {}
        self._read: set[str] = set()

    @property
    def used(self) -> tuple[FieldUse, ...]:
        """The fields read so far that have a value, in the order of their first reading."""
        return tuple(self._used.values())

    @property
    def read(self) -> frozenset[str]:
        """Every field that was asked for so far, whether it has a value or not."""
        return frozenset(self._read)

    def get(self, key: str) -> Any:  # noqa: ANN401 - the JSON border
        """Value of `key`, from the file or else the class defaults; None when neither has it."""
        names = self._names(key)
        self._read.update(names)
        present = [name for name in names if name in self.data]
        if present:
            value = self.data[present[0]]
            for name in present[1:]:
                if self.data[name] != value:
                    msg = (
                        f"config has {self.prefix}{present[0]} = {shown(value)} and "
                        f"{self.prefix}{name} = {shown(self.data[name])}, two names of one field"
                    )
                    raise ConfigError(msg)
            return self._record(present[0], value, "config")
        for name in names:
            if self.defaults.values.get(name) is not None:
                origin = f"class default ({self.defaults.label})"
                return self._record(name, self.defaults.values[name], origin)
        return None

    def _names(self, key: str) -> list[str]:
        """The names of one field: `key` first, then what the class calls it or takes for it."""
        own = self._own_names
        others = [standard for standard, name in own.items() if name == key]
        return list(dict.fromkeys([key, own.get(key, key), *others]))

    def by_rule(self, key: str, value: object) -> None:
        """Record that the configuration class fills in `key` by a rule in its code."""
        self._record(key, value, f"class rule ({self.defaults.label})")

    def given(self, key: str) -> Any:  # noqa: ANN401 - the JSON border
        """Value of `key` in the file itself, unrecorded; None when it is absent."""
        return next((self.data[name] for name in self._names(key) if name in self.data), None)

    def count(self, key: str, *, most: int = MAX_FIELD) -> int:
        """A required whole number in 1..most; ConfigError otherwise."""
        value = self.get(key)
        if value is None:
            if key in self.data:
                raise self.wrong(key, value, "a whole number")
            msg = f"config has no {self.prefix}{key}, and its class gives no default"
            raise ConfigError(msg)
        return self._checked_count(key, value, most)

    def optional_count(self, key: str) -> int | None:
        """Like `count`, but None when the field is absent or null."""
        value = self.get(key)
        return None if value is None else self._checked_count(key, value, MAX_FIELD)

    def flag(self, key: str) -> bool:
        """A boolean; absent or null reads as False."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def number(self, key: str, *, default: int = 0) -> int:
        """A whole number from 0 on, which may be absent or null."""
        value = self.get(key)
        return default if value is None else self._checked_count(key, value, MAX_FIELD, least=0)

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None when absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, value, "a list of names")
        return tuple(value)

    def numbers(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers from 0 on (true and false count as 1 and 0), or None when absent
        or null.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, int) and 0 <= item <= MAX_FIELD for item in value
        ):
            raise self.wrong(key, value, "a list of whole numbers")
        return tuple(int(item) for item in value)

    def nested(self, key: str, model_type: str = "") -> "ConfigFields | None":
        """The fields of an object inside this one, or None when it is absent or null.

        What is read there is recorded here.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, value, "an object")
        inner = ConfigFields(value, model_type=model_type, prefix=f"{self.prefix}{key}.")
        self._used.pop(self.prefix + key, None)
        inner._used = self._used
        return inner

    def layer(self, index: int) -> "ConfigFields | None":
        """What `per_layer_config`, as transformers saves it, says of one layer; None without it.

        Its keys are layer numbers, as wide as the last of them: "2", or "02" among ten or more.
        """
        saved = self.nested("per_layer_config")
        if saved is None:
            return None
        for key in saved.data:
            if isinstance(key, str) and (key.lstrip("0") or key[-1:]) == str(index):
                return saved.nested(key)
        return ConfigFields({}, model_type="", prefix=f"{saved.prefix}{index}.")

    def _record(self, key: str, value: object, origin: str) -> object:
        self._used.setdefault(self.prefix + key, FieldUse(self.prefix + key, value, origin))
        return value

    def _checked_count(self, key: str, value: object, most: int, *, least: int = 1) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, value, "a whole number")
        if not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most:,}")
        return value

    def wrong(self, key: str, value: object, wanted: str) -> ConfigError:
        """The error to raise for a field that holds something else than is wanted."""
        return ConfigError(f"config field {self.prefix}{key} is {shown(value)}, not {wanted}")
