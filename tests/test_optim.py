"""Section 8: the optimisers against SVD, torch and a per-bank reference; schedule and average against their formulas."""

from dataclasses import replace

import pytest
import torch

import train_gpt as tg
from conftest import alive


# ----------------------------------------------------------------------------------------------------------- Muon
@pytest.mark.parametrize("rows, cols", [(24, 24), (32, 16), (16, 48)])
def test_orthogonalise_against_svd(rows, cols):
    """U f(S) V^T with f(S) near one: the singular vectors stay, and large and small singular values come together."""
    g = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    x = tg.orthogonalise(g, torch.float64)
    core = U.mT @ x @ Vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (core - torch.diag_embed(values)).abs().max() < 1e-6, "other singular vectors"
    kept = S > 0.01 * S.amax(-1, keepdim=True)
    assert 0.6 < float(values[kept].min()) and float(values.max()) < 1.3
    torch.testing.assert_close(tg.orthogonalise(g.mT, torch.float64), x.mT)
    torch.testing.assert_close(tg.orthogonalise(g * 1000, torch.float64), x, atol=1e-5, rtol=1e-5)
    coarse = tg.orthogonalise(g.float(), torch.bfloat16)
    assert coarse.dtype == torch.bfloat16 and (coarse.double() - x).norm() / x.norm() < 0.1


def test_orthogonalise_of_nothing_is_nothing():
    """Padding slices stay zero, and no NaN is born."""
    assert not tg.orthogonalise(torch.zeros(2, 8, 4), torch.float32).any()


def reference_update(grads: list[torch.Tensor], momentum: float) -> torch.Tensor:
    """One bank by itself after `grads`: Nesterov, each row of the weight to norm one, orthogonal, times the gain."""
    buffer = torch.zeros_like(grads[0])
    for g in grads:
        buffer = momentum * buffer + g
    u = grads[-1] + momentum * buffer
    u = torch.stack([torch.stack([row / row.norm() for row in layer]) for layer in u])
    return torch.stack([tg.orthogonalise(layer[None], torch.float32)[0] for layer in u]) \
        * max(1.0, u.size(1) / u.size(2)) ** 0.5


class Pretend(tg.World):
    """One of `size` ranks that all have the same gradients."""

    def scatter_mean(self, rows):
        """This rank's rows."""
        return lambda: rows.chunk(self.size)[self.rank]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_stack_equals_separate_banks(size):
    """Tall and wide banks in one stack, shared by any number of ranks, move as each would by itself."""
    g = torch.Generator().manual_seed(1)
    shapes = [(3, 8, 16), (2, 16, 8), (2, 16, 8)]
    grads = [[torch.randn(s, generator=g) for s in shapes] for _ in range(3)]
    banks = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    before = [p.detach().clone() for p in banks]
    stacks = [tg.Stack(banks, Pretend(rank, size)) for rank in range(size)]
    with torch.no_grad():
        for step in grads:
            for p, gradient in zip(banks, step):
                p.grad = gradient.clone()
            updates = [s.direction(s.collect(torch.float32)(), 0.9, torch.float32) for s in stacks]
        stacks[0].apply(torch.cat(updates), lr=0.1, decay=0.5)
    for i, p in enumerate(banks):
        expected = before[i] * (1 - 0.1 * 0.5) - 0.1 * reference_update([step[i] for step in grads], 0.9)
        torch.testing.assert_close(p.detach(), expected, atol=2e-5, rtol=1e-4)
    assert all(s.momentum.size(0) == -(-7 // size) for s in stacks), "each rank holds only its share of the momenta"


def test_rows_are_normalised():
    """The scale of one row of a gradient does not matter, the scale of a column does (MuonEq-R); for both orientations."""
    for shape in ((1, 8, 16), (1, 16, 8)):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        results = []
        for scale in (torch.ones(shape), torch.logspace(-2, 2, shape[1])[:, None], torch.logspace(-1, 1, shape[2])):
            p = torch.nn.Parameter(torch.zeros(shape))
            stack, p.grad = tg.Stack([p], tg.World()), g * scale
            with torch.no_grad():
                stack.apply(stack.direction(stack.collect(torch.float32)(), 0.0, torch.float32), 1.0, 0.0)
            results.append(p.detach())
        torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)
        assert not torch.allclose(results[0], results[2], atol=1e-2)


# ------------------------------------------------------------------------------------------------ the whole optimiser
def gradients(model: tg.GPT, seed: int) -> list[torch.Tensor]:
    """Gives every bank a random gradient and returns copies."""
    g = torch.Generator().manual_seed(seed)
    for p in model.bank.values():
        p.grad = torch.randn(p.shape, generator=g) * 0.3
    return [p.grad.clone() for p in model.bank.values()]


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e6])
def test_adamw_equals_torch(tiny, clip):
    """Embedding and small tensors move as in torch's AdamW with each group's rate and decay; the norm is global."""
    h = replace(tiny, grad_clip_norm=clip, embed_wd=0.3, adam_wd=0.7, beta2=0.95)
    model, twin = alive(h), alive(h)
    optimiser, table = tg.Optimiser(model, tg.World()), tg.roles(h)
    groups = [dict(params=[twin.bank[n] for n, r in table.items() if r.optim == kind], lr=0.5 * rate, weight_decay=decay)
              for kind, rate, decay in (("embed", h.tied_embed_lr, 0.3), ("scalar", h.scalar_lr, 0.7))]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(3):
        for p, g in zip(twin.bank.values(), gradients(model, step)):
            p.grad = g
        if clip:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        adam.step()
        optimiser.step(0.5, 0.9)
        assert all(p.grad is None for p in model.bank.values())
    for name, role in table.items():
        if role.optim != "muon":
            torch.testing.assert_close(model.bank[name], twin.bank[name], atol=1e-6, rtol=1e-5, msg=name)


