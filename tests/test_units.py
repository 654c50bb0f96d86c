"""Sizes, durations and rates, read and written."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import UsageError
from headrace.units import GB, GIB, KIB, MIB, gib, gigabytes, parse_bytes, rate, seconds

QUICK = settings(max_examples=150, deadline=None)
FACTORS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": 1 << 40}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * GIB),
        ("4GB", 4 * GB),
        ("4G", 4 * GB),
        ("4gib", 4 * GIB),
        ("512 MiB", 512 * MIB),
        ("  1.5 GiB ", 3 * GIB // 2),
        (".5GiB", GIB // 2),
        ("2.GiB", 2 * GIB),
        ("1TiB", 1 << 40),
        ("3kB", 3000),
        ("0GiB", 0),
        ("2147483648", 1 << 31),
        ("1048576", MIB),
        (7, 7),
        (1 << 40, 1 << 40),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@QUICK
@given(
    st.integers(0, 4000), st.sampled_from(sorted(FACTORS)), st.sampled_from(["", "B", "b"]), st.sampled_from(["", " "])
)
def test_a_whole_number_with_a_unit_is_exact(number: int, prefix: str, suffix: str, space: str) -> None:
    assert parse_bytes(f"{number}{space}{prefix}{suffix}") == number * FACTORS[prefix]
    assert parse_bytes(f"{number}{space}{prefix.lower()}{suffix}") == number * FACTORS[prefix]


@QUICK
@given(st.integers(MIB, 1 << 50))
def test_a_bare_number_is_bytes(size: int) -> None:
    assert parse_bytes(str(size)) == size


@QUICK
@given(st.decimals(0, 4000, places=3), st.sampled_from(sorted(FACTORS)))
def test_a_fraction_is_right_to_the_byte(number: object, prefix: str) -> None:
    assert abs(parse_bytes(f"{number}{prefix}B") - float(str(number)) * FACTORS[prefix]) <= 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "four GiB",
        "4GiBs",
        "4 Gi B",
        "-4GiB",
        "+4GiB",
        "4,5GiB",
        "1e9",
        "0x10",
        "nan",
        "inf",
        "4PB",
        ".",
        ". GiB",
        "4GiB 4GiB",
    ],
)
def test_text_that_is_no_size_is_an_error_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_bytes(text)
    assert "4GiB" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["0", "4", "16", "1.5", "1048575"])
def test_a_small_bare_number_is_a_forgotten_unit(text: str) -> None:
    with pytest.raises(UsageError, match="a unit is missing") as caught:
        parse_bytes(text)
    hint = re.search(r"did you mean (\S+)\?", str(caught.value.hint))
    assert hint is not None
    assert parse_bytes(hint.group(1)) == int(float(text) * GIB)


def test_a_size_in_plain_bytes_has_a_unit() -> None:
    assert parse_bytes("512B") == 512


@pytest.mark.parametrize("digits", [309, 400, 5000])
def test_a_number_beyond_all_numbers_is_an_error(digits: int) -> None:
    with pytest.raises(UsageError):
        parse_bytes("9" * digits + "GiB")


@QUICK
@given(st.text(max_size=12) | st.from_regex(r"[0-9.]{1,6} ?[kmgtKMGT]?i?[bB]?", fullmatch=True))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    error = None
    try:
        assert parse_bytes(text) >= 0
    except UsageError as raised:
        error = raised
    assert error is None or (error.hint and error.exit_code == 2)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 MiB"),
        (MIB, "1 MiB"),
        (100 * MIB, "100 MiB"),
        (103 * MIB, "0.10 GiB"),
        (GIB, "1.00 GiB"),
        (3.914 * GIB, "3.91 GiB"),
        (64 * GIB, "64.00 GiB"),
        (-2 * GIB, "-2.00 GiB"),
    ],
)
def test_memory_is_written_in_binary_units(size: float, text: str) -> None:
    assert gib(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 MB"), (99e6, "99 MB"), (1e8, "0.10 GB"), (5.071e9, "5.07 GB"), (GIB, "1.07 GB"), (1.5e12, "1500.00 GB")],
)
def test_disk_is_written_in_decimal_units(size: float, text: str) -> None:
    assert gigabytes(size) == text


@QUICK
@given(st.integers(0, 1 << 44))
def test_a_written_size_is_read_back_to_the_last_digit_shown(size: int) -> None:
    for text, small, large in ((gib(size), MIB, GIB), (gigabytes(size), 10**6, GB)):
        # Half of the last digit: of a MiB (MB), or of a hundredth of a GiB (GB). Parsing truncates a byte.
        digit = small if "M" in text else large / 100
        assert abs(parse_bytes(text) - size) <= digit / 2 + 1


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (0, "0 ms"),
        (0.0001234, "0.123 ms"),
        (0.0764, "76.4 ms"),
        (0.076, "76 ms"),
        (0.9991, "999 ms"),
        (0.9996, "1 s"),
        (1.456, "1.46 s"),
        (59.96, "60 s"),
        (99.4, "99.4 s"),
        (100, "1m40s"),
        (405, "6m45s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (100 * 3600, "100h00m"),
    ],
)
def test_a_duration_is_written_as_people_say_it(duration: float, text: str) -> None:
    assert seconds(duration) == text


@QUICK
@given(st.floats(1e-5, 1e6))
def test_a_duration_is_never_off_by_more_than_it_shows(duration: float) -> None:
    text = seconds(duration)
    if match := re.fullmatch(r"([\d.]+) (ms|s)", text):
        shown = float(match.group(1)) * (1e-3 if match.group(2) == "ms" else 1)
        # Three significant digits: half of the third one is at most 0.5 % of the number.
        assert abs(shown - duration) <= 0.00501 * duration
    elif match := re.fullmatch(r"(\d+)m(\d\d)s", text):
        assert abs(int(match.group(1)) * 60 + int(match.group(2)) - duration) <= 0.5
    else:
        match = re.fullmatch(r"(\d+)h(\d\d)m", text)
        assert match is not None
        assert abs(int(match.group(1)) * 3600 + int(match.group(2)) * 60 - duration) <= 60


@pytest.mark.parametrize(
    ("tok_per_s", "text"),
    [(0.0512, "0.0512 tok/s"), (1.5, "1.5 tok/s"), (12.345, "12.3 tok/s"), (123.4, "123 tok/s")],
)
def test_a_rate_has_three_significant_digits(tok_per_s: float, text: str) -> None:
    assert rate(tok_per_s) == text


@pytest.mark.parametrize("tok_per_s", [999.7, 1234.0, 25_000.0])
def test_a_rate_of_thousands_is_written_without_an_exponent(tok_per_s: float) -> None:
    match = re.fullmatch(r"(\d+) tok/s", rate(tok_per_s))
    assert match is not None, rate(tok_per_s)
    assert float(match.group(1)) == pytest.approx(tok_per_s, rel=0.005)
