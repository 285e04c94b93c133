"""The artifact: pack and unpack are inverses, whatever is wrong with a file is refused, hostile
headers take no memory."""
from __future__ import annotations

import hashlib
import json
import lzma
import re
import resource
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from support import Lines, found_of, model_of, settings, t


@pytest.fixture(scope="module")
def stored() -> dict[str, t.Coded | torch.Tensor]:
    """The quantised banks of a small model."""
    model = model_of(settings())
    return t.quantise(model, found_of(model))


@pytest.fixture(scope="module")
def blob(stored) -> bytes:
    """The artifact of these banks."""
    return t.pack(settings(), stored, quick=True)[0]


def same(a: t.Coded | torch.Tensor, b: t.Coded | torch.Tensor) -> bool:
    """True where two stored banks are equal bit for bit."""
    if isinstance(a, t.Coded):
        return isinstance(b, t.Coded) and same(a.codes, b.codes) and all(
            map(same, a.grid, b.grid))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("compressor", [*t.coders(), "rans"])
def test_unpack_is_the_inverse_of_pack(stored, compressor, quick):
    """Every compressor gives back every code, step and fp16 bit, and the knobs of the model."""
    h = settings(compressor=compressor)
    blob, ledger = t.pack(h, stored, quick)
    again_h, again = t.unpack(blob)
    assert list(again) == list(stored) and all(same(again[n], stored[n]) for n in stored)
    assert all(getattr(again_h, n) == getattr(h, n)
               for n in t.MODEL_KNOBS) and again_h.changed() == h.changed()
    assert sum(ledger.values()) == len(blob)
    assert t.pack(h, again, quick)[0] == blob


@pytest.mark.parametrize("changes", [
    dict(num_loops=0),
    dict(head_gate_scale=0.0),
    dict(smear_gate="none"),
    dict(parallel_start_layer=4),
    dict(num_layers=1, loop_start=0, loop_end=0),
    dict(matrix_bits=2, embed_bits=8),
    dict(vocab_size=300)
])
def test_every_shape_of_model_is_packed(changes):
    """Absent roles, other depths and widths of codes: the table alone decides what is stored."""
    h = settings(**changes)
    model = model_of(h)
    stored = t.quantise(model, found_of(model))
    again_h, again = t.unpack(t.pack(h, stored, quick=True)[0])
    assert list(again) == list(t.roles(again_h)) and all(same(again[n], stored[n]) for n in stored)


def test_a_loaded_artifact_computes_what_was_packed(stored, blob):
    """A fresh model with the unpacked banks has the nats of the model that stores them, bit for
    bit."""
    h, again = t.unpack(blob)
    ids, nats = torch.arange(2, 34)[None] % 64, []
    for banks in (stored, again):
        model = t.GPT(h)
        t.load_stored(model, banks)
        nats.append(model.nats(ids, ids, t.depth_plan(h, True)))
    assert torch.equal(*nats)


@limits(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=600), name=st.sampled_from(sorted(t.coders())))
def test_coders_have_inverses(raw, name):
    """Any bytes, the empty string included."""
    assert t.expand(t.coders()[name][0](raw, True), len(raw), name) == raw


@limits(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 65535), max_size=50))
def test_shuffled_numbers_come_back(numbers):
    """All bit patterns of 16 bits, NaN included."""
    array = np.array(numbers, np.uint16)
    for kind in (np.float16, np.int16):
        assert t.unshuffled(t.shuffled(array.view(kind)), kind).tobytes() == array.tobytes()


@pytest.mark.parametrize("name", sorted(t.coders()))
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_stream_of_another_size_is_refused(name, wrong):
    """A stream that holds one byte more or less than the role table says is damaged."""
    raw = bytes(range(256)) * 8
    with pytest.raises(t.Refusal, match="stream"):
        t.expand(t.coders()[name][0](raw, True), len(raw) + wrong, name)


def test_an_unknown_coder_is_named():
    """An artifact whose package is missing says which coder it needs and what is installed here."""
    with pytest.raises(t.Refusal, match="needs the coder zip.*lzma"):
        t.expand(b"?123", 3, "zip")


