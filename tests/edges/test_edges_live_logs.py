"""What servers write is shown while they write it, by a process of its own, whatever becomes of the others.

A line that is read here may take as long as it likes: pytest-timeout ends what hangs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import processes
import pytest

from harness import logs, procfs
from harness.reporting import follower, following
from harness.reporting.following import Follower

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT_S = 60.0
TAIL_BYTES = 1 << 16
BEAT = "beat"


class Program:
    """The program itself, with this process as its parent."""

    def __init__(self, look: str, directory: Path, stdout: int) -> None:
        command = [sys.executable, *following._flags(), follower.__file__, str(os.getpid()), look]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE)
        self._beats = directory / "beats.log"

    def tell(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def follow(self, path: Path, name: str = "rank0", start: int = 0) -> None:
        self.tell(json.dumps({"name": name, "path": str(path), "start": start}).encode())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode()

    def beat(self) -> None:
        """Wait until it has looked at every log, none of which has something to show.

        The second line is written after the round that showed the first, so a whole round has passed in between.
        """
        self.follow(self._beats, BEAT)
        for _ in range(2):
            append(self._beats, b"\n")
            assert self.line() == f"[{BEAT}] \n"

    def rest(self) -> str:
        """End its input, and give what it shows from then on: it must end with 0, and say nothing of errors."""
        shown, errors = self.process.communicate(timeout=LIMIT_S)
        assert (self.process.returncode, errors) == (0, b"")
        return shown.decode()


@contextlib.contextmanager
def running(directory: Path, look: str = "plain", stdout: int = subprocess.PIPE) -> Iterator[Program]:
    program = Program(look, directory, stdout)
    with program.process, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(program.process.kill)
        yield program


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with running(tmp_path) as started:
        yield started


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "server.log"
    path.touch()
    return path


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# ---- the program: which bytes


def test_lines_are_shown_as_they_are_written(program: Program, log: Path) -> None:
    append(log, b"before\n")
    program.follow(log)
    assert program.line() == "[rank0] before\n"
    append(log, b"one\n\ntwo\n")
    assert [program.line() for _ in range(3)] == ["[rank0] one\n", "[rank0] \n", "[rank0] two\n"]
    assert program.rest() == ""


def test_what_was_written_before_the_start_is_not_shown(program: Program, log: Path) -> None:
    append(log, b"before\nafter\n")
    program.follow(log, start=len(b"before\n"))
    assert program.line() == "[rank0] after\n"


def test_a_log_that_is_named_twice_is_shown_once(program: Program, log: Path) -> None:
    append(log, b"once\n")
    program.follow(log)
    program.follow(log, "again")
    assert program.rest() == "[rank0] once\n"


def test_a_torn_line_is_held_back_until_it_is_complete(program: Program, log: Path) -> None:
    append(log, b"lo")
    program.follow(log)
    program.beat()
    append(log, b"ad")
    program.beat()
    append(log, b"ed\nrest")
    assert program.line() == "[rank0] loaded\n"
    program.beat()
    assert program.rest() == "[rank0] rest\n"


def test_a_character_that_is_written_in_pieces_is_whole(program: Program, log: Path) -> None:
    program.follow(log)
    for byte in "é€😀".encode():
        append(log, bytes([byte]))
        program.beat()
    append(log, b"\n")
    assert program.line() == "[rank0] é€😀\n"


def test_a_character_on_the_border_of_two_reads_is_whole(program: Program, log: Path) -> None:
    text = "x" + "é" * 500
    lines = [text] * 300  # more than one read of 64 KiB takes; every border falls elsewhere in a line
    append(log, "".join(f"{line}\n" for line in lines).encode())
    program.follow(log)
    assert program.rest() == "".join(f"[rank0] {line}\n" for line in lines)


@pytest.mark.parametrize(
    "data",
    [
        b"\x1b[1;31mred\x1b[0m",
        b"\x1b]0;title\x07text",
        b"bell\x07 back\x08 null\x00 tab\tend",
        b"10 %\r20 %\r30 %\r",
        b"windows\r",
        b"no \xff\xfe text",
        "\u202eturned\u2028 \x85".encode(),
    ],
)
def test_what_is_no_text_is_shown_as_in_reports(program: Program, log: Path, data: bytes) -> None:
    append(log, data + b"\n")
    program.follow(log)
    shown = program.line()
    assert shown == f"[rank0] {logs.printable(data.decode(errors='replace'))}\n"
    assert shown.rstrip("\n").isprintable()


def test_a_name_may_hold_anything(program: Program, log: Path) -> None:
    append(log, b"text\n")
    program.follow(log, "\x1b[31mra\nnk\x07\udc80" + "k" * 1000)
    assert program.line() == f"[{'ra?nk??' + 'k' * 93}] text\n"


def test_each_server_has_a_colour_of_its_own_and_its_text_has_none(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.log" for number in range(7)]
    with running(tmp_path, "colour") as program:
        for path in paths:
            path.write_text("\x1b[41mtext\n", encoding="utf-8")
            program.follow(path, path.stem)
        shown = program.rest().splitlines()
    colours = [line.partition("m")[0] + "m" for line in shown]
    assert shown == [f"{colour}[{number}]\x1b[0m text" for number, colour in enumerate(colours)]
    assert len(set(colours)) == 6
    assert colours[0] == colours[6]


# ---- the program: long lines, long logs


@pytest.mark.parametrize("length", [2001, 70_000, 900_000])
def test_a_long_line_is_cut(program: Program, log: Path, length: int) -> None:
    append(log, b"a" * 2000 + b"\n" + b"b" * length + b"\nnext\n")
    program.follow(log)
    assert program.rest() == f"[rank0] {'a' * 2000}\n[rank0] {'b' * 2000} ...\n[rank0] next\n"


def test_of_a_long_progress_bar_the_last_state_is_shown(program: Program, log: Path) -> None:
    append(log, b"".join(b"%6d %%\r" % number for number in range(50_000)) + b"\nnext\n")
    program.follow(log)
    assert program.rest() == "[rank0]  49999 %\n[rank0] next\n"


def test_a_line_without_end_takes_no_memory(program: Program, log: Path) -> None:
    program.follow(log)
    for _ in range(20):
        append(log, b"x" * 900_000)
        program.beat()
    assert memory_peak_mib(program) < 64
    assert program.rest() == f"[rank0] {'x' * 2000} ...\n"


def memory_peak_mib(program: Program) -> float:
    return int(procfs.status(program.process.pid)["VmHWM"].split()[0]) / 1024


def test_of_a_gibibyte_the_end_is_shown(program: Program, log: Path) -> None:
    append(log, b"torn")
    program.follow(log)
    program.beat()
    with log.open("r+b") as file:  # what is read of the hole are zeros, as if they had been written
        os.pwrite(file.fileno(), b"\nthe last\n", 1 << 30)
    left_out = (1 << 30) + 1 - 4
    assert program.line() == "[rank0] torn ...\n"
    assert program.line() == f"[rank0] ... {left_out} bytes left out: {log}\n"
    assert program.line() == "[rank0] the last\n"
    assert memory_peak_mib(program) < 64
    append(log, b"goes on\n")
    assert program.line() == "[rank0] goes on\n"


def test_of_a_gibibyte_of_lines_whole_lines_are_shown(program: Program, log: Path) -> None:
    os.truncate(log, 1 << 30)
    append(log, b"".join(b"line %05d\n" % number for number in range(10_000)))
    program.follow(log)
    note, *lines = program.rest().splitlines()
    kept = TAIL_BYTES // len("line 00000\n")
    assert note.endswith(f" bytes left out: {log}")
    assert lines == [f"[rank0] line {number:05}" for number in range(10_000 - kept, 10_000)]


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["torn", "whole"])
def test_of_a_gibibyte_in_one_line_the_end_is_shown(program: Program, log: Path, end: bytes) -> None:
    os.truncate(log, 1 << 30)
    append(log, end)
    program.follow(log)
    left_out = (1 << 30) + len(end) - TAIL_BYTES
    assert program.rest() == f"[rank0] ... {left_out} bytes left out: {log}\n[rank0] {'?' * 2000} ...\n"


# ---- the program: what becomes of files


def test_a_log_that_is_not_there_is_waited_for(program: Program, log: Path) -> None:
    log.unlink()
    program.follow(log)
    program.beat()
    append(log, b"here\n")
    assert program.line() == "[rank0] here\n"


def test_a_log_that_is_truncated_is_followed_from_its_new_beginning(program: Program, log: Path) -> None:
    append(log, b"a first line\ntorn")
    program.follow(log)
    assert program.line() == "[rank0] a first line\n"
    program.beat()
    log.write_bytes(b"new\n")
    assert [program.line(), program.line()] == ["[rank0] torn\n", "[rank0] new\n"]


def test_a_log_that_is_replaced_is_followed_from_its_new_beginning(program: Program, log: Path) -> None:
    append(log, b"first\n")
    program.follow(log)
    assert program.line() == "[rank0] first\n"
    other = log.with_name("other")
    other.write_bytes(b"a longer one\n")
    other.rename(log)
    assert program.line() == "[rank0] a longer one\n"


def test_a_log_that_is_removed_is_no_error(program: Program, log: Path) -> None:
    append(log, b"torn")
    program.follow(log)
    program.beat()
    log.unlink()
    program.beat()
    assert program.rest() == "[rank0] torn\n"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_left_alone(program: Program, log: Path, make: Callable[[Path], None]) -> None:
    log.unlink()
    make(log)
    program.follow(log)
    program.beat()
    assert program.rest() == ""


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nonsense",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"[" * 60_000,
        b"x" * 300_000,
        b'{"name": 1, "path": "/dev/null", "start": 0}',
        b'{"name": "x", "path": 1, "start": 0}',
        b'{"name": "x", "path": "/dev/null", "start": "0"}',
        b'{"name": "x", "path": "/dev/null", "start": 1e3}',
        b'{"name": "x", "path": "/a\\u0000b", "start": 0}',
        b'{"name": "x", "path": "/\\ud800", "start": 0}',
    ],
    ids=lambda line: line[:12].decode(errors="replace"),
)
def test_an_order_that_is_none_is_ignored(program: Program, log: Path, line: bytes) -> None:
    append(log, b"text\n")
    program.tell(line)
    program.follow(log)
    assert program.line() == "[rank0] text\n"


# ---- the program: its end, and its output


def test_ctrl_c_does_not_end_it(program: Program, log: Path) -> None:
    program.beat()
    program.process.send_signal(signal.SIGINT)
    append(log, b"while it stops\n")
    program.follow(log)
    assert program.line() == "[rank0] while it stops\n"
    assert program.rest() == ""


def test_a_request_to_end_does(program: Program) -> None:
    program.beat()
    program.process.terminate()
    assert program.process.wait(LIMIT_S) == -signal.SIGTERM


def test_it_ends_quietly_where_nobody_reads_any_more(program: Program, log: Path) -> None:
    program.follow(log)
    program.beat()
    assert program.process.stdout is not None
    program.process.stdout.close()
    append(log, b"unseen\n")
    assert program.process.wait(LIMIT_S) == 0
    assert program.process.stderr is not None
    assert program.process.stderr.read() == b""


@pytest.mark.parametrize("is_blocking", [True, False], ids=["blocking", "non-blocking"])
def test_an_output_that_is_full_is_waited_for(tmp_path: Path, log: Path, *, is_blocking: bool) -> None:
    lines = [f"line {number} {'x' * 100}\n" for number in range(5000)]  # many times what a pipe holds
    append(log, "".join(lines).encode())
    reader, writer = os.pipe()
    with open(reader, "rb") as output:
        with open(writer, "wb"):
            os.set_blocking(writer, is_blocking)
            program = Program("plain", tmp_path, writer)
        with program.process:
            program.follow(log)
            processes.wait_for(lambda: unread(reader) > 60_000, LIMIT_S, "a full pipe")
            assert program.process.stdin is not None
            program.process.stdin.close()
            assert output.read().decode() == "".join(f"[rank0] {line}" for line in lines)
            assert program.process.wait(LIMIT_S) == 0


def unread(descriptor: int) -> int:
    found = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    return int.from_bytes(found, sys.byteorder)


# A test process that follows a log, and has forked a child that holds the pipe to the program, but not its output.
PARENT = """
import os, sys
from pathlib import Path
from harness.reporting.following import Follower

