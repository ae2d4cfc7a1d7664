"""The base of every configuration."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of every configuration: immutable; an unknown key is an error, and a value is never converted.

    ``younger`` names the keys that came after others had been hashed, each with a default that means what leaving it
    out meant before. If it asks for nothing new, its hash stays: runs go on and repeat across versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    younger: ClassVar[frozenset[str]] = frozenset()

    def json_for_hash(self) -> str:
        """Return the JSON of all fields in a fixed order, without younger keys that are at their defaults."""
        return self.model_dump_json(exclude=self.nothing_new())

    def nothing_new(self) -> dict[str, Any]:
        """The younger keys at their defaults, here and in configurations within, as pydantic excludes them."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.younger and value == field.default:
                found[name] = True
            elif isinstance(value, Frozen) and (within := value.nothing_new()):
                found[name] = within
        return found
