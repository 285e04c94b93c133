"""Parameter Golf in one file: the best language model that fits in 16,000,000 bytes.

At most 600 s of training on 8xH100, scored in bits per byte (BPB). A run is one pipeline; each
arrow is one function call and one line of the log:

    shards -> rehearse -> train -> calibrate -> quantise -> pack -> read back -> score

    rehearse    every later stage on a few steps of training data, then rewound bit for bit
    train       Muon + AdamW and an average of the weights, inside MAX_WALLCLOCK_SECONDS
    calibrate   second moments of the activations, inside the same clock; the last look at such data
    score       plain, sliding, by documents, and with score-first test-time training (TTT)

Launch (the defaults are the 8xH100 submission; without a CUDA device RECIPE=demo is chosen, aloud):
    python train_gpt.py                                       # CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py     # eight GPUs
    python train_gpt.py --help                                # every knob
    python train_gpt.py eval logs/<RUN_ID>/model.bin          # score an artifact again
    python train_gpt.py data FILES... --vocab V --out DIR     # shards from documents of your own

Dimension key: B rows, T tokens, D width, H query heads, K key/value heads, E head size, F MLP
width, V vocabulary, L layers (stored), S steps (executed), R rank. A *layer* is stored, a *step* of
depth is executed, a *window* is scored, a *chunk* is the part of the stream that is scored before
it is learned from, a *bank* holds all layers of a role. A knob is an environment variable.

Map: 1 imports, 2 hyperparameters, 3 world and log, 4 data, 5 roles and depth, 6 model, 7 adapters,
8 optimisers, 9 training, 10 quantisation, 11 artifact, 12 scoring, 13 test-time training,
15 pipeline (14 will hold the fused kernels, 16 the tools).
"""
# ==================================================================================================
# 1. Imports
# ==================================================================================================
from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import ctypes
import copy
import datetime
import difflib
import functools
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import lzma
import math
import os
import platform
import re
import shutil
import struct
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def optional(name: str) -> Any:
    """The named module, or None where it is not installed; what needs it says so before the clock
    starts."""
    try:
        return __import__(name, fromlist=["*"])
    except ImportError:
        return None


brotli, zstandard, sentencepiece = optional("brotli"), optional("zstandard"), optional(
    "sentencepiece")
python_minifier = optional("python_minifier")
flash_attn_3, flash_attn_2 = optional("flash_attn_interface"), optional("flash_attn")
torch_varlen = optional("torch.nn.attention.varlen")
VARLEN_OPTIONS = inspect.signature(torch_varlen.varlen_attn).parameters if torch_varlen else {}
# torch 2.10 has is_causal; later releases say the same by a window that looks back without end.
VARLEN_CAUSAL: dict[str, Any] = (dict(is_causal=True) if "is_causal" in VARLEN_OPTIONS else
                                 dict(window_size=(-1, 0)))
if "enable_gqa" in VARLEN_OPTIONS:
    VARLEN_CAUSAL["enable_gqa"] = True


class Refusal(Exception):
    """Bad input, told in one sentence: which knob or file, which value, what was expected. `main`
    prints it, exits 2."""


# ==================================================================================================
# 2. Hyperparameters
# One typed table is the only place where a setting is declared: its name in capitals is the
# environment variable. Reads the environment; gives a frozen `Hyperparameters`. Defaults are the
# submission; RECIPE changes many at once.
# ==================================================================================================
def knob(default: Any, meaning: str, check: Callable[[Any], bool] = lambda value: True) -> Any:
    """One setting: its default, what it means with its unit, and which values are allowed."""
    return field(default=default, metadata=dict(meaning=meaning, check=check))


def positive(value: float) -> bool:
    """True above zero."""
    return value > 0


def natural(value: float) -> bool:
    """True from zero on."""
    return value >= 0


def fraction(value: float) -> bool:
    """True in [0, 1]."""
    return 0 <= value <= 1


def among(*names: str) -> Callable[[str], bool]:
    """A check that admits only these names."""
    return lambda value: value in names


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run. `Hyperparameters()` is the submission; raises `Refusal` where values
    contradict."""

    # -- run and data
    run_id: str = knob("", "name of the run's folder; empty: the date and time",
                       lambda v: not re.search(r"[^\w.+-]", v))
    recipe: str = knob(
        "", "recipes joined by commas, applied left to right; single knobs override them")
    seed: int = knob(1337, "seed of every random generator", natural)
    logs_dir: str = knob("logs", "folder in which each run gets a folder of its own")
    corpus: str = knob(
        "",
        "embedded: text of the running Python's library; shards: files; empty: shards if any",
        among("", "embedded", "shards"))
    data_dir: str = knob("./data",
                         "where data sets and tokenizers are looked for and caches are kept")
    data_path: str = knob(
        "", "folder of the shards; empty: DATA_DIR/datasets/fineweb10B_sp<VOCAB_SIZE>")
    tokenizer_path: str = knob(
        "", "SentencePiece model; empty: DATA_DIR/tokenizers/fineweb_<VOCAB_SIZE>_bpe.model")
    vocab_size: int = knob(8192, "rows of the token embedding, V", lambda v: 4 <= v <= 65536)

    # -- model
    num_layers: int = knob(11, "layers whose weights are stored, L", positive)
    model_dim: int = knob(512, "residual width, D", lambda v: 0 < v < 1 << 20)
    num_heads: int = knob(8, "query heads, H", positive)
    num_kv_heads: int = knob(4, "key/value heads, K; NUM_HEADS must be a multiple", positive)
    mlp_mult: float = knob(4.0, "MLP width F as a multiple of MODEL_DIM", lambda v: 0 < v <= 256)
    leaky_slope: float = knob(0.5, "slope of the squared leaky ReLU below zero; 0 is ReLU squared",
                              fraction)
    rope_dims: int = knob(16, "leading dimensions of each head that rotate", positive)
    rope_base: float = knob(10000.0, "base of the rotary frequencies", positive)
    qk_gain_init: float = knob(5.25, "initial gain of each query head after the QK norm", positive)
    ln_scale: bool = knob(True, "divide each layer's normalised input by sqrt(layer + 1)")
    xsa_last_n: int = knob(
        11, "last layers whose heads drop the part along their own value (arXiv 2603.09078)",
        natural)
    head_gate_scale: float = knob(
        0.5, "slope of the sparse attention head gate (#1787); 0: no gate", natural)
    smear_gate: bool = knob(
        True, "let each token mix in the embedding of the token before it, within its document")
    gate_window: int = knob(12, "leading channels that drive the head gate and the smear gate",
                            positive)
    num_loops: int = knob(2, "extra passes over layers LOOP_START to LOOP_END", natural)
    loop_start: int = knob(3, "first layer of the recurrent segment", natural)
    loop_end: int = knob(5, "last layer of the recurrent segment", natural)
    enable_looping_at: float = knob(0.35, "share of training after which the recurrence runs",
                                    fraction)
    parallel_start_layer: int = knob(
        8, "first layer with separate attention and MLP lanes (#1204); NUM_LAYERS: none", natural)
    logit_softcap: float = knob(30.0, "logits are squashed into (-softcap, softcap)", positive)
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial embedding",
                                      positive)

    # -- training
    iterations: int = knob(20000, "most steps", natural)
    max_wallclock_seconds: float = knob(
        600.0, "training clock, s; counts all that reads training data; 0: no clock", natural)
    train_batch_tokens: int = knob(786432, "tokens of one optimiser step over all ranks", positive)
    micro_batch_tokens: int = knob(98304, "tokens of one forward and backward pass on one rank",
                                   positive)
    train_seq_len: int = knob(2048, "training context and longest document piece, tokens",
                              lambda v: v > 1)
    rehearsal_steps: int = knob(
        3, "steps of each depth plan in the rehearsal, later rewound; 0: no rehearsal", natural)
    lr_warmup_steps: int = knob(0, "steps over which the rates rise linearly", natural)
    warmdown_frac: float = knob(0.85, "last share of training over which the rates fall linearly",
                                fraction)
    min_lr: float = knob(0.1, "share of the peak rate at which the warmdown ends", fraction)
    matrix_lr: float = knob(0.026, "Muon rate of the matrices", natural)
    tied_embed_lr: float = knob(0.03, "AdamW rate of the embedding", natural)
    scalar_lr: float = knob(0.02, "AdamW rate of gains, scales and gates", natural)
    muon_momentum: float = knob(0.97, "Muon momentum", lambda v: 0 <= v < 1)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at the first step",
                                             lambda v: 0 <= v < 1)
    muon_momentum_warmup_steps: int = knob(1500, "steps over which the momentum rises", natural)
    beta1: float = knob(0.9, "AdamW decay of the mean", lambda v: 0 <= v < 1)
    beta2: float = knob(0.99, "AdamW decay of the square", lambda v: 0 <= v < 1)
    adam_eps: float = knob(1e-8, "AdamW epsilon", positive)
    muon_wd: float = knob(0.095, "decoupled weight decay of the matrices", natural)
    embed_wd: float = knob(0.085, "decoupled weight decay of the embedding", natural)
    adam_wd: float = knob(0.02, "decoupled weight decay of gains, scales and gates", natural)
    grad_clip_norm: float = knob(0.3, "largest global gradient norm; 0: no clipping", natural)
    ema_decay: float = knob(0.9965, "decay of the averaged weights, which are the ones exported",
                            lambda v: 0 <= v < 1)
    train_log_every: int = knob(500, "steps between two training lines of the log", positive)
    val_loss_every: int = knob(0, "steps between two validation scores during training; 0: none",
                               natural)
    compile: str = knob(
        "auto",
        "torch.compile: full graph, one block at a time, off; auto: full on GPUs, block on CPUs",
        among("auto", "full", "block", "off"))
    precision: str = knob("auto",
                          "number format of the matrix products; auto: bf16 where the chip has it",
                          among("auto", "bf16", "fp32"))

    # -- quantisation and artifact
    gptq_calibration_batches: int = knob(
        16, "micro-batches of training data for the second moments", positive)
    gptq_reserve_seconds: float = knob(
        0.0, "part of the clock kept for calibration, s; 0: measured in the rehearsal", natural)
    gptq_damping: float = knob(
        0.01, "added to the second moment's diagonal, as a share of its mean", positive)
    matrix_bits: int = knob(6, "bits per code of attention and MLP matrices", lambda v: 2 <= v <= 8)
    embed_bits: int = knob(7, "bits per code of the embedding", lambda v: 2 <= v <= 8)
    matrix_clip_sigmas: float = knob(
        12.85, "largest code of a matrix row, in standard deviations of the row", positive)
    embed_clip_sigmas: float = knob(
        14.0, "largest code of an embedding row, in standard deviations of the row", positive)
    trellis_states: int = knob(
        8, "states of the trellis down each column of codes; 0: each code to its nearest",
        lambda v: v in (0, 4, 8, 16, 32, 64))
    compressor: str = knob("rans", "coder of the codes; auto: whichever is shortest",
                           among("auto", "rans", "brotli", "zstd", "lzma"))
    budget_bytes: int = knob(16_000_000, "most bytes of packed code + artifact (decimal)", positive)

    # -- scoring
    eval_seq_len: int = knob(2048, "longest window in scoring, tokens", lambda v: v > 1)
    eval_stride: int = knob(64, "tokens scored per sliding window", positive)
    eval_batch_tokens: int = knob(262144, "tokens of one scoring forward pass on one rank",
                                  positive)
    scores: str = knob(
        "quantized,sliding,ttt", "which scores the artifact gets, joined by commas",
        lambda v: set(v.split(",")) <= {"prequant", "quantized", "sliding", "documents", "stream", "ttt", ""})
    ttt: str = knob("stream", "form of test-time training: stream, phased, recompute or chunk",
                    among("stream", "phased", "recompute", "chunk"))
    ttt_stream_chunk: int = knob(24, "tokens of a document scored before its adapters learn",
                                 positive)
    ttt_steps: int = knob(1, "most Adam steps per scored chunk of a document", natural)
    ttt_lora_lr: float = knob(0.002, "Adam rate of the fastest learner's adapters", natural)
    ttt_lr_decay: float = knob(0.5, "that rate falls as (1 + n / 4)^-this over the chunks n",
                               natural)
    ttt_learners: int = knob(3, "predictors per document, mixed by past losses; the last of several "
                             "never learns", positive)
    ttt_lr_spread: float = knob(3.0, "ratio of the rates of neighbouring learners", positive)
    ttt_mix_decay: float = knob(0.8, "decay per token of the losses that weigh them", fraction)
    ttt_beta2: float = knob(0.99, "decay of the adapters' squared gradient", lambda v: 0 <= v < 1)
    ttt_targets: str = knob("q,v,o,mlp,head", "adapted maps, of q k v o mlp head",
                            lambda v: set(v.split(",")) <= set("q k v o mlp head".split()))
    ttt_enabled: bool = knob(True, "score-first test-time training (the score `ttt`)")
    ttt_chunk_tokens: int = knob(32768, "tokens that are scored before they are learned from",
                                 positive)
    ttt_lr: float = knob(
        0.002, "SGD rate of test-time training at the first chunk; falls as a cosine", natural)
    ttt_phases: int = knob(3, "parts of the stream between which phased training learns", positive)
    ttt_max_chunks: int = knob(0, "parts that SGD learns from, its cosine's length; 0: all", natural)
    ttt_ema_decay: float = knob(0.0, "scores use an average of SGD's weights with this decay",
                                lambda v: 0 <= v < 1)
    ttt_freeze_blocks: int = knob(0, "first layers, and the embedding, that SGD leaves", natural)
    ttt_lr_ramp: float = knob(1.0, "share of TTT_LR in the first layer, rising to all of it",
                              fraction)
    eval_budget_s: float = knob(
        480.0, "time for the score ttt, s: fewer TTT_STEPS where they would not fit; 0: any",
        natural)
    ttt_momentum: float = knob(0.9, "SGD momentum of test-time training", lambda v: 0 <= v < 1)
    ttt_epochs: int = knob(3, "passes over each scored chunk", natural)
    ttt_batch_seqs: int = knob(
        32, "sequences of TRAIN_SEQ_LEN per test-time training step over all ranks", positive)
    ttt_grad_clip: float = knob(1.0, "largest global gradient norm of test-time training", positive)
    ttt_lora_rank: int = knob(8, "rank R of the per-row adapters", positive)
    ttt_lora_alpha: float = knob(
        16.0, "adapters are scaled by TTT_LORA_ALPHA / TTT_LORA_RANK", natural)

    def __post_init__(self):
        """Checks every range and every relation between knobs; raises `Refusal` with the names and
        values."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value,
                          float) and not math.isfinite(value) or not f.metadata["check"](value):
                raise Refusal(
                    f"{f.name.upper()}={value!r} is out of range: {f.metadata['meaning']}")
        h, F_ = self, self.mlp_mult * self.model_dim
        for holds, why in (
            (h.model_dim % h.num_heads == 0,
             "MODEL_DIM={model_dim} must be a multiple of NUM_HEADS={num_heads}"),
            (h.num_heads % h.num_kv_heads == 0,
             "NUM_HEADS={num_heads} must be a multiple of NUM_KV_HEADS={num_kv_heads}"),
            (F_ == int(F_), "MLP_MULT={mlp_mult} x MODEL_DIM={model_dim} must be a whole number"),
            (h.rope_dims % 2 == 0 and h.rope_dims <= h.head_dim,
             "ROPE_DIMS={rope_dims} must be even and at most the head size MODEL_DIM / NUM_HEADS"),
            (h.gate_window
             <= h.model_dim, "GATE_WINDOW={gate_window} must be at most MODEL_DIM={model_dim}"),
            (h.num_loops == 0 or h.loop_start <= h.loop_end < h.num_layers,
             "LOOP_START={loop_start} <= LOOP_END={loop_end} < NUM_LAYERS={num_layers} must hold"),
            (h.train_batch_tokens % h.micro_batch_tokens == 0,
             "TRAIN_BATCH_TOKENS={train_batch_tokens} must be a multiple of "
             "MICRO_BATCH_TOKENS={micro_batch_tokens}"),
            (h.micro_batch_tokens % h.train_seq_len == 0,
             "MICRO_BATCH_TOKENS={micro_batch_tokens} must be a multiple of "
             "TRAIN_SEQ_LEN={train_seq_len}"),
            (h.eval_stride <= h.eval_seq_len,
             "EVAL_STRIDE={eval_stride} must be at most EVAL_SEQ_LEN={eval_seq_len}"),
            (h.ttt_chunk_tokens % h.train_seq_len == 0,
             "TTT_CHUNK_TOKENS={ttt_chunk_tokens} must be a multiple of "
             "TRAIN_SEQ_LEN={train_seq_len}"),
            (h.max_wallclock_seconds > 0 or h.iterations > 0,
             "one of MAX_WALLCLOCK_SECONDS and ITERATIONS must be above zero"),
        ):
            if not holds:
                raise Refusal(why.format(**asdict(h)))

    @property
    def head_dim(self) -> int:
        """Head size E."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """MLP width F."""
        return int(self.mlp_mult * self.model_dim)

    @classmethod
    def from_env(cls,
                 env: Mapping[str, str],
                 recipe: str = "record",
                 base: Mapping[str, Any] = {}) -> Hyperparameters:
        """`base`, recipe rows from left to right, single variables. Raises `Refusal` for values and
        near-miss names."""
        kinds = {f.name: f for f in fields(cls)}
        refuse_near_misses(env, kinds)
        recipe = env.get("RECIPE") or recipe
        values: dict[str, Any] = dict(base, recipe=recipe)
        for name in recipe.split(","):
            if name not in RECIPES:
                raise Refusal(f"RECIPE={recipe}: there is no recipe {name!r}" +
                              nearest(name, RECIPES) + f"; known: {', '.join(RECIPES)}")
            values.update(RECIPES[name])
        for name, f in kinds.items():
            if name != "recipe" and (raw := env.get(name.upper())) is not None:
                values[name] = parse_knob(name, raw, f.type, f.metadata["meaning"])
        return cls(**values)

    def changed(self) -> dict[str, Any]:
        """Name -> value of every knob that differs from the submission, those that only say where
        things lie left out."""
        places = {"run_id", "recipe", "logs_dir", "data_dir", "data_path", "tokenizer_path"}
        return {
            f.name: getattr(self, f.name)
            for f in fields(self) if getattr(self, f.name) != f.default and f.name not in places
        }


# Each recipe is a row of overrides. `demo` is a model that two CPU cores train in about a minute.
RECIPES: dict[str, dict[str, Any]] = dict(
    record={},
    demo=dict(vocab_size=1024,
              num_layers=4,
              model_dim=256,
              num_heads=4,
              num_kv_heads=2,
              qk_gain_init=2.0,
              xsa_last_n=4,
              num_loops=1,
              loop_start=1,
              loop_end=2,
              parallel_start_layer=3,
              train_seq_len=256,
              train_batch_tokens=4096,
              micro_batch_tokens=4096,
              max_wallclock_seconds=100.0,
              rehearsal_steps=1,
              train_log_every=50,
              lr_warmup_steps=20,
              muon_momentum_warmup_start=0.85,
              muon_momentum=0.95,
              muon_momentum_warmup_steps=100,
              ema_decay=0.98,
              gptq_calibration_batches=8,
              scores="prequant,quantized,sliding,ttt",
              eval_seq_len=256,
              eval_batch_tokens=4096,
              ttt_chunk_tokens=8192,
              ttt_lora_lr=0.016,
              ttt_lr=0.01,
              ttt_epochs=2,
              ttt_batch_seqs=16),
)


def parse_knob(name: str, raw: str, kind: str, meaning: str) -> Any:
    """The text of one variable as its knob's type; raises `Refusal` naming variable, value and
    meaning."""
    parse = dict(int=lambda s: int(s.replace("_", "")),
                 float=float,
                 str=str,
                 bool=dict(zip(("0", "1", "false", "true"), (False, True) * 2)).__getitem__)[kind]
    try:
        return parse(raw.strip().lower() if kind == "bool" else raw)
    except (ValueError, KeyError):
        wanted = dict(int="a whole number", float="a number", bool="0 or 1", str="text")[kind]
        raise Refusal(f"{name.upper()}={raw!r} must be {wanted}: {meaning}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `, did you mean ...` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_near_misses(env: Mapping[str, str], known: Iterable[str]) -> None:
    """Raises `Refusal` for a variable that is no knob but looks like one: a typo must not train the
    wrong model."""
    knobs = [name.upper() for name in known]
    words = {tuple(sorted(name.split("_"))): name for name in knobs}
    for name in sorted(set(env) - set(knobs)):
        close = [words[key]] if (key := tuple(sorted(name.upper().split("_")))) in words else \
            difflib.get_close_matches(name.upper(), knobs, 1, 0.87)
        if close and len(name) > 4 and name != "COMPILER":    # which build systems set
            raise Refusal(
                f"{name} is no knob; did you mean {close[0]}? (it is set to {env[name]!r})")


def help_text() -> str:
    """The knob table, grouped as declared, with types and defaults."""
    rows = [
        f"  {f.name.upper():28} {f.type:6} {str(f.default):14} {f.metadata['meaning']}"
        for f in fields(Hyperparameters)
    ]
    return "\n".join([
        __doc__.strip(), "", f"Recipes (RECIPE=a,b): {', '.join(RECIPES)}", "",
        f"  {'knob':28} {'type':6} {'default':14} meaning", *rows
    ])


# ==================================================================================================
# 3. World and log
# Where this process stands among its peers, the only reader of RANK and WORLD_SIZE; with one
# process every collective is the identity. Gives `World`, the run's folder and `Log`, whose lines
# keep the forms that leaderboard tools parse.
# ==================================================================================================
def brief(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class World:
    """This process: rank, number of ranks, device. The collectives below are the only ones in the
    file."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> World:
        """Joins the process group that torchrun describes: NCCL on GPUs, gloo on CPUs. Raises
        `Refusal` if it fails."""
        try:
            names = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
            rank, size, local = (int(env.get(name, default)) for name, default in names.items())
            device = cls.claim_device(local)
            if size > 1:
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
        except (ValueError, RuntimeError) as error:
            raise Refusal(
                f"RANK={env.get('RANK')} WORLD_SIZE={env.get('WORLD_SIZE')}: this group of ranks "
                f"cannot be joined ({brief(error)}); start it with torchrun") from None
        return cls(rank, size, device)

    @staticmethod
    def claim_device(local: int) -> torch.device:
        """This process's own GPU, or the CPU where there is none; `Refusal` if GPUs are too few."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if local >= torch.cuda.device_count():
            raise Refusal(f"LOCAL_RANK={local} has no GPU of its own (this node shows "
                          f"{torch.cuda.device_count()}); start at most one process per GPU")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    @property
    def main(self) -> bool:
        """True on the rank that writes files and log lines."""
        return self.rank == 0

    def together(self, collective: Callable, *arguments: Any, **options: Any) -> None:
        """Runs a collective; raises `Refusal` where another rank no longer answers."""
        try:
            collective(*arguments, **options)
        except RuntimeError as error:
            raise Refusal(f"another rank was lost ({brief(error)}); see its own messages") from None

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over the ranks, in place."""
        if self.size > 1:
            self.together(dist.all_reduce, t)
        return t

    def mean(self, t: Tensor) -> Tensor:
        """The mean of `t` over the ranks, in place."""
        return self.sum(t).div_(self.size) if self.size > 1 else t

    def scatter_mean(self, rows: Tensor) -> Tensor:
        """(size * n, ...) -> this rank's (n, ...) rows of the mean over the ranks."""
        if self.size == 1:
            return rows
        mine = rows.new_empty(rows.size(0) // self.size, *rows.shape[1:])
        self.together(dist.reduce_scatter_tensor, mine, rows.contiguous())
        return mine.div_(self.size)

    def gather(self, mine: Tensor) -> Tensor:
        """(n, ...) of each rank -> (size * n, ...) in the order of ranks, on every rank."""
        if self.size == 1:
            return mine
        rows = mine.new_empty(mine.size(0) * self.size, *mine.shape[1:])
        self.together(dist.all_gather_into_tensor, rows, mine.contiguous())
        return rows

    def share(self, value: Any) -> Any:
        """Rank 0's value (bytes, numbers, text) on every rank; nothing in it came from outside."""
        box = [value]
        if self.size > 1:
            self.together(dist.broadcast_object_list, box, src=0, device=self.device)
        return box[0]

    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors with rank 0's."""
        if self.size > 1:
            for t in tensors:
                self.together(dist.broadcast, t, src=0)

    def wait(self) -> None:
        """Returns when every rank has come here and this rank's device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def leave(self) -> None:
        """Leaves the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class Stopwatch:
    """Seconds since the start, with the device's queue drained first: for stages, never inside the
    training loop."""

    def __init__(self, world: World):
        """Starts it once every rank is here."""
        self.world = world
        world.wait()
        self.begin_s = time.perf_counter()

    def read_s(self) -> float:
        """Seconds since the start."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return time.perf_counter() - self.begin_s


def write_atomically(path: Path, *parts: bytes) -> None:
    """Writes the whole file or nothing: a temporary file beside it, then a rename. Raises `Refusal`
    on a full disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Refusal(
            f"{path}: {sum(map(len, parts)):,} bytes could not be written ({error.strerror}); "
            "free space there or set LOGS_DIR / DATA_DIR to another disk") from None


class Log:
    """What rank 0 prints; once a folder is claimed, its log.txt too. Other ranks say nothing."""

    def __init__(self, world: World, folder: Path | None = None, quiet: bool = False):
        """With a folder, claims it at once. A quiet log says nothing at all."""
        self.world, self.folder, self.width, self.quiet, self.early = world, None, 0, quiet, []
        if folder:
            self.claim(folder)

    def claim(self, folder: Path) -> None:
        """Makes the run's folder and writes there what was said so far; raises `Refusal` if the run
        id was used before."""
        self.folder = folder
        if self.world.main:
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                raise Refusal(f"RUN_ID={folder.name} was used before: {folder} exists; "
                              "choose another RUN_ID, no run is ever overwritten") from None
            except OSError as error:
                raise Refusal(
                    f"LOGS_DIR={folder.parent} cannot be written ({error.strerror})") from None
            self.write(self.early)

    def write(self, lines: Sequence[str]) -> None:
        """Appends lines to log.txt."""
        try:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as f:
                f.writelines(line + "\n" for line in lines)
        except OSError as error:
            raise Refusal(
                f"{self.folder / 'log.txt'} cannot be written ({error.strerror})") from None

    def __call__(self, line: str) -> None:
        """One line on the terminal and in log.txt."""
        if self.quiet or not self.world.main:
            return
        print("\r" + " " * self.width + "\r" + line if self.width else line, flush=True)
        self.width = 0
        if self.folder:
            self.write([line])
        else:
            self.early.append(line)

    def progress(self, line: str) -> None:
        """One updating line on a terminal, an ordinary line in a file; the caller says it sparsely.
        """
        if self.quiet or not self.world.main:
            return
        if not sys.stdout.isatty():
            self(line)
            return
        print("\r" + line.ljust(self.width), end="", flush=True)
        self.width = max(self.width, len(line))


# ==================================================================================================
# 4. Data
# Shards are the challenge's own: 256 int32 of header, then uint16 tokens, token 1 opens each
# document. First how they are read (training batches, validation set), then how they are made from
# documents, then the embedded corpus.
# ==================================================================================================
SHARD_MAGIC, SHARD_VERSION, SHARD_TOKENS = 20240520, 1, 100_000_000
HEADER_BYTES = 256 * 4
BOS = 1


def shard_header(count: int) -> bytes:
    """256 little-endian int32: magic, version, token count, zeros."""
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, count
    return header.tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes `tokens` (T,) as one official shard of uint16."""
    tokens = np.ascontiguousarray(tokens, "<u2")
    write_atomically(Path(path), shard_header(len(tokens)), tokens.data)


def read_shard(path: Path) -> np.ndarray:
    """The memory-mapped uint16 tokens (T,) of an official shard; raises Refusal on any damage."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"shard {path}: there is no such file")
    size_bytes = path.stat().st_size
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256:
        raise Refusal(f"shard {path}: {size_bytes} bytes are too few for the {HEADER_BYTES} byte "
                      "header")
    magic, version, count = map(int, header[:3])
    if magic != SHARD_MAGIC:
        raise Refusal(f"shard {path}: magic number {magic}, expected {SHARD_MAGIC}")
    if version != SHARD_VERSION:
        raise Refusal(f"shard {path}: version {version}, expected {SHARD_VERSION}")
    if count < 1:
        raise Refusal(f"shard {path}: the header promises {count} tokens, expected at least 1")
    if size_bytes != HEADER_BYTES + 2 * count:
        raise Refusal(f"shard {path}: {size_bytes} bytes, but a header of {count} tokens asks for "
                      f"{HEADER_BYTES + 2 * count}")
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count, ))


