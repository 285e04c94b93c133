"""What the tests of sections 9 to 15 share beside conftest.py: smaller steps, made-up tokens, a log
that keeps lines."""
from __future__ import annotations

import numpy as np
import torch

from conftest import TINY
from conftest import alive as model_of
from conftest import tg as t

WORLD = t.World()
SMALL = TINY | dict(train_batch_tokens=128,
                    iterations=6,
                    train_log_every=1000,
                    gptq_calibration_batches=2,
                    ttt_chunk_tokens=32,
                    ttt_batch_seqs=2)


def settings(**changes) -> t.Hyperparameters:
    """Hyperparameters of a model that takes milliseconds; `changes` override single knobs."""
    return t.Hyperparameters(**SMALL | changes)


def stream(length: int, V: int = 64, document: int = 11, seed: int = 0) -> np.ndarray:
    """Random tokens (length,) of 2 .. V - 1 with token 1 at the start of each document of 1 to 2 *
    document - 1."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, V, length)
    starts = np.cumsum([0, *rng.integers(1, 2 * document, length)])
    tokens[starts[starts < length]] = t.BOS
    return tokens


def repetitive(length: int) -> np.ndarray:
    """Tokens (length,) in which a phrase of eight comes again and again: easy to learn."""
    tokens = np.tile(np.arange(5, 13), length // 8 + 1)[:length]
    tokens[0] = t.BOS
    return tokens


def validation(tokens: np.ndarray) -> t.Validation:
    """A validation set in which every target stands for two bytes."""
    return t.Validation.of(tokens, np.full(len(tokens) - 1, 2))


def dataset(tokens: np.ndarray) -> t.Dataset:
    """One training shard in memory, and a validation set that is the beginning of it."""
    return t.Dataset([tokens.astype(np.uint16)], validation(tokens[:97]), "test")


def rows_of(h: t.Hyperparameters, batches: int = 4) -> torch.Tensor:
    """The rows (N, T) of `batches` micro-batches of a made-up shard."""
    loader = t.Loader(h, WORLD, [stream(3000).astype(np.uint16)])
    return torch.cat([loader.next().ids.view(-1, h.train_seq_len) for _ in range(batches)])


def curvature_of(model: t.GPT, world: t.World = WORLD, batches: int = 4) -> tuple[dict, dict]:
    """What `curvature` finds on this rank's share of those rows."""
    return t.curvature(model, world, rows_of(model.h, batches)[world.rank::world.size])


def found_of(model: t.GPT, batches: int = 4) -> t.Curvature:
    """The same, ready for use."""
    rows, inputs = curvature_of(model, batches=batches)
    return t.Curvature(rows, {tap: t.inverse_factor(H, model.h.gptq_damping) for tap, H in inputs.items()}, rows_of(model.h, batches))


class Half(t.World):
    """One of two ranks whose sums stay its own: adding up what two of them find simulates two
    processes."""
    def sum(self, tensor):
        """Its own part."""
        return tensor


class Lines(t.Log):
    """A log that keeps its lines instead of printing them."""
    def __init__(self, world: t.World = WORLD):
        """Claims no folder."""
        super().__init__(world, None)
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        """Keeps one line."""
        self.lines.append(line)


def remembering(work):
    """`work`, which computes an answer only once for equal arguments: packing takes a second."""
    answers = {}

    def remembered(*arguments):
        """The answer, new or old."""
        key = repr(arguments)
        if key not in answers:
            answers[key] = work(*arguments)
        return answers[key]

    return remembered


def pointer_by_hand(bank: dict[str, torch.Tensor], x: torch.Tensor, ids: torch.Tensor, own: torch.Tensor,
                    window: int = 1 << 30) -> torch.Tensor:
    """(T, V) probabilities of the pointer sentinel, place by place, from states (T, D) and the model's own (T, V); a place n
    windows back counts 1/n."""
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
    q, k = rms(x @ bank["copy_query"][0].T) * bank["copy_gain"], rms(x @ bank["copy_key"][0].T)
    rows = []
    for at in range(len(ids)):
        places = [j for j in range(1, at + 1) if ids[j] != t.BOS]    # of tokens whose state before them is known
        z = [x[at] @ bank["copy_own"][0] + bank["copy_bias"][0]] + [
            q[at] @ k[j - 1] / q.size(1)**0.5 + np.log(min(1, window / max(1, at - j))) for j in places]
        own_share, *shares = torch.stack(z).softmax(0)
        rows.append(own_share * own[at])
        for share, j in zip(shares, places):
            rows[-1][ids[j]] += share
    return torch.stack(rows)
