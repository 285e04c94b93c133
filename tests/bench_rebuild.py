"""Ways to rebuild weights better from equal bytes, on top of the default; none of them is in train_gpt.py.

Each takes the bench, the factors and `fit`, and returns (bytes, banks to load). `fit(reserve)` gives the artifact of the
default search that leaves `reserve` bytes free; it reads `train_gpt.searched_grid` anew, so a method may replace that.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from unittest import mock

import torch
from bench_replica import Replica
from bench_replica import tg as t
from torch import Tensor

Factors, Fit = Mapping[str, t.Factor], Callable[[int], bytes]
RANK, LARGEST, BITS = 4, 3, (2, 4)    # of LQER: rank, role-layers with the largest error, bits of A and B
SALIENT, FINER = 1 / 8, 1.0    # of AWQ-lite: share of a tap's columns, octaves by which their steps are finer
CLASSES = 3    # of centroids: sizes of codes, 1 and up, that get a reconstruction point of their own
STEPS = 48    # of bias correction
BIAS_RATE = 1e-3    # of its Adam at first, over the mean size of a bank; falls to zero


def matrices(stored: Mapping) -> dict[str, t.Coded]:
    """The banks that GPTQ rounded."""
    table = t.roles(t.Hyperparameters())
    return {n: v for n, v in stored.items() if isinstance(v, t.Coded) and table[n].tap}


def few_bits(x: Tensor, bits: int) -> Tensor:
    """Each row of x (R, n) rounded to 2^bits levels between its least and largest value."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    return low + ((x - low) / step).round() * step


