"""Recipes: published sizes, every mechanism alive, every recipe through the whole pipeline, twins that obey, refusals."""
from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import clean_env, write_dataset
from support import WORLD, Lines, dataset, pointer_by_hand, stream, t

DEFAULTS = {f.name: f.default for f in dataclasses.fields(t.Hyperparameters)}
STEMS = {"sp1024", "sp8192", "prequant"}    # what systems share: no system of its own
PUBLISHED = dict(baseline=17_059_912, pr398=26_829_913, pr398_legal=26_829_913, pr578=26_993_756, pr1364=26_993_756,
                 pr1364_legal=26_993_756, dttt=26_993_756, dttt_legal=26_993_756, pr1539=36_311_132,
                 pr1539_legal=36_311_132, pr1493=35_944_536, pr1855=35_945_671, pr2014=35_945_673, pr2135=35_945_673,
                 field=35_945_671, record=36_208_329)
ILLEGAL = {"pr398", "pr1364", "dttt", "pr1539"}
NAMES = [name for name in t.RECIPES if name not in STEMS | {"demo"}]
ROWS = {name: t.apply_recipes(name, {}) for name in t.RECIPES}
# Milliseconds a step. A size touches no mechanism: what a recipe has off is left off.
TINY = dict(vocab_size=64, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=16, micro_batch_tokens=64,
            train_batch_tokens=128, iterations=24, max_wallclock_seconds=0.0, train_log_every=1000, eval_seq_len=16,
            eval_stride=8, eval_batch_tokens=128, ttt_chunk_tokens=128, ttt_batch_seqs=4, compile="off", precision="fp32",
            lr_warmup_steps=2, muon_momentum_warmup_steps=100, mlp_mult=2.0, gptq_calibration_batches=2,
            rounding_steps=1)
IF_ON = dict(warmdown_iters=12, recur_start_step=6, train_seq_schedule="8@0.4,16@1", bigram_vocab_size=50, ve_dim=6,
             prequant_ttt_epochs=2)


def tiny_of(name: str, **changes) -> t.Hyperparameters:
    """A recipe at demo size, made tiny; single knobs changed."""
    demo = t.Hyperparameters.from_env(dict(RECIPE=f"{name},demo"))
    on = {n: v for n, v in IF_ON.items() if getattr(demo, n)}
    return replace(demo, **dict(TINY, rope_dims=min(demo.rope_dims, 8)) | on | changes)


def named_model(h: t.Hyperparameters) -> t.GPT:
    """Weights drawn by the name of their bank, so that models of different recipes share what they both have."""
    torch.manual_seed(0)
    model = t.GPT(h)
    with torch.no_grad():
        for name, p in model.bank.items():
            g = torch.Generator().manual_seed(t.fingerprint(name) % 2**31)
            p.add_(torch.randn(p.shape, generator=g) * 0.2 * (5 if name == "softcap" else 1))
            if name == "copy_bias":    # as learned, so that what is copied is seen
                p.sub_(8)
    return model


# ------------------------------------------------------------------------------------------------------------- the table
def test_every_recipe_says_what_it_is():
    """Source, legality, the reported score where there is one, and what differs; twins of all that are not legal."""
    for (name, block), row in zip(t.RECIPES.items(), t.RECIPE_TABLE.strip().split("\n\n")):
        head, *lines = row.splitlines()
        named, source, legality, bpb = head.split(" | ")
        differs = " ".join(line.strip() for line in lines if line.strip() not in block)
        assert named == name and source and differs and (legality == "legal") == (name not in ILLEGAL | {"prequant"})
        assert bpb == "-" or 1.05 < float(bpb) < 1.23
        assert bool(block) == (name != "record") and "=" not in differs.replace("RECIPE=pr578,demo", "")
    assert {f"{name}_legal" for name in ILLEGAL} <= set(t.RECIPES)


def test_help_lists_the_recipes(capsys):
    """Every name with legality and reported score: the whole table."""
    assert t.main(["--help", "recipes"], {}) == 0
    assert capsys.readouterr().out == t.RECIPE_TABLE.strip() + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes(name):
    """Parameters of the full-size model, built on the meta device."""
    with torch.device("meta"):
        model = t.GPT(t.Hyperparameters.from_env(dict(RECIPE=name)))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_demo_switches_nothing_on_or_off(name):
    """A knob that is a switch keeps its value; a number that is zero stays zero, and no other becomes zero."""
    full, demo = (t.Hyperparameters.from_env(dict(RECIPE=r)) for r in (name, f"{name},demo"))
    for f in dataclasses.fields(full):
        big, small = getattr(full, f.name), getattr(demo, f.name)
        if f.type == "bool" or f.type == "str" and f.name not in ("scores", "recipe", "train_seq_schedule"):
            assert big == small, f.name
        elif f.name not in ("lr_warmup_steps", "loop_start"):
            assert bool(big) == bool(small), f.name
    parallel = lambda h: any(step.parallel for step in t.depth_plan(h, True))
    assert parallel(full) == parallel(demo) == (full.parallel_form != "none")


