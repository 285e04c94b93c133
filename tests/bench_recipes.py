"""All recipes at one small size: equal width, depth, data, steps and seeds on this CPU; BPB by stage, bytes, seconds.

Relative figures: a recipe keeps its mechanisms and rates, not its size, vocabulary or budget, so that they say nothing
about its score on 8xH100. Data: docs_train.jsonl.zst and docs_val.jsonl.zst in BENCH_DATA (default ../shared/data), cut into
1024 pieces by a tokenizer trained on them, one for each text form; made once and kept in the temporary folder.
Run: python tests/bench_recipes.py [steps, default 200] [seeds, default 2] [recipes, joined by commas]
Last line: BENCH {"recipes": {name: {"bpb": {stage: x}, "artifact_bytes", "seconds", "compliant"}}}
"""
from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import train_gpt as tg

SHARED = Path(os.environ.get("BENCH_DATA", Path(tg.__file__).parent.parent / "shared" / "data"))
CACHE = Path(tempfile.gettempdir()) / "train_gpt_bench_recipes"
V, TRAIN_MEGABYTES, VAL_MEGABYTES = 1024, 8, 0.08
SIZE = dict(vocab_size=V, num_layers=4, model_dim=96, num_heads=4, num_kv_heads=2, rope_dims=16, train_seq_len=64,
            micro_batch_tokens=1024, train_batch_tokens=1024, max_wallclock_seconds=0.0, eval_seq_len=64, eval_stride=32,
            eval_batch_tokens=8192, ttt_chunk_tokens=8192, ttt_epochs=1, ttt_batch_seqs=32, val_loss_every=0,
            lr_warmup_steps=10, muon_momentum_warmup_steps=60, ema_decay=0.98, train_log_every=10_000,
            gptq_calibration_batches=8, rehearsal_steps=0, scores="prequant,quantized,sliding,ttt",
            compile="off")
HELD_OUT_TOKENS = 24576    # for the adaptation before GPTQ of some recipes
# Sizes that a recipe has only where its mechanism is on.
IF_ON = dict(train_seq_schedule="16@0.1,32@0.7,64@1", bigram_vocab_size=512)


def documents(name: str, megabytes: float) -> Path:
    """The first documents of a file of SHARED as .jsonl in the cache, up to so many megabytes of text."""
    path = CACHE / f"{name}_{megabytes}.jsonl"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        lines, size = [], 0
        for text in tg.read_documents([SHARED / f"{name}.jsonl.zst"]):
            if (size := size + len(text)) > megabytes * 1e6:
                break
            lines.append(json.dumps(dict(text=text)))
        path.write_text("\n".join(lines))
    return path


def shards(caseops: bool) -> Path:
    """The folder of shards in one of the two text forms, made where it is not there."""
    out = CACHE / f"sp{V}{'_caseops' * caseops}_{TRAIN_MEGABYTES}_{VAL_MEGABYTES}"
    if not out.exists():
        tg.make_dataset([str(documents("docs_train", TRAIN_MEGABYTES)), "--val", str(documents("docs_val", VAL_MEGABYTES)), "--vocab",
                         str(V), "--out", str(out), *["--caseops"] * caseops], lambda line: None)
    return out


def knobs_of(name: str, steps: int, seed: int, folder: Path) -> tg.Hyperparameters:
    """The recipe at the bench's size; warmdown and recurrence by steps keep their share of the steps."""
    h = tg.Hyperparameters.from_env(dict(RECIPE=f"{name},demo"))
    on = {n: v for n, v in IF_ON.items() if getattr(h, n)}
    on |= {n: max(1, round(share * steps)) for n, share in dict(warmdown_iters=0.5, recur_start_step=0.5).items() if getattr(h, n)}
    size = dict(SIZE, rope_dims=min(h.rope_dims, 24), ema_decay=h.ema_decay and SIZE["ema_decay"])
    return tg.replace(h, **size | on, iterations=steps, seed=seed, run_id=f"{name}-{seed}-{time.time_ns()}",
                      data_path=str(shards(h.caseops_enabled)), logs_dir=str(folder), short_val_allowed=True)


def run(name: str, steps: int, seed: int) -> dict:
    """The result of one run; its folder is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        h, world = knobs_of(name, steps, seed, Path(folder)), tg.World()
        log = tg.Log(world, quiet=True)
        log.claim(Path(folder) / h.run_id)
        data = tg.find_dataset(h, world, log)
        return tg.run(h, world, log, data, 0.0)


def row(results: list[dict]) -> dict:
    """Mean BPB by stage over the seeds, their spread, bytes and seconds."""
    stages = results[0]["scores"]
    bpb = {s: [r["scores"][s]["val_bpb"] for r in results] for s in stages}
    return dict(bpb={s: round(statistics.mean(x), 5) for s, x in bpb.items()},
                spread={s: round(max(x) - min(x), 5) for s, x in bpb.items()},
                artifact_bytes=round(statistics.mean(r["bytes"]["model"] for r in results)),
                seconds=round(statistics.mean(r["seconds"]["total"] for r in results), 1),
                compliant=results[0]["compliant"])


def main() -> None:
    """Runs all, prints the table and the BENCH line."""
    asked = sys.argv[1:4]
    steps, seeds = (int(a) for a in asked[:2] + ["200", "2"][len(asked):])
    names = asked[2].split(",") if len(asked) > 2 else [n for n in tg.RECIPES if n not in ("demo", "sp1024", "sp8192", "prequant")]
    tg.HELD_OUT_TOKENS = HELD_OUT_TOKENS
    tg.running_source = lambda path, h: (None, b"")    # the seconds of packing the script are not the recipe's
    begin_s, table = time.perf_counter(), {}
    print(f"machine: {tg.device_name(torch.device('cpu'))}, torch {torch.__version__}; {steps} steps of "
          f"{SIZE['train_batch_tokens']} tokens, seeds 0 to {seeds - 1}, {SIZE['num_layers']} layers of {SIZE['model_dim']}, V={V}")
    print(f"{'recipe':14} {'prequant':>9} {'quantized':>9} {'sliding':>9} {'ttt':>9} {'spread':>7} {'bytes':>9} {'s':>6} legal")
    for name in names:
        table[name] = r = row([run(name, steps, seed) for seed in range(seeds)])
        stages = " ".join(f"{r['bpb'][s]:9.4f}" if s in r["bpb"] else f"{'-':>9}" for s in ("prequant", "quantized", "sliding", "ttt"))
        print(f"{name:14} {stages} {max(r['spread'].values()):7.4f} {r['artifact_bytes']:9d} {r['seconds']:6.1f} "
              f"{'yes' if r['compliant'] else 'no: C3'}", flush=True)
    print(f"{time.perf_counter() - begin_s:.0f} s in all; BPB of one text form compare, CaseOps rows count the same bytes")
    print("BENCH " + json.dumps(dict(recipes=table)))


if __name__ == "__main__":
    main()
