"""Section 7: adapters change nothing when fresh, one row each, and equal merged weights where they can be merged."""

import torch

import train_gpt as tg
from conftest import alive


def batch(h: tg.Hyperparameters, B: int = 3, T: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T)."""
    tokens = torch.randint(2, h.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def stir(bank: tg.AdapterBank, names=("q", "k", "v", "o", "mlp", "head")) -> None:
    """Gives the named output factors random values."""
    with torch.no_grad():
        for name in names:
            bank.b[name].normal_(std=0.3)


def test_fresh_bank_is_the_identity(tiny):
    """Zero output factors leave every nat as it was, bit for bit, and `reset` comes back to that."""
    model, plan = alive(tiny), tg.depth_plan(tiny, True)
    ids, targets = batch(tiny)
    bank = tg.AdapterBank(tiny, 3, plan)
    plain = model.nats(ids, targets, plan)
    assert torch.equal(plain, model.nats(ids, targets, plan, lora=bank.adapters()))
    stir(bank)
    assert not torch.allclose(plain, model.nats(ids, targets, plan, lora=bank.adapters()), atol=1e-3)
    bank.reset()
    assert torch.equal(plain, model.nats(ids, targets, plan, lora=bank.adapters()))
    assert all(a.abs().max() <= tiny.model_dim ** -0.5 and a.std() > 0 for a in bank.a.values())


def test_each_row_has_its_own(tiny):
    """Changing one row's factors changes that row only, for every adapted map."""
    model, plan = alive(tiny), tg.depth_plan(tiny, True)
    ids, targets = batch(tiny)
    plain = model.nats(ids, targets, plan)
    for name in ("q", "k", "v", "o", "mlp", "head"):
        bank = tg.AdapterBank(tiny, 3, plan)
        with torch.no_grad():
            bank.b[name][:, 1] = 0.5
        moved = (model.nats(ids, targets, plan, lora=bank.adapters()) - plain).abs().amax(1)
        assert moved[1] > 1e-3 and moved[0] == moved[2] == 0, name


def test_each_step_has_its_own(tiny):
    """A layer that runs twice has two adapters: one entry per step, then the head's."""
    plan = tg.depth_plan(tiny, True)
    adapters = tg.AdapterBank(tiny, 2, plan).adapters()
    assert len(adapters) == len(plan) + 1 and set(adapters[-1]) == {"head"}
    assert all(set(row) == {"q", "k", "v", "o", "mlp"} for row in adapters[:-1])
    assert len({row["q"].a.data_ptr() for row in adapters[:-1]}) == len(plan)
    assert adapters[0]["k"].a.shape == (2, 2, 32) and adapters[0]["k"].b.shape == (2, 16, 2)
    assert adapters[-1]["head"].b.shape == (2, 64, 2)


def test_adapters_equal_merged_weights(tiny):
    """q, k, v and head: the adapted model is the model with weights w + alpha / R b a."""
    plan = tg.depth_plan(tiny, False)
    model, merged = alive(tiny), alive(tiny)
    ids, targets = batch(tiny, B=1)
    bank = tg.AdapterBank(tiny, 1, plan)
    stir(bank, ("q", "k", "v"))
    scale = tiny.ttt_lora_alpha / tiny.ttt_lora_rank
    with torch.no_grad():
        for name, role in (("q", "wq"), ("k", "wk"), ("v", "wv")):
            merged.bank[role] += scale * bank.b[name][:, 0] @ bank.a[name][:, 0]
    torch.testing.assert_close(model.nats(ids, targets, plan, lora=bank.adapters()),
                               merged.nats(ids, targets, plan), atol=2e-5, rtol=1e-4)
    x = torch.randn(1, 4, 32)
    w = torch.randn(8, 32)
    lora = tg.LoRA(torch.randn(1, 2, 32), torch.randn(1, 8, 2), 3.0)
    torch.testing.assert_close(tg.linear(x, w, lora), x @ (w + 3.0 * lora.b[0] @ lora.a[0]).T, atol=1e-4, rtol=1e-4)
    other = torch.randn(1, 4, 32)
    torch.testing.assert_close(tg.linear(x, w, lora, other), x @ w.T + lora(other), atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_factor(tiny):
    """Once the output factors are not zero, every factor of every step learns."""
    model, plan = alive(tiny), tg.depth_plan(tiny, True)
    bank = tg.AdapterBank(tiny, 3, plan)
    stir(bank)
    model.nats(*batch(tiny), plan, lora=bank.adapters()).sum().backward()
    for factors in (bank.a, bank.b):
        assert all(p.grad.abs().amax(dim=(-2, -1)).min() > 0 for p in factors.values())
