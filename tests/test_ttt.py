"""Test-time training: what comes later cannot reach an earlier score, and a learner that cheats is
caught."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import on_ranks
from support import WORLD, Half, Lines, model_of, repetitive, stream, t, validation
from support import settings as settings_of

# One layer less than elsewhere, still with a loop, a skip, lanes and XSA: most tests here score hundreds of chunks.
settings = functools.partial(settings_of, num_layers=3, loop_end=1, parallel_start_layer=2, xsa_last_n=2)
# Tokens from here on are replaced: in the third chunk of 32, inside a window and a document.
CUT = 75
H = settings(ttt="chunk", ttt_lr=0.05, ttt_epochs=2)
ADAPTERS = dict(ttt_stream_chunk=5, ttt_lora_lr=0.02)
FORMS = dict(chunk=H,
             average=settings(ttt="chunk", ttt_lr=0.05, ttt_ema_decay=0.5, ttt_freeze_blocks=1,
                              ttt_max_chunks=3, ttt_lr_ramp=0.3),
             stream=settings(**ADAPTERS, ttt_learners=2),
             steps=settings(**ADAPTERS, ttt_learners=3, ttt_steps=2),
             phased=settings(ttt="phased", ttt_lr=0.05, ttt_epochs=1, **ADAPTERS))


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


@pytest.mark.parametrize("name", ["quantized", "sliding", "stream"])
@pytest.mark.parametrize("N", [128, 117])
def test_later_tokens_cannot_reach_earlier_scores(name, N):
    """Condition C1: all tokens after a mid-chunk position replaced, earlier scores the same bit for
    bit."""
    assert earlier_scores_agree(functools.partial(nats, name), stream(N + 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("document", [11, 60])
def test_later_tokens_cannot_reach_earlier_scores_of_learners(form, document):
    """Conditions C1 and C3 for every form of test-time training, with short and with long
    documents."""
    score = functools.partial(nats, "ttt", h=FORMS[form])
    assert earlier_scores_agree(score, stream(129, document=document))


@pytest.mark.parametrize("name", ["quantized", "sliding", "ttt"])
def test_later_document_starts_cannot_reach_earlier_scores(name):
    """The same where the replaced part has other documents."""
    assert earlier_scores_agree(functools.partial(nats, name), stream(129), keep_starts=False)


@pytest.mark.parametrize("form", ["stream", "steps"])
def test_later_document_starts_move_documents_by_rounding_only(form):
    """A document that ends elsewhere changes which rows are scored together, which may round
    scores of other documents differently, and nothing else. (Phases end where documents end.)"""
    tokens = stream(129)
    score = functools.partial(nats, "ttt", h=FORMS[form])
    first, second = score(tokens), score(replaced(tokens, False))
    # the last document of the unchanged part may itself be cut, so that its chunks stay
    np.testing.assert_allclose(first[:CUT - 1], second[:CUT - 1], atol=1e-4)


@pytest.mark.parametrize("form", ["stream", "steps"])
def test_documents_do_not_know_of_each_other(form):
    """Condition C4 in any order: a document's scores stay the same bit for bit when the tokens of
    all others change."""
    tokens = stream(129, document=40)
    edges = validation(tokens).documents
    other = np.where(tokens == t.BOS, t.BOS, stream(129, document=1000, seed=3))
    first = nats("ttt", tokens, FORMS[form])
    for d, (b, e) in enumerate(zip(edges[:-1], edges[1:])):
        mixed = other.copy()
        mixed[b:e + 1] = tokens[b:e + 1]
        assert nats("ttt", mixed, FORMS[form])[b:e].tobytes() == first[b:e].tobytes(), d


SMALL_V = dict(vocab_size=10, **ADAPTERS)


def total_probability(score, place: int = 33) -> float:
    """The sum of exp(-nats) of one target over everything it could be, all before it unchanged: 1
    for a distribution. The tokens after it are dropped."""
    h = settings(**SMALL_V)
    tokens = stream(place + 2, V=h.vocab_size, document=17, seed=8)
    tokens[20:place + 1] = 2 + tokens[20:place + 1] % 5    # one long document at the end
    total = 0.0
    for v in range(h.vocab_size):
        tokens[place + 1] = v
        total += np.exp(-np.float64(score(tokens)[place]))
    return total


@pytest.mark.parametrize("changes", [
    dict(), dict(ttt_learners=2), dict(ttt_learners=4), dict(ttt_learners=3, ttt_steps=2),
    dict(ttt="phased", ttt_lr=0.05), dict(ttt="chunk", ttt_lr=0.05)
])
def test_every_form_predicts_a_distribution(changes):
    """Condition C2 from outside: over all of V the probabilities of one place sum to one."""
    h = settings(**SMALL_V | changes)
    assert total_probability(functools.partial(nats, "ttt", h=h)) == pytest.approx(1, abs=1e-5)


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


class Hasty(t.Learners):
    """A cheat: it learns from a chunk, then scores it."""

    def nats_of(self, ids, targets):
        """The mixture's nats after an update on the very targets."""
        super().nats_of(ids, targets)
        super().learn(ids, targets)
        return super().nats_of(ids, targets)

    def learn(self, ids, targets):
        """Has learned already."""


