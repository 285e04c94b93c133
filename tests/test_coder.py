"""Tests of the entropy coder: exact inverses, size near the entropy, damage refused."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    RANS_BITS,
    RUNGS,
    Refusal,
    decode_codes,
    encode_codes,
    fit_columns,
    fold,
    frequencies,
    read_models,
    refreshes,
    rung,
    trellis_next,
    unfold,
)

SPREADS = st.sampled_from([0.0, 0.3, 2.6, 40.0, 400.0, 20_000.0])
SHAPES = st.tuples(st.integers(0, 4), st.integers(0, 300), st.integers(0, 30))


def draw_codes(shape, spread, seed, states=0):
    """Random int16 codes (L, R, C) of the given spread, on the trellis if there are states."""
    draw = np.random.default_rng(seed)
    column = np.exp(0.35 * draw.standard_normal((shape[0], 1, shape[2])))
    codes = np.rint(draw.standard_normal(shape) * spread * column)
    codes = np.clip(codes, -2**15, 2**15 - 1).astype(np.int16)
    if states:
        follow, state = trellis_next(states), np.zeros((shape[0], shape[2]), np.int64)
        for row in range(shape[1]):
            codes[:, row] = codes[:, row] & -2 | state & 1
            state = follow[state, codes[:, row] >> 1 & 1]
    return codes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SHAPES, SPREADS), max_size=4), st.sampled_from([0, 4, 8, 16, 8]),
       st.integers(0, 99))
def test_decoding_is_the_exact_inverse(parts, trellis, seed):
    states = 8 if trellis is True else trellis
    tensors = [draw_codes(shape, spread, seed, states) for shape, spread in parts]
    blob, _ = encode_codes(tensors, trellis)
    decoded = decode_codes(blob, [codes.shape for codes in tensors], trellis)
    for sent, read in zip(tensors, decoded, strict=True):
        assert read.dtype == np.int16 and np.array_equal(sent, read)


@pytest.mark.parametrize("codes", [
    np.zeros((2, 3, 4), np.int16), np.zeros((0, 5, 5), np.int16),
    np.full((1, 9, 1100), 5, np.int16), np.full((1, 1, 1), -2**15, np.int16),
    np.full((3, 700, 1), 2**15 - 1, np.int16),
    np.array([[[-2**15, 2**15 - 1, 0, 123, -124, 127, 128, -1]]], np.int16),
    np.arange(-2**15, 2**15, dtype=np.int16).reshape(2, 32, 1024)])
def test_extreme_tensors_round_trip(codes):
    blob, _ = encode_codes([codes], False)
    assert np.array_equal(decode_codes(blob, [codes.shape], False)[0], codes)


def test_every_int16_folds_and_unfolds_and_keeps_its_value_modulo_4():
    codes = np.arange(-2**15, 2**15, dtype=np.int16)
    symbols, excess = fold(codes)
    assert np.abs(symbols).max() == 127 and not ((symbols - codes) & 3).any()
    assert len(unfold(symbols, excess)) == 0 and np.array_equal(symbols, codes)


def test_rungs_are_eight_an_octave_and_frequencies_are_whole():
    assert np.array_equal(rung(RUNGS), np.arange(len(RUNGS)))
    assert (np.diff(RUNGS[8:]) * 8 <= RUNGS[8:-1]).all()
    for states in 0, 8:
        tables = np.random.default_rng(0).integers(0, len(RUNGS), (20, 50))
        tables[::3] = 0
        share = frequencies(tables.astype(np.uint8), states)
        assert (share.sum(2) == 1 << RANS_BITS).all() and (share >= 0).all()
        if states:
            odd = np.arange(-49, 50) % 2 == 1
            assert not share[:, 0, odd].any() and not share[tables.any(1), 1][:, ~odd].any()


@pytest.mark.parametrize("states", [0, 8])
def test_size_is_near_the_entropy_and_spread_over_the_tensors(states):
    tensors = [draw_codes((4, 512, 512), 2.6, 1, states),
               draw_codes((1, 2048, 512), 1.0, 2, states)]
    blob, sizes = encode_codes(tensors, states)
    assert 2048 < len(blob) - sum(sizes) < 3000                         # 2048 bytes of lanes, models
    # A Gaussian rounded to a step d has log2(sigma sqrt(2 pi e) / d) bits; on a trellis d = 2.
    for codes, spent in zip(tensors, 8 * np.array(sizes)):
        sigma = codes.std(1, keepdims=True, dtype=np.float64)
        entropy = np.log2(sigma * np.sqrt(2 * np.pi * np.e)).mean() - (states > 0)
        assert spent / codes.size < entropy * 1.01 + 0.01


def test_scales_of_the_previous_layer_are_used():
    alike, other = draw_codes((6, 64, 512), 2.6, 0), draw_codes((6, 64, 512), 2.6, 0)
    scale = np.exp(0.8 * np.random.default_rng(1).standard_normal(512))
    alike = (alike * scale).astype(np.int16)
    moved = np.stack([np.roll(scale, 71 * layer) for layer in range(6)])[:, None]
    other = (other * moved).astype(np.int16)
    assert fit_columns(alike)[0].mix > fit_columns(other)[0].mix
    assert len(encode_codes([alike])[0]) < len(encode_codes([other])[0])


def test_refreshes_get_rarer_by_an_eighth():
    starts = refreshes(512)
    assert starts[:18].tolist() == [*range(17), 18]
    assert (np.diff(starts)[16:] * 8 <= starts[16:-1]).all()
    assert refreshes(1).tolist() == [0]


def test_learning_scales_is_cheap():
    draw = np.random.default_rng(0)
    even = np.rint(draw.standard_normal((8, 24, 512)) * 2.6).astype(np.int16)
    entropy = np.log2(2.6 * np.sqrt(2 * np.pi * np.e))
    assert 8 * (len(encode_codes([even])[0]) - 2048) / even.size < entropy * 1.005
    scale = 4 * np.exp(0.5 * draw.standard_normal((8, 1, 512)))
    uneven = np.rint(scale * draw.standard_normal((8, 64, 512))).astype(np.int16)
    entropy = np.log2(uneven.std(1) * np.sqrt(2 * np.pi * np.e)).mean()
    assert 8 * (len(encode_codes([uneven])[0]) - 2048) / uneven.size < entropy + 7 / 64    # 7 bits a column


@pytest.mark.parametrize("place, value", [(4, 255), (5, 255), (7, 0), (8, 200), (8, 0)])
def test_impossible_models_are_refused(place, value):
    packed = bytearray(fit_columns(draw_codes((1, 50, 20), 3.0, 5))[0].pack())
    assert read_models(bytes(packed), 1)
    packed[place] = value
    with pytest.raises(Refusal, match="coded weights"):
        read_models(bytes(packed), 1)


def test_codes_off_the_trellis_are_refused():
    codes = draw_codes((2, 300, 3), 2.6, 0, 8)
    codes[1, 200, 2] ^= 1
    with pytest.raises(ValueError, match="trellis"):
        encode_codes([codes], 8)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_blobs_are_refused_or_decoded_but_never_crash(data):
    states = data.draw(st.sampled_from([0, 8]))
    tensors = [draw_codes((2, 40, 20), 3.0, 5, states), draw_codes((1, 30, 700), 60.0, 6, states)]
    blob = bytearray(encode_codes(tensors, states)[0])
    for at in data.draw(st.lists(st.integers(0, len(blob) - 1), min_size=1, max_size=4)):
        blob[at] = data.draw(st.integers(0, 255))
    blob = blob[:data.draw(st.sampled_from([len(blob), len(blob) - 2, len(blob) // 2, 7, 0]))]
    try:
        decoded = decode_codes(bytes(blob), [codes.shape for codes in tensors], states)
    except Refusal as error:
        assert "coded weights" in str(error)
    else:
        assert all(codes.shape == sent.shape for codes, sent in zip(decoded, tensors))


@pytest.mark.parametrize("spoil", [lambda b: b + b"\0\0", lambda b: b[:-2], lambda b: b[:-1],
                                   lambda b: b""])
def test_a_wrong_length_is_refused(spoil):
    blob, _ = encode_codes([draw_codes((1, 50, 20), 3.0, 5)], False)
    with pytest.raises(Refusal, match="coded weights"):
        decode_codes(spoil(blob), [(1, 50, 20)], False)