def test_matrices_take_rate_decay_and_momentum(tiny):
    """p <- (1 - lr wd) p - lr update, all rates times the factor, for every bank of matrices."""
    h = replace(tiny, grad_clip_norm=0.0, matrix_lr=0.1, muon_wd=0.4)
    model = alive(h)
    before, optimiser = {n: p.detach().clone() for n, p in model.bank.items()}, tg.Optimiser(model, tg.World())
    history = []
    for step in range(2):
        history.append(dict(zip(model.bank, gradients(model, step))))
        optimiser.step((0.5, 0.25)[step], 0.9)
    for name, role in tg.roles(h).items():
        if role.optim == "muon":
            p = before[name]
            for n, lr in ((1, 0.05), (2, 0.025)):
                p = p * (1 - lr * 0.4) - lr * reference_update([g[name] for g in history[:n]], 0.9)
            torch.testing.assert_close(model.bank[name].detach(), p, atol=2e-5, rtol=1e-4, msg=name)


def test_clipping_also_scales_the_matrices(tiny):
    """The momentum buffers hold clipped gradients: their norm with the others' is GRAD_CLIP_NORM."""
    h = replace(tiny, grad_clip_norm=0.3)
    model = alive(h)
    optimiser = tg.Optimiser(model, tg.World())
    total = torch.cat([g.flatten() for g in gradients(model, 0)]).norm()
    optimiser.step(1.0, 0.9)
    own = torch.cat([s.momentum.flatten() for s in optimiser.stacks]).norm()
    matrices = torch.cat([g.flatten() for g, r in zip(gradients(model, 0), [tg.roles(h)[n] for n in model.bank])
                          if r.optim == "muon"]).norm()
    torch.testing.assert_close(own, 0.3 * matrices / total, atol=1e-5, rtol=1e-4)


def test_state_is_restored_bit_for_bit(tiny):
    """Momenta, Adam's moments and its step counts: the same gradients then give the same weights."""
    model = alive(tiny)
    optimiser = tg.Optimiser(model, tg.World())
    results = []
    gradients(model, 0)
    optimiser.step(1.0, 0.9)
    state, weights = optimiser.state(), [p.detach().clone() for p in model.bank.values()]
    for _ in range(2):
        for seed in (1, 2):
            gradients(model, seed)
            optimiser.step(1.0, 0.9)
        results.append([p.detach().clone() for p in model.bank.values()])
        optimiser.restore(state)
        with torch.no_grad():
            torch._foreach_copy_(list(model.bank.values()), weights)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not any(torch.equal(a, b) for a, b in zip(results[0], weights))


# ------------------------------------------------------------------------------------------------- schedule and average
def test_rate_factor_values():
    """One until the warmdown, then a straight line to MIN_LR; a rise by steps in front if asked for."""
    h = tg.Hyperparameters(warmdown_frac=0.8, min_lr=0.1)
    for progress, factor in ((0.0, 1.0), (0.2, 1.0), (0.4, 0.75), (0.6, 0.5), (0.9, 0.125), (0.95, 0.1), (1.0, 0.1)):
        assert tg.rate_factor(h, 1000, progress) == pytest.approx(factor)
    warm = replace(h, lr_warmup_steps=4)
    assert [tg.rate_factor(warm, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert tg.rate_factor(warm, 1, 0.6) == pytest.approx(0.25)
    flat = replace(h, warmdown_frac=0.0)
    assert tg.rate_factor(flat, 0, 1.0) == 1.0
    assert tg.rate_factor(replace(h, warmdown_frac=1.0, min_lr=0.0), 0, 1.0) == 0.0


def test_momentum_values():
    """Linear from its start to MUON_MOMENTUM."""
    h = tg.Hyperparameters()
    assert [tg.momentum_at(h, s) for s in (0, 750, 1500, 9999)] == pytest.approx([0.92, 0.945, 0.97, 0.97])
    assert tg.momentum_at(replace(h, muon_momentum_warmup_steps=0), 0) == pytest.approx(0.97)


def test_ema_is_the_weighted_mean(tiny):
    """After n updates: decay^n of the first weights plus (1 - decay) decay^(n - i) of the i-th; export writes it."""
    model = alive(tiny)
    ema, history = tg.EMA(model), [[p.detach().clone() for p in model.bank.values()]]
    for seed in range(4):
        with torch.no_grad():
            for p in model.bank.values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        ema.update(0.7)
        history.append([p.detach().clone() for p in model.bank.values()])
    weights = [0.7 ** 4, *(0.3 * 0.7 ** (4 - i) for i in range(1, 5))]
    assert sum(weights) == pytest.approx(1)
    ema.export()
    for p, *values in zip(model.bank.values(), *history):
        torch.testing.assert_close(p.detach(), sum(w * v for w, v in zip(weights, values)), atol=1e-5, rtol=1e-5)
