"""The GPU side of a run in one table: training, time split, kernels, attention, Muon, export, scoring, equal losses.

Made for one H100 or H200: record recipe, micro-batches of 98,304 tokens, shards of random tokens (V = 8192) in a
temporary folder. Without CUDA everything is tiny (--small): that checks this file and measures nothing.
Run: python tests/bench_gpu.py [--small] [--beside OTHER.py] [SECTION | KNOB=VALUE ...]     or the same under torchrun; last line:
BENCH {json}. Real text: DATA_PATH=FOLDER and, without byte counts beside its shards, TOKENIZER_PATH=MODEL (also
CASEOPS_ENABLED, VOCAB_SIZE); of the validation shards as many tokens are scored as random ones would be.

FLOPs of training: per token 6 x (matrix weights of all executed steps + V D) + 12 H E x mean keys a token sees, by
documents (each of QK^T and PV is 2 H E per key, forward once, backward twice). Peak: 989e12 dense bf16 FLOP/s of H100
and H200; 3.35e12 and 4.8e12 B/s of memory; `null` elsewhere. A floor is max(FLOPs / peak, bytes / bandwidth), bytes
being each operand read or written once per product. Times are medians, between CUDA events; a first call is not timed.
A section that fails prints its error and is null in the JSON.

--beside measures another script last, after ours has left the GPUs; beside.py says how.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import train_gpt as tg
from beside import measured

PEAK, BANDWIDTH = dict(H100=989e12, H200=989e12), dict(H100=3.35e12, H200=4.8e12)
VALIDATION_TOKENS, GPUS, DOCUMENT = 40_500_000, 8, 800    # of the challenge; mean tokens of a made-up document
SMALL = dict(NUM_LAYERS="4", MODEL_DIM="32", NUM_HEADS="4", NUM_KV_HEADS="2", MLP_MULT="2", ROPE_DIMS="4", XSA_LAST_N="3",
             LOOP_START="1", LOOP_END="2", PARALLEL_START_LAYER="3", TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="1024",
             MICRO_BATCH_TOKENS="512", EVAL_SEQ_LEN="64", EVAL_BATCH_TOKENS="1024", TTT_CHUNK_TOKENS="512",
             VOCAB_SIZE="256", COMPILE="off", PRECISION="fp32", GPTQ_CALIBRATION_BATCHES="2", ROUNDING_STEPS="2",
             TTT_LORA_RANK="2", EVAL_STRIDE="16")
TEXT = ("DATA_PATH", "TOKENIZER_PATH", "CASEOPS_ENABLED", "VOCAB_SIZE")    # knobs that are taken from the environment


class Marks:
    """Milliseconds of the phases of a stretch of work, on the device's own clock where it is a GPU."""

    def __init__(self, device: torch.device):
        """Starts with nothing."""
        self.cuda, self.marks = device.type == "cuda", []

    def __call__(self, name: str) -> None:
        """Ends a phase here, which began at the mark before."""
        mark: Any = time.perf_counter()
        if self.cuda:
            (mark := torch.cuda.Event(enable_timing=True)).record()
        self.marks.append((name, mark))

    def ms(self) -> dict[str, float]:
        """Sum of each phase."""
        if self.cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self.marks, self.marks[1:]):
            sums[name] = sums.get(name, 0.0) + (begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin))
        return sums


class MarkedWorld(tg.World):
    """A world whose collectives are a phase of their own."""
    marks: Any = staticmethod(lambda name: None)

    def together(self, *arguments: Any, **options: Any) -> None:
        """Runs a collective between two marks."""
        self.marks("optimiser")
        super().together(*arguments, **options)
        self.marks("collectives")


