"""The record at full size on a CPU: from weights to an artifact that fills the budget, and back, and a score.

Weights are random, with rows and columns of as many sizes as trained ones have; curvature is measured on four rows of random tokens.
ROUNDING_STEPS=0: banks are not rounded in turn, for which a CPU would learn for hours. Prints seconds, memory, and one line BENCH {json}.
Run: python tests/bench_export.py [KNOB=value ...]
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import train_gpt as tg
from bench_gpu import stages

WORLD = tg.World()
SPREAD = 0.4    # standard deviation of the logarithms of the sizes of rows and columns
ROWS = 4    # of text
CODE = 48_000    # bytes left for it


def trained_like(h: tg.Hyperparameters) -> tg.GPT:
    """A model with random weights whose rows and columns are as unlike as those of a trained one."""
    torch.manual_seed(h.seed)
    model = tg.GPT(h)
    with torch.no_grad():
        for name, role in tg.roles(h).items():
            w = model.bank[name]
            if role.bits < 16:
                w.normal_(std=0.02)
                for size in (w[..., :1], w[..., :1, :]):
                    w.mul_(torch.randn_like(size).mul_(SPREAD).exp_())
    return model


def peak_bytes() -> int:
    """The most memory that this process held since the last call (Linux)."""
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def main(arguments: list[str]) -> None:
    """Measures, prints a table and the BENCH line."""
    few = dict(RECIPE="record", ROUNDING_STEPS="0", EVAL_BATCH_TOKENS="2048")
    h = tg.Hyperparameters.from_env(few | dict(word.split("=", 1) for word in arguments))
    model, (found, booked) = trained_like(h), stages(WORLD)
    text = torch.randint(2, h.vocab_size, (ROWS, h.train_seq_len), generator=torch.Generator().manual_seed(h.seed))
    curvature = booked("curvature", tg.calibrate(model, WORLD, text))
    found["curvature_peak_bytes"] = peak_bytes()
    blob = booked("search", tg.round_in_turn(model, curvature, CODE, WORLD, tg.Log(WORLD))).blob
    stored = booked("unpack", tg.unpack(blob))[1]
    found["search_peak_bytes"] = peak_bytes()
    tg.load_stored(model, stored)
    tokens = text.flatten().numpy()[:h.eval_seq_len + 1].astype(np.uint16)
    val = tg.Validation.of(np.concatenate([[tg.BOS], tokens[1:]]), np.full(len(tokens) - 1, 4))
    score = booked("score", tg.score_by_name("quantized", model, val, WORLD, tg.Log(WORLD, quiet=True)))[0]
    found |= dict(parameters=sum(w.numel() for w in model.bank.values()), bytes=len(blob) + CODE, limit=h.budget_bytes,
                  filled=(len(blob) + CODE) / h.budget_bytes, val_loss=score["val_loss"])
    print(f"machine: {tg.device_name(WORLD.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, value in found.items():
        print(f"{name:20} {round(value, 4):,}")
    print("BENCH " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
