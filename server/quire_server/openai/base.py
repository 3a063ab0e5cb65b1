"""What every part of a request is: strict, and honest about what it does not know."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from quire_server.errors import refused_field

LONG = 2048  # bytes, characters or tokens: less is worked on before a thread could be woken


class Strict(BaseModel):
    """JSON types are taken as they are (no "3" for 3), and what is not known is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    refused: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}
    _size: int = PrivateAttr(default=LONG)

    @property
    def size(self) -> int:
        """Bytes of the body that this is; LONG where that is not known."""
        return self._size

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        """A field of ``refused`` may be null or ask for nothing; a field that is null counts as not given."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.refused:
                allowed, reason = cls.refused[name]
                if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
                    raise refused_field(name, reason, "unsupported_parameter")
            elif name not in cls.model_fields:
                raise refused_field(name, "unrecognized request argument", "unknown_parameter")
            elif value is not None:
                kept[name] = value
        return kept
