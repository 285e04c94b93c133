"""Quantisation: rounding on a grid, GPTQ against rounding, its factor against algebra, second
moments against hand."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from support import (
    WORLD,
    Half,
    Lines,
    curvature_of,
    found_of,
    model_of,
    rows_of,
    settings,
    stream,
    t,
)


def bank(L: int = 3,
         rows: int = 24,
         cols: int = 40,
         tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (L, rows, cols), correlated inputs (L, tokens, cols) and their second moments (L,
    cols, cols) fp64."""
    torch.manual_seed(1)
    w = torch.randn(L, rows, cols)
    x = torch.randn(L, tokens, cols // 4) @ torch.randn(L, cols // 4, cols) + 0.3 * torch.randn(
        L, tokens, cols)
    x = x * torch.linspace(0.2, 3, cols)
    return w, x, x.double().mT @ x.double()


def gptq(w, moment, bits, sigmas, damping=0.01, states=0, block=128) -> t.Coded:
    """GPTQ on the uniform grid of so many bits and standard deviations, as STEP_SEARCH=uniform runs it."""
    grid = t.uniform_grid(w, bits, sigmas)
    grid = grid._replace(scale=grid.scale / (2 if states else 1))
    return t.gptq(w, t.inverse_factor(moment, damping), grid, 2**(bits - 1) - 1, states, block)


def output_error(w: torch.Tensor, coded: t.Coded, x: torch.Tensor) -> torch.Tensor:
    """Squared error of the outputs x w^T of each layer, (L,)."""
    return (x @ (w - coded.decode()).mT).square().sum((1, 2))


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_gptq_beats_rounding(bits):
    """The error of the outputs is well below that of nearest rounding on the same grid, in every
    layer."""
    w, x, moment = bank()
    coded, rounded = gptq(w, moment, bits, 4.0, 0.01, block=16), t.round_rows(w, bits, 4.0)
    assert all(map(torch.equal, coded.grid, rounded.grid))
    assert (output_error(w, coded, x) < 0.5 * output_error(w, rounded, x)).all()


def test_gptq_of_white_inputs_is_rounding():
    """Where inputs are uncorrelated no error can be compensated, so each weight goes to its nearest
    code."""
    w, _, _ = bank()
    eye = torch.eye(w.size(2), dtype=torch.float64).expand(w.size(0), -1, -1)
    assert torch.equal(gptq(w, eye, 6, 4.0, 0.01).codes, t.round_rows(w, 6, 4.0).codes)


def test_a_bank_at_once_equals_layer_by_layer():
    """All layers in one call give the codes and steps of one call per layer."""
    w, _, moment = bank()
    whole = gptq(w, moment, 5, 4.0, 0.01, block=16)
    for i in range(w.size(0)):
        alone = gptq(w[i:i + 1], moment[i:i + 1], 5, 4.0, 0.01, block=16)
        assert torch.equal(alone.codes[0], whole.codes[i]) and torch.equal(
            alone.grid.rows()[0], whole.grid.rows()[i])


@pytest.mark.parametrize("block", [1, 7, 40, 128])
def test_the_block_size_changes_speed_only(block):
    """Any block size gives the codes of column-by-column GPTQ, up to rare ties of rounding."""
    w, x, moment = bank()
    one, other = gptq(w, moment, 5, 4.0, 0.01, block=1), gptq(w, moment, 5, 4.0, block=block)
    assert (one.codes != other.codes).float().mean() < 0.002
    torch.testing.assert_close(output_error(w, one, x),
                               output_error(w, other, x),
                               rtol=0.02,
                               atol=0)


def test_gptq_follows_its_equations():
    """One layer against a plain loop: q_j = round(w_j), error / U_jj, spread over the columns to
    come by row U_j."""
    w, _, moment = bank(L=1, rows=5, cols=12)
    coded = gptq(w, moment, 4, 4.0, 0.01)
    order = moment[0].diagonal().argsort(descending=True, stable=True).numpy()
    H = moment[0].numpy()[np.ix_(order, order)]
    H = H + 0.01 * np.diag(H).mean() * np.eye(12)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    left, step = w[0].double().numpy()[:, order], coded.grid.rows()[0, :, 0].double().numpy()
    for j in range(12):
        q = np.clip(np.round(left[:, j] / step), -7, 7)
        np.testing.assert_array_equal(coded.codes[0, :, order[j]].numpy(), q)
        left -= np.outer((left[:, j] - q * step) / U[j, j], np.where(np.arange(12) >= j, U[j], 0))


