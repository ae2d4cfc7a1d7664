"""Turn a validation error of a configuration into one sentence: key, value, what is allowed, nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

_Schema = Mapping[str, Any]


class Keys:
    """The keys that a configuration knows, read off its JSON schema; unions are followed by their tags."""

    def __init__(self, config: type[BaseModel]) -> None:
        self._root: _Schema = TypeAdapter(config).json_schema()

    def path(self, location: Sequence[str | int]) -> str:
        """Spell an error's location as a dotted key, without the tags and types of unions that pydantic puts in it."""
        node, parts = self._root, list[str]()
        for part in location:
            options = self._options(node)
            if part in options and str(part) not in node.get("properties", {}):
                node = options[str(part)]
                continue
            if "anyOf" in node and not options and part not in node.get("properties", {}):
                node = {}  # one of several types a value may have; keys within it are the user's own
                continue
            parts.append(str(part))
            node = self._resolve(node.get("properties", {}).get(part, {}))
        return ".".join(parts)

    def options(self, key: str) -> dict[str, set[str]]:
        """Return tag → fields of the union at a dotted key; empty where there is none."""
        node = self._root
        for part in key.split("."):
            node = self._resolve(node.get("properties", {}).get(part, {}))
        return {tag: set(option.get("properties", {})) for tag, option in self._options(node).items()}

    def known(self) -> list[str]:
        """Return every dotted key, those of all union options included."""
        return sorted(set(self._walk(self._root, "")))

    def _walk(self, node: _Schema, prefix: str) -> list[str]:
        found = []
        for name, child in node.get("properties", {}).items():
            found += [prefix + name, *self._walk(self._resolve(child), f"{prefix}{name}.")]
        for option in self._options(node).values():
            found += self._walk(option, prefix)
        return found

    def _resolve(self, node: _Schema) -> _Schema:
        given = [option for option in node.get("anyOf", []) if option != {"type": "null"}]
        if len(given) == 1:  # a table that may be left out
            return self._resolve(given[0])
        return self._root["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    def _options(self, node: _Schema) -> dict[str, _Schema]:
        mapping = node.get("discriminator", {}).get("mapping", {})
        return {tag: self._resolve({"$ref": reference}) for tag, reference in mapping.items()}


@cache
def keys_of(config: type[BaseModel]) -> Keys:
    """Return the keys of a configuration class."""
    return Keys(config)


def explain(error: ValidationError, config: type[BaseModel]) -> str:
    """Return one sentence about the error that says most: an unknown key explains a missing one."""
    errors = error.errors()
    worst = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    keys = keys_of(config)
    key = keys.path(worst["loc"])
    # Of the types that a value may have, the one whose inside is wrong is the one that was meant.
    inside = [item for item in errors if keys.path(item["loc"]).startswith(f"{key}.")]
    return _sentence(dict(max([worst, *inside], key=lambda item: len(item["loc"]))), keys)


def _sentence(error: Mapping[str, Any], keys: Keys) -> str:
    key, kind = keys.path(error["loc"]), error["type"]
    if kind == "extra_forbidden":
        return _unknown(key, keys)
    if kind == "missing":
        return f"{key} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = f"{key}.{error['ctx']['discriminator'].strip(chr(39))}"
        found = f"is {error['ctx']['tag']!r}" if kind == "union_tag_invalid" else "is missing"
        return f"{tag} {found}, must be one of {', '.join(keys.options(key))}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message if not key or message.startswith(key) else f"{key}: {message}"
    return f"{key} is {error['input']!r}, {re.sub('^[A-Z][a-z]* should', 'must', message)}"


def _unknown(key: str, keys: Keys) -> str:
    known = keys.known()
    if key in known:  # it belongs to another option of its table
        table = key.rpartition(".")[0]
        return f"{key} has no place beside the other keys of {table}"
    same_table = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    close = difflib.get_close_matches(key, same_table, n=1) or difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key}" + (f", the nearest known key is {close[0]}" if close else "")
