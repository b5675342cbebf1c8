"""What CUDA_VISIBLE_DEVICES lets a process see, and which of that a launch picks."""

from __future__ import annotations

import pytest

from harness.broker.readings import Device
from harness.broker.visible import VisibilityError, pick, visible

GIB = 1 << 30
UUIDS = [
    "GPU-9942190a-aa31-4ff1-4aa9-c388d80f85f1",
    "GPU-9e8d35e3-a134-0fdd-0e01-23811fdbd293",
    "GPU-e429a63e-c61c-4795-b757-5132caeb8e70",
    "GPU-eee1dfbc-0a0f-6ad8-5ff6-dc942a8b9d98",
]
GPUS = [Device(uuid, index, "H100", 80 * GIB) for index, uuid in enumerate(UUIDS)]
MIXED = [Device(uuid, index, f"kind {index % 2}", 80 * GIB) for index, uuid in enumerate(UUIDS)]
MIGS = [
    Device("MIG-89c850dc-ec5d-51de-88c2-cc8b41f2ef2e", 0, "MIG 1g.10gb", 10 * GIB, "GPU-0"),
    Device("MIG-8a1b2c3d-ec5d-51de-88c2-cc8b41f2ef2e", 0, "MIG 1g.10gb", 10 * GIB, "GPU-0"),
    Device("MIG-GPU-11112222-0000-0000-0000-000000000000/1/2", 1, "MIG 1g.10gb", 10 * GIB, "GPU-11112222"),
]


def seen(variable: str | None, order: str | None = None) -> list[int]:
    return [device.index for device in visible(GPUS, variable, order)]


@pytest.mark.parametrize(
    ("variable", "indexes"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2,1", [2, 1]),
        ("0,2,-1,1", [0, 2]),  # both from CUDA's guide
        ("-1", []),
        ("-0", []),
        ("NoDevFiles", []),
        ("4", []),
        ("1,4,0", [1]),
        ("0,,1", [0]),
        (",0", []),
        ("0,", [0]),
        ("0, 1,\t2", [0, 1, 2]),
        (" 3 ,0", [3, 0]),
        ("+3,0", [3, 0]),
        ("+ 3", []),
        ("00,001", [0, 1]),
        ("0x1", [0]),
        ("1gpu2,2ampere", [1, 2]),
        ("one,two,3", []),
        ("3,2,two,1", [3, 2]),
        ("\N{ARABIC-INDIC DIGIT ONE}", []),
        ("9" * 5000, []),
        ("0" * 5000 + "1", [1]),
    ],
)
def test_numbers_are_read_as_strtol_does_until_one_is_none(variable: str | None, indexes: list[int]) -> None:
    assert seen(variable) == indexes


@pytest.mark.parametrize(
    ("variable", "indexes"),
    [
        (UUIDS[2], [2]),
        (f"{UUIDS[3]},{UUIDS[0]}", [3, 0]),
        ("GPU-e4,GPU-9e8d35e3", [2, 1]),
        ("GPU-EEE1DFBC", [3]),
        ("GPU-9e8d35e3,GPU-e,GPU-99", [1]),  # of two GPUs
        ("GPU-", []),
        ("GPU-123,GPU-99", []),
        (UUIDS[0] + "0", []),
        (UUIDS[0].removeprefix("GPU-"), []),
        ("gpu-99", []),
        (f" {UUIDS[0]}", []),
        (f"{UUIDS[0]}, {UUIDS[1]}", [0]),
        (f"{UUIDS[0]},,{UUIDS[1]}", [0]),
    ],
)
def test_a_uuid_or_the_beginning_of_one_alone(variable: str, indexes: list[int]) -> None:
    assert seen(variable) == indexes


def test_the_beginning_of_the_only_gpu_is_enough() -> None:
    assert visible(GPUS[:1], GPUS[0].uuid[:6], None) == GPUS[:1]


def test_what_all_uuids_begin_with_names_no_device() -> None:
    assert visible(GPUS[:1], "GPU-", None) == []  # seen with driver 580, on a machine with one GPU