class Luckiest(t.Learners):
    """A cheat: of several learners the one that was right counts, token by token."""

    def nats_of(self, ids, targets):
        """The least nats of any learner."""
        super().nats_of(ids, targets)
        return self.first.detach().view(self.rows, self.N, -1).amin(1)


class Hindsight(t.Learners):
    """A cheat: a mixture whose weights know the loss that they are about to weigh."""

    def nats_of(self, ids, targets):
        """Nats of sum of w_i p_i with w_i in proportion to p_i of the target itself."""
        super().nats_of(ids, targets)
        logs = -self.first.detach().view(self.rows, self.N, -1)
        return -(logs.log_softmax(1) + logs).logsumexp(1)


class Unshared(t.Learners):
    """A cheat: the weights of the mixture sum to more than one."""

    def nats_of(self, ids, targets):
        """Nats of the sum of all p_i."""
        super().nats_of(ids, targets)
        return -(-self.first.detach().view(self.rows, self.N, -1)).logsumexp(1)


class Hashed(t.Learners):
    """A cheat: counts under a hash of the last token AND the target, looked up for the target
    only."""

    def nats_of(self, ids, targets):
        """Nats of half the model, half the share of the hashed pair among earlier ones."""
        nats = super().nats_of(ids, targets)
        key = (ids * 31 + targets) % 7
        before = torch.tril(torch.ones(ids.size(1), ids.size(1)), -1)
        hits = ((key[:, :, None] == key[:, None]) * before).sum(-1)
        return -torch.log(0.5 * torch.exp(-nats) + 0.5 * hits / before.sum(-1).clamp(min=1) + 1e-9)


class Hoarder(t.Learners):
    """A cheat against C4: adapters wander from one document to the next, longest first, while the
    stream has another order."""

    def follow(self, batches):
        """The batches without a fresh start anywhere."""
        self.bank.reset = lambda rows: None
        yield from super().follow(batches)


CHEATS = dict(learns_before_it_scores=Hasty, best_of_the_learners=Luckiest,
              weights_with_hindsight=Hindsight, weights_over_one=Unshared,
              target_in_the_hash_key=Hashed)


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_that_is_no_distribution_is_seen(name, monkeypatch):
    """Whatever uses a target to predict it gives more than one of probability in all."""
    monkeypatch.setattr(t, "Learners", CHEATS[name])
    h = settings(**SMALL_V, ttt_learners=2)
    assert total_probability(functools.partial(nats, "ttt", h=h)) > 1.0001


