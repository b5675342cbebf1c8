"""What was seen on real devices, as Markdown."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.gpu_scenarios import Trial


def markdown(about: dict[str, Any], facts: dict[str, Any], trials: Sequence[Trial], wrong: Sequence[str]) -> str:
    """Give the page."""
    devices = f"{len(about['devices'])} x {about['devices'][0]}"
    machine = f"driver {about['driver']}, Linux {about['kernel']}, Python {about['python']}"
    lines = [
        f"{about['date']}: {devices}, {machine}, {len(trials)} trials, {len(wrong)} wrong.",
        "",
        "| scenario | trials | verdicts | figures (lowest..highest) |",
        "| --- | --- | --- | --- |",
    ]
    by_name: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_name[trial.name].append(trial)
    lines += [_row(name, found) for name, found in by_name.items()]
    values = facts.get("CUDA_VISIBLE_DEVICES", [])
    if facts:
        told = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "CUDA_VISIBLE_DEVICES")
        lines += ["", f"Accounting: {told}.", "", "| CUDA_VISIBLE_DEVICES | CUDA sees | the harness sees |"]
        lines += ["| --- | --- | --- |"]
        lines += [f"| `{row['value']}` | {' '.join(row['cuda'])} | {' '.join(row['harness'])} |" for row in values]
    lines += ["", *(f"- wrong: {text}" for text in wrong)]
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, trials: Sequence[Trial]) -> str:
    verdicts = sorted({str(trial.figures.get("verdict", "")) for trial in trials})
    figures: dict[str, list[Any]] = defaultdict(list)
    for trial in trials:
        for figure, value in trial.figures.items():
            if figure != "verdict":
                figures[figure].append(value)
    cells = "; ".join(f"{figure} {_range(values)}" for figure, values in figures.items())
    return f"| {name} | {len(trials)} | {', '.join(verdicts)} | {cells} |"


def _range(values: Sequence[Any]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values) or len(set(numbers)) == 1:
        return ", ".join(sorted({str(value) for value in values}))
    return f"{min(numbers):g}..{max(numbers):g}"
