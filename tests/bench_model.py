"""One small model of this architecture, trained once for all benchmarks and cached by content.

`bench_model(seed)` gives its hyperparameters, the averaged weights, the data set and the second moments that
calibration saw. Documents: BENCH_DATA (docs_train.jsonl.zst, docs_val.jsonl.zst, tokenizers/; default
../shared/data beside the repository), else the embedded corpus. Cache: BENCH_CACHE (default data/bench).
Run: python tests/bench_model.py SEED [STEPS]      (about 10 minutes on one core for 600 steps)
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import torch

import train_gpt as tg

DATA = Path(os.environ.get("BENCH_DATA", REPO.parent / "shared" / "data"))
CACHE = Path(os.environ.get("BENCH_CACHE", REPO / "data" / "bench"))
STEPS, TRAIN_DOCUMENTS = 600, 6000
SHAPE = dict(RECIPE="demo", NUM_LAYERS="6", XSA_LAST_N="6", LOOP_START="2", LOOP_END="3", PARALLEL_START_LAYER="4",
             TRAIN_SEQ_LEN="512", EVAL_SEQ_LEN="512", EVAL_STRIDE="256", TTT_CHUNK_TOKENS="8192",
             TRAIN_BATCH_TOKENS="8192", MICRO_BATCH_TOKENS="8192", EVAL_BATCH_TOKENS="8192",
             MAX_WALLCLOCK_SECONDS="0", GPTQ_CALIBRATION_BATCHES="8")


class Bench(NamedTuple):
    """A trained small model and what it was trained on."""

    h: tg.Hyperparameters
    model: tg.GPT
    data: tg.Dataset
    moments: dict[str, torch.Tensor]    # of GPTQ_CALIBRATION_BATCHES micro-batches after training
    position: int    # micro-batches that training and calibration have read


def documents(train: Path, val: Path) -> Iterator[tuple[bool, str]]:
    """(held out, text): all validation documents, then the first TRAIN_DOCUMENTS others."""
    sides = itertools.groupby(tg.split_documents([train], [val]), lambda document: document[0])
    for held, side in sides:
        yield from side if held else itertools.islice(side, TRAIN_DOCUMENTS)


def shards(V: int) -> tuple[Path, Path]:
    """The folder of the shards, built on the first call, and their tokenizer."""
    train, val = DATA / "docs_train.jsonl.zst", DATA / "docs_val.jsonl.zst"
    if not train.is_file():
        folder = tg.embedded_corpus(CACHE, V)
        return folder, folder / f"fineweb_{V}_bpe.model"
    given = DATA / "tokenizers" / f"fineweb_{V}_bpe.model"
    folder = CACHE / f"docs{TRAIN_DOCUMENTS}_sp{V}_{tg.file_sha256(val)[:8]}"
    if not tg.intact(folder):
        tg.build_dataset(functools.partial(documents, train, val), V, given if given.is_file() else None, folder, False,
                         print, tg.Tally())
    return folder, folder / f"fineweb_{V}_bpe.model"


def bench_model(seed: int = 1, steps: int = STEPS, V: int = 4096) -> Bench:
    """The model of this seed, trained by `Trainer` for `steps` steps or read from the cache."""
    tg.tune_process(torch.device("cpu"))
    CACHE.mkdir(parents=True, exist_ok=True)
    folder, tokenizer = shards(V)
    h = tg.Hyperparameters.from_env(SHAPE | dict(SEED=str(seed), ITERATIONS=str(steps), VOCAB_SIZE=str(V),
                                                 DATA_PATH=str(folder), TOKENIZER_PATH=str(tokenizer)))
    world, log = tg.World(), tg.Log(tg.World())
    data = tg.find_dataset(h, world, log)
    shown = {name: getattr(h, name) for name in sorted(name.lower() for name in SHAPE)}
    key = json.dumps([shown, seed, steps, V, [tg.file_sha256(p) for p in sorted(folder.glob("*.bin"))]])
    path = CACHE / f"model_seed{seed}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    model = tg.build_model(h, world)
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, w in kept["weights"].items():
                model.bank[name].copy_(w)
        return Bench(h, model, data, kept["moments"], kept["position"])
    model.compile(tg.compile_mode(h, world.device, print))
    trainer, begin_s = tg.Trainer(h, world, model, data), time.perf_counter()
    tg.train(trainer, 0.0, log, str)
    moments = tg.second_moments(model, world, trainer.loader, h.gptq_calibration_batches)
    kept = dict(weights={n: p.detach().clone() for n, p in model.bank.items()}, moments=moments,
                position=trainer.loader.position)
    torch.save(kept, partial := path.with_suffix(f".{os.getpid()}"))
    os.replace(partial, path)
    print(f"bench model: {path} after {time.perf_counter() - begin_s:.0f} s", flush=True)
    return Bench(h, model, data, moments, trainer.loader.position)


def main() -> None:
    """Trains or finds the model of one seed."""
    bench = bench_model(*map(int, sys.argv[1:3] or ["1"]))
    print(f"parameters {sum(p.numel() for p in bench.model.parameters()):,}")


if __name__ == "__main__":
    main()