def test_the_submission_and_the_demo_are_what_they_were():
    """Mechanisms of other systems are off in both."""
    assert ROWS["record"] == {}
    mechanisms = list(DEFAULTS)[list(DEFAULTS).index("caseops_enabled"):]
    demo = t.Hyperparameters.from_env(dict(RECIPE="demo"))
    assert all(getattr(demo, name) == DEFAULTS[name] for name in mechanisms)


# ------------------------------------------------------------------------------------------------- no knob is dead
def print_of_loss(h: t.Hyperparameters) -> list:
    """The mean loss of a model with named weights on a fixed batch, looped and not."""
    model, tokens = named_model(h), torch.from_numpy(stream(65))[None]
    return [model.nats(tokens[:, :-1], tokens[:, 1:], t.depth_plan(h, looped)).mean() for looped in (False, True)]


def print_of_step(h: t.Hyperparameters) -> list:
    """Schedules at many points, and the weights and averages after a few steps at the end of training."""
    points = [(0, 0.0), (9, 0.2), (9, 0.5), (20, 0.9), (24, 1.0)]
    trainer = t.Trainer(h, WORLD, named_model(h), dataset(stream(3000)))
    for number in (30, 31):    # Adam's first step is the same for every beta2
        trainer.step(number, 0.97, True)
    return [*(torch.tensor(t.rate_factor(h, *p)) for p in points), torch.tensor(trainer.rounded_steps),
            *trainer.model.bank.values(), *trainer.ema.mean]


def print_of_batch(h: t.Hyperparameters) -> list:
    """The first micro-batches at the start and at the end of training, and where documents begin in them."""
    loader, seen = t.Loader(h, WORLD, [stream(3000).astype(np.uint16)]), []
    for _, context in h.contexts:
        loader.cut(context)
        for _ in range(3):
            batch = loader.next()
            seen += [batch.ids, batch.docs.start]
    return seen


def print_of_stored(h: t.Hyperparameters) -> list:
    """What is stored of a model with named weights, calibrated as the recipe says."""
    model = named_model(h)
    stored = t.quantise(model, t.calibrate(model, WORLD))
    return [x for v in stored.values() for x in ([v.codes, *v.grid] if isinstance(v, t.Coded) else [v])]


def print_of_adapted(h: t.Hyperparameters) -> list:
    """Weights after the adaptation of the recipe."""
    model = named_model(h)
    data, held = t.hold_out(h, dataset(stream(3000)), Lines())
    t.adapt_early(model, held, WORLD, h.prequant_ttt_epochs)
    return [torch.tensor(len(held)), *model.bank.values()]


def print_of_score(h: t.Hyperparameters) -> list:
    """Which scores, over which spans, learning with which rates."""
    spans = t.sliding(0, 200, h.eval_seq_len, h.eval_stride)
    return [torch.tensor([len(t.wanted_scores(h)), len(spans), *np.sum(spans, 0)]),
            torch.tensor([h.ttt_lr, h.ttt_chunk_tokens, h.iterations])]


def print_of_pack(h: t.Hyperparameters) -> list:
    """The artifact's bytes."""
    model = named_model(h)
    banks = {n: (r, model.bank[n].detach()) for n, r in t.roles(h).items()}
    stored = {n: t.round_rows(p.reshape(-1, *p.shape[-2:]), r.bits, r.sigmas) if r.bits < 16 else p.half()
              for n, (r, p) in banks.items()}
    return [torch.tensor([*t.pack(replace(h, trellis_states=0), stored)[0]])]


STAGES = dict(
    loss=(print_of_loss, """num_layers mlp_mult leaky_slope rope_dims rope_base ln_scale qk_gain_init xsa_last_n
        head_gate_scale smear_gate skip_gates bigram_vocab_size ve_dim parallel_form
        parallel_start_layer num_loops pointer asym_logit_rescale matrix_init"""),
    step=(print_of_step, """matrix_lr scalar_lr tied_embed_lr muon_momentum muon_momentum_warmup_start
        muon_momentum_warmup_steps polar_express muon_row_normalize muon_backend_steps muon_wd embed_wd adam_wd beta2
        ema_decay grad_clip_norm warmdown_iters warmdown_frac min_lr late_qat_threshold
        train_batch_tokens"""),
    batch=(print_of_batch, "loader doc_mask train_seq_schedule micro_batch_tokens train_seq_len"),
    stored=(print_of_stored, """matrix_bits embed_bits matrix_clip_sigmas embed_clip_sigmas trellis_states clip_search
        step_search gptq_roles gptq_calibration_batches gptq_damping"""),
    adapt=(print_of_adapted, """prequant_ttt_epochs prequant_ttt_data prequant_ttt_lr
        ttt_freeze_blocks ttt_lr_ramp ttt_batch_seqs"""),
    score=(print_of_score, "scores ttt_enabled ttt_lr ttt_chunk_tokens eval_seq_len eval_stride iterations"),
    pack=(print_of_pack, "compressor"))
