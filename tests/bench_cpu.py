"""Training speed on a CPU: our step as users run it beside the plain fp32 eager step, in one process.

Shape: 6 layers of width 256, 4/2 heads, MLP 4x, V=1024, sequences of 512, 16,384 tokens a step, layers 2-3 looped once,
on the embedded corpus. Prints medians, the loss of both number formats over equal steps, and one line BENCH {json}.
Run: python tests/bench_cpu.py [timed steps, default 10] [steps of the loss check, default 50]
"""
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import train_gpt as tg

SHAPE = dict(RECIPE="demo", TRAIN_SEQ_LEN="512", EVAL_SEQ_LEN="512", TRAIN_BATCH_TOKENS="16384",
             MICRO_BATCH_TOKENS="16384", TTT_CHUNK_TOKENS="8192", NUM_LAYERS="6", XSA_LAST_N="6", LOOP_START="2", LOOP_END="3",
             PARALLEL_START_LAYER="6", CORPUS="embedded",
             MAX_WALLCLOCK_SECONDS="0", ITERATIONS="1000", GRAD_CLIP_NORM="1")


def trainer(precision: str, mode: str, cache: str) -> tg.Trainer:
    """A trainer of the bench's shape in one number format and compile mode, at step zero."""
    h = tg.Hyperparameters.from_env(SHAPE | dict(PRECISION=precision, DATA_DIR=cache))
    world = tg.World()
    data = tg.find_dataset(h, world, lambda line: None)
    model = tg.build_model(h, world)
    model.compile(mode)
    return tg.Trainer(h, world, model, data)


def step_seconds(t: tg.Trainer, steps: int) -> float:
    """Median seconds of a step after two that warm up."""
    seconds = []
    for number in range(steps + 2):
        begin = time.perf_counter()
        t.step(number, 0.0, looped=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def losses(t: tg.Trainer, steps: int) -> list[float]:
    """Loss of each of so many steps."""
    return [float(t.step(number, 0.5 * number / steps, looped=True)) for number in range(steps)]


def main() -> None:
    """Measures, prints the table and the BENCH line."""
    timed, checked = (int(a) for a in [*sys.argv[1:], "10", "50"][:2])
    tg.tune_process(torch.device("cpu"))
    cache = str(Path(tempfile.gettempdir()) / "train_gpt_bench")
    fast_mode = tg.compile_mode(tg.Hyperparameters(), torch.device("cpu"), print)
    rows = {}
    for name, precision, mode in (("auto", "auto", fast_mode), ("fp32 eager", "fp32", "off")):
        t = trainer(precision, mode, cache)
        rows[name] = (t.h.train_batch_tokens / step_seconds(t, timed if name == "auto" else 3), t.model.dtype, mode)
    print(f"machine: {tg.device_name(torch.device('cpu'))}, torch {torch.__version__}")
    for name, (speed, dtype, mode) in rows.items():
        print(f"{name:12} {str(dtype)[6:]:9} compile:{mode:6} {speed:10.0f} tokens/s  {speed / rows['fp32 eager'][0]:.2f}x")
    gap = 0.0
    if checked:
        pair = [losses(trainer(precision, fast_mode, cache), checked) for precision in ("fp32", "auto")]
        gap = max(abs(a - b) for a, b in zip(*pair))
        print(f"loss after {checked} steps: fp32 {pair[0][-1]:.4f}, auto {pair[1][-1]:.4f}; largest gap {gap:.4f} nats")
    print("BENCH " + json.dumps(dict(tokens_per_second=round(rows["auto"][0], 1),
                                     fp32_eager_tokens_per_second=round(rows["fp32 eager"][0], 1),
                                     ratio=round(rows["auto"][0] / rows["fp32 eager"][0], 3), largest_loss_gap=round(gap, 4))))


if __name__ == "__main__":
    main()
