"""Machines from the names of parts, and from files."""

from pathlib import Path

import pytest

from headrace.errors import UsageError
from headrace.forecast.architecture import table
from headrace.forecast.machine import Machine, find_machine
from headrace.forecast.predict import safe_device_bytes
from headrace.units import GB, GIB

pytestmark = pytest.mark.zoo

DEVICES = table("devices")
LINKS = table("links")
COMPLETE = sorted(
    name
    for name, entry in DEVICES.items()
    if "memory_gb_per_s" in entry and ("fp16_tflops" in entry or "fp32_tflops" in entry)
)


def written(folder: Path, text: str) -> str:
    path = folder / "machine.toml"
    path.write_text(text)
    return str(path)


# Parts


def test_parts_make_a_machine() -> None:
    machine = find_machine("8x a100-80gb + epyc-7763 + 512GB + 4x nvme-gen4 + 2 nodes + infiniband-hdr")

    assert (machine.device, machine.devices, machine.nodes, machine.all_devices) == ("a100-80gb", 8, 2, 16)
    assert machine.device_bytes_per_s == 2039 * GB
    assert machine.device_memory_bytes == 80 * GB
    assert machine.flop_per_s == 312e12
    assert machine.host_bytes_per_s == 204.8 * GB
    assert machine.host_memory_bytes == 512 * GB
    assert machine.disk_bytes_per_s == 4 * LINKS["nvme-gen4"]["gb_per_s"] * GB
    assert machine.network_bytes_per_s == LINKS["infiniband-hdr"]["gb_per_s"] * GB
    assert machine.peer_bytes_per_s == LINKS["nvlink3"]["gb_per_s"] * GB
    assert machine.rent_usd_per_h == pytest.approx(16 * 1.39)
    assert machine.watts == 8 * 400
    assert not machine.unified


@pytest.mark.parametrize(
    "text", ["2x rtx-4090", "2 x rtx-4090", "2*rtx-4090", "2X RTX 4090", "2x rtx_4090", " 2x rtx-4090 + "]
)
def test_a_part_may_be_spelled_in_many_ways(text: str) -> None:
    machine = find_machine(text)
    assert (machine.devices, machine.device) == (2, "rtx-4090")


def test_the_order_of_the_parts_does_not_matter() -> None:
    one, other = find_machine("rtx-4090 + 64GB + nvme-gen4"), find_machine("nvme-gen4, 64GB, rtx-4090")
    assert {**vars(one), "name": ""} == {**vars(other), "name": ""}


@pytest.mark.parametrize(
    "text", ["rtx-4090 + 3 nodes", "rtx-4090 + nodes=3", "rtx-4090 + node 3", "3 nodes + rtx-4090"]
)
def test_nodes_may_be_written_in_many_ways(text: str) -> None:
    assert find_machine(text).nodes == 3


def test_disks_add_up() -> None:
    rate = find_machine("rtx-4090 + 2x nvme-gen4 + nvme-gen3").disk_bytes_per_s
    assert rate == pytest.approx((2 * LINKS["nvme-gen4"]["gb_per_s"] + LINKS["nvme-gen3"]["gb_per_s"]) * GB)


def test_without_a_disk_there_is_none() -> None:
    assert find_machine("rtx-4090").disk_bytes_per_s == 0


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("64GB", 64 * GB), ("64GiB", 64 * GIB), ("64 G", 64 * GB), ("0.5TB", 500 * GB), ("512 MiB", GIB // 2)],
)
def test_memory_has_the_unit_it_is_written_with(size: str, nbytes: int) -> None:
    assert find_machine(f"rtx-4090 + {size}").host_memory_bytes == nbytes


def test_a_processor_alone_computes_in_its_own_memory() -> None:
    machine = find_machine("epyc-7763 + 512GB")

    assert machine.unified
    assert machine.family == "cpu"
    assert machine.device_memory_bytes == machine.host_memory_bytes == 512 * GB
    assert machine.device_bytes_per_s == machine.host_bytes_per_s == 204.8 * GB


