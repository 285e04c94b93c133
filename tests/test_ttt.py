"""Test-time training: what comes later cannot reach an earlier score, and a learner that cheats is
caught."""
from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import on_ranks

from support import Half, Lines, WORLD, model_of, repetitive, settings, stream, t, validation

# Tokens from here on are replaced: in the third chunk of 32, inside a window and a document.
CUT = 75
H = settings(ttt="chunk", ttt_lr=0.05, ttt_epochs=2)


def nats(name: str, tokens: np.ndarray, h: t.Hyperparameters = H) -> np.ndarray:
    """Nats (N,) of every target under one of the scores, by a model that is the same each time."""
    return t.score_by_name(name, model_of(h), validation(tokens), WORLD, Lines())[1].targets_nats()


def replaced(tokens: np.ndarray, keep_starts: bool) -> np.ndarray:
    """The stream with other tokens from CUT on; document starts stay where they are, or move
    too."""
    other = stream(len(tokens), document=7, seed=99)
    if keep_starts:
        other = np.where(tokens == t.BOS, t.BOS, np.where(other == t.BOS, 2, other))
    changed = np.concatenate([tokens[:CUT], other[CUT:]])
    assert (changed[CUT:] != tokens[CUT:]).mean() > 0.7
    return changed


def earlier_scores_agree(score, tokens: np.ndarray, keep_starts: bool = True) -> bool:
    """True if every target before CUT has bit-identical nats when all tokens from CUT on change.

    The later scores must differ, or the comparison would prove nothing."""
    first, second = score(tokens), score(replaced(tokens, keep_starts))
    assert not np.array_equal(first[CUT:], second[CUT:])
    return first[:CUT - 1].tobytes() == second[:CUT - 1].tobytes()


@pytest.mark.parametrize("name", ["quantized", "sliding", "documents", "ttt"])
@pytest.mark.parametrize("N", [128, 117])
def test_later_tokens_cannot_reach_earlier_scores(name, N):
    """Condition C3: all tokens after a mid-chunk position replaced, earlier scores the same bit for
    bit."""
    assert earlier_scores_agree(functools.partial(nats, name), stream(N + 1))


@pytest.mark.parametrize("name", ["quantized", "sliding", "ttt"])
def test_later_document_starts_cannot_reach_earlier_scores(name):
    """The same where the replaced part has other documents."""
    assert earlier_scores_agree(functools.partial(nats, name), stream(129), keep_starts=False)


def test_later_document_starts_move_documents_by_rounding_only():
    """A document that ends elsewhere is padded to another width, which may round its scores
    differently."""
    tokens = stream(129)
    first, second = nats("documents", tokens), nats("documents", replaced(tokens, False))
    np.testing.assert_allclose(first[:CUT - 1], second[:CUT - 1], atol=1e-5)


def cheat(tokens: np.ndarray, peek) -> np.ndarray:
    """Nats (N,) of a scorer that trains on each chunk before it scores it; `peek` gets the tokens
    past the ledger."""
    model, plan = model_of(H), t.depth_plan(H, True)
    ledger = t.Ledger(validation(tokens), WORLD)
    sgd = torch.optim.SGD(model.bank.values(), lr=H.ttt_lr)
    for begin in range(0, len(tokens) - 1, 32):
        end = min(begin + 32, len(tokens) - 1)
        t.learn_chunk(model, sgd, *peek(ledger, begin, end), WORLD)
        spans = t.sliding(begin, end, H.eval_seq_len, H.eval_stride)
        t.score(ledger, t.batched(spans, 64, 16), functools.partial(model.nats, plan=plan))
    return ledger.targets_nats()


def test_a_cheat_that_trains_before_scoring_is_seen():
    """Train on the chunk, then score it: the very check that the honest forms pass must fail."""
    peek = lambda ledger, begin, end: (ledger._tokens[begin:end], ledger._tokens[begin + 1:end + 1])
    assert not earlier_scores_agree(functools.partial(cheat, peek=peek), stream(129))


def test_a_cheat_that_asks_the_ledger_is_refused():
    """The same learner through the ledger gets nothing to learn from."""
    with pytest.raises(RuntimeError, match="not scored"):
        cheat(stream(129), lambda ledger, begin, end: ledger.lend(begin, end))


def test_a_cheat_that_keeps_the_better_of_two_passes_is_refused():
    """A second score of the same targets is refused, whoever computes it."""
    def twice(tokens):
        """Scores the stream, learns, scores it again."""
        model, plan = model_of(H), t.depth_plan(H, True)
        ledger = t.Ledger(validation(tokens), WORLD)
        batches = t.batched(t.sliding(0, len(tokens) - 1, 16, 16), 64, 16)
        for _ in range(2):
            t.score(ledger, batches, functools.partial(model.nats, plan=plan))

    with pytest.raises(RuntimeError, match="twice"):
        twice(stream(129))


