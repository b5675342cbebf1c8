"""`Record`: a base for small frozen types, as typing.NamedTuple and dataclasses make them; `Sealed`: secret bytes.

The watchdog is started beside every pytest process. Importing `typing` alone costs it 0.6 MiB, `dataclasses` 2 MiB, and
each NamedTuple is compiled when it is defined; a Record costs next to nothing. Type checkers see a frozen dataclass.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar

    from typing_extensions import Self, dataclass_transform
else:
    from functools import partial

    # Only type checkers read the decorator.
    dataclass_transform = partial(partial, lambda decorated, **_options: decorated)


@dataclass_transform(frozen_default=True)
class Record:
    """A frozen object whose fields are its class's annotations, in that order."""

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Take the fields from the annotations."""
        cls._fields = tuple(cls.__annotations__)

    def __init__(self, *values: Any, **named: Any) -> None:
        """Take every field's value, by position or by name; raises TypeError if one is missing or unknown."""
        left = self._fields[len(values) :]
        if len(values) > len(self._fields) or named.keys() != set(left):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self._fields) or 'nothing'}")
        self.__dict__.update(zip(self._fields, values, strict=False))
        self.__dict__.update(named)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a record is frozen."""
        raise AttributeError(f"{type(self).__name__}.{name} cannot be set")

    def __iter__(self) -> Iterator[Any]:
        """Give the values in the fields' order."""
        return iter([self.__dict__[field] for field in self._fields])

    def __eq__(self, other: object) -> bool:
        """Compare the type and all values."""
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        """Hash the values, which must be hashable."""
        return hash((type(self), *self))

    def __repr__(self) -> str:
        """Show the type and every field."""
        shown = ", ".join(f"{field}={self.__dict__[field]!r}" for field in self._fields)
        return f"{type(self).__name__}({shown})"

    def as_dict(self) -> dict[str, Any]:
        """Give the values by field."""
        return dict(self.__dict__)

    def replaced(self, **changes: Any) -> Self:
        """Give a copy with other values in some fields."""
        return type(self)(**{**self.__dict__, **changes})


class Sealed(bytes):
    """Bytes that do not show what they hold: some tracebacks show arguments and locals, and messages hold tokens."""

    def __repr__(self) -> str:
        """Say how many bytes they are."""
        return f"<{len(self)} bytes>"

    def __getitem__(self, part: Any) -> Any:
        """Give a part, which is sealed as well."""
        # Not by way of a local: an interrupt here would show it.
        return Sealed(super().__getitem__(part)) if isinstance(part, slice) else super().__getitem__(part)