STAGE_OF = {knob: stage for stage, (_, knobs) in STAGES.items() for knob in knobs.split()}
# Tested with the data, at the switch further down, and in test_ttt.py.
ELSEWHERE = {"vocab_size", "caseops_enabled", "recur_start_step", "ttt", "ttt_ema_decay",
             "ttt_max_chunks", "ttt_lora_rank", "ttt_lora_alpha", "ttt_lora_lr", "ttt_lr_decay", "ttt_learners",
             "ttt_stream_chunk", "ttt_targets", "ttt_phases"}
# What must go with a knob when it returns to the submission's value, and values small enough for a tiny model.
WITH = dict(trellis_states=dict(late_qat_threshold=0.0),
            matrix_clip_sigmas=dict(clip_search=False),
            train_seq_len=dict(train_seq_schedule=""))
BACK = dict(mlp_mult=4.0, num_layers=6, train_batch_tokens=64, micro_batch_tokens=128, train_seq_len=8, rope_dims=4,
            gptq_calibration_batches=4, eval_seq_len=8, eval_stride=16, iterations=9, ttt_chunk_tokens=64,
            ttt_batch_seqs=2, xsa_last_n=0, muon_momentum_warmup_steps=500)


@functools.cache
def printed(stage: str, h: t.Hyperparameters) -> list:
    """The fingerprint of one stage, from the same random state every time."""
    torch.manual_seed(0)
    return [x.detach() for x in STAGES[stage][0](h)]


def alike(a: list, b: list) -> bool:
    """True where two fingerprints are equal bit for bit."""
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", [n for n in NAMES if ROWS[n]])
def test_no_knob_of_a_recipe_is_dead(name):
    """Back at the submission's value (or another, where a tiny model makes that the same) each knob of the row changes
    what its stage computes."""
    h, published = tiny_of(name), ROWS[name.removesuffix("_legal")] if name.endswith("_legal") else {}
    for knob, value in ROWS[name].items():
        if knob in ELSEWHERE or value == DEFAULTS[knob]:
            continue
        if published.get(knob) == value:    # a twin says only what differs; the rest is tested where it was published
            continue
        if knob == "step_search" and h.gptq_roles == "none":    # it only keeps BUDGET_BYTES from being aimed at
            continue
        if STAGE_OF[knob] == "adapt" and not h.prequant_ttt_epochs:    # of TTT by chunks: test_ttt.py
            continue
        back = next(v for v in (BACK.get(knob), DEFAULTS[knob]) if v not in (None, getattr(h, knob)))
        stage = STAGE_OF[knob]
        other = replace(h, **WITH.get(knob, {}) | {knob: back})
        assert not alike(printed(stage, h), printed(stage, other)), f"{knob}={value} does nothing in {name}"


def test_every_mechanism_is_in_a_test():
    """Each knob of the block is of a stage above, in a row; or has a test of its own."""
    own = {"recur_start_step", "caseops_enabled", "short_val_allowed"}
    block = set(list(DEFAULTS)[list(DEFAULTS).index("caseops_enabled"):])
    rows = {knob for row in ROWS.values() for knob in row}
    assert block <= own | rows and rows <= set(STAGE_OF) | ELSEWHERE | set(ROWS["demo"])


def test_a_dead_knob_would_be_found():
    """A knob that nothing reads leaves every fingerprint as it is."""
    h = tiny_of("pr1493")
    for stage in STAGES:
        assert alike(printed(stage, h), printed(stage, replace(h, logs_dir="elsewhere"))), stage


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_tensor_learns(name):
    """Gradients reach every bank of the recipe."""
    h = tiny_of(name)
    model, tokens = named_model(h), torch.from_numpy(stream(65))[None]
    model.nats(tokens[:, :-1], tokens[:, 1:], t.depth_plan(h, True, rounded=True)).mean().backward()
    for bank, p in model.bank.items():
        assert p.grad is not None and p.grad.abs().sum() > 0, bank