@pytest.mark.parametrize(("variable", "indexes"), [("GPU-99,1", [0]), (f"1,{UUIDS[0]}", [1])])
def test_an_entry_of_another_kind_than_the_first_hides_what_follows(variable: str, indexes: list[int]) -> None:
    assert seen(variable) == indexes


@pytest.mark.parametrize("variable", ["0,0", "0,1,2,1", "0,00", "GPU-99,GPU-9e,GPU-994"])
def test_a_device_that_is_there_twice_hides_all(variable: str) -> None:
    assert seen(variable) == []


def test_what_is_hidden_by_an_invalid_entry_is_not_there_twice() -> None:
    assert seen("0,1,-1,0") == [0, 1]


# ---- numbers whose order is not known


@pytest.mark.parametrize("order", [None, "", "FASTEST_FIRST", "pci_bus_id"])
def test_numbers_of_gpus_of_several_kinds_need_the_order_of_the_bus(order: str | None) -> None:
    with pytest.raises(VisibilityError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID, or name them by UUID"):
        visible(MIXED, "1", order)


@pytest.mark.parametrize("variable", [None, "", "-1", "no", "7", "GPU-99"])
def test_where_no_number_counts_the_order_does_not_matter(variable: str | None) -> None:
    expected = {None: MIXED, "GPU-99": MIXED[:1]}
    assert visible(MIXED, variable, None) == expected.get(variable, [])


def test_numbers_in_the_order_of_the_bus_are_nvmls() -> None:
    assert visible(MIXED, "3,0", "PCI_BUS_ID") == [MIXED[3], MIXED[0]]


# ---- MIG


def test_mig_instances_are_named_by_the_uuids_that_nvml_gives_them() -> None:
    assert visible(MIGS, "MIG-8a,MIG-89c850dc-ec5d", None) == [MIGS[1], MIGS[0]]
    assert visible(MIGS, MIGS[2].uuid, None) == [MIGS[2]]
    assert visible(MIGS, "MIG-8", None) == []


def test_without_the_variable_each_mig_instance_may_be_had() -> None:
    assert visible(MIGS, None, None) == MIGS


def test_gpus_and_mig_instances_are_of_one_kind_to_the_variable() -> None:
    assert visible([*MIGS, *GPUS], "GPU-99,MIG-89", None) == [GPUS[0], MIGS[0]]


@pytest.mark.parametrize("order", [None, "PCI_BUS_ID"])
@pytest.mark.parametrize("variable", ["0", "1"])
def test_a_number_beside_mig_instances_is_not_guessed(variable: str, order: str | None) -> None:
    """That GPU 1 is the only whole one does not make it CUDA's number 0."""
    with pytest.raises(VisibilityError, match=r"divided \(MIG\): name them by UUID"):
        visible([MIGS[0], GPUS[1]], variable, order)


# ---- picking


def test_indexes_count_what_is_visible_as_cudas_ordinals_do() -> None:
    assert pick(visible(GPUS, "2,0", None), [0, 1]) == [GPUS[2], GPUS[0]]


def test_a_launch_may_name_devices_by_uuid_and_by_index() -> None:
    assert pick(GPUS, [UUIDS[3], "GPU-9e", 0]) == [GPUS[3], GPUS[1], GPUS[0]]
    assert pick(MIGS, ["MIG-GPU-1111"]) == [MIGS[2]]
    assert pick(GPUS, []) == []


@pytest.mark.parametrize("one", [4, -1, 10**30, "GPU-9", "GPU-77", "9942190a", "", "0"])
def test_what_is_not_visible_or_not_one_alone_is_refused(one: int | str) -> None:
    with pytest.raises(VisibilityError) as caught:
        pick(GPUS, [0, one])
    assert str(caught.value).startswith(f"gpus: {one} is not one of the GPUs that this process sees: 0 {UUIDS[0]}, 1 ")


def test_where_nothing_is_visible_that_is_said() -> None:
    with pytest.raises(VisibilityError, match=r"sees: none$"):
        pick([], [0])


@pytest.mark.parametrize("wanted", [[1, 1], [1, UUIDS[1]], ["GPU-9e", UUIDS[1]]])
def test_a_device_is_picked_once(wanted: list[int | str]) -> None:
    with pytest.raises(VisibilityError, match="a device is there twice"):
        pick(GPUS, wanted)