def test_named_memory_is_as_fast_as_the_table_says() -> None:
    machine = find_machine("rtx-4090 + ddr5-4800-8ch")
    assert machine.host_bytes_per_s == LINKS["ddr5-4800-8ch"]["gb_per_s"] * GB
    assert find_machine("epyc-7763 + ddr4-3200-2ch").device_bytes_per_s == LINKS["ddr4-3200-2ch"]["gb_per_s"] * GB


def test_a_unified_machine_has_one_memory_and_no_bus() -> None:
    machine = find_machine("m4-max-40 + 64GB + apple-ssd-m4-max")

    assert machine.unified
    assert machine.device_memory_bytes == machine.host_memory_bytes == 64 * GB
    assert set(machine.topology().pipes) == {"device memory", "host memory", "disk"}
    assert machine.path_from("disk") == ("disk", "host memory", "host memory")


def test_weights_from_disk_are_written_and_read_before_they_cross_the_bus() -> None:
    machine = find_machine("rtx-4090 + 64GB + nvme-gen4")

    assert machine.path_from("device") == ()
    assert machine.path_from("host") == ("host memory", "root complex", "bus")
    assert machine.path_from("disk") == ("disk", "host memory", "host memory", "root complex", "bus")
    assert set(machine.path_from("disk")) <= set(machine.topology().pipes)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_device_of_the_table_is_a_machine(name: str) -> None:
    machine = find_machine(f"{name} + nvme-gen4")

    assert machine.device == name
    rates = (machine.device_bytes_per_s, machine.flop_per_s, machine.host_bytes_per_s, machine.root_bytes_per_s)
    assert all(1e8 < rate < 1e17 for rate in rates)
    assert machine.bus_bytes_per_s > 1e9
    assert 1e9 <= machine.device_memory_bytes < 1e12
    assert machine.dies >= 1
    assert machine.topology().pipes
    assert any(name in source for source in machine.sources)


# Assumptions


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rtx-4090 + 64GB", "no processor is named"),
        ("rtx-4090 + epyc-7763", "64 GB of host memory"),
        ("2x rtx-4090", "over PCIe"),
        ("rtx-4090 + 2 nodes", "10 Gbit Ethernet"),
        ("m4-max-40", "128 GB of memory"),
        ("m4-max-40 + 64GB", "not verified"),
    ],
)
def test_assumptions_are_listed(text: str, said: str) -> None:
    assert any(said in assumption for assumption in find_machine(text).assumptions)


def test_a_fully_named_machine_has_no_assumptions() -> None:
    # A processor's memory is named, since the figures of the processors in the table were not all verified.
    text = "8x a100-80gb + 512GB + ddr4-3200-8ch + nvme-gen4 + 2 nodes + infiniband-hdr"
    assert find_machine(text).assumptions == ()