# -------------------------------------------------------------------------------- formulas, written a second time
def by_hand(model: t.GPT, ids: torch.Tensor, looped: bool) -> torch.Tensor:
    """The loss (T,) of one row of tokens (T,) by loops and plain formulas."""
    h, b = model.h, {n: p.detach().double() for n, p in model.bank.items()}
    n = lambda x: x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
    x, T = b["embed"][ids], len(ids)
    if h.bigram_vocab_size:
        V = h.bigram_vocab_size
        rows = [V - 1] + [((36313 * int(ids[i])) ^ (27191 * int(ids[i - 1]))) % (V - 1) for i in range(1, T)]
        x = x + b["bigram"][rows] @ b["bigram_proj"][0].T * b["bigram_scale"]
    if h.smear_gate == "token":
        for i in range(T - 1, 0, -1):
            gate = b["smear_scale"] * torch.sigmoid(x[i, :h.gate_window] @ b["smear_gate"][0])
            x[i] += (ids[i] != 1) * gate * x[i - 1]
    x = n(x)
    if h.smear_gate == "channel":
        g = torch.sigmoid(b["smear_gate"][0])
        x = (1 - g) * x + g * torch.cat((torch.zeros(1, h.model_dim), x[:-1]))
    value = b["ve"][ids] @ b["ve_proj"][0].T * b["ve_scale"] if h.ve_dim else None
    order = [*range(h.num_layers)]
    if looped and h.num_loops:
        segment = order[h.loop_start:h.loop_end + 1]
        order = order[:h.loop_start] + segment * (1 + h.num_loops) + order[h.loop_end + 1:]
    half, kept, lane, x0, row = len(order) // 2, [], None, x, 0
    rows = half if h.skip_gates else h.num_layers // 2
    for slot, l in enumerate(order):
        form = h.parallel_form if slot >= half and l >= h.parallel_start_layer else "none"
        if form == "lanes" and lane is None:
            lane = x
        if slot >= half and kept and row < rows:
            y = b["skip_weight"][row] * kept.pop()
            g = torch.sigmoid(b["skip_gate"][row]) if h.skip_gates else None
            x, row = (x + y if g is None else (1 - g) * y + g * x), row + 1
        if form == "apart" and lane is None:
            lane = x
        c = (l + 1)**-0.5 if h.ln_scale else 1.0
        u = b["mix_x"][l] * x + b["mix_x0"][l] * x0
        extra = value * b["ve_layer"][h.valued.index(l)] if l in h.valued else 0
        A = b["attn_scale"][l] * attention_by_hand(h, b, l, n(u) * c, extra)
        mlp = lambda z: b["mlp_scale"][l] * mlp_by_hand(h, b, l, n(z) * c)
        if form == "none":
            x = u + A
            x, lane = x + mlp(x), None
        elif form == "gptj":
            x = u + A + mlp(u)
        elif form == "apart":
            x, lane = u + A, lane + mlp(lane)
        else:
            M, keep, write = mlp(lane), b["lane_keep"][l], b["lane_write"][l]
            x, lane = (keep[i] * s + write[0, i] * A + write[1, i] * M for i, s in enumerate((x, lane)))
        if slot < half:
            kept.append(x)
    if h.parallel_form == "apart":
        x = b["lane_share"] * x + (1 - b["lane_share"]) * lane
    elif lane is not None:
        x = (x + lane) / 2
    z = n(x) @ b["embed"].T
    cap = torch.where(z > 0, *b["softcap"]) if h.asym_logit_rescale else h.logit_softcap
    own = (cap * torch.tanh(z / cap)).log_softmax(-1)
    return pointer_by_hand(b, n(x), ids, own.exp()).log() if h.pointer else own