follower = Follower(1, with_colour=False)
child = os.fork()
if child == 0:
    os.dup2(2, 1)
    os.read(0, 1)
    os._exit(0)
follower.follow("rank0", Path(sys.argv[1]))
os.read(int(sys.argv[2]), 1)
follower.close(60)
os.write(1, b"closed\\n")
os.waitpid(child, 0)
"""


@contextlib.contextmanager
def parent(log: Path, closes: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-W", "error", "-c", PARENT, str(log), str(closes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[closes]) as process:
        try:
            yield process
        finally:
            left = processes.identities(processes.tree(process.pid))
            process.kill()
            process.stdin.close()  # type: ignore[union-attr]  # which ends the child
            processes.wait_gone(left, LIMIT_S)


@pytest.fixture
def closes() -> Iterator[tuple[int, int]]:
    """Give a pipe, on which the parent waits before it closes its follower."""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        yield reader, writer


def test_it_ends_with_its_parent_though_a_child_of_that_holds_its_input(log: Path, closes: tuple[int, int]) -> None:
    append(log, b"before\n")
    with parent(log, closes[0]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"[rank0] before\n"
        child, program = sorted(processes.tree(process.pid), key=is_program)
        held = f"/proc/{child}/fd"
        pipe = os.readlink(f"/proc/{program}/fd/0")
        assert pipe in {os.readlink(f"{held}/{number}") for number in os.listdir(held)}
        who = processes.identities([child, program])
        os.kill(program, signal.SIGSTOP)
        append(log, b"at the last moment\ntorn")
        process.kill()
        process.wait(LIMIT_S)
        os.kill(program, signal.SIGCONT)
        assert process.stdout.read() == b"[rank0] at the last moment\n[rank0] torn\n"
        processes.wait_gone(who[1:], LIMIT_S)
        assert processes.is_running(who[0])
        process.stdin.close()  # type: ignore[union-attr]
        processes.wait_gone(who, LIMIT_S)


def test_it_ends_with_its_parent_though_its_output_takes_nothing(log: Path, closes: tuple[int, int]) -> None:
    append(log, b"".join(b"line %d\n" % number for number in range(50_000)))
    with parent(log, closes[0]) as process:
        assert process.stdout is not None
        reader = process.stdout.fileno()
        processes.wait_for(lambda: unread(reader) > 60_000, LIMIT_S, "a full pipe")
        found = [pid for pid in processes.tree(process.pid) if is_program(pid)]
        everybody = processes.identities(processes.tree(process.pid))
        (program,) = processes.identities(found)
        process.kill()
        processes.wait_gone([program], LIMIT_S)
        process.stdin.close()  # type: ignore[union-attr]  # which ends the child
        processes.wait_gone(everybody, LIMIT_S)


def is_program(pid: int) -> bool:
    return "follower.py" in procfs.command_line(pid)


def test_what_a_killed_parent_had_ordered_is_shown(log: Path) -> None:
    append(log, b"text\n")
    code = """
