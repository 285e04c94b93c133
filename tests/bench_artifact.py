"""What the artifact's bytes buy: (a) coders on equal integers, (b) BPB lost at equal bytes for every way of quantising.

Well-trained models of bench_replica.py. Steps are searched on training text only; losses are measured on the first documents of
validation, with standard errors over documents of the paired difference. The last line is BENCH {"coders", "bits", ...}: of every
number of bits per weight the methods' bytes and BPB lost, means over the seeds; `uniform` has its own bytes, which the first lines
of --bits take over where it is 0.
Run: python tests/bench_artifact.py S --seeds 1,2 --bits 0,3,2.5,2
     python tests/bench_artifact.py CHECKPOINT           torch.save(dict(knobs={...}, weights={...})) of any model
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from bench_rebuild import methods
from bench_replica import SCALES, Replica, compared, document_nats, first_documents, replica
from bench_replica import tg as t

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


def checkpoint(path: str) -> Replica:
    """A model of anyone's: its knobs (DATA_PATH among them) and weights; moments and damages are measured here."""
    kept = torch.load(path, weights_only=True)
    h = t.Hyperparameters(**kept["knobs"])
    data, model = t.find_dataset(h, WORLD, print), t.build_model(h, WORLD)
    t.load_stored(model, kept["weights"])
    loader = t.Loader(h, WORLD, data.train)
    moments = t.second_moments(model, WORLD, loader, h.gptq_calibration_batches)
    return Replica(h, model, data, moments, t.step_damage(model, WORLD, loader, t.inverse_factors(h, moments)), loader.position)


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


def method_rows(bench: Replica, limit: int, uniform: bytes, val: t.Validation, rebuilt: bool) -> dict[str, dict]:
    """(b) for one model: bytes, BPB lost and its standard error of every method at `limit` bytes; if `rebuilt`, of those of
    bench_rebuild.py too."""
    model, h, read_back = bench.model, bench.h, copy.deepcopy(bench.model)

    def judged(name: str, size: int, stored: dict, seconds: float, default: np.ndarray | None = None) -> np.ndarray:
        """Nats of the documents with these banks, after the row of a method; paired with the default's where given."""
        t.load_stored(read_back, stored)
        nats = document_nats(read_back, val, "stream")
        lost, se = compared([nats], [base], sizes)
        rows[name] = dict(bytes=size, bpb_lost=round(lost, 6), se=round(se, 6))
        words = f"{name:42}{size:11,}{lost:10.5f} ({se:.5f}){100 * lost / next(iter(rows.values()))['bpb_lost']:7.1f}%{seconds:7.1f} s"
        if default is not None:
            gain, se = compared([nats], [default], sizes)
            rows[name] |= dict(against_default=round(gain, 6), against_default_se=round(se, 6))
            words += f"   against the default {gain:+.5f} ({se:.5f})"
        print(words, flush=True)
        return nats

    factors, rows, damages = t.inverse_factors(h, bench.moments), {}, {}
    base, sizes = document_nats(model, val, "stream"), np.add.reduceat(val.bytes, val.documents[:-1])
    weights = sum(p.numel() for p in model.parameters())
    print(f"\n(b) {len(base)} documents, {sizes.sum():,} bytes, {base.sum() / sizes.sum() / math.log(2):.5f} BPB before; "
          f"{limit:,} bytes, {8 * limit / weights:.2f} bits per weight")
    own = {UNIFORM: (None, BOTH, False)} if len(uniform) == limit else {}
    for name, (changes, powers, measured) in {**own, **METHODS}.items():
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

    for name, method in methods(bench.position + 1).items() if rebuilt else ():
        begin = time.perf_counter()
        size, stored = method(bench, factors, fit)
        judged(name, size, stored, time.perf_counter() - begin, nats)
    model.h = h
    return rows


def main(arguments: list[str]) -> None:
    """Prints both tables for every model, then the BENCH line."""
    parser = argparse.ArgumentParser("bench_artifact.py", description=__doc__)
    parser.add_argument("model", help=f"a scale of the replica, {' or '.join(SCALES)}, or a checkpoint")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--bits", default="0,2.5", help="per weight, of the whole artifact; 0: the bytes of uniform steps")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rebuilt", action="store_true", help="methods of bench_rebuild.py too")
    o = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"machine: {t.device_name(torch.device('cpu'))}, torch {torch.__version__}")
    coders, tables = {}, {}
    for seed in o.seeds.split(","):
        bench = replica(o.model, int(seed)) if o.model in SCALES else checkpoint(o.model)
        h, model = bench.h, bench.model
        model.retune(step_search="uniform", trellis_states=0)
        uniform, _ = t.pack(model.h, stored := t.quantise(model, t.inverse_factors(h, bench.moments)))
        coders = coders or coder_table(model.h, stored)
        weights = sum(p.numel() for p in model.parameters())
        val = first_documents(bench.data.val, o.documents)
        for bits in o.bits.split(","):
            limit = round(float(bits) * weights / 8) or len(uniform)
            tables.setdefault(bits, {})[seed] = method_rows(bench, limit, uniform, val, o.rebuilt)
        if o.model not in SCALES:
            break
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)
    found = {bits: {name: dict(bytes=round(mean(rows := [table[name] for table in seeds.values()], "bytes")),
                               bpb_lost=round(mean(rows, "bpb_lost"), 6), se=round(math.hypot(*(r["se"] for r in rows)) / len(rows), 6))
                    for name in next(iter(seeds.values()))} for bits, seeds in tables.items()}
    print("BENCH " + json.dumps(dict(coders=coders, bits=found, default=DEFAULT, uniform=UNIFORM, seeds=tables)))


if __name__ == "__main__":
    main(sys.argv[1:])
