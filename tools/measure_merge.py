"""Makes coverage data of what `measure_watchdog` has left: python -m tools.measure_merge DIRECTORY DATA-FILE."""

from __future__ import annotations

import marshal
import sys
from collections import defaultdict
from pathlib import Path

from coverage import CoverageData

_LINE_BITS = 28
_LINE = (1 << _LINE_BITS) - 1


def main() -> None:
    """Merge all files of a directory."""
    directory, data_file = sys.argv[1:]
    packed: defaultdict[str, set[int]] = defaultdict(set)
    files = list(Path(directory).iterdir())
    for path in files:
        for filename, arcs in _read(path).items():
            packed[filename].update(arcs)
    data = CoverageData(basename=data_file)
    data.add_arcs({filename: [_arc(arc) for arc in arcs] for filename, arcs in packed.items()})
    data.write()
    print(f"measured in {len(files)} watchdogs, keepers and roots: {len(packed)} files")
    if not packed:
        sys.exit("the watchdogs were not measured")


def _read(path: Path) -> dict[str, list[int]]:
    try:
        found: dict[str, list[int]] = marshal.loads(path.read_bytes())  # noqa: S302 - our own processes wrote it
    except (EOFError, ValueError):
        return {}  # it was killed while it wrote
    return found


def _arc(packed: int) -> tuple[int, int]:
    # As coverage's tracer packs them (coverage/ctracer/tracer.c, CTracer_record_pair): two lines and their signs.
    first, second = packed & _LINE, packed >> _LINE_BITS & _LINE
    return (
        -first if packed & 1 << 2 * _LINE_BITS else first,
        -second if packed & 1 << 2 * _LINE_BITS + 1 else second,
    )


if __name__ == "__main__":
    main()