def low_rank(bench: Replica, factors: Factors, fit: Fit) -> tuple[int, dict]:
    """LQER (arXiv 2402.02446; #1855): A B of rank RANK approximates what GPTQ left of the worst role-layers, in the
    norm of their inputs; A in int2, B in int4, two fp16 numbers per row of either."""
    table = t.roles(bench.h)

    def errors(stored: dict) -> dict[tuple[str, int], Tensor]:
        """(name, layer) -> what is left of it, times U^-1: the product with its transpose is E H E^T."""
        found = {}
        for name, coded in matrices(stored).items():
            for i, error in enumerate(t.bank_of(bench.model, name) - coded.decode()):
                order, upper = (part[i] for part in factors[table[name].tap])
                found[name, i] = torch.linalg.solve_triangular(upper, error[:, order], upper=True, left=False)
        return found

    seen = errors(t.unpack(fit(0))[1])
    worst = sorted(seen, key=lambda place: -float(seen[place].square().sum()))[:LARGEST]
    spent = sum(RANK * (8 + sum(b * n for b, n in zip(BITS, table[name].shape[-2:])) // 8) for name, _ in worst)
    blob = fit(spent)
    stored = t.unpack(blob)[1]
    banks, seen = {n: v.decode() for n, v in matrices(stored).items()}, errors(stored)
    for name, i in worst:
        order, upper = (part[i] for part in factors[table[name].tap])
        left, size, _ = torch.linalg.svd(seen[name, i], full_matrices=False)
        A = few_bits((left[:, :RANK] * size[:RANK].sqrt()).T, BITS[0])
        banks[name][i][:, order] += A.T @ few_bits(torch.linalg.lstsq(A.T, seen[name, i] @ upper).solution, BITS[1])
    return len(blob) + spent, stored | banks


def salient_columns(bench: Replica, factors: Factors, fit: Fit) -> tuple[int, dict]:
    """AWQ-lite (arXiv 2306.00978; #1908): the columns with the largest activations get finer steps in the same solve."""
    plain = t.searched_grid

    def finer(model: t.GPT, name: str, factors: Factors) -> t.Grid:
        """The default's steps, finer in the most used columns, with the mean exponent kept."""
        grid, (order, _) = plain(model, name, factors), factors[t.roles(model.h)[name].tap]
        salient = order[:, :round(SALIENT * order.size(1))]
        moved = torch.zeros_like(grid.column).scatter(1, salient, round(-FINER * t.OCTAVE))
        return grid._replace(column=grid.column + moved)

    with mock.patch.object(t, "searched_grid", finer):
        blob = fit(0)
    return len(blob), t.unpack(blob)[1]


def centroids(bench: Replica, factors: Factors, fit: Fit) -> tuple[int, dict]:
    """Of each role-layer a scale and the points of its CLASSES smallest codes are refitted by least squares in the
    norm of its inputs; four bytes each."""
    table = t.roles(bench.h)
    count = (CLASSES + 1) * sum(len(t.bank_of(bench.model, n)) for n, r in table.items() if r.tap)
    blob = fit(4 * count)
    stored = t.unpack(blob)[1]
    banks = {n: v.decode() for n, v in matrices(stored).items()}
    for name, w in banks.items():
        codes, steps = stored[name].codes.abs(), stored[name].codes.sign() * stored[name].grid.rows()
        steps = steps * stored[name].grid.columns()
        H = bench.moments[table[name].tap].float()
        parts = torch.stack([w, *(steps * (codes == size) for size in range(1, CLASSES + 1))], 1)    # (L, K, rows, cols)
        moved = (parts @ H[:, None]).flatten(2)
        wanted = (moved @ (t.bank_of(bench.model, name) - w).flatten(1)[..., None])
        solved = torch.linalg.lstsq((moved @ parts.flatten(2).mT).double(), wanted.double()).solution.float()
        w += (solved[..., None] * parts).sum(1)
    return len(blob) + 4 * count, stored | banks


def correct_biases(model: t.GPT, loader: t.Loader, stored: t.Stored, steps: int) -> t.Stored:
    """`stored` with fp16 banks that `steps` of Adam, DAMAGE_TOKENS of new text each, brought closer
    to the model's predictions; the model stays as it was. After arXiv 1906.04721."""
    plan = t.depth_plan(model.h, looped=True)
    rows = max(1, t.DAMAGE_TOKENS // model.h.train_seq_len)
    texts = [loader.next().ids.view(-1, model.h.train_seq_len)[:rows] for _ in range(steps)]
    exact = {n: w.detach().clone() for n, w in model.bank.items()}
    plain = {n: model.bank[n] for n, value in stored.items() if isinstance(value, Tensor)}
    # the exact model speaks first; then the rounded weights take its place in the banks
    with torch.no_grad():
        truths = [model.hidden(ids, plan) for ids in texts]
    embed = exact["embed"].to(model.dtype)
    t.load_stored(model, stored)
    rate = lambda w: BIAS_RATE * max(0.05, float(w.detach().abs().mean()))    # gains, gates differ
    adam = torch.optim.Adam([dict(params=[w], lr=rate(w)) for w in plain.values()],
                            betas=(0.9, 0.98), eps=1e-12)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    for ids, truth in zip(texts, truths):
        adam.zero_grad()
        t.divergence(model, truth, embed, model.hidden(ids, plan)).backward(inputs=[*plain.values()])
        adam.step()
        decay.step()
    found = {**stored, **{n: w.detach().half() for n, w in plain.items()}}
    model.zero_grad()
    t.load_stored(model, exact)
    return found


def bias_corrected(bench: Replica, factors: Factors, fit: Fit, position: int) -> tuple[int, dict]:
    """The one that gained two standard errors on both seeds, 0.0001 BPB, on a model that had learned little."""
    blob, loader = fit(0), t.Loader(bench.h, t.World(), bench.data.train)
    loader.position = position
    blob, _ = t.pack(bench.h, correct_biases(bench.model, loader, t.unpack(blob)[1], STEPS))
    return len(blob), t.unpack(blob)[1]


def methods(position: int) -> dict[str, Callable[[Replica, Factors, Fit], tuple[int, dict]]]:
    """Name -> method; `position` counts the micro-batches that were read before."""
    return {
        f"+ LQER rank {RANK}, int{BITS[0]}/int{BITS[1]}, {LARGEST} layers": low_rank,
        "+ AWQ-lite: 1/8 of columns 2x finer": salient_columns,
        "+ centroids and scales": centroids,
        f"+ bias correction, {STEPS} Adam steps": functools.partial(bias_corrected, position=position),
    }