def attention_by_hand(h, b, l: int, x: torch.Tensor, extra) -> torch.Tensor:
    """Attention of layer `l` on the normalised input (T, D)."""
    T, E, half = len(x), h.head_dim, h.rope_dims // 2
    heads = lambda y: y.view(T, -1, E)
    n = lambda x: x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
    angle = torch.outer(torch.arange(T).double(), h.rope_base**(-torch.arange(half).double() * 2 / h.rope_dims))[:, None]
    turn = lambda y: torch.cat((y[..., :half] * angle.cos() + y[..., half:2 * half] * angle.sin(), y[..., half:2 * half]
                                * angle.cos() - y[..., :half] * angle.sin(), y[..., 2 * half:]), -1)
    q = turn(n(heads(x @ b["wq"][l].T))) * b["q_gain"][l][:, None]
    k, v = turn(n(heads(x @ b["wk"][l].T))), heads(x @ b["wv"][l].T + extra)
    out = []
    for head in range(h.num_heads):
        g = head * h.num_kv_heads // h.num_heads
        logits = (q[:, head] @ k[:, g].T * E**-0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = logits.softmax(-1) @ v[:, g]
        if l >= h.num_layers - h.xsa_last_n:
            unit = v[:, g] / v[:, g].norm(dim=-1, keepdim=True)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        if h.head_gate_scale:
            w = b["head_gate"][l, head]
            gate = torch.sigmoid(h.head_gate_scale * (x[:, :len(w)] @ w))
            y = y * gate[:, None]
        out.append(y)
    return torch.cat(out, -1) @ b["wo"][l].T


def mlp_by_hand(h, b, l: int, x: torch.Tensor) -> torch.Tensor:
    """MLP of layer `l` on the normalised input (T, D)."""
    u = x @ b["w_up"][l].T
    return torch.where(u > 0, u, h.leaky_slope * u).square() @ b["w_down"][l].T


VARIANTS = [(name, {}) for name in NAMES if not name.endswith("_legal")] + [
    ("record", dict(num_loops=2, loop_start=0, loop_end=3)), ("record", dict(parallel_start_layer=2, parallel_form="gptj")),
    ("pr1539", dict(parallel_start_layer=2, num_loops=2)), ("pr578", dict(num_loops=1))]


@pytest.mark.parametrize("name, changes", VARIANTS)
@pytest.mark.parametrize("looped", [False, True])
def test_the_forward_is_the_formula(name, changes, looped):
    """Each system, full weight sharing included, against the formulas of its source."""
    h = tiny_of(name, **changes)
    model, ids = named_model(h), torch.from_numpy(stream(15))
    expected = by_hand(model, ids[:-1], looped).gather(1, ids[1:, None])[:, 0].neg()
    nats = model.nats(ids[None, :-1], ids[None, 1:], t.depth_plan(h, looped))[0]
    torch.testing.assert_close(nats.detach().double(), expected.double(), atol=2e-4, rtol=2e-4)


def test_skips_of_the_looped_plan_of_1539():
    """Layers 3-5 once more: five plain skips of fourteen steps, as its log prints them."""
    h = t.Hyperparameters.from_env(dict(RECIPE="pr1539"))
    plan = t.depth_plan(h, True)
    assert [s.layer for s in plan] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [s.push for s in plan] == [False] * 2 + [True] * 5 + [False] * 7
    assert [s.pop for s in plan] == [None] * 7 + [0, 1, 2, 3, 4] + [None] * 2


# ------------------------------------------------------------------------------------------- mechanisms one by one
@pytest.mark.parametrize("changes", [dict(), dict(clip_search=False, matrix_clip_sigmas=9.0), dict(matrix_bits=4)])
def test_rounding_in_training_is_that_of_the_exporter(changes):
    """Weights in the forward are what the artifact would hold, clip included; the gradient is the plain one's."""
    h = tiny_of("pr578", gptq_roles="none", **changes)
    model = named_model(h)
    used = model.layers(rounded=True)
    for name in ("wq", "w_down"):
        stored = t.quantise(model, t.Curvature({}, {}))[name].decode()
        for layer, w in zip(used, stored):
            torch.testing.assert_close(getattr(layer, name), w, atol=1e-7, rtol=1e-6)
    torch.stack([layer.wq for layer in used]).sum().backward()
    assert torch.equal(model.bank["wq"].grad, torch.ones_like(model.bank["wq"]))


def test_rounding_survives_the_compiler():
    """One graph for each plan: the rounded loss is the eager rounded loss, and not the other."""
    h = tiny_of("pr578", matrix_bits=3, num_layers=2)
    model, tokens = named_model(h), torch.from_numpy(stream(17))[None]
    compiled, losses = torch.compile(model.nats, backend="aot_eager", fullgraph=True, dynamic=False), []
    for rounded in (False, True, False):
        plan = t.depth_plan(h, False, rounded)
        losses += [f(tokens[:, :-1], tokens[:, 1:], plan).mean().item() for f in (model.nats, compiled)]
    assert losses[0::2] == pytest.approx(losses[1::2], rel=1e-5)
    assert losses[0] == losses[4] and abs(losses[2] - losses[0]) > 1e-3


def test_the_best_percentile_has_the_least_error():
    """No clip of the five is better, and a row with an outlier is clipped."""
    w = torch.randn(2, 5, 1000, generator=torch.Generator().manual_seed(0))
    w[0, 0, 7] = 12.0
    searched, largest = t.best_percentile(w, 7), w.abs().amax(-1)
    rounded = lambda step: (w / step).round().clamp(-7, 7) * step
    error = lambda reach: (rounded(reach[..., None] / 7) - w).square().sum(-1)
    assert (error(searched) <= error(largest) * 1.001).all() and (searched <= largest).all()
    assert searched[0, 0] < 0.6 * largest[0, 0]
    assert t.round_rows(w, 4, 0.0, True).grid.row[0, 0] < t.round_rows(w, 4, 0.0).grid.row[0, 0]
    for q in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        other = error(w.abs().quantile(q, -1))
        assert (error(searched) <= other * 1.01).all()


@pytest.mark.parametrize("loader", ["shuffled", "stream"])
def test_each_loader_visits_every_block_once(loader):
    """The stream in order, the other not."""
    found = t.Loader(tiny_of("record", loader=loader), WORLD, [stream(64 * 60 + 1).astype(np.uint16)])
    for epoch in range(8):
        found.arrange(epoch)
        assert sorted(found.order) == list(range(60)) and (list(found.order) == list(range(60))) == (loader == "stream")


def test_contexts_change_with_the_clock():
    """Documents are cut at the stage's length, the rates rise again, and a restored run goes on the same way."""
    h = tiny_of("pr2014")
    trainer = t.Trainer(h, WORLD, t.build_model(h, WORLD), dataset(stream(3000)))
    seen, factors = [], []
    step = trainer.optimiser.step
    trainer.optimiser.step = lambda factor, *rest: (factors.append(factor), step(factor, *rest))
    run = trainer.model.run_nats
    trainer.model.run_nats = lambda ids, *rest, **more: (seen.append(tuple(ids.shape)), run(ids, *rest, **more))[1]
    states = []
    for number, progress in enumerate((0.1, 0.4, 0.41, 0.5, 1.0)):
        states.append(trainer.snapshot())
        trainer.step(number + 5, progress, False)
    assert seen == [(8, 8)] * 4 + [(4, 16)] * 6
    ramp = [f / t.rate_factor(h, n + 5, p) for n, (f, p) in enumerate(zip(factors, (0.1, 0.4, 0.41, 0.5, 1.0)))]
    assert ramp == pytest.approx([1, 1, 1 / 32, 2 / 32, 3 / 32])
    after = [p.detach().clone() for p in trainer.model.bank.values()]
    trainer.restore(states[1])
    for number, progress in ((6, 0.4), (7, 0.41), (8, 0.5), (9, 1.0)):
        trainer.step(number, progress, False)
    assert all(torch.equal(a, p) for a, p in zip(after, trainer.model.bank.values()))


def test_warmdown_by_measured_steps():
    """Where half of the clock made 100 steps and 50 are the warmdown, it begins at two thirds of the steps' end."""
    h = tiny_of("pr578", warmdown_iters=50, lr_warmup_steps=0)
    assert [t.rate_factor(h, s, s / 200) for s in (0, 100, 150, 175, 200)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_the_recurrence_begins_at_its_step():
    """RECUR_START_STEP, whatever the clock says."""
    h, log = tiny_of("pr1539"), Lines()
    trainer = t.Trainer(h, WORLD, t.build_model(h, WORLD), dataset(stream(3000)))
    t.train(trainer, 0.0, log, lambda: "")
    assert any(line.startswith("recurrence:on step:6 ") for line in log.lines)


@pytest.mark.parametrize("name, start, freeze", [("dttt", 0.3, 0), ("pr1364", 1.0, 2), ("pr398", 1.0, 0)])
def test_layers_adapt_at_their_own_rates(name, start, freeze):
    """A frozen layer stays, the first layer moves by its share of what it would, the embedding moves in full."""
    moved = []
    for s, f in ((start, freeze), (1.0, 0)):
        h = tiny_of(name, ttt_lr_ramp=s, ttt_freeze_blocks=f, prequant_ttt_epochs=1, ttt_batch_seqs=64)
        model = named_model(h)
        before = {n: p.detach().clone() for n, p in model.bank.items()}
        t.adapt_early(model, torch.from_numpy(stream(65)), WORLD, 1)    # a single step
        moved.append({n: p.detach() - before[n] for n, p in model.bank.items()})
    ours, plain = moved
    for layer in range(4):
        share = 0.0 if layer < freeze else start + (1 - start) * layer / 3
        torch.testing.assert_close(ours["wq"][layer], plain["wq"][layer] * share, atol=1e-6, rtol=1e-3)
    assert plain["wq"].abs().max() > 0
    torch.testing.assert_close(ours["embed"], plain["embed"])


def test_the_rate_of_the_adaptation_is_a_cosine(monkeypatch):
    """From the peak to about a tenth, an epoch at a time; SGD keeps it."""
    for name, expected in (("pr1364", [5e-4 * (0.55 + 0.45 * math.cos(math.pi * e / 4)) for e in range(4)]), ("pr398", [0.008] * 4)):
        seen = []
        monkeypatch.setattr(t, "learn_chunk", lambda model, o, *_: seen.append(o.param_groups[0]["lr"]))
        h = tiny_of(name, prequant_ttt_epochs=4)
        t.adapt_early(t.GPT(h), torch.from_numpy(stream(65)), WORLD, 4)
        assert seen == pytest.approx(expected)


def test_held_out_text_is_no_training_text(monkeypatch):
    """The end of the last shard is adapted to and nothing else; with `val` the shards stay whole."""
    data = dataset(stream(3000))
    monkeypatch.setattr(t, "HELD_OUT_TOKENS", 500)
    kept, held = t.hold_out(tiny_of("pr1364_legal"), data, Lines())
    assert len(held) == 500 and np.array_equal(np.concatenate([kept.train[0], held.numpy()]), data.train[0])
    kept, held = t.hold_out(tiny_of("pr1364"), data, Lines())
    assert kept is data and held is data.val.tokens


# ---------------------------------------------------------------------------------------------------- whole pipeline
def tiny_env(name: str, folder: Path, **knobs) -> dict[str, str]:
    """The environment of a tiny run of a recipe."""
    full, row = tiny_of(name), t.Hyperparameters.from_env(dict(RECIPE=f"{name},demo"))
    changed = {f.name: getattr(full, f.name) for f in dataclasses.fields(full)
               if getattr(full, f.name) != getattr(row, f.name)}
    knobs = {n.upper(): v for n, v in changed.items()} | dict(
        RECIPE=f"{name},demo", DATA_PATH=folder / "shards", LOGS_DIR=folder / "logs", SHORT_VAL_ALLOWED=1) | knobs
    return clean_env(**knobs)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with shards of random tokens."""
    folder = tmp_path_factory.mktemp("recipes")
    write_dataset(folder / "shards", tiny_of("record"), train=4000, val=400)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Runs without the seconds of packing the script."""
    monkeypatch.setattr(t, "running_source", lambda path, h: (None, b"code"))


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_pipeline(name, shards, quick, capsys):
    """Trains, adapts, quantises, packs, reads back, scores; what breaks rule C3 is marked everywhere."""
    rehearsed = name in ("record", "pr398", "pr1539_legal", "pr2135")    # a stream, and all kinds of adaptation
    env = tiny_env(name, shards, RUN_ID=name, REHEARSAL_STEPS=int(rehearsed))
    assert t.main([], env) == 0, capsys.readouterr().err
    result = json.loads((shards / "logs" / name / "result.json").read_text())
    log = (shards / "logs" / name / "log.txt").read_text()
    h = tiny_of(name)
    assert result["recipe"] == f"{name},demo" and result["steps"] == 24
    assert set(result["scores"]) == set(t.wanted_scores(h))
    assert all(3 < row["val_loss"] < 6 for row in result["scores"].values())
    assert result["compliant"] == (name not in ILLEGAL)
    assert ("C3" in str(result["violations"])) == (name in ILLEGAL) == ("compliant:false rule C3" in log)
    if h.late_qat_threshold:
        rounded = int(re.search(r"rounded_steps:(\d+)", log)[1])
        assert 0 < rounded < 24
    shipped, stored = t.unpack((shards / "logs" / name / "model.bin").read_bytes())
    assert list(stored) == list(t.roles(h)) == list(t.roles(shipped))


def test_a_twin_never_reads_validation_text(shards, quick, tmp_path):
    """With other validation text the legal twin makes the same artifact, the published form another one."""
    h = tiny_of("record")
    write_dataset(tmp_path / "shards", h, train=4000, val=400)
    other = np.where(np.arange(400) % 50 == 0, t.BOS, 2 + np.arange(400) % 60)
    t.write_shard(tmp_path / "shards" / "fineweb_val_000000.bin", other)
    for name in ("pr1364", "pr1364_legal"):
        blobs = []
        for place in (shards, tmp_path):
            assert t.main([], tiny_env(name, place, RUN_ID=f"twin-{name}", SCORES="quantized", ITERATIONS=8)) == 0
            blobs.append((place / "logs" / f"twin-{name}" / "model.bin").read_bytes())
        assert (blobs[0] == blobs[1]) == (name == "pr1364_legal")


def test_adapting_after_reading_back_is_repeated_by_eval(shards, quick, capsys):
    """The published #398 adapts its artifact before the score; `eval` of the artifact finds the same score."""
    env = tiny_env("pr398", shards, RUN_ID="again")
    assert t.main([], env) == 0
    score = json.loads((shards / "logs/again/result.json").read_text())["scores"]["quantized"]["val_bpb"]
    capsys.readouterr()
    places = clean_env(DATA_PATH=shards / "shards", SCORES="quantized")
    assert t.main(["eval", str(shards / "logs/again/model.bin")], places) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last[7:])["scores"]["quantized"]["val_bpb"] == pytest.approx(score, abs=1e-9)


def test_the_packed_script_repeats_its_run(shards, tmp_path, capsys):
    """It takes the run's knobs, trains the same model, and knows every recipe and every mechanism beside."""
    short = dict(ITERATIONS=8, SCORES="quantized")
    env = tiny_env("pr578", shards, RUN_ID="readable", **short)
    assert t.main([], env) == 0
    folder = shards / "logs" / "readable"
    spec = importlib.util.spec_from_file_location("packed_recipe", folder / "train_gpt.py")
    packed = sys.modules["packed_recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packed)
    alone = clean_env(DATA_PATH=shards / "shards", LOGS_DIR=tmp_path, RUN_ID="packed")
    assert packed.main([], alone) == 0
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, tmp_path / "packed"))
    assert theirs["recipe"] == "run" and theirs["changed_knobs"] == ours["changed_knobs"]
    same = lambda r: {n: (s["val_loss"], s["val_bpb"]) for n, s in r["scores"].items()}
    assert same(ours) == same(theirs) and theirs["bytes"]["code"] == ours["bytes"]["code"]
    assert (folder / "model.bin").read_bytes() == (tmp_path / "packed" / "model.bin").read_bytes()
    other = tiny_env("pr1364_legal", shards, RUN_ID="other", LOGS_DIR=tmp_path, **short)
    assert packed.main([], other) == 0 and t.main([], other | dict(RUN_ID="same")) == 0
    assert (tmp_path / "other" / "model.bin").read_bytes() == (tmp_path / "same" / "model.bin").read_bytes()


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("knobs, sentence", [
    (dict(RECIPE="pr587"), "RECIPE=pr587: there is no recipe 'pr587'; did you mean 'pr578'?"),
    (dict(RECIPE="pr578", NUM_LAYERS="1", LOOP_END="0"), "VE_DIM=128 needs two layers, not NUM_LAYERS=1"),
    (dict(RECIPE="pr578", TRELLIS_STATES="8"), "LATE_QAT_THRESHOLD=0.5 needs TRELLIS_STATES=0, not 8"),
    (dict(RECIPE="pr2014", TRAIN_SEQ_LEN="2048"), "TRAIN_SEQ_SCHEDULE=1024@0.1,2048@0.7,3072@1 must hold divisors"),
    (dict(TRAIN_SEQ_SCHEDULE="1024,2048"), "TRAIN_SEQ_SCHEDULE='1024,2048' is out of range"),
    (dict(PARALLEL_FORM="both"), "PARALLEL_FORM='both' is out of range")])