import os, signal, sys
from pathlib import Path
from harness.reporting.following import Follower

follower = Follower(1, with_colour=False)
os.kill(follower._process.pid, signal.SIGSTOP)
follower.follow("rank0", Path(sys.argv[1]))
os.write(1, b"ordered\\n")
os.read(0, 1)
"""
    command = [sys.executable, "-c", code, str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ordered\n"
        (program,) = processes.identities(processes.tree(process.pid))
        process.kill()
        process.wait(LIMIT_S)
        os.kill(program.pid, signal.SIGCONT)
        assert process.stdout.read() == b"[rank0] text\n"
        processes.wait_gone([program], LIMIT_S)


def test_a_close_waits_for_no_child_that_holds_the_input(log: Path, closes: tuple[int, int]) -> None:
    append(log, b"text\ntorn")
    with parent(log, closes[0]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"[rank0] text\n"
        os.write(closes[1], b"x")
        assert process.stdout.readline() == b"[rank0] torn\n"
        assert process.stdout.readline() == b"closed\n"
        assert [is_program(pid) for pid in processes.tree(process.pid)] == [False]


# ---- the client


@pytest.fixture
def output() -> Iterator[tuple[Follower, Callable[[], str]]]:
    """Give a follower, and a function that closes it and gives what it has shown."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as shown:
        with open(writer, "wb"):
            started = Follower(writer, with_colour=False)

        def end() -> str:
            started.close(LIMIT_S)
            return shown.read()

        yield started, end
        started.close()


