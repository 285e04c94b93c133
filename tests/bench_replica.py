"""The contest in small: a well-trained replica of the record, for every claim about BPB.

Three scales, S (0.18M weights), L (0.34M) and, for a GPU, XL (0.69M), each trained on TOKENS_PER_WEIGHT tokens per weight, as the
contest's 36M weights are on 107. What is scaled, and how, stands in SCALES. Documents: BENCH_DATA (docs_train.jsonl.zst,
docs_val.jsonl.zst; default ../shared/data beside the repository), else the embedded corpus. Trained models are cached by content in
BENCH_CACHE (default data/bench); a stopped training goes on from its checkpoint.

All arms get the time of the first: its steps times the modelled milliseconds of both at full size; and artifacts of equal bytes.
Run: python tests/bench_replica.py S "field: RECIPE=field,demo" "record:" "wide: MLP_MULT=6" --seeds 1,2,3 --processes 2
"""
from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import numpy as np
import torch

import train_gpt as tg

DATA = Path(os.environ.get("BENCH_DATA", REPO.parent / "shared" / "data"))
CACHE = Path(os.environ.get("BENCH_CACHE", REPO / "data" / "bench"))
WORLD = tg.World.from_env({})    # one GPU where there is one, else the CPU
QUIET = tg.Log(WORLD, quiet=True)
TOKENS_PER_WEIGHT = 60
TTT_SHARE = 0.4    # of the documents get a score with TTT, which takes several times as long
# Of the record: width, depth, vocabulary, context and batch shrink; one loop in the place of two keeps the share of repeated steps;
# the average spans the same share of the steps, and momentum rises over the same share; all rates stay.
COMMON = dict(RECIPE="record,demo", CORPUS="shards", VOCAB_SIZE="1024", NUM_KV_HEADS="1", QK_GAIN_INIT="2", NUM_LOOPS="1",
              RECUR_START_STEP="0", TRAIN_SEQ_SCHEDULE="", WARMDOWN_ITERS="0", LR_WARMUP_STEPS="20", EMA_DECAY="0.99",
              MUON_MOMENTUM_WARMUP_STEPS="200", EVAL_STRIDE="64", EVAL_BATCH_TOKENS="16384",
              TTT_CHUNK_TOKENS="32768", MAX_WALLCLOCK_SECONDS="0", TRAIN_LOG_EVERY="200", GPTQ_CALIBRATION_BATCHES="16",
              ROUNDING_STEPS="32")
SCALES = dict(
    S=dict(NUM_LAYERS="5", XSA_LAST_N="5", MODEL_DIM="48", NUM_HEADS="2", LOOP_START="1", LOOP_END="2", PARALLEL_START_LAYER="4",
           TRAIN_SEQ_LEN="256", EVAL_SEQ_LEN="256", TRAIN_BATCH_TOKENS="8192", MICRO_BATCH_TOKENS="8192"),
    L=dict(NUM_LAYERS="6", XSA_LAST_N="6", MODEL_DIM="64", NUM_HEADS="2", LOOP_START="2", LOOP_END="3", PARALLEL_START_LAYER="4",
           TRAIN_SEQ_LEN="512", EVAL_SEQ_LEN="512", TRAIN_BATCH_TOKENS="16384", MICRO_BATCH_TOKENS="16384"))
SCALES["XL"] = SCALES["L"] | dict(MODEL_DIM="96")


@dataclasses.dataclass
class Replica:
    """A well-trained small model and what it was trained on."""

    h: tg.Hyperparameters
    model: tg.GPT
    data: tg.Dataset
    position: int    # micro-batches that training has read

    @functools.cached_property
    def found(self) -> tg.Curvature:
        """What rounding asks of the model."""
        return tg.calibrate(self.model, WORLD)


def shards(V: int) -> Path:
    """The folder of the shards, built on the first call."""
    train, val = DATA / "docs_train.jsonl.zst", DATA / "docs_val.jsonl.zst"
    if not train.is_file():
        return tg.embedded_corpus(CACHE, V)
    folder = CACHE / f"docs_sp{V}_{tg.file_sha256(val)[:8]}"
    if not tg.intact(folder):
        tg.make_dataset([str(train), "--val", str(val), "--vocab", str(V), "--out", str(folder)], print)
    return folder


