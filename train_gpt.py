"""Parameter Golf in one file: the best language model that fits in 16,000,000 bytes.

At most 600 s of training on 8xH100, scored in bits per byte (BPB). A run is one pipeline; each
arrow is one function call and one line of the log:

    shards -> rehearse -> train -> calibrate -> quantise -> pack -> read back -> score

    rehearse    every later stage on a few steps of training data, then rewound bit for bit
    train       Muon + AdamW and an average of the weights, inside MAX_WALLCLOCK_SECONDS
    calibrate   curvature of the loss, on text that the model writes itself, after the clock
    score       plain, sliding, streaming, and with score-first test-time training (TTT)

Launch (the defaults are the 8xH100 submission; without a CUDA device RECIPE=demo is chosen, aloud):
    python train_gpt.py                                       # CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py     # eight GPUs
    python train_gpt.py --help                                # every knob
    python train_gpt.py eval logs/<RUN_ID>/model.bin          # score an artifact again
    python train_gpt.py data|report|submit|verify|sweep -h    # shards, tables, records, reviews

Dimension key: B rows, T tokens, D width, H query heads, K key/value heads, E head size, F MLP
width, V vocabulary, L layers (stored), S steps (executed), R rank. A *layer* is stored, a *step* of
depth is executed, a *window* is scored, a *chunk* is the part of the stream that is scored before
it is learned from, a *bank* holds all layers of a role. A knob is an environment variable.

Map: 1 imports, 2 hyperparameters, 3 world and log, 4 data, 5 roles and depth, 6 model, 7 adapters,
8 optimisers, 9 training, 10 quantisation, 11 artifact, 12 scoring, 13 test-time training,
14 fused kernels, 15 pipeline, 16 tools.
"""
# ==================================================================================================
# 1. Imports
# Only the standard library, numpy and torch must be there. Whatever else a machine may lack is
# looked up once and is None where it is missing: importing this file needs no GPU and no data, and
# has no effect beyond its own names.
# ==================================================================================================
from __future__ import annotations

import argparse
import ast
import bisect
import builtins
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import difflib
import errno
import fnmatch
import functools
import hashlib
import heapq
import importlib.metadata
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
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

try:
    os.getcwd()
except OSError:    # where libraries of torch end the process with a riddle
    sys.stderr.write("train_gpt.py: error: the current folder was deleted, go to another one\n")
    sys.exit(2)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SOURCE = inspect.currentframe().f_code.co_filename    # `exec`, or a pipe, leaves no __file__
SCRIPT = SOURCE.removesuffix("*")    # a packed one is told from the text in it


def optional(name: str) -> Any:
    """The named module, or None where it is not installed or broken; what needs it says so before
    the clock starts."""
    try:
        # with a fromlist, a dotted name gives its last part instead of its first
        module = __import__(name, fromlist=["*"])
        return module if module.__spec__.origin else None    # None: a mere folder of that name
    except Exception:    # a package that was half removed, or built for another torch
        return None


brotli, zstandard, sentencepiece = map(optional, ("brotli", "zstandard", "sentencepiece"))
fcntl, resource = optional("fcntl"), optional("resource")    # which Windows has not
flash_attn_3, flash_attn_2 = optional("flash_attn_interface"), optional("flash_attn")
# a second of importing, for nothing where torch was built without GPUs
torch_varlen = optional("torch.nn.attention.varlen") if torch.backends.cuda.is_built() else None
# not in CPU builds of torch, nor of use where the text of a kernel cannot be read
descriptors, triton, tl = (optional(f"triton{part}") if linecache.getline(SOURCE, 1) else None
                           for part in (".tools.tensor_descriptor", "", ".language"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"    # kernels then run on the CPU, slowly
VARLEN_OPTIONS = inspect.signature(torch_varlen.varlen_attn).parameters if torch_varlen else {}
# torch 2.10 has is_causal; later releases say the same by a window that looks back without end.
VARLEN_CAUSAL: dict[str, Any] = (dict(is_causal=True) if "is_causal" in VARLEN_OPTIONS else
                                 dict(window_size=(-1, 0)))
if "enable_gqa" in VARLEN_OPTIONS:
    VARLEN_CAUSAL["enable_gqa"] = True

# A loader need not have registered this module, but dataclasses look it up to read annotations.
sys.modules.setdefault(__name__, types.ModuleType(__name__))


class Refusal(Exception):
    """Bad input, told in one sentence: which knob or file, which value, what was expected.

    Any other error is no fault of the input and keeps its traceback; OSError alone is told like a
    refusal, for a full disk is a fault of the machine."""


def require(holds: object, sentence: str) -> None:
    """Raises `Refusal` with the sentence unless the condition holds."""
    if not holds:
        raise Refusal(sentence)


def brief(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def refusing(sentence: str, *errors: type[Exception]) -> Iterator[None]:
    """Within the block these errors of libraries are faults of the input: a `Refusal` with the
    sentence, and in brackets what the error says."""
    try:
        yield
    except errors as error:
        if told := re.search("KeyboardInterrupt: (.*)", str(error)):    # a signal, wrapped by C++
            raise KeyboardInterrupt(told[1]) from None
        raise Refusal(f"{sentence} ({brief(error)})") from None


# ==================================================================================================
# 2. Hyperparameters
# One typed table declares every setting once: its name in capitals is the environment variable.
# From weak to strong: defaults (the submission), recipes from left to right, single variables. No
# function below reads a knob from the environment again: what a run logs is what it used.
# ==================================================================================================
def knob(default: Any, meaning: str, check: Callable | range = lambda value: True) -> Any:
    """One setting: its default, what it means with its unit, and which values are allowed."""
    words = EXPECTED.get(check, "")
    if isinstance(check, range):
        words, check = f"{check[0]} to {check[-1]}", lambda v, of=check: of[0] <= v <= of[-1]
    return field(default=default, metadata=dict(meaning=meaning, check=check, words=words))


def one_of(names: str, meaning: str) -> Any:
    """A setting that is one of these names, the first by default."""
    known = names.split()
    return knob(known[0], f"{meaning}: {', '.join(known)}", lambda value: value in known)


def lists(default: str, names: str, meaning: str, *others: str) -> Any:
    """A setting that is a list of these names, or of `others`, joined by commas."""
    known = {*names.split(), *others}
    return knob(default, f"{meaning}, of {names}", lambda value: set(value.split(",")) <= known)


positive, natural, several = lambda v: v > 0, lambda v: v >= 0, lambda v: v > 1    # checks
fraction, below_one, few = lambda v: 0 <= v <= 1, lambda v: 0 <= v < 1, range(1001)
EXPECTED = {positive: "above 0", natural: "0 or more", several: "2 or more", fraction: "0 to 1",
            below_one: "in [0, 1)"}
# knobs that say where things lie, or how a run is called
PLACES = ("run_id", "logs_dir", "data_dir", "data_path", "tokenizer_path", "recipe")
# in the order of the pipeline
SCORES = ("prequant", "quantized", "sliding", "stream", "ttt")
# group: (its first knob, what it is about), in the order of the table below
GROUPS = dict(
    run=("run_id", "run and data"), model=("num_layers", "the network"),
    training=("iterations", "the clock, the batch, rates, optimisers, checkpoints"),
    bytes=("gptq_calibration_batches", "quantisation and artifact"),
    scoring=("scores", "windows, test-time training, and the time that both may take"),
    systems=("caseops_enabled", "mechanisms of published systems; the submission has all off"))


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run; `Hyperparameters()` is the submission.

    Frozen: a change is a new object, made by `replace`, which runs every check again."""

    # -- run
    run_id: str = knob("", "name of the run's folder, no slash or blank; empty: date and time",
                       lambda v: not re.search(r"[^\w.+-]|^\.+$", v))
    recipe: str = knob("", "recipes joined by commas, left to right; single knobs are stronger")
    seed: int = knob(1337, "seed of every random generator", range(1 << 63))
    logs_dir: str = knob("logs", "folder in which each run gets a folder of its own")
    corpus: str = knob("", "embedded: text of this Python's library; shards: files; empty: either",
                       ("", "embedded", "shards").__contains__)
    data_dir: str = knob("./data", "where data sets, tokenizers and caches lie")
    data_path: str = knob("", "shards; empty: DATA_DIR/datasets/fineweb10B_sp<VOCAB_SIZE>")
    tokenizer_path: str = knob("", "empty: DATA_DIR/tokenizers/fineweb_<VOCAB_SIZE>_bpe.model")
    vocab_size: int = knob(8192, "rows of the token embedding, V", range(4, 65537))

    # -- model
    num_layers: int = knob(11, "layers whose weights are stored, L", range(1, 1001))
    model_dim: int = knob(512, "residual width, D", range(1, 1 << 20))
    num_heads: int = knob(8, "query heads, H", positive)
    num_kv_heads: int = knob(4, "key/value heads, K; NUM_HEADS must be a multiple", positive)
    mlp_mult: float = knob(4.0, "MLP width F / MODEL_DIM, above 0 to 256", lambda v: 0 < v <= 256)
    leaky_slope: float = knob(0.5, "slope of the squared ReLU below zero; 0: none", fraction)
    rope_dims: int = knob(16, "leading dimensions of each head that rotate", positive)
    rope_base: float = knob(10000.0, "base of the rotary frequencies", positive)
    qk_gain_init: float = knob(5.25, "initial gain of each query head after the QK norm", positive)
    ln_scale: bool = knob(True, "divide each layer's normalised input by sqrt(layer + 1)")
    xsa_last_n: int = knob(11, "last layers of exclusive attention (arXiv 2603.09078)", few)
    head_gate_scale: float = knob(0.5, "slope of the sparse head gate (#1787); 0: none", natural)
    smear_gate: str = one_of("token channel none", "mixes in the token before, by gates per (#162)")
    num_loops: int = knob(2, "extra passes over LOOP_START to LOOP_END", range(101))
    loop_start: int = knob(3, "first layer of the recurrent segment", natural)
    loop_end: int = knob(5, "last layer of the recurrent segment", natural)
    enable_looping_at: float = knob(0.35, "share of training before the recurrence", fraction)
    parallel_start_layer: int = knob(8, "first layer of PARALLEL_FORM; NUM_LAYERS: none", natural)
    logit_softcap: float = knob(30.0, "logits are squashed into (-softcap, softcap)", positive)
    pointer: bool = knob(True, "a head that copies tokens of the document (arXiv 1609.07843)")
    attention: str = one_of("auto fa3 fa2 varlen sdpa blocks", "attention kernel")

    # -- training
    iterations: int = knob(20000, "most steps", natural)
    max_wallclock_seconds: float = knob(
        600.0, "training clock, s; counts all that reads training data; 0: no clock", natural)
    train_batch_tokens: int = knob(786432, "tokens of one optimiser step over all ranks", positive)
    micro_batch_tokens: int = knob(98304, "tokens of one forward pass on one rank", positive)
    train_seq_len: int = knob(2048, "context and longest document piece, tokens", several)
    rehearsal_steps: int = knob(3, "rehearsed steps of each depth plan; 0: no rehearsal", few)
    lr_warmup_steps: int = knob(0, "steps over which the rates rise linearly", natural)
    warmdown_frac: float = knob(0.85, "last share of training, of linearly falling rates", fraction)
    min_lr: float = knob(0.1, "share of the peak rate at which the warmdown ends", fraction)
    matrix_lr: float = knob(0.026, "Muon rate of the matrices", natural)
    tied_embed_lr: float = knob(0.03, "AdamW rate of the embedding", natural)
    scalar_lr: float = knob(0.02, "AdamW rate of gains, scales and gates", natural)
    muon_momentum: float = knob(0.97, "Muon momentum", below_one)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at the first step", below_one)
    muon_momentum_warmup_steps: int = knob(1500, "steps over which the momentum rises", natural)
    beta2: float = knob(0.99, "AdamW decay of the square", below_one)
    muon_wd: float = knob(0.095, "decoupled weight decay of the matrices", natural)
    embed_wd: float = knob(0.085, "decoupled weight decay of the embedding", natural)
    adam_wd: float = knob(0.02, "decoupled weight decay of gains, scales and gates", natural)
    grad_clip_norm: float = knob(0.3, "largest global gradient norm; 0: no clipping", natural)
    ema_decay: float = knob(0.9965, "decay of the averaged weights, which are exported", below_one)
    train_log_every: int = knob(500, "steps between two training lines of the log", positive)
    val_loss_every: int = knob(0, "steps between two validation scores; 0: none", natural)
    fused_kernels: bool = knob(True, "Triton kernels where they work (Hopper GPUs or later)")
    compile: str = one_of("auto full block off", "torch.compile; auto: full on GPUs, block or off")
    precision: str = one_of("auto bf16 fp32", "number format of products; auto: bf16 if native")
    checkpoint_every_s: float = knob(
        600.0, "seconds between checkpoints; none where the clock is no longer; 0: never", natural)

    # -- bytes
    gptq_calibration_batches: int = knob(
        16, "micro-batches of text that the model writes for its own rounding", positive)
    rounding_steps: int = knob(32, "steps of distillation behind each rounded bank", natural)
    gptq_damping: float = knob(0.01, "added to its diagonals, as a share of their mean", positive)
    matrix_bits: int = knob(6, "bits per code of attention and MLP matrices", range(2, 9))
    embed_bits: int = knob(7, "bits per code of the embedding", range(2, 9))
    matrix_clip_sigmas: float = knob(12.85, "sigmas at a row's largest code; 0: maximum", natural)
    embed_clip_sigmas: float = knob(14.0, "likewise of the embedding", natural)
    trellis_states: int = knob(8, "states of the trellis down each column of codes: 4, 8 or 16; 0: "
                               "none", (0, 4, 8, 16).__contains__)
    step_search: str = one_of("layer uniform", "steps by damage, or by CLIP_SIGMAS alone")
    compressor: str = one_of("rans brotli zstd lzma zlib", "coder of the codes")
    budget_bytes: int = knob(16_000_000, "most bytes of packed code + artifact (decimal)", positive)

    # -- scoring
    scores: str = lists("quantized,sliding,ttt", " ".join(SCORES), "scores of the artifact", "")
    eval_seq_len: int = knob(2048, "longest window in scoring, tokens", several)
    eval_reach: int = knob(8, "windows back in which a stream's pointer looks", positive)
    eval_stride: int = knob(64, "tokens scored per sliding window", positive)
    eval_batch_tokens: int = knob(262144, "tokens of a scoring pass on one rank", positive)
    eval_budget_s: float = knob(480.0, "for ttt, s: its best form that fits; 0: any", natural)
    ttt_enabled: bool = knob(True, "score-first test-time training (the score `ttt`)")
    ttt: str = one_of("stream phased chunk", "form of test-time training")
    ttt_stream_chunk: int = knob(16, "tokens scored before a document's adapters learn", positive)
    ttt_steps: int = knob(1, "most Adam steps per scored chunk of a document", few)
    ttt_lora_lr: float = knob(0.003, "Adam rate of the fastest learner's adapters", natural)
    ttt_lr_decay: float = knob(0.5, "that rate falls as (1 + n / 4)^-this over chunks n", natural)
    ttt_learners: int = knob(
        3, "predictors mixed by past losses; the last of several never learns", range(1, 101))
    ttt_targets: str = lists("q,v,o,mlp,head", "q k v o mlp head", "adapted maps")
    ttt_lora_rank: int = knob(32, "rank R of the per-row adapters", positive)
    ttt_lora_alpha: float = knob(16.0, "adapters are scaled by this / TTT_LORA_RANK", natural)
    ttt_chunk_tokens: int = knob(32768, "tokens scored before all weights learn", positive)
    ttt_lr: float = knob(0.002, "SGD rate of all weights at first; falls as a cosine", natural)
    ttt_epochs: int = knob(3, "passes over each scored chunk", few)
    ttt_batch_seqs: int = knob(32, "sequences of TRAIN_SEQ_LEN per step, over all ranks", positive)
    ttt_freeze_blocks: int = knob(0, "first layers that all-weights adaptation leaves", natural)
    ttt_lr_ramp: float = knob(1.0, "share of its rate in the first layer, rising to all", fraction)

    # -- systems
    caseops_enabled: bool = knob(False, "shards of CaseOps text (#1729)")
    short_val_allowed: bool = knob(False, "take published CaseOps shards cut short")
    doc_mask: bool = knob(True, "attention stays inside documents")
    loader: str = one_of("shuffled stream", "order of training blocks")
    train_seq_schedule: str = knob(
        "", "contexts up to a share of training: 1024@0.1,2048@1 (#2014)",
        lambda v: re.fullmatch(r"([1-9]\d{,8}@(0?\.\d+|1)(,(?!$)|$))*", v))
    matrix_init: str = one_of("orthogonal uniform", "matrices at first")
    bigram_vocab_size: int = knob(0, "rows of the bigram embedding (#162)", natural)
    ve_dim: int = knob(0, "width of the value embedding of the last two layers (#374)", natural)
    skip_gates: bool = knob(True, "gated U-Net skips; 0: weighted sums")
    parallel_form: str = one_of("lanes apart gptj none", "parallel layers (#1204, #1539, #1493)")
    asym_logit_rescale: bool = knob(False, "softcaps by sign, which TTT moves (#1945)")
    recur_start_step: int = knob(0, "first recurrent step; 0: ENABLE_LOOPING_AT", natural)
    polar_express: bool = knob(True, "Polar Express; 0: Newton-Schulz")
    muon_backend_steps: int = knob(5, "iterations of Muon", range(1, 6))
    muon_row_normalize: bool = knob(True, "rows of Muon's momentum at norm one (#1285)")
    warmdown_iters: int = knob(0, "steps of the warmdown; 0: WARMDOWN_FRAC", natural)
    late_qat_threshold: float = knob(0.0, "rate factor of rounded training (#578)", fraction)
    clip_search: bool = knob(False, "best of 5 percentiles clips each matrix row (#414)")
    gptq_roles: str = one_of("all matrices none", "what GPTQ rounds")
    ttt_phases: int = knob(3, "parts of the stream between which phased learns", positive)
    ttt_max_chunks: int = knob(0, "parts SGD learns from, its cosine's length; 0: all", natural)
    ttt_ema_decay: float = knob(0.0, "decay of the average of SGD's weights that scores", below_one)
    prequant_ttt_epochs: int = knob(0, "passes of adaptation before scoring (#1364)", few)
    prequant_ttt_lr: float = knob(5e-4, "their first rate", natural)
    prequant_ttt_data: str = one_of(
        "train val after", "their text: held out of training, by AdamW before GPTQ; val likewise; "
        "after: val by SGD behind GPTQ (#398); the last two break rule C3")

    def __post_init__(self):
        """Checks every range and every relation between knobs; raises `Refusal`."""
        for f in fields(self):
            # an infinite rate is `natural`, and would show only as a loss that is not finite; whole
            # numbers beyond 2^53 are none to the floats that they meet
            value = getattr(self, f.name)
            exact = isinstance(value, str) or f.name == "seed" or abs(value) < 1 << 53
            words = f.metadata["words"] if exact else "below 2^53"
            require(exact and f.metadata["check"](value), f"{f.name.upper()}={value!r} is out of "
                    f"range{words and f', expected {words}'}: {f.metadata['meaning']}")
        # A step is whole micro-batches and a micro-batch whole rows, so that tokens weigh alike;
        # learning cuts a chunk into such rows and drops what is left over.
        h, F_ = self, self.mlp_mult * self.model_dim
        for whole, part in (("model_dim", "num_heads"), ("num_heads", "num_kv_heads"),
                            ("train_batch_tokens", "micro_batch_tokens"),
                            ("micro_batch_tokens", "train_seq_len"),
                            ("ttt_chunk_tokens", "train_seq_len")):
            big, small = getattr(h, whole), getattr(h, part)
            require(big % small == 0,
                    f"{whole.upper()}={big} must be a multiple of {part.upper()}={small}")
        for holds, why in (
            (F_ == int(F_), "MLP_MULT={mlp_mult} x MODEL_DIM={model_dim} must be a whole number"),
            # rotation turns dimensions in pairs
            (h.rope_dims % 2 == 0 and h.rope_dims <= h.head_dim,
             "ROPE_DIMS={rope_dims} must be even and at most the head size MODEL_DIM / NUM_HEADS"),
            (h.num_loops == 0 or h.loop_start <= h.loop_end < h.num_layers,
             "LOOP_START={loop_start} <= LOOP_END={loop_end} < NUM_LAYERS={num_layers} must hold"),
            # a longer stride would leave targets between two windows unscored
            (h.eval_stride <= h.eval_seq_len,
             "EVAL_STRIDE={eval_stride} must be at most EVAL_SEQ_LEN={eval_seq_len}"),
            (h.max_wallclock_seconds > 0 or h.iterations > 0,
             "one of MAX_WALLCLOCK_SECONDS and ITERATIONS must be above zero"),
            (all(T <= h.train_seq_len and h.micro_batch_tokens % T == 0 for _, T in h.contexts),
             "TRAIN_SEQ_SCHEDULE={train_seq_schedule} must hold divisors of MICRO_BATCH_TOKENS="
             "{micro_batch_tokens} up to TRAIN_SEQ_LEN={train_seq_len}"),
            (not h.ve_dim or h.num_layers > 1,
             "VE_DIM={ve_dim} needs two layers, not NUM_LAYERS={num_layers}"),
            # a step can round each weight to its nearest code, but not search whole columns
            (not h.late_qat_threshold or not h.trellis_states,
             "LATE_QAT_THRESHOLD={late_qat_threshold} needs TRELLIS_STATES=0, not "
             "{trellis_states}"),
        ):
            require(holds, why.format(**h.__dict__))

    @property
    def head_dim(self) -> int:
        """Head size E."""
        return self.model_dim // self.num_heads

    @property
    def gate_window(self) -> int:
        """Leading channels that drive the head gate and the smear gate: the published 12."""
        return min(12, self.model_dim)

    @property
    def valued(self) -> list[int]:
        """Layers whose values get an embedding of their token: the last two."""
        return [self.num_layers - 2, self.num_layers - 1] if self.ve_dim else []

    @property
    def contexts(self) -> list[tuple[float, int]]:
        """(share of training up to which, longest context T) in order."""
        stages = self.train_seq_schedule or f"{self.train_seq_len}@1"
        return [(float(end), int(T)) for T, end in (s.split("@") for s in stages.split(","))]

    @classmethod
    def from_env(cls, env: Mapping[str, str], recipe: str = "record", base: Mapping[str, Any] = {},
                 note: Callable[[str], Any] = str) -> Hyperparameters:
        """`base`, recipes from left to right, single variables. Raises `Refusal` for values and
        near-miss names; names that change nothing go to `note`."""
        recipe, (env, lines) = env.get("RECIPE") or recipe, known_names(env)
        for line in lines:
            note(f"note: {line}")
        single = parse_knobs({n: env[n] for n in KNOBS if n in env and n != "RECIPE"})
        return cls(**apply_recipes(recipe, base) | dict(recipe=recipe) | single)

    def changed(self) -> dict[str, Any]:
        """Name -> value of every knob that differs from the submission, PLACES and what the machine
        can do left out."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if getattr(self, f.name) != f.default and f.name not in (*PLACES, "fused_kernels")}


KNOBS = {f.name.upper(): f for f in fields(Hyperparameters)}    # variable -> its declaration

# A row: name, source, legal or the rule that it breaks, BPB as its authors reported it; what
# differs from the original; the run block, which may begin with the RECIPE that it builds on.
# Mechanisms and rates are what the authors ran, not what is advisable. The systems come in two
# families, named by their tokenizers; the latest are close to the defaults. ROPE_BASE=22081.79 is
# 10,000 under the NTK rule, for a rotary train length of 1024 and a context of 2048.
RECIPE_TABLE = """
record | this script | legal | -
    the defaults; not yet run on 8xH100

demo | this script | legal | -
    a size for two CPU cores; RECIPE=pr578,demo shrinks any system
    VOCAB_SIZE=1024 NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1 QK_GAIN_INIT=2
    XSA_LAST_N=4 NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 RECUR_START_STEP=100
    TRAIN_SEQ_LEN=256 TRAIN_SEQ_SCHEDULE=64@0.1,128@0.7,256@1 TRAIN_BATCH_TOKENS=4096
    MICRO_BATCH_TOKENS=4096 MAX_WALLCLOCK_SECONDS=60 REHEARSAL_STEPS=1 TRAIN_LOG_EVERY=50
    LR_WARMUP_STEPS=20 WARMDOWN_ITERS=300 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85
    MUON_MOMENTUM_WARMUP_STEPS=100 EMA_DECAY=0.98 GPTQ_CALIBRATION_BATCHES=2
    ROUNDING_STEPS=2 BUDGET_BYTES=400_000 SCORES=prequant,quantized,sliding,ttt EVAL_SEQ_LEN=256
    EVAL_STRIDE=64 EVAL_BATCH_TOKENS=8192 TTT_CHUNK_TOKENS=2048 TTT_LORA_LR=0.024 TTT_LORA_RANK=32
    TTT_LORA_ALPHA=16 TTT_LR=0.01 TTT_EPOCHS=2 TTT_BATCH_SEQS=16

field | what the latest systems share | legal | -
    no pointer head: the form in which `record` began
    POINTER=0

sp1024 | what #398, #578 and #1364 share | legal | -
    row scales without the floor of 1/31 that ruins small models; every target scored once
    RECIPE=field VOCAB_SIZE=1024 MLP_MULT=3 LEAKY_SLOPE=0 ROPE_BASE=22081.790273476247
    QK_GAIN_INIT=1.5 XSA_LAST_N=0 HEAD_GATE_SCALE=0 SKIP_GATES=0 SMEAR_GATE=channel
    BIGRAM_VOCAB_SIZE=2048 NUM_LOOPS=0 PARALLEL_FORM=none DOC_MASK=0 LOADER=stream
    WARMDOWN_ITERS=3500 MIN_LR=0 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035
    MUON_MOMENTUM=0.99 POLAR_EXPRESS=0 MUON_ROW_NORMALIZE=0 MUON_WD=0.04 EMBED_WD=0.04 ADAM_WD=0.04
    BETA2=0.95 EMA_DECAY=0.997 EMBED_BITS=8 MATRIX_CLIP_SIGMAS=0 EMBED_CLIP_SIGMAS=0
    STEP_SEARCH=uniform COMPRESSOR=zstd TTT=chunk TTT_ENABLED=0

sp8192 | what #1493 and #1539 share | legal | -
    nothing
    RECIPE=field HEAD_GATE_SCALE=0 SMEAR_GATE=none PARALLEL_START_LAYER=7 DOC_MASK=0
    WARMDOWN_FRAC=0.72 MIN_LR=0 MATRIX_LR=0.022 MUON_MOMENTUM=0.99 BETA2=0.95 EMBED_BITS=8
    EMBED_CLIP_SIGMAS=20 TRELLIS_STATES=0 STEP_SEARCH=uniform COMPRESSOR=brotli TTT=chunk

prequant | adaptation before GPTQ, #1364 | breaks C3 | -
    whole layers freeze or slow down (published: scalars only), rounding in training reaches the
    matrices (published: it does not)
    PREQUANT_TTT_EPOCHS=6 PREQUANT_TTT_DATA=val TTT_FREEZE_BLOCKS=2 TTT_BATCH_SEQS=256

baseline | openai/parameter-golf, NaiveBaseline | legal | 1.2244
    published on an older export of the validation set
    RECIPE=sp1024 NUM_LAYERS=9 MLP_MULT=2 ROPE_DIMS=64 ROPE_BASE=10000 LN_SCALE=0 SMEAR_GATE=none
    BIGRAM_VOCAB_SIZE=0 MATRIX_INIT=uniform TRAIN_BATCH_TOKENS=524288 MICRO_BATCH_TOKENS=65536
    TRAIN_SEQ_LEN=1024 WARMDOWN_ITERS=1200 MATRIX_LR=0.04 SCALAR_LR=0.04 TIED_EMBED_LR=0.05
    MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 MUON_WD=0
    EMBED_WD=0 ADAM_WD=0 GRAD_CLIP_NORM=0 EMA_DECAY=0 MATRIX_BITS=8 GPTQ_ROLES=none COMPRESSOR=zlib
    SCORES=quantized EVAL_SEQ_LEN=1024 EVAL_STRIDE=1024

pr398 | #398 | breaks C3 | 1.1221
    as sp1024
    RECIPE=sp1024 ITERATIONS=9000 WARMDOWN_ITERS=3000 GPTQ_ROLES=none PREQUANT_TTT_EPOCHS=20
    PREQUANT_TTT_DATA=after PREQUANT_TTT_LR=0.008 TTT_BATCH_SEQS=256

pr398_legal | #398 | legal | -
    score-first SGD by chunks in place of SGD on validation
    RECIPE=sp1024 ITERATIONS=9000 WARMDOWN_ITERS=3000 GPTQ_ROLES=none TTT_ENABLED=1

pr578 | #578 | legal | 1.1215
    correct GPTQ, calibrated inside the clock (published: after it); unused SWA snapshots left out
    RECIPE=sp1024 XSA_LAST_N=4 VE_DIM=128 LATE_QAT_THRESHOLD=0.5 CLIP_SEARCH=1 TRELLIS_STATES=0
    GPTQ_ROLES=matrices GPTQ_CALIBRATION_BATCHES=6 TTT_ENABLED=1 TTT_EMA_DECAY=0.995
    TTT_FREEZE_BLOCKS=2 TTT_MAX_CHUNKS=200

pr1364 | #1364 | breaks C3 | 1.1025
    QK gain 4.0 of its README (its script: 1.5)
    RECIPE=pr578,prequant LEAKY_SLOPE=0.5 QK_GAIN_INIT=4 XSA_LAST_N=11 LATE_QAT_THRESHOLD=0.15
    GPTQ_CALIBRATION_BATCHES=256 GPTQ_DAMPING=0.02 COMPRESSOR=lzma TTT_ENABLED=0

pr1364_legal | #1364 | legal | -
    adapts to a held-out end of the training shards inside the clock
    RECIPE=pr1364 PREQUANT_TTT_DATA=train

dttt | #1351 | breaks C3 | 1.0807
    as pr1364
    RECIPE=pr1364 QK_GAIN_INIT=5 WARMDOWN_ITERS=4000 GPTQ_DAMPING=0.01 PREQUANT_TTT_EPOCHS=10
    TTT_FREEZE_BLOCKS=0 TTT_LR_RAMP=0.3

dttt_legal | #1351 | legal | -
    adapts to a held-out end of the training shards inside the clock
    RECIPE=dttt PREQUANT_TTT_DATA=train

pr1539 | #1539 | breaks C3 | 1.0587
    row scales without the floor of 1/31; calibrates the model itself (published: a copy without
    recurrence and lanes); momentum rows scaled along the stored rows
    RECIPE=sp8192,prequant SMEAR_GATE=channel SKIP_GATES=0 ROPE_BASE=22081.790273476247
    VE_DIM=44 PARALLEL_FORM=apart NUM_LOOPS=1 RECUR_START_STEP=3000 LOADER=stream EMBED_WD=0.095
    MUON_BACKEND_STEPS=4 LATE_QAT_THRESHOLD=0.15 GPTQ_ROLES=matrices GPTQ_DAMPING=0.02
    GPTQ_CALIBRATION_BATCHES=1 TTT_ENABLED=0 TTT_BATCH_SEQS=32

pr1539_legal | #1539 | legal | -
    adapts to a held-out end of the training shards inside the clock
    RECIPE=pr1539 PREQUANT_TTT_DATA=train

pr1493 | #1493 | legal | 1.0810
    without the hash embedding that its logs show and its script lacks
    RECIPE=sp8192 PARALLEL_FORM=gptj GPTQ_CALIBRATION_BATCHES=64 TTT_LR=0.005

pr1855 | #1855 | legal | 1.0611
    one clip of 12 sigmas (published: 13 attention, 11.5 MLP), no LQER; adapters by document read
    a cache (published: each window anew), have clipped steps and no weight decay; all weights
    learn between three parts of the stream (published: within its first 2,500 documents)
    RECIPE=field CASEOPS_ENABLED=1 QK_GAIN_INIT=5 MATRIX_CLIP_SIGMAS=12 TRELLIS_STATES=0
    STEP_SEARCH=uniform COMPRESSOR=brotli TTT=phased TTT_LORA_RANK=80 TTT_LORA_ALPHA=144
    TTT_LORA_LR=1e-4 TTT_LR_DECAY=0 TTT_LEARNERS=1 TTT_STREAM_CHUNK=48 TTT_TARGETS=q,k,v,o,mlp,head

pr2014 | #2014 | legal | 1.0576
    no AWQ-lite, no shorter chunks for short documents; TTT moves the softcaps (published: no
    gradient reached them)
    RECIPE=pr1855 QK_GAIN_INIT=5.25 TRAIN_SEQ_LEN=3072 TRAIN_SEQ_SCHEDULE=1024@0.1,2048@0.7,3072@1
    EVAL_SEQ_LEN=3072 EVAL_STRIDE=1536 TTT_CHUNK_TOKENS=30720 TTT_PHASES=1 TTT_LORA_LR=7.5e-5
    TTT_TARGETS=k,o,mlp,head ASYM_LOGIT_RESCALE=1

pr2135 | #2135 | legal | 1.0565
    no n-gram tilt; SmearGate stops at document starts (published: not in training); TTT moves the
    softcaps (published: no gradient reached them)
    RECIPE=pr1855 MATRIX_LR=0.028 GPTQ_CALIBRATION_BATCHES=32 EVAL_SEQ_LEN=2560 TTT_PHASES=1
    TTT_LORA_LR=8e-5 TTT_TARGETS=q,v,o,mlp,head ASYM_LOGIT_RESCALE=1
"""
RECIPES = {row.split(" ")[0]: " ".join(re.findall(r"^ +([A-Z0-9_]+=.*)", row, re.M))
           for row in RECIPE_TABLE.strip().split("\n\n")}    # name -> run block


def apply_recipes(names: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The knob values after these recipes, joined by commas; `Refusal` for an unknown one."""
    values = dict(values)
    for name in names.split(","):
        require(name in RECIPES, f"RECIPE={names}: there is no recipe {name!r}"
                f"{nearest(name, RECIPES)}; known: {', '.join(RECIPES)}")
        block = dict(part.split("=", 1) for part in RECIPES[name].split())
        if stem := block.pop("RECIPE", ""):
            values = apply_recipes(stem, values)
        own = parse_knobs(block)
        if name == "demo":
            # Sizes are not mechanisms: what a recipe has off, the demo leaves off; and it gives
            # no smaller budget to what does not search steps to fill one.
            own = {n: v for n, v in own.items() if n == "lr_warmup_steps"
                   or values.get(n, KNOBS[n.upper()].default)}
            if values.get("step_search") == "uniform":
                del own["budget_bytes"]
        values |= own
    return values


# Strict on purpose: "yes", "1e4" for a count or an empty switch may mean two things, and a guess
# would train a model that nobody asked for. 1_000_000 is a number as it is in Python.
def parse_knobs(variables: Mapping[str, str]) -> dict[str, Any]:
    """Knob -> the text of its variable as the knob's type; raises `Refusal`."""
    switch = dict(zip(("0", "1", "false", "true"), (False, True) * 2))
    parsers = dict(int=(lambda s: int(s.replace("_", "")), "a whole number"),
                   float=(float, "a number"), str=(str, "text"),
                   bool=(lambda s: switch[s.strip().lower()], "0 or 1"))
    values = {}
    for name, raw in variables.items():
        place = name.endswith(("_DIR", "_PATH"))    # files of variables keep the ~ of a shell
        parse, wanted = (os.path.expanduser, "") if place else parsers[KNOBS[name].type]
        try:
            values[name.lower()] = parse(raw)
        except (ValueError, KeyError):
            raise Refusal(f"{name}={raw!r} must be {wanted}: {KNOBS[name].metadata['meaning']}"
                          ) from None
    return values


def run_block(values: Mapping[str, Any]) -> str:
    """The inverse of `parse_knobs`: NAME=value, with a blank between two."""
    return " ".join(f"{n.upper()}={int(v) if isinstance(v, bool) else v}"
                    for n, v in values.items())


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean ...?` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# Variables of published scripts, as a pasted run block brings them: a knob of ours under another
# name; what is built in here, with its value; what changes no result; what would change one and has
# no counterpart, unless it is switched off.
OTHER_NAMES, BUILT_IN = (dict(part.split("=") for part in text.split()) for text in ("""
    VAL_BATCH_TOKENS=EVAL_BATCH_TOKENS VAL_BATCH_SIZE=EVAL_BATCH_TOKENS
    TTT_CHUNK_SIZE=TTT_STREAM_CHUNK TTT_EVAL_SEQ_LEN=EVAL_SEQ_LEN TTT_GRAD_STEPS=TTT_STEPS
    PHASED_TTT_NUM_PHASES=TTT_PHASES GLOBAL_TTT_LR=TTT_LR GLOBAL_TTT_EPOCHS=TTT_EPOCHS
    GLOBAL_TTT_BATCH_SEQS=TTT_BATCH_SEQS GLOBAL_TTT_CHUNK_TOKENS=TTT_CHUNK_TOKENS
    SPARSE_ATTN_GATE_SCALE=HEAD_GATE_SCALE SKIP_GATES_ENABLED=SKIP_GATES
    NEGATIVE_SLOPE=LEAKY_SLOPE MUON_WEIGHT_DECAY=MUON_WD ADAM_WEIGHT_DECAY=ADAM_WD
    GPTQ_CALIB_BATCHES=GPTQ_CALIBRATION_BATCHES""", """
    BETA1=0.9 ADAM_EPS=1e-8 TIE_EMBEDDINGS=1 TIED_EMBED_INIT_STD=0.005 GATE_WINDOW=12
    BIGRAM_DIM=128 EMA_ENABLED=1 PARALLEL_FINAL_LANE=mean SPARSE_ATTN_GATE_ENABLED=1
    SMEAR_GATE_ENABLED=1 GATED_ATTN_QUANT_GATE=1 TTT_BETA1=0 TTT_BETA2=0.99 TTT_OPTIMIZER=adam
    TTT_MOMENTUM=0.9 TTT_GRAD_CLIP=1 GLOBAL_TTT_MOMENTUM=0.9 GLOBAL_TTT_GRAD_CLIP=1
    VAL_DOC_FRACTION=1 COMPRESSOR=pergroup CALIBRATION=self"""))
IDLE = """
    WARMUP_STEPS CHECKPOINT_* EMBED_LR HEAD_LR FUSED_CE_ENABLED TTT_BATCH_SIZE TTT_EVAL_BATCHES
    TTT_HEARTBEAT_SECONDS TTT_DEBUG_BYPASS TTT_OUTPUT_DIR ARTIFACT_DIR EVAL_BATCH_SEQS
    SW_EVAL_BATCH SLIDING_WINDOW_ENABLED ZSTD_LEVEL USE_ZSTD COMPILE_MODEL USE_COMPILE
    *_GATE_INIT_STD GATED_ATTN_INIT_STD NGRAM_HINT_PRECOMPUTE_OUTSIDE PHASED_TTT_ENABLED
    MODEL_SAVE_PATH GPTQ_RESERVE_SECONDS""".split()
ABSENT = """
    MLP_CLIP_SIGMAS ATTN_CLIP_SIGMAS LQER_* AWQ_* NGRAM_* TOKEN_ORDER TOKEN_THRESHOLD TOKEN_BOOST
    WITHIN_* WORD_TAU WORD_BOOST AGREE_ADD_BOOST PHASED_TTT_* GLOBAL_TTT_* TTT_WEIGHT_DECAY
    TTT_?_LORA TTT_MLP_LORA TTT_LORA_EMA_DECAY TTT_UPDATE_EVERY TTT_WARM_START_A
    SMEAR_GATE_BOS_FIX SPARSE_ATTN_GATE_* GATED_ATTN_* GATED_ATTENTION ATTN_OUT_GATE_* ROPE_YARN
    ROPE_TRAIN_SEQ_LEN MUON_BETA2 MTP_* SWA_* LAWA_* QAT_* LATE_QAT VE_ENABLED VE_LAYERS SLOT_*
    TRIGRAM DTG_ENABLED VALUE_RESIDUAL EVAL_NTK_ALPHA MARKER_PAIR_* MLP_HIDDEN WD_TAPER_*
    PRUNE_RATIO UNTIE_LOOPS""".split()


def known_names(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(the environment with published names as our knobs, lines on what changes nothing or may be
    meant for others); raises a `Refusal` that lists all names that would change a result and have
    no counterpart, or for what is nearly a knob: a typo must not train the wrong model."""
    # The same words in another order (LR_MATRIX) are as much a typo as a wrong letter. Names of up
    # to four letters are let pass: among so many knobs they resemble one by chance. Containers and
    # shells set places of their own (MODEL_DIR, LOG_DIR).
    words = {tuple(sorted(name.split("_"))): name for name in KNOBS}
    like = lambda patterns: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    found, lines, idle, absent = dict(env), [], [], []
    for name, value in env.items():
        same = value == BUILT_IN.get(name)
        with contextlib.suppress(ValueError):
            same = same or float(value) == float(BUILT_IN.get(name, "nan"))
        if same:
            del found[name]
        elif name in OTHER_NAMES:
            ours = found.setdefault(knob := OTHER_NAMES[name], value)
            require(value == ours or knob in env, f"{name}={value}, but its {knob} is {ours}")
        elif name in KNOBS or name in ("COMPILER", "SEEDS"):
            continue
        elif like(IDLE):
            idle.append(f"{name}={value}")
        elif name in BUILT_IN or like(ABSENT):
            absent += [f"{name}={value}"] * (name in BUILT_IN or value not in ("", "0", "false"))
        elif (len(name) > 4 or name.upper() in KNOBS) and (
                close := words.get(tuple(sorted(name.upper().split("_")))) or
                "".join(difflib.get_close_matches(name.upper(), KNOBS, 1, 0.87))):
            told = f"{name} is no knob; did you mean {close}? (it is set to {value!r})"
            require(close == "RUN_ID" or re.search("(DIR|PATH|ROOT|FILE)S?$", name), told)
            lines.append(told)
    require(not absent, f"{', '.join(absent)}: published scripts know these names, this one has no "
            "counterpart, and the result would be another; leave them unset")
    return found, lines + [
        f"no counterpart, and no result depends on it: {', '.join(idle)}"] * bool(idle)


def help_text(topic: str = "") -> str:
    """The title and all knobs, one group of them, or the recipes; else raises `Refusal`."""
    groups: dict[str, list[str]] = {}
    for f in fields(Hyperparameters):
        for group, (first, about) in GROUPS.items():
            if f.name == first:
                groups[group] = rows = [f"{group}: {about}"]
        rows.append(f"  {f.name.upper():28} {f.type:6} {str(f.default):14} {f.metadata['meaning']}")
    texts = {name: "\n".join(rows) for name, rows in groups.items()}
    if topic:
        texts["recipes"] = RECIPE_TABLE.strip()
        require(topic in texts, f"--help {topic}: expected one of {', '.join(texts)}")
        return texts[topic]
    return "\n\n".join([
        (__doc__ or "A packed run of train_gpt.py").strip(),
        f"Recipes (RECIPE=a,b; --help recipes): {', '.join(RECIPES)}",
        f"Knobs: variable, type, default, meaning (--help GROUP: {', '.join(groups)})",
        *texts.values()])


# ==================================================================================================
# 3. World and log
# Where this process stands among its peers (`World`; alone, every collective is the identity), the
# `Clock`, the run's folder and `Log`, whose lines have the forms that leaderboard tools parse.
# What all ranks must decide alike (stop, save, steps per chunk) is decided by a number that a
# collective gave to all: a rank that goes by its own clock leaves the others waiting.
# ==================================================================================================
class Outlet(io.FileIO):
    """Standard output or error, which may go away: a closed pipe, a lost terminal or a full disk
    lose the text, not the run. It has no buffer, so that nothing is left to fail at exit."""

    def write(self, data: bytes) -> int:
        """Writes what can be written, and says that all was."""
        rest = memoryview(data)
        with contextlib.suppress(OSError):
            # a stream that does not block may take a part, or None for now
            while rest and ((sent := super().write(rest)) or select.select((), [self], (), 0.1)[1]):
                rest = rest[sent or 0:]
        return len(data)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block all output goes to an `Outlet`, its unprintable characters escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:    # closed: else the next file to be opened would get what is printed
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    with contextlib.ExitStack() as stack:
        for number, stream, own, redirect in (
                (1, sys.stdout, sys.__stdout__, contextlib.redirect_stdout),
                (2, sys.stderr, sys.__stderr__, contextlib.redirect_stderr)):
            if stream is None or stream is own:    # else somebody else listens already
                stack.enter_context(redirect(io.TextIOWrapper(
                    Outlet(number, "w", closefd=False), getattr(stream, "encoding", "utf-8"),
                    "backslashreplace", line_buffering=True)))
        yield


def heed(handler: Any) -> dict[int, Any]:
    """Makes `handler` answer whatever asks this process to stop (Ctrl-C, kill, a closed session,
    the warnings of schedulers); returns what answered before."""
    if threading.current_thread() is not threading.main_thread():    # which alone has signals
        return {}
    names = {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"} & {*dir(signal)}
    numbers = [getattr(signal, name) for name in sorted(names)]
    # nohup ignores hangups, and means it; SIGINT is ignored in whatever a script starts with "&"
    return {number: signal.signal(number, handler) for number in numbers
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN}


def restore_signals(before: Mapping[int, Any]) -> None:
    """Undoes `heed`."""
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)


def interrupt(number: int, _: Any) -> None:
    """Ends what is under way in one sentence, as a signal handler: `main` catches it."""
    heed(signal.SIG_IGN)    # a launcher passes on the Ctrl-C that the terminal sent as well
    raise KeyboardInterrupt(
        f"stopped by a signal ({signal.Signals(number).name}); no checkpoint was made by it")


def on_terminal() -> bool:
    """True where standard output can show a line that changes."""
    return bool(sys.stdout and sys.stdout.isatty())


def cpu_count(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processors that this process may use: its affinity, within the quota of its container."""
    count = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    # "200000 100000" are two processors, "max 100000" is no limit
    quota, period = limit.read_text().split() if limit.is_file() else ("max", "1")
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def complain(error: object, env: Mapping[str, str] = os.environ) -> int:
    """Says on standard error why this process ends, and where; returns the exit status, 2."""
    node = f"node {env.get('GROUP_RANK', 0)} = {platform.node()}"
    rank = f" (rank {env['RANK']}, {node})" if "RANK" in env else ""
    told = f"train_gpt.py: error{rank}: {error}"    # in which a name may hold anything
    told = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in told)
    print(told, file=sys.stderr, flush=True)
    return 2


JOIN_S = 300    # for ranks to find each other
SILENCE_S = 25    # after which a reader wonders whether a process still lives


class Watch:
    """Learns that a rank died from its system, which closes what a process had open: who works
    alone for hours never looks dead. Each rank has a connection to rank 0, which passes on who
    died first; a machine that went away is one that answers no keep-alives for 20 s."""

    def __init__(self, rank: int, size: int, store: dist.Store, host: str):
        """Connects every rank with rank 0, which puts its port and a token into the store; listens
        from now on. Raises OSError where a rank does not come within JOIN_S."""
        self.lines, self.lost, self.dead, self.left = {}, [], threading.Event(), False
        if rank == 0:
            both, token = socket.has_dualstack_ipv6(), os.urandom(16).hex()
            family = socket.AF_INET6 if both else socket.AF_INET
            expected = {f"{token}{r:8}".encode(): r for r in range(1, size)}
            end_s = time.monotonic() + JOIN_S
            with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
                server.settimeout(1)
                store.set("watch", f"{server.getsockname()[1]} {token}")
                while expected and time.monotonic() < end_s:
                    # nobody calls yet, or a scanner of ports does, and says nothing or rubbish
                    with contextlib.suppress(OSError, KeyError):
                        line = server.accept()[0]
                        line.settimeout(1)
                        self.lines[line] = expected.pop(line.recv(40))
            if expected:
                raise TimeoutError(f"ranks {[*expected.values()]} did not call rank 0")
        else:
            port, token = store.get("watch").decode().split()
            self.lines[socket.create_connection((host, int(port)), JOIN_S)] = 0
            self.tell(f"{token}{rank:8}")
        for line in self.lines:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # after 4 s, 4 times, every 4 s, by those names that this system has
            for name in {"TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"} & {*dir(socket)}:
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), 4)
        threading.Thread(target=self.listen, daemon=True).start()

    def tell(self, words: str) -> None:
        """Says to the other ends, in 40 bytes, who calls, or who died, or that this rank left."""
        for line in [*self.lines]:
            with contextlib.suppress(OSError):    # dead as well
                line.sendall(words.ljust(40).encode())

    def listen(self) -> None:
        """Waits, as a thread, for the first death; who ends after it ends because of it. The main
        thread has 5 s to find that out, else this one ends the process in one sentence."""
        while self.lines and not self.lost:
            line = select.select([*self.lines], (), ())[0][0]
            rank, words = self.lines.pop(line), b""
            with contextlib.suppress(OSError):    # broken, which says as much as closed
                words = line.recv(40).strip()
            if not (self.left or words == b"left"):
                self.lost.append(int(words or rank))
        if self.lost:
            self.dead.set()
            self.tell(f"{self.lost[0]}")
            time.sleep(5)
            if not self.left:
                os._exit(complain(f"another rank was lost: {self.lost}; see its own messages"))


@dataclass(frozen=True)
class World:
    """This process: rank, number of ranks, device; and all collectives that the file knows."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    watch: Watch | None = None    # of several ranks

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> World:
        """Joins the group that torchrun describes: NCCL on GPUs, gloo on CPUs; else `Refusal`."""
        crowd = {name: env[name] for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
                 if env.get(name, "") not in ("", "0", "1")}
        require(not crowd or {"RANK", "WORLD_SIZE"} & {*env}, f"{run_block(crowd)} without RANK: "
                "start these processes with torchrun, or set WORLD_SIZE=1 where one is all")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        said = run_block({name: env[name] for name in names if name in env})
        with refusing(f"{said}: this group of ranks cannot be joined; start it with torchrun",
                      ValueError, RuntimeError, OSError):
            rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
            # started by hand, rank by rank, processes take the GPUs of their node in turn
            local = int(env.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))
            if not (0 <= rank < size and 0 <= local and (size == 1 or {*names[3:]} <= {*env})):
                raise ValueError("0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK must hold, and "
                                 f"{' and '.join(names[3:])} be set")
            device = cls.claim_device(local)
            if size == 1:
                return cls(rank, size, device)
            if local == 0:
                print(f"ranks: {said} waits for the others, at most {JOIN_S} s", file=sys.stderr)
            limit, day = datetime.timedelta(seconds=JOIN_S), datetime.timedelta(days=1)
            store = next(dist.rendezvous("env://", rank, size, timeout=limit))[0]
            # torchrun's own store outlives a group that it starts again
            store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", ""), store)
            watch = Watch(rank, size, store, env["MASTER_ADDR"])
            store.set_timeout(day)    # one rank may work alone for hours; `watch` notices deaths
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store,
                                    rank=rank, world_size=size, timeout=day)
            return cls(rank, size, device, watch)

    @staticmethod
    def claim_device(local: int) -> torch.device:
        """This process's own GPU, or the CPU where there is none; `Refusal` if GPUs are too few."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        require(local < count, f"LOCAL_RANK={local} has no GPU of its own (this node shows "
                f"{count}); start at most one process per GPU")
        # from here on "cuda" without a number, and NCCL, mean this GPU
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    @property
    def main(self) -> bool:
        """True on the rank that writes files and log lines."""
        return self.rank == 0

    def together(self, collective: Callable, *arguments: Any, **options: Any) -> Any:
        """What a collective of several ranks returns; `Refusal` names the rank that died."""
        try:
            return collective(*arguments, **options) if self.size > 1 else None
        except RuntimeError as error:
            self.watch.dead.wait(25)    # of a whole machine it is known last
            raise Refusal(f"another rank was lost: {self.watch.lost or 'unknown'} "
                          f"({brief(error)}); see its own messages") from None

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over the ranks, in place."""
        self.together(dist.all_reduce, t)
        return t

    def mean(self, t: Tensor) -> Tensor:
        """The mean of `t` over the ranks, in place."""
        return self.sum(t).div_(self.size) if self.size > 1 else t

    def begun(self, collective: Callable, out: Tensor, *source: Tensor) -> Callable[[], Tensor]:
        """Starts a collective that fills `out`, and returns at once; what it returns waits for it
        (on GPUs the stream does, not the host) and gives `out`."""
        work = self.together(collective, out, *source, async_op=True)
        # `source` stays in this closure: freed earlier, its memory could be given to another tensor
        # while the collective still reads it.
        return lambda: (self.together(work.wait), out, source)[1]

    def scatter_mean(self, rows: Tensor) -> Callable[[], Tensor]:
        """(size * n, ...) -> this rank's (n, ...) rows of the mean over the ranks, once called."""
        if self.size == 1:
            return lambda: rows
        mine = rows.new_empty(rows.size(0) // self.size, *rows.shape[1:])
        ready = self.begun(dist.reduce_scatter_tensor, mine, rows.contiguous())
        return lambda: ready().div_(self.size)

    def gathered(self, mine: Tensor) -> Callable[[], Tensor]:
        """(n, ...) of each rank -> (size * n, ...) in the order of ranks, once called."""
        if self.size == 1:
            return lambda: mine
        rows = mine.new_empty(mine.size(0) * self.size, *mine.shape[1:])
        return self.begun(dist.all_gather_into_tensor, rows, mine.contiguous())

    def share(self, value: Any) -> Any:
        """Rank 0's value (bytes, numbers, text) on every rank; nothing in it came from outside."""
        # torch pickles the value on its way, which is safe among processes of one script only
        box = [value]
        self.together(dist.broadcast_object_list, box, src=0, device=self.device)
        return box[0]

    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors with rank 0's."""
        for t in tensors:
            self.together(dist.broadcast, t, src=0)

    def wait(self) -> None:
        """Returns when every rank has come here and this rank's device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device)).item()

    def leave(self) -> None:
        """Leaves the process group, and tells the others that this is no death."""
        if self.size > 1 and dist.is_initialized():
            self.watch.left = True
            self.watch.tell("left")
            dist.destroy_process_group()


class Clock:
    """Seconds since the start that all ranks agree on: `read_s` ends a stage, `tick` is for each
    step of training. On GPUs the host runs ahead of the device there; reading a number of `lag`
    steps ago hardly waits, and bounds that lead."""

    def __init__(self, world: World):
        """Starts when every rank is here."""
        world.wait()
        self.world, self.queue, self.begin_s = world, [], time.perf_counter()
        self.agreed_s, self.asked, self.lag = 0.0, False, 2 * (world.device.type == "cuda")

    def ask(self, *_: Any) -> None:
        """Asks every rank to stop, as a signal handler: a mean with an endless time is endless."""
        self.asked = True

    def pause(self, seconds: float) -> None:
        """Leaves out time that reads no training data, such as a validation score."""
        self.begin_s += seconds

    def mean_s(self, endless: bool = False) -> Tensor:
        """(1,) the mean of the ranks' seconds, on the device; inf where one has no end."""
        own_s = math.inf if endless else time.perf_counter() - self.begin_s
        return self.world.mean(
            torch.full((1,), own_s, dtype=torch.float64, device=self.world.device))

    def tick(self) -> float:
        """The mean of the ranks' seconds, on GPUs `lag` steps ago; inf if one was asked to stop."""
        now = self.mean_s(self.asked)
        if not self.lag:
            return now.item()
        host, event = torch.empty(1, dtype=torch.float64, pin_memory=True), torch.cuda.Event()
        host.copy_(now, non_blocking=True)
        event.record()
        self.queue.append((host, event))
        # the first ticks have nothing old enough to read: zero, or what a checkpoint said
        if len(self.queue) <= self.lag:
            return self.agreed_s
        host, event = self.queue.pop(0)
        event.synchronize()
        return float(host)

    def read_s(self) -> float:
        """Agreed seconds once every rank is here and its device's queue is drained."""
        self.world.wait()
        return self.mean_s().item()


def supported(call: Callable, *arguments: Any) -> bool:
    """Makes a system call; False where this file system has no such thing."""
    try:
        call(*arguments)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS,
                           errno.EINVAL):
            return False
        raise
    return True


# A run may be killed at any instant, so a file has its final name only when it is whole. A rename
# is atomic only within one file system, hence in the same folder; two processes never share a
# temporary file; without fsync a power cut could leave the name without the bytes.
def write_atomically(path: Path, *parts: bytes) -> None:
    """Writes the whole file or nothing; raises `Refusal` on a full disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.writelines(parts)
            f.flush()
            supported(os.fsync, f.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Refusal(f"{path}: {sum(map(len, parts)):,} bytes could not be written "
                      f"({error.strerror}); free space there or set LOGS_DIR / DATA_DIR to another "
                      "disk") from None


def refuse_used(folder: Path) -> None:
    """Raises `Refusal` where a run was finished, or left an artifact and no checkpoint."""
    # A run that was killed may begin again, from its checkpoint if it has one. An artifact without
    # a checkpoint would be lost by that, and a finished run has nothing to go on with.
    used = (folder / "result.json").exists() or (
        folder / "model.bin").exists() and not checkpoints(folder)
    require(not used, f"RUN_ID={folder.name} was used before: {folder} exists; choose another "
            "RUN_ID, no run is ever overwritten")
    path = folder / "log.txt"    # a pipe would wait for a reader
    require(path.is_file() or not path.exists(), f"{path}: expected an ordinary file")


class Log:
    """What rank 0 prints; once a folder is claimed, its log.txt too. Other ranks say nothing."""

    def __init__(self, world: World, folder: Path | None = None, quiet: bool = False):
        """With a folder, claims it at once. A quiet log says nothing at all."""
        self.world, self.folder, self.width, self.early = world, None, 0, []
        self.quiet = quiet or not world.main
        self.said_s, self.doing = time.monotonic(), ("starting", time.monotonic())
        if folder:
            self.claim(folder)

    def claim(self, folder: Path) -> None:
        """Makes the run's folder, locks it for as long as this process lives, and writes there what
        was said so far; raises `Refusal` where another run has it or one was finished."""
        self.folder = folder
        if not self.world.main:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Kept open, since closing it would give the lock away. flock and not a POSIX lock: that
            # one would go as soon as `write` closes the same file.
            self.lock = open(folder / "log.txt", "a")
            # the system gives the lock back however this process ends
            locked = fcntl and supported(fcntl.flock, self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"RUN_ID={folder.name}: another process is at work in {folder}") from None
        except OSError as error:
            raise Refusal(f"LOGS_DIR={folder.parent} is not writable ({error.strerror})") from None
        # Asked again now that the folder is locked: since `preflight` asked, another process may
        # have finished a run of this name.
        refuse_used(folder)
        for path in folder.glob(".*.partial"):    # of a process that was killed
            path.unlink()
        self.write(self.early)
        if not locked:
            self(f"lock: none to be had in {folder.parent}; start no second RUN_ID={folder.name}")

    def write(self, lines: Sequence[str]) -> None:
        """Appends lines to log.txt, opened anew each time, so that what was said outlives this
        process. Raises `Refusal` where that fails."""
        path = self.folder / "log.txt"
        with refusing(f"{path} cannot be written", OSError), open(
                path, "a", -1, "utf-8", "backslashreplace") as f:
            f.writelines(line + "\n" for line in lines)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Within the block a long silence is broken, by a thread, with what is under way."""
        ended = threading.Event()

        def remind() -> None:
            """Says what was last under way, and for how long, until the block ends."""
            while not (ended.wait(SILENCE_S / 25) or self.quiet):
                now_s, (what, begin_s) = time.monotonic(), self.doing
                if now_s - self.said_s >= SILENCE_S:
                    with contextlib.suppress(Refusal):    # a full disk, which stops the run itself
                        self(f"busy:{now_s - begin_s:.0f}s since {what}")

        threading.Thread(target=remind, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def begin(self, what: str) -> None:
        """Names what is under way from now on."""
        self.doing = what, time.monotonic()

    def due(self) -> bool:
        """True where `progress` is called for: often on a terminal, in a file after a silence."""
        wait_s = 0.2 if on_terminal() else 0.9 * SILENCE_S    # before `remind` speaks
        return not self.quiet and time.monotonic() - self.said_s >= wait_s

    def __call__(self, line: str) -> None:
        """One line on the terminal and in log.txt."""
        if self.quiet:
            return
        self.said_s = time.monotonic()
        print("\r" + " " * self.width + "\r" + line if self.width else line, flush=True)
        self.width = 0
        if self.folder:
            self.write([line])
        else:
            self.early.append(line)

    def progress(self, line: str) -> None:
        """One updating line on a terminal, an ordinary one in a file; callers say it sparsely."""
        if not on_terminal():
            self(line)
        elif not self.quiet:
            self.said_s = time.monotonic()
            print("\r" + line.ljust(self.width), end="", flush=True)
            self.width = max(self.width, len(line))


# ==================================================================================================
# 4. Data
# Reads the challenge's shards (256 int32 of header, then uint16 tokens, token 1 opens a document)
# as training batches and validation set, of which no token is cut off; then makes such shards of
# documents, or of Python's own documentation. What enters are files of strangers: whatever is wrong
# with them is refused here with its file and place, before the clock starts where it can be.
# ==================================================================================================
SHARD_MAGIC, SHARD_VERSION = 20240520, 1    # fixed by the published export
HEADER_BYTES, BOS = 256 * 4, 1
CASEOPS_VAL_TOKENS = 47_851_520    # of the published CaseOps validation set, its tail cut off


def read_shard(path: Path) -> np.ndarray:
    """The memory-mapped uint16 tokens (T,) of an official shard; raises Refusal on any damage."""
    place = f"shard {path}"
    require(path.is_file(), f"{place}: there is no ordinary file of this name")
    size_bytes, header = path.stat().st_size, np.fromfile(path, "<i4", 256)
    require(len(header) == 256,
            f"{place}: {size_bytes} bytes are too few for the {HEADER_BYTES} byte header")
    magic, version, count = map(int, header[:3])
    require(magic == SHARD_MAGIC, f"{place}: magic number {magic}, expected {SHARD_MAGIC}")
    require(version == SHARD_VERSION, f"{place}: version {version}, expected {SHARD_VERSION}")
    require(count > 0, f"{place}: the header promises {count} tokens, expected at least 1")
    require(size_bytes == HEADER_BYTES + 2 * count, f"{place}: {size_bytes} bytes, but a header of "
            f"{count} tokens asks for {HEADER_BYTES + 2 * count}")
    # Mapped, not read: 80 shards are 16 GB, of which a rank needs one block at a time.
    try:
        return np.memmap(path, "<u2", "r", HEADER_BYTES, (count, ))
    except (OSError, ValueError):    # some file systems map nothing
        return np.fromfile(path, "<u2", count, offset=HEADER_BYTES)


class Docs(NamedTuple):
    """Where documents lie in a batch of rows, so that attention stays inside each of them: `start`
    for kernels that take a mask, `bounds` for those that take the ends of sequences. `longest` is
    no measurement: a number that differed from batch to batch would compile a graph for each."""

    start: Tensor    # (B, T) int64: place in the row of the first token of this token's piece
    bounds: Tensor | None    # (n,) int32 ends of the pieces of the flattened batch
    longest: int    # tokens of the longest piece that can occur


class Batch(NamedTuple):
    """One micro-batch: inputs, the tokens that follow them, and the document pieces."""

    ids: Tensor    # (B, T) int64
    targets: Tensor    # (B, T) int64
    docs: Docs


def locate(ids: np.ndarray, longest: int, device: torch.device) -> Docs:
    """The document pieces of (B, T) tokens; a document longer than `longest` is cut."""
    # A row's first token opens a piece too, whatever document it continues: what came before lies
    # in another row. The cuts bound how far training looks back, as windows do in scoring.
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    opens = np.maximum.accumulate(np.where(ids == BOS, place, 0), axis=1)
    start, bounds = opens + (place - opens) // longest * longest, None
    if device.type == "cuda":
        # A token that is its own start opens a piece. The end of the batch is repeated up to a
        # power of two, so that shapes repeat: the first copy ends the last piece.
        ends = np.flatnonzero(start == place).astype(np.int32)
        room = max(ids.size // 64, 1 << len(ends).bit_length())
        bounds = torch.from_numpy(np.pad(ends, (0, room - len(ends)), constant_values=ids.size))
    return Docs(torch.from_numpy(np.ascontiguousarray(start)), bounds, min(longest, ids.shape[1]))


def whole_rows(ids: Tensor) -> Docs:
    """Each row of (B, T) ids as one piece: attention over all that precedes in it."""
    B, T = ids.shape
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=ids.device)
    return Docs(torch.zeros_like(ids), ends if ids.device.type == "cuda" else None, T)


def sent(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The array on the device. Copies to GPUs start in pinned memory, so that the host goes on: any
    other copy makes it wait until the device has done all that was queued."""
    t = torch.as_tensor(array)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


class Loader:
    """Endless micro-batches of the training shards; `position` is its whole state.

    One epoch lays the shards end to end in a seeded order, cuts the stream into blocks of
    MICRO_BATCH_TOKENS and shuffles them; no block comes twice before all have come. Block number
    position * size + rank belongs to this rank, so that any world size sees the same steps. A block
    is one long row where attention takes variable lengths, else rows of TRAIN_SEQ_LEN."""

    def __init__(self, h: Hyperparameters, world: World, shards: Sequence[np.ndarray]):
        """Raises `Refusal` where the shards hold less than one micro-batch for each rank."""
        self.h, self.world, self.shards, self.position = h, world, shards, 0
        count = sum(map(len, shards))
        self.blocks = (count - 1) // h.micro_batch_tokens
        require(self.blocks >= world.size,
                f"the training shards hold {count:,} tokens, too few for one of "
                f"MICRO_BATCH_TOKENS={h.micro_batch_tokens} on each of {world.size} ranks")
        self.epoch = -1    # `arrange` draws each from (SEED, epoch), so it is no state
        # One worker reads ahead, in the order of asking: `arrange` never runs twice at once.
        self.worker, self.ahead = concurrent.futures.ThreadPoolExecutor(1), {}
        self.side = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self.packed = attention_kernel(h, world.device) not in ("blocks", "sdpa")
        self.context, self.since = h.contexts[0][1], -math.inf

    def cut(self, context: int) -> float:
        """Cuts documents at `context` tokens from now on; micro-batches since that changed."""
        if context != self.context:
            self.rewind(self.position, context, self.position)
        return self.position - self.since

    def rewind(self, position: int, context: int, since: float) -> None:
        """Back, or on, to a state; what was read ahead for another one is dropped."""
        self.ahead = {}
        self.position, self.context, self.since = position, context, since

    def arrange(self, epoch: int) -> None:
        """Draws the order of shards and blocks of one epoch, from nothing of the epochs before."""
        rng = np.random.default_rng((self.h.seed, epoch))
        shards, order = rng.permutation(len(self.shards)), np.arange(self.blocks)
        if self.h.loader == "stream":
            shards.sort()
        self.stream = [self.shards[i] for i in shards]
        self.starts = np.cumsum([0, *map(len, self.stream)])
        # Tokens that fill no block fall to the end of the first epoch; later ones begin at a phase
        # of their own, which cuts the blocks elsewhere. Less one: the last target lies behind them.
        spare = int(self.starts[-1]) - 1 - self.blocks * self.h.micro_batch_tokens
        self.phase = int(rng.integers(spare + 1)) if epoch else 0
        # 1024 blocks of 98,304 tokens are about one shard, so that what is read at random lies in
        # few files, which themselves come in random order.
        for lo in range(0, self.blocks * (self.h.loader == "shuffled"), 1024):
            rng.shuffle(order[lo:lo + 1024])
        self.epoch, self.order = epoch, order

    def tokens(self, lo: int, count: int) -> np.ndarray:
        """(count,) tokens of this epoch's stream from place `lo` on."""
        first, last = np.searchsorted(self.starts, [lo, lo + count - 1], "right") + [-1, 0]
        parts = [shard[max(0, lo - start):lo + count - start]
                 for start, shard in zip(self.starts[first:last], self.stream[first:last])]
        return np.concatenate(parts).astype(np.int64)

    def read(self, number: int) -> Batch:
        """Block `number` of the endless sequence, on this rank's device."""
        epoch, place = divmod(number, self.blocks)
        if epoch != self.epoch:
            self.arrange(epoch)
        # One token more than a block: targets are the inputs one place on, and the last target of a
        # block is the first input of the next. So a token is a target at most once in an epoch.
        size, device = self.h.micro_batch_tokens, self.world.device
        tokens = self.tokens(self.phase + int(self.order[place]) * size, size + 1)
        # here and not on the device, where an id beyond V ends the process without naming a file
        check_tokens(tokens, self.h.vocab_size, "a training shard")
        rows = 1 if self.packed else size // self.context
        ids, targets = tokens[:-1].reshape(rows, -1), tokens[1:].reshape(rows, -1)
        # without DOC_MASK no document start is shown, so that only rows and cuts bound a piece
        shown = ids if self.h.doc_mask else np.zeros_like(ids)
        start, bounds, longest = locate(shown, self.context, device)
        # The copies have a stream of their own: they pass beside the step under way.
        with torch.cuda.stream(self.side):
            ids, targets, start, bounds = (t if t is None else sent(t, device)
                                           for t in (ids, targets, start, bounds))
        return Batch(ids, targets, Docs(start, bounds, longest))

    def next(self) -> Batch:
        """The next micro-batch of this rank, on its device; raises what its reading raised."""
        number = self.position * self.world.size + self.world.rank
        # a block of another position is not the one asked for, and is dropped
        batch = (self.ahead.pop(number, None) or self.worker.submit(self.read, number)).result()
        if self.side:
            step = torch.cuda.current_stream(self.world.device)
            step.wait_stream(self.side)
            for t in (batch.ids, batch.targets, batch.docs.start, batch.docs.bounds):
                t.record_stream(step)    # its memory is not given away before the step has read it
        self.position += 1
        number += self.world.size
        self.ahead = {number: self.worker.submit(self.read, number)}
        return batch


@dataclass(frozen=True)
class Validation:
    """The whole validation set: target i is token i + 1. So a document's first target has the index
    of its opening token, which is itself the last target of the document before, of no bytes."""

    tokens: Tensor    # (N + 1,) int64 on the CPU
    bytes: np.ndarray    # (N,) bytes of text that each target stands for
    documents: np.ndarray    # (n + 1,) first targets of the documents, then N

    @classmethod
    def of(cls, tokens: np.ndarray, target_bytes_: np.ndarray) -> Validation:
        """From tokens (N + 1,) and bytes per target (N,)."""
        return cls(torch.from_numpy(tokens.astype(np.int64)), target_bytes_.astype(np.int64),
                   np.unique([0, *np.flatnonzero(tokens[:-1] == BOS), len(tokens) - 1]))


class Dataset(NamedTuple):
    """What a run reads: mapped training shards, validation set, and how its bytes were counted."""

    train: list[np.ndarray]
    val: Validation
    byte_rule: str


def check_tokens(tokens: np.ndarray, V: int, place: str) -> None:
    """Raises `Refusal` for a token that the vocabulary does not have."""
    largest = tokens.max(initial=0)
    require(largest < V, f"{place}: token {largest} is outside VOCAB_SIZE={V}; "
            "shards and vocabulary do not belong together")


def check_training(shards: Mapping[Path, np.ndarray], V: int) -> None:
    """Raises `Refusal` for tokens that the vocabulary does not have, and where no document starts.
    Of each shard it looks at 16 blocks, 2 MB; the loader checks every block that it reads."""
    starts, block = 0, 1 << 16
    for path, shard in shards.items():
        places = np.linspace(0, max(0, len(shard) - block), 16).astype(int)
        sample = np.concatenate([shard[place:place + block] for place in places])
        check_tokens(sample, V, str(path))
        starts += np.count_nonzero(sample == BOS)
    require(starts, f"{next(iter(shards))}: no document start (token {BOS}) in the training "
            "shards, while validation has some; open each document with it")


def check_origin(h: Hyperparameters, folder: Path, sidecars: int, count: int,
                 log: Callable[[str], None]) -> None:
    """Raises `Refusal` where a manifest says that these shards were changed, or made for another
    vocabulary or text form, or where `count` validation tokens without one cannot be all of the
    published CaseOps set."""
    manifest, made = folder / "manifest.json", manifest_of(folder)
    if made:
        # Validation decides every score, so its files are hashed; training shards are gigabytes.
        require(intact(folder, "_train_"),
                f"DATA_PATH={folder}: a validation file is not what manifest.json says")
        for name, mine in (("vocab_size", h.vocab_size), ("caseops", h.caseops_enabled)):
            theirs = made.get(name, mine)
            require(theirs == mine, f"{manifest}: {name} is {theirs}, the model's is {mine}")
    elif manifest.exists():
        log(f"data: {manifest} is not of the verb data and is passed over")
    if h.caseops_enabled:
        whole = made or h.short_val_allowed or count >= CASEOPS_VAL_TOKENS
        require(sidecars and whole, f"CASEOPS_ENABLED=1: {folder} holds {count:,} validation "
                f"tokens and {sidecars} files fineweb_val_bytes_*.bin; the published set has "
                f"{CASEOPS_VAL_TOKENS:,} and one for each shard. Of a set cut short the rest may "
                "be training text, so it is taken only with SHORT_VAL_ALLOWED=1")


def shards_folder(h: Hyperparameters) -> Path:
    """Where the shards of these hyperparameters are looked for."""
    case = "_lossless_caps_caseops_v1_reserved" if h.caseops_enabled else ""
    folder = Path(h.data_dir) / "datasets" / f"fineweb10B_sp{h.vocab_size}{case}"
    raw = folder.with_name("fineweb10B_byte260")    # the published one of this size
    return Path(h.data_path or (raw if h.vocab_size == 260 and not folder.is_dir() else folder))


def must_build(h: Hyperparameters) -> bool:
    """True where the embedded corpus is asked for, or no shards are."""
    return h.corpus == "embedded" or not (h.corpus or h.data_path or shards_folder(h).is_dir())


def find_dataset(h: Hyperparameters, world: World, log: Callable[[str], None]) -> Dataset:
    """Finds or builds the data and checks all of it before any training; raises `Refusal`."""
    folder, V = shards_folder(h), h.vocab_size
    if must_build(h):
        if not h.corpus:
            log(f"corpus: no shards in {folder}; CORPUS=embedded is used "
                "(set DATA_PATH for shards)")
        if world.main:
            folder = corpus_path(Path(h.data_dir) / "cache", V, h.caseops_enabled)
            require(build_corpus or intact(folder), f"CORPUS=embedded: {folder} is not there and "
                    "this packed script cannot build it; run the readable one, or set DATA_PATH")
            if build_corpus:
                folder = build_corpus(folder.parent, V, log, h.caseops_enabled)
        folder = Path(world.share(str(folder)))
    train, held, sidecars = (sorted(folder.glob(f"fineweb_{side}_*.bin"))
                             for side in ("train", "val", "val_bytes"))
    held = [path for path in held if path not in sidecars]    # whose names fit its pattern as well
    for side, paths, whole in (("train", train, False), ("val", held, True)):
        require(paths, f"DATA_PATH={folder}: no file fineweb_{side}_*.bin there")
        numbers = sorted(int(n) for path in paths for n in re.findall(rf"_{side}_(\d+)", path.stem))
        odd = [b for a, b in itertools.pairwise(numbers) if b - a != 1 and (whole or a == b)]
        require(not odd, f"DATA_PATH={folder}: its {side} files have the numbers {numbers}; "
                f"one is there twice{', or missing' * whole}")
    shards = [read_shard(path) for path in train]
    tokens = np.concatenate([read_shard(path) for path in held])
    check_origin(h, folder, len(sidecars), len(tokens), log)
    check_tokens(tokens, V, str(held[0]))
    require((tokens[:-1] == BOS).any(), f"{held[0]}: no document start (token {BOS}) among "
            f"{len(tokens)} tokens, or none before the last")
    check_training(dict(zip(train, shards)), V)
    # Of transformed text only the sidecar knows the bytes of the original, by which BPB divides.
    if sidecars:
        sizes = np.concatenate([read_shard(path) for path in sidecars])[1:]
        require(len(sizes) + 1 == len(tokens), f"{sidecars[0]}: {len(sizes) + 1} byte counts for "
                f"{len(tokens)} tokens; the sidecar must hold one for each token")
        rule = f"sidecar {sidecars[0].name}"
    else:
        places = [Path(h.data_dir) / "tokenizers" / name
                  for name in (f"fineweb_{V}_bpe.model", f"fineweb_pure_byte_{V}.json")]
        path = Path(h.tokenizer_path or next(filter(Path.is_file, places), places[V == 260]))
        sizes = (symbol_bytes(path, V)[tokens[1:]] if path.suffix == ".json" else
                 target_bytes(tokens, load_tokenizer(path, V, False)))
        rule = f"tokenizer {path.name}"
    require(sizes.any(), f"{held[0]}: every byte count is zero by {rule}")
    return Dataset(shards, Validation.of(tokens, sizes), rule)


SPACE_MARK = "\u2581"
MARKERS = TITLE, ALL_CAPS, CAP_NEXT, ESCAPE = "\ue001\ue002\ue003\ue004"    # of CaseOps
BUILDER = 1    # raise it whenever the same documents would give other files


def load_tokenizer(path: Path, V: int, caseops: bool) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in `path`; raises Refusal unless it has V pieces and suits the text form."""
    place = f"tokenizer {path}"
    require(path.is_file(), f"{place}: there is no ordinary file of this name")
    require(sentencepiece, f"{place} needs the package sentencepiece (pip install sentencepiece)")
    with refusing(f"{place}: not a SentencePiece model", RuntimeError, OSError, ValueError):
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    size, bos = len(tokenizer), tokenizer.bos_id()
    require(size == V, f"{place}: {size} pieces, expected VOCAB_SIZE {V}")
    require(bos == BOS, f"{place}: document start has id {bos}, expected {BOS}")
    require(any(map(tokenizer.is_byte, range(V))),
            f"{place}: it has no byte pieces, so text outside its alphabet would be lost")
    # Text of one form under a tokenizer of the other would train without a complaint.
    marked = all(tokenizer.piece_to_id(mark) != tokenizer.unk_id() for mark in MARKERS)
    require(caseops or not marked, f"{place}: it was made for CaseOps text, add --caseops")
    require(marked or not caseops,
            f"{place}: it has no pieces for the four CaseOps markers, leave --caseops away")
    return tokenizer


def symbol_bytes(path: Path, V: int) -> np.ndarray:
    """Bytes int64 (V,) of each id of a published JSON tokenizer, whose ids behind the four special
    ones are single bytes or characters; raises Refusal for any other file."""
    place, ids = f"tokenizer {path}", dict(pad_id=0, bos_id=BOS, eos_id=2, unk_id=3)
    require(path.is_file(), f"{place}: there is no ordinary file of this name")
    try:
        config = json.loads(path.read_bytes())["config"]
        raw = config == ids | dict(byte_offset=4, byte_count=256)
        symbols = "\0" * 256 if raw else config["chars"]
        sizes = [0] * len(ids) + [len(symbol.encode()) for symbol in symbols]
        known = raw or config == ids | dict(chars=symbols)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        known = False
    require(known, f"{place}: neither a published JSON tokenizer (pure_byte or char) nor a "
            "SentencePiece model")
    require(len(sizes) == V, f"{place}: {len(sizes)} ids, expected VOCAB_SIZE {V}")
    return np.array(sizes)


def target_bytes(tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Bytes uint16 (T-1,) of the targets tokens[1:] by the challenge's rule.

    A byte piece is 1 byte; control, unknown and unused ids are boundaries of 0 bytes; any other
    piece is its UTF-8 length. Its leading space counts unless the token before it is a boundary:
    after one, official tokenizers put a mark of their own, which is no byte of the text."""
    ids = list(range(len(tokenizer)))
    kinds = tokenizer.is_control(ids), tokenizer.is_unknown(ids), tokenizer.is_unused(ids)
    boundary, byte = np.any(kinds, axis=0), np.array(tokenizer.is_byte(ids))
    texts = tokenizer.id_to_piece(ids)
    spaced = np.array([text.startswith(SPACE_MARK) for text in texts]) & ~boundary & ~byte
    # Without the leading space: counted in both places it made the bytes of #1698 about 14% too
    # many. Marks inside a piece are a byte each, with which lossless vocabularies spell runs.
    sizes = [len(text.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ").encode()) for text in texts]
    base = np.where(boundary, 0, np.where(byte, 1, sizes)).astype(np.int16)
    previous, target = tokens[:-1], tokens[1:]
    counted = (base[target] + (spaced[target] & ~boundary[previous])).astype(np.uint16)
    if tokenizer.piece_to_id(SPACE_MARK) == tokenizer.unk_id():
        # Without a piece of its own the mark of a space comes as its three bytes (#897). A real
        # U+2581 looks the same: counted as a space, it can only make BPB higher.
        bytes_ = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        at = np.flatnonzero((target[:-2] == bytes_[0]) & (target[1:-1] == bytes_[1])
                            & (target[2:] == bytes_[2]))
        counted[at] = counted[at + 1] = 0
        counted[at + 2] = ~boundary[previous[at]]
    return counted


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(folder: Path) -> dict[str, Any]:
    """What the verb data noted in manifest.json; {} for none, a damaged or another program's."""
    try:
        made = json.loads((folder / "manifest.json").read_bytes())
        return made if "builder" in made and isinstance(made["files"], dict) else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def intact(folder: Path, skipped: str = "/") -> bool:
    """True where `folder` has a manifest and every file it names is there and unchanged; names with
    `skipped` in them are passed over."""
    made = manifest_of(folder)
    try:
        return bool(made) and all(
            skipped in name or (path := folder / name).is_file() and file_sha256(path) == digest
            for name, digest in made["files"].items())
    except (OSError, ValueError):
        return False    # whatever is wrong with it, the answer is to build it again


def corpus_path(folder: Path, V: int, caseops: bool = False) -> Path:
    """Where the embedded corpus of this Python and vocabulary lies inside the cache `folder`."""
    return folder / f"embedded_py{platform.python_version()}_sp{V}{'_caseops' * caseops}_b{BUILDER}"


# The packed script reads data but makes none: the code up to the end of this section stays behind.
build_corpus: Callable[..., Path] | None = None


# >>> not packed
def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes `tokens` (T,) as one official shard."""
    header = np.array([SHARD_MAGIC, SHARD_VERSION, len(tokens)] + [0] * 253, "<i4")
    write_atomically(path, header.tobytes(), np.asarray(tokens, "<u2").tobytes())


class ShardWriter:
    """Cuts a stream of tokens into `<stem>_000000.bin`, `<stem>_000001.bin` and so on: `paths`, of
    `limit` tokens each, the last one of the rest. `count` tokens came so far."""

    def __init__(self, stem: Path, limit: int = 100_000_000):
        """Writes nothing yet; the limit is that of the published export."""
        self.stem, self.limit, self.count, self.paths = stem, limit, 0, []

    def append(self, tokens: Sequence[int]) -> None:
        """Adds `tokens` (T,), cut at shard ends wherever they fall, as the official export does."""
        tokens = np.asarray(tokens, "<u2")
        while len(tokens):
            filled = self.count % self.limit
            if not filled:
                self.paths.append(Path(f"{self.stem}_{len(self.paths):06d}.bin"))
                write_shard(self.paths[-1], [])
            part, tokens = np.split(tokens, [self.limit - filled])
            self.count += len(part)
            with open(self.paths[-1], "r+b") as file:
                file.seek(8)    # the place of the count in the header
                file.write(struct.pack("<i", filled + len(part)))
                file.seek(0, os.SEEK_END)
                file.write(part.tobytes())


@contextlib.contextmanager
def delivered(out: Path, option: str = "--to") -> Iterator[Path]:
    """A folder to fill, which takes the name `out` when the block ends without an error, or whose
    files move into an empty `out`, such as a mounted volume; else raises `Refusal`."""
    # an error, too, where another process was faster
    with refusing(f"{option} {out}: cannot be made", OSError):
        out = Path(os.path.abspath(out))    # the name of "." is that of the folder
        there = os.path.lexists(out)    # a link to nothing is in the way
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.",
                                         dir=out if there else out.parent) as workshop:
            folder, own = Path(workshop) / out.name, {Path(workshop).name, "lost+found"}
            others = {path.name for path in out.iterdir()} - own if there else ()
            require(not others, f"{option} {out}: already there and not empty "
                    f"({', '.join(sorted(others)[:3])}), expected a new folder")
            folder.mkdir()
            yield folder
            if not there:
                os.rename(folder, out)
            else:    # the manifest first: half of what it names is not `intact`
                for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".json"):
                    os.rename(path, out / path.name)


@dataclass
class Tally:
    """What one pass over documents has met so far; `skip_bad` leaves bad rows out."""

    skip_bad: bool = False
    bad_rows: int = 0
    first_bad: str = ""    # what is wrong with the first of them
    files: int = 0
    read_bytes: int = 0    # of `size_bytes` on disk
    size_bytes: int = 0
    sides: Sequence[int] = (0, 0)    # documents of training, of validation


def read_documents(paths: Sequence[Path], tally: Tally | None = None) -> Iterator[str]:
    """The texts of `.jsonl` and `.jsonl.zst` (field `text`) and `.txt` files (one document each),
    of which one line is held at a time; raises Refusal for a missing or damaged file or row."""
    for path in paths:
        require(path.is_file(), f"documents {path}: there is no ordinary file of this name")
        require(path.name.endswith((".txt", ".jsonl", ".jsonl.zst")),
                f"documents {path}: expected a name ending in .jsonl, .jsonl.zst or .txt")
        require(zstandard or path.suffix != ".zst", f"documents {path}: reading it needs the "
                "package zstandard (pip install zstandard)")
    tally, before = tally or Tally(), 0
    tally.bad_rows = tally.files = 0
    tally.size_bytes = sum(path.stat().st_size for path in paths)
    for path in paths:
        tally.files, whole = tally.files + 1, path.suffix == ".txt"
        with open(path, "rb") as file:
            lines = zstd_lines(file, path) if path.suffix == ".zst" else file
            for number, line in enumerate([file.read()] if whole else lines, 1):
                tally.read_bytes = before + file.tell()
                try:
                    if whole or line.strip():
                        place = f"documents {path}" + f", line {number}" * (not whole)
                        yield text_of(line, place, whole)
                except Refusal as error:
                    if not tally.skip_bad:
                        raise
                    tally.bad_rows += 1
                    tally.first_bad = tally.first_bad or str(error)
            before += file.tell()


def text_of(raw: bytes, place: str, whole: bool) -> str:
    """What stands in UTF-8, all of it or the field `text` of JSON, less a byte order mark."""
    mark = "\ufeff"    # of an encoding, at the start of a file
    for code in ("UTF-32-LE", "UTF-32-BE", "UTF-16-LE", "UTF-16-BE"):
        require(not raw.startswith(mark.encode(code)), f"{place}: its byte order mark says "
                f"{code}, expected UTF-8 (iconv -f {code[:6]} -t UTF-8 makes it)")
    try:
        text = raw.decode().removeprefix(mark)
        # Numbers that nobody needs may have more digits than Python turns into an int.
        row = {"text": text} if whole else json.loads(text, parse_int=float)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{raw[error.start]:02x})"
        raise Refusal(f"{place}: {byte} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise Refusal(f"{place}: not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise Refusal(f"{place}: nested too deeply") from error
    text = row.get("text") if isinstance(row, dict) else None
    require(isinstance(text, str), f'{place}: expected an object with a string field "text"')
    require(not re.search("[\ud800-\udfff]", text),
            f"{place}: half of a surrogate pair has no UTF-8 form")
    return text


def zstd_lines(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The lines of a zstd file of any number of frames; raises Refusal for a damaged or cut one."""
    # any window that the format allows, of up to 2 GB (zstd --long=31)
    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, rest = frames.decompressobj(), []    # parts of a line that may be long
    with refusing(f"documents {path}: damaged zstd stream", zstandard.ZstdError):
        while packed := frame.unused_data or file.read(1 << 17):
            if frame.eof:
                frame = frames.decompressobj()
            part, *lines = frame.decompress(packed).split(b"\n")
            rest.append(part)
            for line in lines:
                yield b"".join(rest)
                rest = [line]
    require(frame.eof, f"documents {path}: the zstd stream ends in the middle of a frame")
    yield b"".join(rest)


def fingerprint(text: str) -> int:
    """A 64-bit hash of `text`, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def held_out(key: str) -> bool:
    """True for the one key in twenty whose document belongs to validation."""
    return fingerprint(key) % 20 == 0


# Linux distributions package these apart from the library, so they are left out everywhere.
OPTIONAL_MODULES = {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sitecustomize",
                    "tkinter", "turtle", "turtledemo", "venv"}


def embedded_documents() -> list[tuple[str, str]]:
    """(name, text) of real prose that every Python carries: one document per module of its library
    (documentation strings under their signatures, comment blocks) and per topic of the language
    reference. Raises Refusal where the library comes without sources."""
    library, documents = Path(sysconfig.get_path("stdlib")), []
    # Sources are parsed, never imported: importing may open a browser or print.
    with warnings.catch_warnings(action="ignore"):    # old sources carry invalid escapes
        for module in sorted(sys.stdlib_module_names - OPTIONAL_MODULES):
            for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
                inside = path.relative_to(library).with_suffix("")
                if path.is_file() and not {"test", "tests"} & set(inside.parts):
                    name = ".".join(inside.parts).removesuffix(".__init__")
                    documents.append((name, module_text(name, path.read_bytes())))
        topics = library / "pydoc_data" / "topics.py"
        if topics.is_file():
            table = ast.literal_eval(ast.parse(topics.read_bytes()).body[-1].value)
            documents += [(f"topic {name}", f"{name}\n\n{text}") for name, text in table.items()]
    cleaned = [(name, re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip())
               for name, text in documents]
    kept = [(name, text) for name, text in cleaned if len(text.encode()) >= 200]
    size_bytes = sum(len(text.encode()) for _, text in kept)
    require(size_bytes >= 2_000_000, f"CORPUS=embedded: the library of this Python ({library}) "
            f"holds {size_bytes} bytes of documentation, expected at least 2000000; install the "
            "complete library or make shards with the verb data")
    return kept


def module_text(name: str, source: bytes) -> str:
    """Documentation strings and comment blocks of one module in the order of its lines."""
    text = importlib.util.decode_source(source)
    scopes = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes, found = [ast.parse(text)], []
    for node in nodes:    # which grows by what stands inside
        nodes += [child for child in node.body if hasattr(child, "body")]
        if isinstance(node, scopes) and (prose := ast.get_docstring(node)):
            signature = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            title = getattr(node, "name", name) + signature
            found.append((getattr(node, "lineno", 0), f"{title}\n\n{prose}"))
    for block in re.finditer(r"^[ \t]*#.*(?:\n[ \t]*#.*)+", text, re.M):
        prose = re.sub(r"^[ \t]*#+[ \t]?", "", block[0], flags=re.M).strip()
        found.append((text.count("\n", 0, block.start()) + 1, prose))
    return "\n\n".join(prose for _, prose in sorted(found, key=lambda piece: piece[0]))


def train_tokenizer(texts: Iterable[str], V: int, path: Path, markers: Iterable[str] = ()) -> None:
    """Writes a SentencePiece BPE model of V pieces to `path`; decode(encode(x)) == x for every x.
    Ids as in the official tokenizers: pad 0, bos 1, eos 2, unk 3, then `markers`, then 256 bytes.
    Trains on lines, so a newline is always the byte piece. Raises Refusal when V does not fit."""
    require(sentencepiece, f"VOCAB_SIZE {V}: training a tokenizer needs the package sentencepiece "
            "(pip install sentencepiece)")
    model = io.BytesIO()
    # SentencePiece passes over sentences longer than max_sentence_length bytes, hence the cuts.
    lines = (line[start:start + 4000] for text in texts for line in text.split("\n")
             for start in range(0, len(line), 4000))
    with tempfile.TemporaryDirectory() as folder:
        # The model records where its rules lay: slashes give that path one length everywhere, so
        # that it can be blotted out and equal texts make equal bytes.
        rules, unrules = (folder + name.rjust(160 - len(folder), "/")
                          for name in ("escape.tsv", "restore.tsv"))
        # SentencePiece writes a space as U+2581. To tell a real U+2581 from a space, the normaliser
        # spells it as U+10FFFD "_" and U+10FFFD twice, and the denormaliser undoes that.
        Path(rules).write_text("10FFFD\t10FFFD 10FFFD\n2581\t10FFFD 5F\n")
        Path(unrules).write_text("10FFFD 10FFFD\t10FFFD\n10FFFD 5F\t2581\n")
        with refusing(f"VOCAB_SIZE {V}: no tokenizer of this size fits these documents",
                      RuntimeError, OSError):
            # For losslessness: own rules in place of NFKC, which rewrites characters; no prefix and
            # no merged spaces; bytes for what the alphabet lacks. For equal models: one thread.
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=V,
                pad_id=0, bos_id=1, eos_id=2, unk_id=3, user_defined_symbols=list(markers),
                byte_fallback=True, split_digits=True, character_coverage=0.9995, num_threads=1,
                normalization_rule_tsv=rules, denormalization_rule_tsv=unrules, minloglevel=4,
                add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, max_sentence_length=1 << 16)
    write_atomically(path, model.getvalue().replace(folder.encode(), b"/" * len(folder.encode())))


def utf8_widths(text: str) -> np.ndarray:
    """UTF-8 bytes int64 (characters,) of each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + np.searchsorted([0x80, 0x800, 0x10000], codes, "right")


def raw_bytes(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int], text: str,
              weights: np.ndarray) -> np.ndarray:
    """Original bytes int64 (T,) that each of the tokens `ids` of `text` stands for, if `weights`
    (characters,) are those of its characters. They sum to weights.sum() for any normaliser, since
    every token ends where the next begins: what the normaliser drops goes to the token in front of
    it, at a document's start to the first one."""
    # Cuts between tokens go from normalised bytes, where a space is U+2581, back to characters.
    normalised, offsets = tokenizer.normalize(text, with_offsets=True)
    sizes, pieces = utf8_widths(normalised), tokenizer.id_to_piece(ids)
    ends = np.cumsum(np.where(tokenizer.is_byte(ids), 1, [len(piece.encode()) for piece in pieces]))
    require(ends[-1] == sizes.sum(), f"tokenizer: its pieces cover {ends[-1]} of {sizes.sum()} "
            "bytes of a document; without byte pieces the sidecar cannot be exact")
    before = np.concatenate([[0], np.cumsum(weights)])[np.array(offsets)]
    character = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(ends[-1]) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # A cut inside a character (byte pieces) moves on byte by byte as far as the original has any.
    origin = before[character] + np.minimum(within, np.diff(before)[character])
    return np.diff(origin[ends[:-1]], prepend=0, append=weights.sum())


# Lossless case transform (parameter-golf #1729): lower-case text with markers before each run of
# ASCII letters that had capitals. A marker that stands in the original is escaped.
#     Hello -> TITLE hello     NASA -> ALL_CAPS nasa     iPhone -> i CAP_NEXT phone
# A word and its capitalised form then share their pieces. A run ends where ASCII letters end, so no
# marker needs a closing one. A marker stands for no byte and a letter for that of its capital: BPB
# divides by the original, never by this text, whose greater length flattered #2138.
CAPITALS = {code: CAP_NEXT + chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}
CASED = re.compile(f"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{MARKERS}]")


def caseops_spell(match: re.Match) -> str:
    """The transform of one run of letters with a capital, or of one marker character."""
    run = match[0]
    if run in MARKERS:
        return ESCAPE + run
    if run.isupper() and len(run) > 1:
        return ALL_CAPS + run.lower()
    spelled = run.translate(CAPITALS)
    return TITLE + spelled[1:] if run[0].isupper() else spelled


def caseops_encode(text: str) -> str:
    """`text` with its ASCII capitals spelled as markers and lower case; it can be undone."""
    return CASED.sub(caseops_spell, text)


def caseops_weights(text: str) -> np.ndarray:
    """Original bytes (characters,) behind each character of a CaseOps text: 0 for its markers, an
    escape among them; the marker behind an escape is a character of the original."""
    weights = utf8_widths(text)
    weights[[match.start() for match in re.finditer(f"{ESCAPE}.|[{MARKERS}]", text)]] = 0
    return weights


OFFICIAL_VAL_DOCUMENTS = 50_000    # the first of docs_selected.jsonl
Document = tuple[bool, str]    # held out, text
Corpus = Callable[[], Iterator[Document]]    # each call starts over
SAMPLE_BYTES, SAMPLE_DOCUMENT, BATCH_CHARACTERS = 32_000_000, 200_000, 4_000_000


def split_documents(paths: Sequence[Path], val_paths: Sequence[Path], val_first: int = 0,
                    tally: Tally | None = None) -> Iterator[Document]:
    """(held out, text) of all documents: by file where `val_paths` names some, the first
    `val_first`, else 95/5 by content. Copies of one land on one side, or are left out of
    training."""
    # What training has seen is no test: of 34 audited submissions 15 had documents of the
    # validation set among their training shards (#2127).
    seen, tally = set(), tally or Tally()
    for number, text in enumerate(read_documents([*val_paths, *paths], tally)):
        if tally.files <= len(val_paths) or number < val_first:
            seen.add(fingerprint(text))
            yield True, text
        elif not (val_paths or val_first):
            yield held_out(text), text
        elif fingerprint(text) not in seen:
            yield False, text


def sample_texts(texts: Iterable[str], limit_bytes: int = SAMPLE_BYTES) -> list[str]:
    """The documents of smallest hash, cut to SAMPLE_DOCUMENT characters, up to `limit_bytes`: a
    sample that does not depend on the order of the corpus."""
    kept, size_bytes, bound = [], 0, 1 << 64
    for text in texts:
        entry = fingerprint(text), text[:SAMPLE_DOCUMENT]
        if entry[0] < bound:
            size_bytes += len(entry[1].encode())
            bisect.insort(kept, entry)
        while size_bytes > limit_bytes and len(kept) > 1:
            bound, dropped = kept.pop()    # nothing at or beyond it can come in again
            size_bytes -= len(dropped.encode())
    return [text for _, text in kept]


def batches(corpus: Iterable[Document], title: str, say: Callable,
            tally: Tally) -> Iterator[list[Document]]:
    """Runs of documents of about BATCH_CHARACTERS: enough for all threads, in bounded memory. Says
    how many were taken, how fast, and the time left by the bytes read, at the end and every 30 s
    before, on a terminal each second. Raises Refusal when one side stays empty."""
    start_s = said_s = time.monotonic()
    millions, batch, size, tally.sides = 0.0, [], 0, [0, 0]
    for document in itertools.chain(corpus, [None]):    # None: the end
        if document:
            batch.append(document)
            tally.sides[document[0]] += 1
            size += len(document[1])
            if size < BATCH_CHARACTERS:
                continue
        yield batch
        millions += size / 1e6
        now_s, batch, size = time.monotonic(), [], 0
        if not document or now_s - said_s >= (1 if on_terminal() else SILENCE_S):
            said_s, passed_s = now_s, max(now_s - start_s, 1e-9)
            left_s = passed_s * (tally.size_bytes / max(tally.read_bytes, 1) - 1)
            say(f"data {title}: {sum(tally.sides)} documents, {millions:.1f} M characters, "
                f"{millions / passed_s:.2f} M/s" + f", {left_s:.0f} s left" * (left_s > 0))
    for side, count in zip(("train", "val"), tally.sides):
        require(count, f"documents: none fell to {side}; give more documents, or choose those of "
                "validation with --val or --val-first")


def write_shards(corpus: Corpus, tokenizer: sentencepiece.SentencePieceProcessor, folder: Path,
                 caseops: bool, say: Callable[[str], None], tally: Tally) -> dict[str, int]:
    """Writes train, val and val_bytes shards of `corpus` into `folder`; returns what it counted.
    Raises Refusal when one side stays empty."""
    counts = dict.fromkeys(["empty_documents", "val_bytes", "train_bytes",
                            "val_documents_decoded_exactly"], 0)
    names = ("train", "val", "val_bytes")
    shards = {name: ShardWriter(folder / f"fineweb_{name}") for name in names}
    for batch in batches(corpus(), "encoding", say, tally):
        texts = [caseops_encode(text) if caseops else text for _, text in batch]
        # SentencePiece encodes a batch on all cores, and keeps its order.
        encoded = tokenizer.encode(texts, num_threads=cpu_count())
        streams = {name: [] for name in names}
        for (held, original), text, ids in zip(batch, texts, encoded):
            if not ids:    # the normaliser left no token for its bytes to stand on
                counts["empty_documents"] += 1
                tally.sides[held] -= 1
                continue
            side = names[held]
            counts[f"{side}_bytes"] += len(original.encode())
            # BOS opens each document on both sides, and has a 0 in the sidecar
            streams[side] += [BOS, *ids]
            if held:
                weights = caseops_weights(text) if caseops else utf8_widths(text)
                exact = raw_bytes(tokenizer, ids, text, weights)
                require(exact.max() < 65536, f"documents: one token stands for {exact.max()} "
                        "bytes, a sidecar holds at most 65535; shorten the run of spaces")
                streams["val_bytes"] += [0, *exact]
                counts["val_documents_decoded_exactly"] += tokenizer.decode(ids) == text
        for name in names:
            shards[name].append(streams[name])
    for side, documents in zip(("train", "val"), tally.sides):
        counts |= {f"{side}_documents": documents, f"{side}_tokens": shards[side].count}
    return counts | dict(bad_rows=tally.bad_rows)


def build_dataset(corpus: Corpus, V: int, tokenizer_path: Path | None, out: Path, caseops: bool,
                  say: Callable[[str], None], tally: Tally) -> dict:
    """Makes the folder `out` of shards, byte sidecar, tokenizer (`tokenizer_path`, or trained on a
    bounded sample of the train side of `corpus`) and manifest, whole or not at all; returns the
    manifest. Raises Refusal when `out` holds something else or V does not fit."""
    require(260 <= V <= 65536,
            f"VOCAB_SIZE {V}: expected 260 to 65536 (256 bytes, 4 special ids, uint16)")
    with delivered(out, "--out") as folder:
        model = folder / f"fineweb_{V}_bpe.model"
        if tokenizer_path:
            load_tokenizer(tokenizer_path, V, caseops)
            shutil.copyfile(tokenizer_path, model)
        # A look at every row, so that a bad one is refused before the first is encoded.
        runs = batches(corpus(), "reading", say, tally)
        sample = sample_texts(text for run in runs for held, text in run if not held)
        if tally.bad_rows:
            say(f"data: {tally.bad_rows} bad rows are left out, the first {tally.first_bad}")
        if not tokenizer_path:
            say(f"data: a tokenizer of {V} pieces is trained on {len(sample)} documents")
            texts = map(caseops_encode, sample) if caseops else sample
            train_tokenizer(texts, V, model, MARKERS if caseops else ())
        counts = write_shards(corpus, load_tokenizer(model, V, caseops), folder, caseops, say,
                              tally)
        # The hashes come last, of files that are closed: `intact` later compares them.
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        manifest = dict(builder=BUILDER, vocab_size=V, caseops=caseops, **counts, files=files)
        write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def embedded_corpus(folder: Path, V: int = 1024, say: Callable[[str], None] = print,
                    caseops: bool = False) -> Path:
    """The folder of the embedded corpus in the cache `folder`, built where it is not intact."""
    path = corpus_path(folder, V, caseops)
    if intact(path):
        return path
    if path.exists():
        say(f"data: {path} is damaged and is built again")
        shutil.rmtree(path, ignore_errors=True)    # gone already when another process was faster
    documents = [(held_out(name), text) for name, text in embedded_documents()]
    try:
        build_dataset(functools.partial(iter, documents), V, None, path, caseops, say, Tally())
    except Refusal:
        if not intact(path):    # of processes that build the same bytes, the first to finish wins
            raise
    return path


def fetch_files(o: argparse.Namespace, pull: Callable[[str], str], log: Log) -> None:
    """Moves what `pull` brings of a data set to its places below --out, each file once it is whole;
    whole shards stay. Raises Refusal for what the manifest has not."""
    manifest = json.loads(Path(pull("manifest.json")).read_bytes())
    sets = {found[1]: row for row in manifest["datasets"]
            if (found := re.fullmatch(r"fineweb10B_(sp\d+|byte260)", row["name"]))}
    require(o.published in sets, f"--published {o.published}: expected one of {', '.join(sets)}")
    entry = sets[o.published]
    held, most = (int(entry["stats"][key]) for key in ("files_val", "files_train"))
    require(o.shards is None or 0 < o.shards <= most, f"--shards {o.shards}: expected 1 to {most}")
    model = {row["name"]: row for row in manifest["tokenizers"]}[entry["tokenizer_name"]]
    names = [f"datasets/fineweb10B_{o.published}/fineweb_{side}_{number:06d}.bin" for side, count
             in (("val", held), ("train", o.shards or most)) for number in range(count)]
    names += [f"tokenizers/{Path(at).name}" for n, at in model.items() if at and n.endswith("path")]
    begin_s, got_bytes = time.monotonic(), []
    for number, name in enumerate(names, 1):
        path, shard, whole = Path(o.out, name), name.endswith(".bin"), False
        log.begin(name)
        try:
            whole = shard and path.exists() and read_shard(path) is not None
        except Refusal as error:
            log(f"data: {error}; it is fetched again")
        if not whole:    # as tokenizers never are: they are small
            fresh = Path(pull(name))
            got_bytes.append(read_shard(fresh).nbytes if shard else 0)
            os.renames(fresh, path)
        if log.due() or number == len(names):
            passed_s, megabytes = time.monotonic() - begin_s, sum(got_bytes) / 1e6
            left_s = passed_s / max(len(got_bytes), 1) * (len(names) - number)
            log.progress(f"data: {number} of {len(names)} files, {megabytes:.1f} MB fetched, "
                         f"{megabytes / passed_s:.1f} MB/s, {left_s:.0f} s left")


def fetch_published(arguments: list[str]) -> dict[str, Any]:
    """The verb data with --published: brings a data set of the challenge's export to where runs
    look for it; returns what it is and where."""
    parser = argparse.ArgumentParser("train_gpt.py data", description="the published shards")
    parser.add_argument("--published", required=True, help="sp1024 and the like, or byte260")
    parser.add_argument("--shards", type=int, help="the first so many for training; else all")
    parser.add_argument("--out", default=Hyperparameters.data_dir, help="folder, for DATA_DIR")
    parser.add_argument("--repo", default="willdepueoai/parameter-golf", help="a data set's name")
    parser.add_argument("--root", default="datasets", help="folder in it that has manifest.json")
    o, others = parser.parse_known_args(arguments)
    require(not others, f"data --published {o.published}: does not go with {' '.join(others)}")
    # read at import: no bars among our lines, no cache that holds 16 GB a second time
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_XET_CHUNK_CACHE_SIZE_BYTES="0")
    hub, log, V = optional("huggingface_hub"), Log(World()), re.sub(r"\D", "", o.published)
    require(hub, "--published needs the package huggingface_hub (pip install huggingface-hub)")
    source, workshop = dict(subfolder=o.root, repo_type="dataset"), Path(o.out, f".published_{V}")
    pull = functools.partial(hub.hf_hub_download, o.repo, local_dir=workshop, **source)
    log.begin("manifest.json")
    shutil.rmtree(workshop, ignore_errors=True)    # torn files of a process that was killed
    try:
        with log.awake():
            # Asked without retries first, so that a missing network is told at once.
            hub.get_hf_file_metadata(hub.hf_hub_url(o.repo, "manifest.json", **source))
            fetch_files(o, pull, log)
    except Exception as error:    # several libraries work for the hub, with errors of their own
        kind = "" if isinstance(error, Refusal) else f"{type(error).__name__}: "
        raise Refusal(f"{o.repo}: {log.doing[0]}: {kind}{brief(error.__cause__ or error)}; whole "
                      "files stay, and the same command goes on from here") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    log("data: train on it with " + f"VOCAB_SIZE={V} " * (V != str(Hyperparameters.vocab_size)) +
        f"DATA_DIR={shlex.quote(o.out)} " * (o.out != Hyperparameters.data_dir) +
        f"torchrun --standalone --nproc_per_node=8 {shlex.quote(os.path.relpath(SCRIPT))}")
    return dict(published=o.published, out=o.out)


def make_dataset(arguments: list[str], say: Callable[[str], None] | None = None) -> dict:
    """The verb data: makes shards of the documents that the command line names, or fetches some."""
    if any(argument.startswith("--published") for argument in arguments):
        return fetch_published(arguments)
    parser = argparse.ArgumentParser("train_gpt.py data", description="make shards, or --published")
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl, .jsonl.zst (field "
                        "text) or .txt, in UTF-8; a byte order mark is no part of the text")
    parser.add_argument("--vocab", type=int, required=True, help="pieces of the tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model; else trained on FILES")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the shards")
    parser.add_argument("--caseops", action="store_true", help="lossless case transform")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad rows and count them")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--val", nargs="+", type=Path, default=[], help="validation documents; "
                        "else one document in twenty, by a hash of its content")
    choice.add_argument("--val-first", type=int, metavar="N", help="the first N documents are "
                        "validation (the official export: 50000, chosen for docs_selected.jsonl)")
    o = parser.parse_args(arguments)
    first, val_first, log = o.files[0], o.val_first or 0, Log(World())
    say = say or log
    if first.name.startswith("docs_selected.jsonl") and not o.val and o.val_first is None:
        val_first = OFFICIAL_VAL_DOCUMENTS
        say(f"data: {first}: the first {val_first} documents are validation, as in the official "
            "export (--val-first or --val chooses others)")
    require(o.val or len(o.files) > 1 or first.suffix != ".txt", f"{first}: a .txt file is one "
            "document, with none left for validation; name some with --val, give more files, or "
            'one .jsonl file with a line {"text": ...} for each document')
    tally = Tally(skip_bad=o.skip_bad)
    corpus = functools.partial(split_documents, o.files, o.val, val_first, tally)
    log.begin("the tokenizer's training")    # a single call; all else says how far it is
    with log.awake():
        manifest = build_dataset(corpus, o.vocab, o.tokenizer, o.out, o.caseops, say, tally)
    say(f"data: {manifest['train_tokens']} train and {manifest['val_tokens']} val tokens "
        f"({manifest['val_bytes']} bytes) in {o.out}")
    return manifest


build_corpus = embedded_corpus
# <<< not packed


# ==================================================================================================
# 5. Roles and depth
# One row per stored tensor: all later stages walk this table, whose order is the format of the
# artifact. Whoever moves a row makes older artifacts unreadable, or, where two rows have one shape,
# swaps them without a word. A new gate is one row here and one line in the model.
# ==================================================================================================
class Role(NamedTuple):
    """What the pipeline needs to know about one stored tensor."""

    shape: tuple[int, ...]    # leading L where there is one slice per layer
    init: str | float    # "orthogonal", "uniform", "normal", or the constant that fills it
    optim: str    # "muon", "embed", "scalar", or "" where training leaves it alone
    bits: int = 16    # 16: fp16; 1 to 8: codes of that width, a step per row
    tap: str = ""    # the activation that feeds it; empty: rounded without GPTQ
    sigmas: float = 0.0    # clip width in standard deviations of a row; 0: its largest value


BIGRAM_DIM = 128    # width of the bigram embedding, in all systems that have one
EMBED_INIT_STD = 0.005    # of the token embedding at first; its norm takes the size away


# At first a model is nearly its embedding: with wo and w_down zero no block adds to the stream. A
# gate at zero is half open and can move either way. At the defaults what is stored in fp16 is under
# 0.1% of the weights, too little to be worth codes.
def roles(h: Hyperparameters) -> dict[str, Role]:
    """The role table of these hyperparameters: name -> Role, in the order of the artifact."""
    L, D, F_ = h.num_layers, h.model_dim, int(h.mlp_mult * h.model_dim)
    H, K = h.num_heads * h.head_dim, h.num_kv_heads * h.head_dim
    # a row of skip weights for each pop of the deepest plan, which the others use in part
    S = sum(step.pop is not None for step in depth_plan(h, looped=True))
    matrix = dict(optim="muon", bits=h.matrix_bits, sigmas=h.matrix_clip_sigmas)
    scalar, start = dict(optim="scalar"), h.matrix_init
    table = dict(embed=Role((h.vocab_size, D), "normal", "embed", h.embed_bits, "final",
                            h.embed_clip_sigmas))
    if h.pointer:    # K x D as wk is, so that one stack holds both
        table["copy_query"] = Role((1, K, D), start, tap="final", **matrix)
        table["copy_key"] = Role((1, K, D), start, tap="final", **matrix)
        table["copy_own"] = Role((1, D), 0.0, **scalar)
        table["copy_bias"] = Role((1, ), 8.0, **scalar)    # at first nearly nothing is copied
        table["copy_gain"] = Role((1, ), 2.0, **scalar)
    table |= dict(
        wq=Role((L, H, D), start, tap="attn_in", **matrix),
        wk=Role((L, K, D), start, tap="attn_in", **matrix),
        wv=Role((L, K, D), start, tap="attn_in", **matrix),
        wo=Role((L, D, H), 0.0, tap="attn_out", **matrix),
        w_up=Role((L, F_, D), start, tap="mlp_in", **matrix),
        w_down=Role((L, D, F_), 0.0, tap="mlp_hidden", **matrix),
        q_gain=Role((L, h.num_heads), h.qk_gain_init, **scalar),
        attn_scale=Role((L, D), 1.0, **scalar),
        mlp_scale=Role((L, D), 1.0, **scalar),
        mix_x=Role((L, D), 1.0, **scalar),
        mix_x0=Role((L, D), 0.0, **scalar),
        skip_weight=Role((S, D), 1.0, **scalar),
    )
    if h.skip_gates:
        table["skip_gate"] = Role((S, D), 0.0, **scalar)
    if h.head_gate_scale:
        table["head_gate"] = Role((L, h.num_heads, h.gate_window), 0.0, "scalar", bits=8)
    if h.parallel_start_layer < h.num_layers and h.parallel_form == "lanes":
        table["lane_keep"] = Role((L, 2), 1.1, **scalar)
        table["lane_write"] = Role((L, 2, 2), 1.0, **scalar)
    if h.parallel_form == "apart":
        table["lane_share"] = Role((1, ), 0.5, **scalar)
    if h.smear_gate == "channel":
        table["smear_gate"] = Role((1, D), 0.0, **scalar)
    if h.smear_gate == "token":
        table["smear_gate"] = Role((1, h.gate_window), 0.0, **scalar)
        table["smear_scale"] = Role((1, ), 0.0, **scalar)
    if h.bigram_vocab_size:
        table["bigram"] = Role((h.bigram_vocab_size, BIGRAM_DIM), 0.0, "embed", 8)
        table["bigram_proj"] = Role((1, D, BIGRAM_DIM), "orthogonal", "muon")
        table["bigram_scale"] = Role((1, ), 0.05, **scalar)
    if h.ve_dim:    # the published pass over the matrices leaves a side below 64 at zero
        table["ve"] = Role((h.vocab_size, h.ve_dim), "normal", "embed", 8)
        table["ve_proj"] = Role((1, K, h.ve_dim), "orthogonal" if h.ve_dim >= 64 else 0.0, "muon")
        table["ve_scale"] = Role((1, ), 0.1, **scalar)
        table["ve_layer"] = Role((len(h.valued), ), 1.0, **scalar)
    if h.asym_logit_rescale:    # in no group: test-time training alone moves it
        table["softcap"] = Role((2, ), h.logit_softcap, "")
    skipped = dict(all=(), matrices=("embed", ), none=table)[h.gptq_roles]
    return {n: r._replace(tap="") if n in skipped else r for n, r in table.items()}


class Step(NamedTuple):
    """One executed block: which layer it is, whose weights, and its part in the U-Net skips."""

    layer: int
    push: bool    # its output is kept for the step that mirrors it
    pop: int | None    # row of the skip weights that merges a kept output, or None
    parallel: bool    # attention and MLP read and write lanes of their own
    xsa: bool    # heads drop the part along their own value
    rounded: bool = False    # its matrices are used as the exporter would round them


# The plan of the defaults when looped, 17 steps of 11 layers, as step: layer.
#     push    0:0  1:1  2:2  3:3  4:4  5:5  6:3  7:4
#     pop    15:9 14:8 13:7 12:6 11:5 10:4  9:3  8:5      16:10 pops nothing
# A column is one skip: step 8 + r pops what step 7 - r pushed, by row r of the skip weights. The
# plan without the loop uses rows 0 to 4; rows 5 to 7 wait for the loop.
# A plan is an argument, never a flag that is flipped: a compiler folds flags into its graph, where
# flipping them does nothing (as with the late rounding of #315).
def depth_plan(h: Hyperparameters, looped: bool, rounded: bool = False) -> tuple[Step, ...]:
    """The executed blocks in order: layers LOOP_START..LOOP_END run 1 + NUM_LOOPS times if looped.
    The first half pushes its outputs, the second pops them in reverse (U-Net skips, #289); plain
    skips have a row for each pair of the unlooped plan only (#1539)."""
    order, end = [*range(h.num_layers)], h.loop_end + 1
    order[end:end] = order[h.loop_start:end] * (h.num_loops if looped else 0)
    # Only steps below `half` push, only those from it on are parallel: what is kept is one lane.
    half = len(order) // 2
    rows = half if h.skip_gates else h.num_layers // 2
    first = h.num_layers if h.parallel_form == "none" else h.parallel_start_layer
    return tuple(
        Step(layer, half - rows <= slot < half,
             slot - half if half <= slot < half + rows else None,
             layer >= first and slot >= half, layer >= h.num_layers - h.xsa_last_n, rounded)
        for slot, layer in enumerate(order))


# ==================================================================================================
# 6. Model
# The only forward pass of the file, for training, scoring, calibration and test-time training: in a
# second copy one gate is soon forgotten (1.908 BPB in #1787). Shapes are (B, T, D) throughout,
# matrices (out, in). Products run in the compute dtype, sums with fp32 gains in fp32, rounded once
# at the end.
# ==================================================================================================
def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension without a gain: x / sqrt(mean(x^2) + eps)."""
    return F.rms_norm(x, (x.size(-1), ))


class LoRA(NamedTuple):
    """Low-rank correction with separate factors for every row of the batch (arXiv 2106.09685)."""

    a: Tensor    # (B, R, in)
    b: Tensor    # (B, out, R)
    scale: float


def correction(lora: LoRA, x: Tensor) -> Tensor:
    """(B, T, in) -> scale * b (a x), (B, T, out); no method, for the compiler of torch 2.9 calls
    none of a named tuple that holds tensors."""
    return (x @ lora.a.mT * lora.scale) @ lora.b.mT


def linear(x: Tensor, w: Tensor, lora: LoRA | None = None, lora_in: Tensor | None = None) -> Tensor:
    """x @ w.T, plus the adapter's correction of `lora_in` (x unless given) where there is one."""
    y = F.linear(x, w)
    return y if lora is None else y + correction(lora, x if lora_in is None else lora_in)


def rope_table(h: Hyperparameters, T: int, like: Tensor, behind: Tensor | None = None) -> Rope:
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
    """Turns the pairs (j, j + half) of the first dimensions of each head (B, T, H, E) by the angle
    of their place, of which q . k keeps the distance; the rest compare content alone (#315)."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)


def compute_dtype(h: Hyperparameters, device: torch.device) -> torch.dtype:
    """bf16 where PRECISION asks for it or, with auto, where the chip multiplies it natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(False)    # not by way of fp32
    else:
        native = any(getattr(torch.cpu, name, bool)()
                     for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    wanted = h.precision == "bf16" or h.precision == "auto" and native
    return torch.bfloat16 if wanted else torch.float32


def attention_kernel(h: Hyperparameters, device: torch.device) -> str:
    """ATTENTION, or with auto the fastest that device, precision and installation offer: fa3, fa2,
    varlen (torch >= 2.10) or sdpa on GPUs, blocks on CPUs. Raises Refusal for what is not there."""
    cuda, dtype = device.type == "cuda", compute_dtype(h, device)
    # the FlashAttention family multiplies no fp32, and nothing before Ampere
    chip = torch.cuda.get_device_capability(device)[0] if cuda and dtype != torch.float32 else 0
    # in the order of preference
    there = dict(fa3=chip == 9 and flash_attn_3, fa2=chip >= 8 and flash_attn_2,
                 varlen=chip >= 8 and torch_varlen, blocks=not cuda, sdpa=True)
    if h.attention == "auto":
        return next(name for name in there if there[name])
    require(there[h.attention] or h.attention == "blocks", f"ATTENTION={h.attention}: not on "
            f"{device.type} in {str(dtype)[6:]} with what is installed here")
    return h.attention


def attend(q: Tensor, k: Tensor, v: Tensor, docs: Docs, kernel: str = "blocks") -> Tensor:
    """Causal grouped-query attention within each document piece, softmax of q k / sqrt(E) by the
    named kernel: (B, T, H | K, E) -> (B, T, H, E)."""
    if kernel == "blocks":
        return by_blocks(q, k, v, docs.start)
    if kernel == "sdpa":
        # the mask is (B, 1, T, T): dear, and so only where no kernel takes document ends
        place = torch.arange(q.size(1), device=q.device)
        seen = (place[:, None] >= place) & (place >= docs.start[..., None])
        # enable_gqa with a mask would keep all (H, T, T) probabilities; copied heads are far less
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), 2) for t in (k, v))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)),
                                              seen[:, None]).transpose(1, 2)
    (B, T, H, E), ends, longest = q.shape, docs.bounds, docs.longest
    q, k, v = (t.reshape(B * T, -1, E) for t in (q, k, v))
    if kernel == "varlen":
        # rows joined end to end, (B * T, heads, E): `ends` keeps rows and documents apart
        if "enable_gqa" not in VARLEN_CAUSAL:
            k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))
        y = torch_varlen.varlen_attn(q, k, v, ends, ends, longest, longest, **VARLEN_CAUSAL)
    else:
        flash = flash_attn_3 if kernel == "fa3" else flash_attn_2
        y = flash.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
        y = y[0] if isinstance(y, tuple) else y    # early releases of FA3 add the log-sum-exp
    return y.view(B, T, H, E)


QUERY_BLOCK = 128    # queries that `by_blocks` takes at once


def group(t: Tensor, K: int) -> Tensor:
    """(B, T, H, E) -> (B, K, H / K, T, E): the query heads beside the key head that they share."""
    B, T, H, E = t.shape
    return t.view(B, T, K, H // K, E).permute(0, 2, 3, 1, 4)


def ungroup(t: Tensor) -> Tensor:
    """The inverse of `group`."""
    B, K, G, T, E = t.shape
    return t.permute(0, 3, 1, 2, 4).reshape(B, T, K * G, E)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """Exact attention by blocks of queries, each against the keys before its end, for CPUs and as
    the other kernels' twin: (B, T, H | K, E) and piece starts (B, T) -> (B, T, H, E). The query
    heads of a group are rows of one product."""
    (B, T, H, E), K, place = q.shape, k.size(2), torch.arange(q.size(1), device=q.device)
    (Q, keys, values), outputs = (group(t, K) for t in (q * E**-0.5, k, v)), []
    for lo in range(0, T, QUERY_BLOCK):
        hi = min(lo + QUERY_BLOCK, T)
        seen = (place[lo:hi, None] >= place[:hi]) & (place[:hi] >= start[:, lo:hi, None])
        rows = Q[..., lo:hi, :].reshape(B * K, -1, E)
        logits = torch.bmm(rows, keys[:, :, 0, :hi].reshape(B * K, hi, E).mT).float()
        # (B * K, G * queries, keys) until here, by group only for the mask
        logits = logits.view(B, K, H // K, hi - lo, hi)
        p = logits.masked_fill(~seen[:, None, None], -math.inf).softmax(-1).to(q.dtype)
        y = torch.bmm(p.view(B * K, -1, hi), values[:, :, 0, :hi].reshape(B * K, hi, E))
        outputs.append(y.view(B, K, H // K, hi - lo, E))
    return ungroup(torch.cat(outputs, 3))


class Past(NamedTuple):
    """What one step of depth remembers of the tokens before a chunk, and where it leaves its own.
    Keys are kept rotated: places count from the document's start and so never change."""

    keys: Tensor    # (B, K, M, E), as they were when scored
    values: Tensor    # (B, K, M, E)
    seen: Tensor    # (B, 1, C, M + C) 0 where a query may read it, -inf elsewhere; last the chunk
    fresh: list[Tensor]    # the step adds keys and values (B, K, C, E) of the chunk


def recall(q: Tensor, k: Tensor, v: Tensor, past: Past) -> Tensor:
    """Attention of a chunk to itself and to what is cached, (B, C, H | K, E) -> (B, C, H, E)."""
    # The cache is multiplied where it lies: kernels for whole sequences would have it joined to
    # the chunk and its heads copied, at each step of depth and tick.
    (B, C, H, E), K, M = q.shape, k.size(2), past.keys.size(2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    past.fresh.extend((k.detach(), v.detach()))
    Q = group(q * E**-0.5, K).reshape(B, K, -1, E)    # (B, K, G * C, E)
    logits = torch.cat((Q @ past.keys.mT, Q @ k.mT), -1).view(B, H, C, -1).float()
    p = (logits + past.seen).softmax(-1).to(v.dtype).view(B, K, -1, M + C)
    return ungroup((p[..., :M] @ past.values + p[..., M:] @ v).view(B, K, H // K, C, E))


# One layer's slice of every bank, None where the model has no such role; gains and scales stay
# fp32. depth_scale () is 1 / sqrt(layer + 1), on the inputs of both branches (LN_SCALE).
Layer = NamedTuple("Layer", [(name, Tensor | None) for name in (
    "wq", "wk", "wv", "wo", "w_up", "w_down", "q_gain", "attn_scale", "mlp_scale", "mix_x",
    "mix_x0", "head_gate", "lane_keep", "lane_write", "depth_scale")])
Rope = tuple[Tensor, Tensor]    # cosine and sine
Adapters = Mapping[str, LoRA]    # of one step, by the map that each corrects


def kernels_take(x: Tensor) -> bool:
    """True for tensors that the fused kernels of section 14 were made for."""
    return (x.is_cuda or INTERPRETED) and x.dtype == torch.bfloat16 and x.size(-1) % 8 == 0


def mlp(x: Tensor, up: Tensor, down: Tensor, slope: float, fused: bool = False) -> Tensor:
    """(..., D) -> (..., D): down @ LeakyReLU(up @ x, slope)^2 with weights (F, D) and (D, F)."""
    if fused and kernels_take(x):
        y, _ = torch.ops.golf.mlp(x.flatten(0, -2), up, down, slope)
        return y.view_as(x)
    return F.linear(F.leaky_relu(F.linear(x, up), slope).square(), down)


def softcapped(z: Tensor, cap: float | Tensor) -> Tensor:
    """cap tanh(z / cap) in fp32; a tensor (2,) has one cap for positive, one for other logits.
    Wrong certainty then costs at most 2 cap + ln V nats."""
    z = z.float()
    cap = cap if isinstance(cap, float) else torch.where(z > 0, cap[0], cap[1])
    return cap * torch.tanh(z / cap)


def softcapped_nats(z: Tensor, targets: Tensor, cap: float | Tensor, fused: bool = False) -> Tensor:
    """Cross-entropy in nats (N,) fp32 of targets (N,) under the logits `softcapped` of z (N, V)."""
    if fused and isinstance(cap, float) and kernels_take(z):
        return torch.ops.golf.nats(z.contiguous(), targets, cap)[0]
    return F.cross_entropy(softcapped(z, cap), targets, reduction="none")


def copied(nats: Tensor, targets: Tensor, z: Tensor, tokens: Tensor) -> Tensor:
    """Nats (B, T) of targets (B, T) by the mixture of `GPT.pointed`, given the model's own."""
    share = z.softmax(-1)
    same = tokens[:, None] == targets.view(*z.shape[:2], 1)
    found = torch.where(same, share[..., 1:], 0.0).sum(-1).view_as(nats)
    return -(share[..., 0].view_as(nats) * torch.exp(-nats) + found + 1e-30).log()


def merge_skip(a: Tensor, kept: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """The U-Net skip: lerp(weight * kept, a, sigmoid(gate)) of (B, T, D) with (D,) each (#1089);
    without a gate their sum (#289)."""
    if gate is None:
        return (a + weight * kept).type_as(a)
    share = torch.sigmoid(gate)
    return ((1 - share) * weight * kept + share * a).type_as(a)


def join_lanes(a: Tensor, m: Tensor, share: Tensor | None) -> Tensor:
    """The final states: norm of the mean of both lanes (B, T, D), weighed by a learned share of `a`
    where the lanes ran apart (#1539)."""
    return norm((a + m) / 2 if share is None else torch.lerp(m, a, share.to(a.dtype)))


class GPT(nn.Module):
    """Banks of weights, one forward, one loss; `GPT(h)(ids, targets)` is the mean loss in nats."""

    def __init__(self, h: Hyperparameters, dtype: torch.dtype = torch.float32,
                 kernel: str = "blocks"):
        """Weights are fp32 and initialised from the global random state; `dtype` is that of the
        matrix products, `kernel` the attention's (see `attention_kernel`)."""
        super().__init__()
        h = replace(h, fused_kernels=h.fused_kernels and not kernels_trouble())
        self.h, self.dtype, self.kernel = h, dtype, kernel
        self.bank = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(r.shape)) for name, r in roles(h).items()})
        # what `compile` replaces
        self.run_nats: Callable = self.nats
        self.parts = self.plain = dict[str, Callable](
            block=self.block, adapted=self.block, head=self.head, merge=merge_skip,
            join=join_lanes, embedded=self.embedded)
        self.initialise()

    def compile(self, mode: str) -> None:
        """Compiles the parts, in mode `block` but those with adapters; in `full` `run_nats` too."""
        torch._dynamo.config.recompile_limit = 64    # graphs: per plan, shape and gradient mode
        if mode != "off":
            self.parts = {name: part if mode == "block" and name == "adapted" else
                          torch.compile(part, dynamic=False) for name, part in self.plain.items()}
        if mode == "full":
            self.run_nats = torch.compile(self.nats, dynamic=False, fullgraph=True)

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Without the compiler but in mode `full`: for shapes whose graphs cost CPUs more."""
        compiled, self.parts = self.parts, self.plain if self.run_nats == self.nats else self.parts
        yield
        self.parts = compiled

    def retune(self, **knobs: Any) -> Hyperparameters:
        """All knobs after changes of some that no weight depends on."""
        self.h = replace(self.h, **knobs)
        return self.h

    @torch.no_grad()
    def initialise(self) -> None:
        """Fills every bank as its role says."""
        for name, role in roles(self.h).items():
            w = self.bank[name]
            if w.is_meta:
                continue
            if role.init == "orthogonal":
                for layer in w:
                    nn.init.orthogonal_(layer)
            elif role.init == "uniform":
                w.uniform_(-1, 1).mul_(w.size(-1)**-0.5)
            elif role.init == "normal":
                nn.init.normal_(w, std=0.01 if name == "ve" else EMBED_INIT_STD)
            else:
                nn.init.constant_(w, role.init)

    def layers(self, rounded: bool = False) -> list[Layer]:
        """Each bank cast once and unbound once: indexing at each use would make a full-size
        gradient per use. `rounded` matrices are as the exporter would round them, clip included,
        and pass their gradient straight through (arXiv 1308.3432, #578)."""
        cast = {}
        for name, role in roles(self.h).items():
            if name in Layer._fields:
                w = self.bank[name]
                if rounded and role.optim == "muon" and role.bits < 16:
                    coded = round_rows(w.detach(), role.bits, role.sigmas, self.h.clip_search)
                    w = w + (coded.decode() - w).detach()
                plain = role.optim == "scalar" and name != "head_gate"
                cast[name] = (w if plain else w.to(self.dtype)).unbind(0)
        numbers = torch.arange(1, self.h.num_layers + 1, device=self.bank["embed"].device)
        cast["depth_scale"] = (numbers**(-0.5 * self.h.ln_scale)).unbind(0)
        absent = (None, ) * self.h.num_layers
        return [Layer(*ws) for ws in zip(*(cast.get(name, absent) for name in Layer._fields))]

    def embedded(self, ids: Tensor, last: Tensor | None = None) -> Tensor:
        """Normalised embeddings (B, T, D) of ids (B, T); `last` (B, 2) precede, negative for none.

        x_t + scale * sigmoid(W x_t[:GATE_WINDOW]) * x_(t-1), 0 for the last term at a BOS: without
        that a document's first token would read the end of another (found in #1797). The form per
        channel (#162) has no such mask."""
        # two tokens: the smear needs the one before the chunk, whose bigram one more
        ids = ids if last is None else torch.cat((last, ids), 1)
        x = F.embedding(ids.clamp(min=0), self.bank["embed"].to(self.dtype))
        if self.h.bigram_vocab_size:
            V, before = self.h.bigram_vocab_size, F.pad(ids[:, :-1], (1, 0), value=-1)
            # colliding pairs share a row; the last row is for tokens that have none before them
            pair = (36313 * ids ^ 27191 * before) % max(1, V - 1)
            x = x + looked_up(self, "bigram", torch.where(before < 0, V - 1, pair))
        if last is not None:
            x = x * (ids >= 0)[..., None]
        if self.h.smear_gate == "token":
            drive = F.linear(x[..., :self.h.gate_window], self.bank["smear_gate"].to(self.dtype))
            gate = self.bank["smear_scale"].to(self.dtype) * torch.sigmoid(drive)
            x = x + gate * (ids != BOS)[..., None] * F.pad(x[:, :-1], (0, 0, 1, 0))
        x = norm(x)
        if self.h.smear_gate == "channel":
            share = torch.sigmoid(self.bank["smear_gate"][0]).to(self.dtype)
            x = x + share * (F.pad(x[:, :-1], (0, 0, 1, 0)) - x)
        return x if last is None else x[:, last.size(1):]

    def attention(self, w: Layer, n: Tensor, rope: Rope, docs: Docs, xsa: bool, lora: Adapters,
                  value: Tensor | None = None, past: Past | None = None) -> Tensor:
        """Normalised input (B, T, D) -> attention output (B, T, D), before its scale."""
        h, (B, T, _) = self.h, n.shape
        heads = lambda t: t.view(B, T, -1, h.head_dim)    # (B, T, H | K, E)
        q = rotate(norm(heads(linear(n, w.wq, lora.get("q")))), *rope)
        # norms make |q| = |k| = sqrt(E): a logit lies within gain * sqrt(E) whatever the weights
        q = (q * w.q_gain[:, None]).type_as(n)
        k = rotate(norm(heads(linear(n, w.wk, lora.get("k")))), *rope)
        v = linear(n, w.wv, lora.get("v"))
        v = heads(v if value is None else v + value)
        y = attend(q, k, v, docs, self.kernel) if past is None else recall(q, k, v, past)
        # What a token says of itself is in its stream already; heads bring what is elsewhere.
        if xsa:    # y - (y . v/|v|) v/|v| with the value of the same position (arXiv 2603.09078)
            own = F.normalize(v, dim=-1)[..., None, :]    # (B, T, K, 1, E)
            grouped = y.view(B, T, h.num_kv_heads, -1, h.head_dim)
            y = (grouped - (grouped * own).sum(-1, keepdim=True) * own).view_as(y)
        # A softmax cannot attend to nothing: a factor per head and token lets a head keep silent.
        if w.head_gate is not None:
            gate = F.linear(n[..., :w.head_gate.size(-1)], w.head_gate)    # (B, T, H)
            y = y * torch.sigmoid(h.head_gate_scale * gate)[..., None]
        return linear(y.reshape(B, T, -1), w.wo, lora.get("o"), lora_in=n)

    def mlp(self, w: Layer, n: Tensor, lora: Adapters) -> Tensor:
        """Normalised input (B, T, D) -> squared leaky ReLU MLP (B, T, D), before its scale."""
        y = mlp(n, w.w_up, w.w_down, self.h.leaky_slope, self.h.fused_kernels)
        return y + correction(lora["mlp"], n) if "mlp" in lora else y

    def block(self, w: Layer, a: Tensor, m: Tensor | None, x0: Tensor, rope: Rope, docs: Docs,
              parallel: bool, xsa: bool, lora: Adapters = {}, value: Tensor | None = None,
              past: Past | None = None) -> tuple[Tensor, Tensor | None]:
        """One executed step, lanes (a, m), each (B, T, D) -> the lanes after it; `m` is None in a
        serial one. Its weights are arguments, so that one compiled graph serves every layer.
        `value` (B, T, K E) is added to the values.

        With r = mix_x a + mix_x0 x0, A and M for attention and MLP of the scaled norm, each times
        its own scale: serial a <- r + A(r), then a <- a + M(a). Lanes (#1204): a <- keep a +
        w A(r) + w' M(m), and m alike with weights of its own, so neither waits for the other.
        gptj (#1493): a <- r + A(r) + M(r). apart (#1539): a <- r + A(r), m <- m + M(m)."""
        # x0 is the embedding: however deep the step, what the token is stays within reach
        read = (w.mix_x * a + w.mix_x0 * x0).type_as(a)
        attn = w.attn_scale * self.attention(w, norm(read) * w.depth_scale, rope, docs, xsa, lora,
                                             value, past)
        if not parallel:
            a = (read + attn).type_as(a)
            a = (a + w.mlp_scale * self.mlp(w, norm(a) * w.depth_scale, lora)).type_as(a)
            return a, m
        source = read if self.h.parallel_form == "gptj" else m
        mlp = w.mlp_scale * self.mlp(w, norm(source) * w.depth_scale, lora)
        if self.h.parallel_form == "gptj":
            return (read + attn + mlp).type_as(a), m
        if self.h.parallel_form == "apart":
            return (read + attn).type_as(a), (m + mlp).type_as(a)
        keep, write = w.lane_keep, w.lane_write    # write[source, lane]: source 0 attention, 1 MLP
        return ((keep[0] * a + write[0, 0] * attn + write[1, 0] * mlp).type_as(a),
                (keep[1] * m + write[0, 1] * attn + write[1, 1] * mlp).type_as(a))

    def logits(self, x: Tensor, embed: Tensor) -> Tensor:
        """States (..., D) -> cap tanh(z / cap), (..., V) fp32."""
        return softcapped(linear(x, embed), self.h.logit_softcap)

    def head(self, x: Tensor, embed: Tensor, targets: Tensor, lora: LoRA | None = None,
             caps: Tensor | None = None) -> Tensor:
        """States (B, T, D), embedding (V, D), targets (B, T) -> nats (B, T) fp32, -log softmax of
        the logits; `caps` (2,) has one cap for each sign."""
        # (B * T, V), the largest tensor of a step: flat, since the kernel takes one row per program
        z = linear(x, embed, lora).flatten(0, 1)
        cap = self.h.logit_softcap if caps is None else caps
        return softcapped_nats(z, targets.flatten(), cap, self.h.fused_kernels).view_as(targets)

    def hidden(self, ids: Tensor, plan: tuple[Step, ...], docs: Docs | None = None,
               lora: Sequence[Adapters] | None = None, cache: Cache | None = None) -> Tensor:
        """Token ids (B, T) -> final normalised states (B, T, D). `lora` holds the adapters of each
        step, then the head's; with a `cache`, ids are the next chunk of what it remembers."""
        h, docs, run = self.h, docs or whole_rows(ids), self.parts["adapted" if lora else "block"]
        x0 = self.parts["embedded"](ids, *([cache.last] if cache else []))
        # `a` is the lane that attention and serial steps write, `m` the MLP's, if they are two.
        # Views: one tensor in two places of a compiled part would be a graph of its own.
        a, m = x0.view_as(x0), None
        layers = cache.layers if cache else self.layers(plan[0].rounded)
        rope = rope_table(h, ids.size(1), x0, cache.behind if cache else None)
        weights, shares, kept = self.bank["skip_weight"].unbind(0), {}, []
        gates = self.bank["skip_gate"].unbind(0) if h.skip_gates else (None, ) * len(weights)
        if h.ve_dim:
            value = looked_up(self, "ve", ids)
            shares = dict(zip(h.valued, self.bank["ve_layer"].to(self.dtype).unbind(0)))
        for slot, step in enumerate(plan):
            read = a if step.pop is None else self.parts["merge"](
                a, kept.pop(), weights[step.pop], gates[step.pop])
            if not step.parallel or h.parallel_form == "gptj":
                m = None
            elif m is None:    # lanes part: with "apart" after the merge, else m before it
                m = (read if h.parallel_form == "apart" else a).view_as(a)
            seam = dict(lora=lora[slot]) if lora else {}
            if step.layer in shares:
                seam["value"] = shares[step.layer] * value
            if cache:
                seam["past"] = cache.past(slot)
            a, m = run(layers[step.layer], read, m, x0, rope, docs, step.parallel, step.xsa, **seam)
            if step.push:
                kept.append(a.view_as(a))
        share = self.bank["lane_share"] if h.parallel_form == "apart" else None
        return self.parts["join"](a, a if m is None else m, share)

    def pointed(self, x: Tensor, ids: Tensor, bank: Mapping[str, Tensor], docs: Docs | None = None,
                cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """The pointer sentinel (arXiv 1609.07843): logits (N, C, 1 + M), first that of the model's
        own prediction, then those of places in the document, and the tokens (N, M) there, of
        which each may come next again. States (B, T, D) look for the state before a token; of rows
        longer than a piece, N blocks of C queries look no further back than one can reach."""
        (B, T), weight = ids.shape, lambda name: bank[name][0].to(self.dtype)
        q = norm(F.linear(x, weight("copy_query"))) * weight("copy_gain")
        k = norm(F.linear(x, weight("copy_key")))
        own = (x @ weight("copy_own")).float() + bank["copy_bias"]
        if cache:
            shifted = torch.cat((cache.before, k[:, :-1]), 1)
            cache.fresh.append((shifted.detach(), k.detach()))
            z = torch.cat((q @ cache.keys.mT, q @ shifted.mT), -1)
            tokens, seen = torch.cat((cache.ids, ids), 1), cache.reached
        else:
            docs = docs or whole_rows(ids)
            C = T if T <= docs.longest else math.gcd(T, 512)
            back = 0 if T == C else -(-docs.longest // C) * C
            blocks = lambda t: t.unfold(1, back + C, C).flatten(0, 1)    # (N, ..., M)
            z = q.view(-1, C, q.size(-1)) @ blocks(F.pad(k[:, :-1], (0, 0, 1 + back, 0)))
            tokens = blocks(F.pad(ids[:, 1:], (1 + back, 0), value=BOS))
            place = torch.arange(-back, T, device=ids.device)
            there, here = blocks(place[None])[:, None], place[back:].view(-1, C, 1)
            seen = (there <= here) & (there >= docs.start.view(B, -1, C, 1))
            seen = torch.where(seen.flatten(0, 1), 0.0, -math.inf)
        # the state before a document's first token is of another one
        z = (z.float() * q.size(-1)**-0.5 + seen).masked_fill((tokens == BOS)[:, None], -math.inf)
        return torch.cat((own.view(*z.shape[:2], 1), z), -1), tokens

    def nats(self, ids: Tensor, targets: Tensor, plan: tuple[Step, ...], docs: Docs | None = None,
             lora: Sequence[Adapters] | None = None, cache: Cache | None = None) -> Tensor:
        """Cross-entropy of every target in nats, (B, T) fp32; arguments as of `hidden`."""
        x = self.hidden(ids, plan, docs, lora, cache=cache)
        caps = dict(caps=self.bank["softcap"]) if self.h.asym_logit_rescale else {}
        nats = self.parts["head"](x, self.bank["embed"].to(self.dtype), targets,
                                  *([lora[-1].get("head")] if lora else []), **caps)
        if not self.h.pointer:
            return nats
        return copied(nats, targets, *self.pointed(x, ids, self.bank, docs, cache))

    def log_probs(self, x: Tensor, ids: Tensor, bank: Mapping[str, Tensor],
                  cache: Cache | None = None) -> Tensor:
        """Log probabilities (B, T, V) fp32 of all tokens from states (B, T, D) of whole rows."""
        own = self.logits(x, bank["embed"].to(self.dtype)).log_softmax(-1)
        if not self.h.pointer:
            return own
        z, tokens = self.pointed(x, ids, bank, None, cache)
        share, places = z.softmax(-1), tokens[:, None].expand(-1, ids.size(1), -1)
        # not in place: its gradient needs what was there
        return ((share[..., :1] * own.exp()).scatter_add(-1, places, share[..., 1:]) + 1e-30).log()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in nats of the looped plan; about ln V at initialisation."""
        return self.nats(ids, targets, depth_plan(self.h, looped=True)).mean()


def looked_up(model: GPT, name: str, ids: Tensor) -> Tensor:
    """scale * (table[ids] @ proj^T), (B, T, out), of the extra embedding `name`."""
    table, proj, scale = (model.bank[name + end].to(model.dtype) for end in ("", "_proj", "_scale"))
    return F.linear(F.embedding(ids, table), proj[0]) * scale


class Cache:
    """Keys and values of the last T - 1 tokens of B rows for every step of depth, the pointer's
    keys of as many as it reaches, each at the token that follows, and these tokens: preallocated
    rings that all rows write at one place.

    A tick is `open`, one or more passes of the model, `write`. All chunks have C tokens, so one
    place serves rows of any age, and how far back a row may look is a mask. Slots of an earlier
    document are masked, never cleared; no query sees the pads behind a document's last tokens."""

    def __init__(self, model: GPT, B: int, C: int, plan: tuple[Step, ...], T: int, reach: int = 1):
        """Empty rings of T tokens, and of `reach` times T for a pointer, for chunks of C in the
        model's compute dtype."""
        h, wk = model.h, model.bank["wk"]
        self.C, self.at, self.reaches = C, 0, (T, T * (reach if h.pointer else 1))
        with torch.no_grad():
            self.layers = model.layers()    # cast once: the weights stay as they are
        # T - 1 tokens before a query and itself make T; whole chunks, so no write wraps around
        self.slots = near, far = [-(-(n - 1) // C) * C for n in self.reaches]
        zeros = functools.partial(torch.zeros, dtype=model.dtype, device=wk.device)
        self.ring = zeros(len(plan), 2, B, h.num_kv_heads, near, h.head_dim)    # (S, ..., M, E)
        self.keys, self.before = (zeros(B, n * h.pointer, wk.size(1)) for n in (far, 1))
        self.ids = torch.zeros(B, far, dtype=torch.int64, device=wk.device)

    def open(self, behind: Tensor) -> None:
        """Makes ready for a chunk of each row; `behind` (B,) tokens of its document precede it."""
        place, masks = torch.arange(self.C, device=behind.device), {}
        own = (place[:, None] >= place).log().type_as(self.ring).expand(len(behind), -1, -1)
        for T, slots in dict(zip(self.reaches, self.slots)).items():
            # tokens from a slot to the chunk's start: every query sees exactly its last T tokens
            ago = (self.at - 1 - torch.arange(slots, device=behind.device)) % slots + 1
            back = ago + place[:, None]
            # what is n windows back counts 1/n: there are more such places than in training
            share = ((self.reaches[0] / back).clamp(max=1) * (back < T)).log().type_as(self.ring)
            share = share.where(ago <= behind[:, None, None], -math.inf)
            masks[T] = torch.cat((share, own), 2)
        self.seen, self.reached, self.behind = *(masks[T] for T in self.reaches), behind
        # at a document's start there is no token before, and at its second only one
        two = torch.stack([self.ids[:, (self.at - n) % self.slots[1]] for n in (2, 1)], 1)
        self.last = two.where(behind[:, None] > torch.arange(1, -1, -1, device=behind.device), -1)

    def past(self, slot: int) -> Past:
        """What step number `slot` remembers; each forward pass begins a new `fresh`."""
        # passes that learn find other keys: the caller hands `write` those of the pass that scored
        self.fresh = [] if slot == 0 else self.fresh
        self.fresh.append([])
        return Past(*self.ring[slot].unbind(0), self.seen[:, None], self.fresh[-1])

    def write(self, ids: Tensor, fresh: Sequence[Sequence[Tensor]]) -> None:
        """Books a chunk (B, C) with the keys and values that each step found for it."""
        near, far = (slice(self.at % n, self.at % n + self.C) for n in self.slots)
        self.ids[:, far], steps = ids, len(self.ring)
        for shifted, keys in fresh[steps:]:    # of the pointer
            self.keys[:, far], self.before = shifted, keys[:, -1:]
        self.ring[..., near, :] = torch.stack(
            [t for pair in fresh[:steps] for t in pair]).view_as(self.ring[..., near, :])
        self.at += self.C


# ==================================================================================================
# 7. Adapters
# LoRA factors for test-time training of single documents: what one teaches is forgotten at its end,
# and no weight is touched. An adapter corrects a map y = W x by scale * b (a x) with scale =
# TTT_LORA_ALPHA / R; every a reads the width D, those of `o` and `mlp` too.
# ==================================================================================================
ADAPTER_BETA2 = 0.99    # decay of their squared gradient
ADAPTER_EPS = 0.03      # added to its root, in root mean squares of the factor
ADAPTER_STEP = 0.5      # most root mean square of a factor's step, in rates


class AdapterBank:
    """One LoRA per batch row, executed step and map of TTT_TARGETS, with its optimiser's state. All
    of a row lies in one line of `flat` (B, P): an update is a handful of operations."""

    def __init__(self, h: Hyperparameters, rows: int, plan: tuple[Step, ...],
                 device: torch.device = torch.device("cpu")):
        """Every row starts from the same values: a uniform in +-1/sqrt(D), b zero. `o` and `mlp`
        adapt a map from the block's normalised input to the residual stream."""
        table, D, R = roles(h), h.model_dim, h.ttt_lora_rank
        out = dict({name: table["w" + name].shape[1] for name in "qkv"},
                   o=D, mlp=D, head=h.vocab_size)
        self.h, self.S, self.names = h, len(plan), h.ttt_targets.split(",")
        self.shapes, start = [], []
        # Equal rows make a score independent of the row and rank that a document falls to. With b
        # zero the artifact's own model scores the first chunk; with a zero too none could learn.
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
        self.updates = torch.zeros(rows, 1, device=device)    # per row: documents begin at any tick

    @torch.no_grad()
    def reset(self, rows: Tensor) -> None:
        """Back to the start, for these rows (n,)."""
        self.flat[rows] = self.start
        for t in (self.square, self.updates):    # t[rows] = 0 would wait for the device
            t.index_fill_(0, rows, 0)

    @torch.no_grad()
    def step(self, loss: Tensor, rate: Tensor) -> None:
        """One step of Adam without a mean (arXiv 1412.6980, beta1 = 0) at rates (B, 1) down `loss`,
        a sum over rows, so that none learns from another: s <- beta s + (1 - beta) g^2,
        p <- p - rate u, u = g / (r + ADAPTER_EPS rms(r) + 1e-8), r = sqrt(s / (1 - beta^n)), scaled
        down to rms(u) <= ADAPTER_STEP in each factor (StableAdamW, arXiv 2304.13013). Without these
        two, entries whose gradient is nothing but rounding move by a whole rate, and a gradient
        that jumps moves by several: a score then hangs on the last bits of a machine."""
        (grad, ), beta = torch.autograd.grad(loss, self.flat), ADAPTER_BETA2
        self.updates += 1
        self.square.mul_(beta).addcmul_(grad, grad, value=1 - beta)
        spread = (self.square / (1 - beta**self.updates)).sqrt_().add_(1e-8)
        sizes = [shape.numel() for shape in self.shapes]
        for shape, *parts in zip(self.shapes, spread.split(sizes, 1), grad.split(sizes, 1)):
            factor, g = (part.view(len(part), shape[0], -1) for part in parts)
            factor += ADAPTER_EPS * factor.square().mean(-1, keepdim=True).sqrt_()
            size = (g / factor).square().mean(-1, keepdim=True).sqrt_()
            factor *= (size / ADAPTER_STEP).clamp_(min=1)
        self.flat.addcdiv_(grad * -rate, spread)

    def adapters(self, dtype: torch.dtype = torch.float32) -> list[dict[str, LoRA]]:
        """The adapters of each step in order; the last entry is the output head's."""
        B, scale = len(self.flat), self.h.ttt_lora_alpha / self.h.ttt_lora_rank
        parts = self.flat.to(dtype).split([shape.numel() for shape in self.shapes], 1)
        factors = [part.view(B, *shape).unbind(1) for part, shape in zip(parts, self.shapes)]
        banks = {name: [LoRA(a, b, scale) for a, b in zip(*pair)]
                 for name, pair in zip(self.names, zip(factors[::2], factors[1::2]))}
        head = {n: banks.pop(n)[0] for n in ["head"] if n in banks}
        return [{n: banks[n][i] for n in banks} for i in range(self.S)] + [head]


# ==================================================================================================
# 8. Optimisers
# Muon for the matrices, of which each rank owns a share; fused AdamW for the rest; the schedule, a
# pure function of progress; the moving average that gets exported. What enters is the gradient of
# each rank's own tokens; what leaves are weights that are equal on all ranks, though none is
# broadcast after the first: all apply the same gathered updates to the same weights.
# ==================================================================================================
# Coefficients (a, b, c) of five Polar Express iterations X <- a X + (b A + c A^2) X, A = X X^T
# (arXiv 2505.16932): a singular value s becomes a s + b s^3 + c s^5, five times, and so about 1.
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
NEWTON_SCHULZ = ((3.4445, -4.775, 2.0315), ) * 5    # of the first Muon, equal at every iteration


def orthogonalise(g: Tensor, dtype: torch.dtype, iterations: Sequence = POLAR_EXPRESS) -> Tensor:
    """(n, rows, cols) -> about the nearest semi-orthogonal matrices, products in `dtype`."""
    # The Frobenius norm is at least the largest singular value, and 2% more keep rounding from
    # lifting one above 1, where the first polynomial grows fast; the addend keeps zeros from NaN.
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in iterations:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram.mT, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Stack:
    """Banks of one matrix shape, up to transposition, as a row of slices in equal shares for the
    ranks; `gain` is max(1, rows / cols)^0.5 of a matrix as it is stored.

    One batched product serves all layers of all banks of a shape: at the defaults three stacks of
    22 slices, wq with wo, wk with wv, w_up with w_down. Untransposed ones come first."""

    def __init__(self, banks: Sequence[nn.Parameter], world: World):
        """Gives each rank a momentum for its own slices only."""
        self.world, device = world, banks[0].device
        self.banks = sorted(banks, key=lambda p: p.size(-2) < p.size(-1))
        cols, rows = sorted(banks[0].shape[-2:])
        self.count = sum(len(p) for p in banks)
        # rounded up: 22 slices over 8 ranks are 3 each and 2 of padding at the end
        share = -(-self.count // world.size)
        upright = sum(len(p) for p in banks if p.size(-2) >= p.size(-1))
        self.upright = min(max(upright - world.rank * share, 0), share)    # of this rank's slices
        self.gain = torch.ones(share, 1, 1, device=device)
        self.gain[:self.upright] = (rows / cols)**0.5
        self.momentum = torch.zeros(share, rows, cols, device=device)

    def collect(self, wire: torch.dtype) -> Callable[[], Tensor]:
        """Starts the reduce-scatter of the gradients as `wire`; once called, what it returns gives
        this rank's slices (share, rows, cols) of their mean."""
        slices = [p.grad if p.size(-2) >= p.size(-1) else p.grad.mT for p in self.banks]
        spare = len(self.momentum) * self.world.size - self.count
        if spare:
            slices.append(slices[0].new_zeros(spare, *self.momentum.shape[1:]))
        rows = torch.cat(slices) if len(slices) > 1 else slices[0]
        ready = self.world.scatter_mean(rows.to(wire) if self.world.size > 1 else rows)
        return lambda: ready().float()

    def direction(self, g: Tensor, momentum: float, dtype: torch.dtype, equal_rows: bool = True,
                  iterations: Sequence = POLAR_EXPRESS) -> Tensor:
        """(share, rows, cols): momentum m <- mu m + g, u = g + mu m, rows of u over their norms
        (MuonEq-R, #1285), then the nearest matrix of singular values 1, times the gain."""
        self.momentum.mul_(momentum).add_(g)
        u = g.add(self.momentum, alpha=momentum)
        if equal_rows:
            # a row is one of the matrix as stored: in a transposed slice it is a column
            for part, dim in ((u[:self.upright], -1), (u[self.upright:], -2)):
                part.div_(part.norm(dim=dim, keepdim=True).add_(1e-7))
        return orthogonalise(u, dtype, iterations) * self.gain.to(dtype)

    def apply(self, rows: Tensor, lr: float, decay: float) -> None:
        """p <- (1 - lr * decay) p - lr * update, with the slices (n, rows, cols) of all ranks."""
        for p, mine in zip(self.banks, rows[:self.count].split([len(p) for p in self.banks])):
            p.mul_(1 - lr * decay).add_(mine if p.size(-2) >= p.size(-1) else mine.mT, alpha=-lr)


class Optimiser:
    """Every parameter's update; gradients are averaged over the ranks here and nowhere else.

    Matrices: reduce-scatter, orthogonalise the own share, all-gather (arXiv 2502.16982) behind the
    next stack's products. The rest: all-reduce, AdamW. Nothing waits for the host."""

    def __init__(self, model: GPT, world: World):
        """Groups the parameters by their role; each that training moves is in exactly one group."""
        self.model, self.world, h, bank = model, world, model.h, model.bank
        table, shapes = roles(h), dict[tuple[int, ...], list[nn.Parameter]]()
        for name, role in table.items():
            if role.optim == "muon":
                shapes.setdefault(tuple(sorted(role.shape[1:])), []).append(bank[name])
        self.stacks = [Stack(banks, world) for banks in shapes.values()]
        groups = [dict(params=[bank[n] for n, r in table.items() if r.optim == kind], lr=rate,
                       peak=rate, weight_decay=decay)
                  for kind, rate, decay in (("embed", h.tied_embed_lr, h.embed_wd),
                                            ("scalar", h.scalar_lr, h.adam_wd))]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, h.beta2), fused=True)
        self.others = [p for group in groups for p in group["params"]]
        self.wire = torch.bfloat16 if world.device.type == "cuda" else torch.float32

    @torch.no_grad()
    def step(self, factor: float, momentum: float) -> None:
        """One update with all rates times `factor`; clears the gradients."""
        h = self.model.h
        # all collectives start in the same order on every rank: otherwise they would deadlock
        begun = [stack.collect(self.wire) for stack in self.stacks]
        if self.world.size > 1:
            flat = self.world.mean(torch.cat([p.grad.flatten() for p in self.others]))
            for p, g in zip(self.others, flat.split([p.numel() for p in self.others])):
                p.grad = g.view_as(p)
        shares = [ready() for ready in begun]
        if h.grad_clip_norm:
            # slices are spread over the ranks; the other gradients are equal on all by now
            squares = self.world.sum(torch.stack([g.square().sum() for g in shares]).sum())
            total = (squares + sum(p.grad.square().sum() for p in self.others)).sqrt()
            clip = (h.grad_clip_norm / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*shares, *(p.grad for p in self.others)], clip)
        iterations = POLAR_EXPRESS if h.polar_express else NEWTON_SCHULZ
        options = (h.muon_row_normalize, iterations[:h.muon_backend_steps])
        updates = [self.world.gathered(stack.direction(g, momentum, self.model.dtype, *options))
                   for stack, g in zip(self.stacks, shares)]
        for group in self.adam.param_groups:
            group["lr"] = factor * group["peak"]
        self.adam.step()
        for stack, ready in zip(self.stacks, updates):
            stack.apply(ready(), factor * h.matrix_lr, h.muon_wd)
        self.model.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """A copy of everything that changes from step to step, of all ranks."""
        return dict(momenta=[self.world.gathered(s.momentum)().clone() for s in self.stacks],
                    adam=copy.deepcopy(self.adam.state_dict()))

    def restore(self, state: dict[str, Any]) -> None:
        """Back to a state taken before, bit for bit."""
        for stack, momenta in zip(self.stacks, state["momenta"]):
            stack.momentum.copy_(momenta.view(-1, *stack.momentum.shape)[self.world.rank])
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))


# Progress is the share of the time for training, or of ITERATIONS where there is no clock, so that
# the rates reach their end with it on fast and slow machines alike.
def warmdown(h: Hyperparameters, step: int, progress: float) -> float:
    """One, then a line towards zero that ends with training, held at MIN_LR from where it crosses
    it: over the last WARMDOWN_FRAC, or the last WARMDOWN_ITERS steps by the mean step so far."""
    left = (1 - progress) / h.warmdown_frac if h.warmdown_frac else 1.0
    if h.warmdown_iters:
        left = (1 - progress) * max(step, 1) / (max(progress, 1e-9) * h.warmdown_iters)
    return max(h.min_lr, min(1.0, left))


def rate_factor(h: Hyperparameters, step: int, progress: float) -> float:
    """Share of the peak rate: linear warm-up by steps, then `warmdown`."""
    rise = min(1.0, (step + 1) / h.lr_warmup_steps) if h.lr_warmup_steps else 1.0
    return rise * warmdown(h, step, progress)


def momentum_at(h: Hyperparameters, step: int) -> float:
    """Muon's momentum, rising linearly over the first steps."""
    done = min(1.0, step / h.muon_momentum_warmup_steps) if h.muon_momentum_warmup_steps else 1.0
    return h.muon_momentum_warmup_start + done * (h.muon_momentum - h.muon_momentum_warmup_start)


class EMA:
    """Exponential moving average of all banks from the initial weights on, of which nothing is left
    after thousands of steps; in fp32, for bf16 would round away 0.35% of a small difference."""

    def __init__(self, model: GPT):
        """Starts as a copy of the weights."""
        self.live = [p.detach() for p in model.bank.values()]
        self.mean = [p.clone() for p in self.live]

    def update(self, decay: float) -> None:
        """mean <- decay * mean + (1 - decay) * weights."""
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    def export(self) -> None:
        """Overwrites the weights with their average."""
        torch._foreach_copy_(self.live, self.mean)


# ==================================================================================================
# 9. Training
# The loop inside the clock, which never waits for the device. What enters is a model at step zero;
# what leaves are its averaged weights and the clock, which runs on through adaptation. Everything
# learned from training data was read inside that clock; a rehearsal before it leaves no trace.
# ==================================================================================================
class Trainer:
    """What a training run changes: model, optimiser, average, loader; and what a step needs."""

    def __init__(self, h: Hyperparameters, world: World, model: GPT, data: Dataset):
        """Everything at step zero."""
        self.h, self.world, self.model, self.ema = h, world, model, EMA(model)
        self.loader, self.optimiser = Loader(h, world, data.train), Optimiser(model, world)
        self.rounded_steps = 0    # that used the matrices as the exporter rounds them

    def step(self, number: int, progress: float, looped: bool) -> Tensor:
        """One optimiser step; returns this rank's mean loss in nats, still on the device."""
        h, loss, count = self.h, 0.0, accumulation(self.h, self.world)
        rounded = warmdown(h, number, progress) < h.late_qat_threshold
        # The rates rise again over 32 steps where the context changes (#2014).
        context = next((T for end, T in h.contexts if progress <= end), h.train_seq_len)
        ramp = min(1.0, (self.loader.cut(context) / count + 1) / 32)
        plan = depth_plan(h, looped, rounded)
        # All micro-batches have one size, so a mean of their means, over the ranks too (by the
        # optimiser), is the mean over all tokens of the step.
        for _ in range(count):
            batch = self.loader.next()
            nats = self.model.run_nats(batch.ids, batch.targets, plan, batch.docs).mean() / count
            nats.backward()
            loss = loss + nats.detach()
        self.optimiser.step(ramp * rate_factor(h, number, progress), momentum_at(h, number))
        self.ema.update(h.ema_decay)
        self.rounded_steps += rounded
        return loss

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state: all that can change a later number. The loader's order is drawn
        again from its seed; training draws no random numbers on a device."""
        loader = self.loader
        return dict(weights=[p.clone() for p in self.ema.live],
                    mean=[p.clone() for p in self.ema.mean], optimiser=self.optimiser.state(),
                    loader=(loader.position, loader.context, loader.since),
                    rounded_steps=self.rounded_steps, random=torch.get_rng_state())

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Back to the snapshot, bit for bit."""
        torch._foreach_copy_([*self.ema.live, *self.ema.mean], [*state["weights"], *state["mean"]])
        self.rounded_steps = state["rounded_steps"]
        self.model.zero_grad(set_to_none=True)
        self.optimiser.restore(state["optimiser"])
        self.loader.rewind(*state["loader"])
        torch.set_rng_state(state["random"])


def accumulation(h: Hyperparameters, world: World) -> int:
    """Micro-batches per rank and step; `Refusal` where the batch holds no whole number of them."""
    share = world.size * h.micro_batch_tokens
    require(h.train_batch_tokens % share == 0, f"TRAIN_BATCH_TOKENS={h.train_batch_tokens} is no "
            f"multiple of {world.size} ranks x MICRO_BATCH_TOKENS={h.micro_batch_tokens}: change "
            "either, or the number of processes")
    return h.train_batch_tokens // share


class Trained(NamedTuple):
    """What the loop did: optimiser steps, seconds of the clock, the step it was resumed at."""

    steps: int
    seconds: float
    resumed: int = 0


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted(filter(Path.is_file, folder.glob("checkpoint*.bin")))


def read_checkpoint(folder: Path) -> list[Any] | None:
    """[step, seconds, ranks, knobs, state] of the newest whole checkpoint, None where there is no
    file; raises `Refusal` where all are damaged."""
    for path in reversed(paths := checkpoints(folder)):
        blob = path.read_bytes()
        if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
            continue
        # The parser meets the tensors in the order of their bytes, so that no place is stored.
        file = io.BytesIO(blob)

        def thaw(found: dict[str, Any]) -> Any:
            """The tensor described, its bytes being the next of the file; else the dict."""
            if "dtype" not in found:    # JSON turned the whole numbers among the keys to text
                return {int(k) if k.isdigit() else k: v for k, v in found.items()}
            dtype, shape = getattr(torch, found["dtype"]), found["shape"]
            raw = file.read(math.prod(shape) * dtype.itemsize)
            return torch.tensor(np.frombuffer(raw, np.uint8)).view(dtype).view(shape)

        with contextlib.suppress(Exception):    # any hash can be made right over any JSON
            step, seconds, *_ = found = json.loads(file.readline(), object_hook=thaw)
            if step >= 0 and seconds >= 0 and len(found) == 5:
                return found
    if paths:
        raise Refusal(f"{path}: damaged, as is every checkpoint there; choose another RUN_ID")


class Checkpoints:
    """The saves of one run: the two newest stay in its folder until it is finished, so that a
    damaged one leaves another. None are made where the training clock is no longer than
    CHECKPOINT_EVERY_S. Else a signal to stop lets the step end, saves it and stops."""

    def __init__(self, t: Trainer, clock: Clock, folder: Path | None):
        """Listens to the signals if it is on."""
        every_s, limit_s = t.h.checkpoint_every_s, t.h.max_wallclock_seconds
        self.t, self.clock, self.folder, self.saved_s = t, clock, folder, 0.0
        self.on = folder and every_s and not 0 < limit_s <= every_s
        self.before = heed(clock.ask) if self.on else {}

    def resume(self, log: Log) -> int:
        """Restores the newest checkpoint on every rank; returns its step, 0 without any."""
        world = self.t.world
        found = self.on and world.share(read_checkpoint(self.folder) if world.main else None)
        if not found:
            return 0
        step, self.saved_s, *_, state = found
        with refusing(f"{self.folder}: a checkpoint of another version of this script; choose "
                      "another RUN_ID", LookupError, TypeError, AttributeError, ValueError,
                      RuntimeError):
            self.t.restore(state)
        # the seconds of the process that was stopped count as if they were this one's
        self.clock.pause(-self.saved_s)
        self.clock.agreed_s = self.saved_s
        log(f"resumed:step {step} train_time:{self.saved_s * 1e3:.0f}ms")
        return step

    def visit(self, step: int, elapsed_s: float) -> None:
        """Saves if it is time to; raises `Refusal` afterwards if a rank was asked to stop."""
        # Every rank comes here with the same time and so enters `save`, in which all take part: a
        # snapshot gathers the momenta. A signal makes that time infinite on all of them at once.
        if self.on and elapsed_s >= self.saved_s + self.t.h.checkpoint_every_s:
            self.save(step)
            if elapsed_s == math.inf:
                self.t.world.leave()    # as all ranks do, some later than others
                raise Refusal(f"stopped by a signal at step {step}; the same command with RUN_ID="
                              f"{self.folder.name} goes on from there")

    def save(self, step: int) -> None:
        """Writes a checkpoint: one line of JSON, the bytes of its tensors, SHA-256."""
        t, parts = self.t, []

        def freeze(tensor: Tensor) -> dict[str, Any]:
            """What JSON shall say of a tensor, whose bytes are put aside."""
            parts.append(tensor.cpu().view(-1).view(torch.uint8).numpy().data)
            return dict(dtype=str(tensor.dtype)[6:], shape=tensor.shape)

        self.saved_s, state = self.clock.read_s(), t.snapshot()
        if t.world.main:
            head = [step, self.saved_s, t.world.size, t.h.changed(), state]
            body = b"".join([json.dumps(head, default=freeze).encode() + b"\n", *parts])
            write_atomically(self.folder / f"checkpoint{step:09}.bin", body,
                             hashlib.sha256(body).digest())
            for old in checkpoints(self.folder)[:-2]:
                old.unlink()

    def close(self, step: int) -> None:
        """Saves the end of training, from which a run that dies while scoring goes on."""
        if self.on:
            self.save(step)
        restore_signals(self.before)


def train(t: Trainer, reserve_s: float, log: Log,
          validate: Callable[[], str]) -> tuple[Trained, Clock]:
    """Trains until MAX_WALLCLOCK_SECONDS less the reserve, or ITERATIONS; the weights are then the
    average. Raises `Refusal` when the loss is not finite."""
    # The clock starts here, after the rehearsal; every read of training data from now on counts.
    h, clock, looped, loss_read = t.h, Clock(t.world), False, math.nan
    saves = Checkpoints(t, clock, log.folder)
    step = resumed = saves.resume(log)
    budget_s = h.max_wallclock_seconds - reserve_s if h.max_wallclock_seconds else math.inf
    require(budget_s > 0, f"MAX_WALLCLOCK_SECONDS={h.max_wallclock_seconds:g} leaves no time to "
            f"train: {reserve_s:.1f} s are kept for adaptation")
    last = h.iterations or sys.maxsize
    ahead, before_s, pace_s = 1 + clock.lag, saves.saved_s, 0.0    # steps under way at the stop
    log.begin("train")
    while True:
        elapsed_s = clock.tick()
        saves.visit(step, elapsed_s)
        # What is under way is added, at the pace of the last steps, and a third more: a late stop
        # breaks the rule, an early one costs a step.
        pace_s += (elapsed_s - before_s - pace_s) / max(1, min(8, step - resumed))
        before_s = elapsed_s
        if step >= last or elapsed_s + 1.3 * ahead * pace_s >= budget_s:
            break
        if step and elapsed_s and log.due():
            left_s = min(budget_s - elapsed_s, (last - step) * elapsed_s / step)
            log.progress(f"train:{step}/{last} loss:{loss_read:.4f} "
                         f"tok/s:{step * h.train_batch_tokens / elapsed_s:.0f} left:{left_s:.0f}s")
        if h.val_loss_every and step % h.val_loss_every == 0:
            # a validation score reads no training data, so it is off the clock
            watch = Clock(t.world)
            log(f"step:{step}/{last} {validate()} train_time:{elapsed_s * 1e3:.0f}ms "
                f"step_avg:{elapsed_s * 1e3 / max(step, 1):.2f}ms")
            clock.pause(watch.read_s())
        progress = min(1.0, elapsed_s / budget_s if math.isfinite(budget_s) else step / last)
        # Until then a step of training runs 11 blocks for 17, so that more steps fit the clock.
        begins = (step >= h.recur_start_step if h.recur_start_step else
                  progress >= h.enable_looping_at)
        if not looped and h.num_loops and begins:
            looped = True
            log(f"recurrence:on step:{step} progress:{progress:.3f}")
        loss = t.step(step, progress, looped)
        step += 1
        # reading the loss waits for the device, and so is rare
        if step % h.train_log_every == 0 or step <= 3:
            loss_read = report_step(t, loss, step, last, clock.read_s(), log)
    seconds = clock.read_s()
    if step > max(3, resumed) and step % h.train_log_every:
        report_step(t, loss, step, last, seconds, log)
    if h.late_qat_threshold:
        log(f"rounded_steps:{t.rounded_steps}")
    saves.close(step)
    t.ema.export()
    return Trained(step, seconds, resumed), clock


def check_finite(h: Hyperparameters, finite: object, told: str) -> None:
    """Raises `Refusal` with the rates where training has left numbers that are none."""
    require(finite, f"{told}: lower MATRIX_LR={h.matrix_lr}, TIED_EMBED_LR={h.tied_embed_lr} or "
            f"SCALAR_LR={h.scalar_lr}, or check the shards")


def report_step(t: Trainer, loss: Tensor, step: int, last: int, seconds: float, log: Log) -> float:
    """Says one training line in the official form; returns its loss, which must be finite."""
    value = float(t.world.mean(loss.clone()))
    check_finite(t.h, math.isfinite(value), f"the loss is {value} at step {step}")
    log(f"step:{step}/{last} train_loss:{value:.4f} train_time:{seconds * 1e3:.0f}ms "
        f"step_avg:{seconds * 1e3 / step:.2f}ms "
        f"tok/s:{step * t.h.train_batch_tokens / max(seconds, 1e-9):.0f}")
    return value


# ==================================================================================================
# 10. Quantisation
# Weights W become codes * steps so that the loss, not the weights, stays close: GPTQ lowers
# trace(D (W - W') H (W - W')^T), all layers of a bank at once, where diagonal D for rows and H for
# columns are what `curvature` finds; what is rounded later makes up for what was rounded before.
# Reads the averaged weights and text that they write; no shard. Gives an artifact that fills
# BUDGET_BYTES.
# ==================================================================================================
SEQUENCES = 1024    # after which more text no longer helps
ABREAST = 16    # micro-batches of text at once: their cache takes about what training on one takes


@torch.no_grad()
def written(model: GPT, world: World, ticks: int = 0) -> Tensor:
    """This rank's rows (N, length) of text that the model writes itself (#1019), one half
    from a document's start on, the other from any token, whatever the number of ranks; a rehearsal
    repeats what so many `ticks` write. Rounding thus reads no text of others, and no clock runs."""
    h, plan, length = model.h, depth_plan(model.h, looped=True), model.h.train_seq_len
    count = min(SEQUENCES, h.gptq_calibration_batches * h.micro_batch_tokens // length)
    dice = torch.rand(-(-count // world.size) * world.size, ticks or length,
                      generator=torch.Generator().manual_seed(h.seed))[world.rank::world.size]
    rows = []    # as many at once as there is room for: hosts queue a tick of few no faster
    for draws in dice.to(world.device).split(ABREAST * h.micro_batch_tokens // length):
        cache = Cache(model, len(draws), 1, plan, length)
        first = (draws[:, :1] * 2 - 1) * h.vocab_size
        text = [torch.where(first < 0, BOS, first.long())]
        for age, draw in enumerate(draws[:, 1:].split(1, 1)):
            cache.open(torch.full_like(text[-1][:, 0], age))
            x = model.hidden(text[-1], plan, cache=cache)
            reached = model.log_probs(x, text[-1], model.bank, cache)[:, 0].exp().cumsum(-1)
            cache.write(text[-1], cache.fresh)
            drawn = torch.searchsorted(reached, draw * reached[:, -1:])
            text.append(drawn.clamp_max(h.vocab_size - 1))
        rows.append(torch.cat(text, 1))
    return torch.cat(rows).repeat(1, -(-length // len(text)))[:, :length].contiguous()


def curvature(model: GPT, world: World,
              text: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What errors of the weights cost, from gradients G of rows of the `text` (N, T), with labels
    that the model draws itself: their squares are then the second derivative (arXiv 2505.22988).
    An error E of a coded bank costs about sum_r d_r E_r H E_r^T. Returns d (L | 1, rows), squares
    of the rows of G, by bank, and H (L | 1, n, n), of trace 1, by tap, fp64: G^T G of all banks of
    the tap, rows scaled alike, so that an input counts by what comes of it (arXiv 2505.07004)."""
    h, plan = model.h, depth_plan(model.h, looped=True)
    taps = {n: role.tap for n, role in roles(h).items() if role.tap}
    rows, inputs = dict.fromkeys(taps, 0.0), dict.fromkeys(taps.values(), 0.0)
    dice = torch.Generator(text.device)
    for number, ids in enumerate(text.split(1) if taps else ()):
        dice.manual_seed(h.seed + world.rank + world.size * number)
        logs = model.log_probs(model.hidden(ids, plan), ids, model.bank)[0]
        # one look for each rank, since the host waits for it
        check_finite(h, number or logs.isfinite().all(), "training broke the weights")
        drawn = logs.detach().exp().multinomial(1, generator=dice)[:, 0]
        loss = F.nll_loss(logs, drawn, reduction="sum")
        for n, G in zip(taps, torch.autograd.grad(loss, [model.bank[n] for n in taps])):
            G = G.view(-1, *G.shape[-2:])
            size = G.square().sum(-1)
            rows[n] += size.double()
            scaled = G / (size + 0.1 * size.mean(-1, keepdim=True) + 1e-30)[..., None]
            inputs[taps[n]] += (G.mT @ scaled / G.size(1)).double()
    for n in rows:    # rows that no text touched have little to lose, not nothing
        d = world.sum(rows[n])
        rows[n] = (d + 1e-3 * d.mean(-1, keepdim=True)).clamp_min(1e-30).float()
    for tap in inputs:
        H = world.sum(inputs[tap])
        inputs[tap] = H / H.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(1e-30)
    return rows, inputs


# Powers to which steps follow the curvature of their row and column (`searched_grid`).
ROW_STEP_POWER = COLUMN_STEP_POWER = 0.5
OCTAVE = 4    # exponents of steps are quarters of an octave: finer ones cost more than they save


def octaves(exponent: Tensor) -> Tensor:
    """2^(exponent / OCTAVE) in fp32, by way of fp64, so that all platforms get the same numbers."""
    return torch.exp2(exponent.double() / OCTAVE).float()


class Grid(NamedTuple):
    """A bank's steps scale * 2^((row + column) / OCTAVE): rows differ in size, columns in use."""

    scale: Tensor    # fp32 (L,)
    row: Tensor    # int8 (L, rows)
    column: Tensor    # int8 (L, cols)

    def rows(self) -> Tensor:
        """The share of rows and layers, (L, rows, 1) fp32."""
        return (self.scale[:, None] * octaves(self.row))[..., None]

    def columns(self) -> Tensor:
        """The share of columns, (L, 1, cols) fp32."""
        return octaves(self.column)[:, None]


class Coded(NamedTuple):
    """A quantised bank: weight = codes * steps."""

    codes: Tensor    # int16 (L, rows, cols)
    grid: Grid

    def decode(self) -> Tensor:
        """The weights, fp32 (L, rows, cols)."""
        return self.codes.float() * self.grid.rows() * self.grid.columns()


Stored = Mapping[str, Coded | Tensor]    # codes with steps or fp16 of each bank, in table order
Factor = tuple[Tensor, Tensor]    # order (L, n) of columns, and upper U (L, n, n) in that order

# Trellis-coded quantisation: the codes of a column walk through a few states that say whether the
# next code is even or odd, so parity costs no bits and steps can be finer at equal bits.
TRELLIS_TAPS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4)}


def trellis_next(states: int) -> np.ndarray:
    """The state that follows each state when bit 1 of the code is 0 or 1, (states, 2); a state's
    lowest bit is the parity of its code. A shift register with Ungerboeck's polynomials in octal
    (IEEE Trans. IT-28, 1982)."""
    parity, upper = TRELLIS_TAPS[states]
    state, bit = np.arange(states)[:, None], np.arange(2)
    return state >> 1 ^ (state & 1) * (parity >> 1) ^ bit * (upper >> 1)


def walk_back(last: Tensor, came: Sequence[Tensor]) -> Tensor:
    """States (steps + 1, M) on the way to `last` (M,); `came` (steps, states, M) leads back."""
    path = [last[None]]
    for before in reversed(came):
        path.append(before.gather(0, path[-1]))
    return torch.cat(path[::-1])


def search_runs(error: Tensor, before: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Viterbi's search of all runs at once: states (run, M) before each step, and bits (run, M).
    `error` (run, 2 * states, M) is the cost of each branch, bit 0 first; M = N * runs = `shape`.
    Runs walk side by side, each searched from every state, so that joining is exact."""
    (run, _, many), states = error.shape, before.shape[1]
    # (state reached, state begun in, M): before the first step a path is where it began
    cost = torch.full((states, states, many), 1e30, device=error.device)
    cost.diagonal().zero_()
    bits = torch.empty(run, *cost.shape, dtype=torch.bool, device=error.device)
    both, source = cost.new_empty(2 * states, states, many), before.ravel()
    # two branches lead into each state and the cheaper one survives, of equal ones that of bit 0
    for branch, bit in zip(error[:, :, None].unbind(), bits.unbind()):
        torch.index_select(cost, 0, source, out=both).add_(branch)
        torch.lt(both[states:], both[:states], out=bit)
        torch.minimum(both[states:], both[:states], out=cost)
    # A run's cost (last, first) is a matrix, and a chain of runs from state 0 the product of these
    # with (min, +) in the place of (+, x). The cheapest chain decides whose bits count.
    first_run, *runs = cost.unflatten(2, shape).unbind(3)
    best, chosen = first_run[:, 0], []
    for following in runs:
        best, meeting = (best + following).min(1)    # over the state in which two runs meet
        chosen.append(meeting)
    last = walk_back(best.argmin(0), chosen).T                              # (N, runs)
    first = F.pad(last[:, :-1], (1, 0)).reshape(1, 1, 1, many).expand(run, states, 1, many)
    bits = bits.gather(2, first)[:, :, 0]                                   # (run, states, M)
    came = torch.where(bits, before[1, :, None], before[0, :, None])
    path = walk_back(last.reshape(many), came.unbind())                     # (run + 1, M)
    return path[:-1], bits.gather(1, path[1:, None])[:, 0]


@torch.no_grad()
def trellis_codes(x: Tensor, states: int, weight: Tensor | None = None, run: int = 64,
                  fused: bool = False) -> Tensor:
    """Codes (N, R) int16 of least squared error from targets (N, R), in lattice steps; `weight`
    (R,) or (N, R) multiplies the squares, the length `run` of runs changes only the time.
    A row is a path from state 0: parity p allows the codes 2k + p, at the bits of a lattice twice
    as coarse but 1.1 dB closer (8 states; Marcellin and Fischer, IEEE Trans. Comm. 38, 1990)."""
    rows, length = x.shape
    # codes are int16, and that of a given residue may lie 2 beyond its target
    x = x.float().clamp(-32_760, 32_760)
    weight = (x.new_ones(()) if weight is None else weight.float()).expand_as(x)
    if fused and (x.is_cuda or INTERPRETED):
        x, (parity, upper) = x.contiguous(), TRELLIS_TAPS[states]
        codes, taken = (torch.empty_like(x, dtype=dtype) for dtype in (torch.int16, torch.int64))
        trellis_kernel[(rows, )](x, weight.contiguous(), codes, taken, length, states, parity >> 1,
                                 upper >> 1, num_warps=1)
        return codes
    runs = -(-length // run)
    # rows (N, R) as runs (run, N * runs), padded with zeros
    cut = lambda values: F.pad(values, (0, runs * run - length)).reshape(-1, run).T.contiguous()
    targets, weights = cut(x), cut(weight)
    # A branch fixes a code modulo 4 and nothing more, so four errors per target suffice, each to
    # the nearest code of one residue, in units of 4 steps.
    part = (targets[:, None] - torch.arange(4, device=x.device)[:, None]) * 0.25
    error = (part - (part + 0.5).floor()).square_() * weights[:, None]      # (run, 4, M)
    before = torch.as_tensor(trellis_next(states).argsort(0).T, device=x.device)    # (2, states)
    residue = torch.cat([before[0] & 1, (before[1] & 1) + 2])               # of a branch's codes
    state, bit = search_runs(error.index_select(1, residue), before, (rows, runs))
    low = (state & 1) + 2 * bit
    codes = low + 4 * ((targets - low) * 0.25 + 0.5).floor()
    return codes.T.reshape(rows, -1)[:, :length].to(torch.int16)


def best_percentile(w: Tensor, top: int) -> Tensor:
    """(L, rows, cols) -> (L, rows): the interpolated percentile of the sizes in a row at which
    clipping codes to `top` leaves the least squared error (#414)."""
    place = torch.tensor([0.999, 0.9995, 0.9999, 0.99999, 1], device=w.device) * (w.size(-1) - 1)
    sizes = w.abs().sort(-1).values
    reach = sizes[..., place.long()].lerp(sizes[..., place.ceil().long()], place.frac())
    step = (reach / top).clamp(2.0**-20)[..., None]    # (L, rows, 5, 1)
    error = w[..., None, :] - (w[..., None, :] / step).round().clamp(-top, top) * step
    return reach.gather(-1, error.square().sum(-1).argmin(-1, keepdim=True))[..., 0]


def uniform_grid(w: Tensor, bits: int, sigmas: float, power: float = 1.0,
                 search: bool = False) -> Grid:
    """Steps by which the largest code stands at `sigmas` standard deviations of a row (0: at its
    largest value; with `search` at `best_percentile`), the rows' differences to their `power`."""
    top = 2**(bits - 1) - 1
    # half a unit of the exponent more, lest rounding it down clips the largest value
    reach = (best_percentile(w, top) if search else
             sigmas * w.std(-1) if sigmas else w.abs().amax(-1) * 2**(0.5 / OCTAVE))
    reach = reach.clamp_min(2.0**-20)    # rows of zeros have a step too
    typical = reach.square().mean(-1).sqrt()
    row = power * OCTAVE * (reach / typical[:, None]).log2()
    return Grid(typical / top, row.round().clamp(-128, 127).to(torch.int8),
                torch.zeros_like(w[:, 0], dtype=torch.int8))


def round_rows(w: Tensor, bits: int, sigmas: float, search: bool = False) -> Coded:
    """Each weight (L, rows, cols) at its nearest code, for banks that no tap feeds and for what
    training sees of a matrix under LATE_QAT_THRESHOLD."""
    grid, top = uniform_grid(w, bits, sigmas, search=search), 2**(bits - 1) - 1
    return Coded((w / grid.rows()).round().clamp(-top, top).to(torch.int16), grid)


def inverse_factor(moment: Tensor, damping: float) -> Factor:
    """(L, n, n) -> order (L, n) of columns, most used input first, and upper U with U^T U = inverse
    moment in that order; raises `Refusal` where that is not finite. Row j of U over U_jj says how
    later columns make up for an error in column j: the first has all others for it."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    H = moment.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
    mean = diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    for attempt in range(6):    # an input that never fires leaves zeros: damped tenfold more
        extra = (damping * 10**attempt * mean).expand_as(diagonal)
        factor, failed = torch.linalg.cholesky_ex(H + torch.diag_embed(extra))
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed.any():
                return order, upper.float()
    raise Refusal(f"GPTQ_DAMPING={damping}: the moment of a tap is not positive definite at "
                  f"{damping * 1e5:g}; the gradients hold NaN or infinity")


def gptq(w: Tensor, factor: Factor, grid: Grid, top: int = 32_760, states: int = 0,
         block: int = 128, weight: Tensor | None = None, fused: bool = False) -> Coded:
    """Rounds a bank (L, rows, cols) column by column to codes of at most `top`, or on a trellis of
    so many states, where errors of a row count by its `weight` (L, rows), pushing each error onto
    the columns not yet rounded (arXiv 2210.17323).
    With e_j = (w_j - steps_j codes_j) / U_jj each later column k becomes w_k - e_j U_jk, beyond a
    block by one product, and the error of the outputs grows by |e_j|^2."""
    order, upper = factor
    # from here to the last line columns stand in the factor's order, not in the bank's
    wide, high = grid.columns()[:, 0].gather(1, order), grid.rows()[..., 0]
    costs = high.square() * (1.0 if weight is None else weight / weight.mean(-1, keepdim=True))
    columns = order[:, None, :].expand_as(w)
    work, codes = w.gather(2, columns), torch.empty_like(w)
    for lo in range(0, w.size(2), block):
        hi = min(lo + block, w.size(2))
        errors = torch.empty_like(work[:, :, lo:hi])
        for j in range(lo, hi):
            scale = high * wide[:, j, None]
            x = work[:, :, j] / scale
            # a trellis, whose path is a whole column, has no largest code: the coder escapes it
            q = (trellis_codes(x, states, costs, fused=fused).float() if states else
                 x.round().clamp_(-top, top))
            error = (work[:, :, j] - q * scale) / upper[:, j, j, None]
            codes[:, :, j], errors[:, :, j - lo] = q, error
            work[:, :, j + 1:hi] -= error[..., None] * upper[:, None, j, j + 1:hi]
        work[:, :, hi:] -= errors @ upper[:, lo:hi, hi:]
    return Coded(torch.empty_like(codes).scatter_(2, columns, codes).to(torch.int16), grid)


def bank_of(model: GPT, name: str) -> Tensor:
    """A coded bank as (L | 1, rows, cols), sharing its memory."""
    w = model.bank[name].detach()
    return w.view(-1, *w.shape[-2:])


class Curvature(NamedTuple):
    """What `curvature` found, ready for use."""

    rows: dict[str, Tensor]    # d (L | 1, rows) by bank
    factors: dict[str, Factor]    # of H, by tap
    text: Tensor | None = None    # where it found it, this rank's rows


def calibrate(model: GPT, world: World, text: Tensor | None = None) -> Curvature:
    """The curvature of the model as it is, on this rank's rows of `text`, else on its own."""
    with model.eager():
        text = written(model, world) if text is None else text
        rows, moments = curvature(model, world, text)
    factors = {tap: inverse_factor(H, model.h.gptq_damping) for tap, H in moments.items()}
    return Curvature(rows, factors, text)


def searched_grid(model: GPT, name: str, found: Curvature) -> Grid:
    """The steps of a bank before the search stretches them. An error in row r counts d_r, one in
    column j 1 / U_jj^2 (arXiv 2603.04956): steps ~ U_jj / sqrt(d_r), powers of 1, would give all of
    them one share of the damage, but codes of many sizes cost the coder more."""
    h, role, uniform = model.h, roles(model.h)[name], model.h.step_search == "uniform"
    grid = uniform_grid(bank_of(model, name), role.bits, role.sigmas, float(uniform),
                        h.clip_search and role.optim == "muon")
    if uniform:
        return grid
    order, upper = found.factors[role.tap]
    # zero on average, exponents leave the bits of a bank as they were
    exponent = lambda size, power: ((e := power * OCTAVE * size.log2()) - e.mean(
        -1, keepdim=True)).round().clamp(-128, 127).to(torch.int8)
    column = exponent(upper.diagonal(dim1=1, dim2=2), COLUMN_STEP_POWER)
    return grid._replace(row=exponent(found.rows[name], -0.5 * ROW_STEP_POWER),
                         column=torch.empty_like(column).scatter_(1, order, column))


@torch.no_grad()
def round_bank(model: GPT, name: str, found: Curvature, stretch: Tensor | float = 0.0) -> Coded:
    """A bank that a tap feeds; steps are 2^stretch (L,) times those of `searched_grid`."""
    h, role, grid = model.h, roles(model.h)[name], searched_grid(model, name, found)
    # On a trellis half the step costs the same bits, because parity is free. Searched steps clip
    # nothing: what is large is escaped by the coder (`fold`).
    scale = grid.scale * 2.0**stretch / (2 if h.trellis_states else 1)
    top = 2**(role.bits - 1) - 1 if h.step_search == "uniform" else 32_760
    return gptq(bank_of(model, name), found.factors[role.tap], grid._replace(scale=scale), top,
                h.trellis_states, weight=found.rows[name], fused=h.fused_kernels)


@torch.no_grad()
def quantise(model: GPT, found: Curvature, stretch: Mapping[str, Tensor] = {},
             done: Mapping[str, Coded] = {}) -> Stored:
    """Every bank as it will be stored, those that are `done` as they are."""
    h, stored = model.h, dict(done)
    for name, role in roles(h).items():
        if role.bits == 16:
            stored[name] = model.bank[name].detach().half()
        elif not role.tap:
            stored[name] = round_rows(bank_of(model, name), role.bits, role.sigmas,
                                      h.clip_search and role.optim == "muon")
        elif name not in done:
            stored[name] = round_bank(model, name, found, stretch.get(name, 0.0))
    return {name: stored[name] for name in roles(h)}


@torch.no_grad()
def load_stored(model: GPT, stored: Stored) -> None:
    """Overwrites the model's weights with what the artifact holds."""
    for name, value in stored.items():
        w = value.decode() if isinstance(value, Coded) else value.float()
        model.bank[name].copy_(w.view(model.bank[name].shape))


# Rate control. Steps of f times the uniform ones cost about a f^2 nats and save n log2 f bits, so
# given bytes cost least at f ~ sqrt(n / a), where the slopes of both to log f are in one ratio in
# all role-layers. `damage_of` reckons a, `fit_budget` searches the factor that all f share.
FINEST, COARSEST = -1.0, 4.0    # octaves, on average, by which steps may leave the uniform ones
ROOM_USED = 0.9996    # of BUDGET_BYTES is aimed at; to 0.9992 and 1 a search is done


@torch.no_grad()
def damage_of(model: GPT, found: Curvature, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    """What rounding each role-layer by these steps costs, (L,), up to one factor for all: errors
    spread evenly over a step, and in column j GPTQ leaves 1 / U_jj of them."""
    damage = {}
    for name, grid in grids.items():
        order, upper = found.factors[roles(model.h)[name].tap]
        left = grid.columns()[:, 0].gather(1, order) / upper.diagonal(dim1=1, dim2=2)
        rows = found.rows[name] * grid.rows()[..., 0].square()
        damage[name] = (rows.sum(-1) * left.square().sum(-1)).cpu()
    return damage


def ideal_stretch(h: Hyperparameters, damage: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Octaves (L,) between the least costly steps and the uniform ones: log2 sqrt(n / a), less its
    mean over all weights; within 3, lest a damage of next to nothing asks for endless steps."""
    weights = {n: math.prod(roles(h)[n].shape[-2:]) for n in damage}
    found = {n: 0.5 * (weights[n] / d.clamp_min(1e-30)).log2() for n, d in damage.items()}
    mean = (sum(weights[n] * o.sum() for n, o in found.items()) /
            sum(weights[n] * len(o) for n, o in found.items()))
    return {n: (o - mean).clamp(-3, 3) for n, o in found.items()}


def gaussian_bits(size: Tensor) -> Tensor:
    """Expected bits of a code, (..., cols) -> (...), with Gaussian columns of mean square `size` in
    steps: 1/2 log2(2 pi e (size + 1/12)), where 1/12 is the variance that rounding adds."""
    return 0.5 * (2 * math.pi * math.e * (size + 1 / 12)).log2().mean(-1)


class Fitted(NamedTuple):
    """What `fit_budget` found."""

    blob: bytes
    ledger: dict[str, int]    # bytes by part
    stretch: Mapping[str, Tensor]    # octaves (L,) by bank


def fit_budget(model: GPT, found: Curvature, code: int, log: Log,
               done: Mapping[str, Coded] = {}) -> Fitted:
    """The artifact that fills BUDGET_BYTES together with `code` bytes; the smallest possible one
    where none fits, that of uniform steps without a search. The shift in octaves is searched that
    all steps share, of banks that are not yet `done`: each pass bisects an estimate that costs
    nothing, then rounds and codes all banks there, which narrows the bracket around the budget and
    corrects the estimate."""
    h = model.h
    if h.step_search == "uniform" or not tapped(h):
        return Fitted(*pack(h, quantise(model, found)), {})
    grids = {n: searched_grid(model, n, found) for n in tapped(h) if n not in done}
    base = ideal_stretch(h, damage_of(model, found, grids))
    # (L, cols) mean square of each column in steps
    sizes = {n: (bank_of(model, n) / grid.rows() / grid.columns()).square().mean(1).cpu()
             for n, grid in grids.items()}
    weights = {n: math.prod(roles(h)[n].shape[-2:]) / 8 for n in base}
    room, ratio, fixed, tried = h.budget_bytes - code, 1.0, 0, {}
    slack, low, high = (1 - ROOM_USED) * h.budget_bytes, FINEST, COARSEST
    # bytes of the codes when all steps are 2^shift times those of `base`
    expected = lambda shift: sum(
        weights[n] * float(gaussian_bits(sizes[n] * 4.0**-(o[:, None] + shift)).sum())
        for n, o in base.items())
    fits = lambda shift: ratio * expected(shift) + fixed <= room - slack
    # `low` is too fine and `high` fits once tried, so only steps between them are left.
    while high > low + 1e-3 * (high in tried):
        if len(tried) > 3:    # the estimate misleads: are the coarsest steps enough? then halve
            shift = (low + high) / 2 if high in tried else high
        else:    # the finest of 2^24 shifts that is expected to fit
            width = (high - low) / 2**24
            shift = low + width * bisect.bisect_left(range(2**24), True, 1,
                                                    key=lambda i: fits(low + width * i))
        stretch = {n: (o + shift).to(model.bank[n].device) for n, o in base.items()}
        blob, ledger = pack(h, quantise(model, found, stretch, done))
        tried[shift] = Fitted(blob, ledger, stretch)
        if 0 <= room - len(blob) <= 2 * slack:
            break
        low, high = (low, shift) if len(blob) <= room else (shift, high)
        # for the next estimate: bytes that steps hardly change, and the coder's ratio to a Gaussian
        still = "steps", "fp16", "header", *done, *(done and ("chain", "gates"))
        fixed = sum(ledger.get(part, 0) for part in still)
        ratio = (len(blob) - fixed) / expected(shift)
    free = {shift: room - len(fitted.blob) for shift, fitted in tried.items()}
    # least room left among those that fit; where none does, least over
    best = min(free, key=lambda shift: (free[shift] < 0, abs(free[shift])))
    log(f"steps:x{2**best:.3f} of uniform on average, {free[best]} bytes free after {len(tried)} "
        "passes" + " (the finest steps)" * (best - FINEST < 1e-5))
    return tried[best]


DISTIL_ROWS = 16    # of text for each step
# Rates of Adam at first, in mean sizes of banks; of coded ones in their steps, ~ 2^-bits of those.
DISTIL_RATE, PLAIN_RATE = 0.113, 0.001


def divergence(model: GPT, ids: Tensor, x: Tensor, truth: Tensor,
               bank: Mapping[str, Tensor]) -> Tensor:
    """KL divergence in nats per token of the model's predictions from states x (B, T, D) of tokens
    `ids` from those of states `truth` with the head's weights in `bank`."""
    q, p = (model.log_probs(*what) for what in ((x, ids, model.bank), (truth, ids, bank)))
    return F.kl_div(q, p, reduction="sum", log_target=True) / truth[..., 0].numel()


class Distillation:
    """Brings predictions back to those of the model as it was, on the text that it wrote."""

    def __init__(self, model: GPT, found: Curvature, world: World, bits: float):
        """Keeps what the model says now; it will be rounded to so many bits per weight."""
        self.rate = DISTIL_RATE * 2**-bits
        self.model, self.world, self.plan = model, world, depth_plan(model.h, looped=True)
        self.before = {n: w.detach().clone() for n, w in model.bank.items()}
        share = max(1, DISTIL_ROWS // world.size)
        with model.eager():    # with gradients, like `run`: one graph serves both
            pairs = [(x, model.hidden(x, self.plan).detach()) for x in found.text.split(share)]
        self.turns = itertools.cycle(pairs)

    def run(self, fixed: Sequence[str], steps: int) -> float:
        """Moves all banks but those that are `fixed` by so many steps of Adam, at rates that fall
        to zero; returns the mean divergence on the way, in nats per token."""
        names, mean = [n for n in self.model.bank if n not in fixed], 0.0
        free, table = [self.model.bank[n] for n in names], roles(self.model.h)
        rates = [PLAIN_RATE * max(0.05, size) if table[n].bits == 16 else self.rate * size
                 for n, size in zip(names, (float(w.detach().abs().mean()) for w in free))]
        adam = torch.optim.Adam([dict(params=[w]) for w in free], betas=(0.9, 0.98), eps=1e-12)
        for number, (ids, truth) in enumerate(itertools.islice(self.turns, steps)):
            with self.model.eager():
                x = self.model.hidden(ids, self.plan)
            loss = divergence(self.model, ids, x, truth, self.before)
            grads = torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True)
            for w, grad, group, rate in zip(free, grads, adam.param_groups, rates):
                w.grad, group["lr"] = self.world.mean(grad), rate * (1 - number / steps)
            adam.step()
            mean += loss.detach() / steps
        adam.zero_grad()
        return float(self.world.mean(mean))


def in_turn(h: Hyperparameters) -> list[str]:
    """Names of the banks that are rounded one after the other, if they are."""
    return tapped(h) if h.rounding_steps and h.step_search != "uniform" else []


def round_in_turn(model: GPT, found: Curvature, code: int, world: World, log: Log) -> Fitted:
    """The artifact that fills BUDGET_BYTES beside `code` bytes, on rank 0. With ROUNDING_STEPS
    banks are rounded one after the other, by the steps that a first search finds, and after each
    those that are left make up for its errors (arXiv 2402.04396); the last one takes the bytes that
    are left. Rank 0 rounds, all ranks learn."""
    h, names, done = model.h, in_turn(model.h), {}
    fitted = fit_budget(model, found, code, log) if world.main else Fitted(b"", {}, {})
    size = len(fitted.blob)
    size, fits = world.share((size, size + code <= h.budget_bytes))    # rank 0 alone has the code
    if not (fits and names):
        return fitted
    bits = 8 * size / sum(w.numel() for w in model.bank.values())
    teacher = Distillation(model, found, world, bits)
    for number, name in enumerate(names[:-1], 1):
        bank = model.bank[name].data
        if world.main:
            done[name] = round_bank(model, name, found, fitted.stretch[name])
            bank.copy_(done[name].decode().view_as(bank))
        world.share_tensors([bank])
        lost = teacher.run(names[:number], h.rounding_steps)
        log(f"round:{name} {number}/{len(names)}, divergence {lost:.5f} nats per token")
    if world.main:
        last = fit_budget(model, found, code, log, done)
        fitted = last if len(last.blob) + code <= h.budget_bytes else fitted
    return fitted


# ==================================================================================================
# 11. Artifact
# magic | header length | header (knobs, lengths of streams) | streams in the role table's order |
# checksum. Nothing is lost, nothing is pickled: reading a hostile file can only fail. First general
# compressors, then the coder of the codes, the file around both, and the packing of the script.
# ==================================================================================================
MAGIC, CHECKSUM_BYTES, HEADER_LIMIT = b"PGOLF\x03", 16, 1 << 16
LZMA_PRESET = 9 | lzma.PRESET_EXTREME
PACKED = b"# coding:latin-1 (packed: the minified script, compressed; the last lines run it)\n"
# Always in the header, defaults or not: without them the streams have no shapes, and scoring with
# others would be another model (`evaluate` refuses that).
MODEL_KNOBS = (
    "vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult leaky_slope rope_dims "
    "rope_base qk_gain_init ln_scale xsa_last_n head_gate_scale smear_gate num_loops loop_start "
    "loop_end parallel_start_layer logit_softcap pointer matrix_bits embed_bits trellis_states "
    "bigram_vocab_size ve_dim skip_gates parallel_form asym_logit_rescale gptq_roles").split()


def coders() -> dict[str, tuple[Callable, Callable]]:
    """COMPRESSOR name -> (encode(raw, quick), decode(coded, limit)) of the general ones installed;
    at most `limit` bytes come out, lest a hostile stream fills the memory."""
    found = dict(
        lzma=(lambda raw, quick: lzma.compress(raw, lzma.FORMAT_ALONE, preset=LZMA_PRESET),
              lambda coded, limit: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=1 << 27)
              .decompress(coded, limit)),
        zlib=(lambda raw, quick: zlib.compress(raw, 9), inflate))
    if zstandard:
        found["zstd"] = (
            lambda raw, quick: zstandard.ZstdCompressor(3 if quick else 22).compress(raw),
            lambda coded, limit: zstandard.ZstdDecompressor().stream_reader(coded).read(limit))
    if brotli:
        found["brotli"] = (
            lambda raw, quick: brotli.compress(raw, quality=3 if quick else 11, lgwin=24),
            lambda coded, limit: brotli.Decompressor().process(coded, output_buffer_limit=limit))
    return found


def expand(coded: bytes, size: int, name: str) -> bytes:
    """The `size` bytes that the coder of this name made `coded` of; else raises `Refusal`."""
    known = coders()
    require(name in known, f"artifact: it needs the coder {name}, and the package for it is not "
            f"installed (here: {', '.join(known)})")
    # each library has its own error types; all mean a damaged stream
    with refusing(f"artifact: a {name} stream is damaged", Exception):
        raw = known[name][1](coded, size + 1)    # one byte more shows a stream that is too long
    require(len(raw) == size,
            f"artifact: a {name} stream holds {len(raw)} bytes, {size} were expected")
    return raw


def shuffled(numbers: np.ndarray) -> bytes:
    """16-bit numbers as all low bytes, then all high bytes: those compress better apart."""
    return numbers.ravel().view(np.uint8).reshape(-1, 2).T.tobytes()


def unshuffled(raw: bytes, dtype: type) -> np.ndarray:
    """The inverse of `shuffled`, flat."""
    return np.frombuffer(raw, np.uint8).reshape(2, -1).T.flatten().view(dtype)


# A code is Gaussian given the scale of its column, and no other context was worth 0.02%. So each
# code is drawn from a static table chosen by the sizes its column has shown so far: the scale is
# learned backwards and costs no side information. Decoding uses integers alone, so that every
# platform reads the same numbers; floats choose only what the stream then states.
# The coder is rANS (arXiv 1311.2540, 1402.3392): a state x is a whole number. A symbol with `f` of
# the 2^15 slots, from `start` on, turns x into x // f * 2^15 + start + x % f, which adds
# 15 - log2 f bits, its ideal cost; the decoder undoes it with f * (x // 2^15) + x % 2^15 - start.
# What outgrows 32 bits leaves in words of 16. A state reads back in the reverse order of writing,
# hence the backward loops of the encoder. One state per column makes a row a few numpy operations.
RANS_LANES = 512        # lanes, one per column of a strip, 4 bytes each for all tensors together
RANS_BITS = 15          # probabilities are multiples of 2^-15
RANS_FLOOR = 1 << 16    # a lane's 32-bit state stays at or above this by taking in 16-bit words
FIRST_ESCAPE, LARGEST_SYMBOL = 124, 127     # a larger |code| goes as 124..127 and an excess
SCALE_ONE = 1024        # a mean |symbol| of 1 in integer arithmetic
# The numbers that one byte of a table can name: 0 to 7, then 8 an octave.
RUNGS = np.concatenate([np.arange(8), *(np.arange(8, 16) << octave for octave in range(24))])


class ColumnModel(NamedTuple):
    """What the decoder is told of one tensor: how scales are learned, and a table per scale."""

    mean: int    # of |symbol| in the tensor, in units of 1 / SCALE_ONE like all scales
    trust: int    # the prior of a column counts as 2^trust rows
    mix: int    # quarters of the prior that come from the same column of the layer before
    lowest: int    # rung of the scale that the first table is for
    tables: np.ndarray    # uint8 (K, top + 1): the rung of the weight of each |symbol|

    def pack(self) -> bytes:
        """Bytes that zlib shrinks well: the numbers, then each table's difference to the last."""
        steps = np.diff(self.tables, axis=0, prepend=np.uint8(0))
        return struct.pack("<IBBBBB", *self[:4], *self.tables.shape) + steps.tobytes()


def rung(value: np.ndarray) -> np.ndarray:
    """Index of the largest of RUNGS that is not above `value`."""
    return np.searchsorted(RUNGS, value, "right") - 1


def refreshes(rows: int) -> np.ndarray:
    """Rows at which scales are looked at anew: each of the first 16, then every 1/8 further on,
    where one row hardly moves a mean but each look costs time."""
    starts = [0]
    while (row := starts[-1] + max(1, starts[-1] >> 3)) < rows:
        starts.append(row)
    return np.array(starts)


def running_scale(total: np.ndarray, row, previous: np.ndarray, mean: int, trust: int,
                  mix: int) -> np.ndarray:
    """Scale of columns whose first `row` symbols add up to `total` in size: the mean of these and
    of 2^trust imagined rows of the size that `previous`, the layer before, and `mean` suggest."""
    prior = (mix * previous + (4 - mix) * mean) >> 2
    return (total * SCALE_ONE + (prior << trust)) // (row + (1 << trust))


def column_scales(sizes: np.ndarray, *prior: int) -> np.ndarray:
    """Scales (L, refreshes, C) that the decoder will know of |symbols| (L, R, C); `prior` are the
    mean, trust and mix of a `ColumnModel`."""
    starts = refreshes(sizes.shape[1])
    sums = np.add.reduceat(sizes, starts, axis=1, dtype=np.int64)
    after = sums.cumsum(1)
    reached = after[:, -1:] * SCALE_ONE // sizes.shape[1]
    previous = np.concatenate([np.full_like(reached[:1], prior[0]), reached[:-1]])
    return running_scale(after - sums, starts[:, None], previous, *prior)


def learning_rate(sizes: np.ndarray, mean: int) -> tuple[int, int]:
    """The (trust, mix) with which scales s predict |symbols| (L, R, C) of at most 48 columns best:
    log s + |q| / s, the nats of an exponential of mean s. A worse choice is longer, never wrong."""
    layers, rows, columns = sizes.shape
    sample, starts = sizes[:, :, ::-(-columns // 48)], refreshes(rows)
    sums = np.add.reduceat(sample, starts, axis=1, dtype=np.float32) * SCALE_ONE
    lengths = np.diff(starts, append=rows)[:, None]
    cost = lambda scale: float((lengths * np.log(scale) + sums / scale).sum())
    nats = lambda *rate: cost(column_scales(sample, mean, *rate).astype(np.float32) + 1)
    trust = min(range(8), key=lambda t: nats(t, 2 if layers > 1 else 0))
    mix = min(range(5), key=lambda m: nats(trust, m)) if layers > 1 else 0
    return min(range(8), key=lambda t: nats(t, mix)), mix


def fit_columns(symbols: np.ndarray) -> tuple[ColumnModel, np.ndarray]:
    """The model of symbols (L, R, C) and their tables (L, R, C) uint8: each is the distribution of
    the sizes that the decoder will draw from it, rounded to RUNGS."""
    sizes, rows = np.abs(symbols).astype(np.uint8), symbols.shape[1]
    mean = int(sizes.sum(dtype=np.int64)) * SCALE_ONE // sizes.size
    trust, mix = learning_rate(sizes, mean)
    used = rung(column_scales(sizes, mean, trust, mix))
    # A table used by less than a thousandth costs more than it earns: its neighbour serves.
    share = np.bincount(used.ravel()).cumsum() / used.size
    lowest, highest = (int(np.searchsorted(share, edge)) for edge in (0.0005, 0.9995))
    used = (used.clip(lowest, highest) - lowest).astype(np.uint8)
    used, width = used.repeat(np.diff(refreshes(rows), append=rows), 1), int(sizes.max()) + 1
    cell = used.astype(np.int32) * width + sizes
    counts = np.bincount(cell.ravel(), minlength=(highest - lowest + 1) * width).reshape(-1, width)
    weights = counts * (2 << RANS_BITS) // counts.max(1, keepdims=True).clip(1)
    weights[:, 1:] //= 2                        # a size counts for both signs
    # a size that occurs keeps a weight, however rare it is: at zero it could not be coded
    tables = rung(np.maximum(weights, counts > 0)).astype(np.uint8)
    return ColumnModel(mean, trust, mix, lowest, tables), used


def frequencies(tables: np.ndarray, states: int) -> np.ndarray:
    """Frequencies (K, P, 2 top + 1), adding up to 2^RANS_BITS, of the symbols -top..top; with a
    trellis P = 2, and table p holds only symbols of parity p."""
    top = tables.shape[1] - 1
    symbol = np.arange(-top, top + 1)
    parity = np.array([[0], [1]]) if states else symbol & 1
    weight = RUNGS[tables[:, np.abs(symbol)]][:, None] * (symbol & 1 == parity)
    weight[~weight.any(2), top] = 1             # a table that nothing uses must still be one
    spare = (1 << RANS_BITS) - np.count_nonzero(weight, axis=2)[..., None]
    share = (weight > 0) + weight * spare // weight.sum(2, keepdims=True)
    most = symbol + top == share.argmax(2)[..., None]
    return share + most * ((1 << RANS_BITS) - share.sum(2, keepdims=True))


def fold(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols equal to int16 codes modulo 4, so that a decoder can follow the trellis without them,
    and the uint16 excess of each large one: tables stay narrow, and no weight is clipped."""
    size = np.abs(codes.astype(np.int32))
    symbols, large = codes.copy(), size >= FIRST_ESCAPE
    beyond = size[large] - FIRST_ESCAPE
    symbols[large] = (FIRST_ESCAPE + (beyond & 3)) * np.sign(codes[large])
    return symbols, (beyond >> 2).astype("<u2")


def unfold(symbols: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Undo `fold` in place; returns the excesses left over, raises `Refusal` if too few came."""
    large = np.abs(symbols) >= FIRST_ESCAPE
    used, excess = np.split(excess, [np.count_nonzero(large)])
    require(len(used) == np.count_nonzero(large), "coded weights: an escaped code has no excess")
    symbols[large] += (4 * used.astype(np.int32) * np.sign(symbols[large])).astype(np.int16)
    return excess


def check_trellis(codes: np.ndarray, states: int) -> None:
    """Raise ValueError unless parities of codes (L, R, C) follow the trellis down each column: the
    decoder takes a table by the state, and would read them as other codes."""
    follow, state = trellis_next(states).astype(np.uint8), np.zeros_like(codes[:, 0], np.uint8)
    for row in range(codes.shape[1]):
        if ((codes[:, row] ^ state) & 1).any():
            raise ValueError(f"codes {codes.shape} leave the trellis of {states} states, row {row}")
        state = follow[state, codes[:, row] >> 1 & 1]


def encode_codes(tensors: list[np.ndarray], states: int = 0) -> tuple[bytes, list[int]]:
    """Codes int16 tensors (L, R, C), on a trellis of so many states (0: none), as two uint32
    lengths, zlib of the models and of the excesses, the lanes' final states in uint32, the words
    in uint16, and how many bytes of words each tensor took; raises ValueError for codes that leave
    the trellis."""
    folded = [fold(codes) for codes in tensors if codes.size]
    width = min(RANS_LANES, max((symbols.shape[2] for symbols, _ in folded), default=0))
    lanes, words, models = np.full(width, RANS_FLOOR, np.uint32), [np.zeros(0, np.uint16)], []
    spent = []
    # A decoder reads in the reverse order of coding, so all goes backwards here.
    for symbols, _ in reversed(folded):
        if states:
            check_trellis(symbols, states)
        (model, used), begin = fit_columns(symbols), len(words)
        models.append(model.pack())
        share = frequencies(model.tables, states).astype(np.uint32)
        start = share.cumsum(2, np.uint32) - share
        for left in reversed(range(0, symbols.shape[2], RANS_LANES)):
            strip = slice(left, left + RANS_LANES)
            for layer, table in zip(symbols[::-1, :, strip], used[::-1, :, strip]):
                # a symbol's table, its parity there, and its place in that
                cell = table, layer & (share.shape[1] - 1), layer + share.shape[2] // 2
                x = lanes[:layer.shape[1]]
                for f, first in zip(share[cell][::-1], start[cell][::-1]):
                    # A state of f * 2^(32 - RANS_BITS) would not fit into 32 bits after the symbol:
                    # its low half leaves, and comes back where a state is below RANS_FLOOR.
                    full = (x >> (32 - RANS_BITS) >= f).nonzero()[0]
                    words.append(x[full].astype(np.uint16))
                    x[full] >>= 16
                    x += x // f * ((1 << RANS_BITS) - f) + first
        spent.append(2 * sum(map(len, words[begin:])))
    side = zlib.compress(b"".join(reversed(models)), 9)
    excess = zlib.compress(b"".join(excess for _, excess in folded), 9)
    parts = [struct.pack("<II", len(side), len(excess)), side, excess, lanes.astype("<u4"),
             np.concatenate(words[::-1]).astype("<u2")]
    return b"".join(parts), spent[::-1]


def decode_tensor(lanes: np.ndarray, words: np.ndarray, codes: np.ndarray, model: ColumnModel,
                  states: int) -> np.ndarray:
    """Fills `codes` (L, R, C) with the next symbols of the `lanes` and `words`; returns the words
    left over, raises `Refusal` when they run out. All that chooses a table is an integer known to
    both sides: sums of the rows so far, and the state of a trellis."""
    # Every slot of every table is laid out once, so that reading a symbol is two look-ups. A cell
    # is frequency << 16 | (slot - start).
    share = frequencies(model.tables, states)
    top, share = share.shape[2] // 2, share.ravel()
    place = np.arange(share.sum()) - (share.cumsum() - share).repeat(share)
    cells = ((share << 16).repeat(share) | place).astype(np.uint32)
    letters = np.resize(np.arange(-top, top + 1, dtype=np.int8), len(share)).repeat(share)
    # by state and the two lowest bits of a code; without a trellis there is one state
    follow = (trellis_next(states) if states else np.zeros((1, 2), np.int64)).repeat(2, 1).ravel()
    starts = [*refreshes(codes.shape[1]).tolist(), codes.shape[1]]
    for left in range(0, codes.shape[2], RANS_LANES):
        previous, x = np.int64(model.mean), lanes[:codes.shape[2] - left]
        for layer in codes[:, :, left:left + RANS_LANES]:
            total, state = np.zeros((2, layer.shape[1]), np.int64)
            for first, last in itertools.pairwise(starts):
                scale = rung(running_scale(total, first, previous, *model[:3])) - model.lowest
                table = scale.clip(0, len(model.tables) - 1) << RANS_BITS + (states > 0)
                for row in range(first, last):
                    slot = table + ((state & 1) << RANS_BITS) + (x & ((1 << RANS_BITS) - 1))
                    cell = cells.take(slot)
                    # f * (x >> 15) + slot - start is below f * 2^17, f at most 2^15: it fits
                    x >>= RANS_BITS
                    x *= cell >> 16
                    x += cell & 0xFFFF
                    low = (x < RANS_FLOOR).nonzero()[0]
                    read, words = words[:len(low)], words[len(low):]
                    require(len(read) == len(low), "coded weights: the stream ends too early")
                    x[low] = x[low] << 16 | read
                    layer[row] = symbol = letters.take(slot)
                    state = follow.take(state << 2 | symbol & 3)
                total += np.abs(layer[first:last]).sum(0, dtype=np.int64)
            previous = total * SCALE_ONE // len(layer)
    return words


def read_models(packed: bytes, count: int) -> list[ColumnModel]:
    """The models of `count` tensors; raises `Refusal` unless `packed` holds just these."""
    stream, models = io.BytesIO(packed), []
    for _ in range(count):
        # where bytes are missing, zeros make a model without tables
        *head, kinds, width = struct.unpack("<IBBBBB", stream.read(9).ljust(9, b"\0"))
        tables = np.frombuffer(stream.read(kinds * width), np.uint8)
        require(0 < kinds * width == tables.size and width <= LARGEST_SYMBOL + 1
                and max(head[1:3]) <= 8,
                f"coded weights: column model {head}, {kinds} x {width} is impossible or cut short")
        # Sums of uint8 wrap around as the differences in `ColumnModel.pack` did; a damaged table
        # may name rungs that are none, so they are cut down before they look anything up.
        tables = np.add.accumulate(tables.reshape(kinds, width), 0, np.uint8)
        models.append(ColumnModel(*head, tables.clip(0, len(RUNGS) - 1)))
    require(not stream.read(), "coded weights: bytes are left over after the last column model")
    return models


def inflate(packed: bytes, limit: int) -> bytes:
    """What zlib packed, if that is at most `limit` bytes, else `Refusal` without allocating it."""
    stream = zlib.decompressobj()
    with refusing("coded weights: a packed part is damaged", zlib.error):
        plain = stream.decompress(packed, limit + 1)
    require(stream.eof and not stream.unused_data and len(plain) <= limit,
            f"coded weights: a packed part is cut short or exceeds {limit} bytes")
    return plain


def decode_codes(blob: bytes, shapes: Sequence[tuple], states: int = 0) -> list[np.ndarray]:
    """The tensors (L, R, C) int16 given to `encode_codes`; raises `Refusal` for a damaged blob."""
    tensors = [np.zeros(shape, np.int16) for shape in shapes]
    filled = [codes for codes in tensors if codes.size]
    width = min(RANS_LANES, max((codes.shape[2] for codes in filled), default=0))
    sizes = *struct.unpack("<II", blob[:8].ljust(8, b"\0")), 4 * width
    left = len(blob) - 8 - sum(sizes)
    require(left >= 0 and left % 2 == 0,
            f"coded weights: {len(blob)} bytes do not match the parts they announce")
    side, excess, lanes, words = map(io.BytesIO(blob[8:]).read, (*sizes, left))
    models = read_models(inflate(side, 1 << 16 << len(filled).bit_length()), len(filled))
    excess = inflate(excess, 2 * sum(codes.size for codes in filled))
    require(len(excess) % 2 == 0, "coded weights: half an excess is left over")
    excess = np.frombuffer(excess, "<u2")
    lanes, words = np.frombuffer(lanes, "<u4").astype(np.uint32), np.frombuffer(words, "<u2")
    for codes, model in zip(filled, models):
        words = decode_tensor(lanes, words, codes, model, states)
        excess = unfold(codes, excess)
    # the encoder began with every lane at RANS_FLOOR; few damaged streams would end there
    require(not len(words) and not len(excess) and (lanes == RANS_FLOOR).all(),
            "coded weights: the stream does not end with the weights, it is damaged")
    return tensors


def coded_roles(h: Hyperparameters) -> dict[str, tuple[int, int, int]]:
    """(L | 1, rows, cols) of each bank that is stored as codes, those with a tap first."""
    ordered = sorted(roles(h).items(), key=lambda item: not item[1].tap)
    return {n: (math.prod(r.shape[:-2]), *r.shape[-2:]) for n, r in ordered if r.bits < 16}


def tapped(h: Hyperparameters) -> list[str]:
    """Names of the banks on the trellis; without a tap a bank is rounded weight by weight."""
    return [n for n in coded_roles(h) if roles(h)[n].tap]


def pack_codes(h: Hyperparameters, codes: Mapping[str, np.ndarray],
               quick: bool) -> tuple[list[bytes], dict[str, int]]:
    """Streams of the codes, and their bytes by part: two of rANS (on the trellis and off it), or
    one per bank, transposed for general compressors, so that codes of a column, which are of one
    scale, lie together."""
    if h.compressor != "rans":
        turned = (c.swapaxes(1, 2) + 128 for c in codes.values())    # high bytes are mostly 0 then
        streams = [coders()[h.compressor][0](shuffled(c), quick) for c in turned]
        return streams, dict(zip(codes, map(len, streams)))
    banks, on = [*codes.values()], len(tapped(h))
    chain, spent = encode_codes(banks[:on], h.trellis_states)
    gates, _ = encode_codes(banks[on:])
    return [chain, gates], dict(zip(codes, spent), chain=len(chain) - sum(spent), gates=len(gates))


def unpack_codes(h: Hyperparameters, streams: Sequence[bytes], coder: str) -> list[np.ndarray]:
    """int16 codes (L, rows, cols) in the order of `coded_roles`; the inverse of `pack_codes`."""
    shapes, on = [*coded_roles(h).values()], len(tapped(h))
    if coder != "rans":
        turned = (unshuffled(expand(s, 2 * L * R * C, coder), np.int16).reshape(L, C, R)
                  for s, (L, R, C) in zip(streams, shapes))
        return [c.swapaxes(1, 2) - 128 for c in turned]
    return (decode_codes(streams[0], shapes[:on], h.trellis_states) +
            decode_codes(streams[1], shapes[on:]))


def grid_parts(h: Hyperparameters) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """(bank, part of its grid, number format, shape) in the order of the artifact; banks of one tap
    share their columns, without a tap all columns are alike."""
    shapes, firsts = coded_roles(h), {roles(h)[n].tap: n for n in reversed(tapped(h))}.values()
    return [*((n, "scale", "<f4", s[:1]) for n, s in shapes.items()),
            *((n, "row", "i1", s[:2]) for n, s in shapes.items()),
            *((n, "column", "i1", shapes[n][::2]) for n in firsts)]


def pack(h: Hyperparameters, stored: Stored, quick: bool = False) -> tuple[bytes, dict[str, int]]:
    """The artifact, from which `unpack` gives back exactly `stored`; its bytes by part add up."""
    codes = {n: stored[n].codes.cpu().numpy() for n in coded_roles(h)}
    streams, ledger = pack_codes(h, codes, quick)
    steps = b"".join(getattr(stored[n].grid, part).cpu().numpy().astype(kind).tobytes()
                     for n, part, kind, _ in grid_parts(h))
    plain = [v.cpu().numpy().ravel() for v in stored.values() if not isinstance(v, Coded)]
    streams += [coders()["lzma"][0](raw, quick) for raw in (steps, shuffled(np.concatenate(plain)))]
    # every knob that was turned, not only the model's: `eval` then scores as the run did
    knobs, sizes = h.changed() | {n: getattr(h, n) for n in MODEL_KNOBS}, [*map(len, streams)]
    told = json.dumps(dict(knobs=knobs, coder=h.compressor, streams=sizes), separators=(",", ":"))
    header = lzma.compress(told.encode(), lzma.FORMAT_ALONE)
    body = MAGIC + struct.pack("<I", len(header)) + header + b"".join(streams)
    ledger |= dict(steps=sizes[-2], fp16=sizes[-1], header=len(body) - sum(sizes) + CHECKSUM_BYTES)
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES], ledger


def unpack(blob: bytes, place: str = "artifact") -> tuple[Hyperparameters, Stored]:
    """(the run's knobs, stored banks) of an artifact; raises `Refusal` for whatever is wrong. Who
    makes a file can make its checksum, so every length is checked before memory is taken."""
    h, coder, lengths, first = read_header(blob, place)
    shapes = coded_roles(h)
    require(len(lengths) == (2 if coder == "rans" else len(shapes)) + 2 and
            first + sum(lengths) + CHECKSUM_BYTES == len(blob),
            f"{place}: the lengths of its streams do not add up to its {len(blob)} bytes")
    *streams, steps, halves = map(io.BytesIO(blob[first:]).read, lengths)
    parts, found, banks = grid_parts(h), {}, {}
    sizes = [math.prod(shape) * np.dtype(kind).itemsize for _, _, kind, shape in parts]
    raw = io.BytesIO(expand(steps, sum(sizes), "lzma"))
    for (name, part, kind, shape), size in zip(parts, sizes):
        values = np.frombuffer(bytearray(raw.read(size)), kind).reshape(shape)
        found[part, name] = found[part, roles(h)[name].tap] = torch.from_numpy(values)
    for (n, shape), codes in zip(shapes.items(), unpack_codes(h, streams, coder)):
        column = found.get(("column", roles(h)[n].tap), torch.zeros(shape[::2], dtype=torch.int8))
        banks[n] = Coded(torch.from_numpy(codes), Grid(found["scale", n], found["row", n], column))
    sizes = {n: math.prod(r.shape) for n, r in roles(h).items() if r.bits == 16}
    halves = expand(halves, 2 * sum(sizes.values()), "lzma")
    banks |= zip(sizes, torch.from_numpy(unshuffled(halves, np.float16)).split([*sizes.values()]))
    return h, {n: banks[n] if n in shapes else banks[n].view(r.shape) for n, r in roles(h).items()}


def typed_knobs(values: Mapping[str, Any], place: str) -> Hyperparameters:
    """The hyperparameters that a file holds; raises `Refusal`."""
    kinds = {f.name: f.type for f in fields(Hyperparameters)}
    # the declared types exactly: 1.0 or true would pass for 1 in most checks of range
    odd = [n for n, v in values.items() if type(v).__name__ != kinds.get(n) or "\0" in str(v)]
    require(not odd, f"{place}: {', '.join(odd)} of another type, or version of this script")
    return Hyperparameters(**values)


def read_header(blob: bytes, place: str) -> tuple[Hyperparameters, str, list[int], int]:
    """(knobs, coder, lengths of the streams, place of the first one); raises `Refusal`."""
    first = len(MAGIC) + 4
    require(len(blob) >= first + CHECKSUM_BYTES and blob.startswith(MAGIC),
            f"{place}: not an artifact of this script (starts with {blob[:6]!r}, not {MAGIC!r})")
    require(hashlib.sha256(blob[:-CHECKSUM_BYTES]).digest().startswith(blob[-CHECKSUM_BYTES:]),
            f"{place}: damaged, its checksum does not match its {len(blob)} bytes")
    (length, ) = struct.unpack_from("<I", blob, len(MAGIC))
    require(length <= min(HEADER_LIMIT, len(blob) - first),
            f"{place}: its header claims {length} bytes")
    with refusing(f"{place}: its header cannot be used", lzma.LZMAError, ValueError, KeyError,
                  TypeError, RecursionError, Refusal):
        raw = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=1 << 26).decompress(
            blob[first:first + length], HEADER_LIMIT)
        header = json.loads(raw)
        knobs, coder, lengths = header["knobs"], header["coder"], header["streams"]
        require(type(knobs) is dict and set(MODEL_KNOBS) <= set(knobs) and
                all(type(n) is int and n > 0 for n in lengths) and type(coder) is str,
                "a value is missing or wrong")
        h = typed_knobs(knobs, "knobs")
    # a header of few bytes can ask for terabytes: refuse before any shape becomes memory
    require(h.num_layers * (1 + h.num_loops) < 4096 and
            sum(math.prod(r.shape) for r in roles(h).values()) <= 100 * len(blob) + 10_000_000,
            f"{place}: its header claims a model far too large for a file of {len(blob)} bytes")
    return h, coder, lengths, first + length


# >>> not packed (a packed script is its own packed bytes)
python_minifier = optional("python_minifier")
# A packed script is one Python file: PACKED, a string literal of raw compressed bytes, and lines
# that unpack the text, show it to `linecache` (for `inspect`, and so Triton) and run it in place.
UNPACKER = (
    b"import linecache,sys,CODER\n_=CODER.decompress(%b.encode('latin-1')).decode()\n"
    b"f=sys._getframe().f_code.co_filename+'*'\n"
    b"linecache.cache[f]=len(_),None,[l+'\\n'for l in _.split('\\n')],f\n"
    b"exec(compile(_,f,'exec'))\n")


def shipped(source: str) -> str:
    """`source` with the regions between `# >>> not packed` and `# <<< not packed` lines left blank;
    raises `Refusal` where a fence does not pair with another one."""
    kept = re.sub(r"^# >>> not packed(?:(?!^# >>> ).)*?^# <<< not packed[^\n]*",
                  lambda region: "\n" * region[0].count("\n"), source, flags=re.M | re.S)
    if odd := re.search(r"^# (>>>|<<<) not packed", kept, re.M):
        line = kept.count("\n", 0, odd.start()) + 1
        raise Refusal(f"line {line}: '# {odd[1]} not packed' does not pair with another fence")
    return kept


def literal(data: bytes) -> bytes:
    """The shortest triple-quoted literal of a latin-1 file whose text encodes to `data`: one byte
    per byte but for the escapes, where base85 would take five for four."""
    text = data.replace(b"\\", b"\\\\").replace(b"\r", b"\\r")
    text = re.sub(rb"\0(?=[0-7])", rb"\\000", text).replace(b"\0", b"\\0")
    quoted = (3 * q + re.sub(q + b"(?=" + 2 * q + rb"|\Z)", rb"\\\g<0>", text) + 3 * q
              for q in (b"'", b'"'))
    return min(quoted, key=len)


def pack_source(source: str, block: str = "") -> bytes:
    """The packed script: a Python file, for this version of Python or a later one, that behaves
    like `source` without its fenced regions, and with a `block` takes it as the recipe `run` where
    RECIPE is not set. Raises Refusal for unpaired fences, SyntaxError for broken text."""
    text = shipped(source)
    if block:
        text = text.replace("\nif __name__", f"\nRECIPES['run']={block!r}\nif __name__")
    if python_minifier:
        # What importers use keeps its name. Aliases of literals and builtins would reach types of
        # dataclasses and kernels of Triton, which also reads annotations and names of tiles.
        text = python_minifier.minify(
            text, remove_literal_statements=True, rename_globals=True, hoist_literals=False,
            preserve_globals=["main", "Hyperparameters", "GPT", "Refusal", "tl", *dir(builtins)],
            preserve_locals="BACKWARD BLOCK ROWS COLUMNS DEPTH S PARITY UPPER".split(),
            remove_annotations=python_minifier.RemoveAnnotationsOptions(
                remove_argument_annotations=False))
    else:
        warnings.warn("python_minifier is not installed: the packed script is longer", stacklevel=2)
    raw = text.encode()
    packed = [(b"lzma", lzma.compress(raw, lzma.FORMAT_ALONE, preset=LZMA_PRESET))]
    if brotli:
        packed.append((b"brotli", brotli.compress(raw, brotli.MODE_TEXT, 11, 24)))
    return min((PACKED + UNPACKER.replace(b"CODER", coder) % literal(data)
                for coder, data in packed), key=len)
# <<< not packed


def running_source(path: str | Path, h: Hyperparameters) -> tuple[str | None, bytes]:
    """(readable text, bytes that count) of the script at `path`: packed with the run of `h` less
    its seed, so that all seeds share one script; None and its own bytes where it is packed."""
    raw = Path(path).read_bytes()
    if raw.startswith(PACKED):
        return None, raw
    own = dict(recipe="record") | {n: v for n, v in h.changed().items() if n != "seed"}
    return raw.decode(), pack_source(raw.decode(), run_block(own))


# ==================================================================================================
# 12. Scoring
# Plain and sliding scores differ only in a list of spans; BPB = nats / bytes / ln 2. A score is
# legal by four conditions (#1017). By the model: C1, a prediction depends on earlier tokens only;
# C2, it is a distribution over all of V, fixed before its target is looked at. By `Ledger` and
# `score`, through which every score goes: C3, a target is booked before anything learns from it;
# C4, each exactly once. `verify` also replaces later tokens and looks whether earlier scores move.
# ==================================================================================================
class Windows(NamedTuple):
    """A batch of spans of the stream, (B,) int64 each. Inputs are tokens[start : start + hi]; the
    targets at places lo <= i < hi of each span are scored, the places before lo are context.
    Target i of the stream is token i + 1. A row without a span has lo = hi = 0."""

    start: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    width: int    # T of the batch: rows are padded to it
    # (B,) chunks of its document that a row has behind it, where rows walk through documents
    age: np.ndarray | None = None

    @property
    def scored(self) -> np.ndarray:
        """(B, width) True at the places that are scored."""
        place = np.arange(self.width)
        return (place >= self.lo[:, None]) & (place < self.hi[:, None])


def sliding(begin: int, end: int, T: int, stride: int) -> list[tuple[int, int, int]]:
    """Spans (start, lo, hi) that score targets [begin, end) once each, `stride` at a time, with up
    to T - stride tokens of context; the first of the stream scores T targets. A smaller stride buys
    context for T / stride times the work; stride == T is the plain score."""
    spans, lo = [], begin
    while lo < end:
        hi = min(end, lo + (stride if lo else T))
        start = max(0, hi - T)
        spans.append((start, lo - start, hi - start))
        lo = hi
    return spans


def batched(spans: Sequence[tuple], batch_tokens: int, T: int) -> list[Windows]:
    """Batches of one shape (rows, T), hence of one graph; missing rows are empty windows."""
    rows = max(1, batch_tokens // T)
    filled = np.array([*spans, *[(0, 0, 0)] * (-len(spans) % rows)], np.int64)
    return [Windows(*batch.T, T) for batch in filled.reshape(-1, rows, 3)]


def document_plan(documents: np.ndarray, C: int, rows: int, world: World,
                  left: Mapping[int, int] = {}) -> list[Windows]:
    """The chunks of C tokens that this rank scores, one batch (rows, C) per tick: its share of all
    documents, in as many ticks as every other rank, or all that are `left` (see `in_time`).

    The longest document goes first, each to the row of any rank that is free first. Inside a
    document chunks come in order, one per tick, in one row: that is all that C4 needs, since
    documents do not know of each other. Every rank computes the whole assignment and keeps its own
    rows, so nothing has to be sent."""
    ticks, world = -(-np.diff(documents) // C), World() if left else world
    free = [(0, row) for row in range(rows * world.size)]
    # (chunks, 4) of each row: start, lo, hi, age
    mine = [[np.empty((0, 4), np.int64)] for _ in range(rows)]
    # a heap of (ticks until free, row); ties go by row, so that all ranks assign alike
    spans = np.column_stack([documents[:-1], documents[1:], ticks])
    for begin, end, count in spans[np.argsort(-ticks, kind="stable")].tolist():
        if left and begin not in left:
            continue
        busy, row = free[0]
        heapq.heapreplace(free, (busy + count, row))
        if row % world.size == world.rank:
            start = np.arange(begin, end, C)
            hi, first = np.minimum(C, end - start), left.get(begin, begin)
            mine[row // world.size].append(np.stack(
                [start, (first - start).clip(0, hi), hi, np.arange(len(start))], 1))
    plan = np.zeros((max(free)[0], rows, 4), np.int64)
    for row, chunks in enumerate(map(np.concatenate, mine)):
        plan[:len(chunks), row] = chunks
    return [Windows(start, lo, hi, C, age) for start, lo, hi, age in plan.transpose(0, 2, 1)]


class Ledger:
    """Owner of the validation tokens: scores go in, training data comes out, in that order only.

    Nats stay on the device; which targets are scored is known on the host, so that no check waits
    for the device. Each rank books the targets of its own spans. What is refused is a bug of a
    plan, not an input, hence RuntimeError and no `Refusal`."""

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
        """Token ids and targets (B, T); beyond a window's end they are the pad token 0."""
        self.refuse_sealed()
        place = np.arange(w.width)
        # zeroed, not only masked later: what a scorer was never handed, it cannot leak
        inside = sent(place < w.hi[:, None], self.world.device)
        index = sent(np.minimum(w.start[:, None] + place, len(self) - 1), self.world.device)
        return self._tokens[index] * inside, self._tokens[index + 1] * inside

    def refuse_sealed(self) -> None:
        """Raises RuntimeError while the tokens are sealed."""
        if self._tokens is None:
            raise RuntimeError("a scorer or learner tried to read tokens on its own")

    def record(self, w: Windows, nats: Tensor) -> None:
        """Books the nats (B, T) of the scored places; raises RuntimeError if a target would be
        scored twice, by an earlier batch or within this one. There is no way to unbook."""
        row, place = np.nonzero(w.scored)
        targets = w.start[row] + place
        if self._scored[targets].any() or len(np.unique(targets)) != len(targets):
            raise RuntimeError(
                f"a target between {targets.min()} and {targets.max()} would be scored twice")
        self._scored[targets] = True
        # numbers instead of a mask: counting a mask would make the host wait for the device
        to, of = (sent(i, nats.device) for i in (targets, row * w.width + place))
        self._nats[to] = nats.detach().float().flatten()[of]

    def booked(self, begin: int, end: int) -> Tensor:
        """(end - begin,) how often each target was scored by any rank, once every rank is here."""
        mine = torch.from_numpy(self._scored[begin:end].astype(np.int32))
        return self.world.sum(mine.to(self.world.device))

    def lend(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [begin, end) for learning, once every rank is here; RuntimeError
        unless all are scored. In a score nothing else hands text to weights that all rows share."""
        self.refuse_sealed()
        if missing := int((self.booked(begin, end) == 0).sum()):
            raise RuntimeError(f"{missing} of the targets {begin} to {end} are not scored yet")
        return self._tokens[begin:end], self._tokens[begin + 1:end + 1]

    def targets_nats(self) -> np.ndarray:
        """Nats (N,) of all ranks' targets; RuntimeError unless each was scored exactly once, which
        also finds a target that two ranks scored."""
        times = self.booked(0, len(self))
        never, twice = int((times == 0).sum()), int((times > 1).sum())
        if never or twice:
            raise RuntimeError(f"{never} targets were never scored, {twice} twice")
        return self.world.sum(self._nats.clone()).cpu().numpy()

    def result(self, seconds: float) -> dict[str, float]:
        """val_loss in nats per token and val_bpb in bits per byte of text, over all targets."""
        nats, size = float(self.targets_nats().sum(dtype=np.float64)), int(self._bytes.sum())
        return dict(val_loss=nats / len(self), val_bpb=nats / size / math.log(2), tokens=len(self),
                    bytes=size, seconds=round(seconds, 3))


def score(ledger: Ledger, batches: Iterable[Windows], nats_of: Callable[[Tensor, Tensor], Tensor],
          learn: Callable[[Tensor, Tensor], None] | None = None) -> None:
    """The one scoring loop. `learn` can only change what later batches see: it runs when the ledger
    has the score, and is handed the batch that was scored, nothing else. Both calls run with the
    ledger sealed. `batches` may be a generator that prepares its owner between two of them."""
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
    log.begin(f"score {name}")
    begin_s = time.perf_counter()
    for i, w in enumerate(mine):
        if i and log.due():
            left_s = (time.perf_counter() - begin_s) / i * (len(mine) - i)
            log.progress(f"score:{name} {i}/{len(mine)} left:{left_s:.0f}s")
        yield w


# ==================================================================================================
# 13. Test-time training
# Learns from validation text only after it was scored. The score `ttt` has three forms:
#   stream  each document by itself: low-rank adapters of its own, a cache of keys and values, and a
#           mixture of learners; a chunk is scored, then learned from (`Learners`)
#   phased  as stream, but between parts of the stream SGD moves all weights
#   chunk   sliding windows in the place of adapters, else as phased (#549, #1493)
# Then the adaptation before rounding of some published systems (`adapt_early`), and
# `score_by_name`, the door to all scores.
# ==================================================================================================
SPREAD = 2.0    # ratio of the rates of neighbouring learners
MIX_DECAY = 0.8    # decay per token of the past losses that weigh them
SGD_MOMENTUM, SGD_CLIP = 0.9, 1.0    # of all-weights adaptation: momentum, largest gradient norm
# What TTT gives up where time is short, what gains least for its time first (tests/bench_ttt.py).
LADDER = (("ttt_steps", 1), ("ttt_learners", 2), ("ttt_learners", 1), ("ttt_stream_chunk", 48),
          ("ttt_steps", 0))
PACE = 0.97    # of EVAL_BUDGET_S that scoring keeps to
HELD_OUT_TOKENS = 1 << 23    # most training tokens kept aside for adaptation before GPTQ


class Learners:
    """Rows that walk through documents, N learners each: adapters of their own, Adam rates a
    factor apart, a prediction that mixes them. Nothing crosses from one document to the next.

    Rows of the model's batch are (row, learner) pairs, learners of a row side by side. `score`
    drives it: `follow` makes rows ready, `nats_of` predicts, `learn` comes after the booking."""

    def __init__(self, model: GPT, rows: int, C: int, steps: int):
        """For chunks of C tokens. Without steps: no adapters. Learner i has the rate TTT_LORA_LR /
        SPREAD^i: the mixture finds out which one suits a document."""
        h, self.model, self.steps, self.rows = model.h, model, steps, rows
        self.plan = depth_plan(h, looped=True)
        self.device = device = model.bank["embed"].device
        self.N = N = h.ttt_learners if steps else 1    # alone where nothing is learned
        rates = h.ttt_lora_lr * SPREAD**-torch.arange(N)
        rates[1:][-1:] = 0    # the last of several learners stays the artifact's own model
        self.rates = rates.repeat(rows).to(device)
        self.bank = AdapterBank(h, rows * N, self.plan, device) if steps else None
        self.cache = Cache(model, rows * N, C, self.plan, h.eval_seq_len, h.eval_reach)
        self.belief = torch.zeros(rows, N, device=device)    # log weights, the prior's is zero

    def follow(self, batches: Iterable[Windows]) -> Iterator[Windows]:
        """Each batch, once its rows are ready: in a row that begins a document adapters go back to
        the same values, their optimiser and the belief to none, and the cache shows no token of the
        document before, so that the order of documents cannot matter."""
        # only adapters learn here: no gradient of a weight is computed, and none is kept
        self.model.requires_grad_(False)
        for w in batches:
            ages = w.age.repeat(self.N)
            age = sent(ages, self.device)
            self.inside = sent(w.scored, self.device)
            self.rate = (self.rates * (1 + age / 4)**-self.model.h.ttt_lr_decay)[:, None]
            if self.bank:
                self.bank.reset(sent(np.flatnonzero(ages == 0), self.device))
            self.belief = self.belief * (age > 0).view(self.rows, self.N)
            self.cache.open(age * self.cache.C)
            yield w
        self.model.requires_grad_(True)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats (rows * N, T) of every learner; by parts, as a whole would compile for minutes."""
        lora = self.bank.adapters(self.model.dtype) if self.bank else None
        return self.model.nats(*(t.repeat_interleave(self.N, 0) for t in (ids, targets)),
                               self.plan, lora=lora, cache=self.cache)

    def nats_of(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats (rows, T) of the mixture p = sum of w_i p_i, whose weights know past losses only.

        At token t, w_i ~ exp(sum over s < t of d^(t - s) log p_i(x_s)), summing to one over the
        learners, with d = MIX_DECAY; d = 1 is Bayes' rule with equal priors. The weights are
        fixed before x_t is looked at, and each p_i sums to one, so the mixture does too (C2)."""
        with torch.set_grad_enabled(self.steps > 0):
            # with its graph: `learn` goes down these very losses, which saves it a forward pass
            self.first = self.forward(ids, targets)
        self.fresh = self.cache.fresh
        # (rows, N, T) log p_i of the targets; places that are not scored say nothing of a learner
        logs = -self.first.detach().view(self.rows, self.N, -1) * self.inside[:, None]
        n = torch.arange(logs.size(-1) + 1, device=self.device)
        # tokens from place s to place t, which may know s if it is above 0
        ago = n - n[:-1, None]
        decayed = torch.where(ago > 0, MIX_DECAY**ago, 0.0)
        known = self.belief[..., None] * MIX_DECAY**n + logs @ decayed
        self.belief = known[..., -1]
        return -(known[..., :-1].log_softmax(1) + logs).logsumexp(1)

    def learn(self, ids: Tensor, targets: Tensor) -> None:
        """TTT_STEPS updates of every row on its chunk, by the sum of the rows' means, of which none
        feels how many others there are. Then the chunk moves into the cache, with the keys and
        values of the scoring pass: making them anew would cost the whole past at every step."""
        inside = self.inside.repeat_interleave(self.N, 0)
        for step in range(self.steps):
            with torch.enable_grad():
                nats = self.forward(ids, targets) if step else self.first
                loss = ((nats * inside).sum(1) / inside.sum(1).clamp(min=1)).sum()
            self.bank.step(loss, self.rate)
        self.cache.write(ids.repeat_interleave(self.N, 0), self.fresh)


def tiles(h: Hyperparameters, documents: np.ndarray, steps: int, world: World) -> tuple[int, int]:
    """Rows and chunk length C in which documents are scored: as many rows as a batch of windows
    has, divided by the learners; fewer where documents are too few to fill them. Without steps
    chunks have nothing to wait for, so they are as long as a stride of the sliding windows."""
    C = min(h.eval_seq_len, h.ttt_stream_chunk if steps else h.eval_stride)
    rows = max(1, h.eval_batch_tokens // h.eval_seq_len // (h.ttt_learners if steps else 1))
    if world.device.type != "cuda":    # there every shape is a graph, so rows stay as they are
        ticks = -(-np.diff(documents) // C)
        rows = min(rows, -(-int(ticks.sum()) // int(ticks.max()) // world.size))
    return rows, C


def apart(name: str, h: Hyperparameters) -> bool:
    """True for a score that gives a document the same nats whatever stands beside it."""
    return name == "stream" or name == "ttt" and h.ttt == "stream"


def foreseen_s(name: str, model: GPT, text: Validation, edges: np.ndarray, world: World) -> float:
    """Seconds that a score of the documents between these edges will take, by those of `text`: for
    each target, or each place in batches of documents, of which some stay idle."""
    h, sizes = model.h, []
    for where in (edges, text.documents):
        rows, C = tiles(h, where, h.ttt_steps if name == "ttt" else 0, world)
        sizes.append(len(document_plan(where, C, rows, world)) * rows * C if apart(name, h)
                     else int(where[-1]))
    took, _ = score_by_name(name, model, text, world, Log(world, quiet=True))
    return took["seconds"] * sizes[0] / sizes[1]


def in_time(ticks: Iterable[Windows], plan: Sequence[Windows], limit_s: float,
            rest: Callable[[int], float], world: World, late: dict[int, int]) -> Iterator[Windows]:
    """The `ticks` of a plan until, by the pace so far, no more fit into `limit_s` before the rest,
    whose cost is that of `rest` ticks: `late` then gets, by the first target of each document that
    is left, its first one not scored. A choice by time and lengths, never by tokens."""
    clock, every, end = Clock(world), max(16, len(plan) // 64), len(plan)
    for i, w in enumerate(ticks):
        # all ranks have one number of ticks, and one clock, the mean of theirs
        if i and i % every == 0 and clock.read_s() / i * min(end, i + every + rest(i)) > limit_s:
            for v in plan[i:]:
                for start, age in zip(v.start[v.hi > 0], v.age[v.hi > 0]):
                    late.setdefault(int(start - age * v.width), int(start))
            return
        yield w


def score_documents(model: GPT, ledger: Ledger, documents: np.ndarray, steps: int, name: str,
                    log: Log, limit_s: float = math.inf, left: Mapping[int, int] = {}) -> None:
    """Scores the documents between these edges, or what this rank has `left`, by `Learners`; what
    `limit_s` seconds have no room for by the weights as they are."""
    world, late = ledger.world, {}
    rows, C = tiles(model.h, documents, steps, world)
    plan = document_plan(documents, C, rows, world, left)
    learners, ticks = Learners(model, rows, C, steps), watched(plan, name, log)
    if limit_s < math.inf:    # else ranks do not meet: one may have nothing `left`
        # The plain weights cost half a learner, and begin anew with documents that are under way.
        end, longest = len(plan), int(np.diff(documents).max()) // C
        rest = lambda i: (end - i + min(i, longest)) * 0.5 / model.h.ttt_learners
        ticks = in_time(ticks, plan, limit_s, rest, world, late)
    score(ledger, learners.follow(ticks), learners.nats_of, learners.learn)
    if late:
        log(f"late:{len(late)} documents of rank 0 without learners, for EVAL_BUDGET_S")
        del learners, ticks    # their cache
        score_documents(model, ledger, documents, 0, name, log, left=late)


def score_windows(model: GPT, ledger: Ledger, begin: int, end: int, stride: int, name: str,
                  log: Log) -> None:
    """Scores targets [begin, end) in windows, which the ranks share, by the weights as they are."""
    h, world = model.h, ledger.world
    batches = batched(sliding(begin, end, h.eval_seq_len, stride), h.eval_batch_tokens,
                      h.eval_seq_len)
    score(ledger, watched(batches[world.rank::world.size], name, log),
          functools.partial(model.run_nats, plan=depth_plan(h, looped=True)))


def adapt(model: GPT, ledger: Ledger, watch: Clock, log: Log) -> None:
    """The score `ttt`, whose clock is `watch`, in the form that TTT names. chunk and phased learn
    from a part by SGD with momentum at a rate that falls as a cosine; the last trains nobody.

    In every form text is booked before anything learns from it: for adapters by the order within
    `score`, for weights by `lend`, which refuses a part of which any rank's target is unscored.
    phased cuts at starts of documents, because its rows are documents."""
    h, world, N, starts = model.h, ledger.world, len(ledger), ledger.documents
    name, limit_s = "ttt", PACE * h.eval_budget_s or math.inf
    if h.ttt == "stream":
        return score_documents(model, ledger, starts, h.ttt_steps, name, log, limit_s)
    edges = [*range(0, N, h.ttt_chunk_tokens), N] if h.ttt == "chunk" else np.unique(
        starts[np.searchsorted(starts, np.linspace(0, N, h.ttt_phases + 1))]).tolist()
    parts, quiet, ema = [*itertools.pairwise(edges)], Log(world, quiet=True), EMA(model)
    last = min(len(parts), h.ttt_max_chunks or len(parts))
    # `before`: the artifact's weights. `raw`: SGD's own, which go on where they stopped while the
    # model itself holds their average for scoring (#578); without TTT_EMA_DECAY both are the same.
    before, raw = ([p.clone() for p in ema.live] for _ in range(2))
    sgd = torch.optim.SGD(model.bank.values(), lr=h.ttt_lr, momentum=SGD_MOMENTUM)
    for part, (begin, end) in enumerate(watched(parts, name, log)):
        if h.ttt == "phased":
            inside = starts[(starts >= begin) & (starts <= end)]
            left_s = limit_s * end / N - watch.read_s()
            score_documents(model, ledger, inside, h.ttt_steps, name, quiet, left_s)
        else:
            score_windows(model, ledger, begin, end, h.eval_stride, name, quiet)
        if part + 1 < len(parts) and part < last:
            sgd.param_groups[0]["lr"] = h.ttt_lr * 0.5 * (
                1 + math.cos(math.pi * part / max(1, last - 1)))
            torch._foreach_copy_(ema.live, raw)
            learn_chunk(model, sgd, *ledger.lend(begin, end), world)
            torch._foreach_copy_(raw, ema.live)
            ema.update(h.ttt_ema_decay)
            ema.export()
    torch._foreach_copy_(ema.live, before)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def step_by_layer(model: GPT, optimiser: torch.optim.Optimizer, early: bool) -> None:
    """One step in which layer l moves at TTT_LR_RAMP + (1 - that) * l / (L - 1) of the rate, not at
    all where frozen (#1351), and what is in no layer at the full rate; layers frozen by SGD freeze
    the embedding too. The step is scaled, not the gradient, whose size AdamW does not feel."""
    h, embed = model.h, model.bank["embed"]
    ramp = torch.linspace(h.ttt_lr_ramp, 1, h.num_layers, device=embed.device)
    ramp[:h.ttt_freeze_blocks] = 0
    shares = [(p, ramp.view(-1, *[1] * (p.dim() - 1)))
              for name, p in model.bank.items() if name in Layer._fields
              and (h.ttt_lr_ramp < 1 or h.ttt_freeze_blocks)]    # else no copy is needed
    shares += [(embed, ramp[:1])] * (h.ttt_freeze_blocks > 0 and not early)
    before = [p.clone() for p, _ in shares]
    optimiser.step()
    for (p, share), old in zip(shares, before):
        p.copy_(old.lerp(p, share))


def learn_chunk(model: GPT, optimiser: torch.optim.Optimizer, ids: Tensor, targets: Tensor,
                world: World, early: bool = False) -> None:
    """TTT_EPOCHS passes over one scored chunk of (n,) tokens in sequences of TRAIN_SEQ_LEN, or
    `early` a single one; leftovers are not used. Ranks share the sequences of a batch and add up
    their gradients of its mean, so that weights stay equal on all."""
    h, plan, T = model.h, depth_plan(model.h, looped=True), min(model.h.train_seq_len, len(ids))
    rows = len(ids) // T
    ids, targets = ids[:rows * T].view(rows, T), targets[:rows * T].view(rows, T)
    weights = list(model.bank.values())
    # every pass has the same number of sequences, padded where they are fewer: one graph for all
    each, most = -(-h.ttt_batch_seqs // world.size), max(1, h.micro_batch_tokens // T)
    width = -(-each // -(-each // most))
    for lo in [*range(0, rows, h.ttt_batch_seqs)] * (1 if early else h.ttt_epochs):
        count = min(h.ttt_batch_seqs, rows - lo)
        optimiser.zero_grad(set_to_none=True)
        mine = slice(lo + world.rank, lo + count, world.size)
        for x, y in zip(ids[mine].split(width), targets[mine].split(width)):
            if own := len(x):    # fewer sequences than ranks leave some without
                x, y = (F.pad(t, (0, 0, 0, width - own)) for t in (x, y))
                (model.run_nats(x, y, plan).mean(1)[:own].sum() / count).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        flat = world.sum(torch.cat([g.flatten() for g in grads]))
        for p, g in zip(weights, flat.split([p.numel() for p in weights])):
            p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(weights, SGD_CLIP)
        step_by_layer(model, optimiser, early)


def hold_out(h: Hyperparameters, data: Dataset, log: Log) -> tuple[Dataset, Tensor]:
    """(data without it, (n + 1,) tokens) of the text that weights adapt to before GPTQ: the end of
    the last training shard, which training then never reads, or validation, which breaks C3."""
    if h.prequant_ttt_data != "train":
        log(f"compliant:false rule C3 (PREQUANT_TTT_DATA={h.prequant_ttt_data} learns what it will "
            "score)")
        return data, data.val.tokens
    *shards, last = data.train
    kept = len(last) - min(HELD_OUT_TOKENS, len(last) // 2)
    held = torch.from_numpy(last[kept:].astype(np.int64))
    return data._replace(train=[*shards, last[:kept]]), held


def adapt_early(model: GPT, tokens: Tensor, world: World, epochs: int) -> None:
    """Trains all weights on `tokens` (n + 1,) before GPTQ (#1364), or by SGD after it (#398), in
    steps of TTT_BATCH_SEQS sequences clipped to SGD_CLIP; AdamW's rate falls by the epoch."""
    h, weights, lr = model.h, list(model.bank.values()), model.h.prequant_ttt_lr
    adamw = h.prequant_ttt_data != "after"
    optimiser = (torch.optim.AdamW(weights, lr, weight_decay=0.0) if adamw else
                 torch.optim.SGD(weights, lr, SGD_MOMENTUM))
    tokens = tokens.to(world.device)
    for epoch in range(epochs):
        if adamw:
            optimiser.param_groups[0]["lr"] = lr * (
                0.55 + 0.45 * math.cos(math.pi * epoch / h.prequant_ttt_epochs))
        learn_chunk(model, optimiser, tokens[:-1], tokens[1:], world, True)
    model.zero_grad(set_to_none=True)


def affordable(model: GPT, text: Validation, documents: np.ndarray, world: World,
               log: Log) -> float:
    """Retunes the model to the best form of TTT that scores documents between these edges within
    EVAL_BUDGET_S; returns its seconds, by those of training text. `eval` will score alike."""
    h, limited = model.h, model.h.eval_budget_s and model.h.ttt != "chunk"
    for rung, (name, value) in enumerate([("eval_budget_s", 0.0), *LADDER]):
        now = getattr(model.h, name)
        if rung and (now == value or (name == "ttt_stream_chunk") == (now > value)):
            continue    # never dearer than was asked
        model.retune(**{name: value})
        for _ in range(2):    # the first time compiles
            need_s = 1.1 * foreseen_s("ttt", model, text, documents, world)
        if need_s <= h.eval_budget_s or not limited:
            break
    model.retune(eval_budget_s=h.eval_budget_s)
    if limited:
        if world.device.type == "cuda":    # what `late` documents take: graphs of their own
            score_by_name("stream", model, text, world, Log(world, quiet=True))
        log("ttt: learners:{ttt_learners} chunk:{ttt_stream_chunk} steps:{ttt_steps}, about "
            "{:.0f}s of EVAL_BUDGET_S={eval_budget_s:g}".format(need_s, **asdict(model.h)))
    return need_s


def score_by_name(name: str, model: GPT, val: Validation, world: World,
                  log: Log) -> tuple[dict[str, float], Ledger]:
    """One of SCORES over the whole validation set: its result and the ledger; all ranks take part.
    Each score has a Ledger of its own, so none can learn from what another has booked."""
    h, watch, ledger = model.h, Clock(world), Ledger(val, world)
    if name == "ttt":
        adapt(model, ledger, watch, log)
    elif name == "stream":
        score_documents(model, ledger, val.documents, 0, name, log)
    else:
        stride = h.eval_stride if name == "sliding" else h.eval_seq_len
        score_windows(model, ledger, 0, len(ledger), stride, name, log)
    return ledger.result(watch.read_s()), ledger


# ==================================================================================================
# 14. Fused kernels
# Triton twins of `mlp`, `softcapped_nats` and `trellis_codes`, which define the meaning. The first
# takes the activation from the registers that hold the product, without a pass of its own over
# (M, F); `nats` needs no fp32 copy of the logits (N, V); a trellis is one launch, not hundreds.
# Where they cannot work, or disagree with the plain forms (`kernels_trouble`), a run goes on
# without them.
# ==================================================================================================
# where Triton is missing, the functions themselves, which nobody then calls
jit = triton.jit if triton else lambda kernel: kernel


@jit
def finish(product, h, out, row, column, slope, BACKWARD: tl.constexpr):
    """Stores what follows from one tile of a product: h = LeakyReLU(z)^2, or the gradient of z.

    The lowest bit of a bf16 h says on which side of zero z was, so that h alone gives the slope
    2 z = 2 sqrt(h), or 2 slope^2 z = -2 slope sqrt(h), and z itself is never stored. Each side
    rounds to every other bf16 number, without bias: above zero to the middles of cells of 2^17."""
    if BACKWARD:
        kept = h.load([row, column]).to(tl.float32)
        above = kept.to(tl.int32, bitcast=True) & 65536 != 0
        product *= 2 * tl.sqrt(kept) * tl.where(above, 1.0, -slope)
    else:
        above = product > 0
        z = product * tl.where(above, 1.0, slope)
        bits = (z * z).to(tl.int32, bitcast=True)
        bits = tl.where(above, bits & -131072 | 65536, bits + 65536 & -131072)
        product = bits.to(tl.float32, bitcast=True)
    out.store([row, column], product.to(out.dtype))


def fit_descriptors(arguments: dict) -> None:
    """Gives the tensor descriptors of `mlp_kernel` the block shapes of the chosen tile."""
    rows, columns, depth = (arguments[name] for name in ("ROWS", "COLUMNS", "DEPTH"))
    arguments["a"].block_shape = [rows, depth]
    arguments["b"].block_shape = [depth, columns] if arguments["BACKWARD"] else [columns, depth]
    arguments["h"].block_shape = arguments["out"].block_shape = [rows, columns // 2]


# Rows, columns, depth, stages, warps: the fastest tile is found at the first call with new sizes,
# in the rehearsal, off the clock, if there is one.
TILES = ([(32, 16, 16, 1, 1)] if INTERPRETED else
         [(128, 256, 64, 3, 8), (128, 128, 64, 4, 8), (128, 128, 64, 3, 4), (64, 128, 64, 3, 4)])


@(triton.autotune([
    triton.Config(dict(ROWS=rows, COLUMNS=columns, DEPTH=depth), num_stages=stages, num_warps=warps,
                  pre_hook=fit_descriptors)
    for rows, columns, depth, stages, warps in TILES], ["N", "K", "BACKWARD"]) if triton else jit)
@jit
def mlp_kernel(a, b, h, out, M, N, K, PROGRAMS, slope, BACKWARD: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Forward: out = LeakyReLU(a @ b^T, slope)^2, with a (M, K), b (N, K). Backward: out = (a @ b)
    times its slope, known from h, with b (K, N). Neighbouring tiles share rows of `a`."""
    across = tl.cdiv(N, COLUMNS)
    # flattened, the next tile's loads are under way while this tile's results are written
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * across, PROGRAMS, flatten=True):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            if BACKWARD:
                right = b.load([k, column])
            else:
                right = b.load([column, k]).T
            product = tl.dot(a.load([row, k]), right, product)
        # two halves, so that the staging buffers of the end take half the shared memory
        low, high = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        finish(low, h, out, row, column, slope, BACKWARD)
        finish(high, h, out, row, column + COLUMNS // 2, slope, BACKWARD)


def launch_mlp(a: Tensor, b: Tensor, h: Tensor, out: Tensor, slope: float, backward: bool) -> None:
    """Fills out (M, N); the forward direction ignores h."""
    # TMA: the chip copies whole tiles and cuts what reaches over the edge. Shapes come later.
    matrices = [descriptors.TensorDescriptor.from_tensor(t.contiguous(), [1, 8])
                for t in (a, b, h, out)]
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 4
    mlp_kernel[(programs,)](*matrices, *out.shape, a.size(1), programs, slope, BACKWARD=backward)


def mlp_forward(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """(output (M, D), activations (M, F)), the latter at most 2^-7 of themselves off."""
    h = x.new_empty(len(x), len(w_up))
    launch_mlp(x, w_up, h, h, slope, False)
    return h @ w_down.mT, h


def mlp_slope(dy: Tensor, w_down: Tensor, h: Tensor, slope: float) -> Tensor:
    """Gradient (M, F) of what the activation was taken of: (dy @ w_down) times its slope."""
    out = torch.empty_like(h)
    launch_mlp(dy, w_down, h, out, slope, True)
    return out


def keep_inputs(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Saves what a backward pass needs: the inputs, and of what came out the second tensor, which
    for the MLP is one (M, F), for the loss one sum per row."""
    ctx.set_materialize_grads(False)
    *kept, ctx.constant = inputs
    ctx.save_for_backward(*kept, output[1])


def mlp_backward(ctx: Any, dy: Tensor, unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of (x, w_up, w_down, slope); those that nobody asked for are None."""
    x, w_up, w_down, h = ctx.saved_tensors
    wants_x, wants_up, wants_down, _ = ctx.needs_input_grad
    # the products stay visible to the compiler; adapters leave the weights frozen, hence the tests
    d_up = torch.ops.golf.mlp_slope(dy, w_down, h, ctx.constant) if wants_x or wants_up else None
    return (d_up @ w_up if wants_x else None, d_up.mT @ x if wants_up else None,
            dy.mT @ h if wants_down else None, None)


@jit
def nats_kernel(logits, targets, nats, lse, V, cap, BLOCK: tl.constexpr):
    """One row: nats = log sum exp z - z[target], with z = cap * tanh(logits / cap) + cap, where
    + cap leaves the softmax alone and turns tanh into a sigmoid."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    column = tl.arange(0, BLOCK)
    z = tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32)
    z = tl.where(column < V, 2 * cap * tl.sigmoid(2 / cap * z), -float("inf"))
    peak = tl.max(z)
    log_sum = peak + tl.log(tl.sum(tl.exp(z - peak)))
    chosen = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    tl.store(lse + row, log_sum)
    tl.store(nats + row, log_sum - 2 * cap * tl.sigmoid(2 / cap * chosen))


@jit
def nats_slope_kernel(logits, targets, lse, slope, out, V, cap, BLOCK: tl.constexpr):
    """One row: out = slope[row] * d nats / d logits, from the logits again: d nats / d z is
    softmax(z) less one at the target, dz / d logits = 1 - tanh^2."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    place = row.to(tl.int64) * V + column
    s = tl.sigmoid(2 / cap * tl.load(logits + place, mask=column < V, other=0.0).to(tl.float32))
    softmax = tl.exp(2 * cap * s - tl.load(lse + row))
    missing = softmax - tl.where(column == tl.load(targets + row), 1.0, 0.0)
    tile = tl.load(slope + row) * missing * 4 * s * (1 - s)    # 1 - tanh^2 = 4 s (1 - s)
    tl.store(out + place, tile.to(out.dtype.element_ty), mask=column < V)


def nats_forward(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(nats (N,), log sum exp of the shifted logits (N,)), both fp32."""
    N, V = logits.shape
    nats, lse = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    # a block holds a whole row: up to 64 numbers a thread at V = 16384
    block = triton.next_power_of_2(V)
    nats_kernel[(N,)](logits, targets, nats, lse, V, cap, num_warps=8, BLOCK=block)
    return nats, lse


def nats_slope(logits: Tensor, targets: Tensor, lse: Tensor, slope: Tensor, cap: float) -> Tensor:
    """Gradient (N, V) of the logits, in their type: slope (N,) times that of each row's nats."""
    (N, V), out = logits.shape, torch.empty_like(logits)
    nats_slope_kernel[(N,)](logits, targets, lse, slope, out, V, cap, num_warps=8,
                            BLOCK=triton.next_power_of_2(V))
    return out


def nats_backward(ctx: Any, slope: Tensor, unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of (logits, targets, cap). A new tensor, though the logits are dead by now: a
    mutating operator makes the compiler copy the logits first, 0.8 GB in 98,304 tokens."""
    logits, targets, lse = ctx.saved_tensors
    return (torch.ops.golf.nats_slope(logits, targets, lse, slope.contiguous(), ctx.constant), None,
            None)


@jit
def residue_cost(x, weight, residue):
    """What the nearest code of a residue modulo 4 costs, in the units of `trellis_codes`."""
    part = (x - residue) * 0.25
    part -= tl.floor(part + 0.5)
    return part * part * weight


@jit
def trellis_kernel(x, weight, codes, taken, R, S: tl.constexpr, PARITY: tl.constexpr,
                   UPPER: tl.constexpr):
    """One row of `trellis_codes`, there and back, by one warp. Bit s of `taken` says of each place
    by which of its two branches state s was reached at least cost."""
    row, state = tl.program_id(0) * R, tl.arange(0, S)
    # a step backwards: the highest bit of a state tells the parity of the one before
    odd = state // (S // 2)
    from_0 = 2 * (state ^ odd * PARITY) + odd
    cost = tl.where(state == 0, 0.0, 1e30)
    for place in range(row, row + R):
        target, counts = tl.load(x + place), tl.load(weight + place)
        zero = tl.gather(cost, from_0, 0) + residue_cost(target, counts, odd)
        one = tl.gather(cost, from_0 ^ 2 * UPPER, 0) + residue_cost(target, counts, odd + 2)
        tl.store(taken + place, tl.sum((one < zero).to(tl.int64) << state))
        cost = tl.minimum(zero, one)
    at = tl.argmin(cost, 0)
    tl.debug_barrier()    # what one thread stored all will read
    for done in range(R):
        place = row + R - 1 - done
        bit = (tl.load(taken + place) >> at).to(tl.int32) & 1
        odd_before = at // (S // 2)
        at = 2 * (at ^ odd_before * PARITY ^ bit * UPPER) + odd_before
        low = odd_before + 2 * bit
        code = low + 4 * tl.floor((tl.load(x + place) - low) * 0.25 + 0.5)
        tl.store(codes + place, code.to(tl.int16))


def define(name: str, schema: str, forward: Callable, shapes: Callable) -> Any:
    """The operator golf::name. Its schema is written out, so that packing may drop annotations."""
    operator = torch.library.custom_op(f"golf::{name}", forward, mutates_args=(), schema=schema)
    operator.register_fake(shapes)
    return operator


def register_kernels() -> None:
    """Tells torch the signature, output shapes and gradient of the operators of every step."""
    define("mlp", "(Tensor a, Tensor b, Tensor c, float d) -> (Tensor, Tensor)", mlp_forward,
           lambda x, w_up, *rest: (torch.empty_like(x), x.new_empty(len(x), len(w_up)))
           ).register_autograd(mlp_backward, setup_context=keep_inputs)
    define("mlp_slope", "(Tensor a, Tensor b, Tensor c, float d) -> Tensor", mlp_slope,
           lambda dy, w_down, h, slope: torch.empty_like(h))
    define("nats", "(Tensor a, Tensor b, float c) -> (Tensor, Tensor)", nats_forward,
           lambda z, *rest: tuple(z.new_empty(len(z), dtype=torch.float32) for _ in range(2))
           ).register_autograd(nats_backward, setup_context=keep_inputs)
    define("nats_slope", "(Tensor a, Tensor b, Tensor c, Tensor d, float e) -> Tensor", nats_slope,
           lambda z, *rest: torch.empty_like(z))


@functools.cache
def kernels_trouble() -> str:
    """Why this machine computes without the fused kernels; empty where they equal their plain twins
    once, forward and backward, on 200 rows: these end inside a tile, where mistakes would be."""
    chip = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, )
    if not triton or not (chip or INTERPRETED):
        return "they need Triton and a Hopper GPU or later"
    try:
        register_kernels()
        device = torch.device("cpu" if INTERPRETED else "cuda")
        g = torch.Generator(device).manual_seed(0)    # a model's random numbers stay as they are
        x, up, down = (torch.empty(n, device=device, dtype=torch.bfloat16)
                       .normal_(0, 0.2, generator=g).requires_grad_()
                       for n in ((200, 32), (48, 32), (32, 48)))
        y, found = torch.arange(200, device=device) % 48, []
        for fused in (True, False):
            nats = softcapped_nats(mlp(x, up, down, 0.5, fused=fused) @ up.mT, y, 30.0, fused).sum()
            slopes = torch.autograd.grad(nats, (x, up, down))
            row = 20 * x.detach()[:, :1].T
            found.append(torch.stack([nats, *(t.float().norm() for t in slopes),
                                      (row - trellis_codes(row, 8, fused=fused)).norm()]))
        worst = float((found[0] / found[1] - 1).detach().abs().max())
        return "" if worst < 0.03 else f"they are off by {worst:.3g}"
    except Exception as error:    # whatever a compiler for kernels may raise
        return brief(error)


# ==================================================================================================
# 15. Pipeline
# The whole run in the order of its stages, each one call and one line of the log. What comes before
# the clock leaves no trace in the weights; on it is all that reads training data; validation text
# meets the model in the scores only, unless a knob breaks C3. Rank 0 alone rounds, codes and
# writes; all ranks load what it read back from its disk, so what is scored is what is submitted.
# ==================================================================================================
def compile_mode(h: Hyperparameters, device: torch.device, log: Callable[[str], None]) -> str:
    """COMPILE, with auto resolved, once a small function was compiled; where that fails auto is off
    and says why, anything else raises `Refusal`. On CPUs a short clock does not pay for it."""
    short = device.type == "cpu" and 0 < h.max_wallclock_seconds < 400
    if h.compile == "off" or h.compile == "auto" and short:
        return "off"
    try:
        if device.type == "cpu":    # torch would wait for one that hangs, without end
            subprocess.run([*shlex.split(os.environ.get("CXX") or "g++"), "--version"],
                           capture_output=True, timeout=60)
        fresh = os.getpid()    # no cache has this function yet, so that the compiler is asked
        torch.compile(lambda x: x.sin() * fresh + 1)(torch.ones(8, device=device))
    except Exception as error:    # whatever compilers, linkers and loaders may raise
        reason = next((line for line in str(error).splitlines() if "error:" in line), brief(error))
        require(h.compile == "auto", f"COMPILE={h.compile} cannot work here ({reason}); install a "
                "compiler such as g++ and Python's header files, or set COMPILE=off")
        log(f"compile:off ({reason}; install g++ and Python.h for several times the speed)")
        return "off"
    return h.compile if h.compile != "auto" else "full" if device.type == "cuda" else "block"


def tune_process(device: torch.device) -> None:
    """Process-wide settings: TF32 for fp32 products on GPUs; no more threads than processors; on
    Linux CPUs a heap of one arena, never trimmed: fresh zeroed pages take a twentieth of a step."""
    torch.set_float32_matmul_precision("high")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):    # another C library: nothing to tune
            libc, trim_threshold, mmap_max, arena_max = ctypes.CDLL("libc.so.6"), -1, -4, -8
            for option, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
                libc.mallopt(option, value)


def wanted_scores(h: Hyperparameters) -> list[str]:
    """The scores that this run computes, in the order of the pipeline."""
    return [name for name in SCORES
            if name in h.scores.split(",") and (h.ttt_enabled or name != "ttt")]


def preflight(h: Hyperparameters, world: World, log: Log) -> Dataset:
    """The data. Checks what later stages need before anything costs time; raises one `Refusal` that
    lists all that is wrong, so that one start shows every mistake."""
    wrong, folder = [], Path(h.logs_dir).absolute() / h.run_id

    def check(work: Callable, *arguments: Any) -> Any:
        """What the work returns; a refusal joins the list."""
        try:
            return work(*arguments)
        except Refusal as error:
            wrong.append(str(error))

    package = dict(zstd="zstandard").get(h.compressor, h.compressor)
    check(require, Path(SCRIPT).is_file(), f"{SCRIPT}: the bytes of this script count, so it must "
          "be started from a file of its own")
    check(require, h.compressor in ("rans", *coders()),
          f"COMPRESSOR={h.compressor} needs the package {package} (pip install {package})")
    size = len(os.fsencode(h.run_id))    # what nearly all file systems take as a name
    require(size <= 255, f"RUN_ID={h.run_id}: {size} bytes, expected a name of at most 255")
    if h.run_id:
        check(refuse_used, folder)
        found = check(read_checkpoint, folder)
        if found and found[2:4] != [world.size, h.changed()]:
            wrong.append(f"RUN_ID={h.run_id}: its checkpoint was made by {found[2]} ranks with "
                         f"{found[3]}, not by {world.size} with {h.changed()}")
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    need_bytes, free_bytes = 4 * h.budget_bytes, shutil.disk_usage(folder).free
    check(require, free_bytes >= need_bytes,
          f"{folder}: {free_bytes:,} bytes are free, the run needs {need_bytes:,}")
    check(require, folder.is_dir() and os.access(folder, os.W_OK),
          f"LOGS_DIR={h.logs_dir}: {folder} is no folder that can be written")
    kernel = check(attention_kernel, h, world.device)
    if world.device.type == "cuda" and kernel not in ("fa3", None):
        log(f"attention:{kernel} (FlashAttention 3 was not found or does not fit this GPU; slower)")
    check(accumulation, h, world)
# >>> not packed (a packed script builds no corpus)
    if wrong and must_build(h) and not sentencepiece:    # `find_dataset` will not come to it
        wrong.append("CORPUS=embedded needs the package sentencepiece (pip install sentencepiece)")
# <<< not packed
    data = None if wrong and must_build(h) else check(find_dataset, h, world, log)
    require(not wrong, "; ".join(wrong))
    return data


def rehearsal_text(h: Hyperparameters, data: Dataset, documents: np.ndarray,
                   world: World) -> Validation:
    """The beginning of the training shards in the place of a validation set: one chunk and a
    window more, so that chunk learns once and scores with what it learned. Nobody reads its BPB."""
    count = h.ttt_chunk_tokens + h.eval_seq_len
    tokens = np.concatenate([shard[:2 * count] for shard in data.train[:8]])[:count + 1]
    # One document in each row that those between these edges would fill: the same shapes. On GPUs
    # none is so short that its batch would have more pieces than real ones (`locate`).
    rows, least = tiles(h, documents, 0, world)[0], 128 if world.device.type == "cuda" else 1
    tokens[tokens == BOS] = 0
    tokens[::max(least, -(-count // (rows * world.size)))] = BOS
    return Validation.of(tokens, np.ones(len(tokens) - 1, np.int64))


def rehearse_rounding(t: Trainer, say: Callable) -> dict[str, float]:
    """The rehearsal of what comes between training and scores: seconds by stage, once compiled."""
    h, world, model = t.h, t.world, t.model
    with model.eager():
        for ticks in (2, min(9, h.train_seq_len)):    # each writes a token of every row
            pace = Clock(world)
            text = written(model, world, ticks)
    write_s = pace.read_s() * text.size(1) / ticks
    for few in (text[:1], text[:max(1, DISTIL_ROWS // world.size)]):
        pace = Clock(world)
        found = calibrate(model, world, few)
    cost = dict(calibrate=write_s + pace.read_s() * len(text) / len(few))
    say("quantise and pack")
    pace = Clock(world)
    # quick: the ways through packing and reading matter here, not the length
    load_stored(model, unpack(pack(h, quantise(model, found), quick=True)[0])[1])
    search_s = 5 * pace.read_s()    # about so often it rounds and packs
    for _ in in_turn(h)[:2]:
        pace = Clock(world)
        Distillation(model, found, world, 3.0).run(in_turn(h)[:1], 1)
    return cost | dict(quantise=search_s + len(in_turn(h)) * h.rounding_steps * pace.read_s())


def rehearse(t: Trainer, data: Dataset, log: Log, held: Tensor | None = None,
             documents: Sequence[int] = (0, 1)) -> float:
    """Runs every later stage on a few steps of training data, then rewinds; returns seconds to keep
    for adapting to `held` tokens. Chooses the TTT that fits, says how long `documents` will take.

    So nothing fails late, and no graph is compiled inside the clock. Validation text is never
    touched. The snapshot puts back all that the stages changed, so training goes as without."""
    h, watch, before = t.h, Clock(t.world), t.snapshot()
    say = lambda stage: (log(f"rehearse:{stage}"), log.begin(f"rehearse {stage}"))
    say("train")
    # every plan, context and rounding that training will come to: each compiles to its own graphs
    points = {end for end, _ in h.contexts} if h.train_seq_schedule or h.late_qat_threshold else {}
    for looped, progress, number in itertools.product(
            sorted({False, h.num_loops > 0}), sorted({0.0, *points}), range(h.rehearsal_steps)):
        pace = Clock(t.world)
        t.step(number, progress, looped)
        step_s = pace.read_s()    # of several the last is the dearest, and compiles nothing
    reserve_s = 0.0
    say("calibrate")
    for _ in range(2 if h.prequant_ttt_epochs else 0):    # the first time compiles
        adaptation = Clock(t.world)
        few = torch.from_numpy(
            data.train[0][:h.ttt_batch_seqs * h.train_seq_len + 1].astype(np.int64))
        adapt_early(t.model, few, t.world, 1)
        if h.prequant_ttt_data == "train":    # else it is off the clock
            # 1.3: a late stop breaks the rule, an early one costs a few steps
            reserve_s = 1.3 * h.prequant_ttt_epochs * adaptation.read_s() * len(held) / len(few)
    cost = dict(training=h.max_wallclock_seconds or h.iterations * step_s)
    cost |= rehearse_rounding(t, say)
    fake = rehearsal_text(h, data, documents, t.world)
    for number, name in enumerate(wanted_scores(h)):
        say(f"score {name}")
        for _ in range(1 if number or name == "ttt" else 2):    # the first windows compile for all
            cost[f"score {name}"] = (affordable(t.model, fake, documents, t.world, log)
                                     if name == "ttt" else
                                     foreseen_s(name, t.model, fake, documents, t.world))
    t.restore(before)
    for name, seconds in (dict(rehearsal=watch.read_s()) | cost).items():
        log(f"cost:{name:16} about {seconds:6.0f} s")
    log(f"cost:bytes {h.budget_bytes:,} at most, memory {peak_bytes(t.world.device):,} so far")
    log(f"rehearsal:{watch.read_s():.1f}s (every stage ran and was rewound; not counted) "
        f"reserve:{reserve_s:.2f}s for adaptation")
    return reserve_s


def build_model(h: Hyperparameters, world: World) -> GPT:
    """The initialised model on the device, sent by rank 0 in case machines draw differently."""
    torch.manual_seed(h.seed)
    model = GPT(h, compute_dtype(h, world.device), attention_kernel(h, world.device))
    model.to(world.device)
    world.share_tensors(p.data for p in model.bank.values())
    return model


def measured_scores(model: GPT, data: Dataset, world: World, log: Log,
                    packed: bool) -> dict[str, dict[str, float]]:
    """Name -> result of the scores before packing or after it, the latter by weights adapted as
    PREQUANT_TTT_DATA=after asks. A line of the log for each; a run keeps the nats of documents."""
    h, starts, results = model.h, data.val.documents, {}
    if packed and h.prequant_ttt_epochs and h.prequant_ttt_data == "after":
        adapt_early(model, data.val.tokens, world, h.prequant_ttt_epochs)
    for name in wanted_scores(h):
        if packed == (name == "prequant"):
            continue
        results[name], ledger = score_by_name(name, model, data.val, world, log)
        log("final_{}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} "
            "eval_time:{:.0f}ms".format(name, results[name]["seconds"] * 1e3, **results[name]))
        nats = np.add.reduceat(ledger.targets_nats(), starts[:-1], dtype=float)
        sizes = np.add.reduceat(data.val.bytes, starts[:-1])
        if log.folder and world.main:
            write_atomically(log.folder / f"documents_{name}.txt", b"targets bytes nats\n", *(
                b"%d %d %.6f\n" % row for row in zip(np.diff(starts), sizes, nats)))
    return results


def run(h: Hyperparameters, world: World, log: Log, data: Dataset, data_s: float) -> dict[str, Any]:
    """The pipeline, from the rehearsal to the scores; returns what result.json holds."""
    begin_s, seconds = time.perf_counter() - data_s, dict(data=data_s)
    data, held = hold_out(h, data, log) if h.prequant_ttt_epochs else (data, None)
    model = build_model(h, world)
    announce(h, model, world, data, log)
    code = running_source(SCRIPT, h)[1] if world.main else b""
    model.compile(compile_mode(h, world.device, log))
    compiled = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = [compiled()]
    trainer, watch, reserve_s = Trainer(h, world, model, data), Clock(world), 0.0
    if h.rehearsal_steps:
        reserve_s = rehearse(trainer, data, log, held, data.val.documents)
        h = model.h
    seconds["rehearsal"] = watch.read_s()
    graphs.append(compiled())

    plain = lambda: "val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}".format(**score_by_name(
        "quantized", model, data.val, world, Log(world, quiet=True))[0])
    trained, clock = train(trainer, reserve_s, log, plain)
    if h.prequant_ttt_epochs and h.prequant_ttt_data != "after":
        log.begin("adapt")
        watch = Clock(world)
        adapt_early(model, held, world, h.prequant_ttt_epochs)
        clock.pause(watch.read_s() * (h.prequant_ttt_data == "val"))    # no training data
    clock_s = clock.read_s()
    graphs.append(compiled())
    log(f"clock:{clock_s:.2f}s of {h.max_wallclock_seconds:g}s steps:{trained.steps} "
        "(the last look at training data)")
    seconds |= dict(train=trained.seconds, adaptation=clock_s - trained.seconds)
    scores = measured_scores(model, data, world, log, packed=False)

    log.begin("calibrate")
    watch = Clock(world)
    found = calibrate(model, world)
    seconds["calibration"] = watch.read_s()
    log.begin("quantise")
    watch = Clock(world)
    blob, ledger, _ = round_in_turn(model, found, len(code), world, log)
    seconds["quantise"] = watch.read_s()
    log.begin("pack and read back")
    watch = Clock(world)
    if world.main:
        blob = keep(blob, ledger, code, h, log)
    blob = world.share(blob)
    load_stored(model, unpack(blob)[1])
    seconds["pack"] = watch.read_s()
    scores |= measured_scores(model, data, world, log, packed=True)
    graphs.append(compiled())
    log("graphs:{} compiled before the clock, {} inside, {} after".format(*np.diff(graphs)))
    sizes = dict(model=len(blob), code=len(code), total=len(blob) + len(code), limit=h.budget_bytes)
    seconds["total"] = time.perf_counter() - begin_s
    return conclude(h, world, model, trained, clock_s, sizes, scores, seconds, log)


def keep(blob: bytes, ledger: Mapping[str, int], code: bytes, h: Hyperparameters,
         log: Log) -> bytes:
    """Writes artifact and packed code into the run's folder, and their bytes, of every part and in
    all, into its log; returns the artifact as read from there, since that is what gets scored."""
    write_atomically(log.folder / "model.bin", blob)
    write_atomically(log.folder / "train_gpt.py", code)
    weights = {name: math.prod(role.shape) for name, role in roles(h).items()}
    for name, size in ledger.items():
        log(f"bytes:{name} {size}" + (f" bits_per_weight:{8 * size / weights[name]:.3f}"
                                      if name in weights else ""))
    log(f"Serialized model: {len(blob)} bytes")
    log(f"Code size: {len(code)} bytes (packed)")
    log(f"Total submission size {h.compressor}: {len(blob) + len(code)} bytes")
    return (log.folder / "model.bin").read_bytes()


def announce(h: Hyperparameters, model: GPT, world: World, data: Dataset, log: Log) -> None:
    """The first lines of a log: everything that is needed to repeat the run."""
    for line in (
            f"run:{log.folder.name} recipe:{h.recipe} changed:{json.dumps(h.changed())}",
            f"device:{device_name(world.device)} world_size:{world.size} torch:{torch.__version__} "
            f"python:{platform.python_version()} dtype:{str(model.dtype)[6:]} "
            f"attention:{attention_kernel(h, world.device)} "
            f"kernels:{'fused' if h.fused_kernels else 'plain'}",
            f"knobs:{json.dumps(asdict(h))}",
            f"model_params:{sum(p.numel() for p in model.parameters())} "
            f"steps_of_depth:{len(depth_plan(h, False))}->{len(depth_plan(h, True))}",
            f"data: train_tokens:{sum(map(len, data.train))} shards:{len(data.train)} "
            f"val_targets:{len(data.val.bytes)} val_bytes:{int(data.val.bytes.sum())} "
            f"val_documents:{len(data.val.documents) - 1} bytes_by:{data.byte_rule}",
            f"batch: {h.train_batch_tokens} tokens = {accumulation(h, world)} x {world.size} ranks "
            f"x {h.micro_batch_tokens}"):
        log(line)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far, on the GPU or in all; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    linux = sys.platform == "linux"    # elsewhere in other units, or not at all
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if linux else 0


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):    # not Linux
        if found := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M):
            return f"{found[1].strip()} ({torch.get_num_threads()} threads)"
    return platform.processor() or "cpu"


def conclude(h: Hyperparameters, world: World, model: GPT, trained: Trained, clock_s: float,
             sizes: dict[str, int], scores: dict[str, dict[str, float]], seconds: dict[str, float],
             log: Log) -> dict[str, Any]:
    """Writes the table of scores and result.json, marked with the rules that the run breaks; raises
    `Refusal` afterwards if the artifact is over the budget."""
    tokens = trained.steps * h.train_batch_tokens
    violations = [sentence for broken, sentence in (
        (h.prequant_ttt_epochs and h.prequant_ttt_data != "train",
         f"rule C3: PREQUANT_TTT_DATA={h.prequant_ttt_data} learns validation text before its "
         "score"),
        (sizes["total"] > h.budget_bytes,
         f"bytes: {sizes['total']} is over BUDGET_BYTES={h.budget_bytes}"),
        (0 < h.max_wallclock_seconds < clock_s,
         f"time: {clock_s:.2f} s of training data is over MAX_WALLCLOCK_SECONDS="
         f"{h.max_wallclock_seconds:g}"),
        (trained.resumed and h.max_wallclock_seconds,
         f"time: resumed at step {trained.resumed}, which the clock cannot show")) if broken]
    result = dict(
        run_id=h.run_id, seed=h.seed, recipe=h.recipe, changed_knobs=h.changed(), knobs=asdict(h),
        device=device_name(world.device), world_size=world.size, torch=torch.__version__,
        params=sum(p.numel() for p in model.parameters()), steps=trained.steps,
        train_seconds=round(trained.seconds, 3), train_tokens=tokens,
        tokens_per_second=round(tokens / max(trained.seconds, 1e-9), 1), bytes=sizes, scores=scores,
        seconds={name: round(s, 3) for name, s in seconds.items()}, compliant=not violations,
        violations=violations, peak_memory_bytes=peak_bytes(world.device))
    log("score          val_loss     val_bpb      seconds")
    for name, s in scores.items():
        log(f"{name:14} {s['val_loss']:.8f}   {s['val_bpb']:.8f}   {s['seconds']:.1f}")
    log("RESULT " + json.dumps(result))
    if world.main:    # the last file to appear: a run is finished when it is there
        write_atomically(log.folder / "result.json", json.dumps(result, indent=1).encode())
        for path in checkpoints(log.folder):
            path.unlink()
    cure = ("raise MATRIX_CLIP_SIGMAS or search steps" if h.step_search == "uniform" else
            "this is the smallest possible size of this model")
    require(sizes["total"] <= h.budget_bytes, f"BUDGET_BYTES={h.budget_bytes}: code + artifact are "
            f"{sizes['total']} bytes; all is in {log.folder}, but it cannot be submitted: {cure}")
    return result


def named_run(h: Hyperparameters, world: World) -> Hyperparameters:
    """The hyperparameters with the run's name, one for all ranks: RUN_ID, or time, recipe, seed and
    a number where that is taken; `Refusal` where this rank's knobs are not those of rank 0, as
    nodes may be started apart."""
    theirs, run_id, numbers = world.share(h.changed()), h.run_id, itertools.count(2)
    odd = sorted(h.changed().items() ^ theirs.items())
    require(not odd, f"rank 0 has other knobs, here or there {odd}: give all the same")
    name = fresh = f"{time.strftime('%Y%m%d-%H%M%S')}-{h.recipe.replace(',', '+')}-seed{h.seed}"
    while world.main and not run_id:
        os.makedirs(h.logs_dir or ".", exist_ok=True)    # a broken link would seem a taken name
        try:    # made here and now, so that no other start can have the name too
            (Path(h.logs_dir) / name).mkdir()
            run_id = name
        except FileExistsError:
            name = f"{fresh}-{next(numbers)}"
    return replace(h, run_id=world.share(run_id))


def evaluate(arguments: Sequence[str], world: World, env: Mapping[str, str]) -> None:
    """The verb `eval ARTIFACT`: scores it again in this process; scoring knobs come from the
    artifact, then from the environment. Prints the same lines as the run that made it."""
    path = Path(*arguments[:1])
    require(len(arguments) == 1 and path.is_file(), "eval needs one file, such as "
            f"logs/<RUN_ID>/model.bin; got {' '.join(arguments)!r}")
    log, (shipped, stored) = Log(world), unpack(path.read_bytes(), str(path))
    # an artifact holds all that its run turned: stronger than a recipe, weaker than a variable
    h = Hyperparameters.from_env({n: v for n, v in env.items() if n != "RECIPE"},
                                 base=shipped.changed() | dict(eval_budget_s=0.0))
    for name in MODEL_KNOBS:
        mine, made = getattr(h, name), getattr(shipped, name)
        require(mine == made, f"{name.upper()}={mine} contradicts {path}, which was made with "
                f"{made}; leave it unset")
    with log.awake():
        data, model = find_dataset(h, world, log), build_model(h, world)
        model.compile(compile_mode(h, world.device, log))
        load_stored(model, stored)
        scores = measured_scores(model, data, world, log, packed=True)
    log("RESULT " + json.dumps(dict(artifact=str(path), bytes=path.stat().st_size, scores=scores)))


VERBS = ("data", "eval", "submit", "verify", "report", "sweep")
TOOLS: dict[str, Callable[[list[str], Mapping[str, str]], int]] = {}    # section 16 fills it


def start(world: World, env: Mapping[str, str]) -> None:
    """A run of the knobs in the environment; without RECIPE a packed script repeats its own."""
    default = "run" if "run" in RECIPES else "record" if world.device.type == "cuda" else "demo"
    h = Hyperparameters.from_env(env, default, note=(log := Log(world)))
    if h.fused_kernels and (trouble := kernels_trouble()):
        log(f"kernels:plain ({trouble})")
        h = replace(h, fused_kernels=False)
    if default == "demo" and not env.get("RECIPE"):
        log("recipe: no CUDA device was found; RECIPE=demo is used (set RECIPE to choose)")
    with log.awake():
        watch = Clock(world)
        data = preflight(h, world, log)
        h = named_run(h, world)
        log.claim(Path(h.logs_dir) / h.run_id)
        run(h, world, log, data, watch.read_s())


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Obeys the command line; returns the exit status, which is 2 after a `Refusal` or a signal."""
    with lasting_output():
        before = heed(interrupt)
        try:
            if arguments and arguments[0] in ("--help", "-h", "help"):
                print(help_text(*arguments[1:2]))
                return 0
            verb = arguments[0] if any(arguments) else "sweep" if env.get("SWEEP") else ""
            require(verb in VERBS or not any(arguments), f"unknown verb {verb!r}" + nearest(
                verb, VERBS) + f"; expected {', '.join(VERBS)}, --help, or nothing for a run")
            if verb not in ("", "eval"):
                require(TOOLS, f"{verb}: not in this packed script; use the readable train_gpt.py")
                empty = [word for word in arguments if word.endswith("=--")]    # argparse: a list
                require(not empty, f"{verb}: {' '.join(empty)}: expected a value, not --")
                return TOOLS[verb](list(arguments[1:]), env)
            world = World.from_env(env)
            tune_process(world.device)
            if verb:
                evaluate(arguments[1:], world, env)
            else:
                start(world, env)
            world.leave()
            return 0
        except (Refusal, OSError, KeyboardInterrupt) as error:
            return complain(error, env)
        except (MemoryError, RuntimeError) as error:
            if not re.search("MemoryE|llocate memory|of memory|bad_alloc|new thread", repr(error)):
                raise
            return complain("too little memory, which MICRO_BATCH_TOKENS and EVAL_BATCH_TOKENS "
                            f"decide, or too few threads ({brief(error)})", env)
        finally:
            restore_signals(before)


# >>> not packed
# ==================================================================================================
# 16. Tools
# Verbs beside a run, none of them packed: `submit` makes a records folder of finished runs,
# `verify` reviews one as a stranger would, `report` compares runs, `sweep` makes a grid of them.
# All read what a run left, as `Evidence`, and never change it. A review is a list of `Finding`s:
# only where all that was written is right is the script loaded, in a process listened to.
# ==================================================================================================
CAP_BYTES = 16_000_000      # decimal, packed code and artifact together
TRACK_SECONDS = 600.0       # for training, and once more for scoring, in the record track
RECORD, NON_RECORD = "10min_16mb", "non_record_16mb"
ABOUT = ("track", "name", "author", "github_id", "date", "blurb")    # what people say of it
PROBE_SECONDS = 60.0    # for the C2 check, all tokens of a vocabulary one after the other
BEFORE_UPDATE = "enforced by Ledger, proven by tests/test_ttt.py"
# Names that a script has no business with. Of sockets, which ranks need, `listen` hears.
FORBIDDEN = {"eval", "exec", "compile", "globals", "pickle", "torch.load", "np.load", "os.system",
             "urllib", "requests", "http", "marshal", "dill"}
# What the tools read of a RESULT line: the type of every field, or its own fields.
RESULT_FORM = dict(
    seed=int, recipe=str, knobs=dict, changed_knobs=dict, device=str, world_size=int, torch=str,
    steps=int, train_seconds=float, tokens_per_second=float, scores=dict, compliant=bool,
    violations=list, seconds=dict.fromkeys(("train", "adaptation", "total"), float),
    bytes=dict.fromkeys(("model", "code", "total", "limit"), int))
SCORE_FORM = dict(val_loss=float, val_bpb=float, tokens=int, bytes=int, seconds=float)


class Finding(NamedTuple):
    """One line of a review: what it belongs to, whether it is as it must be, what was seen."""

    group: str
    good: bool
    text: str
    run: str = ""    # the name of the run that it is about, with a colon


def bad(findings: Iterable[Finding]) -> list[str]:
    """What is wrong, as text."""
    return [f"{f.run}{f.group}: {f.text}" for f in findings if not f.good]


@dataclass(frozen=True)
class Evidence:
    """What is known of one finished run, in its own folder or in a records folder."""

    name: str    # as messages call it
    log: str
    result: dict[str, Any]
    artifact: Path
    code: Path    # the packed script that was counted
    readable: Path    # its source
    documents: dict[str, Path]    # score -> file of its table
    tables: dict[str, np.ndarray]    # (documents, 3) targets, bytes, nats, of files that are there

    @property
    def final(self) -> str:
        """The score that counts: the last one of the pipeline."""
        return [name for name in SCORES if name in self.result["scores"]][-1]

    @property
    def score(self) -> dict[str, float]:
        """The entry of the final score."""
        return self.result["scores"][self.final]

    @property
    def clock_s(self) -> float:
        """Seconds on the training clock, adaptation included."""
        return self.result["seconds"]["train"] + self.result["seconds"]["adaptation"]

    def said(self, pattern: str) -> list[Any]:
        """All places of the log that match, or their groups."""
        return re.findall(pattern, self.log, re.M)

    def knobs(self, **others: Any) -> Hyperparameters:
        """Its hyperparameters but for `others`; raises `Refusal` where this script has no such."""
        return typed_knobs(self.result["knobs"] | others, self.name)


def read_json(place: Path | str, text: str | None = None) -> Any:
    """What a file, or some text of it, says as JSON; raises `Refusal` that names the file."""
    with refusing(f"{place}: not JSON", ValueError, RecursionError):
        return json.loads(place.read_bytes() if text is None else text)


def fits(value: Any, form: Any) -> bool:
    """True for a value of the type `form`, or with all fields of it; numbers must be below 2^53."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(n), f) for n, f in form.items())
    return isinstance(value, form) and (form not in (int, float) or abs(value) < 1 << 53)


def read_documents_nats(path: Path) -> np.ndarray:
    """(documents, 3) targets, bytes and nats of each document; raises `Refusal` if damaged."""
    head, *lines = path.read_text(errors="replace").splitlines() or [""]
    table = np.full((1, 3), -1.0)
    with contextlib.suppress(ValueError):
        table = np.array([line.split() for line in lines], float).reshape(len(lines), 3)
    require(head == "targets bytes nats" and lines and ((table >= [1, 0, -1]) & (table < 1e15))
            .all(), f"{path}: not a table of targets, bytes and nats")
    return table


def read_evidence(log: Path, name: str, mark: str, readable: Path) -> Evidence:
    """The run of a log's last RESULT line and the files beside it, whose names bear `mark`; raises
    `Refusal` where a field is missing."""
    text, folder = log.read_text(encoding="utf-8", errors="replace"), log.parent
    lines = re.findall(r"^RESULT (.*)$", text, re.M)
    require(lines, f"{log}: no RESULT line, the run is not finished")
    result = read_json(log, lines[-1])
    broken = [n for n, form in RESULT_FORM.items() if not fits(result, {n: form})]
    if not broken:
        broken = [f"score {n}" for n, s in result["scores"].items() if not fits(s, SCORE_FORM)]
        broken += [] if set() < set(result["scores"]) <= set(SCORES) else ["score"]
    require(not broken, f"{log}: the RESULT line has no complete {', '.join(broken)}")
    documents = {n: folder / f"documents{mark}_{n}.txt" for n in result["scores"]}
    tables = {n: read_documents_nats(path) for n, path in documents.items() if path.exists()}
    return Evidence(name, text, result, folder / f"model{mark}.bin", folder / "train_gpt.py",
                    readable, documents, tables)


def read_run(folder: Path) -> Evidence:
    """A run's folder; raises `Refusal` where it is unfinished or broken."""
    require(folder.is_dir(), f"{folder}: there is no such folder")
    result = folder / "result.json"
    require(result.exists(), f"{folder}: no result.json, the run is not finished")
    e = read_evidence(folder / "log.txt", str(folder), "", Path(SCRIPT))
    require(e.result == read_json(result),
            f"{folder}: result.json is not what the log's last line says")
    return e


def read_runs(folders: Iterable[Path]) -> tuple[list[Evidence], list[str]]:
    """The finished runs among the folders, and what is wrong with the others."""
    runs, broken = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (Refusal, OSError) as error:
            broken.append(str(error))
    return runs, broken


def read_record(folder: Path) -> list[Evidence]:
    """The runs of a records folder, by its logs in the order of their seeds; raises `Refusal`."""
    logs = sorted((int(m[1]), path) for path in folder.glob("train_seed*.log")
                  if (m := re.fullmatch(r"train_seed(\d+)\.log", path.name)))
    require(logs, f"{folder}: neither a run (result.json) nor a records folder (train_seed*.log)")
    runs = [read_evidence(log, log.name, f"_seed{seed}", folder / "train_gpt_readable.py")
            for seed, log in logs]
    for (seed, log), e in zip(logs, runs):
        require(e.result["seed"] == seed, f"{log}: the log of SEED={e.result['seed']}")
    return runs


# -- what a log must say ---------------------------------------------------------------------------
def check_run(e: Evidence, track: str | None) -> list[Finding]:
    """What a log says agrees with itself, with the files beside it, and with the limits: catches
    edited numbers, missing scores, exchanged files, code not counted. Whether the documents
    are all there are is for `check_scores` and `check_data` to see."""
    r, h, scores, wanted = e.result, e.knobs(), e.result["scores"], wanted_scores(e.knobs())
    lines = dict(e.said(r"^final_(\w+)_exact (val_loss:\S+ val_bpb:\S+)"))
    mine = {n: "val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}".format(**scores[n]) for n in scores}
    knobs = [read_json(e.name, line) for line in e.said(r"^knobs:(.*)$")[-1:]]
    steps = e.said(r"^step:(\d+)/\d+ train_loss")[-1:]
    model, code, total, _ = (r["bytes"][n] for n in RESULT_FORM["bytes"])
    counted = e.said(r"^Total submission size \w+: (\d+) bytes")[-1:] == [str(total)]
    limit_s, last_s = h.max_wallclock_seconds, e.score["seconds"]
    found = [
        ("log", list(scores) == wanted, f"scores complete: {', '.join(wanted)}"),
        ("log", lines == mine, "the lines final_*_exact and the RESULT line agree"),
        ("log", knobs == [r["knobs"]] and r["changed_knobs"] == h.changed(),
         "the knobs in it are those of the RESULT"),
        ("log", not r["steps"] or steps == [str(r["steps"])], f"{r['steps']} steps"),
        ("rules", r["compliant"] and not r["violations"],
         "compliant" if r["compliant"] else f"not compliant: {r['violations']}"),
        ("bytes", counted and total == model + code, f"total {total} = {model} + {code}"),
        ("bytes", total <= CAP_BYTES, f"total {total:,} of {CAP_BYTES:,} bytes")]
    for path, said in ((e.artifact, model), (e.code, code)):
        size = path.stat().st_size if path.is_file() else None
        found.append(("bytes", size == said, f"{path.name}: {size} bytes, {said} in the log"))
    try:
        made, ran = unpack(e.artifact.read_bytes(), e.artifact.name)[0].changed(), h.changed()
        by = "the knobs of the log" if made == ran else f"other knobs: {made}, not {ran}"
        found.append(("bytes", made == ran, f"{e.artifact.name}: checksum right, made by {by}"))
    except (OSError, Refusal) as error:
        found.append(("bytes", False, brief(error)))
    for name, s in scores.items():
        table, nats_said = e.tables.get(name, np.zeros((0, 3))), s["val_loss"] * s["tokens"]
        targets, size, nats = table.sum(0)
        bpb = nats_said / max(s["bytes"], 1) / math.log(2)
        same = (targets, size) == (s["tokens"], s["bytes"])
        found += [("log", math.isclose(bpb, s["val_bpb"], rel_tol=1e-9),
                   f"{name}: val_bpb {s['val_bpb']:.8f} = val_loss x tokens / bytes / ln 2"),
                  ("log", same and math.isclose(nats, nats_said, rel_tol=1e-6),
                   f"{len(table)} documents of {e.documents[name].name} add up to {name}")]
    if limit_s:
        found.append(("time", e.clock_s <= limit_s,
                      f"{e.clock_s:.2f} s on the training clock of {limit_s:g} s"))
    if track == RECORD:
        found += [("time", 0 < limit_s <= TRACK_SECONDS,
                   f"MAX_WALLCLOCK_SECONDS={limit_s:g} of {TRACK_SECONDS:g} s"),
                  ("time", last_s <= TRACK_SECONDS,
                   f"{e.final} took {last_s:.1f} of {TRACK_SECONDS:g} s")]
    return [Finding(*row, f"{e.name}: ") for row in found]


def unpacked(raw: bytes, place: object) -> str:
    """The text inside a packed script, which is read and not run; `Refusal` for another file."""
    # parsers and coders have error types of their own
    with refusing(f"{place}: not a packed script", Exception):
        body = max((n.value for n in ast.walk(ast.parse(raw)) if isinstance(n, ast.Constant)
                    and isinstance(n.value, str)), key=len, default="").encode("latin-1")
        text = (brotli if b"brotli.decompress" in raw else lzma).decompress(body).decode()
        return text if ast.parse(text) else ""


def check_code(e: Evidence) -> Iterator[Finding]:
    """The counted bytes use nothing forbidden, and are what the readable source packs to. The list
    of names finds mistakes, not malice, which can spell a name otherwise; `listen` hears that."""
    raw = e.code.read_bytes()
    text = unpacked(raw, e.code)
    nodes = [*ast.walk(ast.parse(text))]
    names = {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
    names |= {a.name.split(".")[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))
              for a in n.names}
    used = ", ".join(sorted(names & FORBIDDEN))
    yield Finding("code", not used,
                  f"{len(text):,} characters unpacked, which use {used or 'nothing forbidden'}")
    same, knobs = False, e.knobs(recipe=e.result["recipe"])
    with contextlib.suppress(SyntaxError, ValueError):    # no Python, or not UTF-8
        same = running_source(e.readable, knobs)[1] == raw
    yield Finding("code", same, f"{e.readable.name} " + (
        f"packs to the {len(raw):,} bytes that were counted" if same else
        "does not pack to the counted bytes (another source, Python or python-minifier)"))


def check_written(runs: Sequence[Evidence], track: str | None) -> Iterator[Finding]:
    """All that can be seen without running any code. Runs with a track are at least three seeds of
    one configuration, code and machine: a mean over others is of no experiment (#2124)."""
    seeds, (first, *others) = [e.result["seed"] for e in runs], runs
    alike = [n for n in first.result["knobs"] if n not in (*PLACES, "seed")]
    settings = lambda e: {n.upper(): e.result["knobs"].get(n) for n in alike} | {
        n: e.result[n] for n in ("device", "world_size", "torch")}
    if track is not None:
        yield Finding("runs", len(runs) >= 3, f"{len(runs)} runs, at least 3 are needed")
        yield Finding("runs", len(set(seeds)) == len(seeds), f"seeds {seeds}")
    for e in others:
        mine = settings(e)
        mixed = [f"{n}={mine[n]} not {v}" for n, v in settings(first).items() if mine[n] != v]
        yield Finding("runs", not mixed,
                      ": ".join([f"{e.name} is configured as {first.name}", *mixed]))
        yield Finding("runs", e.code.read_bytes() == first.code.read_bytes(),
                      f"{e.name} ran the code of {first.name}")
    yield from check_code(first)
    for e in runs:
        yield from check_run(e, track)


# -- submit ----------------------------------------------------------------------------------------
def welch(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, float]:
    """(t, degrees of freedom, one-sided p) that the mean of `a` lies below that of `b`, each given
    by mean, standard deviation and count. With x = sqrt(dof) tan(angle) the density of Student's t
    is cos(angle)^(dof - 1), summed here by the midpoint rule from -90 degrees on."""
    shares = [std**2 / n for _, std, n in (a, b)]
    if not sum(shares):
        return math.copysign(math.inf, a[0] - b[0]), math.inf, float(a[0] >= b[0])
    t = (a[0] - b[0]) / math.sqrt(sum(shares))
    dof = 1 / sum((v / sum(shares))**2 / (n - 1) for v, (_, _, n) in zip(shares, (a, b)))
    middles = (np.arange(200_000) + 0.5) / 200_000
    area = lambda width: width * np.mean(np.sin(width * middles)**(dof - 1))
    return t, dof, float(area(math.pi / 2 + math.atan(t / math.sqrt(dof))) / area(math.pi))


def sourced(knobs: Mapping[str, Any]) -> list[tuple[str, Any, str, str]]:
    """(knob, value, meaning, source) of every knob in use whose meaning cites where it is from."""
    return [(f.name.upper(), knobs[f.name], f.metadata["meaning"], ", ".join(cited))
            for f in fields(Hyperparameters)
            if (cited := re.findall(r"#\d+|arXiv:? ?[\d.]+\d", f.metadata["meaning"]))
            and knobs.get(f.name)]


def submission(runs: Sequence[Evidence], about: Mapping[str, Any]) -> dict[str, Any]:
    """submission.json, with `about` for what ABOUT names."""
    runs, seeds = sorted(runs, key=lambda e: e.result["seed"]), {}
    for e in runs:
        r, s, scores = e.result, e.score, e.result["scores"]
        seeds[str(r["seed"])] = entry = dict(
            val_loss=s["val_loss"], val_bpb=s["val_bpb"], artifact_bytes=r["bytes"]["total"],
            steps=r["steps"], step_avg_ms=round(r["train_seconds"] * 1e3 / max(r["steps"], 1), 3),
            train_time_s=r["train_seconds"], eval_time_s=s["seconds"])
        before = scores.get("sliding", scores.get("quantized"))
        if before and e.final == "ttt":
            entry |= dict(pre_ttt_val_bpb=before["val_bpb"],
                          ttt_gain_bpb=before["val_bpb"] - s["val_bpb"])
    first, column = runs[0].result, lambda name: [entry[name] for entry in seeds.values()]
    deviation = lambda name: float(np.std(column(name), ddof=1))
    return dict(
        **about,
        val_loss=float(np.mean(column("val_loss"))), val_loss_std=deviation("val_loss"),
        val_bpb=float(np.mean(column("val_bpb"))), val_bpb_std=deviation("val_bpb"),
        seeds=[e.result["seed"] for e in runs], seed_results=seeds,
        bytes_total=max(column("artifact_bytes")), bytes_code=first["bytes"]["code"],
        artifact_bytes_mean=float(np.mean(column("artifact_bytes"))),
        artifact_bytes_max=max(column("artifact_bytes")),
        hardware=f"{first['world_size']}x {first['device']}", pytorch_version=first["torch"],
        technique_summary="; ".join(
            f"{name}={value} ({source})" for name, value, _, source in sourced(first["knobs"])),
        compliance=dict(
            training_under_600s=all(e.clock_s <= TRACK_SECONDS for e in runs),
            artifact_under_16000000_bytes=max(column("artifact_bytes")) <= CAP_BYTES,
            eval_under_600s=max(column("eval_time_s")) <= TRACK_SECONDS,
            score_before_update=BEFORE_UPDATE))


def markdown(table: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, in columns of one width; its first row holds the titles."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table)]
    head, *lines = ("| " + " | ".join(str(cell).ljust(n) for cell, n in zip(row, widths)) + " |"
                    for row in table)
    return "\n".join([head, "|" + "".join("-" * (n + 2) + "|" for n in widths), *lines])


def record_readme(entry: Mapping[str, Any], runs: Sequence[Evidence], against: str) -> str:
    """The draft of a records folder's README: scores, ledgers, components, conditions, command."""
    r = runs[0].result
    seed, ranks = r["seed"], r["world_size"]
    changed = run_block({n: v for n, v in r["changed_knobs"].items() if n != "seed"})
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    stages = r["seconds"] | {f"score {n}": s["seconds"] for n, s in r["scores"].items()}
    sections = {
        "Scores": markdown(report_table(runs)),
        f"Bytes (seed {seed})": markdown(
            [("part", "bytes"), *runs[0].said(r"^bytes:(\w+) (\d+)\b"),
             ("packed code", r["bytes"]["code"]), ("total", r["bytes"]["total"])]),
        f"Seconds (seed {seed})": markdown([("stage", "s"), *stages.items()]),
        "Components": markdown([("knob", "value", "meaning", "source"), *sourced(r["knobs"])]),
        "Changed from the defaults": f"`{changed}`",
        "Compliance":
        "`python train_gpt_readable.py verify .` checks C1 to C4, clock and bytes.",
        "Reproduce":
        f"```\nSEED={seed} RECIPE=record {changed} {start} train_gpt.py\n```\n"
        "`train_gpt.py` is the packed script whose bytes are counted, `train_gpt_readable.py` its "
        "source, `model_seed*.bin` the artifacts."}
    return "\n\n".join([
        f"# {entry['name']}",
        f"**val_bpb {entry['val_bpb']:.5f}** (mean of {len(runs)} seeds, sample standard "
        f"deviation {entry['val_bpb_std']:.5f}), {entry['bytes_total']:,} bytes at most, "
        f"{entry['hardware']}.", *filter(None, [against]),
        *(f"## {title}\n{text}" for title, text in sections.items())]) + "\n"


def compare(entry: Mapping[str, Any], score: Mapping[str, float], against: str) -> str:
    """The difference to `mean,std,n` of another record, in BPB and nats, with Welch's test."""
    with refusing(f"--against {against}: expected mean,std,n of another record, such as "
                  "1.05651,0.00036,3", ValueError):
        mean, std, count = map(float, against.split(","))
        if not (abs(mean) < 100 and 0 <= std < 100 and 2 <= count <= 1e6):
            raise ValueError("out of range")
    t, dof, p = welch((entry["val_bpb"], entry["val_bpb_std"], len(entry["seeds"])),
                      (mean, std, int(count)))
    gap = entry["val_bpb"] - mean
    return (f"Against {mean:.5f} (std {std:.5f}, n {int(count)}): {gap:+.5f} BPB, "
            f"{gap * score['bytes'] / score['tokens'] * math.log(2):+.5f} nats per token; Welch's "
            f"test, one side: t {t:.2f}, {dof:.1f} degrees of freedom, p {p:.4g}.")


def submit(arguments: list[str], env: Mapping[str, str]) -> int:
    """The verb `submit`: a records folder of three or more runs that differ in their seed only;
    raises one `Refusal` that says of every run what is wrong with it."""
    parser = argparse.ArgumentParser("train_gpt.py submit", description="runs to a records folder")
    parser.add_argument("runs", nargs="+", type=Path, help="folders logs/<RUN_ID> of three seeds")
    parser.add_argument("--to", required=True, type=Path, help="new folder")
    parser.add_argument("--name", required=True, help="title of the submission")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--blurb", default="", help="one sentence")
    parser.add_argument("--track", choices=(RECORD, NON_RECORD), help="else chosen by hardware")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--against", default="", help="mean,std,n of the record to beat")
    o = parser.parse_args(arguments)
    with delivered(o.to) as folder:
        runs, wrong = read_runs(o.runs)
        if not wrong:
            runs.sort(key=lambda e: e.result["seed"])
            large = runs[0].result["world_size"] == 8 and "H100" in runs[0].result["device"]
            o.track = o.track or (RECORD if large else NON_RECORD)
            wrong = bad(check_written(runs, o.track))
        require(not wrong, "; ".join(wrong))
        entry = submission(runs, {name: getattr(o, name) for name in ABOUT})
        against = compare(entry, runs[0].score, o.against) if o.against else ""
        copies = {"train_gpt.py": runs[0].code, "train_gpt_readable.py": runs[0].readable}
        for e in runs:
            mark = f"_seed{e.result['seed']}"
            copies[f"model{mark}.bin"] = e.artifact
            copies |= {f"documents{mark}_{name}.txt": path for name, path in e.documents.items()}
            (folder / f"train{mark}.log").write_text(e.log, encoding="utf-8")
        for name, path in copies.items():
            shutil.copyfile(path, folder / name)
        # What is installed, but the torch of the runs; the name of what is half removed is None.
        found = {str(d.name).lower(): d.version for d in importlib.metadata.distributions()}
        found["torch"] = entry["pytorch_version"].split("+")[0]
        names = ("torch", "numpy", "sentencepiece", "zstandard", "brotli", "python-minifier")
        needed = "".join(f"{n}=={found[n]}\n" for n in names if n in found)
        for name, text in (("submission.json", json.dumps(entry, indent=2) + "\n"),
                           ("README.md", record_readme(entry, runs, against)),
                           ("requirements.txt", needed)):
            (folder / name).write_text(text, "utf-8", "backslashreplace")
    print(f"{o.to}: val_bpb {entry['val_bpb']:.8f} std {entry['val_bpb_std']:.8f} of seeds "
          f"{entry['seeds']}, {entry['bytes_total']:,} bytes, track {o.track}", against,
          sep="\n" if against else "")
    return 0


# -- verify ----------------------------------------------------------------------------------------
def check_record(folder: Path, entry: Mapping[str, Any],
                 runs: Sequence[Evidence]) -> Iterator[Finding]:
    """A records folder lacks no part, and submission.json is as it is made again from the logs."""
    wanted = [folder / n for n in ("README.md", "requirements.txt", "train_gpt.py",
                                   "train_gpt_readable.py")]
    wanted += [path for e in runs for path in (e.artifact, *e.documents.values())]
    missing = ", ".join(path.name for path in wanted if not path.is_file())
    yield Finding("files", not missing, f"missing: {missing}" if missing else "complete")
    if not missing:
        again = submission(runs, {name: entry.get(name) for name in ABOUT})
        differ = ", ".join(n for n in {**entry, **again} if entry.get(n) != again.get(n))
        yield Finding("files", not differ, "submission.json: " + (
            f"{differ} not as in the logs" if differ else "every number follows from the logs"))


def load_script(path: Path, name: str) -> Any:
    """The script at `path` as a module called `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listen() -> list[str]:
    """A list that gets the name of every file, socket and process which this process opens from now
    on. What goes through Python is heard, not what a C library does by itself."""
    heard = []

    def hear(event: str, arguments: tuple) -> None:
        """Keeps what belongs to a file, a socket or a process."""
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            heard.append(os.path.abspath(os.fsdecode(arguments[0])))
        elif event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork",
                               "os.posix_spawn", "ctypes.dlopen")):
            heard.append(f"{event} {str(arguments)[:60]}")

    sys.addaudithook(hear)    # which stays for the life of the process
    return heard


def stream_nats(module: Any, model: Any, name: str, tokens: np.ndarray, sizes: np.ndarray,
                quiet: bool = True) -> np.ndarray:
    """Nats (N,) of the targets of a stream of tokens (N + 1,), scored as in a run of `module`."""
    world = module.World(0, 1, next(model.parameters()).device)
    val, log = module.Validation.of(tokens, sizes), module.Log(world, quiet=quiet)
    return module.score_by_name(name, model, val, world, log)[1].targets_nats()


def check_causality(module: Any, model: Any, name: str, val: Any) -> Iterator[Finding]:
    """C1 and C3: with every later token replaced, scores before a place in mid-chunk stay; they do
    not where attention or a cache looks ahead, or a chunk is learned from before it is booked."""
    count = min(6 * model.h.eval_seq_len, len(val.bytes))
    tokens, sizes = val.tokens[:count + 1].numpy(), val.bytes[:count]
    rng, before = np.random.default_rng(0), stream_nats(module, model, name, tokens, sizes)
    # GPUs may add in another order from run to run; on CPUs not one bit may differ.
    slack, worst = (1e-4 if next(model.parameters()).is_cuda else 0.0), 0.0
    for cut in (int(count * share) for share in (0.33, 0.52, 0.81)):
        later = rng.integers(2, model.h.vocab_size, count - cut)
        later[tokens[cut + 1:] == BOS] = BOS    # documents stay where they are
        after = stream_nats(module, model, name, np.append(tokens[:cut + 1], later), sizes)
        worst = max(worst, float(np.abs(after[:cut] - before[:cut]).max()))
    for group in ("C1", "C3") if name == "ttt" else ("C1", ):
        yield Finding(group, worst <= slack, f"{name}: later tokens replaced at 3 of {count} "
                      f"places move earlier scores by {worst:.3g} nats at most")


def check_normalised(module: Any, model: Any, name: str, val: Any) -> Iterator[Finding]:
    """C2: the probabilities of all V tokens after the same others, each scored as if it were the
    real one, sum to 1 (what looks up the real one only does not, #886): a document for each token
    where those stand apart, else by the whole scorer if that takes a minute, else by the model."""
    h, V, alone, sizes = model.h, model.h.vocab_size, apart(name, model.h), val.bytes
    # The last one ends a window, or learners have made a step before it.
    count = min(h.ttt_stream_chunk + 4 if alone else h.eval_seq_len + h.eval_stride, len(sizes))
    before, sizes, begin_s = val.tokens[:count].numpy(), sizes[:count], time.perf_counter()
    last = lambda token: stream_nats(module, model, name, np.append(before, token), sizes)[-1]
    what = f"{name}: probabilities of all {V} tokens after the same {count} others"
    if alone:    # in one document, opened once
        before = np.append(BOS, np.where(before == BOS, BOS + 1, before)[1:])
        stream = np.column_stack([np.tile(before, (V, 1)), np.arange(V)]).ravel()
        model.retune(eval_batch_tokens=64 * h.eval_batch_tokens)
        nats = stream_nats(module, model, name, np.append(stream, BOS), np.ones(len(stream)))
        nats = nats[count - 1::count + 1]
    elif last(0) >= 0 and V * (time.perf_counter() - begin_s) < PROBE_SECONDS:
        nats = np.array([last(token) for token in range(V)])
    else:
        rows = torch.cat([val.tokens[:8].expand(V, -1), torch.arange(V)[:, None]], 1)
        rows, plan = rows.to(next(model.parameters()).device), module.depth_plan(h, looped=True)
        with torch.no_grad():
            nats = torch.cat([model.nats(x[:, :-1], x[:, 1:], plan)[:, -1]
                              for x in rows.split(256)]).cpu().numpy()
        what = f"model: probabilities of all {V} tokens (all of {name} would take too long)"
    total = float(np.exp(-nats.astype(float)).sum())
    yield Finding("C2", abs(total - 1) < 1e-3, f"{what} sum to {total:.6f}")


def sample_end(name: str, h: Any, documents: np.ndarray, count: int) -> int | None:
    """Targets of a beginning of the stream whose first `count` documents get the scores they get in
    the whole stream, at a whole number of strides; None where only the whole stream gives them."""
    N, end = int(documents[-1]), int(documents[min(count, len(documents) - 1)])
    if apart(name, h):
        return end
    if name == "ttt":
        return N if end == N else None
    T, stride = h.eval_seq_len, h.eval_stride if name == "sliding" else h.eval_seq_len
    return min(N, T + -(-max(0, end - T) // stride) * stride)


def check_scores(module: Any, model: Any, name: str, table: np.ndarray, val: Any,
                 count: int) -> Iterator[Finding]:
    """The first `count` documents get again what the run's table says of them, but for the rounding
    of other machines; where a score needs the whole stream, only if the sample is all of it."""
    starts = val.documents
    like = np.array_equal(table[:, 0], np.diff(starts)) and np.array_equal(
        table[:, 1], np.add.reduceat(val.bytes, starts[:-1]))
    yield Finding("C4", like, f"{name}: {len(table)} documents in the order and with the sizes of "
                  "the validation set")
    end = sample_end(name, model.h, starts, count)
    if not like or end is None:
        yield Finding("score", like, f"{name} needs all {len(table)} documents: not scored again "
                      f"here (--documents {len(table)} does)")
        return
    nats = stream_nats(module, model, name, val.tokens[:end + 1].numpy(), val.bytes[:end], False)
    whole = int(np.searchsorted(starts, end, "right")) - 1    # documents that end inside
    again = np.add.reduceat(nats[:starts[whole]], starts[:whole], dtype=float)
    targets, _, said = table[:whole].T
    mean, worst = abs(again.sum() - said.sum()) / targets.sum(), np.abs((again - said) / targets)
    yield Finding("score", mean < 2e-3 and worst.max() < 0.1,
                  f"{name}: {whole} documents scored again, {mean:.2g} nats per token from the "
                  f"log, {worst.max():.2g} in the worst document")


def check_data(ours: Dataset, theirs: Any, e: Evidence,
               texts: Sequence[str] | None) -> Iterator[Finding]:
    """Both scripts read one validation set with the same bytes, those of the raw text where given,
    and its documents do not stand in the training shards (#2127)."""
    val, s, total = ours.val, e.score, int(ours.val.bytes.sum())
    yield Finding("data", torch.equal(val.tokens, theirs.val.tokens),
                  f"{len(val.bytes)} targets, which the script reads in the order of the shards")
    yield Finding("data", np.array_equal(val.bytes, theirs.val.bytes),
                  f"{total} bytes of text by {ours.byte_rule}, the script counts "
                  f"{int(theirs.val.bytes.sum())}")
    yield Finding("data", (len(val.bytes), total) == (s["tokens"], s["bytes"]),
                  f"the log scored {s['tokens']} targets of {s['bytes']} bytes")
    if texts is not None:
        raw = [len(text.encode()) for text in texts]
        sizes = np.add.reduceat(val.bytes, val.documents[:-1]).tolist()
        yield Finding("data", raw == sizes, f"{sum(raw)} bytes in {len(raw)} raw documents, "
                      f"{sum(sizes)} counted in {len(sizes)}")
    hashes = lambda tokens: {d.tobytes() for d in np.split(
        tokens, np.flatnonzero(tokens == BOS)) if len(d) > 16}
    held = hashes(val.tokens.numpy().astype(np.uint16))
    shared = held & hashes(np.asarray(ours.train[0][:4_000_000]))
    yield Finding("data", len(shared) <= 0.05 * len(held), f"{len(shared)} of {len(held)} "
                  "validation documents stand in the beginning of the training shards")


def built(module: Any, e: Evidence, h: Any, device: torch.device) -> Any:
    """The model of the run's artifact, made by `module` for scoring by the knobs `h`."""
    model = module.build_model(h, module.World(0, 1, device))
    model.compile(module.compile_mode(h, device, print))
    module.load_stored(model, module.unpack(e.artifact.read_bytes())[1])
    return model


def examine(e: Evidence, env: Mapping[str, str], count: int, texts: Sequence[Path],
            heard: list[str], proven: bool = False) -> Iterator[Finding]:
    """What can be seen of a run by running the submitted code, `proven` if another run was of it;
    `heard` is of `listen`. The packed script must know nothing without weights: its loss is ln V.
    Scores come from the readable one, which packs to the same bytes, compiled as in the run."""
    packed = load_script(e.code, "packed_script")
    h = packed.Hyperparameters(**e.result["changed_knobs"])
    torch.manual_seed(0)
    ids = torch.randint(2, h.vocab_size, (2, min(h.train_seq_len, 64)))
    with torch.no_grad():
        loss, guess = float(packed.GPT(h)(ids, ids.roll(-1, 1))), math.log(h.vocab_size)
    yield Finding("code", abs(loss / guess - 1) < 0.1,
                  f"the packed script builds; untrained loss {loss:.3f}, ln V is {guess:.3f}")
    place = parse_knobs({n.upper(): env[n.upper()] for n in PLACES[2:5] if n.upper() in env})
    mine, theirs = e.knobs(**place, eval_budget_s=0.0), load_script(e.readable, "readable_script")
    h, device = theirs.Hyperparameters(**asdict(mine)), World.claim_device(0)
    data = find_dataset(mine, World(), str)
    other = theirs.find_dataset(h, theirs.World(0, 1, device), str)
    raw = list(read_documents(texts)) if texts else None
    if not texts and must_build(mine):    # the embedded corpus is its own raw text
        raw = [text for name, text in embedded_documents() if held_out(name)]
    yield from check_data(data, other, e, raw)
    tables = {n: table for n, table in e.tables.items() if n != "prequant"}    # has no artifact
    whole = built(theirs, e, h, device)
    count = count or max(1, int(np.searchsorted(data.val.documents, 10_000)) - 1)
    for name, table in tables.items():
        yield from check_scores(theirs, whole, name, table, other.val, count)
    if proven:
        return
    # The small one crosses borders of windows and chunks many times in a few hundred tokens.
    T = min(h.eval_seq_len, 32)
    sizes = dict.fromkeys(("eval_seq_len", "train_seq_len", "micro_batch_tokens",
                           "train_batch_tokens", "ttt_chunk_tokens"), T)
    small = built(theirs, e, replace(
        h, **sizes, eval_stride=max(1, min(h.eval_stride, T // 2)), eval_batch_tokens=4 * T,
        ttt_stream_chunk=max(1, T // 2), compile="off"), device)
    begin = len(heard)    # from here on, no file may be opened
    for name in tables:
        yield from check_causality(theirs, small, name, data.val)
    yield from check_normalised(theirs, small, e.final, data.val)
    # C1 allows nothing but the artifact and the tokens before a target.
    ours = (*sysconfig.get_paths().values(), sys.prefix, "/proc/", "/sys/", "/dev/")
    foreign = ", ".join(sorted({what for what in heard[begin:] if not what.startswith(ours)}))
    yield Finding("C1", not foreign, "files besides Python's own, sockets and processes opened "
                  f"while scoring: {foreign or 'none'}")


def verify(arguments: list[str], env: Mapping[str, str]) -> int:
    """The verb `verify`: a review, each line as soon as it is known; 0 if all passes, else 1. Code
    runs only if all that can be read is right, in a new process."""
    parser = argparse.ArgumentParser("train_gpt.py verify", description="review a submission")
    parser.add_argument("target", type=Path, help="records folder, or logs/<RUN_ID>")
    parser.add_argument("--documents", type=int, default=0, help="scored again; 0: 10,000 targets")
    parser.add_argument("--text", nargs="+", type=Path, default=[],
                        help="raw validation documents (.jsonl, .jsonl.zst, .txt)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)    # new process
    o = parser.parse_args(arguments)
    require(o.documents >= 0, f"--documents {o.documents}: expected 0 or more")
    log, findings, entry, is_run = Log(World()), [], {}, (o.target / "result.json").exists()
    runs = [read_run(o.target)] if is_run else read_record(o.target)
    if o.alone:
        heard = listen()
        with log.awake():
            for e in runs:
                log.begin(f"the review of {e.name}")
                for f in examine(e, env, o.documents, o.text, heard, e is not runs[0]):
                    log("FINDING " + json.dumps((f.group, bool(f.good), f.text, f"{e.name}: ")))
        return 0

    def tell(found: Iterable[Finding]) -> None:
        """Says each as it is made."""
        for f in found:
            findings.append(f)
            log(f"{'pass' if f.good else 'FAIL'}  {f.group!s:6} {f.run}{f.text}")

    if not is_run:
        entry = read_json(o.target / "submission.json")
        require(isinstance(entry, dict), f"{o.target / 'submission.json'}: expected an object")
        tell(check_record(o.target, entry, runs))
    if not bad(findings):
        tell(check_written(runs, None if is_run else entry.get("track") or ""))
    if not bad(findings):
        tell(in_new_process(arguments, env, log))
    wrong, total = len(bad(findings)), len(findings)
    log(f"{o.target}: {f'FAILS, {wrong} of' if wrong else 'passes all'} {total} checks")
    return int(wrong > 0)


def in_new_process(arguments: list[str], env: Mapping[str, str], log: Log) -> Iterator[Finding]:
    """What `examine` finds in a process of its own, which writes no byte code beside the code; what
    else it says is progress. That it dies, or finds nothing at all, is a finding too."""
    count, variables = 0, {n: v for n, v in env.items() if n not in ("RANK", "WORLD_SIZE", "SWEEP")}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            [sys.executable, "-B", SCRIPT, "verify", *arguments, "--alone"], env=variables,
            encoding="utf-8", errors="replace", stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            for line in process.stdout:
                if line.startswith("FINDING "):
                    with contextlib.suppress(ValueError, TypeError, RecursionError):
                        yield Finding(*json.loads(line[8:]))
                        count += 1
                elif log.due():
                    log.progress(line.rstrip())
            process.wait()
        finally:
            process.kill()    # where this process is stopped; else it has ended
        errors.seek(0)
        last = (errors.read().strip() or "no message").splitlines()[-1]
    if process.returncode or not count:
        yield Finding("code", False, f"it ended with status {process.returncode}: {last}")


# -- report ----------------------------------------------------------------------------------------
def report_table(runs: Sequence[Evidence]) -> list[list[Any]]:
    """Titles, then one row per run: the knobs that differ, BPB by stage, bytes, speed, seconds."""
    known, rows = [e.result["knobs"] for e in runs], []
    differing = [n for n, value in known[0].items()
                 if n not in PLACES and any(k.get(n) != value for k in known)]
    stages = [n for n in SCORES if any(n in e.result["scores"] for e in runs)]
    for e in runs:
        r = e.result
        bpb = {n: f"{s['val_bpb']:.5f}" for n, s in r["scores"].items()}
        rows.append({"run": e.artifact.parent.name} |
                    {n.upper(): r["knobs"].get(n, "-") for n in differing} |
                    {f"{n} bpb": bpb.get(n, "-") for n in stages} |
                    {"val_loss": f"{e.score['val_loss']:.5f}", "bytes": r["bytes"]["total"],
                     "steps": r["steps"], "tok/s": f"{r['tokens_per_second']:.0f}",
                     "train s": f"{r['train_seconds']:.1f}",
                     "eval s": f"{e.score['seconds']:.1f}",
                     "total s": f"{r['seconds']['total']:.1f}"})
    return [[*rows[0]], *([*row.values()] for row in rows)]


def draw(runs: Sequence[Evidence], matplotlib: Any) -> bytes:
    """Loss against steps and seconds of all runs, the best first: a PNG."""
    matplotlib.rc("text", parse_math=False)    # names of runs are no formulas
    figure = matplotlib.figure.Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
    for number, (e, colour) in reversed([*enumerate(zip(runs, colours))]):    # the best on top
        lines = e.said(r"^step:(\d+)/\d+ train_loss:(\d+\.?\d*|nan|inf) train_time:(\d+)ms")
        step, loss, ms = np.array(lines, float).reshape(-1, 3).T
        name = e.artifact.parent.name.encode(errors="replace").decode()    # of any bytes
        for ax, x in zip(axes, (step, ms / 1e3)):
            ax.plot(x, loss, color=colour, lw=1, label=name if number < 10 else None)
    ax.legend(fontsize="small", reverse=True, title="best first, dark to light")
    axes[0].set(xlabel="steps", ylabel="training loss (nats per token)")
    axes[1].set(xlabel="seconds of training")
    figure.savefig(picture := io.BytesIO(), format="png", dpi=100)
    return picture.getvalue()


def report(arguments: list[str], env: Mapping[str, str]) -> int:
    """The verb `report`: a table on the terminal, report.md and, with matplotlib, report.png."""
    parser = argparse.ArgumentParser("train_gpt.py report", description="compare runs")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders of those")
    parser.add_argument("--to", type=Path, help="folder of the report; else beside the first run")
    o = parser.parse_args(arguments)
    folders, first = [], o.runs[0]
    for path in o.runs:
        inside = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        folders += [path] if (path / "log.txt").exists() or not inside else inside
    runs, broken = read_runs(folders)
    runs.sort(key=lambda e: e.score["val_bpb"])
    table = markdown(report_table(runs)) if runs else ""
    print(table, end="\n" * bool(runs))
    for line in broken:
        print(f"not shown: {line}")
    require(runs, f"report: no finished run in {', '.join(map(str, o.runs))}")
    out = o.to or (first.parent if (first / "log.txt").exists() else first)
    out.mkdir(parents=True, exist_ok=True)
    if matplotlib := optional("matplotlib.figure") and optional("matplotlib"):
        write_atomically(out / "report.png", draw(runs, matplotlib))
    write_atomically(out / "report.md", "\n\n".join([
        f"# {len(runs)} runs, best first", table,
        *(f"Not shown: {line}" for line in broken),
        "![curves](report.png)" if matplotlib else
        "No pictures: the package matplotlib is not installed."]).encode(errors="backslashreplace"))
    print(f"report: {out / 'report.md'}" + " (install matplotlib for pictures)" * (not matplotlib))
    return 0


# -- sweep -----------------------------------------------------------------------------------------
LISTED = {"RECIPE", "SCORES", "TTT_TARGETS", "TRAIN_SEQ_SCHEDULE"}    # their values hold commas


def sweep_runs(env: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """RUN_ID -> environment of every run of SWEEP="A=1,2;B=x,y|z" (a bar: values hold commas)."""
    text, axes, runs = env["SWEEP"], {}, {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, values = part.partition("=")
        require(name in KNOBS and name != "RUN_ID",
                f"SWEEP: {name} is no knob to sweep" + nearest(name, KNOBS))
        points = values.removesuffix("|").split("|" if "|" in values else ",")
        require(name not in axes and all(points),
                f"SWEEP: {part!r}: expected NAME=value,value once for each name")
        require(len(points) == 1 or "|" in values or name not in LISTED, f"SWEEP: {part!r}: values "
                f"of {name} hold commas; put bars between them: {name}=a,b|c, or {name}=a,b|")
        axes[name] = points
    require(axes and math.prod(map(len, axes.values())) <= 1000,
            f"SWEEP={text!r}: expected NAME=value,value;NAME=value,value, of at most 1,000 runs")
    recipe = env.get("RECIPE") or ("record" if torch.cuda.is_available() else "demo")
    common = {n: v for n, v in env.items() if n != "SWEEP"} | dict(RECIPE=recipe)
    for point in itertools.product(*axes.values()):
        words = (re.sub(r"[^\w.+-]", "+", f"{n.lower()}{v}") for n, v in zip(axes, point))
        name = "-".join([env.get("RUN_ID") or "sweep", *words])
        if len(name) > 100:    # it becomes a folder's name
            name = f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        require(name not in runs, f"SWEEP={text}: {name} comes twice")
        runs[name] = common | dict(zip(axes, point), RUN_ID=name)
        Hyperparameters.from_env(runs[name])
    return runs


def sweep(arguments: list[str], env: Mapping[str, str]) -> int:
    """The verb `sweep`, also chosen by SWEEP: one run after the other, then the report; 1 if a run
    failed, 130 after Ctrl-C or SIGTERM. Runs with a result.json, their last file, are finished."""
    parser = argparse.ArgumentParser("train_gpt.py sweep", description="a grid of runs")
    parser.add_argument("--print", action="store_true", help="only print the commands")
    parser.add_argument("--nproc", type=int, default=1, help="processes of each run")
    o = parser.parse_args(arguments)
    require(o.nproc > 0, f"--nproc {o.nproc}: expected 1 or more")
    require(env.get("SWEEP"),
            "sweep: SWEEP is not set; expected SWEEP=\"MATRIX_LR=0.02,0.026;SEED=1,2,3\"")
    require("RANK" not in env,
            "SWEEP under torchrun: start it with python and sweep --nproc N instead")
    runs, logs, failed = sweep_runs(env), Path(os.path.expanduser(env.get("LOGS_DIR", "logs"))), []
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o.nproc}"]
    command = [sys.executable, *(torchrun if o.nproc > 1 else []), SCRIPT]
    if o.print:
        for variables in runs.values():
            mine = [f"{n}={shlex.quote(v)}" for n, v in variables.items() if env.get(n) != v]
            print(*mine, shlex.join(command))
        return 0
    for number, (name, variables) in enumerate(runs.items(), 1):
        folder = logs / name
        done = " is finished" if (folder / "result.json").exists() else ""
        print(f"sweep: run {number} of {len(runs)}: {name}{done}", flush=True)
        if done:
            continue
        if (folder / "model.bin").exists() and not checkpoints(folder):
            # It died after its artifact and cannot be resumed: nothing is lost, its name is free.
            aside = (logs / f"{name}.unfinished{n}" for n in itertools.count(1))
            folder.rename(next(path for path in aside if not path.exists()))
        process = subprocess.Popen(command, env=variables)
        try:
            failed += [name] if process.wait() else []
        except KeyboardInterrupt:    # of `interrupt`: Ctrl-C reaches the run too, SIGTERM does not
            process.terminate()
            process.wait()    # it may be saving
            print("sweep: stopped; the same command goes on from here")
            return 130
    if failed:
        print(f"sweep: failed: {', '.join(failed)}")
    return report([*(str(logs / n) for n in runs), "--to", str(logs)], env) or int(bool(failed))


TOOLS = dict(data=lambda arguments, env: int(not make_dataset(arguments)), submit=submit,
             verify=verify, report=report, sweep=sweep)
# <<< not packed

if __name__ == "__main__":
    status = main(sys.argv[1:], os.environ)
    heed(signal.SIG_DFL)    # a second Ctrl-C finds nothing that could print a traceback
    sys.exit(status)