def pid_of(started: Follower) -> int:
    assert started._process is not None
    return started._process.pid


def test_a_log_is_shown_up_to_the_close(output: tuple[Follower, Callable[[], str]], log: Path) -> None:
    started, end = output
    append(log, b"before\nafter\ntorn")
    started.follow("rank0", log, start=len(b"before\n"))
    pid = pid_of(started)
    assert end() == "[rank0] after\n[rank0] torn\n"
    assert processes.identify(pid) is None  # nor is it a zombie
    started.follow("rank0", log)
    started.close()


def test_ctrl_c_while_it_starts_does_not_end_it(output: tuple[Follower, Callable[[], str]], log: Path) -> None:
    started, end = output
    os.kill(pid_of(started), signal.SIGINT)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    append(log, b"text\n")
    started.follow("rank0", log)
    assert end() == "[rank0] text\n"


def test_colour_is_asked_for(log: Path) -> None:
    reader, writer = os.pipe()
    append(log, b"text\n")
    with open(reader, encoding="utf-8") as shown:
        with open(writer, "wb"):
            started = Follower(writer, with_colour=True)
        started.follow("rank0", log)
        started.close(LIMIT_S)
        assert shown.read() == "\x1b[36m[rank0]\x1b[0m text\n"


def test_a_path_may_hold_what_is_no_text(output: tuple[Follower, Callable[[], str]], tmp_path: Path) -> None:
    started, end = output
    path = tmp_path / os.fsdecode("é \n".encode() + b"\xff.log")
    append(path, b"text\n")
    started.follow("rank0", path)
    assert end() == "[rank0] text\n"