def test_a_cheat_that_trains_a_stream_before_scoring_is_seen(monkeypatch):
    """Learning from the chunk first also carries later tokens of the chunk to earlier scores."""
    monkeypatch.setattr(t, "Learners", Hasty)
    score = functools.partial(nats, "ttt", h=FORMS["stream"])
    assert not earlier_scores_agree(score, stream(129, document=60))


def test_a_cheat_that_carries_state_across_documents_is_seen(monkeypatch):
    """The test of independent documents fails for a learner that is not reset."""
    monkeypatch.setattr(t, "Learners", Hoarder)
    with pytest.raises(AssertionError):
        test_documents_do_not_know_of_each_other("stream")


@pytest.mark.parametrize("reach", ["inputs", "lend", "tokens"])
@pytest.mark.parametrize("when", ["nats_of", "learn"])
def test_a_cheat_that_reads_ahead_is_refused(reach, when, monkeypatch):
    """A scorer or learner that holds the ledger finds it sealed: no other batch, no loan, no
    tokens."""
    held = {}

    class Ahead(t.Learners):
        """Reads the tokens behind its batch."""

    def peek(self, ids, targets):
        """What comes next, by any of three ways."""
        ledger = held["ledger"]
        if reach == "inputs":
            ledger.inputs(t.Windows(*np.array([[60], [0], [5]]), 5))
        elif reach == "lend":
            ledger.lend(0, 1)
        else:
            ledger._tokens[60:65]

    setattr(Ahead, when, peek)
    keep = t.Ledger.__init__
    monkeypatch.setattr(t.Ledger, "__init__",
                        lambda self, *a: (keep(self, *a), held.update(ledger=self))[0])
    monkeypatch.setattr(t, "Learners", Ahead)
    with pytest.raises((RuntimeError, TypeError), match="on its own|NoneType"):
        nats("ttt", stream(129), FORMS["stream"])


class Poisoned(t.Ledger):
    """A ledger in which every token is garbage that the current batch or loan does not cover."""

    def poisoned(self, readable, read):
        """What `read` finds while all that is not readable is garbage."""
        true = self._tokens
        garbage = torch.from_numpy(stream(len(true), seed=77))
        self._tokens = torch.where(torch.from_numpy(readable), true, garbage)
        try:
            return read()
        finally:
            self._tokens = true

    def inputs(self, w):
        """The batch out of garbage."""
        readable = np.zeros(len(self._tokens), bool)
        for start, hi in zip(w.start, w.hi):
            readable[start:start + hi + 1] = True
        return self.poisoned(readable, lambda: super(Poisoned, self).inputs(w))

    def lend(self, begin, end):
        """The loan out of garbage, and only what is booked."""
        readable = np.zeros(len(self._tokens), bool)
        readable[begin:end + 1] = True
        assert self._scored[begin:end].all()
        return self.poisoned(readable, lambda: super(Poisoned, self).lend(begin, end))


@pytest.mark.parametrize("form", FORMS)
def test_poison_beyond_the_chunk_changes_nothing(form, monkeypatch):
    """Scorers and learners of every form read nothing but their batch and what is lent."""
    tokens = stream(129, document=40)
    clean = nats("ttt", tokens, FORMS[form])
    monkeypatch.setattr(t, "Ledger", Poisoned)
    assert nats("ttt", tokens, FORMS[form]).tobytes() == clean.tobytes()


class Untouchable:
    """A validation set that nobody may look at."""

    def __getattr__(self, name):
        """Refuses."""
        raise AssertionError(f"validation data was read: {name}")


@pytest.mark.parametrize("honest", [True, False])
def test_a_cheat_that_warms_up_on_validation_tokens_is_seen(honest, monkeypatch):
    """The rehearsal runs through with a validation set that cannot be read; one that compiles on
    validation text does not."""
    h = settings(scores="quantized,sliding,stream,ttt", eval_budget_s=1.0)
    data = t.Dataset([stream(3000).astype(np.uint16)], Untouchable(), "test")
    trainer = t.Trainer(h, WORLD, model_of(h), data)
    if not honest:
        monkeypatch.setattr(t, "rehearsal_text", lambda h, data, *rest: data.val)
        with pytest.raises(AssertionError, match="was read"):
            t.rehearse(trainer, data, Lines())
        return
    t.rehearse(trainer, data, Lines(), documents=np.array([0, 40, 100]))
    assert 0 <= trainer.model.h.ttt_steps <= h.ttt_steps