def test_the_factor_is_that_of_the_inverse():
    """U is upper triangular and U^T U is the inverse of the damped, reordered moment."""
    _, _, moment = bank(cols=24)
    order, upper = t.inverse_factor(moment, 0.01)
    for i in range(moment.size(0)):
        diagonal = moment[i].diagonal()
        assert sorted(order[i].tolist()) == list(range(24)) and (diagonal[order[i]].diff()
                                                                 <= 0).all()
        H = moment[i][order[i]][:, order[i]] + 0.01 * diagonal.mean() * torch.eye(
            24, dtype=torch.float64)
        U = upper[i].double()
        assert torch.equal(U, U.triu())
        torch.testing.assert_close(U.mT @ U @ H,
                                   torch.eye(24, dtype=torch.float64),
                                   atol=2e-4,
                                   rtol=0)


def test_dead_and_dependent_inputs_are_no_problem():
    """Columns that never fire, duplicated columns and a layer without any input all give finite
    codes."""
    w, x, _ = bank()
    x = x.clone()
    x[:, :, 5], x[:, :, 7], x[2] = 0, x[:, :, 8], 0
    coded = gptq(w, x.double().mT @ x.double(), 4, 4.0, 0.01)
    assert coded.decode().isfinite().all() and coded.codes.abs().max() <= 7
    assert (output_error(w, coded, x)[:2] <= output_error(w, t.round_rows(w, 4, 4.0), x)[:2]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_moment_that_is_not_finite_is_refused(bad):
    """The sentence names the knob and the reason."""
    w, _, moment = bank()
    moment[1, 3, 3] = bad
    with pytest.raises(t.Refusal, match="GPTQ_DAMPING=0.01.*NaN or infinity"):
        gptq(w, moment, 4, 4.0, 0.01)


@pytest.mark.parametrize("bits", [2, 6, 7, 8])
@pytest.mark.parametrize("sigmas", [0.0, 2.0])
def test_rounding_is_within_half_a_step(bits, sigmas):
    """Inside the clip every weight is at most half a step off; beyond it the largest code
    stands."""
    w, _, _ = bank()
    coded, top = t.round_rows(w, bits, sigmas), 2**(bits - 1) - 1
    step = coded.grid.rows()
    assert coded.codes.dtype == torch.int16 and coded.grid.row.dtype == torch.int8
    assert coded.codes.abs().max() <= top
    inside = w.abs() <= top * step
    assert ((w - coded.decode()).abs() <= step * 0.5001)[inside].all()
    assert (coded.codes.abs() == top)[~inside].all()
    # fp16 may round a step down, so a row's largest value can be clipped
    assert inside.float().mean() > (0.9 if sigmas else 0.97)


def test_rows_of_zeros_and_of_huge_values_keep_finite_steps():
    """A row of zeros decodes to zeros, huge rows to finite numbers; a step is never zero or
    infinite in fp16."""
    w = torch.stack([torch.zeros(8), torch.full((8, ), 1e9), torch.full((8, ), 1e-12)])[None]
    for sigmas in (0.0, 4.0):
        coded = t.round_rows(w, 6, sigmas)
        assert (coded.grid.rows()
                > 0).all() and coded.decode().isfinite().all() and not coded.decode()[0, 0].any()


def gradients_by_hand(model: t.GPT, batches: int) -> list[dict[str, torch.Tensor]]:
    """Of every sequence, the gradient of each tapped bank (L, rows, cols) for labels drawn from the model."""
    h, found = model.h, []
    for number, ids in enumerate(rows_of(h, batches).split(1)):
        dice = torch.Generator().manual_seed(h.seed + number)
        p = model.log_probs(model.hidden(ids, t.depth_plan(h, True)), ids, model.bank)[0].exp()
        labels = p.detach().multinomial(1, generator=dice)
        model.zero_grad()
        (-p.gather(1, labels).log().sum()).backward()
        found.append({n: (g := model.bank[n].grad.double()).view(-1, *g.shape[-2:]) for n in t.tapped(h)})
    model.zero_grad()
    return found


def test_curvature_by_hand():
    """d and H from the gradients of single sequences: squares of rows, products of columns whose rows are scaled alike,
    banks of a tap together."""
    h = settings()
    model = model_of(h)
    rows, inputs = curvature_of(model, batches=2)
    assert all(p.grad is None for p in model.parameters())
    G, moments = gradients_by_hand(model, 2), {}
    assert set(rows) == set(t.tapped(h)) and set(inputs) == {t.roles(h)[n].tap for n in rows}
    for name in rows:
        d = sum(g[name].square().sum(-1) for g in G)
        torch.testing.assert_close(rows[name], (d + 1e-3 * d.mean(-1, keepdim=True)).float(), rtol=1e-3, atol=1e-9)
        for g in G:
            size = g[name].square().sum(-1)
            weight = 1 / (size + 0.1 * size.mean(-1, keepdim=True) + 1e-30) / g[name].size(1)
            tap = t.roles(h)[name].tap
            moments[tap] = moments.get(tap, 0) + torch.einsum("lrc,lr,lrd->lcd", g[name], weight, g[name])
    for tap, H in inputs.items():
        assert H.dtype == torch.float64 and torch.allclose(torch.einsum("lcc->l", H), torch.ones(len(H), dtype=H.dtype))
        wanted = moments[tap] / torch.einsum("lcc->l", moments[tap])[:, None, None]
        torch.testing.assert_close(H, wanted, rtol=1e-3, atol=1e-6)


class Noting(Half):
    """One of two ranks, which keeps what it hands in."""
    sums: list

    def sum(self, tensor):
        """Its own part, noted."""
        self.sums.append(tensor.clone())
        return tensor


def test_curvature_does_not_depend_on_the_number_of_ranks():
    """The parts of two ranks add up to what one rank finds, to the rounding of fp64."""
    model, parts = model_of(settings()), []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        world = Noting(rank, size)
        object.__setattr__(world, "sums", [])
        curvature_of(model, world)
        parts.append(world.sums)
    for whole, first, second in zip(*parts):
        torch.testing.assert_close(first + second, whole, rtol=1e-12, atol=1e-15)
        assert not torch.allclose(first, whole)


def test_curvature_foretells_the_divergence():
    """Small errors in one role-layer at a time: half of sum_r d_r E_r H E_r^T per token and sequence is within a factor
    of three of the KL divergence that they really cause, whatever bank they are in."""
    h = settings(train_seq_len=32, micro_batch_tokens=64, train_batch_tokens=128)
    model = model_of(h)
    count = 40
    rows, inputs = curvature_of(model, batches=count)
    ids = t.Loader(h, WORLD, [stream(3000).astype(np.uint16)]).next().ids.view(-1, h.train_seq_len)

    def predictions() -> torch.Tensor:
        """Log-probabilities of every token."""
        with torch.no_grad():
            return model.log_probs(model.hidden(ids, t.depth_plan(h, True)), ids, model.bank)

    exact, dice = predictions(), torch.Generator().manual_seed(0)
    for name, layer in (("wq", 1), ("wv", 0), ("wo", 3), ("w_up", 2), ("w_down", 1), ("embed", 0)):
        w, kl = t.bank_of(model, name), 0.0
        size = 0.02 * w[layer].std()
        wanted = 0.0
        for _ in range(8):
            E = size * torch.randn(w[layer].shape, generator=dice)
            kept = w[layer].clone()
            w[layer] += E
            kl += float((exact.exp() * (exact - predictions())).sum(-1).mean())
            w[layer] = kept
            H = inputs[t.roles(h)[name].tap][layer].float()
            wanted += 0.5 * float((rows[name][layer] * ((E @ H) * E).sum(-1)).sum()) / (count * 2 * h.train_seq_len)
        assert 1 / 3 < wanted / kl < 3, (name, wanted, kl)


def test_text_that_the_model_writes(monkeypatch):
    """A model that always says 7 writes 7; half of the rows begin a document; two ranks write the rows of one, by turns; rows
    written side by side are those written apart; a rehearsal repeats what its ticks wrote."""
    h = settings(gptq_calibration_batches=8, micro_batch_tokens=64)
    model = model_of(h)
    text, length = t.written(model, WORLD), h.train_seq_len
    assert text.shape == (8 * 64 // length, length) and 0 <= text.min() and text.max() < h.vocab_size
    assert 0.2 < (text[:, 0] == t.BOS).float().mean() < 0.8 and len(text.unique()) > 20
    few = t.written(model, WORLD, 2)
    assert torch.equal(few, few[:, :2].repeat(1, length // 2)) and few.shape == text.shape
    monkeypatch.setattr(t, "ABREAST", 3)    # 12 rows and the rest
    for rank in (0, 1):
        assert torch.equal(t.written(model, Half(rank, 2)), text[rank::2])
    model.retune(pointer=False)
    model.log_probs = lambda x, ids, bank, cache: torch.nn.functional.one_hot(torch.full_like(ids, 7), h.vocab_size).log()
    assert (t.written(model, WORLD)[:, 1:] == 7).all()


def test_what_the_model_writes_follows_its_probabilities():
    """First words after BOS occur as often as a forward pass over BOS says they should."""
    model = model_of(h := settings(gptq_calibration_batches=4, micro_batch_tokens=4096, train_batch_tokens=4096))
    rows = []
    for seed in range(8):
        model.retune(seed=seed)
        rows.append(t.written(model, WORLD, 2))
    text = torch.cat(rows)
    second = text[text[:, 0] == t.BOS, 1]
    with torch.no_grad():
        x = model.hidden(torch.tensor([[t.BOS]]), t.depth_plan(h, True))
        p = model.logits(x[0, 0], model.bank["embed"]).softmax(-1)
    found = torch.bincount(second, minlength=h.vocab_size) / len(second)
    # five standard errors of the commonest
    assert (found - p).abs().max() < 5 * (p.max() / len(second)).sqrt()


def test_the_rest_makes_up_for_what_was_rounded():
    """Moves what is not fixed, and only that, towards the predictions of the model as it was; a rate that falls to zero; two
    ranks that share the text move alike."""
    h = settings(train_seq_len=16, micro_batch_tokens=64)
    model = model_of(h)
    found, exact = found_of(model, 8), {n: w.detach().clone() for n, w in model.bank.items()}
    teacher = t.Distillation(model, found, WORLD, 2.5)
    model.bank["embed"].data += 0.1 * torch.randn(exact["embed"].shape, generator=torch.Generator().manual_seed(0))
    rough = model.bank["embed"].detach().clone()
    first = teacher.run(["embed"], 1)
    for _ in range(3):
        last = teacher.run(["embed"], 16)
    assert last < 0.7 * first
    assert torch.equal(model.bank["embed"], rough) and not any(torch.equal(model.bank[n], exact[n]) for n in ("wq", "w_down"))
    assert all(w.grad is None for w in model.bank.values())


def test_banks_are_rounded_in_turn(monkeypatch):
    """Closer to the model's predictions, on text that it did not see, than all at once, at the same bytes; without steps the
    same as the search alone; nothing moves where the search is over the budget."""
    h = settings(train_seq_len=16, micro_batch_tokens=256, train_batch_tokens=256, num_layers=2, num_loops=0, xsa_last_n=1,
                 parallel_start_layer=1, trellis_states=0)
    lost, blobs, found = {}, {}, found_of(model_of(h), 8)
    monkeypatch.setattr(t, "ROOM_USED", 0.996)    # bytes are few: fewer passes hit the mark
    for steps in (0, 16):
        model = model_of(h)
        plan, ids, bank = t.depth_plan(h, True), rows_of(h, 20)[256:], {n: w.detach().clone() for n, w in model.bank.items()}
        with torch.no_grad():
            truth = model.hidden(ids, plan)
        model.retune(budget_bytes=6_500, rounding_steps=steps)
        log = Lines()
        blobs[steps] = t.round_in_turn(model, found, 1000, WORLD, log).blob
        assert 0.99 * 5_500 <= len(blobs[steps]) <= 5_500
        assert sum(line.startswith("round:") for line in log.lines) == (len(t.tapped(h)) - 1) * (steps > 0)
        t.load_stored(model, t.unpack(blobs[steps])[1])
        with torch.no_grad():
            lost[steps] = float(t.divergence(model, ids, model.hidden(ids, plan), truth, bank))
    assert lost[16] < 0.9 * lost[0], lost
    fresh = model_of(h)
    fresh.retune(budget_bytes=6_500, rounding_steps=0)
    assert blobs[0] == t.fit_budget(fresh, found, 1000, Lines()).blob
    before = fresh.bank["wo"].detach().clone()
    fresh.retune(rounding_steps=16)
    monkeypatch.setattr(t, "fit_budget", lambda *_: t.Fitted(b"x" * 5_501, {}, {}))
    assert len(t.round_in_turn(fresh, found, 1000, WORLD, Lines()).blob) == 5_501 and torch.equal(before, fresh.bank["wo"])


def test_every_role_is_stored_as_its_row_says():
    """Bits below 16 become codes of that width, the rest fp16, in the order of the table."""
    h = settings(matrix_bits=5, embed_bits=7, matrix_clip_sigmas=4.0, trellis_states=0,
                 step_search="uniform")
    model = model_of(h)
    stored = t.quantise(model, found_of(model))
    assert list(stored) == list(t.roles(h))
    for name, role in t.roles(h).items():
        value, w = stored[name], model.bank[name].detach()
        if role.bits == 16:
            assert torch.equal(value, w.half())
        else:
            assert value.codes.abs().max() <= 2**(role.bits - 1) - 1
            assert (value.decode().view_as(w) - w).square().mean() < 0.1 * w.square().mean() + 1e-9


def test_loading_gives_the_decoded_weights():
    """After `load_stored` the banks are exactly what the codes and steps say, and storing fp16
    again is lossless."""
    model = model_of(settings())
    stored = t.quantise(model, found_of(model))
    t.load_stored(model, stored)
    for name, value in stored.items():
        w = value.decode().view_as(model.bank[name]) if isinstance(value,
                                                                   t.Coded) else value.float()
        assert torch.equal(model.bank[name], w)


def test_quantised_model_stays_close():
    """At 6 and 7 bits with narrow clips the loss moves by little; at 2 bits it moves by much
    more."""
    ids = torch.from_numpy(stream(129))
    moved = []
    for bits in (7, 2):
        h = settings(matrix_bits=bits,
                     embed_bits=bits,
                     matrix_clip_sigmas=4.0,
                     embed_clip_sigmas=4.0)
        model = model_of(h)
        nats = lambda: model.nats(ids[None, :-1], ids[None, 1:], t.depth_plan(h, True)).detach()
        before = nats()
        t.load_stored(model, t.quantise(model, found_of(model)))
        moved.append(float((nats() - before).square().mean().sqrt()))
    assert moved[0] < 0.2 and moved[0] < 0.3 * moved[1]


def paths(states: int, length: int) -> list[list[tuple[int, int]]]:
    """Every path of (parity, bit 1) pairs that the trellis allows from state 0."""
    follow, found = t.trellis_next(states), [([], 0)]
    for _ in range(length):
        found = [([*path, (state & 1, bit)], int(follow[state, bit])) for path, state in found
                 for bit in (0, 1)]
    return [path for path, _ in found]


@pytest.mark.parametrize("states", [4, 8])
@pytest.mark.parametrize("run", [64, 3])
def test_the_trellis_search_finds_the_best_path(states, run):
    """The codes have the least squared error of all paths, found by trying each."""
    torch.manual_seed(0)
    targets = 3 * torch.randn(4, 7, dtype=torch.float64)
    codes = t.trellis_codes(targets, states, run=run).double()
    t.check_trellis(codes.to(torch.int16).numpy()[:, :, None], states)
    error = (targets - codes).square().sum(1)
    for row, x in enumerate(targets.tolist()):
        best = min(sum((value - (low := p + 2 * b) - 4 * round((value - low) / 4))**2
                       for value, (p, b) in zip(x, path)) for path in paths(states, 7))
        assert float(error[row]) == pytest.approx(best, abs=1e-5)


def test_the_trellis_beats_plain_gptq():
    """Half the step along a trellis costs no more bits and leaves a smaller output error."""
    w, x, moment = bank(rows=64)
    plain, along = (gptq(w, moment, 4, 4.0, 0.01, states) for states in (0, 8))
    t.check_trellis(along.codes.numpy(), 8)
    assert (output_error(w, along, x) < 0.95 * output_error(w, plain, x)).all()
    sizes = [len(t.encode_codes([c.codes.numpy()], states)[0]) for c, states in ((plain, 0), (along, 8))]
    assert sizes[1] < 1.03 * sizes[0]


def test_uniform_steps_are_the_clip_sigmas(monkeypatch):
    """STEP_SEARCH=uniform: the largest code stands at k standard deviations of its row to half a
    quarter octave, columns are equal, whatever the powers say."""
    monkeypatch.setattr(t, "ROW_STEP_POWER", 0.0)
    monkeypatch.setattr(t, "COLUMN_STEP_POWER", 1.0)
    h = settings(step_search="uniform")
    model = model_of(h)
    for name, value in t.quantise(model, found_of(model)).items():
        role = t.roles(h)[name]
        if role.tap:
            w = t.bank_of(model, name)
            asked = role.sigmas * w.std(-1, keepdim=True) / (2**(role.bits - 1) - 1) / 2
            ratio = (value.grid.rows() / asked).log2()
            assert ratio.abs().max() <= 0.5 / t.OCTAVE + 1e-3 and abs(ratio.mean()) < 0.07
            assert not value.grid.column.any()


def test_steps_of_rows_and_columns_follow_their_powers():
    """A column's exponent is OCTAVE * power * log2 of its entry of U, in the order of the inputs, a row's OCTAVE * power *
    log2 of 1 / sqrt(d); both are zero on average."""
    h = settings()
    model = model_of(h)
    found = found_of(model)
    for name in ("embed", "wk", "w_down"):
        order, upper = found.factors[t.roles(h)[name].tap]
        grid, w = t.searched_grid(model, name, found), t.bank_of(model, name)
        for i in range(len(w)):
            log = torch.empty(w.size(2)).scatter_(0, order[i], upper[i].diagonal().log2())
            wanted = t.COLUMN_STEP_POWER * t.OCTAVE * (log - log.mean())
            assert (grid.column[i] - wanted).abs().max() <= 0.5001
            log = -0.5 * found.rows[name][i].log2()
            wanted = t.ROW_STEP_POWER * t.OCTAVE * (log - log.mean())
            assert (grid.row[i] - wanted).abs().max() <= 0.5001


def test_rows_that_cost_more_get_the_smaller_errors():
    """The path of a column along the trellis passes through all its rows, and spares those that weigh."""
    w, x, moment = bank(rows=64)
    weight = torch.ones(3, 64)
    weight[:, ::2] = 100
    grid, factor = t.uniform_grid(w, 4, 4.0, 0.0), t.inverse_factor(moment, 0.01)
    even, uneven = (t.gptq(w, factor, grid, 32_760, 8, weight=a) for a in (None, weight))
    lost = lambda coded, first: (x @ (w - coded.decode()).mT).square().sum(1)[:, first::2].sum(1)    # (L,)
    assert (lost(uneven, 0) < 0.9 * lost(even, 0)).all() and (lost(uneven, 1) > lost(even, 1)).all()


def test_damage_is_that_of_rounding():
    """What is reckoned for a role-layer is in one ratio to what GPTQ without a trellis really leaves there."""
    h = settings(trellis_states=0)
    model = model_of(h)
    rows, inputs = curvature_of(model)
    found = t.Curvature(rows, {tap: t.inverse_factor(H, h.gptq_damping) for tap, H in inputs.items()})
    grids, ratios = {n: t.searched_grid(model, n, found) for n in t.tapped(h)}, []
    for name, damage in t.damage_of(model, found, grids).items():
        grid = grids[name]._replace(scale=0.1 * grids[name].scale)    # fine steps, whose errors are spread evenly
        tap = t.roles(h)[name].tap
        E = t.bank_of(model, name) - t.gptq(t.bank_of(model, name), found.factors[tap], grid).decode()
        left = (rows[name] * ((E @ inputs[tap].float()) * E).sum(-1)).sum(-1)
        ratios.append(left / damage)
    ratios = torch.cat(ratios)
    assert ratios.std() < 0.3 * ratios.mean(), ratios


def test_steps_grow_with_weights_and_shrink_with_damage():
    """Octaves are half the log2 of weights over damage, weighted mean zero."""
    h, rng = settings(), np.random.default_rng(0)
    damage = {n: torch.tensor(np.exp(rng.normal(size=s[0]))) for n, s in t.coded_roles(h).items()
              if t.roles(h)[n].tap}
    found = t.ideal_stretch(h, damage)
    size = {n: math.prod(t.roles(h)[n].shape[-2:]) for n in found}
    assert abs(sum(size[n] * float(o.sum()) for n, o in found.items())) < 1e-2 * sum(size.values())
    cost = torch.cat([damage[n] * 4**o / size[n] for n, o in found.items()])
    assert cost.max() / cost.min() < 1.001


@pytest.mark.parametrize("scale", [0.7, 2.0, 9.0])
def test_expected_bits_are_those_of_the_coder(scale):
    """Columns of Gaussian codes: the formula is within 4% of what rANS spends."""
    w = torch.randn(1, 4000, 64, generator=torch.Generator().manual_seed(0))
    w = w * torch.linspace(0.5, 1.5, 64) * scale
    expected = float(t.gaussian_bits(w.square().mean(1))) * w.numel()
    (size, ) = t.encode_codes([w.round().to(torch.int16).numpy()])[1]
    assert expected == pytest.approx(8 * size, rel=0.04)