def test_a_full_pipe_is_not_waited_for(output: tuple[Follower, Callable[[], str]], log: Path, tmp_path: Path) -> None:
    started, end = output
    append(log, b"text\n")
    pid = pid_of(started)
    os.kill(pid, signal.SIGSTOP)
    started.follow("rank0", log)
    for number in range(3000):
        started.follow("x" * 100, tmp_path / f"{number}.log")
    os.kill(pid, signal.SIGCONT)
    assert end() == "[rank0] text\n"


def test_what_a_pipe_might_tear_is_not_ordered(output: tuple[Follower, Callable[[], str]], log: Path) -> None:
    started, end = output
    append(log, b"text\n")
    started.follow("x" * 5000, log)
    assert end() == ""


def test_one_that_does_not_end_is_killed(output: tuple[Follower, Callable[[], str]]) -> None:
    started, _ = output
    pid = pid_of(started)
    os.kill(pid, signal.SIGSTOP)
    started.close(limit_s=0.1)
    assert processes.identify(pid) is None


def test_one_that_has_ended_is_not_missed(output: tuple[Follower, Callable[[], str]], log: Path) -> None:
    started, end = output
    pid = pid_of(started)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    started.follow("rank0", log)
    assert end() == ""
    assert processes.identify(pid) is None


def test_one_that_cannot_start_is_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    before = processes.descriptors()
    started = Follower(1, with_colour=True)
    started.follow("rank0", log)
    started.close()
    assert processes.descriptors() == before


def test_a_forked_child_does_not_disturb_it(run_script: Callable[..., str], log: Path) -> None:
    # The child ends as a program does, with its warnings as errors; it may have its own servers shown, but closes none.
    code = f"""
    import os, sys
    from pathlib import Path
    from harness.reporting.following import Follower

    log = Path({str(log)!r})
    follower = Follower(1, with_colour=False)
    child = os.fork()
    if child == 0:
        log.write_text("of the child\\n")
        follower.follow("child", log)
        follower.close()
        sys.exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    other = log.with_name("other.log")
    other.write_text("of the parent\\n")
    follower.follow("parent", other)
    follower.close(60)
    """
    assert run_script(code) == "[child] of the child\n[parent] of the parent\n"
