"""One noise for target and drafter: pinned bits, exact law, no dependence on anything but seed, position and token."""

import numpy as np
import torch
from scipy import stats

from specexec.sampling.noise import Noise, gumbel, philox_lanes, philox_row
from specexec.sampling.params import derived_seed


def test_bits_are_those_of_philox_4x64_10() -> None:
    # Random123's known answer for counter 0 and key 0, and whatever numpy's own Philox says elsewhere.
    assert philox_row(0, 0, 4).tolist() == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox_row(2**64 - 1, 12345, 3).tolist() == philox_row(-1, 12345, 3).tolist()


def test_a_subset_of_ids_gets_the_bits_of_the_whole_row() -> None:
    ids = torch.tensor([0, 1, 5, 4095, 128_000, 3])
    for seed, position in [(0, 0), (7, 3), (2**63 + 11, 2**31)]:
        whole = philox_row(seed, position, 128_001)
        lanes = philox_lanes(seed, position, ids).numpy().view(np.uint64)
        assert lanes.tolist() == whole[ids.numpy()].tolist()
    noise = Noise(3, 1000)
    assert torch.equal(noise.at(17, torch.arange(1000)), noise.row(17))


def test_rows_do_not_depend_on_who_asks_or_when() -> None:
    early, late = Noise(5, 64), Noise(5, 64)
    late.rows([9, 3])
    late.forget_before(100)
    assert torch.equal(early.row(3), late.row(3))
    assert not torch.equal(early.row(3), early.row(4))
    assert not torch.equal(early.row(3), Noise(6, 64).row(3))


def test_noise_is_standard_gumbel_far_into_the_tail() -> None:
    values = gumbel(philox_row(1, 2, 200_000))
    assert stats.kstest(values, stats.gumbel_r.cdf).pvalue > 1e-4
    ends = gumbel(np.array([0, 1, 2**53, 2**64 - 1], np.uint64))
    assert np.all(np.isfinite(ends))
    assert ends[0] > 44  # 24-bit uniforms would stop at 16.6 and tie
    assert np.all(np.diff(ends) < 0)


def test_derived_seeds_are_stable_and_apart() -> None:
    assert derived_seed(1, "a") == 5_373_448_803_846_538_489
    assert len({derived_seed(seed, item) for seed in range(20) for item in range(50)}) == 1000