@dataclass
class Bench:
    """What the sections share."""

    h: tg.Hyperparameters
    world: tg.World
    data: tg.Dataset
    small: bool
    trainer: tg.Trainer
    peak: float | None    # FLOP/s
    bandwidth: float | None    # B/s

    def ms(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """Median milliseconds of `work` after two calls that warm up."""
        found = []
        for _ in range(2 + (2 if self.small else repeats)):
            marks = Marks(self.world.device)
            marks("begin")
            work()
            marks("end")
            found.append(marks.ms()["end"])
        return statistics.median(found[2:])

    def floor_ms(self, flops: float, size_bytes: float) -> float | None:
        """The least time that this chip needs."""
        return 1e3 * max(flops / self.peak, size_bytes / self.bandwidth) if self.peak else None

    def say(self, line: str) -> None:
        """A line of the table, from rank 0."""
        if self.world.main:
            print(line, flush=True)


def made_shards(folder: Path, h: tg.Hyperparameters, train: int, val: int) -> Path:
    """Random tokens with documents of DOCUMENT tokens on average; byte counts of 1 to 5."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (side, count) in enumerate((("train", train), ("val", val))):
        rng = np.random.default_rng(number)
        tokens = rng.integers(2, h.vocab_size, count).astype(np.uint16)
        tokens[rng.random(count) < 1 / DOCUMENT] = tokens[0] = tg.BOS
        tg.write_shard(folder / f"fineweb_{side}_000000.bin", tokens)
    tg.write_shard(folder / "fineweb_val_bytes_000000.bin", np.where(tokens == tg.BOS, 0, 1 + tokens % 5))
    return folder


def shortened(data: tg.Dataset, count: int) -> tg.Dataset:
    """The data with the first `count` targets of its validation set."""
    return data._replace(val=tg.Validation.of(data.val.tokens[:count + 1].numpy(), data.val.bytes[:count]))


def made_trainer(h: tg.Hyperparameters, world: tg.World, data: tg.Dataset, mode: str) -> tg.Trainer:
    """A trainer at step zero, compiled as a run is."""
    model = tg.build_model(h, world)
    model.compile(mode)
    return tg.Trainer(h, world, model, data)


def token_flops(h: tg.Hyperparameters, looped: bool, keys: float) -> float:
    """FLOPs of training on one token; the formula is in the file's docstring."""
    table = tg.roles(h)
    layer = sum(math.prod(table[n].shape[1:]) for n in ("wq", "wk", "wv", "wo", "w_up", "w_down"))
    plan = tg.depth_plan(h, looped)
    return 6 * (len(plan) * layer + h.vocab_size * h.model_dim) + 12 * h.model_dim * keys * len(plan)


# --------------------------------------------------------------------------------------------------------- sections
def training(b: Bench) -> dict[str, Any]:
    """Tokens/s over all ranks, share of peak and memory, before and after recurrence."""
    batch, rows = b.trainer.loader.next(), {}
    place = torch.arange(batch.ids.size(1), device=batch.ids.device)
    keys = float((place - batch.docs.start + 1).float().mean())
    for name, looped in (("before", False), ("after", True)):
        if b.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(b.world.device)
        steps = 1 if b.small else 4    # queued without a wait between them, as in a run
        ms = b.ms(lambda: [b.trainer.step(0, 0.0, looped) for _ in range(steps)], 3) / steps
        speed = 1e3 * b.h.train_batch_tokens / ms
        share = speed / b.world.size * token_flops(b.h, looped, keys) / b.peak if b.peak else None
        memory = torch.cuda.max_memory_allocated(b.world.device) if b.world.device.type == "cuda" else None
        rows[name] = dict(step_ms=ms, tokens_per_second=speed, share_of_peak=share, peak_memory_bytes=memory)
    return rows | dict(mean_keys=keys)


def split(b: Bench) -> dict[str, Any]:
    """Milliseconds of one step by phase; `data` is the wait for a batch, `host` the time that Python needs to queue it."""
    t, rows = b.trainer, {}
    for name, looped in (("before", False), ("after", True)):
        plan, found = tg.depth_plan(b.h, looped), []
        for _ in range(3 if b.small else 7):
            marks, begin_s = Marks(b.world.device), time.perf_counter()
            object.__setattr__(b.world, "marks", marks)    # World is frozen
            marks("begin")
            for _ in range(tg.accumulation(t.h, t.world)):
                batch = t.loader.next()
                marks("data")
                loss = t.model.run_nats(batch.ids, batch.targets, plan, batch.docs).mean() / tg.accumulation(t.h, t.world)
                marks("forward")
                loss.backward()
                marks("backward")
            t.optimiser.step(0.0, 0.95)
            marks("optimiser")
            t.ema.update(b.h.ema_decay)
            marks("average")
            host_ms = 1e3 * (time.perf_counter() - begin_s)
            found.append(dict(collectives=0.0) | marks.ms() | dict(host=host_ms))
        object.__setattr__(b.world, "marks", lambda name: None)
        rows[name] = {phase: statistics.median(f[phase] for f in found[1:]) for phase in found[0]}
    return rows


def kernels(b: Bench) -> dict[str, Any]:
    """Each fused kernel, its plain twin, that twin compiled, and the floor; null where the kernels do not run."""
    N, D, F, V = (256, b.h.model_dim, int(b.h.mlp_mult * b.h.model_dim), b.h.vocab_size) if b.small else (98_304, 512, 2048, 8192)
    trouble = tg.kernels_trouble()
    draw = lambda *shape: torch.randn(shape, device=b.world.device, dtype=torch.bfloat16).mul_(0.1).requires_grad_()
    x, up, down, targets = draw(N, D), draw(F, D), draw(D, F), torch.randint(V, (N, ), device=b.world.device)
    z = draw(N, V)
    compiled = functools.partial(torch.compile, dynamic=False, backend="eager" if b.small else "inductor")
    mlp = lambda fused: tg.mlp(x, up, down, 0.5, fused=fused)
    nats = lambda fused: tg.softcapped_nats(z, targets, 30.0, fused)
    # (work, inputs of its gradient, FLOPs, numbers moved) forward, then forward + backward
    cases = dict(mlp=(mlp, (x, up, down), (4 * N * D * F, 12 * N * D * F), (2 * N * D + 3 * N * F, 6 * N * D + 9 * N * F)),
                 nats=(nats, (z, ), (0, 0), (N * V, 3 * N * V)))
    rows: dict[str, Any] = dict(trouble=trouble)
    for name, (work, inputs, flops, numbers) in cases.items():
        forms: dict[str, list[float] | None] = dict(fused=None)
        for form, call in (("fused", lambda: work(True)), ("plain", lambda: work(False)),
                           ("compiled", compiled(lambda: work(False)))):
            if form == "fused" and trouble:
                continue
            slope = torch.ones_like(call().detach())
            both = lambda: torch.autograd.grad(call(), inputs, slope)
            forms[form] = [b.ms(call), b.ms(both)]
        for i, direction in enumerate(("forward", "backward")):
            taken = lambda values: None if values is None else values[i] - (values[0] if i else 0.0)
            rows[f"{name}_{direction}"] = {f"{form}_ms": taken(times) for form, times in forms.items()} | dict(
                floor_ms=b.floor_ms(flops[i] - (flops[0] if i else 0), 2 * (numbers[i] - (numbers[0] if i else 0))))
    return rows


def attention(b: Bench) -> dict[str, Any]:
    """Every backend here at two lengths: forward, forward + backward, largest error against fp32 blocks. `blocks` keeps
    its exponentials, so that it gets fewer rows."""
    cuda, H, K, E = b.world.device.type == "cuda", b.h.num_heads, b.h.num_kv_heads, b.h.head_dim
    hopper = cuda and torch.cuda.get_device_capability()[0] == 9
    found = dict(fa3=tg.flash_attn_3 and hopper, fa2=tg.flash_attn_2 and cuda, varlen=tg.torch_varlen and cuda,
                 sdpa=True, blocks=True)
    rows: dict[str, Any] = dict(chosen=tg.attention_kernel(b.h, b.world.device))
    for T in ((64, 96) if b.small else (2048, 3072)):
        for kernel in (name for name, there in found.items() if there):
            B = 2 if b.small or kernel == "blocks" else 98_304 // T
            q, k, v = (torch.randn(B, T, heads, E, device=b.world.device, dtype=torch.bfloat16, requires_grad=True)
                       for heads in (H, K, K))
            docs = tg.whole_rows(torch.zeros(B, T, dtype=torch.long, device=b.world.device))
            call = lambda: tg.attend(q, k, v, docs, kernel)
            slope = torch.ones_like(q)
            both = lambda: torch.autograd.grad(call(), (q, k, v), slope)
            try:
                exact = tg.attend(*(t[:1].detach().float() for t in (q, k, v)), tg.whole_rows(docs.start[:1]))
                error = float((call()[:1].float() - exact).abs().max().detach())
                forward_ms, both_ms = b.ms(call), b.ms(both)
            except Exception as failure:    # whatever a foreign kernel may raise; the others go on
                b.say(f"attention {kernel} {T}: {tg.brief(failure)}")
                rows[f"{kernel}_{T}"] = None
                continue
            flops = 2 * B * T * (T + 1) * H * E    # backward: five products for the forward's two
            rows[f"{kernel}_{T}"] = dict(tokens=B * T, forward_ms=forward_ms, both_ms=both_ms, largest_error=error,
                                         share_of_peak=1e3 * 3.5 * flops / both_ms / b.peak if b.peak else None)
    return rows


def muon(b: Bench) -> dict[str, Any]:
    """Milliseconds of `Optimiser.step` on this rank's share, and the floor of Muon's products."""
    model, h, flops = b.trainer.model, b.h, 0
    grads = [torch.randn_like(p) for p in model.bank.values()]
    optimiser = tg.Optimiser(model, b.world)

    def step() -> None:
        """One update at rate zero."""
        for p, g in zip(model.bank.values(), grads):
            p.grad = g
        optimiser.step(0.0, 0.95)

    for momentum in (s.momentum for s in b.trainer.optimiser.stacks):
        n, k, r = momentum.shape
        flops += h.muon_backend_steps * 2 * n * (2 * r * r * k + r**3)
    return dict(step_ms=b.ms(step), floor_ms=b.floor_ms(flops, 20 * sum(g.numel() for g in grads)))


def stages(world: tg.World) -> tuple[dict[str, Any], Callable[[str, Any], Any]]:
    """A table, and what books in it, as NAME_s, this rank's seconds since the stage before and passes on what this one gave."""
    seconds, begin_s = {}, time.perf_counter()

    def booked(name: str, value: Any) -> Any:
        """Books the seconds since the last stage, once every rank's device is done."""
        nonlocal begin_s
        world.wait()
        seconds[name + "_s"], begin_s = time.perf_counter() - begin_s, time.perf_counter()
        return value

    return seconds, booked


def export(b: Bench) -> dict[str, Any]:
    """Seconds of each stage from the averaged weights to the artifact and back."""
    model, world, h, log = b.trainer.model, b.world, b.h, tg.Log(b.world, quiet=True)
    seconds, booked = stages(world)
    with model.eager():
        text = booked("written", tg.written(model, world))
        rows, inputs = booked("curvature", tg.curvature(model, world, text))
    found = tg.Curvature(rows, booked("factors", {tap: tg.inverse_factor(H, h.gptq_damping) for tap, H in inputs.items()}), text)
    stored = booked("gptq", tg.quantise(model, found))
    booked("pack", tg.pack(h, stored))
    blob = booked("round_in_turn", tg.round_in_turn(model, found, 32_768, world, log)).blob    # GPTQ and packing 2 to 8 times
    booked("unpack", tg.unpack(blob))
    return seconds | dict(parameters=sum(p.numel() for p in model.parameters()), artifact_bytes=len(blob),
                          whole_s=sum(seconds[f"{n}_s"] for n in ("written", "curvature", "factors", "round_in_turn")))


def scoring(b: Bench) -> dict[str, Any]:
    """Tokens/s over all ranks of each score, and seconds that the whole validation set would take on 8 such GPUs."""
    rows, log, fake = {}, tg.Log(b.world, quiet=True), tg.rehearsal_text(b.h, b.data, b.data.val.documents, b.world)
    for name in ("quantized", "sliding", "stream", "ttt"):
        tg.score_by_name(name, b.trainer.model, fake, b.world, log)    # compiles
        found, _ = tg.score_by_name(name, b.trainer.model, b.data.val, b.world, log)
        speed = found["tokens"] / max(found["seconds"], 1e-3)
        rows[name] = dict(tokens_per_second=speed,
                          full_set_8_gpus_s=VALIDATION_TOKENS / speed * b.world.size / GPUS)
    return rows


def losses(b: Bench) -> dict[str, Any]:
    """Loss after equal steps on equal data, with the fused kernels and without."""
    steps, ends, h = 4 if b.small else 100, {}, b.h
    h = replace(h, train_batch_tokens=h.micro_batch_tokens * b.world.size)
    for form, fused in (("fused", True), ("plain", False)):
        t = made_trainer(replace(h, fused_kernels=fused), b.world, b.data, "off" if b.small else "full")
        found = [b.world.mean(t.step(n, 0.5 * n / steps, looped=2 * n >= steps)) for n in range(steps)]
        ends[form], t = float(torch.stack(found[-10:]).mean()), None
    return dict(steps=steps, fused_ran=not tg.kernels_trouble(), **ends, difference=ends["fused"] - ends["plain"])


def beside(b: Bench, peer: Path, limit_s: float, ours: Mapping | None) -> dict[str, Any] | None:
    """Tokens/s of another script over as many GPUs before and after recurrence, ratio ours / theirs, its peak memory;
    null for whatever its log did not tell."""
    begin_s = time.monotonic()
    found, trouble = measured(b.h, b.world.size, peer, limit_s)
    kernel = "fa3" if tg.flash_attn_3 else tg.attention_kernel(b.h, b.world.device)
    rows: dict[str, Any] = dict(script=str(peer), seconds=time.monotonic() - begin_s, attention=kernel,
                                peak_memory_bytes=found.peak_bytes)
    for name, looped in (("before", False), ("after", True)):
        speed = found.speed(looped)
        rows[name] = speed and dict(tokens_per_second=speed, ratio=ours and ours[name]["tokens_per_second"] / speed)
    if trouble:
        b.say(f"beside: {peer} {trouble}")
    return rows if rows["before"] or rows["after"] else None


SECTIONS = dict(training=training, split=split, kernels=kernels, attention=attention, muon=muon, export=export,
                scoring=scoring, losses=losses)


def lines(place: str, value: Any) -> list[str]:
    """A nested result as lines `place value`, dictionaries of numbers in one line."""
    if isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values()):
        return [line for name, v in value.items() for line in lines(f"{place} {name}", v)]
    text = lambda v: f"{v:,.4g}" if isinstance(v, float) and abs(v) < 1e4 else f"{v:,.0f}" if isinstance(v, float) else v
    if isinstance(value, Mapping):
        return [f"{place:28} " + "  ".join(f"{n}:{text(v)}" for n, v in value.items())]
    return [f"{place:28} {text(value)}"]


