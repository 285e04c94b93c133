"""A hundred steps on equal data end at the same loss with every fast path on and off. The fused kernels' own hundred
steps are in test_kernels.py."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import on_ranks
from support import WORLD, settings, t

STEPS = 100
PLAIN = dict(train_batch_tokens=256, micro_batch_tokens=256, train_seq_len=32, loader="stream", attention="sdpa", compile="off",
             precision="fp32", num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, xsa_last_n=1, lr_warmup_steps=10)


def chain(length: int, V: int) -> np.ndarray:
    """Tokens of which four in five follow from the one before, so that there is something to learn."""
    rng = np.random.default_rng(0)
    follower, tokens = rng.permutation(V), rng.integers(2, V, length)
    for i in np.flatnonzero(rng.random(length - 1) < 0.8):
        tokens[i + 1] = follower[tokens[i]]
    return tokens.astype(np.uint16)


def losses(world: t.World = WORLD, **knobs) -> np.ndarray:
    """(STEPS,) mean losses over the ranks; the recurrence begins half-way."""
    h = settings(**PLAIN | knobs)
    model = t.build_model(h, world)
    model.compile(h.compile)
    run = t.Trainer(h, world, model, t.Dataset([chain(STEPS * 256 + 1, h.vocab_size)], None, ""))
    found = [world.mean(run.step(n, 0.4 * n / STEPS, looped=2 * n >= STEPS)) for n in range(STEPS)]
    return torch.stack(found).double().numpy()


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    """Losses with every fast path off."""
    return losses()


def check(found: np.ndarray, plain: np.ndarray, each: float, end: float) -> None:
    """No loss of the first ten steps is `each` nats away, nor the mean of the last twenty `end`; and the model learned."""
    assert plain[-20:].mean() < plain[:5].mean() - 1
    assert np.abs(found - plain)[:10].max() < each
    assert abs(found[-20:].mean() - plain[-20:].mean()) < end


@pytest.mark.parametrize("path", [dict(attention="blocks"), dict(micro_batch_tokens=64)], ids=str)
def test_fp32_paths_end_at_the_same_loss(plain, path):
    """Block attention and smaller micro-batches: 0.002 nats. Compiled blocks are in test_model.py."""
    check(losses(**path), plain, 1e-3, 0.002)


def test_fewer_bits_end_near_the_same_loss(plain):
    """bf16 products within 0.02 nats of fp32."""
    check(losses(precision="bf16", attention="blocks"), plain, 0.2, 0.02)


def write_losses(world: t.World, path: Path) -> None:
    """A rank's part of the next test."""
    found = losses(world, micro_batch_tokens=128)
    if world.main:
        np.save(path, found)


def test_two_ranks_end_at_the_same_loss(plain, tmp_path):
    """Scattered gradients, momenta shared out, collectives under way while others compute: 0.002 nats."""
    on_ranks(2, write_losses, tmp_path / "losses.npy")
    check(np.load(tmp_path / "losses.npy"), plain, 1e-3, 0.002)