class Docs(NamedTuple):
    """Where documents lie in a batch of rows, so that attention stays inside each of them."""

    # (B, T) int64: place in the row of the first token of this token's piece
    start: Tensor
    # (n,) int32 ends of the pieces of the flattened batch, for variable-length kernels
    bounds: Tensor | None
    longest: int    # tokens of the longest piece that can occur


class Batch(NamedTuple):
    """One micro-batch: inputs, the tokens that follow them, and the document pieces."""

    ids: Tensor    # (B, T) int64
    targets: Tensor    # (B, T) int64
    docs: Docs


def pieces(ids: np.ndarray, longest: int) -> np.ndarray:
    """(B, T) tokens -> (B, T) place of the first token of each token's piece; a document longer
    than `longest` is cut."""
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    opens = np.maximum.accumulate(np.where(ids == BOS, place, 0), axis=1)
    return opens + (place - opens) // longest * longest


def locate(ids: np.ndarray, longest: int, device: torch.device) -> Docs:
    """The document pieces of (B, T) tokens; ends are padded to a power of two so that shapes
    repeat."""
    start = pieces(ids, longest)
    bounds = None
    if device.type == "cuda":
        ends = np.flatnonzero(start == np.arange(ids.shape[1])).astype(np.int32)
        room = max(ids.size // 64, 1 << len(ends).bit_length())
        bounds = torch.from_numpy(
            np.concatenate([ends, np.full(room - len(ends), ids.size, np.int32)]))
    return Docs(torch.from_numpy(np.ascontiguousarray(start)), bounds, min(longest, ids.shape[1]))


def whole_rows(ids: Tensor) -> Docs:
    """Each row of (B, T) ids as one piece: attention over all that precedes, whatever documents it
    belongs to."""
    B, T = ids.shape
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=ids.device)
    return Docs(torch.zeros_like(ids), ends if ids.device.type == "cuda" else None, T)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; from pinned memory, without waiting for the copy, on GPUs."""
    move = lambda t: t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
    docs = batch.docs._replace(
        start=move(batch.docs.start),
        bounds=None if batch.docs.bounds is None else move(batch.docs.bounds))
    return Batch(move(batch.ids), move(batch.targets), docs)


class Loader:
    """Endless micro-batches of the training shards; `position` is its whole state.

    One epoch lays the shards end to end in a seeded order and cuts the stream into blocks of
    MICRO_BATCH_TOKENS; blocks are shuffled within stretches of 1024, and no block comes twice
    before all have come. Block number position * size + rank belongs to this rank, so that any
    world size sees the same steps. A block is one long row where attention takes variable lengths,
    else rows of TRAIN_SEQ_LEN. The next one is read on a thread.
    """

    def __init__(self, h: Hyperparameters, world: World, shards: Sequence[np.ndarray]):
        """Raises `Refusal` where the shards hold less than one micro-batch for each rank."""
        self.h, self.world, self.shards, self.position = h, world, shards, 0
        self.blocks = (sum(map(len, shards)) - 1) // h.micro_batch_tokens
        if self.blocks < world.size:
            raise Refusal(
                f"the training shards hold {sum(map(len, shards)):,} tokens, too few for one of "
                f"MICRO_BATCH_TOKENS={h.micro_batch_tokens} on each of {world.size} ranks")
        self.epoch, self.order, self.stream = -1, np.empty(0), []
        self.thread, self.ready = None, {}

    def arrange(self, epoch: int) -> None:
        """Draws the order of shards and blocks of one epoch."""
        rng = np.random.default_rng((self.h.seed, epoch))
        self.epoch, self.stream = epoch, [self.shards[i] for i in rng.permutation(len(self.shards))]
        self.starts = np.cumsum([0, *map(len, self.stream)])
        spare = int(self.starts[-1]) - 1 - self.blocks * self.h.micro_batch_tokens
        self.phase = int(rng.integers(spare + 1)) if epoch else 0
        order = np.arange(self.blocks)
        for lo in range(0, self.blocks, 1024):
            rng.shuffle(order[lo:lo + 1024])
        self.order = order

    def tokens(self, lo: int, count: int) -> np.ndarray:
        """(count,) tokens of this epoch's stream from place `lo` on."""
        first = int(np.searchsorted(self.starts, lo, "right")) - 1
        parts = []
        while count > 0:
            part = self.stream[first][lo - self.starts[first]:][:count]
            parts.append(part)
            lo, count, first = lo + len(part), count - len(part), first + 1
        return np.concatenate(parts).astype(np.int64)

    def read(self, number: int) -> Batch:
        """Block `number` of the endless sequence, on the CPU."""
        epoch, place = divmod(number, self.blocks)
        if epoch != self.epoch:
            self.arrange(epoch)
        size = self.h.micro_batch_tokens
        tokens = self.tokens(self.phase + int(self.order[place]) * size, size + 1)
        check_tokens(tokens, self.h.vocab_size, "a training shard")
        packed = attention_kernel(self.world.device) != "blocks"
        rows = 1 if packed else size // self.h.train_seq_len
        ids, targets = tokens[:-1].reshape(rows, -1), tokens[1:].reshape(rows, -1)
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets),
                     locate(ids, self.h.train_seq_len, self.world.device))

    def fetch(self, number: int) -> None:
        """Reads block `number` for `next`; runs on the thread, so an error is kept and raised
        there."""
        try:
            self.ready[number] = self.read(number)
        except Exception as error:
            self.ready[number] = error

    def next(self) -> Batch:
        """The next micro-batch of this rank, on its device."""
        number = self.position * self.world.size + self.world.rank
        if self.thread:
            self.thread.join()
        batch = self.ready.pop(number, None)
        self.ready.clear()
        batch = self.read(number) if batch is None else batch
        if isinstance(batch, Exception):
            raise batch
        self.position += 1
        self.thread = threading.Thread(target=self.fetch,
                                       args=(number + self.world.size, ),
                                       daemon=True)
        self.thread.start()
        return to_device(batch, self.world.device)


@dataclass(frozen=True)
class Validation:
    """The whole validation set: no truncated tail, every token but the first is a target."""

    tokens: Tensor    # (N + 1,) int64 on the CPU
    bytes: np.ndarray    # (N,) bytes of text that each target stands for
    documents: np.ndarray    # (n + 1,) first targets of the documents, then N

    @classmethod
    def of(cls, tokens: np.ndarray, target_bytes_: np.ndarray) -> Validation:
        """From tokens (N + 1,) and bytes per target (N,)."""
        starts = np.flatnonzero(tokens[:-1] == BOS)
        documents = np.unique(np.concatenate([[0], starts, [len(tokens) - 1]]))
        return cls(torch.from_numpy(tokens.astype(np.int64)), target_bytes_.astype(np.int64),
                   documents)


class Dataset(NamedTuple):
    """What a run reads: training shards (memory-mapped), the validation set, and how its bytes were
    counted."""

    train: list[np.ndarray]
    val: Validation
    byte_rule: str


def check_tokens(tokens: np.ndarray, V: int, place: str) -> None:
    """Raises `Refusal` for a token that the vocabulary does not have."""
    if tokens.size and (largest := int(tokens.max())) >= V:
        raise Refusal(f"{place}: token {largest} is outside VOCAB_SIZE={V}; "
                      "shards and vocabulary do not belong together")


def find_dataset(h: Hyperparameters, world: World, log: Callable[[str], None]) -> Dataset:
    """Finds or builds the data and checks all of it before any training; raises `Refusal` for
    whatever is wrong."""
    folder = Path(h.data_path or Path(h.data_dir) / "datasets" / f"fineweb10B_sp{h.vocab_size}")
    if h.corpus == "embedded" or not h.corpus and not h.data_path and not folder.is_dir():
        if not h.corpus:
            log(f"corpus: no shards in {folder}; CORPUS=embedded is used (set DATA_PATH for shards)"
                )
        if world.main:
            cache = Path(h.data_dir) / "cache"
            folder = corpus_path(cache, h.vocab_size)
            if build_corpus:
                folder = build_corpus(cache, h.vocab_size, log)
            elif not intact(folder):
                raise Refusal(f"CORPUS=embedded: {folder} is not there and this packed script "
                              "cannot build it; run the readable script once, or set DATA_PATH")
        folder = Path(world.share(str(folder)))
    names = {
        side: sorted(folder.glob(f"fineweb_{side}_*.bin"))
        for side in ("train", "val", "val_bytes")
    }
    names["val"] = [p for p in names["val"] if not p.name.startswith("fineweb_val_bytes")]
    for side in ("train", "val"):
        if not names[side]:
            raise Refusal(f"DATA_PATH={folder}: no file fineweb_{side}_*.bin there")
    train = [read_shard(path) for path in names["train"]]
    tokens = np.concatenate([read_shard(path) for path in names["val"]])
    for path, shard in [*zip(names["train"], train), (names["val"][0], tokens)]:
        # Of huge training shards a sample here; the loader checks every block that it reads.
        sample = tokens if shard is tokens else shard[::max(1, len(shard) >> 22)]
        check_tokens(sample, h.vocab_size, str(path))
    if len(tokens) < 2 or not (tokens == BOS).any():
        raise Refusal(
            f"{names['val'][0]}: no document start (token {BOS}) among {len(tokens)} tokens")
    if names["val_bytes"]:
        sidecar = np.concatenate([read_shard(path) for path in names["val_bytes"]])
        if len(sidecar) != len(tokens):
            raise Refusal(
                f"{names['val_bytes'][0]}: {len(sidecar)} byte counts for {len(tokens)} tokens; "
                "the sidecar must hold one for each token")
        if not sidecar[1:].any():
            raise Refusal(f"{names['val_bytes'][0]}: every byte count is zero")
        return Dataset(train, Validation.of(tokens, sidecar[1:]),
                       f"sidecar {names['val_bytes'][0].name}")
    path = Path(h.tokenizer_path
                or Path(h.data_dir) / "tokenizers" / f"fineweb_{h.vocab_size}_bpe.model")
    tables = piece_bytes(load_tokenizer(path, h.vocab_size, False), h.vocab_size)
    return Dataset(train, Validation.of(tokens, target_bytes(tokens, tables)),
                   f"tokenizer {path.name}")


SPACE_MARK = "\u2581"
MARKERS = TITLE, ALL_CAPS, CAP_NEXT, ESCAPE = "\ue001\ue002\ue003\ue004"    # of CaseOps
BUILDER = 1    # raise it whenever the same documents would give other files


def load_tokenizer(path: Path, V: int, caseops: bool) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in `path`; raises Refusal unless it has V pieces and suits the text form."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"tokenizer {path}: there is no such file")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise Refusal(f"tokenizer {path}: not a SentencePiece model") from error
    if len(tokenizer) != V:
        raise Refusal(f"tokenizer {path}: {len(tokenizer)} pieces, expected VOCAB_SIZE {V}")
    if tokenizer.bos_id() != BOS:
        raise Refusal(f"tokenizer {path}: document start has id {tokenizer.bos_id()}, expected "
                      f"{BOS}")
    if not any(tokenizer.is_byte(i) for i in range(V)):
        raise Refusal(f"tokenizer {path}: it has no byte pieces, so text outside its alphabet "
                      "would be lost")
    marked = all(tokenizer.piece_to_id(mark) != tokenizer.unk_id() for mark in MARKERS)
    if marked != caseops:
        raise Refusal(f"tokenizer {path}: " +
                      ("it was made for CaseOps text, add --caseops" if marked else
                       "it has no pieces for the four CaseOps markers, leave --caseops away"))
    return tokenizer


def piece_bytes(tokenizer: sentencepiece.SentencePieceProcessor,
                V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The challenge's byte tables: base bytes int16 (V,), leading space (V,), boundary (V,).

    A byte piece is 1 byte; control, unknown and unused ids are boundaries of 0 bytes; any other
    piece is its UTF-8 length without a leading space mark. Further marks inside a piece stand for
    one byte each; official vocabularies have none, lossless ones spell runs of spaces with them.
    """
    if len(tokenizer) != V:
        raise Refusal(f"the tokenizer has {len(tokenizer)} pieces, expected VOCAB_SIZE {V}")
    pieces = [tokenizer.id_to_piece(i) for i in range(V)]
    boundary = np.array([
        tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        for i in range(V)
    ])
    byte = np.array([tokenizer.is_byte(i) for i in range(V)])
    spaced = np.array([piece.startswith(SPACE_MARK) for piece in pieces]) & ~boundary & ~byte
    sizes = [
        len(piece.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ").encode()) for piece in pieces
    ]
    return np.where(boundary, 0, np.where(byte, 1, sizes)).astype(np.int16), spaced, boundary


def target_bytes(tokens: np.ndarray, tables: tuple[np.ndarray, np.ndarray,
                                                   np.ndarray]) -> np.ndarray:
    """Bytes uint16 (T-1,) of the targets tokens[1:] by the challenge's rule.

    A leading space counts one byte unless the token before it is a boundary.
    """
    base, spaced, boundary = tables
    previous, target = tokens[:-1], tokens[1:]
    return (base[target] + (spaced[target] & ~boundary[previous])).astype(np.uint16)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def intact(folder: Path) -> bool:
    """True where `folder` has a manifest and every file it names is there and unchanged."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False    # whatever is wrong with it, the answer is to build it again


def corpus_path(folder: Path, V: int) -> Path:
    """Where the embedded corpus of this Python and vocabulary lies inside the cache `folder`."""
    return folder / f"embedded_py{platform.python_version()}_sp{V}_b{BUILDER}"


# The packed script reads data but makes none: the code up to the end of this section stays behind.
build_corpus: Callable[..., Path] | None = None
make_data: Callable[..., dict] | None = None


# >>> not packed
class ShardWriter:
    """A context that streams tokens into `<stem>_000000.bin`, `<stem>_000001.bin` and so on.

    Every shard holds `limit` tokens, the last one the rest; its name appears when it is complete.
    `count` is the number of tokens appended so far, `paths` the finished shards.
    """

    def __init__(self, stem: Path, limit: int = SHARD_TOKENS):
        """Opens nothing yet: a writer without tokens leaves no file behind."""
        self.stem, self.limit = Path(stem), limit
        self.count, self.paths, self.file = 0, [], None

    def __enter__(self) -> "ShardWriter":
        """The writer itself."""
        return self

    def __exit__(self, error_type, *_) -> None:
        """Seals the last shard, or removes its unfinished file when the block failed."""
        if self.file and error_type is None:
            self.seal()
        elif self.file:
            self.file.close()
            os.unlink(self.file.name)

    def append(self, tokens: np.ndarray) -> None:
        """Adds `tokens` (T,), cut at shard ends wherever they fall, as the official export does."""
        tokens = np.asarray(tokens, "<u2")
        while len(tokens):
            filled = self.count - self.limit * len(self.paths)
            if self.file is None:
                self.file = open(f"{self.stem}_{len(self.paths):06d}.bin.partial", "wb")
                self.file.write(shard_header(0))
            head, tokens = np.split(tokens, [self.limit - filled])
            self.file.write(head.tobytes())
            self.count += len(head)
            if filled + len(head) == self.limit:
                self.seal()

    def seal(self) -> None:
        """Gives the open shard its true count and its final name."""
        with self.file as file:
            file.seek(0)
            file.write(shard_header(self.count - self.limit * len(self.paths)))
        path = Path(file.name.removesuffix(".partial"))
        os.replace(file.name, path)
        self.paths, self.file = [*self.paths, path], None


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """The texts of `.jsonl` and `.jsonl.zst` (field `text`) and `.txt` files (one document each).

    Streams: one line is held at a time. Raises Refusal for a missing file, an unknown suffix,
    bytes that are not UTF-8, bad JSON or a line without `text`.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_file():
            raise Refusal(f"documents {path}: there is no such file")
        if not path.name.endswith((".txt", ".jsonl", ".jsonl.zst")):
            raise Refusal(f"documents {path}: expected a name ending in .jsonl, .jsonl.zst or .txt")
        if path.suffix == ".zst" and zstandard is None:
            raise Refusal(f"documents {path}: reading it needs the package zstandard "
                          "(pip install zstandard)")
    for path in paths:
        with open(path, "rb") as file:
            if path.suffix == ".txt":
                yield decode_utf8(file.read(), path)
            elif path.suffix == ".jsonl":
                yield from json_texts(file, path)
            else:
                yield from json_texts(zstd_lines(file, path), path)


def decode_utf8(raw: bytes, place: object) -> str:
    """`raw` as text; raises Refusal that names `place`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"documents {place}: byte {error.start} (0x{raw[error.start]:02x}) is not "
                      "UTF-8") from error