def measure(b: Bench, wanted: Mapping[str, Callable]) -> dict[str, Any]:
    """The results of all sections; null for those that were not asked for or failed."""
    results: dict[str, Any] = dict.fromkeys(SECTIONS)
    for name, section in wanted.items():
        try:
            results[name] = section(b)
            b.say("\n".join(lines(name, results[name])))
        except Exception as error:    # one broken section shall not cost the lent device's time
            b.say(f"{name}: failed ({type(error).__name__}: {tg.brief(error)})")
        if b.world.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def arguments() -> argparse.Namespace:
    """The command line; exits where a section or script that it names does not exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, as without CUDA")
    parser.add_argument("--beside", type=Path, metavar="OTHER.py", help="a script to measure beside ours")
    parser.add_argument("--limit", type=float, default=480.0, metavar="SECONDS", help="of that script (480)")
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=f"{' '.join(SECTIONS)}; or KNOB=VALUE, a change to the record")
    given = parser.parse_args()
    given.knobs = dict(word.split("=", 1) for word in given.sections if "=" in word)
    given.sections = [word for word in given.sections if "=" not in word]
    if unknown := set(given.sections) - set(SECTIONS):
        sys.exit(f"unknown: {unknown}; sections are {' '.join(SECTIONS)}")
    if given.beside and not given.beside.is_file():
        sys.exit(f"--beside {given.beside}: there is no such file")
    return given


def main() -> None:
    """Measures, prints the table and the BENCH line."""
    given, world = arguments(), MarkedWorld.from_env(os.environ)
    small = given.small or world.device.type != "cuda"
    wanted = {n: s for n, s in SECTIONS.items() if n in given.sections or not given.sections}
    tg.tune_process(world.device)
    with tempfile.TemporaryDirectory() as own, contextlib.ExitStack() as last:
        last.callback(world.leave)
        folder, sizes = Path(world.share(own)), (20_000, 2_000) if small else (16_000_000, 1_000_000)
        text = {n: os.environ[n] for n in TEXT if n in os.environ} if os.environ.get("DATA_PATH") else {}
        knobs = dict(RECIPE="record", MAX_WALLCLOCK_SECONDS="0", DATA_PATH=str(folder), **(SMALL if small else {}))
        h = tg.Hyperparameters.from_env(knobs | given.knobs | text | (dict(SHORT_VAL_ALLOWED="1") if text else {}))
        if world.main and not text:
            made_shards(folder, h, *sizes)
        world.wait()
        data = shortened(tg.find_dataset(h, world, lambda line: None), sizes[1])
        name = tg.device_name(world.device)
        chip = next((c for c in PEAK if c in name), "")
        b = Bench(h, world, data, small, made_trainer(h, world, data, "off" if small else "full"), PEAK.get(chip),
                  BANDWIDTH.get(chip))
        head = dict(machine=name, ranks=world.size, torch=torch.__version__, small=small, knobs=tg.run_block(given.knobs), peak_flops=b.peak,
                    fused_kernels=b.trainer.model.h.fused_kernels, data=text.get("DATA_PATH", "random tokens"),
                    train_batch_tokens=h.train_batch_tokens, micro_batch_tokens=h.micro_batch_tokens)
        b.say("\n".join(lines("machine", head)))
        results = head | measure(b, wanted)
        if given.beside:
            b.trainer = None    # the other script gets the whole GPU
            torch.compiler.reset()
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
            world.leave()    # the other ranks end here: waiting for this one would keep their GPUs busy
            section = lambda b: beside(b, given.beside, given.limit, results["training"])
            results["beside"] = measure(b, dict(beside=section)).get("beside") if world.main else None
        b.say("BENCH " + json.dumps(results))


if __name__ == "__main__":
    main()
