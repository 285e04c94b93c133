"""What the artifact's bytes buy: (a) coders on equal integers, (b) BPB lost at equal bytes for every way of quantising.

The small model of bench_model.py, two training seeds. Steps are searched on training text only; losses are measured on
validation documents, whole documents, with standard errors over documents of the paired difference. The last line is
BENCH {"coders", "methods", "default", "uniform"}. Figures of `methods` are means over the seeds.
Run: python tests/bench_artifact.py [SEED ...]           default 1 2; BENCH_TARGETS=120000 targets are scored
     python tests/bench_artifact.py CHECKPOINT           torch.save(dict(knobs={...}, weights={...})) of any model
"""
from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_rebuild import methods

from bench_model import Bench, bench_model
from bench_model import tg as t

TARGETS = int(os.environ.get("BENCH_TARGETS", 120_000))
WORLD, QUIET = t.World(), t.Log(t.World(), quiet=True)
UNIFORM, DEFAULT = "uniform k=12.85", "default: trellis + layer + column + row"
EQUAL, BOTH = (1.0, 0.0), (0.5, 0.5)    # powers of row and column steps: none of their own, the default
# name -> (changed knobs, those powers, are damages measured?); without them every role-layer keeps its share of the bytes
METHODS = {
    "column steps": (dict(trellis_states=0), (1.0, 0.5), False),
    "row steps": (dict(trellis_states=0), (0.5, 0.0), False),
    "a step per role": (dict(trellis_states=0, step_search="role"), EQUAL, True),
    "a step per role and layer": (dict(trellis_states=0), EQUAL, True),
    "role and layer + column + row": (dict(trellis_states=0), BOTH, True),
    "role and layer + percentile search": (dict(trellis_states=0, clip_search=True), EQUAL, True),
    "trellis": ({}, EQUAL, False),
    DEFAULT: ({}, BOTH, True),
}


def checkpoint(path: str) -> Bench:
    """A model of anyone's: its knobs (DATA_PATH among them) and weights; moments are measured here."""
    kept = torch.load(path, weights_only=True)
    h = t.Hyperparameters(**kept["knobs"])
    data, model = t.find_dataset(h, WORLD, print), t.build_model(h, WORLD)
    t.load_stored(model, kept["weights"])
    loader = t.Loader(h, WORLD, data.train)
    moments = t.second_moments(model, WORLD, loader, h.gptq_calibration_batches)
    return Bench(h, model, data, moments, loader.position)


def coder_table(h: t.Hyperparameters, stored: dict) -> dict[str, dict[str, float]]:
    """(a): bytes and seconds of every coder on the codes of uniform steps."""
    codes = {n: stored[n].codes.numpy() for n in t.coded_roles(h)}
    count, rows = sum(c.size for c in codes.values()), {}
    for name in ("rans", *t.coders()):
        begin = time.perf_counter()
        streams = t.pack_codes(h, codes, name, False)
        middle = time.perf_counter()
        again = t.unpack_codes(h, streams, name)
        end = time.perf_counter()
        assert all(map(np.array_equal, again, codes.values())), name
        rows[name] = dict(bytes=sum(map(len, streams)), encode_s=round(middle - begin, 3), decode_s=round(end - middle, 3))
    least = min(row["bytes"] for row in rows.values())
    print(f"\n(a) {count:,} equal integers\n{'coder':8}{'bytes':>12}{'bits/weight':>13}{'over best':>11}{'encode s':>10}{'decode s':>10}")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bytes"]):
        print(f"{name:8}{row['bytes']:12,}{8 * row['bytes'] / count:13.3f}{100 * (row['bytes'] / least - 1):10.2f}%"
              f"{row['encode_s']:10.2f}{row['decode_s']:10.2f}")
    return rows


def document_nats(model: t.GPT, val: t.Validation) -> tuple[np.ndarray, np.ndarray]:
    """Nats and bytes of text of each of the first documents, about TARGETS targets in all."""
    count = max(1, int(np.searchsorted(val.documents, TARGETS)))
    count = min(count, len(val.documents) - 1)
    N = int(val.documents[count])
    part = t.Validation(val.tokens[:N + 1], val.bytes[:N], val.documents[:count + 1])
    ledger = t.score_by_name("stream", model, part, WORLD, t.Log(WORLD, quiet=True))[1]
    starts = part.documents[:-1]
    return np.add.reduceat(ledger.targets_nats().astype(np.float64), starts), np.add.reduceat(part.bytes, starts)