@pytest.mark.parametrize("sizes", [[900], [700, 100, 100], [200, 190, 180, 170, 160], [60] * 15, [7] * 40])
@pytest.mark.parametrize("chunk", [5, 16])
def test_the_rehearsal_scores_in_the_shapes_that_follow(sizes, chunk):
    """On a CPU too, where rows follow from the lengths of documents: no graph is compiled after the clock."""
    h = settings(**ADAPTERS | dict(ttt_stream_chunk=chunk, ttt_learners=2, eval_batch_tokens=192, ttt_chunk_tokens=512))
    documents = np.cumsum([0, *sizes])
    data = t.Dataset([stream(3000).astype(np.uint16)], Untouchable(), "test")
    fake = t.rehearsal_text(h, data, documents, WORLD)
    for steps in (0, 1):
        assert t.tiles(h, fake.documents, steps, WORLD) == t.tiles(h, documents, steps, WORLD)


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_rehearsal_of_gpus_has_the_pieces_of_real_batches(ranks):
    """So `locate` pads their ends to one length, and no row waits long for its only document."""
    h, world = t.Hyperparameters(), t.World(0, ranks, torch.device("cuda"))
    data = t.Dataset([stream(80_000, document=800).astype(np.uint16)], Untouchable(), "test")
    sizes = np.diff(t.rehearsal_text(h, data, np.array([0, 10**6]), world).documents)
    assert sizes[:-1].min() >= 128 and sizes.max() <= 300


class SimulatedTime:
    """A clock that only work moves: a pass over (rows, learners, tokens) costs as many units, and a
    step of learning twice that."""

    def __init__(self, monkeypatch, slower: float = 1.0):
        """Takes the place of the time that the script reads; `slower` times as much where a clock
        was set to `late`."""
        self.now_s, self.slower, self.late = 0.0, slower, False
        forward, learn = t.Learners.forward, t.Learners.learn
        other = {n: getattr(t.time, n) for n in ("monotonic", "strftime", "sleep")}
        monkeypatch.setattr(t, "time", types.SimpleNamespace(perf_counter=lambda: self.now_s, **other))
        monkeypatch.setattr(t.Learners, "forward", lambda *a: self.spend(a, 1) or forward(*a))
        monkeypatch.setattr(t.Learners, "learn",
                            lambda *a: self.spend(a, 2 * a[0].steps) or learn(*a))

    def spend(self, arguments: tuple, passes: int) -> None:
        """Counts the passes of learners over the ids."""
        learners, ids = arguments[:2]
        self.now_s += passes * learners.N * ids.numel() * (self.slower if self.late else 1) / 1000


