"""Sizes, speeds and counts: what people type becomes the number they mean, or a sentence."""

import pytest

from cli.quantities import format_bytes, format_count, format_speed, parse_count, parse_size_B, parse_speed_Bps


@pytest.mark.parametrize(
    ("text", "size_B"),
    [("10GiB", 10 * 2**30), ("512MB", 512_000_000), ("1.5G", 3 * 2**29), ("8 gib", 2**33), ("100", 100), ("7B", 7)],
)
def test_sizes_mean_what_they_say(text: str, size_B: int) -> None:
    assert parse_size_B(text) == size_B


@pytest.mark.parametrize(("text", "speed"), [("4MB/s", 4e6), ("25GB/s", 25e9), ("1MiB/s", 2.0**20), ("3kB", 3e3)])
def test_speeds_are_bytes_per_second(text: str, speed: float) -> None:
    assert parse_speed_Bps(text) == speed


@pytest.mark.parametrize(("text", "count"), [("8k", 8192), ("32K", 32768), ("1.5k", 1536), ("100", 100)])
def test_counts_know_k(text: str, count: int) -> None:
    assert parse_count(text) == count


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