def paired(nats: np.ndarray, base: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Difference in BPB of two sets of document nats, and its standard error over documents."""
    bits = (nats - base) / math.log(2)
    mean = bits.sum() / sizes.sum()
    return float(mean), float(np.sqrt(((bits - mean * sizes)**2).sum()) / sizes.sum())


def method_rows(bench: Bench, limit: int, uniform: bytes) -> dict[str, dict]:
    """(b) for one model: bytes, BPB lost and its standard error of every method at `limit` bytes."""
    model, h, read_back = bench.model, bench.h, copy.deepcopy(bench.model)

    def judged(name: str, size: int, stored: dict, seconds: float, default: np.ndarray | None = None) -> np.ndarray:
        """Nats of the documents with these banks, after the row of a method; paired with the default's where given."""
        t.load_stored(read_back, stored)
        nats = document_nats(read_back, bench.data.val)[0]
        lost, se = paired(nats, base, sizes)
        rows[name] = dict(bytes=size, bpb_lost=round(lost, 6), se=round(se, 6))
        words = f"{name:42}{size:11,}{lost:10.5f} ({se:.5f}){100 * lost / rows[UNIFORM]['bpb_lost']:7.1f}%{seconds:7.1f} s"
        if default is not None:
            gain, se = paired(nats, default, sizes)
            rows[name] |= dict(against_default=round(gain, 6), against_default_se=round(se, 6))
            words += f"   against the default {gain:+.5f} ({se:.5f})"
        print(words, flush=True)
        return nats

    factors, rows, damages = t.inverse_factors(h, bench.moments), {}, {}
    base, sizes = document_nats(model, bench.data.val)
    print(f"\n(b) {len(base)} documents, {sizes.sum():,} bytes, {base.sum() / sizes.sum() / math.log(2):.5f} BPB before")
    for name, (changes, powers, measured) in {UNIFORM: (None, BOTH, False), **METHODS}.items():
        blob, seconds = uniform, 0.0
        if changes is not None:
            model.h = replace(h, budget_bytes=limit, **changes)
            t.ROW_STEP_POWER, t.COLUMN_STEP_POWER = powers
            key = (*powers, model.h.clip_search)
            if measured and key not in damages:
                loader = t.Loader(h, WORLD, bench.data.train)
                loader.position = bench.position    # the text that follows calibration's
                damages[key] = t.step_damage(model, WORLD, loader, factors)
            equal = {n: torch.full((s[0],), float(s[1] * s[2])) for n, s in t.coded_roles(h).items() if t.roles(h)[n].tap}
            begin = time.perf_counter()
            blob, _ = t.fit_budget(model, factors, damages[key] if measured else equal, 0, QUIET)
            seconds = time.perf_counter() - begin
        nats = judged(name, len(blob), t.unpack(blob)[1], seconds)

    def fit(reserve: int) -> bytes:
        """The default's artifact, `reserve` bytes smaller."""
        model.h = replace(h, budget_bytes=limit - reserve)
        return t.fit_budget(model, factors, damages[(*BOTH, h.clip_search)], 0, QUIET)[0]

    for name, method in methods(bench.position + 1).items():
        begin = time.perf_counter()
        size, stored = method(bench, factors, fit)
        judged(name, size, stored, time.perf_counter() - begin, nats)
    model.h = h
    return rows


def main() -> None:
    """Prints both tables for every model, then the BENCH line."""
    torch.set_num_threads(1)
    given = sys.argv[1:] or ["1", "2"]
    print(f"machine: {t.device_name(torch.device('cpu'))}, torch {torch.__version__}")
    coders, tables = {}, {}
    for word in given:
        bench = checkpoint(word) if Path(word).is_file() else bench_model(int(word))
        bench.model.h = replace(bench.h, step_search="uniform", trellis_states=0)
        stored = t.quantise(bench.model, t.inverse_factors(bench.h, bench.moments))
        uniform, _ = t.pack(bench.model.h, stored)
        coders = coders or coder_table(bench.model.h, stored)
        tables[word] = method_rows(bench, len(uniform), uniform)
    methods = {name: dict(bytes=sum(rows[name]["bytes"] for rows in tables.values()) // len(tables),
                          bpb_lost=round(sum(rows[name]["bpb_lost"] for rows in tables.values()) / len(tables), 6),
                          se=round(math.hypot(*(rows[name]["se"] for rows in tables.values())) / len(tables), 6))
               for name in tables[given[0]]}
    print("BENCH " + json.dumps(dict(coders=coders, methods=methods, default=DEFAULT, uniform=UNIFORM, seeds=tables)))


if __name__ == "__main__":
    main()