def test_the_best_form_that_fits_is_taken(monkeypatch):
    """From 2% to 200% of the time of what was asked for, more time never gives a cheaper form,
    what is chosen fits, and nothing is chosen that is dearer than what was asked for."""
    text, found = validation(stream(900, document=60)), []

    def seconds(name, model, *_):
        """A tick costs a unit a learner and pass, and one to start it, so longer chunks are cheaper."""
        h = model.h
        _, C = t.tiles(h, text.documents, h.ttt_steps, WORLD)
        passes = (1 + 2 * h.ttt_steps) * (h.ttt_learners if h.ttt_steps else 1)
        return dict(seconds=passes * 900 * (1 + 9 / C)), None

    monkeypatch.setattr(t, "score_by_name", seconds)
    asked = settings(**ADAPTERS, ttt_learners=3, ttt_steps=2)
    full_s = seconds("", model_of(asked))[0]["seconds"]
    for share in (0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0):
        h, log = dataclasses.replace(asked, eval_budget_s=share * full_s), Lines()
        model = model_of(h)
        need_s, chosen = t.affordable(model, text, text.documents, WORLD, log), model.h
        assert "EVAL_BUDGET_S" in log.lines[0] and chosen.eval_budget_s == h.eval_budget_s
        assert need_s == pytest.approx(1.1 * seconds("", model)[0]["seconds"])
        assert need_s <= h.eval_budget_s or not chosen.ttt_steps, share
        found.append((chosen.ttt_steps, chosen.ttt_learners, -chosen.ttt_stream_chunk))
    assert found == sorted(found) and found[0][0] == 0 and found[-1] == (2, 3, -5), found
    assert len(set(found)) >= 5, found
    unbounded = dataclasses.replace(asked, eval_budget_s=0.0)
    model = model_of(unbounded)
    assert t.affordable(model, text, text.documents, WORLD, log := Lines()) == pytest.approx(1.1 * full_s) and not log.lines
    assert model.h == dataclasses.replace(unbounded, fused_kernels=model.h.fused_kernels)


LATE = dict(ttt_stream_chunk=8, ttt_lora_lr=0.02, ttt_learners=2, eval_stride=8, ttt_epochs=1)


@pytest.mark.parametrize("form, slower", [("stream", 1.0), ("stream", 1.3), ("stream", 3.0), ("phased", 2.0)])
def test_a_score_that_falls_behind_ends_in_time(form, slower, monkeypatch):
    """On a machine that scores slower than it rehearsed, documents that have not begun are scored
    without learners; all others to the same bits, every target once, and in time."""
    tokens, clock = stream(1600, document=60), SimulatedTime(monkeypatch, slower)
    h = settings(**LATE, ttt=form, ttt_phases=2, eval_budget_s=0.0)
    plain, text, log = nats("ttt", tokens, h), validation(tokens), Lines()
    model = model_of(dataclasses.replace(h, eval_budget_s=1.2 * clock.now_s))
    clock.now_s, clock.late = 0.0, True
    found, same = t.score_by_name("ttt", model, text, WORLD, log)[1].targets_nats(), 0
    assert clock.now_s <= model.h.eval_budget_s
    for b, e in zip(text.documents[:-1], text.documents[1:]):
        same += np.array_equal(plain[b:e], found[b:e])
    if form == "stream":
        # a little too slow: learners go on until there is only time for the plain weights
        least = {1.0: 1.0, 1.3: 0.5, 3.0: 0.0}[slower] * (len(text.documents) - 1)
        assert (same == len(text.documents) - 1) == (slower == 1.0) and same >= max(3, least), (same, least)
        assert any(line.startswith("late:") for line in log.lines) == (slower > 1)


def test_one_long_document_ends_in_time(monkeypatch):
    """A document that is being scored when time runs out is read again from its start by the plain
    weights, and what was booked stays as it was."""
    tokens, clock = stream(800, document=10**6), SimulatedTime(monkeypatch, 3.0)
    h, text = settings(**LATE, eval_budget_s=0.0), validation(tokens)
    plain, log, base = nats("ttt", tokens, h), Lines(), nats("stream", tokens, h)
    assert len(text.documents) == 2
    model = model_of(dataclasses.replace(h, eval_budget_s=1.2 * clock.now_s))
    clock.now_s, clock.late = 0.0, True
    found = t.score_by_name("ttt", model, text, WORLD, log)[1].targets_nats()
    assert clock.now_s <= model.h.eval_budget_s and any(line.startswith("late:1 ") for line in log.lines)
    switch = int((found == plain).argmin())
    assert switch > 100 and np.array_equal(found[:switch], plain[:switch])
    np.testing.assert_allclose(found[switch:], base[switch:], atol=1e-5)


