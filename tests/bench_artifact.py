"""What the artifact's bytes buy: (a) coders on equal integers, (b) BPB lost at equal bytes for every way of rounding.

Well-trained models of bench_replica.py. Steps are searched on training text only; losses are measured on the first documents of
validation, with standard errors over documents of the paired difference. `uniform` has bytes of its own, which --bits 0 takes
over. The last line is BENCH {"bits": {"2.5": {"default": {"bytes", "bpb_lost", "se"}, "before", ...}, ...}, "coders"}, means over
the seeds; `before` is the default of commit f770ae1.
Run: python tests/bench_artifact.py S --seeds 1,2 --bits 0,3.5,3,2.5,2
     python tests/bench_artifact.py CHECKPOINT           torch.save(dict(knobs={...}, weights={...})) of any model
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from bench_rebuild import before, by_size
from bench_replica import (
    QUIET,
    SCALES,
    WORLD,
    Replica,
    compared,
    document_nats,
    first_documents,
    replica,
)
from bench_replica import tg as t

ROWS, COLUMNS = t.ROW_STEP_POWER, t.COLUMN_STEP_POWER
# name -> (changed knobs, powers of row and column steps)
METHODS = {
    "default": ({}, (ROWS, COLUMNS)),
    "all at once": (dict(rounding_steps=0), (ROWS, COLUMNS)),
    "rows alike": (dict(rounding_steps=0), (0.0, COLUMNS)),
    "columns alike": (dict(rounding_steps=0), (ROWS, 0.0)),
    "no trellis": (dict(rounding_steps=0, trellis_states=0), (ROWS, COLUMNS)),
    "16 states": (dict(trellis_states=16), (ROWS, COLUMNS)),
    "in turn columns alike": ({}, (ROWS, 0.0)),
}


def checkpoint(path: str) -> Replica:
    """A model of anyone's: its knobs (DATA_PATH among them) and weights; the curvature is measured here."""
    kept = torch.load(path, weights_only=True)
    h = t.Hyperparameters(**kept["knobs"])
    data, model = t.find_dataset(h, WORLD, print), t.build_model(h, WORLD)
    t.load_stored(model, kept["weights"])
    return Replica(h, model, data, 0)


def coder_table(h: t.Hyperparameters, stored: dict) -> dict[str, dict[str, float]]:
    """(a): bytes and seconds of every coder on the codes of uniform steps."""
    codes = {n: stored[n].codes.numpy() for n in t.coded_roles(h)}
    count, rows = sum(c.size for c in codes.values()), {}
    for name in ("rans", *t.coders()):
        begin = time.perf_counter()
        streams, _ = t.pack_codes(t.replace(h, compressor=name), codes, False)
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