def test_a_reversed_pass_is_seen():
    """A plan that scores and learns from the last chunk first (against C4) fails the same check."""
    def backwards(tokens):
        """chunk_sgd in reverse order of chunks."""
        model, plan = model_of(H), t.depth_plan(H, True)
        ledger = t.Ledger(validation(tokens), WORLD)
        sgd = torch.optim.SGD(model.bank.values(), lr=H.ttt_lr)
        for begin in reversed(range(0, len(tokens) - 1, 32)):
            end = min(begin + 32, len(tokens) - 1)
            t.score(ledger, t.batched(t.sliding(begin, end, 16, 4), 64, 16),
                    functools.partial(model.nats, plan=plan))
            t.learn_chunk(model, sgd, *ledger.lend(begin, end), WORLD)
        return ledger.targets_nats()

    assert not earlier_scores_agree(backwards, stream(129))


def test_the_first_chunk_is_scored_by_the_weights_of_the_artifact():
    """Nothing is learned before the first chunk has its score; later chunks do feel the
    learning."""
    tokens = stream(129)
    adapted, fixed = nats("ttt", tokens), nats("sliding", tokens)
    np.testing.assert_allclose(adapted[:32], fixed[:32], atol=1e-5)
    assert np.abs(adapted[32:] - fixed[32:]).max() > 1e-3


def test_a_rate_of_zero_scores_as_sliding_does():
    """Without learning the chunk form is the sliding score, but for the rounding of other
    batches."""
    tokens = stream(140)
    h = settings(ttt="chunk", ttt_lr=0.0)
    np.testing.assert_allclose(nats("ttt", tokens, h), nats("sliding", tokens, h), atol=1e-5)


def test_weights_are_restored():
    """After the score every weight has its old bits, and no gradient is left."""
    model = model_of(H)
    before = [p.detach().clone() for p in model.bank.values()]
    t.score_by_name("ttt", model, validation(stream(129)), WORLD, Lines())
    assert all(torch.equal(a, b) for a, b in zip(before, model.bank.values()))
    assert all(p.grad is None for p in model.parameters())


def test_the_last_chunk_trains_nobody(monkeypatch):
    """Four chunks make three lessons, each on exactly the chunk that was scored."""
    lessons = []
    monkeypatch.setattr(
        t, "learn_chunk", lambda model, sgd, ids, targets, world: lessons.append(
            (sgd.param_groups[0]["lr"], ids.tolist(), targets.tolist())))
    tokens = stream(118)
    nats("ttt", tokens)
    assert [ids for _, ids, _ in lessons] == [tokens[b:b + 32].tolist() for b in (0, 32, 64)]
    assert [y for _, _, y in lessons] == [tokens[b + 1:b + 33].tolist() for b in (0, 32, 64)]
    cosine = [0.05 * 0.5 * (1 + np.cos(np.pi * c / 3)) for c in range(3)]
    assert [rate for rate, _, _ in lessons] == pytest.approx(cosine)


def test_it_improves_a_repetitive_text():
    """A text that repeats is predicted better after each chunk of it."""
    tokens = repetitive(257)
    adapted, fixed = nats("ttt", tokens), nats("sliding", tokens)
    assert adapted[128:].mean() < fixed[128:].mean() - 0.2
    assert adapted.mean() < fixed.mean()


def test_two_ranks_learn_the_same():
    """The gradients of two ranks' sequences add up to the gradient of one rank that has them
    all."""
    tokens = torch.from_numpy(stream(65))
    ids, targets = tokens[:-1], tokens[1:]
    h = settings(ttt_lr=0.05, ttt_epochs=1, ttt_batch_seqs=4, ttt_grad_clip=1e9)

    def moved(world: t.World) -> torch.Tensor:
        """The flat change of all weights by one lesson on this rank's sequences."""
        model = model_of(h)
        before = torch.cat([p.detach().flatten().clone() for p in model.bank.values()])
        t.learn_chunk(model, torch.optim.SGD(model.bank.values(), lr=0.05), ids, targets, world)
        return torch.cat([p.detach().flatten() for p in model.bank.values()]) - before

    torch.testing.assert_close(moved(Half(0, 2)) + moved(Half(1, 2)),
                               moved(WORLD),
                               atol=1e-6,
                               rtol=1e-4)


def scores_on_a_rank(world: t.World, folder: str) -> None:
    """Saves this rank's view of all nats of two streams that differ from CUT on, under two kinds of
    score."""
    tokens = stream(129)
    for name in ("sliding", "ttt"):
        for side, text in (("whole", tokens), ("replaced", replaced(tokens, False))):
            found = t.score_by_name(name, model_of(H), validation(text), world,
                                    Lines(world))[1].targets_nats()
            np.save(f"{folder}/{name}_{side}_{world.rank}.npy", found)


def test_two_processes_score_alike_and_causally(tmp_path):
    """Two gloo ranks agree with each other and with one process; later tokens reach no earlier
    score there either."""
    on_ranks(2, scores_on_a_rank, str(tmp_path))
    for name in ("sliding", "ttt"):
        whole, other = (np.load(tmp_path / f"{name}_{side}_0.npy")
                        for side in ("whole", "replaced"))
        np.testing.assert_array_equal(whole, np.load(tmp_path / f"{name}_whole_1.npy"))
        np.testing.assert_allclose(whole, nats(name, stream(129)), atol=1e-5)
        assert whole[:CUT - 1].tobytes() == other[:CUT - 1].tobytes() and not np.array_equal(
            whole[CUT:], other[CUT:])