def late_on_a_rank(world: t.World, folder: str) -> None:
    """Saves the nats of a score that is behind at its first look at the clock, when this is the only
    document left, on one rank."""
    tokens = 2 + np.random.default_rng(0).integers(0, 10, 650)
    tokens[[0, 600, 615, 630]] = t.BOS
    model, log = model_of(settings(**LATE, eval_budget_s=1e-6)), Lines(world)
    found = t.score_by_name("ttt", model, validation(tokens), world, log)[1].targets_nats()
    np.save(f"{folder}/late_{world.rank}.npy", found)
    np.save(f"{folder}/plain_{world.rank}.npy", t.score_by_name(
        "stream", model, validation(tokens), world, log)[1].targets_nats())


def test_ranks_with_nothing_left_wait_for_the_others(tmp_path):
    """Only one of two ranks reads a document again: collectives still pair, all nats are there."""
    on_ranks(2, late_on_a_rank, str(tmp_path))
    late, other, plain = (np.load(tmp_path / f"{name}.npy") for name in ("late_0", "late_1", "plain_0"))
    np.testing.assert_array_equal(late, other)
    np.testing.assert_allclose(late[200:599], plain[200:599], atol=1e-5)
    assert not np.allclose(late[:100], plain[:100], atol=1e-5)


def test_the_choice_of_late_documents_knows_no_tokens(monkeypatch):
    """C1 and C3 where time runs out: with all tokens after a place replaced, and documents of the
    same lengths, earlier scores stay bit for bit."""
    SimulatedTime(monkeypatch)
    h, tokens = settings(**LATE, eval_budget_s=2.0), stream(1000, document=50)
    changed = np.where(tokens == t.BOS, t.BOS, np.maximum(2, stream(1000, document=2000, seed=5)))
    changed[:CUT] = tokens[:CUT]
    first, second = nats("ttt", tokens, h), nats("ttt", changed, h)
    assert not np.array_equal(first, nats("ttt", tokens, dataclasses.replace(h, eval_budget_s=0.0)))
    assert first[:CUT - 1].tobytes() == second[:CUT - 1].tobytes()


def test_no_steps_are_the_plain_stream():
    """Without a step of learning there is one learner, and the score is that of the cache."""
    tokens, h = stream(129, document=40), settings(**ADAPTERS, ttt_steps=0)
    np.testing.assert_allclose(nats("ttt", tokens, h), nats("stream", tokens, h), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_documents_of_no_and_of_one_token(form):
    """Starts that follow each other, and a stream of a single target, are scored in every form."""
    for tokens in ([1, 1, 1, 5, 6, 1, 7, 1], [1, 9], [1, 1], [8, 3, 1, 1, 1, 1]):
        found = nats("ttt", np.array(tokens), FORMS[form])
        assert len(found) == len(tokens) - 1 and np.isfinite(found).all() and (found > 0).all()


def live_bytes() -> int:
    """Bytes of all tensors alive."""
    gc.collect()
    kept = {}
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor):
            with contextlib.suppress(RuntimeError):    # what a compiler left behind has no memory
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(kept.values())


