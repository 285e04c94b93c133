"""What each form of test-time training gains and costs, on a well-trained model of bench_replica.py.

Documents of the validation set in their order, each cut after 2,048 tokens, until TARGETS are reached. Rates were chosen on
documents of docs_train that the model had not read; this reports once on docs_val. Gains are differences of BPB from `none`, their
standard errors are paired by document; the last column compares with `stream`, the field's form, in the same way. FLOPs are counted by torch on
the first documents; a matrix product of n x k by k x m counts 2 n k m, backward products too.
Run: python tests/bench_ttt.py S [TARGETS] [METHOD ...]
     python tests/bench_ttt.py S [TARGETS] budgets          EVAL_BUDGET_S at ten shares of what the default takes
"""
from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from bench_replica import replica, tg
from torch.utils.flop_counter import FlopCounterMode

LONGEST, FLOP_DOCUMENTS = 2048, 6
# the form of #1530; rates and ranks of one learner were chosen by its streaming twin
FIELD = dict(ttt_stream_chunk=48, ttt_learners=1, ttt_lora_lr=4e-3, ttt_lr_decay=0.0, ttt_lora_rank=16)
FALLING = FIELD | dict(ttt_lora_lr=8e-3, ttt_lr_decay=0.5)
SGD = dict(ttt_lr=3e-3, ttt_batch_seqs=4)
METHODS: dict[str, tuple[str, dict]] = {
    "none": ("stream", {}),
    "sliding, recomputed": ("sliding", {}),
    "stream": ("ttt", FIELD),
    "stream, 2 steps": ("ttt", FALLING | dict(ttt_lora_lr=3e-3, ttt_steps=2)),
    "stream, 3 steps": ("ttt", FALLING | dict(ttt_lora_lr=2e-3, ttt_steps=3)),
    "stream, 4 steps": ("ttt", FALLING | dict(ttt_lora_lr=1.5e-3, ttt_steps=4)),
    "stream, falling rate": ("ttt", FALLING),
    "stream, falling rate, chunk 24": ("ttt", FALLING | dict(ttt_stream_chunk=24)),
    "stream, falling rate, chunk 16": ("ttt", FALLING | dict(ttt_stream_chunk=16)),
    "chunk SGD on sliding": ("ttt", SGD | dict(ttt="chunk", ttt_chunk_tokens=4096, ttt_epochs=3)),
    "phased SGD on stream": ("ttt", SGD | FIELD | dict(ttt="phased", ttt_phases=4, ttt_epochs=1)),
    "mixture of 2": ("ttt", dict(ttt_learners=2)),
    "mixture of 3 (default)": ("ttt", {}),
    "mixture of 4": ("ttt", dict(ttt_learners=4)),
}
DEFAULT, STREAM = "mixture of 3 (default)", "stream"


class Untracked:
    """In the place of the counter's module tracker, whose hooks refuse slices of weights under no_grad."""

    parents = {"Global"}

    def __enter__(self):
        """Nothing."""

    def __exit__(self, *error):
        """Nothing."""


class Row(NamedTuple):
    """One line of the table."""

    nats: np.ndarray    # (N,) of every target
    flops: float    # per scored target
    seconds: float    # per scored target


def cut(val: tg.Validation, targets: int, documents: int = sys.maxsize) -> tg.Validation:
    """The first documents, each at most LONGEST tokens long, up to about `targets` targets."""
    pieces, count = [], 0
    for b, e in zip(val.documents[:-1], val.documents[1:]):
        if count >= targets or len(pieces) == documents:
            break
        pieces.append(np.arange(b, min(e, b + LONGEST)))
        count += len(pieces[-1])
    place = np.concatenate(pieces)
    # the start that ends the last document is a target too; it stands for no bytes
    tokens = np.concatenate([val.tokens.numpy()[place], [tg.BOS]])
    sizes = val.bytes[place].copy()
    sizes[np.cumsum([len(p) for p in pieces]) - 1] = 0
    return tg.Validation.of(tokens, sizes)


def measure(name: str, model: tg.GPT, h: tg.Hyperparameters, val: tg.Validation, few: tg.Validation) -> Row:
    """Scores `val` by one method, and `few` once more to count its products."""
    score, changes = METHODS[name]
    model.retune(**{f.name: getattr(h, f.name) for f in dataclasses.fields(h)} | changes)
    world = tg.World()
    run = lambda text: tg.score_by_name(score, model, text, world, tg.Log(world, quiet=True))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()
    with counter:
        run(few)
    begin_s = time.perf_counter()
    ledger = run(val)[1]
    N = len(val.bytes)
    return Row(ledger.targets_nats().astype(np.float64), counter.get_total_flops() / len(few.bytes),
               (time.perf_counter() - begin_s) / N)


