"""The contest in small: a well-trained replica of the record, for every claim about BPB.

Two scales, S (0.29M weights) and L (0.69M), each trained on TOKENS_PER_WEIGHT tokens per weight, as the contest's 36M weights are
on 107. What is scaled, and how, stands in SCALES. Documents: BENCH_DATA (docs_train.jsonl.zst, docs_val.jsonl.zst; default
../shared/data beside the repository), else the embedded corpus. Trained models are cached by content in BENCH_CACHE (default
data/bench); a stopped training goes on from its checkpoint.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import torch

import train_gpt as tg

DATA = Path(os.environ.get("BENCH_DATA", REPO.parent / "shared" / "data"))
CACHE = Path(os.environ.get("BENCH_CACHE", REPO / "data" / "bench"))
TOKENS_PER_WEIGHT = 60
# Of the record: width, depth, vocabulary, context and batch shrink; one loop in the place of two keeps the share of repeated steps;
# the average spans the same share of the steps, and momentum rises over the same share; all rates stay.
COMMON = dict(RECIPE="record,demo", CORPUS="shards", VOCAB_SIZE="1024", NUM_KV_HEADS="1", QK_GAIN_INIT="2", NUM_LOOPS="1",
              RECUR_START_STEP="0", TRAIN_SEQ_SCHEDULE="", WARMDOWN_ITERS="0", LR_WARMUP_STEPS="20", EMA_DECAY="0.99",
              MUON_MOMENTUM_WARMUP_STEPS="200", TRAIN_SEQ_LEN="512", EVAL_SEQ_LEN="512", EVAL_STRIDE="64", EVAL_BATCH_TOKENS="16384",
              TTT_CHUNK_TOKENS="32768", MAX_WALLCLOCK_SECONDS="0", TRAIN_LOG_EVERY="200", GPTQ_CALIBRATION_BATCHES="16")
SCALES = dict(
    S=dict(NUM_LAYERS="5", XSA_LAST_N="5", MODEL_DIM="64", NUM_HEADS="2", LOOP_START="1", LOOP_END="2", PARALLEL_START_LAYER="4",
           TRAIN_BATCH_TOKENS="8192", MICRO_BATCH_TOKENS="8192"),
    L=dict(NUM_LAYERS="6", XSA_LAST_N="6", MODEL_DIM="96", NUM_HEADS="3", LOOP_START="2", LOOP_END="3", PARALLEL_START_LAYER="4",
           TRAIN_BATCH_TOKENS="16384", MICRO_BATCH_TOKENS="16384"))


class Replica(NamedTuple):
    """A well-trained small model and what it was trained on."""

    h: tg.Hyperparameters
    model: tg.GPT
    data: tg.Dataset
    moments: dict[str, torch.Tensor]    # of GPTQ_CALIBRATION_BATCHES micro-batches after training
    damage: dict[str, torch.Tensor]    # of `step_damage`
    position: int    # micro-batches that training and calibration have read


def shards(V: int) -> Path:
    """The folder of the shards, built on the first call."""
    train, val = DATA / "docs_train.jsonl.zst", DATA / "docs_val.jsonl.zst"
    if not train.is_file():
        return tg.embedded_corpus(CACHE, V)
    folder = CACHE / f"docs_sp{V}_{tg.file_sha256(val)[:8]}"
    if not tg.intact(folder):
        tg.build_dataset(functools.partial(tg.split_documents, [train], [val]), V, None, folder, False, print)
    return folder


def replica(scale: str = "S", seed: int = 1, steps: int = 0, **knobs: str) -> Replica:
    """The model of this seed, with knobs of its own, read from the cache or trained: for `steps` steps, else TOKENS_PER_WEIGHT."""
    tg.tune_process(torch.device("cpu"))
    folder = shards(int(COMMON["VOCAB_SIZE"]))
    given = COMMON | SCALES[scale] | knobs | dict(SEED=str(seed), DATA_PATH=str(folder), LOGS_DIR=str(CACHE),
                                                  TOKENIZER_PATH=str(folder / f"fineweb_{COMMON['VOCAB_SIZE']}_bpe.model"))
    h = tg.Hyperparameters.from_env(given)
    world = tg.World()
    data, model = tg.find_dataset(h, world, print), tg.build_model(h, world)
    weights = sum(p.numel() for p in model.parameters())
    steps = steps or -(-TOKENS_PER_WEIGHT * weights // h.train_batch_tokens)
    key = json.dumps([sorted(h.changed().items()), steps, [tg.file_sha256(p) for p in sorted(folder.glob("*.bin"))]])
    h = model.retune(iterations=steps, run_id=f"replica_{scale}{seed}_{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    path = CACHE / h.run_id / "model.pt"
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, w in kept["weights"].items():
                model.bank[name].copy_(w)
        return Replica(h, model, data, kept["moments"], kept["damage"], kept["position"])
    model.compile(tg.compile_mode(h, world.device, print))
    trainer, begin_s = tg.Trainer(h, world, model, data), time.perf_counter()
    tg.train(trainer, 0.0, tg.Log(world, CACHE / h.run_id), str)
    moments = tg.second_moments(model, world, trainer.loader, h.gptq_calibration_batches)
    damage = tg.step_damage(model, world, trainer.loader, tg.inverse_factors(h, moments))
    kept = dict(weights={n: p.detach().clone() for n, p in model.bank.items()}, moments=moments, damage=damage,
                position=trainer.loader.position)
    torch.save(kept, partial := path.with_suffix(f".{os.getpid()}"))
    os.replace(partial, path)
    for checkpoint in tg.checkpoints(path.parent):
        checkpoint.unlink()
    print(f"replica: {weights:,} weights, {steps} steps, {path} after {time.perf_counter() - begin_s:.0f} s", flush=True)
    return Replica(h, model, data, moments, damage, trainer.loader.position)


if __name__ == "__main__":
    replica(sys.argv[1], int(sys.argv[2]), **dict(word.split("=", 1) for word in sys.argv[3:]))
