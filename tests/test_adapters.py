"""Section 7: adapters change nothing when fresh, one row each, and equal merged weights where they can be merged."""

import dataclasses

import pytest
import torch

import train_gpt as tg
from conftest import alive

MAPS = ("q", "k", "v", "o", "mlp", "head")


@pytest.fixture
def every(tiny) -> tg.Hyperparameters:
    """The tiny model with every map adapted."""
    return dataclasses.replace(tiny, ttt_targets=",".join(MAPS))


def batch(h: tg.Hyperparameters, B: int = 3, T: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T)."""
    tokens = torch.randint(2, h.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def factors(bank: tg.AdapterBank) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, a, b) of every adapter, as views of the bank."""
    return [(name, lora.a, lora.b) for row in bank.adapters() for name, lora in row.items()]


def stir(bank: tg.AdapterBank, names=MAPS, rows=slice(None)) -> None:
    """Gives the named output factors of some rows random values."""
    with torch.no_grad():
        for name, _, b in factors(bank):
            if name in names:
                b[rows] = torch.randn_like(b[rows]) * 0.3


def test_fresh_bank_is_the_identity(every):
    """Zero output factors leave every nat as it was, bit for bit, and `reset` comes back to that, row by row."""
    model, plan = alive(every), tg.depth_plan(every, True)
    ids, targets = batch(every)
    bank = tg.AdapterBank(every, 3, plan)
    nats = lambda: model.nats(ids, targets, plan, lora=bank.adapters())
    plain = model.nats(ids, targets, plan)
    assert torch.equal(plain, nats())
    stir(bank)
    assert not torch.allclose(plain, nats(), atol=1e-3)
    bank.reset(torch.tensor([0, 2]))
    assert torch.equal(plain[[0, 2]], nats()[[0, 2]]) and not torch.allclose(plain[1], nats()[1], atol=1e-3)
    bank.reset(torch.tensor([1]))
    assert torch.equal(plain, nats())
    assert all(a.abs().max() <= every.model_dim ** -0.5 and a.std() > 0 for _, a, _ in factors(bank))


def test_every_row_starts_alike(every):
    """A document's first adapters do not depend on the row, the batch or the random state."""
    plan = tg.depth_plan(every, True)
    torch.manual_seed(1)
    first = tg.AdapterBank(every, 2, plan).flat
    torch.manual_seed(2)
    second = tg.AdapterBank(every, 5, plan).flat
    assert torch.equal(first[:1].expand(5, -1), second)


def test_each_row_has_its_own(every):
    """Changing one row's factors changes that row only, for every adapted map."""
    model, plan = alive(every), tg.depth_plan(every, True)
    ids, targets = batch(every)
    plain = model.nats(ids, targets, plan)
    for name in MAPS:
        bank = tg.AdapterBank(every, 3, plan)
        stir(bank, [name], slice(1, 2))
        moved = (model.nats(ids, targets, plan, lora=bank.adapters()) - plain).abs().amax(1)
        assert moved[1] > 1e-3 and moved[0] == moved[2] == 0, name


def test_each_step_has_its_own(every):
    """A layer that runs twice has two adapters: one entry per step, then the head's."""
    plan = tg.depth_plan(every, True)
    adapters = tg.AdapterBank(every, 2, plan).adapters()
    assert len(adapters) == len(plan) + 1 and set(adapters[-1]) == {"head"}
    assert all(set(row) == {"q", "k", "v", "o", "mlp"} for row in adapters[:-1])
    assert len({row["q"].a.data_ptr() for row in adapters[:-1]}) == len(plan)
    assert adapters[0]["k"].a.shape == (2, 2, 32) and adapters[0]["k"].b.shape == (2, 16, 2)
    assert adapters[-1]["head"].b.shape == (2, 64, 2)


def test_targets_name_the_adapted_maps(tiny):
    """Only what TTT_TARGETS names is adapted; without the head its entry is empty."""
    h = dataclasses.replace(tiny, ttt_targets="o,mlp")
    plan = tg.depth_plan(h, True)
    adapters = tg.AdapterBank(h, 2, plan).adapters()
    assert [set(row) for row in adapters] == [{"o", "mlp"}] * len(plan) + [set()]
    ids, targets = batch(h, 2)
    model = alive(h)
    assert torch.equal(model.nats(ids, targets, plan), model.nats(ids, targets, plan, lora=adapters))
    h = dataclasses.replace(tiny, ttt_targets="head")
    assert [set(row) for row in tg.AdapterBank(h, 2, plan).adapters()] == [set()] * len(plan) + [{"head"}]


