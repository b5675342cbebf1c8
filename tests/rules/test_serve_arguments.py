"""What is read from the arguments of `vllm serve`, and what is added to them."""

from __future__ import annotations

import pytest

from harness.errors import SpecError
from harness.serve_arguments import ServeArguments, completed, names, read


def test_without_arguments_it_is_as_vllm_has_it() -> None:
    assert read([]) == ServeArguments(
        host="127.0.0.1",
        port=8000,
        uds=None,
        is_headless=False,
        deployment=None,
        shutdown_timeout_s=0.0,
        shows_hidden_metrics=False,
    )


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--port", "8001"], "port", 8001),
        (["--port=8001"], "port", 8001),
        (["--host", "::1"], "host", "::1"),
        (["--uds", "/run/it.sock"], "uds", "/run/it.sock"),
        (["--uds", "/run/it.sock", "--port", "1"], "port", None),
        (["--uds", "/run/it.sock", "--host", "a"], "host", None),
        (["--headless"], "is_headless", True),
        (["--shutdown-timeout", "30"], "shutdown_timeout_s", 30.0),
        (["--shutdown_timeout=2.5"], "shutdown_timeout_s", 2.5),
        (["--shutdown-timeout=-1"], "shutdown_timeout_s", 0.0),
        (["--data-parallel-size", "2", "-tp", "2"], "deployment", None),
        (["-dp", "2"], "deployment", None),
        (["--data_parallel_rank=1"], "deployment", (None, None)),
        (["-dpn", "1"], "deployment", (None, None)),
        (["--headless"], "deployment", (None, None)),
        (["-dpl=0", "-dpp", "9"], "deployment", (None, "9")),
        (["--data-parallel-address", "a", "--data-parallel-rpc-port=9"], "deployment", ("a", "9")),
        (["--show-hidden-metrics-for-version", "0.6"], "shows_hidden_metrics", True),
        # Of other arguments nothing is known, and values are no options.
        (["--dtype", "half", "--model-port", "9", "--enforce-eager", "-tp", "2"], "port", 8000),
        (["--served_model_name=a_b"], "port", 8000),
        (["--hf-overrides", '{"port": 1}', "--port", "2"], "port", 2),
    ],
)
def test_an_argument_is_read(arguments: list[str], field: str, value: object) -> None:
    assert getattr(read(arguments), field) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--port", "a"], "--port: invalid int value: 'a'"), (["--port"], "--port: expected one argument")],
)
def test_a_value_that_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read(arguments)


@pytest.mark.parametrize(
    ("host", "connect_to"),
    [([], "127.0.0.1"), (["--host=0.0.0.0"], "127.0.0.1"), (["--host", "::"], "::1"), (["--host", "a.b"], "a.b")],
)
def test_who_listens_on_all_addresses_is_asked_on_a_local_one(host: list[str], connect_to: str) -> None:
    assert read(host).connect_to == connect_to


def test_options_are_found_in_every_form() -> None:
    assert names(["--a", "--port=1"], "-p", "--port")
    assert names(["-p", "1"], "-p", "--port")
    assert not names(["--model_port", "1", "--a=--port"], "-p", "--port")


def test_arguments_are_completed_and_not_changed() -> None:
    given = ["--dtype", "half"]
    found = completed(given, port=1, seed=0, hf_overrides={"a": [1, {"b": None}]})
    assert found == [
        *("--dtype", "half", "--port", "1", "--seed", "0"),
        *("--hf-overrides", '{"a": [1, {"b": null}]}'),
    ]
    assert given == ["--dtype", "half"]
    assert completed(given, port=None, seed=None, hf_overrides=None) == given


@pytest.mark.parametrize("arguments", [["--seed", "1"], ["--seed=1"]])
def test_a_second_seed_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SpecError, match="manually specified the seed when `seed=0`"):
        completed(arguments, port=None, seed=0, hf_overrides=None)
    assert completed(arguments, port=None, seed=None, hf_overrides=None) == arguments