def json_texts(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    """The `text` field of each JSON line; blank lines are passed over."""
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(decode_utf8(line, place))
        except json.JSONDecodeError as error:
            raise Refusal(f"documents {place}: not JSON ({error.msg}, column "
                          f"{error.colno})") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise Refusal(f"documents {place}: expected an object with a string field \"text\"")
        if re.search("[\ud800-\udfff]", text):
            raise Refusal(f"documents {place}: half of a surrogate pair has no UTF-8 form")
        yield text


def zstd_lines(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The lines of a zstd file of any number of frames; raises Refusal for a damaged or cut one."""
    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    try:
        while packed := file.read(1 << 17):
            while packed:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(packed)).split(b"\n")
                yield from lines
                packed = frame.unused_data
    except zstandard.ZstdError as error:
        raise Refusal(f"documents {path}: damaged zstd stream ({error})") from error
    if not frame.eof:
        raise Refusal(f"documents {path}: the zstd stream ends in the middle of a frame")
    yield rest


def fingerprint(text: str) -> int:
    """A 64-bit hash of `text`, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def held_out(key: str) -> bool:
    """True for the one key in twenty whose document belongs to validation."""
    return fingerprint(key) % 20 == 0


# Linux distributions package these apart from the library, so they are left out everywhere.
OPTIONAL_MODULES = {
    "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sitecustomize", "tkinter",
    "turtle", "turtledemo", "venv"
}
EMBEDDED_MINIMUM_BYTES = 2_000_000


def embedded_documents() -> list[tuple[str, str]]:
    """(name, text) of real prose that every Python carries: its library's own documentation.

    One document per module (documentation strings under their signatures, comment blocks) and per
    topic of the language reference. Sources are parsed, never imported: importing may open a
    browser or print. Raises Refusal where the library comes without sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # old sources carry invalid escapes
        for module in sorted(sys.stdlib_module_names - OPTIONAL_MODULES):
            for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
                inside = path.relative_to(library).with_suffix("")
                if path.is_file() and not {"test", "tests"} & set(inside.parts):
                    name = ".".join(inside.parts).removesuffix(".__init__")
                    documents.append((name, module_text(name, path.read_bytes())))
        topics = library / "pydoc_data" / "topics.py"
        if topics.is_file():
            table = ast.parse(topics.read_bytes()).body[-1].value
            documents += [(f"topic {name}", f"{name}\n\n{text}")
                          for name, text in ast.literal_eval(table).items()]
    cleaned = [(name, re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip())
               for name, text in documents]
    kept = [(name, text) for name, text in cleaned if len(text.encode()) >= 200]
    size_bytes = sum(len(text.encode()) for _, text in kept)
    if size_bytes < EMBEDDED_MINIMUM_BYTES:
        raise Refusal(f"CORPUS=embedded: the library of this Python ({library}) holds {size_bytes} "
                      f"bytes of documentation, expected at least {EMBEDDED_MINIMUM_BYTES}; "
                      "install the complete library or make shards with the verb data")
    return kept


def module_text(name: str, source: bytes) -> str:
    """Documentation strings and comment blocks of one module in the order of its lines."""
    text = importlib.util.decode_source(source)
    pieces = [*documented(ast.parse(text), name)]
    for block in re.finditer(r"^[ \t]*#.*(?:\n[ \t]*#.*)+", text, re.M):
        prose = re.sub(r"^[ \t]*#+[ \t]?", "", block[0], flags=re.M).strip()
        pieces.append((text.count("\n", 0, block.start()) + 1, prose))
    return "\n\n".join(prose for _, prose in sorted(pieces, key=lambda piece: piece[0]))


def documented(node: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """(line, signature and documentation string) of `node` and of every definition inside it."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        prose = ast.get_docstring(node)
        if prose:
            signature = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            yield getattr(node, "lineno", 0), f"{name}{signature}\n\n{prose}"
    for child in node.body:
        if hasattr(child, "body"):
            yield from documented(child, getattr(child, "name", name))


# SentencePiece writes a space as U+2581. A lossless tokenizer must tell a real U+2581 from a space:
# the normaliser spells U+2581 as U+10FFFD "_" and U+10FFFD twice, and the denormaliser undoes it.
ESCAPE_RULES = "10FFFD\t10FFFD 10FFFD\n2581\t10FFFD 5F\n"
RULES_PATH = 160
UNESCAPE_RULES = "10FFFD 10FFFD\t10FFFD\n10FFFD 5F\t2581\n"


def train_tokenizer(texts: Iterable[str], V: int, path: Path, markers: Iterable[str] = ()) -> None:
    """Writes a SentencePiece BPE model of V pieces to `path`; decode(encode(x)) == x for every x.

    Ids as in the official tokenizers: pad 0, bos 1, eos 2, unk 3, then `markers`, then 256 bytes.
    Trains on lines, so a newline is always the byte piece. Raises Refusal when V does not fit.
    """
    model = io.BytesIO()
    lines = (line[start:start + 4000] for text in texts for line in text.split("\n")
             for start in range(0, len(line), 4000))
    with tempfile.TemporaryDirectory() as folder:
        # The model records where its rules lay: slashes give that path one length everywhere, so
        # that it can be blotted out and equal texts make equal bytes.
        rules = folder + "escape.tsv".rjust(RULES_PATH - len(folder), "/")
        unrules = folder + "restore.tsv".rjust(RULES_PATH - len(folder), "/")
        Path(rules).write_text(ESCAPE_RULES)
        Path(unrules).write_text(UNESCAPE_RULES)
        try:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines,
                                                     model_writer=model,
                                                     model_type="bpe",
                                                     vocab_size=V,
                                                     pad_id=0,
                                                     bos_id=1,
                                                     eos_id=2,
                                                     unk_id=3,
                                                     user_defined_symbols=list(markers),
                                                     byte_fallback=True,
                                                     split_digits=True,
                                                     character_coverage=0.9995,
                                                     normalization_rule_tsv=rules,
                                                     denormalization_rule_tsv=unrules,
                                                     add_dummy_prefix=False,
                                                     remove_extra_whitespaces=False,
                                                     allow_whitespace_only_pieces=True,
                                                     max_sentence_length=1 << 16,
                                                     num_threads=1,
                                                     minloglevel=4)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise Refusal(f"VOCAB_SIZE {V}: no tokenizer of this size can be trained on these "
                          f"documents ({reason})") from error
    write_atomically(Path(path),
                     model.getvalue().replace(folder.encode(), b"/" * len(folder.encode())))


def utf8_widths(text: str) -> np.ndarray:
    """UTF-8 bytes int64 (characters,) of each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + np.add(codes >= 0x80, codes >= 0x800, dtype=np.int64) + (codes >= 0x10000)


def piece_widths(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """UTF-8 bytes (V,) that each piece covers in normalised text, where a space is U+2581."""
    return np.array([
        1 if tokenizer.is_byte(i) else len(tokenizer.id_to_piece(i).encode())
        for i in range(len(tokenizer))
    ])


def raw_bytes(tokenizer: sentencepiece.SentencePieceProcessor, widths: np.ndarray, ids: np.ndarray,
              text: str, weights: np.ndarray) -> np.ndarray:
    """Original bytes int64 (T,) that each of the tokens `ids` of `text` stands for.

    `weights` (characters,) are the original bytes of each character of `text`; the result sums to
    weights.sum() for any normaliser, since every token ends where the next begins: what the
    normaliser drops goes to the token in front of it, at a document's start to the first one.
    Follows each cut between tokens from normalised bytes back to characters and their bytes.
    """
    normalised, offsets = tokenizer.normalize(text, with_offsets=True)
    sizes = utf8_widths(normalised)
    ends = np.cumsum(widths[ids])
    if ends[-1] != sizes.sum():
        raise Refusal(f"tokenizer: its pieces cover {ends[-1]} of {sizes.sum()} bytes of a "
                      "document; without byte pieces the sidecar cannot be exact")
    starts = np.concatenate([[0], np.cumsum(weights)])
    before = starts[np.array(offsets)]
    character = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(ends[-1]) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # A cut inside a character (byte pieces) moves on byte by byte as far as the original has any.
    origin = before[character] + np.minimum(within, np.diff(before)[character])
    return np.diff(np.concatenate([[0], origin[ends[:-1]], [starts[-1]]]))


# Lossless case transform (parameter-golf #1729): lower-case text with markers before each run of
# ASCII letters that had capitals. A marker that stands in the original is escaped.
CASED = re.compile(f"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{MARKERS}]")
MARKED = re.compile(f"{ESCAPE}([{MARKERS}])|[{TITLE}{CAP_NEXT}]([a-z])|{ALL_CAPS}([a-z]+)")


def caseops_spell(match: re.Match) -> str:
    """The transform of one run of letters with a capital, or of one marker character."""
    run = match[0]
    if run in MARKERS:
        return ESCAPE + run
    if run.istitle():
        return TITLE + run.lower()
    if run.isupper():
        return ALL_CAPS + run.lower()
    spelled = re.sub("[A-Z]", lambda capital: CAP_NEXT + capital[0].lower(), run)
    return TITLE + spelled[1:] if run[0].isupper() else spelled


def caseops_encode(text: str) -> str:
    """`text` with its ASCII capitals spelled as markers and lower case; inverse caseops_decode."""
    return CASED.sub(caseops_spell, text)


def caseops_decode(text: str) -> str:
    """The original of a CaseOps text; raises Refusal for text that caseops_encode cannot give."""
    original = MARKED.sub(lambda match: match[1] or (match[2] or match[3]).upper(), text)
    if caseops_encode(original) != text:
        raise Refusal("CaseOps text: a marker stands where the transform never puts one")
    return original


def caseops_weights(text: str) -> np.ndarray:
    """Original bytes (characters,) behind each character of a CaseOps text: 0 for its markers.

    An escape counts nothing and the marker behind it, a character of the original, all its bytes.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    weights = np.where((codes >= ord(TITLE)) & (codes <= ord(ESCAPE)), 0, utf8_widths(text))
    escaped = [match.end() - 1 for match in re.finditer(f"{ESCAPE}.", text)]
    weights[escaped] = len(ESCAPE.encode())
    return weights


Corpus = Callable[[], Iterator[tuple[bool, str]]]    # each call starts over: (held out, text)
SAMPLE_BYTES, SAMPLE_DOCUMENT, BATCH_CHARACTERS = 32_000_000, 200_000, 4_000_000


def split_documents(paths: list[Path], val_paths: list[Path]) -> Iterator[tuple[bool, str]]:
    """(held out, text) of all documents: by file, or 95/5 by content where `val_paths` is empty.

    Copies of one document land on one side: equal content hashes equally, and a train document
    that is also in a validation file is left out.
    """
    seen = set()
    for text in read_documents(val_paths):
        seen.add(fingerprint(text))
        yield True, text
    for text in read_documents(paths):
        if not val_paths:
            yield held_out(text), text
        elif fingerprint(text) not in seen:
            yield False, text


def sample_texts(texts: Iterable[str], limit_bytes: int = SAMPLE_BYTES) -> list[str]:
    """The documents of smallest hash, cut to SAMPLE_DOCUMENT characters, up to `limit_bytes`.

    A sample that does not depend on the order of the corpus, and memory that does not grow with it.
    """
    heap, size_bytes, lowest = [], 0, -(1 << 64)
    for text in texts:
        entry = -fingerprint(text), text[:SAMPLE_DOCUMENT]
        if entry[0] <= lowest:
            continue
        size_bytes += len(entry[1].encode())
        heapq.heappush(heap, entry)
        while size_bytes > limit_bytes and len(heap) > 1:
            lowest, dropped = heapq.heappop(heap)
            size_bytes -= len(dropped.encode())
    return [text for _, text in sorted(heap, reverse=True)]


class Progress:
    """Says at most once a second how many documents and characters have passed, and how fast."""

    def __init__(self, title: str, say: Callable[[str], None]):
        """Starts the clock of the pass called `title`; `say` shows one line."""
        self.title, self.say = title, say
        self.documents, self.characters = 0, 0
        self.start_s = self.said_s = time.monotonic()

    def add(self, text: str) -> None:
        """Counts one document."""
        self.documents += 1
        self.characters += len(text)
        if time.monotonic() - self.said_s >= 1:
            self.close()

    def close(self) -> None:
        """Says the state now."""
        self.said_s = time.monotonic()
        millions = self.characters / 1e6
        self.say(f"data {self.title}: {self.documents} documents, {millions:.1f} M characters, "
                 f"{millions / max(self.said_s - self.start_s, 1e-9):.2f} M/s")


def batches(documents: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Runs of documents of about BATCH_CHARACTERS: enough for all threads, in bounded memory."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_shards(corpus: Corpus, tokenizer: sentencepiece.SentencePieceProcessor, folder: Path,
                 caseops: bool, progress: Progress) -> dict[str, int]:
    """Writes train, val and val_bytes shards of `corpus` into `folder`; returns what it counted.

    A document for which the normaliser leaves no token is left out, so that every byte of the
    documents that stay has a token to stand on. Raises Refusal when one side stays empty.
    """
    counts = dict.fromkeys([
        "train_documents", "val_documents", "empty_documents", "val_bytes", "train_bytes",
        "val_documents_decoded_exactly"
    ], 0)
    widths = piece_widths(tokenizer)
    with (ShardWriter(folder / "fineweb_train") as train, ShardWriter(folder / "fineweb_val") as
          val, ShardWriter(folder / "fineweb_val_bytes") as sidecar):
        for batch in batches(corpus()):
            texts = [caseops_encode(text) if caseops else text for _, text in batch]
            encoded = tokenizer.encode(texts, num_threads=os.cpu_count() or 1)
            streams = {train: [], val: [], sidecar: []}
            for (held, original), text, ids in zip(batch, texts, encoded):
                progress.add(original)
                if not ids:
                    counts["empty_documents"] += 1
                    continue
                tokens = np.array([BOS, *ids])
                side = "val" if held else "train"
                counts[f"{side}_documents"] += 1
                counts[f"{side}_bytes"] += len(original.encode())
                streams[val if held else train].append(tokens)
                if held:
                    weights = caseops_weights(text) if caseops else utf8_widths(text)
                    exact = raw_bytes(tokenizer, widths, tokens[1:], text, weights)
                    if exact.max() > 65535:
                        raise Refusal(f"documents: one token stands for {exact.max()} bytes, a "
                                      "sidecar holds at most 65535; shorten the run of spaces")
                    streams[sidecar].append(np.concatenate([[0], exact]))
                    counts["val_documents_decoded_exactly"] += tokenizer.decode(ids) == text
            for writer, arrays in streams.items():
                writer.append(np.concatenate(arrays) if arrays else [])
        for side, writer in {"train": train, "val": val}.items():
            if not writer.count:
                raise Refusal(f"documents: none fell to {side}; give more documents, or name the "
                              "validation files with --val")
    return counts | {"train_tokens": train.count, "val_tokens": val.count}


def build_dataset(corpus: Corpus, V: int, tokenizer_path: Path | None, out: Path, caseops: bool,
                  say: Callable[[str], None]) -> dict:
    """Makes the folder `out` of shards, byte sidecar, tokenizer and manifest; returns the manifest.

    Two passes over `corpus`: train a tokenizer on a bounded sample of its train side (unless
    `tokenizer_path` brings one), then encode. The folder appears complete or not at all. Raises
    Refusal when `out` already holds something else or V does not fit.
    """
    out = Path(out)
    if not 260 <= V <= 65536:
        raise Refusal(f"VOCAB_SIZE {V}: expected 260 to 65536 (256 bytes, 4 special ids, uint16)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refusal(f"--out {out}: already there and not empty, expected a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as workshop:
        folder = Path(workshop) / "dataset"
        folder.mkdir()
        model = folder / f"fineweb_{V}_bpe.model"
        if tokenizer_path:
            load_tokenizer(tokenizer_path, V, caseops)
            shutil.copyfile(tokenizer_path, model)
        else:
            progress = Progress("sampling for the tokenizer", say)
            sample = sample_texts(counted(corpus(), progress))
            progress.close()
            texts = map(caseops_encode, sample) if caseops else sample
            train_tokenizer(texts, V, model, MARKERS if caseops else ())
        progress = Progress("encoding", say)
        counts = write_shards(corpus, load_tokenizer(model, V, caseops), folder, caseops, progress)
        progress.close()
        manifest = {
            "builder": BUILDER,
            "vocab_size": V,
            "caseops": caseops,
            **counts, "files": {
                path.name: file_sha256(path)
                for path in sorted(folder.iterdir())
            }
        }
        write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        try:
            os.rename(folder, out)
        except OSError as error:
            if not intact(out):    # another process may have finished the same folder first
                raise Refusal(f"--out {out}: cannot be put in place ({error})") from error
    return manifest


def counted(corpus: Iterable[tuple[bool, str]], progress: Progress) -> Iterator[str]:
    """The train side of `corpus`, every document of it shown to `progress`."""
    for held, text in corpus:
        progress.add(text)
        if not held:
            yield text


def embedded_corpus(folder: Path, V: int = 1024, say: Callable[[str], None] = print) -> Path:
    """The folder of the embedded corpus in the cache `folder`, built there when it is not intact.

    Processes that build at the same time make the same bytes, and the first to finish wins.
    """
    folder = Path(folder)
    path = corpus_path(folder, V)
    if intact(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        say(f"data: {path} is damaged and is built again")
        with (tempfile.TemporaryDirectory(dir=folder) as
              bin_folder, contextlib.suppress(FileNotFoundError)):
            os.rename(path, Path(bin_folder) / "damaged")    # gone when another process was faster
    documents = [(held_out(name), text) for name, text in embedded_documents()]
    build_dataset(functools.partial(iter, documents), V, None, path, False, say)
    return path


def make_dataset(arguments: list[str], say: Callable[[str], None] = print) -> dict:
    """The verb data: makes shards of the documents that the command line names."""
    parser = argparse.ArgumentParser("train_gpt.py data", description="documents to shards")
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl, .jsonl.zst (text) or .txt")
    parser.add_argument("--vocab", type=int, required=True, help="pieces of the tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model; else trained on FILES")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the shards")
    parser.add_argument("--caseops", action="store_true", help="lossless case transform")
    parser.add_argument("--val",
                        nargs="+",
                        type=Path,
                        default=[],
                        help="validation documents; "
                        "else one document in twenty, by a hash of its content")
    options = parser.parse_args(arguments)
    corpus = functools.partial(split_documents, options.files, options.val)
    manifest = build_dataset(corpus, options.vocab, options.tokenizer, options.out, options.caseops,
                             say)
    say(f"data: {manifest['train_tokens']} train and {manifest['val_tokens']} val tokens "
        f"({manifest['val_bytes']} bytes) in {options.out}")
    return manifest


build_corpus, make_data = embedded_corpus, make_dataset
# <<< not packed


# ==================================================================================================
# 5. Roles and depth
# One row per stored tensor. Construction, initialisation, optimisers, calibration, quantisation,
# packing and the size report all walk this table; the artifact stores neither names nor shapes,
# because the table's order is its format.
# ==================================================================================================
class Role(NamedTuple):
    """What the pipeline needs to know about one stored tensor."""

    shape: tuple[int, ...]    # leading L where there is one slice per layer
    init: str | float    # "orthogonal", "normal", or the constant that fills it
    optim: str    # "muon", "embed" or "scalar"
    bits: int = 16    # 16: stored as fp16; below: codes of that width with a step per row
    tap: str = ""    # the activation that feeds it; empty: rounded without GPTQ
    # clip width in standard deviations of a row; 0: the row's largest value
    sigmas: float = 0.0


def roles(h: Hyperparameters) -> dict[str, Role]:
    """The role table of these hyperparameters: name -> Role, in the order of the artifact."""
    L, D, F_ = h.num_layers, h.model_dim, h.mlp_dim
    H, K = h.num_heads * h.head_dim, h.num_kv_heads * h.head_dim
    S = len(depth_plan(h, looped=True)) // 2
    matrix = dict(optim="muon", bits=h.matrix_bits, sigmas=h.matrix_clip_sigmas)
    scalar = dict(optim="scalar")
    table = dict(
        embed=Role((h.vocab_size, D), "normal", "embed", h.embed_bits, "final",
                   h.embed_clip_sigmas),
        wq=Role((L, H, D), "orthogonal", tap="attn_in", **matrix),
        wk=Role((L, K, D), "orthogonal", tap="attn_in", **matrix),
        wv=Role((L, K, D), "orthogonal", tap="attn_in", **matrix),
        wo=Role((L, D, H), 0.0, tap="attn_out", **matrix),
        w_up=Role((L, F_, D), "orthogonal", tap="mlp_in", **matrix),
        w_down=Role((L, D, F_), 0.0, tap="mlp_hidden", **matrix),
        q_gain=Role((L, h.num_heads), h.qk_gain_init, **scalar),
        attn_scale=Role((L, D), 1.0, **scalar),
        mlp_scale=Role((L, D), 1.0, **scalar),
        mix_x=Role((L, D), 1.0, **scalar),
        mix_x0=Role((L, D), 0.0, **scalar),
        skip_weight=Role((S, D), 1.0, **scalar),
        skip_gate=Role((S, D), 0.0, **scalar),
    )
    if h.head_gate_scale:
        table["head_gate"] = Role((L, h.num_heads, h.gate_window), 0.0, "scalar", bits=8)
    if h.parallel_start_layer < L:
        table["lane_keep"] = Role((L, 2), 1.1, **scalar)
        table["lane_write"] = Role((L, 2, 2), 1.0, **scalar)
    if h.smear_gate:
        table["smear_gate"] = Role((1, h.gate_window), 0.0, **scalar)
        table["smear_scale"] = Role((1, ), 0.0, **scalar)
    return table


class Step(NamedTuple):
    """One executed block: the layer whose weights it uses and its part in the U-Net skips."""

    layer: int
    push: bool    # its output is kept for the step that mirrors it
    pop: int | None    # row of the skip weights that merges a kept output, or None
    parallel: bool    # attention and MLP read and write lanes of their own
    xsa: bool    # heads drop the part along their own value


def depth_plan(h: Hyperparameters, looped: bool) -> tuple[Step, ...]:
    """The executed blocks in order: layers LOOP_START..LOOP_END run 1 + NUM_LOOPS times when
    looped.

    The first half pushes its outputs, the second half pops them in reverse (U-Net skips, #289).
    """
    segment = range(h.loop_start, h.loop_end + 1)
    if not (looped and h.num_loops):
        order = list(range(h.num_layers))
    else:
        order = [
            *range(h.loop_start), *list(segment) * (1 + h.num_loops),
            *range(h.loop_end + 1, h.num_layers)
        ]
    half = len(order) // 2
    return tuple(
        Step(layer, slot < half, slot - half if half <= slot < 2 * half else None,
             layer >= h.parallel_start_layer and slot >= half, layer >= h.num_layers - h.xsa_last_n)
        for slot, layer in enumerate(order))


# ==================================================================================================
# 6. Model
# The only forward pass of the file. `hidden` has two seams, both empty by default: `lora` adapts
# every `linear`, and `probe` sees every activation that feeds a quantised matrix. Depth recurrence
# is the argument `plan`, never a flag.
# ==================================================================================================
def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension without a gain: x / sqrt(mean(x^2) + eps)."""
    return F.rms_norm(x, (x.size(-1), ))


class LoRA(NamedTuple):
    """Low-rank correction with separate factors for every row of the batch (arXiv 2106.09685)."""

    a: Tensor    # (B, R, in)
    b: Tensor    # (B, out, R)
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, in) -> scale * b (a x), (B, T, out)."""
        return (x @ self.a.mT * self.scale) @ self.b.mT


def linear(x: Tensor, w: Tensor, lora: LoRA | None = None, lora_in: Tensor | None = None) -> Tensor:
    """x @ w.T, plus the adapter's correction of `lora_in` (x unless given) where there is an
    adapter."""
    y = F.linear(x, w)
    return y if lora is None else y + lora(x if lora_in is None else lora_in)


def rope_table(h: Hyperparameters,
               T: int,
               like: Tensor,
               behind: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 1, ROPE_DIMS / 2) of base^(-2j / ROPE_DIMS) * position (arXiv
    2104.09864), rounded last; (B, T, 1, ROPE_DIMS / 2) where rows begin `behind` (B,) tokens."""
    # fp64 where places count from a document's start: at place 100,000 fp32 is 0.004 rad off
    dtype = torch.float32 if behind is None else torch.float64
    pairs = torch.arange(0, h.rope_dims, 2, device=like.device, dtype=dtype)
    place = torch.arange(T, device=like.device, dtype=dtype)
    if behind is not None:
        place = place + behind[:, None]
    angle = (place[..., None] * h.rope_base**(-pairs / h.rope_dims))[..., None, :]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.size(-1) dimensions of each head (B, T, H, E) by position; the rest
    pass through."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)


def attention_kernel(device: torch.device) -> str:
    """The fastest causal attention this device and installation offer: fa3, fa2, varlen (torch >=
    2.10) or blocks."""
    if device.type != "cuda":
        return "blocks"
    if flash_attn_3 and torch.cuda.get_device_capability(device)[0] == 9:
        return "fa3"
    return "fa2" if flash_attn_2 else "varlen" if torch_varlen else "blocks"


def attend(q: Tensor, k: Tensor, v: Tensor, docs: Docs, kernel: str = "blocks") -> Tensor:
    """Causal grouped-query attention within each document piece: (B, T, H | K, E) -> (B, T, H, E).

    Softmax of q k / sqrt(E), by the named kernel; all of them compute the same.
    """
    if kernel == "blocks":
        return BlockAttention.apply(q, k, v, docs.start)
    (B, T, H, E), ends, longest = q.shape, docs.bounds, docs.longest
    q, k, v = (t.reshape(B * T, -1, E) for t in (q, k, v))
    if kernel == "varlen":
        if "enable_gqa" not in VARLEN_CAUSAL:
            k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))
        y = torch_varlen.varlen_attn(q, k, v, ends, ends, longest, longest, **VARLEN_CAUSAL)
    else:
        flash = flash_attn_3 if kernel == "fa3" else flash_attn_2
        y = flash.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
        y = y[0] if isinstance(y, tuple) else y    # early releases of FA3 add the log-sum-exp
    return y.view(B, T, H, E)


QUERY_BLOCK = 128    # queries that BlockAttention takes at once


def group(t: Tensor, K: int) -> Tensor:
    """(B, T, H, E) -> (B, K, H / K, T, E): the query heads beside the key head that they share."""
    B, T, H, E = t.shape
    return t.view(B, T, K, H // K, E).permute(0, 2, 3, 1, 4)


def ungroup(t: Tensor) -> Tensor:
    """The inverse of `group`."""
    B, K, G, T, E = t.shape
    return t.permute(0, 3, 1, 2, 4).reshape(B, T, K * G, E)


class BlockAttention(torch.autograd.Function):
    """Attention by blocks of queries, each against the keys before its end: exact, for CPUs and as
    the others' twin.

    The backward pass reuses the stored probabilities; torch's CPU kernel computes them again at two
    to three times
    the cost.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        """(B, T, H | K, E) and piece starts (B, T) -> (B, T, H, E)."""
        B, T, H, E = q.shape
        K, place = k.size(2), torch.arange(T, device=q.device)
        Q, keys, values = (group(t, K) for t in (q, k, v))
        outputs, probabilities = [], []
        for lo in range(0, T, QUERY_BLOCK):
            hi = min(lo + QUERY_BLOCK, T)
            seen = (place[lo:hi, None] >= place[:hi]) & (place[:hi] >= start[:, lo:hi, None])
            rows = Q[..., lo:hi, :].reshape(B * K, -1, E)
            logits = torch.bmm(rows, keys[:, :, 0, :hi].reshape(B * K, hi, E).mT)
            logits = logits.view(B, K, H // K, hi - lo, hi).float() * E**-0.5
            p = torch.where(seen[:, None, None], logits, -math.inf).softmax(-1).to(q.dtype)
            p = p.view(B * K, -1, hi)
            probabilities.append(p)
            outputs.append(
                torch.bmm(p, values[:, :, 0, :hi].reshape(B * K, hi, E)).view(
                    B, K, H // K, hi - lo, E))
        y = ungroup(torch.cat(outputs, 3))
        ctx.save_for_backward(q, k, v, y, *probabilities)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v: dS = P * (dP - sum(dY * Y)), as in FlashAttention (arXiv
        2205.14135, B.2)."""
        q, k, v, y, *probabilities = ctx.saved_tensors
        B, T, H, E = q.shape
        K = k.size(2)
        Q, G, keys, values = (group(t, K) for t in (q, grad, k, v))
        delta = group((grad.float() * y.float()).sum(-1, keepdim=True), K)
        dq, dk, dv = [], [], []
        for p, lo in zip(probabilities, range(0, T, QUERY_BLOCK)):
            hi = min(lo + QUERY_BLOCK, T)
            rows, grads = (t[..., lo:hi, :].reshape(B * K, -1, E) for t in (Q, G))
            dp = torch.bmm(grads, values[:, :, 0, :hi].reshape(B * K, hi, E).mT).float()
            ds = p.float() * (dp - delta[..., lo:hi, :].reshape(B * K, -1, 1)) * E**-0.5
            ds = ds.to(q.dtype)
            dq.append(
                torch.bmm(ds, keys[:, :, 0, :hi].reshape(B * K, hi, E)).view(
                    B, K, H // K, hi - lo, E))
            dk.append(F.pad(torch.bmm(ds.mT, rows).float(), (0, 0, 0, T - hi)))
            dv.append(F.pad(torch.bmm(p.mT, grads).float(), (0, 0, 0, T - hi)))
        dk, dv = (ungroup(sum(t).to(q.dtype).view(B, K, 1, T, E)) for t in (dk, dv))
        return ungroup(torch.cat(dq, 3)), dk, dv, None


class Past(NamedTuple):
    """What one step of depth remembers of the tokens before a chunk, and where it leaves its own.
    """

    keys: Tensor    # (B, K, M, E), as they were when scored
    values: Tensor    # (B, K, M, E)
    seen: Tensor    # (B, 1, C, M + C) 0 where a query may read it, -inf elsewhere; last the chunk
    fresh: list[Tensor]    # the step adds keys and values (B, K, C, E) of the chunk


def recall(q: Tensor, k: Tensor, v: Tensor, past: Past, kernel: str = "blocks") -> Tensor:
    """Attention of a chunk to itself and to what is cached: (B, C, H | K, E) -> (B, C, H, E).

    No gradient reaches the cache, and none is computed for it.
    """
    (B, C, H, E), K, M = q.shape, k.size(2), past.keys.size(2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    past.fresh.extend((k.detach(), v.detach()))
    if kernel != "blocks":
        k, v = (torch.cat(pair, 2).repeat_interleave(H // K, 1)
                for pair in ((past.keys, k), (past.values, v)))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, past.seen).transpose(1, 2)
    Q = group(q * E**-0.5, K).reshape(B, K, -1, E)    # (B, K, G * C, E)
    logits = torch.cat((Q @ past.keys.mT, Q @ k.mT), -1).view(B, H, C, -1)
    p = (logits + past.seen).softmax(-1).view(B, K, -1, M + C)
    y = p[..., :M] @ past.values + p[..., M:] @ v
    return ungroup(y.view(B, K, H // K, C, E))


class Layer(NamedTuple):
    """One layer's slice of every bank; None where the model has no such role. Gains and scales stay
    fp32."""

    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    w_up: Tensor
    w_down: Tensor
    q_gain: Tensor
    attn_scale: Tensor
    mlp_scale: Tensor
    mix_x: Tensor
    mix_x0: Tensor
    head_gate: Tensor | None
    lane_keep: Tensor | None
    lane_write: Tensor | None
    depth_scale: Tensor    # () 1 / sqrt(layer + 1), on the inputs of both branches (LN_SCALE)


Probe = Callable[[str, int, Tensor], None]


class Block(nn.Module):
    """The mathematics of one executed step; it owns no weights, so that one compiled graph serves
    every layer."""

    def __init__(self, h: Hyperparameters, kernel: str):
        """Keeps the hyperparameters and the name of the attention kernel."""
        super().__init__()
        self.h, self.kernel = h, kernel

    def attention(self, w: Layer, n: Tensor, rope: tuple[Tensor, Tensor], docs: Docs, xsa: bool,
                  lora: Mapping[str, LoRA], probe: Callable[[str, Tensor], None] | None,
                  past: Past | None = None) -> Tensor:
        """Normalised input (B, T, D) -> attention output (B, T, D), before its scale."""
        h, (B, T, _) = self.h, n.shape
        if probe:
            probe("attn_in", n)
        heads = lambda t: t.view(B, T, -1, h.head_dim)
        # (B, T, H, E)
        q = rotate(norm(heads(linear(n, w.wq, lora.get("q")))), *rope)
        q = (q * w.q_gain[:, None]).type_as(n)
        # (B, T, K, E)
        k = rotate(norm(heads(linear(n, w.wk, lora.get("k")))), *rope)
        v = heads(linear(n, w.wv, lora.get("v")))
        y = attend(q, k, v, docs, self.kernel) if past is None else recall(
            q, k, v, past, self.kernel)
        if xsa:    # y - (y . v/|v|) v/|v| with the value of the same position (arXiv 2603.09078)
            # (B, T, K, 1, E)
            own = F.normalize(v, dim=-1)[..., None, :]
            grouped = y.view(B, T, h.num_kv_heads, -1, h.head_dim)
            y = (grouped - (grouped * own).sum(-1, keepdim=True) * own).view_as(y)
        if w.head_gate is not None:
            # (B, T, H)
            gate = F.linear(n[..., :h.gate_window], w.head_gate)
            y = y * torch.sigmoid(h.head_gate_scale * gate)[..., None]
        y = y.reshape(B, T, -1)
        if probe:
            probe("attn_out", y)
        return linear(y, w.wo, lora.get("o"), lora_in=n)

    def mlp(self, w: Layer, n: Tensor, lora: Mapping[str, LoRA],
            probe: Callable[[str, Tensor], None] | None) -> Tensor:
        """Normalised input (B, T, D) -> squared leaky ReLU MLP (B, T, D), before its scale."""
        if probe:
            probe("mlp_in", n)
        # (B, T, F)
        hidden = F.leaky_relu(F.linear(n, w.w_up), self.h.leaky_slope).square()
        if probe:
            probe("mlp_hidden", hidden)
        return linear(hidden, w.w_down, lora.get("mlp"), lora_in=n)

    def forward(self,
                w: Layer,
                a: Tensor,
                m: Tensor,
                x0: Tensor,
                rope: tuple[Tensor, Tensor],
                docs: Docs,
                parallel: bool,
                xsa: bool,
                lora: Mapping[str, LoRA] = {},
                probe: Callable[[str, Tensor], None] | None = None,
                past: Past | None = None) -> tuple[Tensor, Tensor]:
        """Lanes (a, m), each (B, T, D) -> the lanes after this step; a serial step reads and writes
        `a` and hands `m` through."""
        read = (w.mix_x * a + w.mix_x0 * x0).type_as(a)
        attn = w.attn_scale * self.attention(w,
                                             norm(read) * w.depth_scale, rope, docs, xsa, lora,
                                             probe, past)
        if not parallel:
            a = (read + attn).type_as(a)
            a = (a + w.mlp_scale * self.mlp(w, norm(a) * w.depth_scale, lora, probe)).type_as(a)
            return a, m
        mlp = w.mlp_scale * self.mlp(w, norm(m) * w.depth_scale, lora, probe)
        keep, write = w.lane_keep, w.lane_write    # write[source, lane]: source 0 attention, 1 MLP
        return ((keep[0] * a + write[0, 0] * attn + write[1, 0] * mlp).type_as(a),
                (keep[1] * m + write[0, 1] * attn + write[1, 1] * mlp).type_as(a))


class Head(nn.Module):
    """The tied output head with softcapped logits and their cross-entropy."""

    def __init__(self, h: Hyperparameters):
        """Keeps the hyperparameters only."""
        super().__init__()
        self.h = h

    def forward(self,
                x: Tensor,
                embed: Tensor,
                targets: Tensor,
                lora: LoRA | None = None) -> Tensor:
        """States (B, T, D), embedding (V, D), targets (B, T) -> nats (B, T) fp32: -log softmax(cap
        tanh(z / cap))."""
        cap = self.h.logit_softcap
        logits = cap * torch.tanh(linear(x, embed, lora).float() / cap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                               reduction="none").view_as(targets)


def merge_skip(a: Tensor, kept: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """The U-Net skip: lerp(weight * kept, a, sigmoid(gate)) of (B, T, D) with (D,) each (#1089)."""
    share = torch.sigmoid(gate)
    return ((1 - share) * weight * kept + share * a).type_as(a)


class GPT(nn.Module):
    """The model: banks of weights, one forward, one loss. `GPT(h)(ids, targets)` is the mean loss
    in nats."""

    def __init__(self,
                 h: Hyperparameters,
                 dtype: torch.dtype = torch.float32,
                 kernel: str = "blocks"):
        """Weights are fp32 and initialised from the global random state; `dtype` is that of the
        matrix products, `kernel` the attention's (see `attention_kernel`)."""
        super().__init__()
        self.h, self.dtype = h, dtype
        self.bank = nn.ParameterDict({
            name: nn.Parameter(torch.empty(r.shape))
            for name, r in roles(h).items()
        })
        self.block, self.head = Block(h, kernel), Head(h)
        self.run_block: Callable = self.block
        self.run_head: Callable = self.head
        self.run_merge: Callable = merge_skip
        self.run_embedded: Callable = self.embedded
        self.run_nats: Callable = self.nats
        self.initialise()

    def compile(self, mode: str) -> None:
        """Compiles the whole loss (`full`), or its parts (`block`) once for all layers; the loss is
        `run_nats`."""
        # one graph per depth plan, shape and gradient mode
        torch._dynamo.config.recompile_limit = 64
        if mode == "full":
            self.run_nats = torch.compile(self.nats, dynamic=False, fullgraph=True)
        elif mode == "block":
            self.run_block = torch.compile(self.block, dynamic=False)
            self.run_head = torch.compile(self.head, dynamic=False)
            self.run_merge = torch.compile(merge_skip, dynamic=False)
            self.run_embedded = torch.compile(self.embedded, dynamic=False)

    def retune(self, **knobs: Any) -> Hyperparameters:
        """Changes knobs of scoring, which no weight depends on; returns all of them."""
        self.h = replace(self.h, **knobs)
        return self.h

    @torch.no_grad()
    def initialise(self) -> None:
        """Fills every bank as its role says; matrices that write to the residual stream start at
        zero."""
        for name, role in roles(self.h).items():
            w = self.bank[name]
            if w.is_meta:
                continue
            if role.init == "orthogonal":
                for layer in w:
                    nn.init.orthogonal_(layer)
            elif role.init == "normal":
                nn.init.normal_(w, std=self.h.tied_embed_init_std)
            else:
                nn.init.constant_(w, role.init)

    def layers(self) -> list[Layer]:
        """Each bank cast once and unbound once: indexing at each use would make a full-size
        gradient per use."""
        table, banks = roles(self.h), self.bank
        cast = {
            name: (banks[name] if table[name].optim == "scalar" and name != "head_gate" else
                   banks[name].to(self.dtype)).unbind(0)
            for name in Layer._fields if name in banks
        }
        numbers = torch.arange(1, self.h.num_layers + 1, device=self.bank["embed"].device)
        cast["depth_scale"] = (numbers**(-0.5 * self.h.ln_scale)).unbind(0)
        absent = (None, ) * self.h.num_layers
        return [Layer(*ws) for ws in zip(*(cast.get(name, absent) for name in Layer._fields))]

    def embedded(self, ids: Tensor, last: Tensor | None = None) -> Tensor:
        """(B, T) -> normalised embeddings (B, T, D); SmearGate adds the previous token's, never
        across a document start. `last` (B, 1): the token before the chunk, negative for none."""
        table = self.bank["embed"].to(self.dtype)
        x = F.embedding(ids, table)
        if self.h.smear_gate:
            # (B, T, D)
            before = F.pad(x[:, :-1], (0, 0, 1, 0)) if last is None else torch.cat(
                (F.embedding(last.clamp(min=0), table) * (last >= 0)[..., None], x[:, :-1]), 1)
            drive = F.linear(x[..., :self.h.gate_window], self.bank["smear_gate"].to(self.dtype))
            gate = self.bank["smear_scale"].to(self.dtype) * torch.sigmoid(drive)
            x = x + gate * (ids != BOS)[..., None] * before
        return norm(x)

    def hidden(self,
               ids: Tensor,
               plan: tuple[Step, ...],
               docs: Docs | None = None,
               lora: Sequence[Mapping[str, LoRA]] | None = None,
               probe: Probe | None = None,
               cache: Cache | None = None) -> Tensor:
        """Token ids (B, T) -> final normalised states (B, T, D). `lora` holds the adapters of each
        step, then the head's; with a `cache`, ids are the next chunk of what it remembers."""
        x0 = a = m = self.run_embedded(ids, *([cache.last] if cache else []))
        docs = docs or whole_rows(ids)
        run = self.block if probe or lora else self.run_block
        layers = cache.layers if cache else self.layers()
        rope = rope_table(self.h, ids.size(1), x0, cache.behind if cache else None)
        weights, gates = (self.bank[name].unbind(0) for name in ("skip_weight", "skip_gate"))
        kept: list[Tensor] = []
        for slot, step in enumerate(plan):
            if step.pop is not None:
                a = self.run_merge(a, kept.pop(), weights[step.pop], gates[step.pop])
            seam = {} if probe is None else dict(probe=functools.partial(see, probe, step.layer))
            if lora:
                seam["lora"] = lora[slot]
            if cache:
                seam["past"] = cache.past(slot)
            a, m = run(layers[step.layer], a, m, x0, rope, docs, step.parallel, step.xsa, **seam)
            m = m if step.parallel else a
            if step.push:
                kept.append(a)
        x = norm((a + m) / 2)
        if probe:
            probe("final", 0, x)
        return x

    def nats(self,
             ids: Tensor,
             targets: Tensor,
             plan: tuple[Step, ...],
             docs: Docs | None = None,
             lora: Sequence[Mapping[str, LoRA]] | None = None,
             cache: Cache | None = None) -> Tensor:
        """Cross-entropy of every target in nats, (B, T) fp32. Training, scoring and adaptation all
        read this."""
        x = self.hidden(ids, plan, docs, lora, cache=cache)
        return self.run_head(x, self.bank["embed"].to(self.dtype), targets,
                             *([lora[-1].get("head")] if lora else []))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in nats of the looped plan; about ln V at initialisation."""
        return self.nats(ids, targets, depth_plan(self.h, looped=True)).mean()


class Cache:
    """Keys and values of the last EVAL_SEQ_LEN tokens of B rows for every step of depth, and each
    row's last token: preallocated rings that all rows write at one place."""

    def __init__(self, model: GPT, B: int, C: int, plan: tuple[Step, ...]):
        """Empty rings for chunks of C tokens in the model's compute dtype."""
        h, embed = model.h, model.bank["embed"]
        self.C, self.T, self.at = C, h.eval_seq_len, 0
        with torch.no_grad():
            self.layers = model.layers()    # cast once: the weights stay as they are
        slots = -(-(self.T - 1) // C) * C
        # (S, 2, B, K, M, E)
        self.ring = torch.zeros(len(plan), 2, B, h.num_kv_heads, slots, h.head_dim,
                                dtype=model.dtype, device=embed.device)
        self.ids = torch.zeros(B, 1, dtype=torch.int64, device=embed.device)

    def open(self, behind: Tensor) -> None:
        """Makes ready for a chunk of each row; `behind` (B,) tokens of its document precede it."""
        place = torch.arange(self.C, device=behind.device)
        slots = torch.arange(self.ring.size(4), device=behind.device)
        # tokens from a slot to the chunk's start: every query sees exactly its last T tokens
        ago = (self.at - 1 - slots) % len(slots) + 1
        seen = (ago <= behind[:, None, None]) & (ago + place[:, None] < self.T)
        own = (place[:, None] >= place).expand(len(behind), -1, -1)
        self.behind = behind
        self.seen = torch.where(torch.cat((seen, own), 2)[:, None], 0.0, -math.inf).to(
            self.ring.dtype)
        self.last = torch.where(behind[:, None] > 0, self.ids, -1)

    def past(self, slot: int) -> Past:
        """What step number `slot` remembers; each forward pass begins a new `fresh`."""
        self.fresh = [] if slot == 0 else self.fresh
        self.fresh.append([])
        return Past(*self.ring[slot].unbind(0), self.seen, self.fresh[-1])

    def write(self, ids: Tensor, fresh: Sequence[Sequence[Tensor]]) -> None:
        """Books a chunk (B, C) with the keys and values that each step found for it."""
        self.ids = ids[:, -1:]
        self.ring[..., self.at:self.at + self.C, :] = torch.stack(
            [t for pair in fresh for t in pair]).view_as(self.ring[..., :self.C, :])
        self.at = (self.at + self.C) % self.ring.size(4)


def see(probe: Probe, layer: int, tap: str, x: Tensor) -> None:
    """Hands an activation of one layer to the probe."""
    probe(tap, layer, x)


# ==================================================================================================
# 7. Adapters
# LoRA factors banked like the weights: one pair of tensors per adapted map holds every step and
# every row of the batch.
# ==================================================================================================
class AdapterBank:
    """One LoRA per batch row, executed step and map of TTT_TARGETS, with its optimiser's state; a
    fresh bank changes nothing.

    All of a row lies in one line of `flat` (B, P), so that an update is a handful of operations.
    """

    def __init__(self, h: Hyperparameters, rows: int, plan: tuple[Step, ...],
                 device: torch.device = torch.device("cpu")):
        """Every row starts from the same values: a uniform in +-1/sqrt(D), b zero. `o` and `mlp`
        adapt a map from the block's normalised input to the residual stream."""
        table, D, R = roles(h), h.model_dim, h.ttt_lora_rank
        out = dict(q=table["wq"].shape[1], k=table["wk"].shape[1], v=table["wv"].shape[1],
                   o=D, mlp=D, head=h.vocab_size)
        self.h, self.S, self.names = h, len(plan), h.ttt_targets.split(",")
        self.shapes, start, rates = [], [], []
        seeded = torch.Generator().manual_seed(h.seed)
        for name in self.names:
            S = 1 if name == "head" else self.S
            a = (torch.rand(S, R, D, generator=seeded) * 2 - 1) * D**-0.5
            for factor in (a, torch.zeros(S, out[name], R)):
                self.shapes.append(factor.shape)
                start.append(factor.flatten())
        self.start = torch.cat(start).to(device)    # (P,)
        self.flat = self.start.repeat(rows, 1).requires_grad_()
        self.square = torch.zeros_like(self.flat)
        self.updates = torch.zeros(rows, 1, device=device)

    @torch.no_grad()
    def reset(self, rows: Tensor) -> None:
        """Back to the start, for these rows (n,)."""
        self.flat[rows] = self.start
        self.square[rows] = self.updates[rows] = 0

    @torch.no_grad()
    def step(self, loss: Tensor, rate: Tensor) -> None:
        """One step of Adam without a mean (arXiv 1412.6980, beta1 = 0) down `loss`, a sum over
        rows, at rates (B, 1)."""
        grad, = torch.autograd.grad(loss, self.flat)
        beta = self.h.ttt_beta2
        self.updates += 1
        self.square.mul_(beta).addcmul_(grad, grad, value=1 - beta)
        spread = (self.square / (1 - beta**self.updates)).sqrt_().add_(1e-8)
        self.flat.addcdiv_(grad * -rate, spread)

    def adapters(self, dtype: torch.dtype = torch.float32) -> list[dict[str, LoRA]]:
        """The adapters of each step in order; the last entry is the output head's."""
        B, scale = len(self.flat), self.h.ttt_lora_alpha / self.h.ttt_lora_rank
        factors = [
            part.view(B, *shape).unbind(1) for part, shape in zip(
                self.flat.to(dtype).split([s.numel() for s in self.shapes], 1), self.shapes)
        ]
        banks = {
            name: [LoRA(a, b, scale) for a, b in zip(*pair)]
            for name, pair in zip(self.names, zip(factors[::2], factors[1::2]))
        }
        head = {n: banks.pop(n)[0] for n in ["head"] if n in banks}
        return [{n: banks[n][i] for n in banks} for i in range(self.S)] + [head]


# ==================================================================================================
# 8. Optimisers
# Muon for the matrices, each rank the owner of a share of them; fused AdamW for the embedding and
# the small tensors; the schedule, a pure function of progress; the exponential moving average,
# which is what gets exported.
# ==================================================================================================
# Coefficients (a, b, c) of five Polar Express iterations X <- a X + (b A + c A^2) X, A = X X^T
# (arXiv 2505.16932).
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795,
                  15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(g: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, rows, cols) -> about the nearest semi-orthogonal matrices, products in `dtype`."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Stack:
    """Banks of one matrix shape, up to transposition, laid in a row of slices and shared out among
    the ranks.

    Slices of untransposed banks come first. Zero padding makes the shares equal; `gain` is max(1,
    rows / cols)^0.5.
    """

    def __init__(self, banks: Sequence[nn.Parameter], world: World):
        """Gives each rank a momentum for its own slices only."""
        self.world = world
        self.banks = sorted(banks, key=lambda p: p.size(-2) < p.size(-1))
        rows, cols = max(self.banks[0].shape[-2:]), min(self.banks[0].shape[-2:])
        self.count = sum(p.size(0) for p in self.banks)
        share = -(-self.count // world.size)
        upright = sum(p.size(0) for p in self.banks if p.size(-2) >= p.size(-1))
        first = world.rank * share
        self.upright = min(max(upright - first, 0), share)    # of this rank's slices
        like = self.banks[0]
        gains = torch.ones(share * world.size, 1, 1, device=like.device)
        gains[:upright] = max(1.0, rows / cols)**0.5
        self.gain = gains[first:first + share]
        self.momentum = torch.zeros(share, rows, cols, device=like.device)

    def collect(self, wire: torch.dtype) -> Tensor:
        """This rank's slices (share, rows, cols) of the mean gradient, sent as `wire`."""
        slices = [p.grad if p.size(-2) >= p.size(-1) else p.grad.mT for p in self.banks]
        spare = self.momentum.size(0) * self.world.size - self.count
        if spare:
            slices.append(slices[0].new_zeros(spare, *self.momentum.shape[1:]))
        rows = torch.cat(slices) if len(slices) > 1 else slices[0]
        return self.world.scatter_mean(rows.to(wire) if self.world.size > 1 else rows).float()

    def direction(self, g: Tensor, momentum: float, dtype: torch.dtype) -> Tensor:
        """Nesterov momentum, rows scaled to norm one (MuonEq-R), orthogonalised; (share, rows,
        cols)."""
        self.momentum.mul_(momentum).add_(g)
        u = g.add(self.momentum, alpha=momentum)
        u[:self.upright].div_(u[:self.upright].norm(dim=-1, keepdim=True).add_(1e-7))
        u[self.upright:].div_(u[self.upright:].norm(dim=-2, keepdim=True).add_(1e-7))
        return orthogonalise(u, dtype) * self.gain.to(dtype)

    def apply(self, update: Tensor, lr: float, decay: float) -> None:
        """p <- (1 - lr * decay) p - lr * update, with the slices of all ranks."""
        rows = self.world.gather(update)
        first = 0
        for p in self.banks:
            mine = rows[first:first + p.size(0)]
            first += p.size(0)
            p.mul_(1 - lr * decay).add_(mine if p.size(-2) >= p.size(-1) else mine.mT, alpha=-lr)


class Optimiser:
    """Every parameter's update: one call a step. Gradients are averaged over the ranks here and
    nowhere else.

    Matrices: reduce-scatter, orthogonalise the own share, all-gather (arXiv 2502.16982). The rest:
    all-reduce, AdamW.
    The global norm is clipped on the device; nothing waits for the host.
    """

    def __init__(self, model: GPT, world: World):
        """Groups the parameters by their role; every role belongs to exactly one group."""
        self.h, self.model, self.world = model.h, model, world
        table, bank = roles(self.h), model.bank
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for name, role in table.items():
            if role.optim == "muon":
                shapes.setdefault(tuple(sorted(role.shape[1:])), []).append(bank[name])
        self.stacks = [Stack(banks, world) for banks in shapes.values()]
        self.matrices = [p for stack in self.stacks for p in stack.banks]
        h = self.h
        groups = [
            dict(params=[bank[n] for n, r in table.items() if r.optim == kind],
                 lr=rate,
                 peak=rate,
                 weight_decay=decay)
            for kind, rate, decay in (("embed", h.tied_embed_lr, h.embed_wd),
                                      ("scalar", h.scalar_lr, h.adam_wd))
        ]
        self.adam = torch.optim.AdamW(groups, betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.others = [p for group in groups for p in group["params"]]
        self.wire = torch.bfloat16 if world.device.type == "cuda" else torch.float32

    def average_others(self) -> None:
        """Averages the gradients of the AdamW parameters in one flat collective."""
        if self.world.size > 1:
            flat = self.world.mean(torch.cat([p.grad.flatten() for p in self.others]))
            for p, g in zip(self.others, flat.split([p.numel() for p in self.others])):
                p.grad.copy_(g.view_as(p))

    @torch.no_grad()
    def step(self, factor: float, momentum: float) -> None:
        """One update with all rates times `factor`; clears the gradients."""
        shares = [stack.collect(self.wire) for stack in self.stacks]
        self.average_others()
        if self.h.grad_clip_norm:
            squares = self.world.sum(torch.stack([g.square().sum() for g in shares]).sum())
            total = (squares + sum(p.grad.square().sum() for p in self.others)).sqrt()
            clip = (self.h.grad_clip_norm / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*shares, *(p.grad for p in self.others)], clip)
        for stack, g in zip(self.stacks, shares):
            stack.apply(stack.direction(g, momentum, self.model.dtype), factor * self.h.matrix_lr,
                        self.h.muon_wd)
        for group in self.adam.param_groups:
            group["lr"] = factor * group["peak"]
        self.adam.step()
        self.model.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """A copy of everything that changes from step to step."""
        return dict(momenta=[s.momentum.clone() for s in self.stacks],
                    adam=copy.deepcopy(self.adam.state_dict()))

    def restore(self, state: dict[str, Any]) -> None:
        """Back to a state taken before, bit for bit."""
        for stack, momentum in zip(self.stacks, state["momenta"]):
            stack.momentum.copy_(momentum)
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))


def rate_factor(h: Hyperparameters, step: int, progress: float) -> float:
    """Share of the peak rate: linear warm-up by steps, one, then linear to MIN_LR over the last
    WARMDOWN_FRAC."""
    rise = min(1.0, (step + 1) / h.lr_warmup_steps) if h.lr_warmup_steps else 1.0
    left = (1 - progress) / h.warmdown_frac if h.warmdown_frac else 1.0
    return rise * max(h.min_lr, min(1.0, left))


def momentum_at(h: Hyperparameters, step: int) -> float:
    """Muon's momentum, rising linearly over the first steps."""
    done = min(1.0, step / h.muon_momentum_warmup_steps) if h.muon_momentum_warmup_steps else 1.0
    return h.muon_momentum_warmup_start + done * (h.muon_momentum - h.muon_momentum_warmup_start)


class EMA:
    """Exponential moving average of all banks, from the initial weights on, after every step."""

    def __init__(self, model: GPT):
        """Starts as a copy of the weights."""
        self.live = [p.detach() for p in model.bank.values()]
        self.mean = [p.clone() for p in self.live]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """mean <- decay * mean + (1 - decay) * weights."""
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def export(self) -> None:
        """Overwrites the weights with their average."""
        torch._foreach_copy_(self.live, self.mean)


# ==================================================================================================
# 9. Training
# The loop inside the clock. Ranks agree on the time by a device-side mean that the host reads steps
# later, so the loop never waits for the device. Nothing of a rehearsal survives it: weights,
# optimiser, average and loader are rewound.
# ==================================================================================================
class Clock:
    """Training seconds that all ranks agree on; `tick` is called once a step by every rank."""

    # steps between taking the time and reading the agreed value on GPUs, so that no step waits
    LAG = 2

    def __init__(self, world: World):
        """Starts when every rank is here."""
        world.wait()
        self.world, self.queue, self.begin_s = world, [], time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leaves out time that reads no training data, such as a validation score."""
        self.begin_s += seconds

    def tick(self) -> float:
        """The mean of the ranks' seconds: now on a CPU, LAG steps ago on GPUs."""
        now = torch.full((1, ),
                         time.perf_counter() - self.begin_s,
                         dtype=torch.float64,
                         device=self.world.device)
        self.world.mean(now)
        if self.world.device.type != "cuda":
            return now.item()
        host, event = torch.empty(1, dtype=torch.float64, pin_memory=True), torch.cuda.Event()
        host.copy_(now, non_blocking=True)
        event.record()
        self.queue.append((host, event))
        if len(self.queue) <= self.LAG:
            return 0.0
        host, event = self.queue.pop(0)
        event.synchronize()
        return float(host)

    def read_s(self) -> float:
        """Agreed seconds with the device's queue drained; ends a stage."""
        self.world.wait()
        now = torch.tensor([time.perf_counter() - self.begin_s],
                           dtype=torch.float64,
                           device=self.world.device)
        return self.world.mean(now).item()


@dataclass
class Trainer:
    """What a training run changes: model, optimiser, average, loader; and what it needs to run a
    step."""

    h: Hyperparameters
    world: World
    model: GPT
    loader: Loader
    optimiser: Optimiser
    ema: EMA

    @classmethod
    def of(cls, h: Hyperparameters, world: World, model: GPT, data: Dataset) -> Trainer:
        """Everything at step zero."""
        return cls(h, world, model, Loader(h, world, data.train), Optimiser(model, world),
                   EMA(model))

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step."""
        return accumulation(self.h, self.world)

    def step(self, number: int, progress: float, looped: bool) -> Tensor:
        """One optimiser step; returns this rank's mean loss in nats, still on the device."""
        plan, loss = depth_plan(self.h, looped), 0.0
        for _ in range(self.accumulation):
            batch = self.loader.next()
            nats = self.model.run_nats(batch.ids, batch.targets, plan,
                                       batch.docs).mean() / self.accumulation
            nats.backward()
            loss = loss + nats.detach()
        self.optimiser.step(rate_factor(self.h, number, progress), momentum_at(self.h, number))
        self.ema.update(self.h.ema_decay)
        return loss

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state."""
        return dict(weights=[p.detach().clone() for p in self.model.bank.values()],
                    mean=[t.clone() for t in self.ema.mean],
                    optimiser=self.optimiser.state(),
                    position=self.loader.position,
                    random=torch.get_rng_state())

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Back to the snapshot, bit for bit."""
        torch._foreach_copy_(list(self.model.bank.values()), state["weights"])
        torch._foreach_copy_(self.ema.mean, state["mean"])
        self.model.zero_grad(set_to_none=True)
        self.optimiser.restore(state["optimiser"])
        self.loader.position = state["position"]
        torch.set_rng_state(state["random"])


def accumulation(h: Hyperparameters, world: World) -> int:
    """Micro-batches per rank and step; raises `Refusal` where the batch does not divide into whole
    ones."""
    share = world.size * h.micro_batch_tokens
    if h.train_batch_tokens % share:
        raise Refusal(
            f"TRAIN_BATCH_TOKENS={h.train_batch_tokens} is no multiple of {world.size} ranks x "
            f"MICRO_BATCH_TOKENS={h.micro_batch_tokens}: change either, or the number of processes")
    return h.train_batch_tokens // share


class Trained(NamedTuple):
    """What the loop did: optimiser steps, and seconds of the clock."""

    steps: int
    seconds: float


def train(t: Trainer, reserve_s: float, log: Log,
          validate: Callable[[], str]) -> tuple[Trained, Clock]:
    """Trains until MAX_WALLCLOCK_SECONDS less the reserve, or ITERATIONS; the weights are then the
    average.

    Raises `Refusal` when the loss is not finite.
    """
    h, clock, step, looped = t.h, Clock(t.world), 0, False
    budget_s = h.max_wallclock_seconds - reserve_s if h.max_wallclock_seconds else math.inf
    if budget_s <= 0:
        raise Refusal(f"MAX_WALLCLOCK_SECONDS={h.max_wallclock_seconds:g} leaves no time to train: "
                      f"{reserve_s:.1f} s are kept for calibration")
    last = h.iterations or sys.maxsize
    ahead = 1 + (clock.LAG if t.world.device.type == "cuda" else 0)    # steps under way at the stop
    while True:
        elapsed_s = clock.tick()
        if step >= last or elapsed_s * (1 + ahead / max(step, 1)) >= budget_s:
            break
        if h.val_loss_every and step % h.val_loss_every == 0:
            watch = Stopwatch(t.world)
            log(f"step:{step}/{last} {validate()} train_time:{elapsed_s * 1e3:.0f}ms "
                f"step_avg:{elapsed_s * 1e3 / max(step, 1):.2f}ms")
            clock.pause(watch.read_s())
        progress = min(1.0, elapsed_s / budget_s if math.isfinite(budget_s) else step / last)
        if not looped and h.num_loops and progress >= h.enable_looping_at:
            looped = True
            log(f"recurrence:on step:{step} progress:{progress:.3f}")
        loss = t.step(step, progress, looped)
        step += 1
        if step % h.train_log_every == 0 or step <= 3:
            report_step(t, loss, step, last, clock.read_s(), log)
    seconds = clock.read_s()
    if step > 3 and step % h.train_log_every:
        report_step(t, loss, step, last, seconds, log)
    t.ema.export()
    return Trained(step, seconds), clock


def report_step(t: Trainer, loss: Tensor, step: int, last: int, seconds: float, log: Log) -> None:
    """One training line in the official form; raises `Refusal` when the loss is not finite."""
    value = float(t.world.mean(loss.clone()))
    if not math.isfinite(value):
        raise Refusal(
            f"the loss is {value} at step {step}: lower MATRIX_LR={t.h.matrix_lr}, "
            f"TIED_EMBED_LR={t.h.tied_embed_lr} or SCALAR_LR={t.h.scalar_lr}, or check the shards")
    log(f"step:{step}/{last} train_loss:{value:.4f} train_time:{seconds * 1e3:.0f}ms "
        f"step_avg:{seconds * 1e3 / step:.2f}ms "
        f"tok/s:{step * t.h.train_batch_tokens / max(seconds, 1e-9):.0f}")


# ==================================================================================================
# 10. Quantisation
# Second moments of the activations through the probe, then GPTQ of whole banks, all layers of a
# bank at once. Reads training data in `second_moments` only, inside the clock.
# ==================================================================================================
@torch.no_grad()
def second_moments(model: GPT, world: World, loader: Loader, batches: int) -> dict[str, Tensor]:
    """Sum of x x^T over tokens for every tap: tap -> (L | 1, n, n) fp64 on every rank, over
    `batches` of all ranks.

    A product of one batch is fp32; sums are fp64, so that they do not depend on the number of
    ranks.
    """
    sums: dict[tuple[str, int], Tensor] = {}

    def probe(tap: str, layer: int, x: Tensor) -> None:
        """Adds the moment of one activation; a layer that runs several times adds each of them."""
        rows = x.flatten(0, -2).float()
        moment = (rows.mT @ rows).double() * counted
        sums[tap, layer] = sums[tap, layer].add_(moment) if (tap, layer) in sums else moment

    for turn in range(-(-batches // world.size)):
        counted = turn * world.size + world.rank < batches    # spare ranks add nothing
        batch = loader.next()
        model.hidden(batch.ids, depth_plan(model.h, looped=True), batch.docs, probe=probe)
    taps = sorted({tap for tap, _ in sums})
    return {
        tap: torch.stack([world.sum(sums[tap, i]) for i in sorted(i for t, i in sums if t == tap)])
        for tap in taps
    }


class Coded(NamedTuple):
    """A quantised bank: weight = codes * step[..., None]."""

    codes: Tensor    # int16 (L, rows, cols)
    step: Tensor    # fp16 (L, rows)

    def decode(self) -> Tensor:
        """The weights, fp32 (L, rows, cols)."""
        return self.codes.float() * self.step.float()[..., None]


TRELLIS_TAPS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}


def trellis_next(states: int) -> np.ndarray:
    """The state that follows each state when bit 1 of the code is 0 or 1, (states, 2).

    The lowest bit of a state is the parity of the code. Ungerboeck's codes, as parity polynomials
    in octal (IEEE Trans. IT-28, 1982). Raises ValueError for a size that is not in TRELLIS_TAPS.
    """
    if states not in TRELLIS_TAPS:
        raise ValueError(f"a trellis of {states} states is unknown: one of {sorted(TRELLIS_TAPS)}")
    parity, upper = TRELLIS_TAPS[states]
    state, bit = np.arange(states)[:, None], np.arange(2)
    return state >> 1 ^ (state & 1) * (parity >> 1) ^ bit * (upper >> 1)


def trellis_before(states: int) -> np.ndarray:
    """Inverse of `trellis_next`: the state (2, states) from which bit 1 = 0 or 1 leads to each."""
    before = np.empty((2, states), np.int64)
    for bit, reached in enumerate(trellis_next(states).T):
        before[bit, reached] = np.arange(states)
    return before


def join_runs(cost: Tensor) -> tuple[Tensor, Tensor]:
    """First and last state (N, runs) of each run in the cheapest chain of runs from state 0.

    `cost` (last, first, N, runs) is the least error of a run between two states.
    """
    best, chosen = cost[:, 0, :, 0], []
    for run in cost.unbind(3)[1:]:
        best, meeting = (best + run).min(1)         # over the state in which two runs meet
        chosen.append(meeting)
    path = [best.argmin(0)]
    for meeting in reversed(chosen):
        path.append(meeting.gather(0, path[-1][None])[0])
    path = torch.stack([*path, torch.zeros_like(path[0])][::-1], 1)
    return path[:, :-1], path[:, 1:]


def search_runs(error: Tensor, before: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Viterbi's search of all runs at once: states (run, M) before each step, and bits (run, M).

    `error` (run, 2 * states, M) is the cost of each branch, bit 0 first; M = N * runs = `shape`.
    With more than one run a row, each is searched from every state at once, so joining is exact.
    """
    (run, _, many), states = error.shape, before.shape[1]
    starts = states if shape[1] > 1 else 1
    cost = torch.full((states, starts, many), 1e30, device=error.device)
    cost.diagonal().zero_()
    bits = torch.empty(run, *cost.shape, dtype=torch.bool, device=error.device)
    both, source = cost.new_empty(2 * states, starts, many), before.ravel()
    for branch, bit in zip(error[:, :, None].unbind(), bits.unbind()):
        torch.index_select(cost, 0, source, out=both).add_(branch)
        torch.lt(both[states:], both[:states], out=bit)
        torch.minimum(both[states:], both[:states], out=cost)
    first, last = join_runs(cost.unflatten(2, shape))
    if starts > 1:
        bits = bits.gather(2, first.reshape(1, 1, 1, many).expand(run, states, 1, many))
    bits = bits[:, :, 0]                                                    # (run, states, M)
    came = torch.where(bits, before[1, :, None], before[0, :, None])
    path = [last.reshape(1, many)]
    for back in came.flip(0).unbind():
        path.append(back.gather(0, path[-1]))
    path = torch.stack(path[::-1])                                          # (run + 1, 1, M)
    return path[:-1, 0], bits.gather(1, path[1:])[:, 0]


@torch.no_grad()
def trellis_codes(x: Tensor, states: int, weight: Tensor | None = None,
                  run: int | None = None) -> Tensor:
    """Codes (N, R) int16 of least squared error from targets (N, R), in lattice steps.

    Each row is a path from state 0. A state of parity p allows the codes 2k + p, and the lowest bit
    of k chooses the next state: a code costs the bits of a lattice twice as coarse, but lies 1.1 dB
    closer (8 states; Marcellin and Fischer, IEEE Trans. Comm. 38, 1990). `weight` (R,) or (N, R)
    multiplies the squared errors. Rows are searched in runs of `run` steps, which changes only the
    time: many starting states make short runs dear, one long run makes many small operations.
    """
    rows, length = x.shape
    run = min(run or (64 if states <= 16 else length), length)
    runs = -(-length // run)

    def cut(values: Tensor) -> Tensor:
        """Rows (N, R) as runs (run, N * runs), padded with zeros."""
        return F.pad(values, (0, runs * run - length)).reshape(-1, run).T.contiguous()

    x = x.float().clamp(-32_760, 32_760)
    weight = x.new_ones(()) if weight is None else weight.float()
    targets, weights = cut(x), cut(weight.expand_as(x))
    part = (targets[:, None] - torch.arange(4, device=x.device)[:, None]) * 0.25
    error = (part - (part + 0.5).floor()).square_() * weights[:, None]      # (run, 4, M)
    before = torch.as_tensor(trellis_before(states), device=x.device)
    residue = torch.cat([before[0] & 1, (before[1] & 1) + 2])               # of a branch's codes
    state, bit = search_runs(error.index_select(1, residue), before, (rows, runs))
    low = (state & 1) + 2 * bit
    codes = low + 4 * ((targets - low) * 0.25 + 0.5).floor()
    return codes.T.reshape(rows, -1)[:, :length].to(torch.int16)


def row_steps(w: Tensor, bits: int, sigmas: float) -> Tensor:
    """fp16 (L, rows): `sigmas` standard deviations of the row (0: its largest value) over the
    largest code."""
    reach = sigmas * w.std(-1) if sigmas else w.abs().amax(-1)
    return (reach / (2**(bits - 1) - 1)).clamp(2.0**-20, 60000.0).half()


def round_rows(w: Tensor, bits: int, sigmas: float) -> Coded:
    """Each weight (L, rows, cols) to its nearest code."""
    step, top = row_steps(w, bits, sigmas), 2**(bits - 1) - 1
    return Coded((w / step.float()[..., None]).round().clamp(-top, top).to(torch.int16), step)


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(L, n, n) -> order (L, n) of columns, most used input first, and upper U with U^T U = inverse
    moment in that order.

    `damping` times the mean diagonal is added, tenfold more each time Cholesky fails.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    H = moment.gather(1, order[:, :, None].expand_as(moment)).gather(
        2, order[:, None, :].expand_as(moment))
    mean = diagonal.mean(-1)[:, None]
    for attempt in range(6):
        extra = damping * 10**attempt * mean.clamp_min(1e-12) + torch.zeros_like(diagonal)
        factor, failed = torch.linalg.cholesky_ex(H + torch.diag_embed(extra))
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed.any():
                return order, upper.float()
    raise Refusal(
        f"GPTQ_DAMPING={damping}: a second moment is not positive definite at {damping * 1e5:g}; "
        "the activations hold NaN or infinity")


def nearest_codes(x: Tensor, top: int, states: int) -> Tensor:
    """Targets (L, rows) in steps -> codes: along the trellis of so many states, or each to its
    nearest.

    A trellis has half the step and no largest code; the coder escapes rare large ones.
    """
    return trellis_codes(x, states).float() if states else x.round().clamp_(-top, top)


def gptq(w: Tensor,
         moment: Tensor,
         bits: int,
         sigmas: float,
         damping: float,
         states: int = 0,
         block: int = 128) -> Coded:
    """Rounds a bank (L, rows, cols) column by column, pushing each error onto the columns not yet
    rounded.

    arXiv 2210.17323; `moment` (L, cols, cols). Within a block errors move at once, beyond it by one
    product. All rows of a column share one weight in the error, so a trellis search down the column
    followed by the same feedback is exact.
    """
    step, top = row_steps(w, bits, sigmas), 2**(bits - 1) - 1
    step = step / 2 if states else step
    scale = step.float()
    order, upper = inverse_factor(moment, damping)
    columns = order[:, None, :].expand_as(w)
    work, codes = w.gather(2, columns), torch.empty_like(w)
    for lo in range(0, w.size(2), block):
        hi = min(lo + block, w.size(2))
        part, errors = work[:, :, lo:hi].clone(), torch.empty_like(work[:, :, lo:hi])
        for j in range(hi - lo):
            q = nearest_codes(part[:, :, j] / scale, top, states)
            codes[:, :, lo + j] = q
            error = (part[:, :, j] - q * scale) / upper[:, lo + j, lo + j, None]
            errors[:, :, j] = error
            part[:, :, j + 1:] -= error[..., None] * upper[:, None, lo + j, lo + j + 1:hi]
        work[:, :, hi:] -= errors @ upper[:, lo:hi, hi:]
    return Coded(torch.empty_like(codes).scatter_(2, columns, codes).to(torch.int16), step)


@torch.no_grad()
def quantise(model: GPT, moments: Mapping[str, Tensor]) -> dict[str, Coded | Tensor]:
    """Every bank as it will be stored, in the order of the table: codes with steps, or fp16."""
    stored: dict[str, Coded | Tensor] = {}
    for name, role in roles(model.h).items():
        w = model.bank[name].detach()
        if role.bits == 16:
            stored[name] = w.half()
            continue
        w = w.reshape(-1, *w.shape[-2:])
        if role.tap:
            moment, damping = moments[role.tap], model.h.gptq_damping
            states = model.h.trellis_states
            stored[name] = gptq(w, moment, role.bits, role.sigmas, damping, states)
        else:
            stored[name] = round_rows(w, role.bits, role.sigmas)
    return stored


@torch.no_grad()
def load_stored(model: GPT, stored: Mapping[str, Coded | Tensor]) -> None:
    """Overwrites the model's weights with what the artifact holds."""
    for name, value in stored.items():
        w = value.decode() if isinstance(value, Coded) else value.float()
        model.bank[name].copy_(w.view(model.bank[name].shape))


# ==================================================================================================
# 11. Artifact
# magic | header length | header | streams | checksum. The header holds the model's knobs and the
# lengths of the streams; the streams follow the role table. Nothing is pickled: reading a hostile
# file can only fail. Then the code's bytes.
# ==================================================================================================
MAGIC = b"PGOLF\x01"
CHECKSUM_BYTES = 16
HEADER_LIMIT = 1 << 16
MODEL_KNOBS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult",
               "leaky_slope", "rope_dims", "rope_base", "qk_gain_init", "ln_scale", "xsa_last_n",
               "head_gate_scale", "smear_gate", "gate_window", "num_loops", "loop_start",
               "loop_end", "parallel_start_layer", "logit_softcap", "matrix_bits", "embed_bits",
               "trellis_states")


class Coder(NamedTuple):
    """One general-purpose compressor: its letter in the stream, and how to write and read bytes."""

    letter: bytes
    encode: Callable[[bytes, bool], bytes]    # (raw, quick) -> coded; quick is for rehearsals
    decode: Callable[[bytes, int], bytes]    # (coded, most bytes of output) -> raw


LZMA_RAW = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=0, lp=0, pb=0)]


def coders() -> dict[str, Coder]:
    """The compressors that this installation offers, by COMPRESSOR name."""
    found = dict(lzma=Coder(
        b"l", lambda raw, quick: lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA_RAW),
        lambda coded, limit: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_RAW).decompress(
            coded, limit)))
    if zstandard:
        found["zstd"] = Coder(
            b"z", lambda raw, quick: zstandard.ZstdCompressor(level=3
                                                              if quick else 22).compress(raw),
            lambda coded, limit: zstandard.ZstdDecompressor().stream_reader(coded).read(limit))
    if brotli:
        found["brotli"] = Coder(
            b"b", lambda raw, quick: brotli.compress(raw, quality=3 if quick else 11, lgwin=24),
            lambda coded, limit: brotli.Decompressor().process(coded, output_buffer_limit=limit))
    return found


def squeeze(raw: bytes, compressor: str, quick: bool) -> bytes:
    """The coded bytes behind the letter of their coder; any name but a coder's tries all and keeps
    the shortest."""
    known = coders()
    chosen = [known[compressor]] if compressor in known else known.values()
    return min((c.letter + c.encode(raw, quick) for c in chosen), key=len)


def expand(coded: bytes, size: int) -> bytes:
    """The `size` bytes that `squeeze` was given; raises `Refusal` for anything else."""
    for name, coder in coders().items():
        if coded[:1] == coder.letter:
            try:
                raw = coder.decode(coded[1:], size + 1)
            # each library has its own error types; all mean a damaged stream
            except Exception as error:
                raise Refusal(f"artifact: a {name} stream is damaged ({error})") from None
            if len(raw) != size:
                raise Refusal(
                    f"artifact: a {name} stream holds {len(raw)} bytes, {size} were expected")
            return raw
    raise Refusal(
        f"artifact: a stream needs coder {coded[:1]!r}, and the package for it is not installed "
        f"(here: {', '.join(coders())})")


def shuffled(numbers: np.ndarray) -> bytes:
    """16-bit numbers as all low bytes, then all high bytes: those compress better apart."""
    flat = np.ascontiguousarray(numbers).reshape(-1)
    return np.ascontiguousarray(flat.view(np.uint8).reshape(-1, 2).T).tobytes()


def unshuffled(raw: bytes, dtype: type) -> np.ndarray:
    """The inverse of `shuffled`."""
    planes = np.frombuffer(raw, np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)


# A code is Gaussian given the scale of its column, and no other context was worth 0.02%. So each
# code is drawn from a static table chosen by the sizes its column has shown so far: the scale is
# learned backwards and costs no side information. Decoding uses integers alone, so that every
# platform reads the same numbers.
RANS_LANES = 512        # lanes, one per column of a strip, run through all tensors as one chain
RANS_BITS = 15          # probabilities are multiples of 2^-15
RANS_FLOOR = 1 << 16    # a lane's 32-bit state stays at or above this by taking in 16-bit words
FIRST_ESCAPE, LARGEST_SYMBOL = 124, 127     # a larger |code| goes as 124..127 and an excess
SCALE_ONE = 1024        # a mean |symbol| of 1 in integer arithmetic
RUNGS = np.concatenate([np.arange(8), *(np.arange(8, 16) << octave for octave in range(24))])


class ColumnModel(NamedTuple):
    """What the decoder is told of one tensor: how scales are learned, and a table per scale.

    `mean` is the mean |symbol| of the tensor, in units of 1 / SCALE_ONE like all scales. The prior
    of a column counts as 2^`trust` rows and takes `mix` quarters from the same column of the layer
    before. `tables` (K, top + 1) uint8 hold the rung of the weight of each |symbol|, the first
    table for the rung `lowest` of the scale.
    """
    mean: int
    trust: int
    mix: int
    lowest: int
    tables: np.ndarray

    def pack(self) -> bytes:
        """Bytes that zlib shrinks well: the numbers, then each table's difference to the last."""
        steps = np.diff(self.tables, axis=0, prepend=np.uint8(0))
        return struct.pack("<IBBBBB", *self[:4], *self.tables.shape) + steps.tobytes()


def rung(value: np.ndarray) -> np.ndarray:
    """Index of the largest of RUNGS (0 to 7, then 8 an octave) that is not above `value`."""
    return np.searchsorted(RUNGS, value, "right") - 1


def refreshes(rows: int) -> np.ndarray:
    """Rows at which scales are looked at anew: each of the first 16, then every 1/8 further on."""
    starts = [0]
    while (row := starts[-1] + max(1, starts[-1] >> 3)) < rows:
        starts.append(row)
    return np.array(starts)


def stretches(rows: int) -> np.ndarray:
    """Number of rows from each refresh to the next."""
    return np.diff(refreshes(rows), append=rows)


def prior_scale(previous: np.ndarray, mean: int, mix: int) -> np.ndarray:
    """Scale expected of a column before its first row, from its scale in the previous layer."""
    return (mix * previous + (4 - mix) * mean) >> 2


def running_scale(total: np.ndarray, row, prior: np.ndarray, trust: int) -> np.ndarray:
    """Scale of columns whose first `row` symbols add up to `total` in size."""
    return (total * SCALE_ONE + (prior << trust)) // (row + (1 << trust))


def column_scales(sizes: np.ndarray, mean: int, trust: int, mix: int) -> np.ndarray:
    """Scales (L, refreshes, C) that the decoder will know of |symbols| (L, R, C)."""
    starts = refreshes(sizes.shape[1])
    sums = np.add.reduceat(sizes, starts, axis=1, dtype=np.int64)
    after = sums.cumsum(1)
    reached = after[:, -1:] * SCALE_ONE // sizes.shape[1]
    previous = np.concatenate([np.full_like(reached[:1], mean), reached[:-1]])
    return running_scale(after - sums, starts[:, None], prior_scale(previous, mean, mix), trust)


def learning_rate(sizes: np.ndarray, mean: int) -> tuple[int, int]:
    """The (trust, mix) with which scales s predict |symbols| (L, R, C) best: log s + |q| / s."""
    layers, rows, columns = sizes.shape
    sample, lengths = sizes[:, :, ::-(-columns // 48)], stretches(rows)[:, None]
    sums = np.add.reduceat(sample, refreshes(rows), axis=1, dtype=np.float32) * SCALE_ONE

    def nats(trust: int, mix: int) -> float:
        """Cost of the sampled columns, up to a constant."""
        scale = column_scales(sample, mean, trust, mix).astype(np.float32) + 1
        return float((lengths * np.log(scale) + sums / scale).sum())

    trust = min(range(8), key=lambda t: nats(t, 2 if layers > 1 else 0))
    mix = min(range(5), key=lambda m: nats(trust, m)) if layers > 1 else 0
    return min(range(8), key=lambda t: nats(t, mix)), mix


def fit_columns(symbols: np.ndarray) -> tuple[ColumnModel, np.ndarray, np.ndarray]:
    """The model of symbols (L, R, C), tables in use (L, refreshes, C), and counts (K, top + 1)."""
    sizes = np.abs(symbols).astype(np.uint8)
    mean = int(sizes.sum(dtype=np.int64)) * SCALE_ONE // sizes.size
    trust, mix = learning_rate(sizes, mean)
    used = rung(column_scales(sizes, mean, trust, mix))
    # A table used by less than a thousandth costs more than it earns: its neighbour serves.
    share = np.bincount(used.ravel()).cumsum() / used.size
    lowest, highest = (int(np.searchsorted(share, edge)) for edge in (0.0005, 0.9995))
    used = (used.clip(lowest, highest) - lowest).astype(np.int32)
    lengths, width = stretches(sizes.shape[1]), int(sizes.max()) + 1
    counts = np.zeros((highest - lowest + 1) * width, np.int64)
    for table, size in zip(used, sizes):
        cell = (table * width).repeat(lengths, 0) + size
        counts += np.bincount(cell.ravel(), minlength=counts.size)
    counts = counts.reshape(-1, width)
    weights = counts * (2 << RANS_BITS) // counts.max(1, keepdims=True).clip(1)
    weights[:, 1:] //= 2                        # a size counts for both signs
    tables = rung(np.maximum(weights, counts > 0)).astype(np.uint8)
    return ColumnModel(mean, trust, mix, lowest, tables), used, counts


def frequencies(tables: np.ndarray, states: int) -> np.ndarray:
    """Frequencies (K, P, 2 top + 1), adding up to 2^RANS_BITS, of the symbols -top..top.

    P = 2 with a trellis: then table p holds only symbols of parity p.
    """
    top = tables.shape[1] - 1
    symbol = np.arange(-top, top + 1)
    parity = np.array([[0], [1]]) if states else symbol & 1
    weight = RUNGS[tables[:, np.abs(symbol)]][:, None] * (symbol & 1 == parity)
    weight[~weight.any(2), top] = 1             # a table that nothing uses must still be one
    spare = (1 << RANS_BITS) - np.count_nonzero(weight, axis=2)[..., None]
    share = (weight > 0) + weight * spare // weight.sum(2, keepdims=True)
    most = share.argmax(2)[..., None]
    rest = (1 << RANS_BITS) - share.sum(2, keepdims=True)
    np.put_along_axis(share, most, np.take_along_axis(share, most, 2) + rest, 2)
    return share


def fold(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols equal to int16 codes modulo 4, and the uint16 excess of each large one, in order."""
    size = np.abs(codes.astype(np.int32))
    symbols, large = codes.copy(), size >= FIRST_ESCAPE
    beyond = size[large] - FIRST_ESCAPE
    symbols[large] = (FIRST_ESCAPE + (beyond & 3)) * np.sign(codes[large])
    return symbols, (beyond >> 2).astype("<u2")


def unfold(symbols: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Undo `fold` in place; returns the excesses left over, raises ValueError if there are none."""
    large = np.abs(symbols) >= FIRST_ESCAPE
    used, excess = np.split(excess, [np.count_nonzero(large)])
    if len(used) < np.count_nonzero(large):
        raise ValueError("coded weights: an escaped code has no excess, the stream is damaged")
    grown = symbols[large] + 4 * used.astype(np.int32) * np.sign(symbols[large])
    symbols[large] = grown.astype(np.int16)
    return excess


def check_trellis(codes: np.ndarray, states: int) -> None:
    """Raise ValueError unless parities of codes (L, R, C) follow the trellis down each column."""
    follow = trellis_next(states).astype(np.uint8)
    state = np.zeros_like(codes[:, 0], np.uint8)
    for row in range(codes.shape[1]):
        if ((codes[:, row] ^ state) & 1).any():
            raise ValueError(f"codes {codes.shape} leave the trellis of {states} states, row {row}")
        state = follow[state, codes[:, row] >> 1 & 1]


def strips(columns: int) -> list[slice]:
    """The columns that run side by side, at most RANS_LANES at once."""
    lefts = range(0, columns, RANS_LANES)
    return [slice(left, min(left + RANS_LANES, columns)) for left in lefts]


def push_rows(lanes: np.ndarray, frequency: np.ndarray, start: np.ndarray, words: list) -> None:
    """Code rows (R, lanes) of uint32 frequencies and starts, last row first, giving off words.

    A state x becomes x // f * 2^RANS_BITS + x % f + start (rANS, arXiv 1311.2540 and 1402.3392).
    """
    for share, begin in zip(frequency[::-1], start[::-1]):
        full = (lanes >> (32 - RANS_BITS) >= share).nonzero()[0]
        words.append(lanes[full].astype(np.uint16))         # the low half
        lanes[full] >>= 16
        lanes += lanes // share * ((1 << RANS_BITS) - share) + begin


def encode_codes(tensors: list[np.ndarray], trellis: int = 0) -> bytes:
    """Code int16 tensors (L, R, C), on a trellis of `trellis` states (0: none).

    The state is 0 at the top of each column and gives each code's parity, which costs nothing then.
    Layout: two uint32 lengths, zlib of the models, zlib of the excesses, the lanes' final states in
    uint32, the words in uint16. Raises ValueError for codes that leave the trellis.
    """
    states = trellis
    folded = [fold(codes) for codes in tensors if codes.size]
    width = min(RANS_LANES, max((symbols.shape[2] for symbols, _ in folded), default=0))
    lanes, words, models = np.full(width, RANS_FLOOR, np.uint32), [np.zeros(0, np.uint16)], []
    # A decoder reads in the reverse order of coding, so all goes backwards here.
    for symbols, _ in reversed(folded):
        if states:
            check_trellis(symbols, states)
        model, used, _ = fit_columns(symbols)
        models.append(model.pack())
        share = frequencies(model.tables, states)
        (parities, letters), lengths = share.shape[1:], stretches(symbols.shape[1])
        start = (share.cumsum(2) - share).ravel().astype(np.uint32)
        share = share.ravel().astype(np.uint32)
        for strip in reversed(strips(symbols.shape[2])):
            for layer, table in zip(symbols[::-1, :, strip], used[::-1, :, strip]):
                cell = (table * (parities * letters) + letters // 2).repeat(lengths, 0) + layer
                cell += (layer & (parities - 1)) * letters
                push_rows(lanes[:layer.shape[1]], share[cell], start[cell], words)
    side = zlib.compress(b"".join(reversed(models)), 9)
    excess = zlib.compress(b"".join(excess.tobytes() for _, excess in folded), 9)
    return b"".join([struct.pack("<II", len(side), len(excess)), side, excess,
                     lanes.astype("<u4").tobytes(),
                     np.concatenate(words[::-1]).astype("<u2").tobytes()])


def code_bits(tensors: list[np.ndarray], trellis: int = 0) -> np.ndarray:
    """Bits (tensors,) that `encode_codes` will spend on each tensor, to 0.1%, without coding."""
    states, bits = trellis, np.zeros(len(tensors))
    for index, codes in enumerate(tensors):
        if codes.size:
            symbols, excess = fold(codes)
            model, _, counts = fit_columns(symbols)
            share = frequencies(model.tables, states).max(1)[:, model.tables.shape[1] - 1:]
            side = len(zlib.compress(model.pack(), 9)) + len(zlib.compress(excess.tobytes(), 1))
            bits[index] = (counts * (RANS_BITS - np.log2(share.clip(1)))).sum() + 8 * side
    return bits


class LaneReader:
    """The lanes of a decoder: their states, the words to come, and the place reached in them."""

    def __init__(self, states: np.ndarray, words: np.ndarray):
        """Start from the encoder's final states (lanes,) uint32 and its words, uint16."""
        self.states, self.words, self.at = states, words, 0

    def pull(self, table: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Slots that the first lanes read, each from the 2^RANS_BITS `cells` at its `table`.

        A cell is frequency << 16 | (slot - start); raises ValueError when the words run out.
        """
        lanes = self.states[:len(table)]
        slot = table + (lanes & ((1 << RANS_BITS) - 1))
        cell = cells.take(slot)
        lanes >>= RANS_BITS
        lanes *= cell >> 16
        lanes += cell & 0xFFFF
        low = (lanes < RANS_FLOOR).nonzero()[0]
        read = self.words[self.at:self.at + len(low)]
        if len(read) < len(low):
            raise ValueError("coded weights: the stream ends too early, it is damaged")
        lanes[low] = lanes[low] << 16 | read
        self.at += len(low)
        return slot


def decode_layer(reader: LaneReader, out: np.ndarray, model: ColumnModel, previous: np.ndarray,
                 lookup: tuple[np.ndarray, np.ndarray], states: int) -> np.ndarray:
    """Fill `out` (R, lanes) with one layer's symbols; returns the scales of its whole columns.

    `previous` are those of the layer before; `lookup` holds a cell and a symbol for every slot.
    """
    (cells, letters), starts = lookup, refreshes(len(out)).tolist()
    total, state = np.zeros((2, out.shape[1]), np.int64)
    follow = trellis_next(states).repeat(2, 1).ravel() if states else None
    prior = prior_scale(previous, model.mean, model.mix)
    for first, last in zip(starts, [*starts[1:], len(out)]):
        scale = rung(running_scale(total, first, prior, model.trust))
        table = (scale - model.lowest).clip(0, len(model.tables) - 1) << RANS_BITS
        if states:
            table <<= 1
        for row in range(first, last):
            if states:
                slot = reader.pull(table + ((state & 1) << RANS_BITS), cells)
                out[row] = symbol = letters.take(slot)
                state = follow.take(state << 2 | symbol & 3)
            else:
                out[row] = letters.take(reader.pull(table, cells))
        total += np.abs(out[first:last]).sum(0, dtype=np.int64)
    return total * SCALE_ONE // len(out)


def decode_tensor(reader: LaneReader, codes: np.ndarray, model: ColumnModel, states: int) -> None:
    """Fill `codes` (L, R, C) with the symbols of one tensor, the next that the reader comes to."""
    share = frequencies(model.tables, states)
    top, share = share.shape[2] // 2, share.ravel()
    place = np.arange(share.sum()) - (share.cumsum() - share).repeat(share)
    cells = ((share << 16).repeat(share) | place).astype(np.uint32)
    letters = np.arange(-top, top + 1, dtype=np.int8)
    letters = np.tile(letters, len(share) // len(letters)).repeat(share)
    for strip in strips(codes.shape[2]):
        scale = np.int64(model.mean)
        for layer in codes[:, :, strip]:
            scale = decode_layer(reader, layer, model, scale, (cells, letters), states)


def read_models(packed: bytes, count: int) -> list[ColumnModel]:
    """The models of `count` tensors; raises ValueError unless `packed` holds just these."""
    models, size = [], struct.calcsize("<IBBBBB")
    for _ in range(count):
        if len(packed) < size:
            raise ValueError("coded weights: the column models are cut short")
        *head, kinds, width = struct.unpack_from("<IBBBBB", packed)
        end = size + kinds * width
        tables, packed = np.frombuffer(packed[size:end], np.uint8), packed[end:]
        if not 0 < kinds * width == tables.size or width > LARGEST_SYMBOL + 1 or max(head[1:3]) > 8:
            raise ValueError(f"coded weights: column model {head}, {kinds} x {width} is impossible")
        tables = np.add.accumulate(tables.reshape(kinds, width), 0, np.uint8)
        models.append(ColumnModel(*head, tables.clip(0, len(RUNGS) - 1)))
    if packed:
        raise ValueError("coded weights: bytes are left over after the last column model")
    return models


def inflate(packed: bytes, limit: int) -> bytes:
    """What zlib packed, if that is at most `limit` bytes, else ValueError without allocating it."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(packed, limit + 1)
    except zlib.error as error:
        raise ValueError(f"coded weights: a packed part is damaged ({error})") from error
    if not stream.eof or stream.unused_data or len(plain) > limit:
        raise ValueError(f"coded weights: a packed part is cut short or exceeds {limit} bytes")
    return plain


def decode_codes(blob: bytes, shapes: list[tuple[int, int, int]],
                 trellis: int = 0) -> list[np.ndarray]:
    """The tensors (L, R, C) int16 given to `encode_codes`; raises ValueError for a damaged blob."""
    states = trellis
    tensors = [np.zeros(shape, np.int16) for shape in shapes]
    filled = [codes for codes in tensors if codes.size]
    width = min(RANS_LANES, max((codes.shape[2] for codes in filled), default=0))
    sizes = struct.unpack_from("<II", blob) if len(blob) >= 8 else (0, 0)
    ends = np.cumsum([8, *sizes, 4 * width]).tolist()
    if len(blob) < ends[-1] or (len(blob) - ends[-1]) % 2:
        raise ValueError(f"coded weights: {len(blob)} bytes do not match the parts they announce")
    side, excess, lanes, words = (blob[a:b] for a, b in zip(ends, [*ends[1:], len(blob)]))
    models = read_models(inflate(side, 1 << 16 << len(filled).bit_length()), len(filled))
    excess = np.frombuffer(inflate(excess, 2 * sum(codes.size for codes in filled)), "<u2")
    reader = LaneReader(np.frombuffer(lanes, "<u4").astype(np.uint32), np.frombuffer(words, "<u2"))
    for codes, model in zip(filled, models):
        decode_tensor(reader, codes, model, states)
        excess = unfold(codes, excess)
    if reader.at < len(reader.words) or len(excess) or (reader.states != RANS_FLOOR).any():
        raise ValueError("coded weights: the stream does not end with the weights, it is damaged")
    return tensors


def coded_roles(h: Hyperparameters) -> dict[str, tuple[int, int, int]]:
    """(L | 1, rows, cols) of each bank that is stored as codes; those on the trellis come first."""
    table = {n: r for n, r in roles(h).items() if r.bits < 16}
    ordered = sorted(table.items(), key=lambda item: not item[1].tap)
    return {n: (math.prod(r.shape[:-2]), *r.shape[-2:]) for n, r in ordered}


def pack_codes(h: Hyperparameters, codes: Mapping[str, np.ndarray], coder: str,
               quick: bool) -> list[bytes]:
    """Streams of the codes: two of rANS (on the trellis and off it), or one per bank, transposed.
    """
    if coder != "rans":
        turned = (c.swapaxes(1, 2) for c in codes.values())
        return [squeeze(shuffled(c), coder, quick) for c in turned]
    on = [codes[n] for n in codes if roles(h)[n].tap]
    off = [codes[n] for n in codes if not roles(h)[n].tap]
    return [encode_codes(on, h.trellis_states), encode_codes(off)]


def unpack_codes(h: Hyperparameters, streams: Sequence[bytes], coder: str) -> list[np.ndarray]:
    """int16 codes (L, rows, cols) in the order of `coded_roles`; the inverse of `pack_codes`."""
    shapes = coded_roles(h)
    if coder == "rans":
        on = [shape for n, shape in shapes.items() if roles(h)[n].tap]
        try:
            return decode_codes(streams[0], on, h.trellis_states) + decode_codes(
                streams[1],
                list(shapes.values())[len(on):])
        except ValueError as error:
            raise Refusal(f"artifact: {error}") from None
    return [
        unshuffled(expand(s, 2 * math.prod(shape)), np.int16).reshape(
            shape[0], shape[2], shape[1]).swapaxes(1, 2).copy()
        for s, shape in zip(streams, shapes.values())
    ]


def pack(h: Hyperparameters,
         stored: Mapping[str, Coded | Tensor],
         quick: bool = False) -> tuple[bytes, dict[str, int]]:
    """(artifact, bytes by part). `unpack` gives back exactly `stored`."""
    codes = {n: stored[n].codes.cpu().numpy() for n in coded_roles(h)}
    tried = ["rans", "any"] if h.compressor == "auto" else [h.compressor]
    coder, streams = min(((c, pack_codes(h, codes, c, quick)) for c in tried),
                         key=lambda choice: sum(map(len, choice[1])))
    halves = lambda tensors: squeeze(
        shuffled(np.concatenate([t.cpu().numpy().reshape(-1) for t in tensors])), "any", quick)
    streams.append(halves(v.step for v in stored.values() if isinstance(v, Coded)))
    streams.append(halves(v for v in stored.values() if not isinstance(v, Coded)))
    header = lzma.compress(
        json.dumps(dict(knobs=h.changed() | {n: getattr(h, n) for n in MODEL_KNOBS},
                        coder=coder, streams=[len(s) for s in streams]),
                   separators=(",", ":")).encode(), lzma.FORMAT_ALONE)
    body = MAGIC + struct.pack("<I", len(header)) + header + b"".join(streams)
    if coder == "rans":    # one chain of lanes runs through all banks: shares are its own estimate
        on = [n for n in codes if roles(h)[n].tap]
        bits = code_bits([codes[n] for n in on], h.trellis_states)
        ledger = dict(zip(on, (bits / 8).round().astype(int).tolist()))
        ledger["chain"] = len(streams[0]) - sum(ledger.values())
        ledger["gates"] = len(streams[1])
    else:
        ledger = dict(zip(codes, map(len, streams)))
    ledger |= dict(steps=len(streams[-2]), fp16=len(streams[-1]),
                   header=len(body) - sum(map(len, streams)) + CHECKSUM_BYTES)
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES], ledger


def unpack(blob: bytes,
           place: str = "artifact") -> tuple[Hyperparameters, dict[str, Coded | Tensor]]:
    """(the run's knobs, stored banks) of an artifact. Checks the sum before anything is decoded,
    sizes before memory is taken.

    Raises `Refusal` for whatever is wrong with it.
    """
    h, coder, lengths, first = read_header(blob, place)
    shapes = coded_roles(h)
    if len(lengths) != (2 if coder == "rans" else len(shapes)) + 2 or (
            first + sum(lengths) + CHECKSUM_BYTES != len(blob)):
        raise Refusal(f"{place}: the lengths of its streams do not add up to its {len(blob)} bytes")
    ends = np.cumsum([first, *lengths]).tolist()
    streams = [blob[a:b] for a, b in zip(ends, ends[1:])]
    codes = dict(zip(shapes, unpack_codes(h, streams[:-2], coder)))
    steps = sum(math.prod(shape[:2]) for shape in shapes.values())
    plain = sum(math.prod(r.shape) for r in roles(h).values() if r.bits == 16)
    steps, plain = (torch.from_numpy(unshuffled(expand(s, 2 * n), np.float16))
                    for s, n in ((streams[-2], steps), (streams[-1], plain)))
    banks: dict[str, Coded | Tensor] = {}
    for name, role in roles(h).items():
        if role.bits == 16:
            values, plain = plain.tensor_split([math.prod(role.shape)])
            banks[name] = values.view(role.shape)
        else:
            values, steps = steps.tensor_split([math.prod(shapes[name][:2])])
            banks[name] = Coded(torch.from_numpy(codes[name]), values.view(shapes[name][:2]))
    return h, banks


def read_header(blob: bytes, place: str) -> tuple[Hyperparameters, str, list[int], int]:
    """(knobs, coder, lengths of the streams, place of the first one); raises `Refusal`, having
    taken no memory."""
    if len(blob) < len(MAGIC) + 4 + CHECKSUM_BYTES or blob[:len(MAGIC)] != MAGIC:
        raise Refusal(
            f"{place}: not an artifact of this script (starts with {blob[:6]!r}, not {MAGIC!r})"
        )
    if hashlib.sha256(blob[:-CHECKSUM_BYTES]).digest()[:CHECKSUM_BYTES] != blob[-CHECKSUM_BYTES:]:
        raise Refusal(f"{place}: damaged, its checksum does not match its {len(blob)} bytes")
    (length, ), first = struct.unpack_from("<I", blob, len(MAGIC)), len(MAGIC) + 4
    if length > min(HEADER_LIMIT, len(blob) - first):
        raise Refusal(f"{place}: its header claims {length} bytes")
    try:
        raw = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=1 << 26).decompress(
            blob[first:first + length], HEADER_LIMIT)
        header = json.loads(raw)
        knobs, lengths = header["knobs"], header["streams"]
        kinds = {f.name: f.type for f in fields(Hyperparameters)}
        typed = type(knobs) is dict and all(type(v).__name__ == kinds[n]
                    for n, v in knobs.items()) and set(MODEL_KNOBS) <= set(knobs)
        coder = header["coder"]
        if not typed or not all(type(n) is int and n > 0 for n in lengths):
            raise ValueError("a value is missing or has the wrong type")
        h = Hyperparameters(**knobs)
    except (lzma.LZMAError, ValueError, KeyError, TypeError, RecursionError, Refusal) as error:
        raise Refusal(f"{place}: its header cannot be used ({error})") from None
    sizes = h.num_layers * (1 + h.num_loops) < 4096
    if not sizes or sum(math.prod(r.shape)
                        for r in roles(h).values()) > 100 * len(blob) + 10_000_000:
        raise Refusal(
            f"{place}: its header claims a model far too large for a file of {len(blob)} bytes")
    return h, coder, lengths, first + length


# The packed script is one Python file: a marker line, a string literal of raw LZMA bytes, and
# statements that unpack the text, show it to `linecache` (tracebacks and Triton read sources
# there) and run it in place.
PACKED = b"# coding:latin-1 (packed: LZMA of the minified script; the last two lines run it)\n"
UNPACKER = (
    b"import linecache,lzma\n_=lzma.decompress(%b.encode('latin-1')).decode()\n"
    b"linecache.cache[__file__+'*']=len(_),None,[l+'\\n'for l in _.split('\\n')],__file__+'*'\n"
    b"exec(compile(_,__file__+'*','exec'))\n")
KEPT = ["main", "Hyperparameters", "GPT"]    # what importers of the file use


def shipped(source: str) -> str:
    """`source` without the regions between `# >>> not packed` and `# <<< not packed` lines.

    Raises Refusal where a fence does not pair with another one."""
    kept, opened = [], 0
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        fence = re.match(r"# (>>>|<<<) not packed", line)
        if fence and (fence[1] == ">>>") == bool(opened):
            raise Refusal(f"line {number}: '# {fence[1]} not packed' does not pair with a fence")
        if fence:
            opened = 0 if opened else number
        elif not opened:
            kept.append(line)
    if opened:
        raise Refusal(f"line {opened}: '# >>> not packed' is never closed by '# <<< not packed'")
    return "".join(kept)


class Undocumented(ast.NodeTransformer):
    """Removes docstrings, and the annotations of undecorated functions.

    A decorator may read annotations (Triton looks for constexpr, torch.library infers a schema),
    and the fields of dataclasses and NamedTuples are annotations: those stay."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """The function without docstring, and without annotations that no decorator can see."""
        if not node.decorator_list:
            a, node.returns = node.args, None
            stars = filter(None, (a.vararg, a.kwarg))
            for parameter in (*a.posonlyargs, *a.args, *a.kwonlyargs, *stars):
                parameter.annotation = None
        return self.undocument(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def undocument(self, node: ast.AST) -> ast.AST:
        """The function or class without its docstring, children included."""
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    visit_ClassDef = undocument


def minified(source: str) -> str:
    """The text that the packed script runs: no comments, docstrings or long names of ours.

    Attributes, keyword arguments, parameters, classes, imports and KEPT keep their names. Literals
    and builtins are not hoisted: an alias `A=int` would reach `Field.type`, and `A=None` or
    `A=range` would break a Triton kernel. The module's docstring stays where `__doc__` is read.
    Warns, and returns longer text, where python_minifier is not installed."""
    tree = Undocumented().visit(ast.parse(source))
    nodes = [*ast.walk(tree)]
    if ast.get_docstring(tree) and "__doc__" not in {getattr(node, "id", "") for node in nodes}:
        tree.body = tree.body[1:]
    text = ast.unparse(ast.fix_missing_locations(tree))
    if python_minifier is None:
        warnings.warn("python_minifier is not installed: the packed script keeps its long names")
        return text
    imports = [n.asname or n.name.split(".")[0] for n in nodes if isinstance(n, ast.alias)]
    classes = [n.name for n in nodes if isinstance(n, ast.ClassDef)]
    parameters = {n.arg for n in nodes if isinstance(n, ast.arg)} - {"self", "cls"}
    return python_minifier.minify(text,
                                  rename_globals=True,
                                  hoist_literals=False,
                                  convert_posargs_to_args=False,
                                  preserve_globals=[*KEPT, *classes, *imports, *dir(builtins)],
                                  preserve_locals=sorted(parameters),
                                  remove_annotations=python_minifier.RemoveAnnotationsOptions(
                                      remove_variable_annotations=True,
                                      remove_return_annotations=False,
                                      remove_argument_annotations=False,
                                      remove_class_attribute_annotations=False))


def literal(data: bytes) -> bytes:
    """The shortest string literal of a latin-1 file whose text encodes to `data`.

    Between triple quotes only NUL, carriage return, backslash and closing quotes need escapes."""
    text = data.replace(b"\\", b"\\\\").replace(b"\r", b"\\r")
    text = re.sub(rb"\0(?=[0-7])", rb"\\000", text).replace(b"\0", b"\\0")
    quoted = (3 * q + re.sub(q + b"(?=" + 2 * q + rb"|\Z)", rb"\\\g<0>", text) + 3 * q
              for q in (b"'", b'"'))
    return min(quoted, key=len)


def pack_source(source: str) -> bytes:
    """The packed script: a Python file that behaves like `source` without its unpacked regions.

    Equal sources give equal bytes under equal Pythons; the file needs the Python version that
    packed it, or a later one. Raises Refusal for unpaired fences, SyntaxError for broken text."""
    text = minified(shipped(source)).encode()
    coder = dict(id=lzma.FILTER_LZMA1,
                 preset=9 | lzma.PRESET_EXTREME,
                 lp=0,
                 pb=0,
                 depth=1000,
                 dict_size=1 << max(12,
                                    len(text).bit_length()))
    grid = itertools.product(range(5), (32, 64, 273), (lzma.MF_BT3, lzma.MF_BT4))
    literals = [
        literal(
            lzma.compress(text,
                          lzma.FORMAT_ALONE,
                          filters=[coder | dict(lc=context, nice_len=length, mf=finder)]))
        for context, length, finder in grid
    ]
    return PACKED + UNPACKER % min(literals, key=len)


def running_source(path: str | Path) -> tuple[str | None, bytes]:
    """(readable text, packed bytes) of the script at `path`.

    The text is None where that script is itself packed: its own bytes are then what counts."""
    raw = Path(path).read_bytes()
    if raw.startswith(PACKED):
        return None, raw
    source = raw.decode()
    return source, pack_source(source)


# ==================================================================================================
# 12. Scoring
# Plain, sliding and document scores differ only in a list of spans. `Ledger` alone owns the
# validation tokens: it refuses a target that was scored before, lends only what has been scored,
# and gives no result until all of it is.
# ==================================================================================================
class Windows(NamedTuple):
    """A batch of spans of the stream, (B,) int64 each. Inputs are tokens[start : start + length];
    the targets at places
    lo <= i < hi of each span are scored, the places before lo are context."""

    start: np.ndarray
    length: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    width: int    # T of the batch: rows are padded to it
    # (B,) chunks of its document that a row has behind it, where rows walk through documents
    age: np.ndarray | None = None


Span = tuple[int, int, int, int]


def sliding(begin: int, end: int, T: int, stride: int, floor: int = 0) -> list[Span]:
    """Spans that score targets [begin, end) once each, `stride` at a time, with up to T - stride
    tokens of context, none
    before `floor`. At `floor` the first span scores T targets; stride == T is the plain score."""
    spans, lo = [], begin
    while lo < end:
        hi = min(end, lo + (T if lo == floor else stride))
        start = max(floor, hi - T)
        spans.append((start, hi - start, lo - start, hi - start))
        lo = hi
    return spans


def document_spans(documents: np.ndarray, T: int, stride: int) -> list[Span]:
    """Spans that score each document by itself: in one pass where it fits into T, by windows where
    it does not."""
    return [
        span for b, e in zip(documents[:-1].tolist(), documents[1:].tolist())
        for span in sliding(b, e, T, stride, floor=b)
    ]


def batched(spans: Sequence[Span], batch_tokens: int, T: int) -> list[Windows]:
    """Batches of equal shape (rows, T); missing rows are empty windows, so that one compiled graph
    serves all."""
    rows = max(1, batch_tokens // T)
    padded = [*spans, *[(0, 0, 0, 0)] * (-len(spans) % rows)]
    return [
        Windows(*np.array(padded[i:i + rows], np.int64).T, T) for i in range(0, len(padded), rows)
    ]


def bucketed(spans: Sequence[Span], batch_tokens: int, T: int) -> list[Windows]:
    """Batches of spans of about one length, padded to powers of two from 64 to T; order does not
    matter to fixed weights."""
    groups: dict[int, list[Span]] = {}
    for span in spans:
        groups.setdefault(min(T, 1 << max(6, (span[1] - 1).bit_length())), []).append(span)
    return [
        w for width in sorted(groups, reverse=True)
        for w in batched(groups[width], batch_tokens, width)
    ]


def document_plan(documents: np.ndarray, C: int, rows: int, world: World) -> list[Windows]:
    """The chunks of C tokens that this rank scores, one batch (rows, C) per tick.

    The longest document goes first, each to the row of any rank that is free first; documents do
    not know of each other, so their order cannot matter to a score.
    """
    begin, size = documents[:-1], np.diff(documents)
    ticks = -(-size // C)
    free = [(0, row) for row in range(rows * world.size)]
    mine: list[list[int]] = [[] for _ in range(rows)]
    for d in np.argsort(-ticks, kind="stable").tolist():
        busy, row = free[0]
        heapq.heapreplace(free, (busy + int(ticks[d]), row))
        if row % world.size == world.rank:
            mine[row // world.size].append(d)
    start, hi, age = np.zeros((3, max(int(ticks[m].sum()) for m in mine), rows), np.int64)
    for row, ds in enumerate(mine):
        document = np.repeat(np.array(ds, np.int64), ticks[ds])
        n = np.arange(len(document))
        n = n - np.maximum.accumulate(np.where(np.diff(document, prepend=-1) != 0, n, 0))
        start[:len(n), row], age[:len(n), row] = begin[document] + n * C, n
        hi[:len(n), row] = np.minimum(C, size[document] - n * C)
    return [Windows(b, e, np.zeros_like(e), e, C, n) for b, e, n in zip(start, hi, age)]


def widened(w: Windows, T: int) -> Windows:
    """The same targets with up to T tokens of their documents in view, padded to a power of two."""
    end = w.start + w.hi
    start = np.maximum(w.start - w.age * w.width, end - T)
    width = min(T, 1 << max(6, int((end - start).max() - 1).bit_length()))
    return Windows(start, end - start, w.start - start, end - start, width, w.age)


class Ledger:
    """Owner of the validation tokens: scores go in, training data comes out, and only in that
    order.

    Nats stay on the device; which targets are scored is known on the host, so that no check waits
    for the device.
    """

    def __init__(self, val: Validation, world: World):
        """Nothing scored yet."""
        self.world, self._bytes, self.documents = world, val.bytes, val.documents
        self._tokens = val.tokens.to(world.device)
        self._scored = np.zeros(len(val.bytes), bool)
        self._nats = torch.zeros(len(val.bytes), dtype=torch.float32, device=world.device)

    @contextlib.contextmanager
    def sealed(self) -> Iterator[None]:
        """While scorers and learners run, nobody can read a token here, scored or not."""
        tokens, self._tokens = self._tokens, None
        try:
            yield
        finally:
            self._tokens = tokens

    def __len__(self) -> int:
        """Number of targets."""
        return len(self._scored)

    def inputs(self, w: Windows) -> tuple[Tensor, Tensor]:
        """Token ids and targets (B, T); what lies beyond a window's end is the pad token 0,
        whatever the stream holds."""
        self.refuse_sealed()
        place = np.arange(w.width)
        inside = torch.from_numpy(place < w.hi[:, None]).to(self._tokens.device)
        index = torch.from_numpy(np.minimum(w.start[:, None] + place,
                                            len(self._scored) - 1)).to(self._tokens.device)
        return self._tokens[index] * inside, self._tokens[index + 1] * inside

    def refuse_sealed(self) -> None:
        """Raises RuntimeError while the tokens are sealed."""
        if self._tokens is None:
            raise RuntimeError("a scorer or learner tried to read tokens on its own")

    def record(self, w: Windows, nats: Tensor) -> None:
        """Books the nats (B, T) of the scored places; raises RuntimeError if a target would be
        scored twice."""
        place = np.arange(w.width)
        mask = (place >= w.lo[:, None]) & (place < w.hi[:, None])
        targets = (w.start[:, None] + place)[mask]
        if self._scored[targets].any() or len(np.unique(targets)) != len(targets):
            raise RuntimeError(
                f"a target between {targets.min()} and {targets.max()} would be scored twice")
        self._scored[targets] = True
        # numbers instead of a mask: counting a mask would make the host wait for the device
        to, of = (torch.from_numpy(i).to(nats.device) for i in (targets, np.flatnonzero(mask)))
        self._nats[to] = nats.detach().float().flatten()[of]

    def lend(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [begin, end) for learning, once every rank is here; RuntimeError
        unless all are scored."""
        self.refuse_sealed()
        done = self.world.sum(
            torch.tensor(int(self._scored[begin:end].sum()), device=self.world.device))
        if int(done) != end - begin:
            raise RuntimeError(
                f"{end - begin - int(done)} of the targets {begin} to {end} are not scored yet")
        return self._tokens[begin:end], self._tokens[begin + 1:end + 1]

    def targets_nats(self) -> np.ndarray:
        """Nats (N,) of all ranks' targets; RuntimeError unless each was scored exactly once."""
        times = self.world.sum(
            torch.from_numpy(self._scored.astype(np.int32)).to(self.world.device))
        if bool((times != 1).any()):
            raise RuntimeError(
                f"{int((times == 0).sum())} targets were never scored, "
                f"{int((times > 1).sum())} twice"
            )
        return self.world.sum(self._nats.clone()).cpu().numpy()

    def result(self, seconds: float) -> dict[str, float]:
        """val_loss in nats per token and val_bpb in bits per byte of text, over all targets."""
        nats, size = float(self.targets_nats().sum(dtype=np.float64)), int(self._bytes.sum())
        return dict(val_loss=nats / len(self._scored),
                    val_bpb=nats / size / math.log(2),
                    tokens=len(self._scored),
                    bytes=size,
                    seconds=round(seconds, 3))


def score(ledger: Ledger,
          batches: Iterable[Windows],
          nats_of: Callable[[Tensor, Tensor], Tensor],
          learn: Callable[[Tensor, Tensor], None] | None = None) -> None:
    """The one scoring loop. `learn` can only change what later batches see: it runs when the ledger
    has the score, and is handed the batch that was scored, nothing else."""
    for w in batches:
        ids, targets = ledger.inputs(w)
        with torch.no_grad(), ledger.sealed():
            nats = nats_of(ids, targets)
        ledger.record(w, nats)
        if learn:
            with ledger.sealed():
                learn(ids, targets)


def watched(mine: Sequence[Any], name: str, log: Log) -> Iterator[Any]:
    """This rank's batches (or other parts), with a line of progress and the time left."""
    begin_s = time.perf_counter()
    quarters = {len(mine) * i // 4 for i in (1, 2, 3)}
    for i, w in enumerate(mine):
        if i and (i in quarters or sys.stdout.isatty() and i % 8 == 0):
            left_s = (time.perf_counter() - begin_s) / i * (len(mine) - i)
            log.progress(f"score:{name} {i}/{len(mine)} left:{left_s:.0f}s")
        yield w


# ==================================================================================================
# 13. Test-time training
# Learns from validation text only after it was scored. Here: the leaderboard's chunk form (#549,
# #1493).
# ==================================================================================================
class Learners:
    """Rows that walk through documents, N learners each: adapters of their own, AdamW rates a
    factor apart, a prediction that mixes them. A chunk is scored, then learned from; nothing
    crosses from one document to the next."""

    def __init__(self, model: GPT, rows: int, C: int, form: str, steps: int):
        """`form` stream keeps a cache; recompute gets whole windows. No steps: no adapters."""
        h, self.model, self.steps, self.rows = model.h, model, steps, rows
        self.plan, device = depth_plan(h, looped=True), model.bank["embed"].device
        self.N = N = h.ttt_learners if steps and form == "stream" else 1
        rates = h.ttt_lora_lr * h.ttt_lr_spread**-torch.arange(N)
        rates[1:][-1:] = 0    # the last of several learners stays the artifact's own model
        self.rates = rates.repeat(rows).to(device)
        self.bank = AdapterBank(h, rows * N, self.plan, device) if steps else None
        self.cache = Cache(model, rows * N, C, self.plan) if form == "stream" else None
        self.belief = torch.zeros(rows, N, device=device)    # log weights, the prior's is zero
        self.device, self.C = device, C

    def follow(self, batches: Iterable[Windows]) -> Iterator[Windows]:
        """Each batch, once its rows are ready: a row that begins a document starts afresh."""
        self.model.requires_grad_(False)
        for w in batches:
            age = torch.from_numpy(w.age.repeat(self.N)).to(self.device)
            place = np.arange(w.width)
            inside = (place >= w.lo[:, None]) & (place < w.hi[:, None])
            self.inside = torch.from_numpy(inside).to(self.device)
            self.rate = (self.rates * (1 + age / 4)**-self.model.h.ttt_lr_decay)[:, None]
            if self.bank:
                self.bank.reset(torch.from_numpy(np.flatnonzero(w.age.repeat(self.N) == 0)))
            self.belief = self.belief * (age > 0).view(self.rows, self.N)
            if self.cache:
                self.cache.open(age * self.C)
            yield w
        self.model.requires_grad_(True)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats (rows * N, T) of every learner."""
        ids, targets = (t.repeat_interleave(self.N, 0) for t in (ids, targets))
        lora = self.bank.adapters(self.model.dtype) if self.bank else None
        return self.model.run_nats(ids, targets, self.plan, lora=lora, cache=self.cache)

    def nats_of(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats (rows, T) of the mixture p = sum of w_i p_i, whose weights know past losses only."""
        with torch.set_grad_enabled(self.steps > 0):
            self.first = self.forward(ids, targets)
        self.fresh = self.cache.fresh if self.cache else []
        logs = -self.first.detach().view(self.rows, self.N, -1) * self.inside[:, None]
        n = torch.arange(logs.size(-1) + 1, device=self.device)
        ago = n - n[:-1, None]    # tokens from place s to place t, which may know s if it is above 0
        decay = self.model.h.ttt_mix_decay
        known = self.belief[..., None] * decay**n + logs @ torch.where(ago > 0, decay**ago, 0.0)
        self.belief = known[..., -1]
        return -(known[..., :-1].log_softmax(1) + logs).logsumexp(1)

    def learn(self, ids: Tensor, targets: Tensor) -> None:
        """TTT_STEPS updates of every row on its chunk, then the chunk moves into the cache."""
        inside = self.inside.repeat_interleave(self.N, 0)
        for step in range(self.steps):
            with torch.enable_grad():
                nats = self.forward(ids, targets) if step else self.first
                loss = ((nats * inside).sum(1) / inside.sum(1).clamp(min=1)).sum()
            self.bank.step(loss, self.rate)
        if self.cache:
            self.cache.write(ids.repeat_interleave(self.N, 0), self.fresh)


def tiles(h: Hyperparameters, documents: np.ndarray, steps: int, world: World) -> tuple[int, int]:
    """Rows and chunk length C in which documents are scored: as many rows as a batch of windows
    has, divided by the learners; fewer where documents are too few to fill them."""
    C = min(h.eval_seq_len, h.ttt_stream_chunk if steps else h.eval_stride)
    rows = max(1, h.eval_batch_tokens // h.eval_seq_len // (h.ttt_learners if steps else 1))
    if world.device.type != "cuda":    # there every shape is a graph, so rows stay as they are
        ticks = -(-np.diff(documents) // C)
        rows = min(rows, -(-int(ticks.sum()) // int(ticks.max()) // world.size))
    return rows, C


def score_documents(model: GPT, ledger: Ledger, documents: np.ndarray, form: str, steps: int,
                    name: str, log: Log) -> None:
    """Scores the documents between these edges by `Learners`."""
    rows, C = tiles(model.h, documents, steps, ledger.world)
    batches = document_plan(documents, C, rows, ledger.world)
    if form == "recompute":
        batches = [widened(w, model.h.eval_seq_len) for w in batches]
    learners = Learners(model, rows, C, form, steps)
    score(ledger, learners.follow(watched(batches, name, log)), learners.nats_of, learners.learn)


def adapt(model: GPT, ledger: Ledger, name: str, log: Log) -> None:
    """The score `ttt`, in the form that TTT names.

    stream, recompute: adapters of each document's own. chunk, phased: parts of the stream are
    scored (by sliding windows, or by stream), then all weights learn from them by SGD with momentum
    at a rate that falls as a cosine; the last part trains nobody. The weights are restored.
    """
    h, world, N = model.h, ledger.world, len(ledger)
    if h.ttt in ("stream", "recompute"):
        return score_documents(model, ledger, ledger.documents, h.ttt, h.ttt_steps, name, log)
    starts = ledger.documents
    edges = [*range(0, N, h.ttt_chunk_tokens), N] if h.ttt == "chunk" else sorted(
        set(starts[np.searchsorted(starts, np.linspace(0, N, h.ttt_phases + 1))].tolist()))
    parts = len(edges) - 1
    last = min(parts, h.ttt_max_chunks or parts)
    weights, ema = list(model.bank.values()), EMA(model)
    before, raw = ([p.detach().clone() for p in weights] for _ in range(2))
    sgd = torch.optim.SGD(weights, lr=h.ttt_lr, momentum=h.ttt_momentum)
    for part in watched(range(parts), name, log):
        begin, end = edges[part:part + 2]
        if h.ttt == "phased":
            inside = starts[(starts >= begin) & (starts <= end)]
            score_documents(model, ledger, inside, "stream", h.ttt_steps, name, Log(world, quiet=True))
        else:
            batches = batched(sliding(begin, end, h.eval_seq_len, h.eval_stride),
                              h.eval_batch_tokens, h.eval_seq_len)
            score(ledger, batches[world.rank::world.size],
                  functools.partial(model.run_nats, plan=depth_plan(h, looped=True)))
        if part + 1 < parts and part < last:
            sgd.param_groups[0]["lr"] = h.ttt_lr * 0.5 * (
                1 + math.cos(math.pi * part / max(1, last - 1)))
            with torch.no_grad():
                torch._foreach_copy_(weights, raw)
            learn_chunk(model, sgd, *ledger.lend(begin, end), world)
            torch._foreach_copy_(raw, [p.detach() for p in weights])
            ema.update(h.ttt_ema_decay)
            ema.export()
    with torch.no_grad():
        torch._foreach_copy_(weights, before)
    model.zero_grad(set_to_none=True)


def sgd_shares(model: GPT) -> list[Tensor]:
    """Share of TTT_LR that each bank gets: by depth from TTT_LR_RAMP to 1, none where frozen."""
    h, device = model.h, model.bank["embed"].device
    ramp = torch.linspace(h.ttt_lr_ramp, 1, h.num_layers, device=device)
    ramp[:h.ttt_freeze_blocks] = 0
    whole = torch.ones(2, device=device)
    whole[1] = float(h.ttt_freeze_blocks == 0)
    return [
        ramp.view(-1, *[1] * (p.dim() - 1)) if name in Layer._fields else whole[int(name == "embed")]
        for name, p in model.bank.items()
    ]


def learn_chunk(model: GPT, sgd: torch.optim.Optimizer, ids: Tensor, targets: Tensor,
                world: World) -> None:
    """TTT_EPOCHS passes over one scored chunk of (n,) tokens in sequences of TRAIN_SEQ_LEN;
    leftovers are not used."""
    h, plan, T = model.h, depth_plan(model.h, looped=True), min(model.h.train_seq_len, len(ids))
    rows = len(ids) // T
    ids, targets = ids[:rows * T].view(rows, T), targets[:rows * T].view(rows, T)
    weights, shares = list(model.bank.values()), sgd_shares(model)
    for _ in range(h.ttt_epochs):
        for lo in range(0, rows, h.ttt_batch_seqs):
            count = min(h.ttt_batch_seqs, rows - lo)
            sgd.zero_grad(set_to_none=True)
            mine = slice(lo + world.rank, lo + count, world.size)
            most = max(1, h.micro_batch_tokens // T)
            for x, y in zip(ids[mine].split(most), targets[mine].split(most)):
                if len(x):    # fewer sequences than ranks leave some without
                    (model.run_nats(x, y, plan).mean(1).sum() / count).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
            flat = world.sum(torch.cat([g.flatten() for g in grads]))
            for p, g in zip(weights, flat.split([p.numel() for p in weights])):
                p.grad = g.view_as(p)
            torch.nn.utils.clip_grad_norm_(weights, h.ttt_grad_clip)
            for p, share in zip(weights, shares):
                p.grad.mul_(share)
            sgd.step()


def affordable_steps(model: GPT, text: Validation, targets: int, world: World, log: Log) -> int:
    """The steps per chunk, TTT_STEPS at most, with which `targets` targets are scored within
    EVAL_BUDGET_S, by the seconds that training text takes here."""
    h = model.h
    if not h.eval_budget_s or h.ttt == "chunk" or "ttt" not in wanted_scores(h):
        return h.ttt_steps
    took_s = world.share(score_by_name("ttt", model, text, world,
                                       Log(world, quiet=True))[0]["seconds"])
    rows, C = tiles(h, text.documents, h.ttt_steps, world)
    cells = len(document_plan(text.documents, C, rows, world)) * rows * C * world.size
    # a forward pass costs 1, a step on it 1 more, each further step 2; a tenth is left for padding
    need_s = [1.1 * targets / cells * took_s * max(1, 2 * n) / max(1, 2 * h.ttt_steps)
              for n in range(h.ttt_steps + 1)]
    steps = max(n for n, s in enumerate(need_s) if s <= h.eval_budget_s or not n)
    log(f"ttt_steps:{steps} of {h.ttt_steps}, about {need_s[steps]:.0f}s of "
        f"EVAL_BUDGET_S={h.eval_budget_s:g}")
    return steps


def legality(h: Hyperparameters) -> list[str]:
    """What enforces the conditions C1 to C4 (#1017) in these scores, a line each."""
    return [
        "C1 causal: attention looks back; ids past a chunk's end are pads",
        "C2 normalised: softmax over all of V; mixtures are sum of w_i p_i, w from past losses",
        "C3 score first: the ledger is sealed while learners run on what it has booked",
        "C4 one pass: no target is booked twice or never; " +
        ("documents share no state" if h.ttt in ("stream", "recompute") else
         "weights learn in stream order")
    ]


SCORES = ("prequant", "quantized", "sliding", "documents", "stream", "ttt")


def score_by_name(name: str, model: GPT, val: Validation, world: World,
                  log: Log) -> tuple[dict[str, float], Ledger]:
    """One of SCORES over the whole validation set: its result and the ledger; all ranks take part.
    """
    h, watch, ledger = model.h, Stopwatch(world), Ledger(val, world)
    plan, T, N = depth_plan(h, looped=True), h.eval_seq_len, len(val.bytes)
    nats_of = functools.partial(model.run_nats, plan=plan)
    share = slice(world.rank, None, world.size)
    if name == "ttt":
        adapt(model, ledger, name, log)
    elif name == "stream":
        score_documents(model, ledger, val.documents, "stream", 0, name, log)
    elif name == "documents":
        spans = document_spans(val.documents, T, h.eval_stride)
        score(ledger, watched(bucketed(spans, h.eval_batch_tokens, T)[share], name, log),
              nats_of)
    else:
        spans = sliding(0, N, T, h.eval_stride if name == "sliding" else T)
        score(ledger, watched(batched(spans, h.eval_batch_tokens, T)[share], name, log),
              nats_of)
    return ledger.result(watch.read_s()), ledger


# ==================================================================================================
# 15. Pipeline
# The whole run in the order of its stages; each is one call and one line of the log.
# ==================================================================================================
def compute_dtype(h: Hyperparameters, device: torch.device) -> torch.dtype:
    """bf16 where PRECISION asks for it or, with auto, where the chip multiplies it natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    wanted = h.precision == "bf16" or h.precision == "auto" and native
    return torch.bfloat16 if wanted else torch.float32


def compile_mode(h: Hyperparameters, device: torch.device, log: Callable[[str], None]) -> str:
    """COMPILE, with auto resolved; says why where compilation cannot work."""
    if h.compile != "auto":
        return h.compile
    if device.type == "cuda":
        return "full"
    compiler = os.environ.get("CXX") or "g++ clang++ c++"
    if any(shutil.which(name) for name in compiler.split()):
        return "block"
    log("compile:off (no C++ compiler was found; install g++ for several times the speed)")
    return "off"


def tune_process(device: torch.device) -> None:
    """Process-wide settings: TF32 for fp32 products on GPUs; on Linux CPUs a heap that stays.

    glibc gives large blocks back to the system at each free, and getting zeroed pages again took up
    to two thirds of a step. So the heap is grown once, in huge pages, and never trimmed.
    """
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda" or sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):    # another C library: nothing to tune
        libc, size, page, huge = ctypes.CDLL("libc.so.6"), 4 << 30, 1 << 21, 14
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        if (libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0)
                and libc.mallopt(arena_max, 1)):    # the backward pass has a thread of its own
            libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
            libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            libc.free.argtypes = [ctypes.c_void_p]
            if block := libc.malloc(size):    # address space only, no page of it is touched
                libc.madvise(-(-block // page) * page, size - page, huge)
                libc.free(block)


def wanted_scores(h: Hyperparameters) -> list[str]:
    """The scores that this run computes, in the order of the pipeline."""
    return [
        name for name in SCORES if name in h.scores.split(",") and (h.ttt_enabled or name != "ttt")
    ]


def preflight(h: Hyperparameters, world: World) -> None:
    """Checks what later stages need, before anything costs time; raises one `Refusal` that lists
    all that is missing."""
    wrong = []
    if h.compressor not in ("auto", "rans", *coders()):
        package = dict(zstd="zstandard").get(h.compressor, h.compressor)
        wrong.append(
            f"COMPRESSOR={h.compressor} needs the package {package} (pip install {package})")
    folder = Path(h.logs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if h.run_id and (Path(h.logs_dir) / h.run_id).exists():
        wrong.append(f"RUN_ID={h.run_id} was used before in {h.logs_dir}; choose another, "
                     "no run is ever overwritten")
    need_bytes = 4 * h.budget_bytes
    if (free_bytes := shutil.disk_usage(folder).free) < need_bytes:
        wrong.append(
            f"{folder}: {free_bytes:,} bytes are free, the run needs {need_bytes:,}"
        )
    try:
        accumulation(h, world)
    except Refusal as error:
        wrong.append(str(error))
    if wrong:
        raise Refusal("; ".join(wrong))


def rehearsal_text(h: Hyperparameters, data: Dataset) -> Validation:
    """The beginning of the training shards in the place of a validation set."""
    tokens = np.concatenate(
        [shard[:2 * (h.ttt_chunk_tokens + h.eval_seq_len)] for shard in data.train[:8]])
    tokens = tokens[:h.ttt_chunk_tokens + h.eval_seq_len + 1]
    return Validation.of(tokens, np.ones(len(tokens) - 1, np.int64))


def rehearse(t: Trainer, data: Dataset, log: Log) -> float:
    """Runs every later stage on a few steps of training data, then rewinds; returns seconds to keep
    for calibration.

    So nothing fails late, and no graph is compiled inside the clock. Validation text is never
    touched.
    """
    h, watch, before = t.h, Stopwatch(t.world), t.snapshot()
    for looped in sorted({False, h.num_loops > 0}):
        for number in range(h.rehearsal_steps):
            t.step(number, 0.0, looped)
    second_moments(t.model, t.world, t.loader, t.world.size)
    calibration = Stopwatch(t.world)
    moments = second_moments(t.model, t.world, t.loader, t.world.size)
    rounds = -(-h.gptq_calibration_batches // t.world.size)
    reserve_s = h.gptq_reserve_seconds or 1.3 * rounds * t.world.share(calibration.read_s())
    stored = quantise(t.model, moments)
    _, again = unpack(pack(h, stored, quick=True)[0])
    load_stored(t.model, again)
    fake = rehearsal_text(h, data)
    quiet = Log(t.world, quiet=True)
    for name in wanted_scores(h):
        score_by_name(name, t.model, fake, t.world, quiet)
    t.restore(before)
    log(f"rehearsal:{watch.read_s():.1f}s (every stage ran and was rewound; not counted) "
        f"reserve:{reserve_s:.2f}s for {h.gptq_calibration_batches} calibration batches")
    return reserve_s


def build_model(h: Hyperparameters, world: World) -> GPT:
    """The initialised model on the device, equal on all ranks."""
    torch.manual_seed(h.seed)
    model = GPT(h, compute_dtype(h, world.device), attention_kernel(world.device))
    model.to(world.device)
    world.share_tensors(p.data for p in model.bank.values())
    return model


def measured_score(name: str, model: GPT, data: Dataset, world: World,
                   log: Log) -> dict[str, float]:
    """`score_by_name` with its line of the log."""
    result, _ = score_by_name(name, model, data.val, world, log)
    log(f"final_{name}_exact val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f} "
        f"eval_time:{result['seconds'] * 1e3:.0f}ms")
    return result


def run(h: Hyperparameters, world: World, log: Log, data: Dataset, data_s: float) -> dict[str, Any]:
    """The pipeline: rehearse, train, calibrate, quantise, pack, read back, score. Returns what
    result.json holds."""
    begin_s, seconds = time.perf_counter() - data_s, dict(data=round(data_s, 3))

    def stage(name: str, watch: Stopwatch) -> None:
        """Books the seconds of a stage."""
        seconds[name] = round(watch.read_s(), 3)

    model = build_model(h, world)
    announce(h, model, world, data, log)
    source, code = running_source(__file__) if world.main else (None, b"")
    mode = compile_mode(h, world.device, log)
    model.compile(mode)
    trainer = Trainer.of(h, world, model, data)
    watch = Stopwatch(world)
    reserve_s = rehearse(trainer, data, log) if h.rehearsal_steps else h.gptq_reserve_seconds
    if h.rehearsal_steps:
        h = model.retune(ttt_steps=affordable_steps(model, rehearsal_text(
            h, data), len(data.val.bytes), world, log))
    stage("rehearsal", watch)

    plain = lambda: "val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}".format(**score_by_name(
        "quantized", model, data.val, world, Log(world, quiet=True))[0])
    trained, clock = train(trainer, reserve_s, log, plain)
    moments = second_moments(model, world, trainer.loader, h.gptq_calibration_batches)
    clock_s = clock.read_s()
    log(f"clock:{clock_s:.2f}s of {h.max_wallclock_seconds:g}s steps:{trained.steps} "
        "(calibration included)"
        )
    seconds |= dict(train=round(trained.seconds, 3),
                    calibration=round(clock_s - trained.seconds, 3))
    scores = {
        n: measured_score(n, model, data, world, log)
        for n in wanted_scores(h) if n == "prequant"
    }

    watch = Stopwatch(world)
    stored = quantise(model, moments) if world.main else {}
    stage("quantise", watch)
    watch = Stopwatch(world)
    blob, ledger = pack(h, stored) if world.main else (b"", {})
    if world.main:
        write_atomically(log.folder / "model.bin", blob)
        write_atomically(log.folder / "train_gpt.py", code)
        report_bytes(ledger, roles(h), blob, code, h, log)
        blob = (log.folder / "model.bin").read_bytes()
    blob = world.share(blob)
    load_stored(model, unpack(blob)[1])
    stage("pack", watch)
    for name in wanted_scores(h):
        if name != "prequant":
            scores[name] = measured_score(name, model, data, world, log)
    sizes = dict(model=len(blob), code=len(code), total=len(blob) + len(code), limit=h.budget_bytes)
    seconds["total"] = round(time.perf_counter() - begin_s, 3)
    return conclude(h, world, model, trained, clock_s, sizes, scores, seconds, log)


def announce(h: Hyperparameters, model: GPT, world: World, data: Dataset, log: Log) -> None:
    """The first lines of a log: everything that is needed to repeat the run."""
    log(f"run:{log.folder.name} recipe:{h.recipe} changed:{json.dumps(h.changed())}")
    log(f"device:{device_name(world.device)} world_size:{world.size} torch:{torch.__version__} "
        f"python:{platform.python_version()} dtype:{str(model.dtype)[6:]} "
        f"attention:{attention_kernel(world.device)}"
        )
    log(f"knobs:{json.dumps(asdict(h))}")
    log(f"model_params:{sum(p.numel() for p in model.parameters())} "
        f"steps_of_depth:{len(depth_plan(h, False))}->{len(depth_plan(h, True))}")
    log(f"data: train_tokens:{sum(map(len, data.train))} shards:{len(data.train)} "
        f"val_targets:{len(data.val.bytes)} "
        f"val_bytes:{int(data.val.bytes.sum())} val_documents:{len(data.val.documents) - 1} "
        f"bytes_by:{data.byte_rule}"
        )
    log(f"batch: {h.train_batch_tokens} tokens = {accumulation(h, world)} x {world.size} ranks x "
        f"{h.micro_batch_tokens}"
        )
    for line in legality(h):
        log(line)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):    # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()} ({torch.get_num_threads()} threads)"
    return platform.processor() or "cpu"


def report_bytes(ledger: Mapping[str, int], table: Mapping[str, Role], blob: bytes, code: bytes,
                 h: Hyperparameters, log: Log) -> None:
    """The size ledger: bytes of every part and bits per weight, then the total in the official
    form."""
    for name, size in ledger.items():
        bits = ""
        if name in table:
            bits = f" bits_per_weight:{8 * size / math.prod(table[name].shape):.3f}"
        log(f"bytes:{name} {size}{bits}")
    log(f"Serialized model: {len(blob)} bytes")
    log(f"Code size: {len(code)} bytes (packed)")
    log(f"Total submission size {h.compressor}: {len(blob) + len(code)} bytes")


def conclude(h: Hyperparameters, world: World, model: GPT, trained: Trained, clock_s: float,
             sizes: dict[str, int], scores: dict[str, dict[str, float]], seconds: dict[str, float],
             log: Log) -> dict[str, Any]:
    """Writes result.json and the table of scores; raises `Refusal` afterwards if the artifact is
    over the budget."""
    violations = []
    if sizes["total"] > h.budget_bytes:
        violations.append(f"bytes: {sizes['total']} is over BUDGET_BYTES={h.budget_bytes}")
    if h.max_wallclock_seconds and clock_s > h.max_wallclock_seconds:
        violations.append(f"time: {clock_s:.2f} s of training data is over MAX_WALLCLOCK_SECONDS="
                          f"{h.max_wallclock_seconds:g}")
    tokens = trained.steps * h.train_batch_tokens
    result = dict(run_id=h.run_id,
                  seed=h.seed,
                  recipe=h.recipe,
                  changed_knobs=h.changed(),
                  knobs=asdict(h),
                  device=device_name(world.device),
                  world_size=world.size,
                  torch=torch.__version__,
                  params=sum(p.numel() for p in model.parameters()),
                  steps=trained.steps,
                  train_seconds=round(trained.seconds, 3),
                  train_tokens=tokens,
                  tokens_per_second=round(tokens / max(trained.seconds, 1e-9), 1),
                  bytes=sizes,
                  scores=scores,
                  seconds=seconds,
                  compliant=not violations,
                  violations=violations)
    if world.device.type == "cuda":
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(world.device)
    log("score          val_loss     val_bpb      seconds")
    for name, s in scores.items():
        log(f"{name:14} {s['val_loss']:.8f}   {s['val_bpb']:.8f}   {s['seconds']:.1f}")
    if world.main:
        write_atomically(log.folder / "result.json", json.dumps(result, indent=1).encode())
    log("RESULT " + json.dumps(result))
    if sizes["total"] > h.budget_bytes:
        raise Refusal(
            f"BUDGET_BYTES={h.budget_bytes}: code + artifact are {sizes['total']} bytes; all is in "
            f"{log.folder}, but it cannot be submitted: raise MATRIX_CLIP_SIGMAS or MUON_WD")
    return result


def named_run(h: Hyperparameters, world: World) -> Hyperparameters:
    """The hyperparameters with the run's name, one for all ranks: RUN_ID, or time and settings."""
    fresh = f"{time.strftime('%Y%m%d-%H%M%S')}-{h.recipe.replace(',', '+')}-seed{h.seed}"
    return replace(h, run_id=world.share(h.run_id or fresh))


def evaluate(arguments: Sequence[str], world: World, env: Mapping[str, str]) -> None:
    """The verb `eval ARTIFACT`: scores it again in this process; scoring knobs come from the
    artifact, then from the
    environment. Prints the same lines as the run that made it."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        raise Refusal(
            f"eval needs one file, such as logs/<RUN_ID>/model.bin; got {' '.join(arguments)!r}"
        )
    log = Log(world)
    path = Path(arguments[0])
    shipped_h, stored = unpack(path.read_bytes(), str(path))
    changed = shipped_h.changed()
    h = Hyperparameters.from_env(env, base=changed)
    for name in MODEL_KNOBS:
        if getattr(h, name) != getattr(shipped_h, name):
            raise Refusal(
                f"{name.upper()}={getattr(h, name)} contradicts {path}, which was made with "
                f"{getattr(shipped_h, name)}; leave it unset")
    data = find_dataset(h, world, log)
    model = build_model(h, world)
    model.compile(compile_mode(h, world.device, log))
    load_stored(model, stored)
    scores = {
        name: measured_score(name, model, data, world, log)
        for name in wanted_scores(h) if name != "prequant"
    }
    log("RESULT " + json.dumps(dict(artifact=str(path), bytes=path.stat().st_size, scores=scores)))


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """The command line; returns the exit status. A `Refusal` is one sentence on standard error and
    status 2."""
    if arguments and arguments[0] in ("--help", "-h", "help"):
        print(help_text())
        return 0
    world = None
    try:
        if arguments and arguments[0] == "data":
            if not make_data:
                raise Refusal("this packed script makes no data; use the readable train_gpt.py")
            make_data(list(arguments[1:]))
            return 0
        if arguments and arguments[0] != "eval":
            raise Refusal(f"unknown verb {arguments[0]!r}" +
                          nearest(arguments[0], ("data", "eval")) +
                          "; expected data, eval, --help, or nothing for a run")
        world = World.from_env(env)
        tune_process(world.device)
        if arguments:
            evaluate(arguments[1:], world, env)
            world.leave()
            return 0
        small = world.device.type != "cuda" and not env.get("RECIPE")
        h, log = Hyperparameters.from_env(env, "demo" if small else "record"), Log(world)
        if small:
            log("recipe: no CUDA device was found; RECIPE=demo is used (set RECIPE to choose)")
        preflight(h, world)
        watch = Stopwatch(world)
        data = find_dataset(h, world, log)
        h = named_run(h, world)
        log.claim(Path(h.logs_dir) / h.run_id)
        run(h, world, log, data, watch.read_s())
        world.leave()
        return 0
    except Refusal as error:
        rank = f" (rank {world.rank})" if world and world.size > 1 else ""
        print(f"train_gpt.py: error{rank}: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