def budgets(model: tg.GPT, h: tg.Hyperparameters, data: tg.Dataset, val: tg.Validation) -> list[dict[str, float]]:
    """What EVAL_BUDGET_S makes of ten budgets, by the real clock: the rung, seconds, gain."""
    world, rows = tg.World(), []
    start = {f.name: getattr(h, f.name) for f in dataclasses.fields(h)} | dict(ttt_chunk_tokens=4096)
    score = lambda name, log=None: tg.score_by_name(name, model, val, world, log or tg.Log(world, quiet=True))[0]
    model.retune(**start)
    none, whole = score("stream"), score("ttt")
    print(f"none {none['val_bpb']:.5f} BPB, {none['seconds']:.1f} s; the default {whole['val_bpb']:.5f} BPB, {whole['seconds']:.1f} s")
    for share in (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0):
        budget_s = share * whole["seconds"]
        model.retune(**start | dict(eval_budget_s=budget_s))
        tg.affordable(model, tg.rehearsal_text(model.h, data, val.documents, world), val.documents, world, tg.Log(world, quiet=True))
        found, h = score("ttt", tg.Log(world)), model.h
        rows.append(dict(share=share, budget_s=budget_s, seconds=found["seconds"], gain=none["val_bpb"] - found["val_bpb"],
                         learners=h.ttt_learners, chunk=h.ttt_stream_chunk, steps=h.ttt_steps))
        print("{share:5.0%} {budget_s:7.1f} s of budget, {seconds:7.1f} s taken, gain {gain:8.5f}, {learners} learners, "
              "chunk {chunk}, {steps} steps".format(**rows[-1]), flush=True)
    return rows


def main(arguments: list[str]) -> None:
    """Prints the table and the line BENCH."""
    scale, targets = arguments[0], int((arguments[1:] or [30_000])[0])
    names = arguments[2:] or list(METHODS)
    names = ["none", *[n for n in names if n != "none"]]
    bench = replica(scale, 1)
    h = dataclasses.replace(bench.h, eval_stride=64)
    val, few = cut(bench.data.val, targets), cut(bench.data.val, targets, FLOP_DOCUMENTS)
    if names == ["none", "budgets"]:
        print("BENCH " + json.dumps(dict(budgets=budgets(bench.model, h, bench.data, val))))
        return
    lengths = np.diff(val.documents)
    print(f"{len(lengths)} documents, {len(val.bytes)} targets, {val.bytes.sum()} bytes, {(lengths > 1000).sum()} documents over "
          f"1,000 targets; {tg.device_name(torch.device('cpu'))}, torch {torch.__version__}, {bench.model.dtype}")
    owner = np.repeat(np.arange(len(lengths)), lengths)
    sizes = np.bincount(owner, val.bytes)
    print(f"{'method':31} {'BPB':>8} {'gain':>9} {'s.e.':>8} {'FLOPs':>7} {'ms/target':>10} {'against stream':>18}", flush=True)
    rows, table, bits = {}, {}, {}
    difference = lambda a, b: ((d := bits[b] - bits[a]).sum() / sizes.sum(),
                               math.sqrt(np.square(d - d.sum() / sizes.sum() * sizes).sum()) / sizes.sum())
    for name in names:
        rows[name] = row = measure(name, bench.model, h, val, few)
        bits[name] = np.bincount(owner, row.nats) / math.log(2)
        gain, se = difference(name, "none")
        table[name] = dict(bpb=bits[name].sum() / sizes.sum(), gain=gain, se=se, flops_ratio=row.flops / rows["none"].flops,
                           seconds_per_token=row.seconds)
        other = "" if STREAM not in rows else "{:+.5f} ({:.5f})".format(*difference(name, STREAM))
        print(f"{name:31} {table[name]['bpb']:8.5f} {gain:9.5f} {se:8.5f} {table[name]['flops_ratio']:6.2f}x {row.seconds * 1e3:10.3f} "
              f"{other:>18}", flush=True)
    if "sliding, recomputed" in rows:
        print(f"seconds through the cache / recomputed sliding: {rows['none'].seconds / rows['sliding, recomputed'].seconds:.3f}")
    print("machine " + json.dumps(dict(platform=platform.platform(), threads=torch.get_num_threads())))
    print("BENCH " + json.dumps(dict(methods=table, default=DEFAULT, stream=STREAM)))


if __name__ == "__main__":
    main(sys.argv[1:])