def test_contradictions_are_refused(knobs, sentence):
    """One sentence with names and values."""
    with pytest.raises(t.Refusal) as refusal:
        t.Hyperparameters.from_env(knobs)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_shards_must_fit_the_recipe(tmp_path, monkeypatch):
    """Vocabulary and text form of the manifest, the byte sidecar, and the whole of the published validation set."""
    h = tiny_of("pr1855")
    bare = write_dataset(tmp_path / "bare", h, sidecar=False)
    folder = write_dataset(tmp_path / "made", h)
    find = lambda h, place: t.find_dataset(replace(h, data_path=str(place)), WORLD, lambda line: None)
    for place, words in ((bare, "0 files fineweb_val_bytes"), (folder, "holds 700 validation tokens")):
        with pytest.raises(t.Refusal, match=f"CASEOPS_ENABLED=1.*{words}.*SHORT_VAL_ALLOWED=1"):
            find(h, place)
    find(replace(h, short_val_allowed=True), folder)
    monkeypatch.setattr(t, "CASEOPS_VAL_TOKENS", 700)
    find(h, folder)
    for manifest, words in ((dict(builder=1, files={}, vocab_size=128, caseops=True), "vocab_size is 128, the model's is 64"),
                            (dict(builder=1, files={}, vocab_size=64, caseops=False), "caseops is False, the model's is True")):
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(t.Refusal, match=words):
            find(h, folder)
    (folder / "manifest.json").write_text(json.dumps(dict(builder=1, files={}, vocab_size=64, caseops=True)))
    monkeypatch.setattr(t, "CASEOPS_VAL_TOKENS", 47_851_520)
    find(h, folder)
    with pytest.raises(t.Refusal, match="caseops is True, the model's is False"):
        find(tiny_of("record"), folder)