def method_rows(bench: Replica, limit: int, uniform: bytes, val: t.Validation, base: np.ndarray,
                names: list[str], learned: np.ndarray | None) -> dict[str, dict]:
    """(b) for one model and the methods of these names, also after TTT where its nats `learned` of the exact weights are given: bytes, BPB lost against the nats `base` and its standard error of every method at `limit` bytes."""
    model, rows, read_back = bench.model, {}, copy.deepcopy(bench.model)
    exact = {n: w.detach().clone() for n, w in model.bank.items()}
    sizes, weights = np.add.reduceat(val.bytes, val.documents[:-1]), sum(p.numel() for p in bench.model.parameters())
    print(f"\n(b) {len(base)} documents, {sizes.sum():,} bytes, {base.sum() / sizes.sum() / math.log(2):.5f} BPB before rounding; "
          f"{limit:,} bytes, {8 * limit / weights:.2f} bits per weight")

    def judged(name: str, make: Callable[[], bytes]) -> bytes:
        """The artifact that a method makes, after its row."""
        begin = time.perf_counter()
        blob = make()
        seconds = time.perf_counter() - begin
        t.load_stored(read_back, t.unpack(blob)[1])
        lost, se = compared([document_nats(read_back, val, "stream")], [base], sizes)
        rows[name] = dict(bytes=len(blob), bpb_lost=round(lost, 6), se=round(se, 6))
        text = f"{name:24}{len(blob):11,}{lost:10.5f} ({se:.5f}){lost / next(iter(rows.values()))['bpb_lost']:8.1%}{seconds:7.1f} s"
        if learned is not None:
            few = first_documents(val, len(learned))
            lost, se = compared([document_nats(read_back, few, "ttt")], [learned], sizes[:len(learned)])
            rows[name] |= dict(ttt_lost=round(lost, 6), ttt_se=round(se, 6))
            text += f"   after TTT {lost:.5f} ({se:.5f})"
        print(text, flush=True)
        return blob

    def fitted(changes: dict, powers: tuple[float, float]) -> bytes:
        """The artifact of the search with these knobs and powers."""
        model.retune(budget_bytes=limit, **changes)
        with mock.patch.multiple(t, ROW_STEP_POWER=powers[0], COLUMN_STEP_POWER=powers[1]):
            blob = t.round_in_turn(model, bench.found, 0, WORLD, QUIET).blob
        t.load_stored(model, exact)    # what made up for errors goes back to where it was
        return blob

    if len(uniform) == limit:
        judged("uniform", lambda: uniform)
    if "before" in names:
        judged("before", lambda: before(bench, limit))
    for name in filter(METHODS.__contains__, names):
        changes, powers = METHODS[name]
        judged(name, lambda c=changes, p=powers: fitted(c, p))
        model.retune(trellis_states=bench.h.trellis_states, rounding_steps=bench.h.rounding_steps)
    return rows


def main(arguments: list[str]) -> None:
    """Prints both tables for every model, then the BENCH line."""
    parser = argparse.ArgumentParser("bench_artifact.py", description=__doc__)
    parser.add_argument("model", help=f"a scale of the replica, {' or '.join(SCALES)}, or a checkpoint")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--bits", default="0,3.5,3,2.5,2", help="per weight, of the whole artifact; 0: the bytes of uniform steps")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--ttt", type=int, default=0, help="documents to score after TTT as well, which takes minutes each")
    parser.add_argument("--methods", default=",".join(["before", "default", "all at once"]),
                        help=f"of: before, {', '.join(METHODS)}; - for all")
    o = parser.parse_args(arguments)
    names = ["before", *METHODS] if o.methods == "-" else o.methods.split(",")
    torch.set_num_threads(1)
    print(f"machine: {t.device_name(torch.device('cpu'))}, torch {torch.__version__}")
    coders, tables = {}, {}
    for seed in o.seeds.split(","):
        bench = replica(o.model, int(seed)) if o.model in SCALES else checkpoint(o.model)
        model = bench.model
        model.retune(step_search="uniform", trellis_states=0)
        uniform, _ = t.pack(model.h, stored := t.quantise(model, by_size(bench)))
        coders = coders or coder_table(model.h, stored)
        model.retune(step_search=bench.h.step_search, trellis_states=bench.h.trellis_states)
        weights = sum(p.numel() for p in model.parameters())
        val = first_documents(bench.data.val, o.documents)
        base = document_nats(model, val, "stream")
        model.retune(eval_budget_s=0.0)
        learned = document_nats(model, first_documents(val, o.ttt), "ttt") if o.ttt else None
        for bits in o.bits.split(","):
            limit = round(float(bits) * weights / 8) or len(uniform)
            tables.setdefault(bits, {})[seed] = method_rows(bench, limit, uniform, val, base, names, learned)
        if o.model not in SCALES:
            break
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)
    found = {bits: {name: dict(bytes=round(mean(rows := [table[name] for table in seeds.values()], "bytes")),
                               bpb_lost=round(mean(rows, "bpb_lost"), 6), se=round(math.hypot(*(r["se"] for r in rows)) / len(rows), 6))
                    for name in next(iter(seeds.values()))} for bits, seeds in tables.items()}
    print("BENCH " + json.dumps(dict(bits=found, coders=coders, seeds=tables)))


if __name__ == "__main__":
    main(sys.argv[1:])