def replica(scale: str = "S", seed: int = 1, steps: int = 0, **knobs: str) -> Replica:
    """The model of this seed, with knobs of its own, read from the cache or trained: for `steps` steps, else TOKENS_PER_WEIGHT."""
    tg.tune_process(WORLD.device)
    folder = shards(int(COMMON["VOCAB_SIZE"]))
    given = COMMON | SCALES[scale] | knobs | dict(SEED=str(seed), DATA_PATH=str(folder), LOGS_DIR=str(CACHE),
                                                  TOKENIZER_PATH=str(folder / f"fineweb_{COMMON['VOCAB_SIZE']}_bpe.model"))
    h = tg.Hyperparameters.from_env(given)
    data, model = tg.find_dataset(h, WORLD, print), tg.build_model(h, WORLD)
    weights = sum(p.numel() for p in model.parameters())
    steps = steps or -(-TOKENS_PER_WEIGHT * weights // h.train_batch_tokens)
    shapes = {name: w.shape for name, w in model.bank.items()}
    learned = {n: v for n, v in sorted(h.changed().items()) if not n.startswith(("ttt_", "eval_", "budget_"))}    # by training
    key = json.dumps([learned, steps, shapes, [tg.file_sha256(p) for p in sorted(folder.glob("*.bin"))]])
    key = hashlib.sha256(key.encode()).hexdigest()[:12] + WORLD.device.type.removeprefix("cpu")
    h = model.retune(iterations=steps, run_id=f"replica_{scale}{seed}_{key}")
    path = CACHE / h.run_id / "model.pt"
    if not path.is_file():
        # a model of its own, since compiled parts of a copy would go on reading the weights of the first
        learner = tg.build_model(h, WORLD)
        learner.compile(tg.compile_mode(h, WORLD.device, print))
        trainer, begin_s = tg.Trainer(h, WORLD, learner, data), time.perf_counter()
        tg.train(trainer, 0.0, tg.Log(WORLD, CACHE / h.run_id), str)
        kept = dict(weights={n: p.detach().clone() for n, p in learner.bank.items()}, position=trainer.loader.position)
        torch.save(kept, partial := path.with_suffix(f".{os.getpid()}"))
        os.replace(partial, path)
        for checkpoint in tg.checkpoints(path.parent):
            checkpoint.unlink()
        print(f"replica: {weights:,} weights, {steps} steps, {path} after {time.perf_counter() - begin_s:.0f} s", flush=True)
    kept = torch.load(path, weights_only=True, map_location="cpu")
    tg.load_stored(model, kept["weights"])
    return Replica(h, model, data, kept["position"])


class Judged(NamedTuple):
    """What one arm gives with one seed."""

    weights: int
    steps: int
    bytes: int
    bits: float    # of the artifact per weight
    nats: dict[str, list[float]]    # of each document: prequant, quantized, ttt


# Milliseconds per million weights of a layer and step: 3.5 bytes a weight sent by reduce-scatter and all-gather at 300 GB/s, 40 bytes
# read and written by update and average at 2.5 TB/s, an eighth of Muon's products. Reckoned, not measured.
WEIGHT_MS = 0.03
# Of the pointer's softmax besides its products, by the last of PAIRS: 98,304 x 2,560 logits that pass through memory about 20 times.
POINTER_MS = 3.8


def cost_ms(h: tg.Hyperparameters, base: tg.Hyperparameters, rate: float, block_ms: float, fixed_ms: float) -> float:
    """Milliseconds of a training step of 98,304 tokens on one of 8 H100s, of the model of `h` at the size at which `base` is the
    record's: matrix products at `rate` TFLOP/s, what else a block does, WEIGHT_MS, and what depends on none of these."""
    D, layers = 512 * h.model_dim / base.model_dim, 11 / base.num_layers
    heads, keys = D * h.num_heads * h.head_dim / h.model_dim, D * h.num_kv_heads * h.head_dim / h.model_dim
    forward = 2 * D * (2 * heads + 2 * keys) + 4 * D * h.mlp_mult * D + 2 * 1024 * heads    # of a token and block
    share = h.enable_looping_at if h.num_loops else 0.0
    blocks = layers * (share * len(tg.depth_plan(h, False)) + (1 - share) * len(tg.depth_plan(h, True)))
    head, weights = 2 * D * 8192, layers * h.num_layers * (D * (2 * heads + 2 * keys) + 2 * D * h.mlp_mult * D)
    pointer = h.pointer * (2 * D * 2 * keys + 2 * 2560 * keys)
    return (3 * (blocks * forward + head + pointer) * 98_304 / rate / 1e9 + blocks * block_ms +
            WEIGHT_MS * weights / 1e6 + POINTER_MS * h.pointer + fixed_ms)


# Pairs at full size: what was changed, and ms per step (or 600 s over the steps); public ones of 8 H100s, and `bench_gpu.py`.
PAIRS = {"#2130, MLP 3 to 4": (dict(mlp_mult=3.0), dict(mlp_mult=4.0), 600e3 / 5337, 600e3 / 4991),
         "#1871, MLP 4 to 4.5": (dict(mlp_mult=4.0), dict(mlp_mult=4.5), 123.1, 129.1),
         "#1512, 11 to 12 layers": (dict(num_layers=11), dict(num_layers=12), 117.0, 130.0),
         "ours, one H200, 11 to 17 steps": (dict(enable_looping_at=1.0), dict(enable_looping_at=0.0), 108.6, 163.0),
         "ours, one H200, no pointer to one": (dict(pointer=False), dict(pointer=True), .35 * 108.6 + .65 * 163.0,
                                               .35 * 113.4 + .65 * 167.9)}


def fitted_cost() -> tuple[tuple[float, float, float], dict[str, float]]:
    """(rate, block_ms, fixed_ms) with the least squared error of the ratios of PAIRS, at 120 ms for `field`; and those errors."""
    field, best = tg.Hyperparameters.from_env(dict(RECIPE="field")), (math.inf, (), {})
    for rate, block_ms in itertools.product(range(300, 801, 20), np.arange(0, 6, 0.1)):
        fixed_ms = 120 - cost_ms(field, field, rate, block_ms, 0.0)
        if fixed_ms < 0:
            continue
        errors = {}
        for name, (before, after, slow, fast) in PAIRS.items():
            ms = [cost_ms(dataclasses.replace(field, **knobs), field, rate, block_ms, fixed_ms) for knobs in (before, after)]
            errors[name] = ms[1] / ms[0] / (fast / slow) - 1
        best = min(best, (sum(e * e for e in errors.values()), (rate, float(block_ms), fixed_ms), errors), key=lambda row: row[0])
    return best[1:]


def first_documents(val: tg.Validation, count: int) -> tg.Validation:
    """The first documents of the validation set."""
    count = min(count, len(val.documents) - 1)
    end = int(val.documents[count])
    return tg.Validation(val.tokens[:end + 1], val.bytes[:end], val.documents[:count + 1])


def document_nats(model: tg.GPT, val: tg.Validation, score: str) -> np.ndarray:
    """Nats of each document by one of SCORES."""
    ledger = tg.score_by_name(score, model, val, WORLD, QUIET)[1]
    return np.add.reduceat(ledger.targets_nats().astype(float), val.documents[:-1])


def judge(scale: str, seed: int, knobs: dict[str, str], steps: int, budget: int, documents: int, threads: int) -> Judged:
    """Trains or finds one model, fits its artifact into `budget` bytes, and scores it before, after, and with TTT."""
    torch.set_num_threads(threads)
    bench = replica(scale, seed, steps, **knobs)
    model = bench.model
    of = json.dumps([budget, documents, knobs]), (REPO / "train_gpt.py").read_text()
    place = CACHE / bench.h.run_id / f"judged_{'_'.join(f'{tg.fingerprint(text):x}' for text in of)}.json"
    if place.is_file():
        return Judged(*json.loads(place.read_text()))
    val, nats = first_documents(bench.data.val, documents), {}
    nats["prequant"] = document_nats(model, val, "stream").tolist()
    model.retune(budget_bytes=budget, eval_budget_s=0.0)
    blob = tg.round_in_turn(model, bench.found, 0, WORLD, QUIET).blob
    tg.load_stored(model, tg.unpack(blob)[1])
    nats["quantized"] = document_nats(model, val, "stream").tolist()
    nats["ttt"] = document_nats(model, first_documents(val, round(TTT_SHARE * documents)), "ttt").tolist()
    weights = sum(p.numel() for p in model.parameters())
    found = Judged(weights, bench.h.iterations, len(blob), 8 * len(blob) / weights, nats)
    place.write_text(json.dumps(found))
    return found


def compared(mine: list[list[float]], base: list[list[float]], sizes: np.ndarray) -> tuple[float, float]:
    """Difference in BPB, mean over seeds, and its standard error over documents."""
    bits = (np.mean(mine, 0) - np.mean(base, 0)) / math.log(2)
    mean = bits.sum() / sizes.sum()
    return float(mean), float(np.sqrt(np.square(bits - mean * sizes).sum()) / sizes.sum())


def main(arguments: list[str]) -> None:
    """Prints the table and the line BENCH."""
    parser = argparse.ArgumentParser("bench_replica.py", description=__doc__)
    parser.add_argument("scale", choices=sorted(SCALES))
    parser.add_argument("arms", nargs="*", default=["record:"], help="name: KNOB=value ...; the first is the base of all differences")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--bytes", type=int, default=0, help="of every artifact; else 3.5 bits per weight of the first arm")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tokens", type=float, default=TOKENS_PER_WEIGHT, help="per weight of the first arm: 240 where arms differ in "
                        "time (fewer flatter what saves steps), a small number to see that the bench runs")
    o = parser.parse_args(arguments)
    seeds = [int(seed) for seed in o.seeds.split(",")]
    arms = {name.strip(): dict(word.split("=", 1) for word in knobs.split()) for name, _, knobs in (a.partition(":") for a in o.arms)}
    cost, errors = fitted_cost()
    print(f"cost model: {cost[0]} TFLOP/s, {cost[1]:.1f} ms a block, {cost[2]:.1f} ms besides; errors of the public ratios: " +
          ", ".join(f"{name} {error:+.1%}" for name, error in errors.items()))
    folder, shapes = shards(int(COMMON["VOCAB_SIZE"])), {}
    for name, knobs in arms.items():
        shapes[name] = tg.Hyperparameters.from_env(COMMON | SCALES[o.scale] | knobs)
    base = next(iter(shapes.values()))
    count = sum(math.prod(r.shape) for r in tg.roles(base).values())
    budget, all_steps = o.bytes or round(3.5 * count / 8), {}
    for name, h in shapes.items():    # equal time: the first arm's steps, at this one's milliseconds
        ms = cost_ms(h, base, *cost)
        all_steps[name] = math.ceil(o.tokens * count / base.train_batch_tokens * cost_ms(base, base, *cost) / ms)
    jobs, threads = [(name, seed) for seed in seeds for name in arms], max(1, tg.cpu_count() // o.processes)
    with concurrent.futures.ProcessPoolExecutor(o.processes, multiprocessing.get_context("spawn")) as pool:
        found = dict(zip(jobs, pool.map(judge, *zip(*[(o.scale, seed, arms[name], all_steps[name], budget, o.documents, threads)
                                                      for name, seed in jobs]))))
    val = first_documents(tg.find_dataset(dataclasses.replace(base, data_path=str(folder), tokenizer_path=str(
        folder / f"fineweb_{base.vocab_size}_bpe.model")), WORLD, print).val, o.documents)
    all_sizes, table = np.add.reduceat(val.bytes, val.documents[:-1]), {}
    print(f"{len(all_sizes)} documents, {all_sizes.sum()} bytes, with TTT the first {TTT_SHARE:.0%}; seeds {o.seeds}; "
          f"{tg.device_name(WORLD.device)}, torch {torch.__version__}")
    print(f"{'arm':24}{'weights':>9}{'ms':>7}{'steps':>7}{'bytes':>9}{'bits':>6}" + "".join(
        f"{stage:>10}{'difference':>12}{'s.e.':>8}" for stage in ("prequant", "quantized", "ttt")))
    for name, h in shapes.items():
        rows = [found[name, seed] for seed in seeds]
        line = table[name] = dict(weights=rows[0].weights, ms=cost_ms(h, base, *cost), steps=rows[0].steps,
                                  bytes=max(row.bytes for row in rows), bits=rows[0].bits)
        text = f"{name:24}{line['weights']:9,}{line['ms']:7.1f}{line['steps']:7}{line['bytes']:9,}{line['bits']:6.2f}"
        for stage in ("prequant", "quantized", "ttt"):
            mine, first = ([found[n, seed].nats[stage] for seed in seeds] for n in (name, next(iter(arms))))
            sizes = all_sizes[:len(mine[0])]
            bpb = np.mean(mine, 0).sum() / math.log(2) / sizes.sum()
            gap, error = compared(mine, first, sizes)
            line[stage] = dict(bpb=bpb, difference=gap, se=error)
            text += f"{bpb:10.5f}{gap:+12.5f}{error:8.5f}"
        print(text, flush=True)
    print("BENCH " + json.dumps(dict(scale=o.scale, budget=budget, documents=len(all_sizes), arms=table,
                                     cost_model=dict(tflops=cost[0], block_ms=cost[1], fixed_ms=cost[2], errors=errors))))


if __name__ == "__main__":
    main(sys.argv[1:])
