"""How train_gpt.py rounded weights up to commit f770ae1, for comparison.

Rejected ways (LQER, AWQ-lite, refitted centroids, corrected biases) were taken out; their figures are in tests/README.md.
"""
from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from bench_replica import Replica
from bench_replica import tg as t
from torch import Tensor

DAMAGE_TOKENS = 4096    # of text on which damages are measured


def second_moments(model: t.GPT, loader: t.Loader, batches: int) -> dict[str, Tensor]:
    """Sum of x x^T over all tokens, by tap: (L | 1, n, n) fp64, of what the first matrix of each tap multiplies."""
    table, sums, places, real = t.roles(model.h), {}, {}, F.linear
    firsts = {table[n].tap: n for n in reversed(t.tapped(model.h))}
    for tap, name in firsts.items():
        bank = t.bank_of(model, name)
        sums[tap] = torch.zeros(len(bank), *[bank.size(-1)] * 2, dtype=torch.float64)
        places |= {w.data_ptr(): (tap, i) for i, w in enumerate(bank) if name != "embed"}

    def add(tap: str, i: int, x: Tensor) -> None:
        """Adds the moment of one activation."""
        rows = x.flatten(0, -2).float()
        sums[tap][i] += (rows.mT @ rows).double()

    def spy(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
        """The product, its input noted where the weights are a layer's."""
        if w.data_ptr() in places:
            add(*places[w.data_ptr()], x)
        return real(x, w, *bias)

    with torch.no_grad(), mock.patch.object(F, "linear", spy), mock.patch.object(model, "parts", model.plain):
        for _ in range(batches):
            batch = loader.next()
            add("final", 0, model.hidden(batch.ids, t.depth_plan(model.h, looped=True), batch.docs))
    return sums


@torch.no_grad()
def measured_damage(model: t.GPT, loader: t.Loader, found: t.Curvature) -> dict[str, Tensor]:
    """KL divergence (L,) in nats per token that each role-layer alone causes by 1.5 times uniform steps."""
    plan, damage = t.depth_plan(model.h, looped=True), {}
    ids = loader.next().ids.view(-1, model.h.train_seq_len)[:max(1, DAMAGE_TOKENS // model.h.train_seq_len)]
    truth, before = model.hidden(ids, plan), {n: w.clone() for n, w in model.bank.items()}
    for name in t.tapped(model.h):
        bank, grid = t.bank_of(model, name), t.searched_grid(model, name, found)
        exact, damage[name] = bank.clone(), torch.zeros(len(bank))
        rough = t.gptq(bank, found.factors[t.roles(model.h)[name].tap], grid._replace(scale=1.5 * grid.scale)).decode()
        for i in range(len(bank)):
            bank[i] = rough[i]
            damage[name][i] = t.divergence(model, ids, model.hidden(ids, plan), truth, before)
            bank[i] = exact[i]
    return damage


def by_size(bench: Replica) -> t.Curvature:
    """Inputs that count by their size alone, and rows that count alike."""
    h, loader = bench.h, t.Loader(bench.h, t.World(), bench.data.train)
    loader.position = bench.position
    factors = {tap: t.inverse_factor(H, h.gptq_damping) for tap, H in second_moments(bench.model, loader, h.gptq_calibration_batches).items()}
    return t.Curvature({n: torch.ones(t.bank_of(bench.model, n).shape[:2]) for n in t.tapped(h)}, factors)


def before(bench: Replica, limit: int) -> bytes:
    """The artifact as commit f770ae1 made it: an input counts by its size alone, a row by its own, damages are measured."""
    model, table, found, curved = bench.model, t.roles(bench.h), by_size(bench), t.searched_grid
    loader = t.Loader(bench.h, t.World(), bench.data.train)
    loader.position = bench.position + bench.h.gptq_calibration_batches

    def grid_by_size(model: t.GPT, name: str, found: t.Curvature) -> t.Grid:
        """Steps of rows ~ the root of their standard deviation, of columns as now."""
        row = t.uniform_grid(t.bank_of(model, name), table[name].bits, table[name].sigmas, 0.5)
        return row._replace(column=curved(model, name, found).column)

    with mock.patch.object(t, "searched_grid", grid_by_size):
        damage = measured_damage(model, loader, found)
        with mock.patch.object(t, "damage_of", lambda *_: damage):
            model.retune(budget_bytes=limit)
            return t.fit_budget(model, found, 0, t.Log(t.World(), quiet=True))[0]
