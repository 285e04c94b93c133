"""Tests of trellis-coded quantisation: valid paths, least error, the promised gain, the twin."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    TRELLIS_TAPS,
    check_trellis,
    decode_codes,
    encode_codes,
    trellis_codes,
    trellis_next,
)

STATES = sorted(TRELLIS_TAPS)


def error(x, codes, weight=1.0):
    """Weighted squared error of each row (N,)."""
    return ((x.double() - codes.double()).square() * weight).sum(1)


def search(x, states, weight):
    """Least weighted error (N,) over all paths, by trying every sequence of bits."""
    follow, least = trellis_next(states), np.full(len(x), np.inf)
    for bits in itertools.product((0, 1), repeat=x.shape[1]):
        state, spent = 0, np.zeros(len(x))
        for step, bit in enumerate(bits):
            low = (state & 1) + 2 * bit
            spent += weight[:, step] * (x[:, step] - low - 4 * np.rint((x[:, step] - low) / 4)) ** 2
            state = follow[state, bit]
        least = np.minimum(least, spent)
    return least


@pytest.mark.parametrize("states", STATES)
def test_each_state_is_reached_by_both_bits_from_one_parity(states):
    follow = trellis_next(states)
    before = follow.argsort(0).T
    for bit in 0, 1:
        assert np.array_equal(follow[before[bit], bit], np.arange(states))
        assert np.array_equal(before[bit] & 1, np.arange(states) >= states // 2)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(STATES), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12),
       st.integers(0, 99))
def test_the_search_finds_the_least_error(states, rows, length, run, seed):
    draw = np.random.default_rng(seed)
    x, weight = draw.normal(0, 6, (rows, length)), draw.uniform(0.1, 3, (rows, length))
    codes = trellis_codes(torch.tensor(x), states, torch.tensor(weight), run)
    check_trellis(codes.numpy()[:, :, None], states)
    least = search(x.astype(np.float32), states, weight.astype(np.float32))
    found = error(torch.tensor(x), codes, torch.tensor(weight))
    assert np.allclose(found, least, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("states", STATES)
def test_joined_runs_are_as_good_as_one_long_search(states):
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)) * 5
    whole, joined = trellis_codes(x, states, run=300), trellis_codes(x, states, run=37)
    assert torch.allclose(error(x, whole), error(x, joined), rtol=1e-5)
    check_trellis(joined.numpy()[:, :, None], states)


def test_gain_over_scalar_quantisation():
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 20
    scalar = (x - 2 * (x / 2).round()).square().mean()
    ratios = [scalar / (x - trellis_codes(x, states)).square().mean() for states in (4, 8, 16)]
    gains_db = [float(10 * ratio.log10()) for ratio in ratios]
    assert np.allclose(gains_db, [0.98, 1.07, 1.12], atol=0.03)       # no lattice gains over 1.53


def test_weights_decide_and_extremes_stay_in_range():
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)) * 5
    weight = torch.ones(200)
    weight[50:100] = 100
    heavy = (x - trellis_codes(x, 8, weight)).square()[:, 50:100].mean()
    assert heavy < 0.97 * (x - trellis_codes(x, 8)).square()[:, 50:100].mean()
    codes = trellis_codes(torch.tensor([[1e9, -1e9, 3.2, float("inf")]]), 8)
    assert codes.dtype == torch.int16
    assert (codes.abs() > 32_000).tolist() == [[True, True, False, True]]


def test_codes_travel_through_the_coder():
    x = torch.randn(2 * 16, 130, generator=torch.Generator().manual_seed(2)) * 5
    codes = trellis_codes(x, 8).view(2, 16, 130).transpose(1, 2).numpy()
    assert np.array_equal(decode_codes(encode_codes([codes], 8)[0], [(2, 130, 16)], 8)[0], codes)
