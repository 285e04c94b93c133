"""Another training script beside ours, for `bench_gpu.py --beside`: how fast does it train on these shards and GPUs?

The script runs in processes of its own with the same shards, batch and number of GPUs: 40 steps, recurrence from step
20 on, settings of the record of PR #1855. Its tokens/s are medians over stretches of four steps of one phase in its own
log, so that compilation is left out; it is killed once three stretches after recurrence are known. Run as a script,
this file is the beginning of such a process: it answers FlashAttention 3 where that is not installed, and tells the
peak memory as it goes.
"""
from __future__ import annotations

import collections
import contextlib
import math
import os
import re
import runpy
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor

import train_gpt as tg

STEPS, STRETCH, STRETCHES = 40, 4, 3    # in all; between two lines of its log; that suffice after recurrence
# What a training step feels of #1855's record. One step of warm-up, which compiles; no clock, no scores.
SETTINGS = dict(ITERATIONS=STEPS, ENABLE_LOOPING_AT=0.5, TRAIN_LOG_EVERY=STRETCH, WARMUP_STEPS=1, VAL_LOSS_EVERY=0,
                MAX_WALLCLOCK_SECONDS=0, TTT_ENABLED=0, SPARSE_ATTN_GATE_ENABLED=1, SPARSE_ATTN_GATE_SCALE=0.5,
                GATE_WINDOW=12, SMEAR_GATE_ENABLED=1, FUSED_CE_ENABLED=1, MUON_BACKEND_STEPS=5, GRAD_CLIP_NORM=0.3,
                BETA2=0.99)
STEP_LINE = re.compile(r"\b(\d+)/\d+\s.*?train_time:\s*([\d.]+)\s*(ms|s|m)\b(?:.*?tok/s:\s*([\d.]+))?")
LOOP_LINE = re.compile(r"(?:layer_loop:enabled|recurrence:on)\s+step:\s*(\d+)")
MEMORY_LINE = re.compile(r"peak memory(?: allocated)?:\s*(\d+)\s*MiB")


@dataclass
class Readings:
    """What the log of a script has told so far."""

    batch_tokens: int
    marks: list[tuple[int, float]] = field(default_factory=list)    # steps done, seconds of training
    loop: float = math.inf    # steps before recurrence
    peak_bytes: int | None = None

    def read(self, line: str) -> None:
        """Takes from a line what it knows."""
        if found := LOOP_LINE.search(line):
            self.loop = int(found[1])
        if found := MEMORY_LINE.search(line):
            self.peak_bytes = max(self.peak_bytes or 0, int(found[1]) << 20)
        if found := STEP_LINE.search(line):
            step, speed = int(found[1]), float(found[4] or 0)
            seconds = float(found[2]) * dict(ms=1e-3, s=1.0, m=60.0)[found[3]]
            if found[3] == "m":    # too coarse: a tenth of a minute; the mean speed tells it exactly
                rough_s, seconds = seconds, step * self.batch_tokens / speed if speed else math.inf
                if abs(rough_s - seconds) > 4:    # that speed is no mean
                    return
            self.marks.append((step, seconds))

    def speeds(self, looped: bool) -> list[float]:
        """Tokens/s of each stretch of a phase; the first with recurrence is left out, since it may compile."""
        return [self.batch_tokens * (step - before) / (end - begin)
                for (before, begin), (step, end) in zip(self.marks, self.marks[1:])
                if step - before >= STRETCH and end > begin
                and (before > self.loop if looped else step <= self.loop)]

    def speed(self, looped: bool) -> float | None:
        """The median of them; None where there is none."""
        return statistics.median(speeds) if (speeds := self.speeds(looped)) else None


def made_tokenizer(path: Path, V: int) -> Path:
    """Writes a SentencePiece model of V pieces: where byte counts lie beside the shards, only its size matters."""
    texts, raw = ["<unk>", "\u2581", *(f"piece{i}" for i in range(V - 2))], b""
    for kind, text in zip([2] + (V - 1) * [1], map(str.encode, texts)):    # 2: unknown, 1: normal
        raw += bytes([10, len(text) + 9, 10, len(text)]) + text + struct.pack("<BfBB", 21, 0.0, 24, kind)
    path.write_bytes(raw)
    return path


def environment(h: tg.Hyperparameters, folder: Path) -> dict[str, str]:
    """This process's environment with the script's settings in the place of our knobs and of torchrun's variables."""
    ours = {name.upper() for name in tg.Hyperparameters.__dataclass_fields__}
    env = {n: v for n, v in os.environ.items()
           if n not in ours and not re.search("RANK$|WORLD_SIZE$|^ROLE_|^MASTER_|^TORCHELASTIC_", n)}
    data = Path(h.data_path).absolute()
    if counted := any(data.glob("fineweb_val_bytes_*.bin")):    # the form named CaseOps, which reads them
        tokenizer = made_tokenizer(folder / "pieces.model", h.vocab_size)
    else:
        tokenizer = Path(h.tokenizer_path or Path(h.data_dir) / "tokenizers" / f"fineweb_{h.vocab_size}_bpe.model")
    settings = SETTINGS | dict(DATA_PATH=data, TOKENIZER_PATH=tokenizer.absolute(), CASEOPS_ENABLED=int(counted),
                               VOCAB_SIZE=h.vocab_size, TRAIN_SEQ_LEN=h.train_seq_len, PYTHONUNBUFFERED=1,
                               TRAIN_BATCH_TOKENS=h.train_batch_tokens, MICRO_BATCH_TOKENS=h.micro_batch_tokens)
    return env | {name: str(value) for name, value in settings.items()}


