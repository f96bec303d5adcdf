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
    # BloomConfig 5.23.0 takes n_embed for hidden_size in code, outside its attribute map.
    "bloom": {"hidden_size": "n_embed"},
}


class FieldUse(NamedTuple):
    """A config field that decided the answer, its value and where the value came from."""

    key: str
    value: object
    origin: str


class ClassDefaults(NamedTuple):
    """What transformers' configuration class of a model type fills in.

    `aliases` maps standard names to the class's own (`num_hidden_layers` → `n_layer`); `text` is
    the model type of a wrapper's text part when its config does not say.
    """

    label: str
    values: Mapping[str, Any]
    aliases: Mapping[str, str]
    text: str


@cache
def class_defaults(model_type: str) -> ClassDefaults | None:
    """Defaults of a model type; None for a type that the tabulated transformers does not know.

    The table has one model type a line, so only the line that is wanted is parsed.
    """
    table = (profiles_folder() / "class_defaults.jsonl").read_text(encoding="utf-8")
    start = table.find(f'\n{{"model_type": {json.dumps(model_type)},')
    if start < 0:
        return None
    entry = json.loads(table[start : table.index("\n", start + 1)])
    version = json.loads(table[: table.index("\n")])["transformers"]
    return ClassDefaults(
        label=f"{entry['class']}, transformers {version}",
        values=entry["defaults"],
        aliases=entry.get("aliases", {}),
        text=entry.get("text", ""),
    )


class ConfigFields:
    """One level of a config (the decoder's), read through aliases and class defaults.

    `prefix` is the path of this level in the file (`text_config.`), for messages.
    """

    def __init__(self, data: Mapping[str, Any], *, model_type: str, prefix: str = "") -> None:
        self.data = data
        self.model_type = model_type
        self.prefix = prefix
        self.defaults = class_defaults(model_type) or ClassDefaults("no class", {}, {}, "")
        self._own_names = {**self.defaults.aliases, **_LEGACY_NAMES.get(model_type, {})}
        self._used: dict[str, FieldUse] = {}

    @property
    def used(self) -> tuple[FieldUse, ...]:
        """The fields read so far that have a value, in the order of their first reading."""
        return tuple(self._used.values())

    def get(self, key: str) -> Any:  # noqa: ANN401 - the JSON border
        """Value of `key`, from the file or else the class defaults; None when neither has it."""
        names = self._names(key)
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
        self._used.setdefault(
            key, FieldUse(self.prefix + key, value, f"class rule ({self.defaults.label})")
        )

    def given(self, key: str) -> Any:  # noqa: ANN401 - the JSON border
        """Value of `key` in the file itself, unrecorded; None when it is absent."""
        return next((self.data[name] for name in self._names(key) if name in self.data), None)

    def count(self, key: str, *, most: int = MAX_FIELD) -> int:
        """A required whole number in 1..most; ConfigError otherwise."""
        value = self.get(key)
        if value is None:
            if key in self.data:
                raise self._wrong(key, value, "a whole number")
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
            raise self._wrong(key, value, "true or false")
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None when absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of names")
        return tuple(value)

    def _record(self, key: str, value: object, origin: str) -> object:
        self._used.setdefault(key, FieldUse(self.prefix + key, value, origin))
        return value

    def _checked_count(self, key: str, value: object, most: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "a whole number")
        if not 1 <= value <= most:
            raise self._wrong(key, value, f"a whole number from 1 to {most:,}")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> ConfigError:
        return ConfigError(f"config field {self.prefix}{key} is {shown(value)}, not {wanted}")