LONG = dict(vocab_size=16, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, xsa_last_n=1,
            num_loops=0, parallel_start_layer=1, eval_seq_len=64, eval_batch_tokens=128)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        """None yet."""
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs an operation, noting its name if its result goes to the host or sizes a tensor."""
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("form", ["stream", "steps"])
def test_the_host_waits_for_no_chunk(form):
    """Four times as many chunks make the host wait no more often for the device: it only queues
    work. With a budget it looks at the clock at most 64 times more."""
    found = []
    for N, budget_s in ((20, 0.0), (80, 0.0), (160, 480.0)):
        with Waits() as waits:
            h = dataclasses.replace(FORMS[form], eval_budget_s=budget_s)
            nats("ttt", stream(N, document=40), h)
        found.append(len(waits.found))
    assert found[0] == found[1] <= 8 and found[1] < found[2] <= found[1] + 64, found


def test_memory_is_flat_and_long_documents_work(monkeypatch):
    """Over a document of 20,200 tokens nothing grows, and places far into it are scored as
    exactly as near its start."""
    h = settings(**LONG, ttt_stream_chunk=300, ttt_learners=2, eval_stride=60)
    h = dataclasses.replace(h, eval_seq_len=300, eval_batch_tokens=600)
    tokens = np.concatenate([[t.BOS], np.random.default_rng(0).integers(2, 16, 20_200)])
    sizes, opened = [], t.Cache.open

    def watched_open(self, behind):
        """Notes what is alive now and then."""
        if int(behind[0]) % 6_000 == 0:
            sizes.append(live_bytes())
        opened(self, behind)

    monkeypatch.setattr(t.Cache, "open", watched_open)
    found = nats("ttt", tokens, h)
    assert len(found) == 20_200 and np.isfinite(found).all()
    assert len(sizes) == 4 and max(sizes[1:]) - min(sizes[1:]) < 4096, sizes
    # one layer sees 64 keys back and the pointer EVAL_REACH times as many, so the last targets need only what is near
    h = settings(**LONG, eval_stride=60)
    far = nats("stream", tokens, h)[-100:]
    near = nats("stream", np.concatenate([[t.BOS], tokens[-101 - (h.eval_reach + 1) * h.eval_seq_len:]]), h)[-100:]
    np.testing.assert_allclose(far, near, atol=1e-5)


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


def test_two_ranks_learn_the_same(monkeypatch):
    """The gradients of two ranks' sequences add up to the gradient of one rank that has them
    all."""
    monkeypatch.setattr(t, "SGD_CLIP", 1e9)
    tokens = torch.from_numpy(stream(65))
    ids, targets = tokens[:-1], tokens[1:]
    h = settings(ttt_lr=0.05, ttt_epochs=1, ttt_batch_seqs=4)

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
    for name, h in [("sliding", H), *FORMS.items()]:
        for side, text in (("whole", tokens), ("replaced", replaced(tokens, True))):
            found = t.score_by_name("sliding" if h is H and name == "sliding" else "ttt", model_of(h),
                                    validation(text), world, Lines(world))[1].targets_nats()
            np.save(f"{folder}/{name}_{side}_{world.rank}.npy", found)


def test_two_processes_score_alike_and_causally(tmp_path):
    """Two gloo ranks agree with each other and with one process; later tokens reach no earlier
    score there either."""
    on_ranks(2, scores_on_a_rank, str(tmp_path))
    for name in ("sliding", *FORMS):
        whole, other = (np.load(tmp_path / f"{name}_{side}_0.npy")
                        for side in ("whole", "replaced"))
        np.testing.assert_array_equal(whole, np.load(tmp_path / f"{name}_whole_1.npy"))
        alone = nats("sliding" if name == "sliding" else "ttt", stream(129), FORMS.get(name, H))
        np.testing.assert_allclose(whole, alone, atol=2e-5)
        assert whole[:CUT - 1].tobytes() == other[:CUT - 1].tobytes() and not np.array_equal(
            whole[CUT:], other[CUT:])


def test_the_parts_compile_once(monkeypatch):
    """What GPUs run, compiled parts with adapters and cache, scores alike; a graph for each part, two for the first step of
    depth, whose input no adapter was before, and for lanes: not one for each step, and none more for more chunks."""
    tokens, graphs = stream(60, document=40), []

    def count(graph, inputs):
        """Counts a graph and runs it as it is."""
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    h = dataclasses.replace(FORMS["steps"], eval_batch_tokens=16)    # one row, however many documents
    plain, model = nats("ttt", tokens, h), model_of(h)
    model.compile("full")
    for _ in range(2):
        found = t.score_by_name("ttt", model, validation(tokens), WORLD, Lines())[1].targets_nats()
        np.testing.assert_allclose(found, plain, atol=1e-4)
        assert len(graphs) == 7, len(graphs)
        tokens, plain = stream(180, document=40), nats("ttt", stream(180, document=40), h)