def follow(process: subprocess.Popen, limit_s: float) -> Iterator[str]:
    """The lines that a process prints until it ends or its time is over, whoever else still holds the pipe."""
    end_s, rest = time.monotonic() + limit_s, b""
    while time.monotonic() < end_s:
        ended = process.poll() is not None
        ready = select.select([process.stdout], [], [], 0.0 if ended else 0.5)[0]
        fresh = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if ended and not fresh:
            break
        if ready and not fresh:    # it closed its output and still runs
            time.sleep(0.1)
        *whole, rest = (rest + fresh).split(b"\n")
        yield from (line.decode(errors="replace").rstrip() for line in whole)
    yield rest.decode(errors="replace")


def kill_tree(process: subprocess.Popen) -> None:
    """Kills a process and all that descend from it; torchrun and compilers give theirs sessions of their own."""
    parents, found = {}, [process.pid] if process.poll() is None else []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):    # that one ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for one in found:    # which grows as it goes
        found += [child for child, parent in parents.items() if parent == one]
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def measured(h: tg.Hyperparameters, gpus: int, script: Path, limit_s: float) -> tuple[Readings, str]:
    """What a script's log tells until it suffices, the script ends or `limit_s` are over; and what went wrong, with its
    last lines."""
    found, tail, begin_s = Readings(h.train_batch_tokens), collections.deque(maxlen=12), time.monotonic()
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen([sys.executable, *ranks, str(Path(__file__).resolve()), str(script.resolve())],
                                   cwd=folder, env=environment(h, Path(folder)), bufsize=0, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            for line in follow(process, limit_s):
                found.read(line)
                tail.extend([line[:300]] if line.strip() else [])
                if len(found.speeds(True)) >= STRETCHES:
                    break
            ended, seconds = process.poll(), time.monotonic() - begin_s
        finally:
            kill_tree(process)
    missing = [name for name, looped in (("before", False), ("after", True)) if found.speed(looped) is None]
    if not missing:
        return found, ""
    how = "was killed" if ended is None else f"ended by itself, exit status {ended},"
    unknown = " and ".join(missing)
    return found, "\n    ".join(
        [f"{how} after {seconds:.0f} s; its speed {unknown} recurrence is not known; its last lines:", *tail])


# ------------------------------------------------------------------------------------------- inside the other's process
def stand_ins(device: torch.device) -> dict[str, Callable]:
    """FlashAttention 3's two functions for training by the kernel that train_gpt picks on this device; causal only."""
    kernel = tg.attention_kernel(tg.Hyperparameters(precision="bf16"), device)

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                               max_seqlen_q: int, max_seqlen_k: int, *, causal: bool = False,
                               window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        """(tokens, H | K, E) -> (tokens, H, E); the ends may be padded by repeating the last."""
        if not causal or tuple(window_size) != (-1, -1):
            raise NotImplementedError("the stand-in for FlashAttention 3 is causal and has no window")
        start = None
        if kernel in ("blocks", "sdpa"):    # which take where each token's piece starts, the others the ends
            place = torch.arange(q.size(0), device=q.device)
            start = cu_seqlens_q[torch.searchsorted(cu_seqlens_q, place, right=True) - 1].long()[None]
        return tg.attend(q[None], k[None], v[None], tg.Docs(start, cu_seqlens_q, max_seqlen_q), kernel)[0]

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """(B, T, H | K, E) -> (B, T, H, E)."""
        if not causal:
            raise NotImplementedError("the stand-in for FlashAttention 3 is causal")
        rows = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
        return tg.attend(q, k, v, tg.whole_rows(rows), kernel)

    return dict(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def outside_autocast(norm: Callable) -> Callable:
    """The norm in its input's type: since torch 2.12 autocast makes it fp32, unknown to scripts that are older."""

    def rms_norm(*inputs: Any, **options: Any) -> Tensor:
        """As torch.nn.functional.rms_norm."""
        with torch.autocast("cuda", enabled=False):
            return norm(*inputs, **options)

    return rms_norm


def tell_memory() -> None:
    """Prints the peak of allocated GPU memory whenever it has grown."""
    told = 0
    while True:
        time.sleep(0.5)
        peak = torch.cuda.max_memory_allocated(0) >> 20 if torch.cuda.is_initialized() else 0
        if peak > told:
            told = peak
            os.write(1, f"\npeak memory: {peak} MiB\n".encode())    # one piece, beside what the script prints


def launch(script: str, *options: str) -> None:
    """Runs a script as it is in this process."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = tg.World.claim_device(local)
    if tg.flash_attn_3 is None:
        module = sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
        module.__dict__.update(stand_ins(device))
    torch.nn.functional.rms_norm = outside_autocast(torch.nn.functional.rms_norm)
    if local == 0:
        threading.Thread(target=tell_memory, daemon=True).start()
    sys.argv = [script, *options]
    sys.path.append(str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    import beside  # again, by its name: the compiler looks up a function's globals in the module of that name
    beside.launch(*sys.argv[1:])
