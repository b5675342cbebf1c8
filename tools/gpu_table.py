"""What was seen on real devices, as Markdown."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.gpu_trial import Trial

_HEADS = {
    "behind_sampler_ms": "freed, behind the sampler, ms",
    "sampler_window_ms": "exact to, ms",
    "free_after_ms": "free after, ms",
    "returned_after_ms": "stop returned after, ms",
    "granted_behind_sampler_ms": "next lease, behind the sampler, ms",
}
# They are told in words of their own.
_ELSEWHERE = {"note", "error", "refusal", "sampler_period_ms", "sampler_late_ms", "sampler_longest_reading_ms"}
_LEGEND = """\
"Behind the sampler": after the end of the independent sampler's first reading that shows the memory back within 64 MiB
of before the launch, not to leave it again. "Exact to": from the begin of its last reading that shows memory held to
that moment; while the driver tears a process down it answers nobody, the sampler and the harness alike, and when in
that time the memory was back nobody can tell. Each cell is lowest..highest."""


def markdown(content: dict[str, Any], trials: Sequence[Trial]) -> str:
    """Give the page."""
    about, facts = content["about"], content["facts"]
    machine = f"driver {about['driver']}, Linux {about['kernel']}, Python {about['python']}"
    told = [verdict for trial in trials for verdict in trial.verdicts]
    answers = [answer for trial in trials for answer in trial.answers]
    summary = (
        f"{len(trials)} trials, {len(content['wrong'])} of what was checked wrong. Verdicts: {len(told)}, of which"
        f" {_wrong(told)} wrong. Answers of today's logic: {len(answers)}, of which {_wrong(answers)} wrong."
    )
    lines = [
        f"{about['date']}: {len(about['devices'])} x {about['devices'][0]}, {machine}.",
        "",
        summary,
        *([f"Repeats that the time did not allow: {', '.join(content['not_run'])}."] if content["not_run"] else []),
        "",
        *_trials(trials),
        "",
        _LEGEND,
        _sampling(trials),
        "",
        *_facts(facts),
        *("- wrong: " + text.replace("\n", "\n  ") for text in content["wrong"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _wrong(pairs: Sequence[tuple[str, str]]) -> int:
    return sum(said != true for said, true in pairs)


def _trials(trials: Sequence[Trial]) -> list[str]:
    by_name: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_name[trial.name].append(trial)
    lines = [f"| scenario | trials | verdicts | {' | '.join(_HEADS.values())} | else | today's logic wrong |"]
    lines.append("| --- " * (len(_HEADS) + 5) + "|")
    return lines + [_row(name, found) for name, found in by_name.items()]


def _row(name: str, trials: Sequence[Trial]) -> str:
    figures: dict[str, list[Any]] = defaultdict(list)
    for trial in trials:
        for figure, value in trial.figures.items():
            figures[figure].append(value)
    heads = " | ".join(_range(figures.pop(head, [])) for head in _HEADS)
    cells = [f"{figure} {_range(values)}" for figure, values in figures.items() if figure not in _ELSEWHERE]
    cells += sorted({f"not shown: {trial.not_shown}" for trial in trials if trial.not_shown})
    verdicts = [verdict for trial in trials for verdict in trial.verdicts]
    said = ", ".join(sorted({verdict for verdict, _ in verdicts}))
    said += f" ({len(verdicts) - _wrong(verdicts)} of {len(verdicts)} right)" if verdicts else ""
    answers = [answer for trial in trials for answer in trial.answers]
    today = f"{_wrong(answers)} of {len(answers)}" if answers else ""
    return f"| {name} | {len(trials)} | {said} | {heads} | {'; '.join(cells)} | {today} |"


def _range(values: Sequence[Any]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    words = [str(value) for value in values if isinstance(value, (str, bool))]
    found = [f"{word} x {words.count(word)}" if len(values) > 1 else word for word in sorted(set(words))]
    if numbers:
        low, high = min(numbers), max(numbers)
        found.insert(0, f"{low:g}" if low == high else f"{low:g}..{high:g}")
    return ", ".join(found)


def _sampling(trials: Sequence[Trial]) -> str:
    values = {
        name: _range([trial.figures[name] for trial in trials if name in trial.figures])
        for name in ("sampler_period_ms", "sampler_late_ms", "sampler_longest_reading_ms")
    }
    return (
        f"The sampler's period (medians): {values['sampler_period_ms']} ms; between two of its readings at most"
        f" {values['sampler_late_ms']} ms; one reading took at most {values['sampler_longest_reading_ms']} ms."
    )


def _facts(facts: dict[str, Any]) -> list[str]:
    tables = ("CUDA_VISIBLE_DEVICES", "orders")
    plain = [f"- {name}: {value}" for name, value in facts.items() if name not in tables]
    lines = [*plain, ""] if plain else []
    if facts.get("orders"):
        names = list(facts["orders"][0])
        lines += [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
        lines += [f"| {' | '.join(str(row.get(name, 'never')) for name in names)} |" for row in facts["orders"]] + [""]
    if facts.get("CUDA_VISIBLE_DEVICES"):
        lines += ["| CUDA_VISIBLE_DEVICES | CUDA sees | the harness sees |", "| --- | --- | --- |"]
        rows = facts["CUDA_VISIBLE_DEVICES"]
        lines += [f"| `{row['value']}` | {' '.join(row['cuda'])} | {' '.join(row['harness'])} |" for row in rows]
        lines.append("")
    return lines
