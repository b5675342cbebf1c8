"""Messages: each comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any, get_args

import pytest

from harness import lease_messages, messages
from harness.messages import Message, MessageError, Outcome, Survivor, decode, encode

STUCK = Survivor(7, "D", "nfs_wait", "program --json {}")
PROCESSES = [lease_messages.GpuProcess(7, None, "vllm"), lease_messages.GpuProcess(8, 512, "")]
HELD = lease_messages.DeviceRelease("GPU-1", 0, "held", 0, 900, None, PROCESSES, [], 60.0, None, "why")
LEASE = lease_messages.Lease(
    name="a",
    test="test_a",
    count=2,
    devices=["0", "GPU-1"],
    memory_mib=None,
    visible=None,
    order="PCI_BUS_ID",
    wait_s=10.0,
    release_s=60.0,
    is_for_one=False,
    store="/s",
    is_shared=False,
    paths=["/p"],
)
EACH: list[Message] = [
    messages.Launch(
        name="na\udc80me {name} \U0001f600",
        command=["program", '{"a": {"b": [1]}}', "\udcff", ""],
        environment={"A": "{port}", "B\udc80": "\n\x01"},
        templated=["A"],
        cwd="/",
        ports=["metrics"],
        log_path="/log",
        log_dir="/",
        ask="root",
        grace_s=1.5,
        deadline_s=60.0,
        lease=9,
        devices=["GPU-1"],
        port=8000,
        host="127.0.0.1",
        is_literal=True,
    ),
    messages.Adopt("a", 50, 7, 15.0),
    messages.Stop([1, 2], None, kill=False),
    messages.SendSignal(1, 10),
    messages.Wait(1, "exit", 0.25),
    messages.Status(1),
    messages.Close(),
    messages.Launched(1, 101, 2**63, 201, {"": 8000, "metrics": 8001}),
    messages.Failed("LaunchFailed", "no {port} \udc80"),
    messages.Stopped(
        [
            Outcome(1, "a", 101, "unkillable", None, 0.1, [STUCK, STUCK], "", [], None),
            Outcome(2, "b", 102, "asked", -15, 1.0, [], "", [HELD, HELD], 2.5),
        ],
        0.5,
    ),
    messages.Stopped([], 0.0),
    messages.ServerStatus(1, "gone", root_exited=True, returncode=-9, exited_at=1.5, reason=""),
    messages.Done(),
    messages.AskOrder(root_asked=True),
    messages.GoOrder(),
    messages.KillOrder(),
    LEASE,
    lease_messages.WaitLease(9, 0.5),
    lease_messages.EndLease(9),
    lease_messages.LeaseStatus(9, "granted", "", ["GPU-1"]),
    lease_messages.LeaseOrder(9, LEASE),
    lease_messages.EndLeaseOrder(9),
    lease_messages.TenantOrder(1, 9, "a", 200, 77, ["GPU-1"]),
    lease_messages.TenantStarted(1, 101, 77),
    lease_messages.TenantAsked(1),
    lease_messages.TenantGone(1, is_stuck=True),
    lease_messages.ClientGoneOrder(),
    lease_messages.TenantRecorded(1),
    lease_messages.Released(1, [HELD, HELD]),
    messages.RootStarted(101),
    messages.RootFailed("no such program"),
    messages.KillBegun(),
    messages.RootExit(-15),
    messages.TreeEmpty(),
    messages.Unkilled([STUCK]),
    messages.BeginTest("test_a", None, 30.0, 51, "/stacks", "/report", -1),
    messages.HoldTest(is_held=True),
    messages.InterruptSeen(is_debugging=False),
    messages.EndTest(),
    messages.Overdue("its deadline of 5 s has passed"),
]


@pytest.mark.parametrize("message", EACH, ids=lambda message: type(message).__name__)
def test_each_message_comes_back_as_it_was(message: Message) -> None:
    decoded = decode(encode(message))
    assert type(decoded) is type(message)
    assert decoded == message


@pytest.mark.parametrize("message", EACH, ids=lambda message: type(message).__name__)
def test_orders_and_reports_come_back_in_the_form_that_keepers_use(message: Message) -> None:
    kinds = (messages.Order, messages.Report, messages.BrokerOrder, messages.BrokerReport)
    if isinstance(message, tuple(kind for union in kinds for kind in get_args(union))):
        unpacked = messages.unpack(messages.pack(message))  # type: ignore[arg-type]  # see the line above
        assert type(unpacked) is type(message)
        assert unpacked == message


def test_what_is_nested_comes_back_with_its_types() -> None:
    stopped, unkilled = decode(encode(EACH[9])), decode(encode(messages.Unkilled([STUCK])))
    assert isinstance(stopped, messages.Stopped)
    assert isinstance(unkilled, messages.Unkilled)
    assert [type(outcome) for outcome in stopped.outcomes] == [Outcome, Outcome]
    assert [type(survivor) for survivor in stopped.outcomes[0].survivors + unkilled.survivors] == [Survivor] * 3


def test_every_kind_of_message_is_tried_here() -> None:
    assert {type(message) for message in EACH} == set(get_args(messages.Message))


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("unpickling ran code",))


def wire(name: object, fields: object) -> bytes:
    return json.dumps([name, fields]).encode()


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"\xff\xfe", b"secret", b'"secret"', b"null", b"17", b"[]", b"{}", b'["Status"]', b'["Status", {}, 1]'),
        *(b"[" * 100_000, b"9" * 10_000, pickle.dumps(Trap()), pickle.dumps(messages.Close())),
        *(wire("secret", {}), wire("Survivor", {}), wire("decode", {}), wire("__import__", {"name": "secret"})),
        *(wire(None, {}), wire(["Status"], {}), wire({}, {}), wire("Status", None), wire("Status", [1])),
        *(wire("Status", {}), wire("Status", {"secret": 1}), wire("Status", {"key": 1, "secret": 1})),
        *(wire("Close", {"secret": 1}), wire("Status", {"_cls": "secret", "key": 1})),
        *(wire("Stopped", {"outcomes": 5, "seconds": 1}), wire("Stopped", {"outcomes": [["secret"]], "seconds": 1})),
        *(wire("Stopped", {"outcomes": [[1] * 7], "seconds": 1}), wire("Unkilled", {"survivors": [["secret"]]})),
        *(wire("Unkilled", {"survivors": None}), wire("Unkilled", {"survivors": ["secret"]})),
    ],
)
def test_garbage_is_refused_without_a_word_of_it_in_the_error(garbage: bytes) -> None:
    with pytest.raises(MessageError) as caught:
        decode(garbage)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


RIGHT: dict[str, Any] = {
    **dict.fromkeys(["int", "float", "int | None", "float | None"], 5),
    **dict.fromkeys(["str", "str | None"], "text"),
    "bool": True,
    "Lease": [*LEASE],
    **{name: [] for name in ("list[int]", "list[str]", "list[Survivor]", "list[Outcome]", "list[DeviceRelease]")},
    **{name: {} for name in ("dict[str, int]", "dict[str, str]")},
}
NUMBERS = [math.nan, math.inf, -math.inf, 1e300, 1 << 64, -(1 << 64), 10**400]
WRONG: dict[str, list[object]] = {
    "int": [None, "5", 5.0, True, [5], {}, *NUMBERS],
    "float": [None, "5", True, [5], {}, *NUMBERS],
    "int | None": ["5", 5.0, False, [5], *NUMBERS],
    "float | None": ["5", False, [5], *NUMBERS],
    "str": [None, 5, ["text"], {}],
    "bool": [None, 0, 1, "true", []],
    "list[int]": [None, 5, "5", {}, ["5"], [5.0], [[5]], [None]],
    "list[str]": [None, "text", {}, [5], [["text"]], [None]],
    "list[Survivor]": [None, "text", {}, [5], [{}], [[1, 2, "", ""]], [[1, "D", ""]]],
    "list[Outcome]": [None, "text", {}, [5], [{}], [["1", "", 1, "", 1, 1.0, []]], [[1, "", 1, "", 1, 1.0, [5]]]],
    "list[DeviceRelease]": [None, "text", {}, [5], [{}], [[1]], [[*list(HELD)[:6], [5], [], 1.0, None, ""]]],
    "list[GpuProcess]": [None, "text", {}, [5], [{}], [["1", None, ""]]],
    "Lease": [None, "text", {}, 5, [], ["a", 5]],
    "str | None": [5, [], {}],
    "dict[str, int]": [None, 5, [], {"a": "5"}, {"a": None}, {"a": True}],
    "dict[str, str]": [None, 5, [], {"a": 5}, {"a": None}, ["a=b"]],
}


@pytest.mark.parametrize("kind", get_args(messages.Message), ids=lambda kind: kind.__name__)
def test_a_field_of_another_type_is_refused(kind: type[Message]) -> None:
    types = kind.__annotations__
    right = {field: RIGHT[name] for field, name in types.items()}
    expected: dict[str, Any] = {field: LEASE if name == "Lease" else right[field] for field, name in types.items()}
    assert decode(wire(kind.__name__, right)) == kind(**expected)
    for field, name in types.items():
        for wrong in WRONG[name]:
            with pytest.raises(MessageError):
                decode(wire(kind.__name__, {**right, field: wrong}))


def test_every_cut_of_a_message_is_refused() -> None:
    whole = encode(EACH[0])
    for end in range(len(whole)):
        with pytest.raises(MessageError):
            decode(whole[:end])


def test_a_launch_shows_no_environment() -> None:
    assert "{port}" not in repr(EACH[0])
    assert "{port}" not in repr(encode(EACH[0]))
    assert "command=['program'" in repr(EACH[0])


def test_a_message_that_cannot_be_encoded_is_not_shown_either() -> None:
    environment: dict[str, str] = {"A": "secret", "B": 5j}  # type: ignore[dict-item]
    launch = messages.Launch(
        "a", ["true"], environment, [], "/", [], "", "", "root", 1.0, None, None, [], None, "", is_literal=False
    )
    with pytest.raises(TypeError) as caught:
        encode(launch)
    frames = [entry.frame for entry in caught.traceback[1:]]
    assert [frame.code.name for frame in frames] == ["encode"]
    assert "secret" not in repr(frames[0].f_locals)