# Errors


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("", "empty", "rtx-4090"),
        (" + ,", "empty", "rtx-4090"),
        ("rtx-4091", "rtx-4091", "did you mean"),
        ("rtx-4090 + nvme-gen44", "nvme-gen44", "nvme-gen4"),
        ("rtx-4090 + 64", "without a unit", "64GB"),
        ("rtx-4090 + rtx-3090", "rtx-4090 and rtx-3090", "one kind"),
        ("epyc-7763 + epyc-7742 + rtx-4090", "two processors", "one"),
        ("rtx-4090 + 64GB + 32GiB", "two sizes", "one"),
        ("64GB + nvme-gen4", "nothing that computes", "GPU"),
        ("m5", "no arithmetic rate", "TOML"),
    ],
)
def test_parts_that_make_no_machine_are_an_error_with_a_hint(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        find_machine(text)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("text", ["0x rtx-4090", "rtx-4090 + 0 nodes"])
def test_a_count_of_zero_is_an_error(text: str) -> None:
    with pytest.raises(UsageError):
        find_machine(text)


@pytest.mark.parametrize("kind", ["memory_gb_per_s", "fp16_tflops"])
def test_a_device_without_a_required_number_is_an_error(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    entry = {key: value for key, value in DEVICES["rtx-4090"].items() if key != kind and key != "fp32_tflops"}
    monkeypatch.setitem(DEVICES, "rtx-4090", entry)
    with pytest.raises(UsageError, match="the table has no"):
        find_machine("rtx-4090")


# Files


def test_a_file_names_parts_and_replaces_numbers(tmp_path: Path) -> None:
    machine = find_machine(written(tmp_path, 'parts = "2x rtx-4090 + 64GB"\ndevice_bytes_per_s = 9e11\nwatts = 700\n'))

    assert machine.devices == 2
    assert machine.device_bytes_per_s == 9e11
    assert machine.watts == 700
    assert machine.host_memory_bytes == 64 * GB


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("", "made of", "parts"),
        ("parts = 3", "made of", "parts"),
        ("device_bytes_per_s = 9e11", "made of", "parts"),
        ('parts = "rtx-4091"', "rtx-4091", "rtx-4090"),
        ('parts = "rtx-4090"\ndevice_bytes = 9e11', "device_bytes", "did you mean"),
        ('parts = "rtx-4090"\ndevice_bytes_per_s = 1008', "less than a megabyte", "in bytes"),
        ('parts = "rtx-4090"\nhost_memory_bytes = 64', "less than a megabyte", "in bytes"),
        ('parts = "rtx-4090"\ndevice_bytes_per_s = "fast"', "not a number", "bytes"),
        ('parts = "rtx-4090"\nwatts = -1', "not a number", "watts"),
        ('parts = "rtx-4090"\nwatts = nan', "not a number", "watts"),
        ('parts = "rtx-4090"\nwatts = true', "not a number", "watts"),
        ("parts = ", "cannot read", "TOML"),
        ("\0", "cannot read", "TOML"),
    ],
)
def test_a_file_that_is_no_machine_is_an_error_with_a_hint(tmp_path: Path, text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        find_machine(written(tmp_path, text))
    assert hint in str(caught.value.hint)


def test_a_file_that_is_not_there_or_not_text_is_an_error(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.toml", tmp_path, binary):
        with pytest.raises(UsageError):
            find_machine(f"{path}" if path.suffix else f"{path}/.toml")


# Bugs that were found


@pytest.mark.parametrize(
    "text", ["2x epyc-7763", "rtx-4090 + 8x ddr4-3200-2ch", "rtx-4090 + 2 nodes + 2x infiniband-hdr"]
)
def test_a_count_that_cannot_be_honoured_is_an_error(text: str) -> None:
    with pytest.raises(UsageError):
        find_machine(text)


@pytest.mark.parametrize("text", ["rtx-4090 + 2 nodes + infiniband-hdr + ethernet-1g", "rtx-4090 + 2 nodes + 3 nodes"])
def test_parts_that_contradict_each_other_are_an_error(text: str) -> None:
    with pytest.raises(UsageError):
        find_machine(text)


def test_two_unified_devices_have_two_memories_or_are_an_error() -> None:
    one = find_machine("m4-max-40 + 128GB")
    try:
        two = find_machine("2x m4-max-40 + 128GB")
    except UsageError:
        return
    faster = two.device_bytes_per_s * two.all_devices / one.device_bytes_per_s
    assert safe_device_bytes(two) / safe_device_bytes(one) == pytest.approx(faster)


def test_a_file_that_names_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        find_machine(written(tmp_path, f'parts = "{tmp_path / "machine.toml"}"'))


@pytest.mark.parametrize(
    "line",
    [
        "peer_bytes_per_s = 31.5",
        "root_bytes_per_s = 126",
        "host_flop_per_s = 5",
        "devices = 0",
        "devices = 1.5",
        "nodes = 0",
        "assumptions = 3",
        "device = 3",
        "name = 3",
        'unified = "no"',
        "device_bytes_per_s = inf",
    ],
)
def test_an_impossible_number_in_a_file_is_an_error(tmp_path: Path, line: str) -> None:
    with pytest.raises(UsageError):
        find_machine(written(tmp_path, f'parts = "rtx-4090"\n{line}'))


def test_a_file_supplies_a_number_missing_from_the_table(tmp_path: Path) -> None:
    machine: Machine = find_machine(written(tmp_path, 'parts = "m5"\nflop_per_s = 1.6e13'))
    assert machine.flop_per_s == 1.6e13
