"""Every plan scores every target exactly once, and the ledger refuses whatever the rules forbid."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from support import WORLD, Lines, model_of, pointer_by_hand, settings, stream, t, validation


def plans(tokens: np.ndarray, T: int, stride: int, batch_tokens: int,
          chunk: int) -> dict[str, list[t.Windows]]:
    """The batches of each way to score `tokens` (N + 1,), by name."""
    N = len(tokens) - 1
    chunks = [s for b in range(0, N, chunk) for s in t.sliding(b, min(N, b + chunk), T, stride)]
    return dict(plain=t.batched(t.sliding(0, N, T, T), batch_tokens, T),
                sliding=t.batched(t.sliding(0, N, T, stride), batch_tokens, T),
                chunks=t.batched(chunks, batch_tokens, T))


def scored(batches: list[t.Windows]) -> list[int]:
    """Every target that the batches score, in their order."""
    return [
        target for w in batches for start, lo, hi in zip(w.start, w.lo, w.hi)
        for target in range(start + lo, start + hi)
    ]


@limits(max_examples=150, deadline=None)
@given(N=st.integers(1, 200),
       T=st.integers(2, 70),
       cut=st.integers(1, 70),
       rows=st.integers(0, 5),
       chunk=st.integers(1, 90),
       seed=st.integers(0, 9))
def test_every_plan_scores_every_target_once(N, T, cut, rows, chunk, seed):
    """Any stream, window, stride, batch and chunk: the scored targets are a permutation of all."""
    tokens = stream(N + 1, document=20, seed=seed)
    for name, batches in plans(tokens, T, min(cut, T), rows * T + 1, chunk).items():
        assert sorted(scored(batches)) == list(range(N)), name
        for w in batches:
            real = w.hi > 0
            assert (w.hi <= w.width).all() and (w.lo < w.hi)[real].all(), name
            assert (w.start >= 0).all() and (w.start + w.hi <= N).all(), name
            if name in ("sliding", "chunks"):  # as much context as the window has room for
                place = w.start + w.lo
                assert (w.lo >= np.minimum(T - min(cut, T), place))[real & (place > 0)].all(), name


@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_streams_shorter_than_equal_to_and_longer_than_the_window(N, stride):
    """Windows of 16 over N targets: all scored in order, each but the first with the context it can
    have."""
    spans = t.sliding(0, N, 16, stride)
    assert [i for s, lo, hi in spans for i in range(s + lo, s + hi)] == list(range(N))
    for start, lo, hi in spans[1:]:
        assert lo >= min(16 - stride, start + lo) and hi <= 16


def test_documents_of_one_token_and_an_empty_tail():
    """Consecutive starts make documents of one target; a start as last token is a target and opens
    nothing."""
    tokens = np.array([1, 1, 1, 5, 6, 1, 7, 1])
    val = validation(tokens)
    assert val.documents.tolist() == [0, 1, 2, 5, 7]
    assert sorted(scored(t.document_plan(val.documents, 4, 2, WORLD))) == list(range(7))


def test_batches_of_one_plan_repeat_few_shapes():
    """All batches of a plan have one shape, hence one graph."""
    made = plans(stream(400, document=60), 100, 10, 300, 50)
    for name in ("plain", "sliding", "chunks"):
        assert {(len(w.start), w.width) for w in made[name]} == {(3, 100)}, name


def ledger_of(N: int = 32) -> t.Ledger:
    """A ledger over N targets."""
    return t.Ledger(validation(stream(N + 1)), WORLD)


def test_a_target_is_not_scored_twice():
    """Neither by a second batch nor inside one batch."""
    ledger, (first, *_) = ledger_of(), t.batched(t.sliding(0, 32, 16, 16), 16, 16)
    ledger.record(first, torch.ones(1, 16))
    with pytest.raises(RuntimeError, match="twice"):
        ledger.record(first, torch.ones(1, 16))
    twin = t.Windows(*(np.concatenate([a, a]) for a in first[:3]), 16)
    with pytest.raises(RuntimeError, match="twice"):
        ledger_of().record(twin, torch.ones(2, 16))


def test_unscored_targets_are_not_lent_and_no_result_before_the_end():
    """Lending needs every target of the range to be scored; a result needs all of them."""
    ledger, (first, second) = ledger_of(), t.batched(t.sliding(0, 32, 16, 16), 16, 16)
    with pytest.raises(RuntimeError, match="not scored"):
        ledger.lend(0, 1)
    ledger.record(first, torch.ones(1, 16))
    with pytest.raises(RuntimeError, match="1 of the targets"):
        ledger.lend(0, 17)
    ids, targets = ledger.lend(0, 16)
    assert torch.equal(ids[1:], targets[:-1]) and len(targets) == 16
    with pytest.raises(RuntimeError, match="16 targets were never scored"):
        ledger.result(0.0)
    ledger.record(second, torch.ones(1, 16))
    result = ledger.result(0.0)
    assert result["val_loss"] == 1 and result["tokens"] == 32 and result["bytes"] == 64
    assert result["val_bpb"] == pytest.approx(32 / 64 / np.log(2))


def test_a_dropped_tail_gives_no_result():
    """A plan that leaves the last target out, as a truncated validation set does, is caught."""
    ledger = ledger_of()
    for w in t.batched(t.sliding(0, 31, 16, 16), 16, 16):
        ledger.record(w, torch.ones(1, 16))
    with pytest.raises(RuntimeError, match="1 targets were never scored"):
        ledger.targets_nats()


@pytest.mark.parametrize("name", ["plain", "sliding", "chunks"])
def test_inputs_beyond_a_window_are_zeros(name):
    """Whatever stands behind hi in the stream, model and loss are handed the pad token."""
    tokens = stream(101, seed=5)
    ledger = t.Ledger(validation(tokens), WORLD)
    for w in plans(tokens, 16, 4, 48, 30)[name]:
        ids, targets = ledger.inputs(w)
        assert ids.shape == targets.shape == (len(w.start), w.width)
        for row, (start, hi) in enumerate(zip(w.start, w.hi)):
            assert ids[row, :hi].tolist() == tokens[start:start + hi].tolist()
            assert targets[row, :hi].tolist() == tokens[start + 1:start + hi + 1].tolist()
            assert not ids[row, hi:].any() and not targets[row, hi:].any()


def test_learning_comes_after_the_score():
    """`score` fetches, scores, books and only then learns, batch by batch."""
    order, ledger = [], ledger_of()
    book = ledger.record
    ledger.record = lambda w, nats: (order.append("record"), book(w, nats))
    t.score(ledger, t.batched(t.sliding(0, 32, 16, 16), 16, 16),
            lambda ids, targets: order.append("nats") or torch.ones(ids.shape),
            lambda ids, targets: order.append("learn"))
    assert order == ["nats", "record", "learn"] * 2


def test_scores_need_no_gradient_and_equal_the_model():
    """`quantized` is the mean of the model's own nats over plain windows, to the last bit of
    fp32."""
    h, tokens = settings(), stream(65)
    model, plan = model_of(h), t.depth_plan(h, True)
    result, ledger = t.score_by_name("quantized", model, validation(tokens), WORLD, Lines())
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        nats = model.nats(ids[:-1].view(4, 16), ids[1:].view(4, 16), plan)
    np.testing.assert_array_equal(ledger.targets_nats(), nats.flatten().numpy())
    assert result["val_loss"] == pytest.approx(float(nats.double().mean()), abs=1e-7)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["quantized", "sliding", "stream"])
def test_two_ranks_share_the_batches(name, monkeypatch):
    """The shares of two ranks are disjoint and together make the score of one."""
    h, tokens = settings(eval_batch_tokens=32), stream(120)
    model, val = model_of(h), validation(tokens)
    alone = t.score_by_name(name, model, val, WORLD, Lines())[1].targets_nats()
    monkeypatch.setattr(t.World, "sum", lambda self, tensor: tensor)
    monkeypatch.setattr(t.Ledger, "result", lambda self, seconds: {})
    shares = []
    for rank in (0, 1):
        world = t.World(rank, 2)
        ledger = t.score_by_name(name, model, val, world, Lines(world))[1]
        shares.append((ledger._scored, ledger._nats.numpy()))
    assert (shares[0][0] ^ shares[1][0]).all()
    np.testing.assert_allclose(shares[0][1] + shares[1][1], alone, atol=1e-5 * (name == "stream"))


@limits(max_examples=100, deadline=None)
@given(N=st.integers(1, 300),
       C=st.integers(1, 40),
       rows=st.integers(1, 5),
       size=st.integers(1, 3),
       document=st.integers(2, 50),
       seed=st.integers(0, 9))
def test_rows_walk_through_every_document_once(N, C, rows, size, document, seed):
    """Over all ranks every target is scored once; a row scores a document's chunks one after the
    other."""
    edges = validation(stream(N + 1, document=document, seed=seed)).documents
    seen, loads = [], []
    for rank in range(size):
        batches = t.document_plan(edges, C, rows, t.World(rank, size))
        seen += scored(batches)
        for row in range(rows):
            walk = [(w.start[row], w.hi[row], w.age[row]) for w in batches if w.hi[row]]
            loads.append(len(walk))
            for (s, hi, n), (next_s, _, next_n) in zip(walk, walk[1:]):
                follows = next_n == n + 1 and next_s == s + C and hi == C
                assert follows or next_n == 0 and next_s in edges and s + hi in edges
            assert not walk or walk[0][2] == 0
    assert sorted(seen) == list(range(N))
    longest = int(-(-np.diff(edges).max() // C))
    assert max(loads) <= sum(loads) / len(loads) + longest    # the bound of list scheduling


def test_the_longest_document_goes_first():
    """Rows begin with the longest documents, equal ones in the order of the stream."""
    edges = np.array([0, 3, 23, 26, 56, 61])
    first = t.document_plan(edges, 10, 3, WORLD)[0]
    assert first.start.tolist() == [26, 3, 0] and first.hi.tolist() == [10, 10, 3]


@pytest.mark.parametrize("stride", [1, 3, 8, 48])
def test_the_cache_equals_the_full_forward(stride):
    """Where the window covers the document, chunks of any length give the nats of one pass."""
    tokens = stream(160, document=20)
    h = settings(eval_seq_len=48, eval_batch_tokens=200, eval_stride=stride)
    model, ids, edges = model_of(h), torch.from_numpy(tokens)[None], validation(tokens).documents
    assert np.diff(edges).max() <= 48
    with torch.no_grad():
        full = [model.nats(ids[:, b:e], ids[:, b + 1:e + 1], t.depth_plan(h, True))[0]
                for b, e in zip(edges[:-1], edges[1:])]
    cached = t.score_by_name("stream", model, validation(tokens), WORLD, Lines())[1]
    np.testing.assert_allclose(cached.targets_nats(), torch.cat(full).numpy(), atol=1e-5)


def test_attention_to_a_cache_equals_attention_to_it_all():
    """Outputs, gradients, and what the cache is given."""
    torch.manual_seed(0)
    B, C, M, H, K, E = 2, 5, 11, 4, 2, 8
    q, k, v = (torch.randn(B, M + C, n, E, requires_grad=True) for n in (H, K, K))
    whole = t.attend(q, k, v, t.whole_rows(torch.zeros(B, M + C)))[:, M:]
    ring = [x[:, :M].transpose(1, 2).detach() for x in (k, v)]
    seen = torch.cat((torch.ones(C, M), torch.ones(C, C).tril()), 1).log().expand(B, 1, -1, -1)
    past = t.Past(*ring, seen, [])
    y = t.recall(q[:, M:], k[:, M:], v[:, M:], past)
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(past.fresh[0], k[:, M:].transpose(1, 2))
    for x, found, wanted in zip("qkv", *(torch.autograd.grad(z.square().sum(), (q, k, v)) for z in (y, whole))):
        torch.testing.assert_close(found[:, M:], wanted[:, M:], msg=x)


def test_the_window_moves_over_a_long_document():
    """Each query reads exactly its last EVAL_SEQ_LEN tokens' keys, so the chunk length is nothing
    but a matter of speed."""
    tokens = np.concatenate([[t.BOS], np.random.default_rng(0).integers(2, 64, 150)])
    found = []
    for stride in (1, 4, 7, 16):
        h = settings(eval_seq_len=16, eval_stride=stride)
        ledger = t.score_by_name("stream", model_of(h), validation(tokens), WORLD, Lines())[1]
        found.append(ledger.targets_nats())
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    h = settings(eval_seq_len=256, eval_stride=16)
    wide = t.score_by_name("stream", model_of(h), validation(tokens), WORLD, Lines())[1]
    np.testing.assert_allclose(wide.targets_nats()[:16], found[0][:16], atol=1e-5)
    assert np.abs(wide.targets_nats()[16:] - found[0][16:]).max() > 1e-3


def test_a_stream_points_beyond_its_window(monkeypatch):
    """The pointer looks EVAL_REACH windows back: its mixture equals the twin over a document of six."""
    tokens = np.concatenate([[t.BOS], np.random.default_rng(0).integers(2, 64, 96)])
    h, seen, pointed = settings(eval_seq_len=16, eval_stride=4), [], t.GPT.pointed
    model = model_of(h)

    def noted(self, x, ids, *rest):
        """Keeps states and tokens of each tick."""
        seen.append((x, ids))
        return pointed(self, x, ids, *rest)

    monkeypatch.setattr(t.GPT, "pointed", noted)
    found = t.score_by_name("stream", model, validation(tokens), WORLD, Lines())[1].targets_nats()
    x, ids = (torch.cat(parts, 1)[0, :96] for parts in zip(*seen))
    with torch.no_grad():
        p = pointer_by_hand(model.bank, x, ids, model.logits(x, model.bank["embed"]).softmax(-1), 16)
    np.testing.assert_allclose(found, -p[torch.arange(96), torch.from_numpy(tokens[1:])].log(), atol=1e-5)
    model.retune(eval_reach=1)
    near = t.score_by_name("stream", model, validation(tokens), WORLD, Lines())[1].targets_nats()
    np.testing.assert_allclose(near[:16], found[:16], atol=1e-5)
    assert np.abs(near[16:] - found[16:]).max() > 1e-3


def test_sealed_tokens_cannot_be_read():
    """While a scorer or a learner runs, the ledger hands out nothing, and holds nothing to
    look at."""
    ledger, (first, second) = ledger_of(), t.batched(t.sliding(0, 32, 16, 16), 16, 16)
    ledger.record(first, torch.ones(1, 16))
    with ledger.sealed():
        assert ledger._tokens is None
        for read in (lambda: ledger.inputs(second), lambda: ledger.lend(0, 16)):
            with pytest.raises(RuntimeError, match="on its own"):
                read()
    assert len(ledger.lend(0, 16)[0]) == 16
