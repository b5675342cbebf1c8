"""`python -m harness`: what people and CI scripts ask for outside of a test run.

Exit codes: 0 fine, 1 something was found, 2 wrong usage (argparse).
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from harness import doctor, gpus_command, procfs, remains, specs, state_dir
from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.remains import Remains

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse has no other name for it

_LIMIT_S = 10.0
_STOP_LIMIT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command, print what it found, and give the exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what a terminal's encoding does not
    try:
        found: int = options.command(options)
    except HarnessError as error:
        sys.stderr.write(f"python -m harness: error: {error}\n")
        return 2
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness",
        description="Look after servers that tests have launched.",
        epilog="Exit codes: 0 fine, 1 something was found, 2 wrong usage. HARNESS_STATE_DIR names the state directory;"
        " HARNESS_CGROUP=off has servers killed without cgroups.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_live(commands)
    _add_checks(commands)
    _add_report(commands)
    return parser


def _add_live(commands: _Commands) -> None:
    ps = commands.add_parser(
        "ps",
        help="show every live watchdog of this user, its test and its servers",
        description="Show every live watchdog of this user, whatever its state directory, the test that runs, and each"
        " server with its tree: how many processes, the sum of their resident memory, and the ports they listen on."
        " Adopted servers are not shown.",
    )
    ps.set_defaults(command=_ps)
    stop = commands.add_parser(
        "stop",
        help="stop all servers of a watchdog, also where its test process hangs",
        description="Tell watchdogs (SIGTERM) to stop all their servers in parallel and to end, whatever their test"
        " processes do, and wait for it. Exit code 1: something is left after the timeout.",
    )
    stop.add_argument("pids", metavar="PID", nargs="*", type=_pid, help="a watchdog, as ps shows it")
    stop.add_argument("--all", action="store_true", help="every live watchdog of this user")
    stop.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=_STOP_LIMIT_S,
        help=f"seconds to wait at most (default: {_STOP_LIMIT_S:g}); what has been told goes on after them",
    )
    stop.set_defaults(command=_stop, usage=stop.error)
    for command in (ps, stop):
        command.add_argument("--json", action="store_true", help="print JSON")


def _add_checks(commands: _Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="show what dead runs have left behind, or end it",
        description="Show the processes of servers whose watchdog and keeper have both died, or end them. Those of a"
        " live run are never touched. The next watchdog that is started with this state directory ends them as well.",
    )
    sweep.add_argument("--yes", action="store_true", help="end what is found; exit with 1 if something survived")
    sweep.set_defaults(command=_sweep)
    check = commands.add_parser(
        "doctor",
        help="say what the harness finds on this machine",
        description="Say what the harness finds on this machine, how it kills, and what to do where it is not fine.",
    )
    check.set_defaults(command=_doctor)
    gpus = commands.add_parser(
        "gpus",
        help="show GPUs, who has them and who waits; lift a quarantine",
        description="Show each GPU with its memory in use now and before its leases, who has it, and who waits. Exit"
        " code 1: one is quarantined or cannot be read. HARNESS_GPU_DIR names the directory that several users share.",
    )
    gpus.add_argument(
        "--release",
        metavar="UUID|INDEX|all",
        type=_not_empty,
        help="lift the quarantine of a GPU, or of all. Of one that is named, leases end whose processes are dead or in"
        " another PID namespace. Its memory is not looked at: what is in use then counts as in use before",
    )
    gpus.set_defaults(command=_gpus)
    for command in (sweep, check, gpus):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument(
            "--state-dir", metavar="DIR", type=_not_empty, help="default: as for a run (see the README, State)"
        )


def _add_report(commands: _Commands) -> None:
    report = commands.add_parser(
        "report",
        help="sum up a file that --harness-report has written",
        description="Sum up the events in a file that pytest --harness-report=FILE has written, also of a run that was"
        " killed. Exit code 1: something leaked, died, or was not seen to end.",
    )
    report.add_argument("file", metavar="FILE", type=_not_empty, help="- is the standard input")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(command=_report)


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 < int(text) < 1 << 22):  # PID_MAX_LIMIT of the kernel
        raise argparse.ArgumentTypeError(f"{text!r} is no pid")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return specs.seconds(float(text), "--timeout")
    except (ValueError, HarnessError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None


def _ps(options: argparse.Namespace) -> int:
    from harness import live, live_command  # noqa: PLC0415 - psutil: `doctor` and `sweep` do without any package

    found = live.watchdogs()
    if options.json:
        _print(json.dumps([asdict(watchdog) for watchdog in found], indent=2))
    else:
        _print("\n".join(map(doctor.plain, live_command.table(found))))
    return 0


def _stop(options: argparse.Namespace) -> int:
    if options.all == bool(options.pids):
        options.usage("name the watchdogs that are to stop, or --all")
    from harness import live_command  # noqa: PLC0415 - as above

    rows, is_clean = live_command.stop(None if options.all else options.pids, limit_s=options.timeout)
    if options.json:
        _print(json.dumps(rows, indent=2))
    else:
        _print("\n".join(map(live_command.stop_line, rows)) or "no watchdog is running")
    return 0 if is_clean else 1


def _sweep(options: argparse.Namespace) -> int:
    if options.state_dir is None and not state_dir.default().exists():
        found = left = remains.Remains()  # nothing has been launched yet
    else:
        directory = state_dir.find(options.state_dir, make=False)
        found = left = remains.find(directory)
    rows = _rows(found)
    if options.yes and found.entries:
        left = remains.end(directory, limit_s=_LIMIT_S)
        survivors = {stat.pid for stats in left.processes.values() for stat in stats}
        for row in rows:
            row["outcome"] = "survived" if row["pid"] in survivors else "ended"
    if options.json:
        unreadable = [{"path": str(path), "reason": reason} for path, reason in found.unreadable.items()]
        _print(json.dumps({"found": rows, "unreadable": unreadable}, indent=2))
    else:
        _print(_table(rows, found))
        if rows and not options.yes:
            _print("python -m harness sweep --yes ends them (with the same --state-dir, if one was given)")
    return 0 if left.is_empty else 1


def _rows(found: Remains) -> list[dict[str, object]]:
    return [
        {
            "run": path.parent.name,
            "server": found.entries[path].name,
            "pid": stat.pid,
            "name": procfs.name(stat.pid),
            "age_s": round(procfs.age_s(stat), 1),
            "outcome": "found",
        }
        for path, stats in found.processes.items()
        for stat in sorted(stats, key=lambda stat: stat.pid)
    ]


def _table(rows: list[dict[str, object]], found: Remains) -> str:
    lines = [f"{'PID':>8}  {'AGE s':>8}  {'OUTCOME':8}  {'RUN':20}  {'SERVER':24}  PROCESS"] if rows else []
    lines += [
        f"{row['pid']:>8}  {row['age_s']:>8}  {row['outcome']:8}  {row['run']:20}  {doctor.plain(row['server']):24}"
        f"  {doctor.plain(row['name'])}"
        for row in rows
    ]
    lines += [
        f"{doctor.plain(path)} cannot be read: {doctor.plain(reason)}" for path, reason in found.unreadable.items()
    ]
    return "\n".join(lines or ["no dead run has left anything"])


def _doctor(options: argparse.Namespace) -> int:
    findings = doctor.examine(options.state_dir)
    if options.json:
        _print(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        _print("\n".join(finding.line() for finding in findings))
    return 0 if all(finding.is_fine for finding in findings) else 1


def _gpus(options: argparse.Namespace) -> int:
    found = gpus_command.look(options.state_dir, options.release)
    if options.json:
        _print(json.dumps(asdict(found), indent=2))
    else:
        _print("\n".join(map(doctor.plain, gpus_command.lines(found))))
    return 0 if found.is_fine else 1


def _report(options: argparse.Namespace) -> int:
    from harness import report_command  # noqa: PLC0415 - no other command needs it

    found = report_command.read(options.file)
    if options.json:
        _print(json.dumps(found.as_event(), indent=2))
    else:
        _print("\n".join(map(doctor.plain, found.lines())))
    return 0 if found.is_well else 1


def _print(text: str) -> None:
    print(text)  # noqa: T201 - a command prints