def test_adapters_equal_merged_weights(every):
    """q, k, v and head: the adapted model is the model with weights w + alpha / R b a."""
    plan = tg.depth_plan(every, False)
    model, merged = alive(every), alive(every)
    ids, targets = batch(every, B=1)
    bank = tg.AdapterBank(every, 1, plan)
    stir(bank, ("q", "k", "v"))
    with torch.no_grad():
        for step, row in zip(plan, bank.adapters()):
            for name, role in (("q", "wq"), ("k", "wk"), ("v", "wv")):
                merged.bank[role][step.layer] += row[name].scale * row[name].b[0] @ row[name].a[0]
    torch.testing.assert_close(model.nats(ids, targets, plan, lora=bank.adapters()),
                               merged.nats(ids, targets, plan), atol=2e-5, rtol=1e-4)
    assert bank.adapters()[0]["q"].scale == every.ttt_lora_alpha / every.ttt_lora_rank
    x = torch.randn(1, 4, 32)
    w = torch.randn(8, 32)
    lora = tg.LoRA(torch.randn(1, 2, 32), torch.randn(1, 8, 2), 3.0)
    torch.testing.assert_close(tg.linear(x, w, lora), x @ (w + 3.0 * lora.b[0] @ lora.a[0]).T, atol=1e-4, rtol=1e-4)
    other = torch.randn(1, 4, 32)
    torch.testing.assert_close(tg.linear(x, w, lora, other), x @ w.T + tg.correction(lora, other), atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_factor(every):
    """Once the output factors are not zero, every factor of every step learns."""
    model, plan = alive(every), tg.depth_plan(every, True)
    bank = tg.AdapterBank(every, 3, plan)
    stir(bank)
    before = [(a.clone(), b.clone()) for _, a, b in factors(bank)]
    bank.step(model.nats(*batch(every), plan, lora=bank.adapters()).sum(), torch.full((3, 1), 0.01))
    for (a, b), (_, new_a, new_b) in zip(before, factors(bank)):
        assert (new_a - a).abs().amax(dim=(-2, -1)).min() > 0 and (new_b - b).abs().amax(dim=(-2, -1)).min() > 0


def by_hand(bank: tg.AdapterBank, square: list[torch.Tensor], grad: torch.Tensor, rate: float, n: int) -> torch.Tensor:
    """Row 0 after update number n by the formula, one factor of one step after the other."""
    beta, moved, at = tg.ADAPTER_BETA2, bank.flat[0].detach().clone(), 0
    square[0] = beta * square[0] + (1 - beta) * grad**2
    for shape in bank.shapes:
        for _ in range(shape[0]):
            place = slice(at, at := at + shape[1:].numel())
            r = (square[0][place] / (1 - beta**n)).sqrt() + 1e-8
            u = grad[place] / (r + tg.ADAPTER_EPS * r.square().mean().sqrt())
            moved[place] -= rate * u / max(1.0, float(u.square().mean().sqrt()) / tg.ADAPTER_STEP)
    return moved


def test_updates_are_adam_with_a_rate_for_each_row(every):
    """Three steps equal the formula on each row alone, at the row's rate; a reset row starts over."""
    model, plan = alive(every), tg.depth_plan(every, True)
    ids, targets = batch(every, 2)
    rates = torch.tensor([[0.01], [0.001]])
    bank = tg.AdapterBank(every, 2, plan)
    nats = lambda bank, rows: model.nats(ids[rows], targets[rows], plan, lora=bank.adapters()).mean(1).sum()
    for _ in range(3):
        bank.step(nats(bank, slice(0, 2)), rates)
    for row in (0, 1):
        alone = tg.AdapterBank(every, 1, plan)
        square = [torch.zeros_like(alone.flat[0])]
        for n in (1, 2, 3):
            (grad, ) = torch.autograd.grad(nats(alone, slice(row, row + 1)), alone.flat)
            moved = by_hand(alone, square, grad[0], float(rates[row]), n)
            with torch.no_grad():
                alone.flat[0] = moved
        torch.testing.assert_close(bank.flat[row], alone.flat[0].detach(), atol=2e-4, rtol=1e-3)
    bank.reset(torch.tensor([0]))
    bank.step(nats(bank, slice(0, 2)), rates)
    fresh = tg.AdapterBank(every, 2, plan)
    fresh.step(nats(fresh, slice(0, 2)), rates)
    torch.testing.assert_close(bank.flat[0], fresh.flat[0])


def test_what_is_nothing_but_rounding_moves_nobody(every):
    """Gradients that differ by a millionth of their factor's size, as from one kernel or number format to another, move
    weights by as little: no entry takes a whole step in a random direction."""
    bank, g = tg.AdapterBank(every, 1, tg.depth_plan(every, True)), torch.Generator().manual_seed(0)
    grad = torch.randn(bank.flat.shape, generator=g)
    grad *= torch.rand(bank.flat.shape, generator=g) < 0.1    # most of a factor's gradients are zero
    rate, moved = torch.full((1, 1), 0.01), []
    for noise in (0.0, 1e-6):
        bank.reset(torch.tensor([0]))
        bank.step((bank.flat * (grad + noise * torch.randn(grad.shape, generator=g))).sum(), rate)
        moved.append((bank.flat - bank.start).detach())
    assert moved[0].abs().max() > 0.005 and (moved[0] - moved[1]).abs().max() < 1e-4