def test_a_flipped_bit_anywhere_is_caught(blob):
    """One bit of every byte in turn, magic, header, streams and checksum alike."""
    rng = np.random.default_rng(0)
    for place, bit in enumerate(rng.integers(0, 8, len(blob))):
        damaged = bytearray(blob)
        damaged[place] ^= 1 << bit
        with pytest.raises(t.Refusal, match="damaged|not an artifact"):
            t.unpack(bytes(damaged))


def test_a_cut_or_lengthened_file_is_caught(blob):
    """Every shorter length near the ends and many between, and trailing bytes."""
    size = len(blob)
    lengths = [*range(64), *range(64, size, 97), *range(size - 40, size)]
    for damaged in [*(blob[:n] for n in lengths), blob + b"\0", blob + blob]:
        with pytest.raises(t.Refusal, match="damaged|not an artifact"):
            t.unpack(damaged)


@pytest.mark.parametrize("other", [b"", b"\x80\x04.", b"PK\x03\x04" * 99, b"\0" * 500])
def test_other_files_are_refused_by_name(other):
    """A pickle, a zip or nothing at all: the sentence names the file."""
    with pytest.raises(t.Refusal, match="^some/model.bin: not an artifact"):
        t.unpack(other, "some/model.bin")


def sealed(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """An artifact with a right checksum around any header, as a hostile author could make one."""
    blob = t.MAGIC + struct.pack("<I", len(header) if length is None else length) + header + body
    return blob + hashlib.sha256(blob).digest()[:t.CHECKSUM_BYTES]


def hostile(header: object, body: bytes = b"x" * 40) -> bytes:
    """The same with any JSON value as its header."""
    text = header if isinstance(header, str) else json.dumps(header)
    return sealed(lzma.compress(text.encode(), lzma.FORMAT_ALONE), body)


KNOBS = {n: getattr(settings(), n) for n in t.MODEL_KNOBS}
STREAMS = [5] * 4    # codes on the trellis, codes off it, steps, fp16 banks
ABSURD = {
    "layers": dict(num_layers=10**9),
    "width": dict(model_dim=1 << 40),
    "long width": dict(model_dim=4 * 10**400),
    "vocabulary": dict(vocab_size=1 << 40),
    "heads": dict(num_heads=1 << 30, model_dim=1 << 30),
    "mlp": dict(mlp_mult=1e300),
    "mlp beyond floats": dict(mlp_mult=1e308),
    "loops": dict(num_loops=10**9),
    "long loop": dict(num_layers=4000, num_loops=400, loop_start=0, loop_end=3999),
    "rope": dict(rope_dims=1 << 40),
    "model of 800 GB": dict(num_layers=4000, model_dim=1 << 16, num_heads=4, vocab_size=65536)
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_refused_and_take_no_memory(name):
    """A header that claims a huge model is refused, and the process grows by less than 64 MB."""
    blob = hostile(dict(knobs=KNOBS | ABSURD[name], coder="rans", streams=STREAMS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(t.Refusal, match="header"):
        t.unpack(blob)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("length", [0, 1 << 16, (1 << 32) - 1])
def test_absurd_header_lengths_are_refused(length):
    """A header longer than the file, or empty."""
    with pytest.raises(t.Refusal, match="header"):
        t.unpack(sealed(b"x" * 50, length=length))


def test_a_header_that_expands_without_end_is_refused():
    """A gigabyte of blanks in a kilobyte is cut at the limit and takes no memory."""
    packer = lzma.LZMACompressor(lzma.FORMAT_ALONE, preset=0)
    bomb = b"".join([*(packer.compress(b" " * (1 << 20)) for _ in range(256)), packer.flush()])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(t.Refusal, match="header"):
        t.unpack(sealed(bomb, b"x" * 100))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    "streams",
    [[0] * len(STREAMS), [-5] * len(STREAMS), [1.0] * len(STREAMS), [True] * len(STREAMS),
     STREAMS[1:], [], [1 << 62] * len(STREAMS), "lengths", None, 7, {
         "a": 1
     }, [[5]] * len(STREAMS), [2, 1 << 80, *STREAMS[2:]]])
def test_wrong_lengths_of_streams_are_refused(streams):
    """Too few, not whole, negative, beyond the file, or no list at all."""
    with pytest.raises(t.Refusal, match="header|lengths"):
        t.unpack(hostile(dict(knobs=KNOBS, coder="rans", streams=streams)))


@pytest.mark.parametrize("changes", [
    dict(num_layers="3"),
    dict(num_layers=3.0),
    dict(num_layers=True),
    dict(num_layers=None),
    dict(num_layers=-1),
    dict(mlp_mult=2),
    dict(skip_gates=1),
    dict(ln_scale="yes"),
    dict(no_such_knob=1),
    dict(rope_base=float("nan")),
    dict(logit_softcap=float("inf")),
    dict(num_heads=3),
    dict(matrix_bits=16),
    dict(run_id="../../etc"),
    dict(vocab_size=[64]),
    dict(mlp_mult={"a": 1})
])
def test_wrong_types_and_values_of_knobs_are_refused(changes):
    """Types are compared exactly, ranges and relations by the same checks as the environment's."""
    with pytest.raises(t.Refusal, match="header"):
        t.unpack(hostile(dict(knobs=KNOBS | changes, coder="rans", streams=STREAMS)))


@pytest.mark.parametrize("header",
                         [[], {}, 5, None, "text",
                          dict(knobs=[], streams=STREAMS),
                          dict(knobs="x", streams=STREAMS),
                          dict(knobs=KNOBS),
                          dict(knobs={}, streams=STREAMS),
                          dict(knobs=None, streams=[]), "[" * 60000, "{", "\x00",
                          '{"knobs":' * 9000, '{"knobs": {"num_layers": 1' + "0" * 5000 + "}}"],
                         ids=lambda value: str(value)[:20])
def test_headers_that_are_no_table_are_refused(header):
    """Any JSON value, unfinished JSON, nesting without end."""
    with pytest.raises(t.Refusal, match="header"):
        t.unpack(hostile(json.dumps(header) if header == "text" else header))


def test_streams_that_do_not_decode_are_refused():
    """Right checksum, right header, streams of noise: a sentence, not a traceback."""
    rng = np.random.default_rng(0)
    banks = [5] * (len(t.coded_roles(settings())) + 2)
    for coder, lengths in (("rans", STREAMS), *((name, banks) for name in t.coders()), ("zip", banks), (None, banks)):
        body = rng.bytes(5 * len(lengths))
        with pytest.raises(t.Refusal, match="stream|coded weights|needs the coder zip|a value is missing"):
            t.unpack(hostile(dict(knobs=KNOBS, coder=coder, streams=lengths), body))


@pytest.mark.parametrize("compressor", ["rans", "lzma"])
def test_damage_behind_a_right_checksum_is_refused_or_harmless(stored, compressor):
    """Whoever can compute a checksum can change a stream: that raises Refusal or decodes to other
    numbers, but nothing else ever happens."""
    rng = np.random.default_rng(0)
    blob = t.pack(settings(compressor=compressor), stored, quick=True)[0]
    (length, ) = struct.unpack_from("<I", blob, len(t.MAGIC))
    first, refused = len(t.MAGIC) + 4 + length, 0
    for trial in range(150):
        damaged = bytearray(blob[:-t.CHECKSUM_BYTES])
        # The beginning of the first stream holds lengths and tables, the most fragile part.
        place = first + int(rng.integers(400 if trial % 2 else len(damaged) - first))
        damaged[place] = int(rng.integers(256))
        body = bytes(damaged)
        try:
            banks = t.unpack(body + hashlib.sha256(body).digest()[:t.CHECKSUM_BYTES])[1]
            assert list(banks) == list(stored)
        except t.Refusal:
            refused += 1
    assert refused > 30


def budget_model(seed: int) -> tuple[t.GPT, t.Curvature]:
    """A made-up model of 0.4 million weights in which scales of roles, layers and columns differ,
    with the curvature of correlated inputs and rows of many sizes."""
    h = settings(model_dim=96, vocab_size=1024, num_layers=3, loop_start=1, loop_end=1, mlp_mult=4.0,
                 parallel_start_layer=2,
                 trellis_states=8 if seed % 5 == 4 else 0)
    torch.manual_seed(seed)
    model, moments, rows = t.GPT(h), {}, {}
    for name, role in t.roles(h).items():
        if role.tap:
            w = t.bank_of(model, name)
            w.copy_(torch.randn_like(w) * torch.exp(torch.randn(len(w), 1, w.size(2)) * 0.4) * 0.03)
            rows[name] = torch.exp(2 * torch.randn(len(w), 1) + torch.randn(len(w), w.size(1)))
            x = torch.randn(len(w), 2 * w.size(2), w.size(2))
            x = x @ (torch.eye(w.size(2)) + 0.3 * torch.randn(w.size(2), w.size(2)) / 8)
            moments[role.tap] = x.double().mT @ x.double()
    return model, t.Curvature(rows, {tap: t.inverse_factor(H, h.gptq_damping) for tap, H in moments.items()})


@pytest.mark.parametrize("seed", range(10))
def test_the_budget_is_filled(seed):
    """Ten models and budgets from 1.9 to 4 bits a weight: code + artifact are within 99.9 and
    100% of BUDGET_BYTES, and read back."""
    model, found = budget_model(seed)
    code, rng = 30_000, np.random.default_rng(100 + seed)
    weights = sum(t.bank_of(model, n).numel() for n in found.rows)
    budget = code + int(weights * rng.uniform(1.9, 4) / 8) + 8_000
    model.h = replace(model.h, budget_bytes=budget)
    log = Lines()
    blob, ledger, _ = t.fit_budget(model, found, code, log)
    assert 0.999 * budget <= len(blob) + code <= budget
    assert sum(ledger.values()) == len(blob) and list(t.unpack(blob)[1]) == list(t.roles(model.h))
    said = re.search(r"(\d+) bytes free after (\d) passes", log.lines[-1])
    assert int(said[1]) == budget - code - len(blob) and int(said[2]) <= 4


@pytest.mark.parametrize("budget", [31_000, 16_000_000])
def test_a_budget_out_of_reach_ends_at_the_last_steps(budget):
    """Too small a budget gets the coarsest steps, a huge one only twice as fine ones, and the log
    says so."""
    model, found = budget_model(0)
    model.h, log = replace(model.h, budget_bytes=budget), Lines()
    blob = t.fit_budget(model, found, 30_000, log).blob
    mean = float(re.search(r"steps:x([\d.]+)", log.lines[-1])[1])
    assert mean == pytest.approx(16 if budget < 40_000 else 0.5, rel=1e-3)
    assert (len(blob) + 30_000 > budget) == (budget < 40_000)
    assert ("finest" in log.lines[-1]) == (budget > 40_000)


@pytest.mark.parametrize("power, bits", [(0.1, 0.2), (4, 0.5), (0.1, 3.0), (4, 3.0)])
def test_the_search_needs_no_good_estimate(monkeypatch, power, bits):
    """However wrong the expected bytes are, a reachable budget is filled, and the smallest size is
    that of the coarsest steps, really packed."""
    model, found = budget_model(1)
    true = t.gaussian_bits
    monkeypatch.setattr(t, "gaussian_bits", lambda size: true(size).clamp_min(0.01)**power)
    budget = 30_000 + 8_000 + int(bits * sum(t.bank_of(model, n).numel() for n in found.rows) / 8)
    model.h, log = replace(model.h, budget_bytes=budget), Lines()
    blob = t.fit_budget(model, found, 30_000, log).blob
    if bits == 0.2:
        assert "steps:x16.000" in log.lines[-1] and len(blob) + 30_000 > budget
    else:
        assert 0.999 * budget <= len(blob) + 30_000 <= budget


def test_uniform_steps_are_packed_as_they_are(stored):
    """Nothing is searched: the artifact is that of `quantise`."""
    h = settings(step_search="uniform")
    model = model_of(h)
    found = found_of(model)
    assert t.fit_budget(model, found, 0, Lines())[0] == t.pack(h, t.quantise(model, found))[0]
