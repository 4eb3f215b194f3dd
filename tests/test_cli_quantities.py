"""Sizes, speeds and counts: what people type becomes the number they mean, or a sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.shared.quantities import (
    exact_size,
    format_bytes,
    format_count,
    format_speed,
    parse_count,
    parse_size_B,
    parse_speed_Bps,
)


@pytest.mark.parametrize(
    ("text", "size_B"),
    [
        ("10GiB", 10 * 2**30),
        ("512MB", 512_000_000),
        ("1.5G", 3 * 2**29),
        ("8 gib", 2**33),
        ("2000000001", 2000000001),
        ("7B", 7),
    ],
)
def test_sizes_mean_what_they_say(text: str, size_B: int) -> None:
    assert parse_size_B(text) == size_B


@pytest.mark.parametrize(("text", "speed"), [("4MB/s", 4e6), ("25GB/s", 25e9), ("1MiB/s", 2.0**20), ("3kB", 3e3)])
def test_speeds_are_bytes_per_second(text: str, speed: float) -> None:
    assert parse_speed_Bps(text) == speed


@pytest.mark.parametrize(("text", "count"), [("8k", 8192), ("32K", 32768), ("1.5k", 1536), ("100", 100)])
def test_counts_know_k(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["24", "0", "1.5", "5080", "999999"])
def test_a_number_too_small_to_count_bytes_asks_for_its_unit(text: str) -> None:
    with pytest.raises(ValueError, match=f"has no unit; did you mean {text}GiB"):
        parse_size_B(text)
    with pytest.raises(ValueError, match=f"has no unit; did you mean {text}GB/s"):
        parse_speed_Bps(text)


@given(st.integers(0, 1 << 50))
def test_exact_sizes_are_read_back_as_the_same_bytes(size_B: int) -> None:
    assert parse_size_B(exact_size(size_B)) == size_B


@pytest.mark.parametrize("text", ["9" * 400, "9" * 40 + "GiB", "9" * 400 + "k"])
def test_numbers_beyond_all_machines_are_refused(text: str) -> None:
    for parse in (parse_size_B, parse_speed_Bps, parse_count):
        with pytest.raises(ValueError, match=r"is more than any|is not a"):
            parse(text)


@pytest.mark.parametrize("text", ["", "ten", "10 apples", "-1GB", "10QB", "1e9", "5GBs"])
def test_other_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="10GiB"):
        parse_size_B(text)


@pytest.mark.parametrize(
    ("text", "reason"), [("10Gbit/s", "bits"), ("0MB/s", "stop"), ("fast", "4MB/s"), ("4MB/h", "4MB/s")]
)
def test_other_speeds_are_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_speed_Bps(text)


@pytest.mark.parametrize("text", ["0", "8q", "1.3", "0.0001k"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count"):
        parse_count(text)


def test_numbers_are_shown_in_three_digits() -> None:
    shown = [format_bytes(size) for size in (0, 999, 6_144_000, 999_600, 36.9e9, 137e9, 2.5e12)]
    assert shown == ["0 B", "999 B", "6.1 MB", "1.0 MB", "36.9 GB", "137 GB", "2.5 TB"]
    assert format_speed(22.14e9) == "22.1 GB/s"
    assert format_count(1204) == "1 204"
