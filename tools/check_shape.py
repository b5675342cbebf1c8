"""Checks the shape of the source: module and function lengths, and that the architecture page is true to it."""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

from harness.watchdog.phases import TRANSITIONS

PAGE = Path("harness/ARCHITECTURE.md")
LONGEST_MODULE_LINES = 400
LONGEST_FUNCTION_LINES = 45
MEDIAN_FUNCTION_LINES = 9


def main() -> int:
    if "--write" in sys.argv:
        PAGE.write_text(with_diagram(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    faults: list[str] = []
    lengths: list[int] = []
    for path in sorted(Path("harness").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LONGEST_MODULE_LINES:
            faults.append(f"{path}: {text.count(chr(10))} lines, more than {LONGEST_MODULE_LINES}")
        for function in functions(text):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            lengths.append(length)
            if length > LONGEST_FUNCTION_LINES:
                faults.append(f"{path}:{function.lineno}: {function.name} has {length} lines")
    median = statistics.median(lengths)
    if median > MEDIAN_FUNCTION_LINES:
        faults.append(f"the median function has {median} lines, more than {MEDIAN_FUNCTION_LINES}")
    faults += undocumented_modules()
    if PAGE.read_text(encoding="utf-8") != with_diagram(PAGE.read_text(encoding="utf-8")):
        faults.append(f"the diagram in {PAGE} is not that of the table: run python tools/check_shape.py --write")
    for fault in faults:
        print(fault)
    print(f"{len(lengths)} functions, median {median:g} lines, longest {max(lengths)}")
    return 1 if faults else 0


def functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def undocumented_modules() -> list[str]:
    page = PAGE.read_text(encoding="utf-8")
    modules = [path for path in sorted(Path("harness").rglob("*.py")) if path.name != "__init__.py"]
    return [f"{PAGE} does not name {path.name}" for path in modules if f"`{path.stem}`" not in page]


def with_diagram(page: str) -> str:
    """Give the page with the diagram of a server's phases as the table has it now."""
    begin, end = "```mermaid\n", "```\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    lines = ["stateDiagram-v2", "    [*] --> launching", "    gone --> [*]"]
    for (phase, sign), following in TRANSITIONS.items():
        lines.append(f"    {phase.value} --> {following.value}: {sign.name.lower().replace('_', ' ')}")
    return before + begin + "\n".join(lines) + "\n" + end + after


if __name__ == "__main__":
    sys.exit(main())
