"""What a field of a message may hold, by its annotation. Pure.

A message comes from another process: a field of another type, NaN or an endless time must be refused where it comes in.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from harness.records import Record

    _Kind = TypeVar("_Kind", bound=Record)

# No number, size or time (in seconds) is as large as that.
_NO_NUMBER = 1 << 64


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _NO_NUMBER


def _is_time(value: object) -> bool:
    # NaN, and what a sum of times cannot be, would make a deadline that never passes.
    return _is_int(value) or (isinstance(value, float) and abs(value) < _NO_NUMBER)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list_of(is_item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _is_map_to(is_item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_item, value.values()))


# By the text of the field's annotation: typing is not imported in the watchdog. Names in JSON objects are texts.
_IS: dict[str, Callable[[object], bool]] = {
    "int": _is_int,
    "float": _is_time,
    "str": _is_text,
    "bool": lambda value: isinstance(value, bool),
    "str | None": lambda value: value is None or _is_text(value),
    "int | None": lambda value: value is None or _is_int(value),
    "float | None": lambda value: value is None or _is_time(value),
    "list[int]": _is_list_of(_is_int),
    "list[str]": _is_list_of(_is_text),
    **dict.fromkeys(
        ("list[Survivor]", "list[Outcome]", "list[DeviceRelease]", "list[GpuProcess]"),
        _is_list_of(lambda value: isinstance(value, list)),
    ),
    "Lease": lambda value: isinstance(value, list),
    "dict[str, int]": _is_map_to(_is_int),
    "dict[str, str]": _is_map_to(_is_text),
}


def checked(record: _Kind) -> _Kind:
    """Give the record back; raises TypeError, which names the field, if one holds what it may not."""
    for field, kind in type(record).__annotations__.items():
        if not _IS[kind](getattr(record, field)):
            raise TypeError(field)
    return record
