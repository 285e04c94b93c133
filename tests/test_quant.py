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
    factors_of,
    model_of,
    moments_of,
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


def test_second_moments_are_sums_of_x_xt():
    """Every tap equals the sum over tokens of x x^T of what the probe sees, repeated layers counted
    each time."""
    h = settings()
    model, loader = model_of(h), t.Loader(h, WORLD, [stream(3000).astype(np.uint16)])
    hand: dict = {}

    def probe(tap, layer, x):
        """Adds x x^T token by token."""
        for row in x.detach().reshape(-1, x.size(-1)).double():
            hand[tap, layer] = hand.get((tap, layer), 0) + torch.outer(row, row)

    for _ in range(2):
        batch = loader.next()
        model.hidden(batch.ids, t.depth_plan(h, True), batch.docs, probe=probe)
    moments = moments_of(model, batches=2)
    assert set(moments) == {role.tap for role in t.roles(h).values() if role.tap}
    for tap, moment in moments.items():
        assert moment.dtype == torch.float64 and moment.size(0) == (1 if tap == "final" else
                                                                    h.num_layers)
        for layer in range(moment.size(0)):
            torch.testing.assert_close(moment[layer], hand[tap, layer], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moment[layer], moment[layer].mT, rtol=1e-6, atol=1e-6)


def test_second_moments_do_not_depend_on_the_number_of_ranks():
    """The parts of two ranks add up to what one rank finds, to the rounding of fp64."""
    model = model_of(settings())
    whole, halves = moments_of(model), [moments_of(model, Half(rank, 2)) for rank in (0, 1)]
    for tap, moment in whole.items():
        torch.testing.assert_close(halves[0][tap] + halves[1][tap], moment, rtol=1e-13, atol=1e-12)
        assert not torch.allclose(halves[0][tap], moment)


def test_every_role_is_stored_as_its_row_says():
    """Bits below 16 become codes of that width, the rest fp16, in the order of the table."""
    h = settings(matrix_bits=5, embed_bits=7, matrix_clip_sigmas=4.0, trellis_states=0,
                 step_search="uniform")
    model = model_of(h)
    stored = t.quantise(model, factors_of(model))
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
    stored = t.quantise(model, factors_of(model))
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
        t.load_stored(model, t.quantise(model, factors_of(model)))
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
@pytest.mark.parametrize("run", [None, 3])
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
    bits = [float(t.code_bits([c.codes.numpy()], states)[0])
            for c, states in ((plain, 0), (along, 8))]
    assert bits[1] < 1.03 * bits[0]


def test_uniform_steps_are_the_clip_sigmas(monkeypatch):
    """STEP_SEARCH=uniform: the largest code stands at k standard deviations of its row to half a
    quarter octave, columns are equal, nothing is measured, whatever the powers say."""
    monkeypatch.setattr(t, "ROW_STEP_POWER", 0.0)
    monkeypatch.setattr(t, "COLUMN_STEP_POWER", 1.0)
    h = settings(step_search="uniform")
    model = model_of(h)
    factors = factors_of(model)
    loader = t.Loader(h, WORLD, [stream(3000).astype(np.uint16)])
    assert t.step_damage(model, WORLD, loader, factors) == {} and loader.position == 0
    for name, value in t.quantise(model, factors).items():
        role = t.roles(h)[name]
        if role.tap:
            w = t.bank_of(model, name)
            asked = role.sigmas * w.std(-1, keepdim=True) / (2**(role.bits - 1) - 1) / 2
            ratio = (value.grid.rows() / asked).log2()
            assert ratio.abs().max() <= 0.5 / t.OCTAVE + 1e-3 and abs(ratio.mean()) < 0.07
            assert not value.grid.column.any()


def test_steps_of_rows_and_columns_follow_their_powers():
    """A column's exponent is OCTAVE * power * log2 of its entry of U, mean zero, in the order of the
    inputs; rows are drawn together by their power."""
    h = settings(step_search="layer")
    model = model_of(h)
    factors = factors_of(model)
    for name in ("embed", "wk", "w_down"):
        order, upper = factors[t.roles(h)[name].tap]
        grid, w = t.searched_grid(model, name, factors), t.bank_of(model, name)
        for i in range(len(w)):
            log = torch.empty(w.size(2)).scatter_(0, order[i], upper[i].diagonal().log2())
            wanted = 0.5 * t.OCTAVE * (log - log.mean())
            assert (grid.column[i] - wanted).abs().max() <= 0.5001
            log = 0.5 * t.OCTAVE * w[i].std(-1).log2()
            assert ((grid.row[i] - grid.row[i].float().mean()) - (log - log.mean())).abs().max() < 1.01


def measured(h: t.Hyperparameters, model: t.GPT, factors: dict, world: t.World = WORLD) -> dict:
    """`step_damage` on a made-up shard."""
    return t.step_damage(model, world, t.Loader(h, world, [stream(3000).astype(np.uint16)]), factors)


def test_damage_is_the_divergence_of_one_rounded_layer():
    """One role-layer by hand: its bank replaced by codes of 1.5 times the steps, KL of all
    predictions; the model comes back to the bit."""
    h = settings(logit_softcap=3.0)
    model = model_of(h)
    factors, before = factors_of(model), {n: p.detach().clone() for n, p in model.bank.items()}
    damage = measured(h, model, factors)
    assert all(torch.equal(model.bank[n], w) for n, w in before.items())
    assert all((kl > 0).all() and len(kl) == (1 if n == "embed" else h.num_layers)
               for n, kl in damage.items())
    ids = t.Loader(h, WORLD, [stream(3000).astype(np.uint16)]).next().ids

    def predictions() -> torch.Tensor:
        """Log-probabilities of every token."""
        with torch.no_grad():
            x = model.hidden(ids, t.depth_plan(h, True))
            return (3 * torch.tanh(x @ model.bank["embed"].T / 3)).log_softmax(-1)

    exact = predictions()
    for name, layer in (("embed", 0), ("wv", 2), ("w_down", 1)):
        grid = t.searched_grid(model, name, factors)
        rough = t.gptq(t.bank_of(model, name), factors[t.roles(h)[name].tap],
                       grid._replace(scale=1.5 * grid.scale)).decode()
        with torch.no_grad():
            t.bank_of(model, name)[layer] = rough[layer]
        kl = (exact.exp() * (exact - predictions())).sum(-1).mean()
        with torch.no_grad():
            model.bank[name].copy_(before[name])
        assert float(damage[name][layer]) == pytest.approx(float(kl), rel=1e-3, abs=1e-7)


def test_damage_is_shared_by_the_ranks():
    """Each of two ranks measures half of the role-layers; together they find what one rank finds."""
    h = settings()
    model = model_of(h)
    factors = factors_of(model)
    whole = measured(h, model, factors)
    halves = [measured(h, model, factors, OneText(rank, 2)) for rank in (0, 1)]
    for name, kl in whole.items():
        assert torch.equal(halves[0][name] + halves[1][name], kl)
        assert (halves[0][name] * halves[1][name] == 0).all()


class OneText(Half):
    """One of two ranks that both read rank 0's block."""
    def share_tensors(self, tensors):
        """Overwrites the ids with those that rank 0 reads first."""
        for ids in tensors:
            loader = t.Loader(settings(), t.World(0, 2), [stream(3000).astype(np.uint16)])
            ids.copy_(loader.next().ids)


@pytest.mark.parametrize("search", ["role", "layer"])
def test_steps_grow_with_weights_and_shrink_with_damage(search):
    """Octaves are half the log2 of weights over damage, weighted mean zero; `role` gives all layers
    of a role the same."""
    h, rng = settings(step_search=search), np.random.default_rng(0)
    damage = {n: torch.tensor(np.exp(rng.normal(size=s[0]))) for n, s in t.coded_roles(h).items()
              if t.roles(h)[n].tap}
    found = t.ideal_stretch(h, damage)
    size = {n: math.prod(t.roles(h)[n].shape[-2:]) for n in found}
    assert abs(sum(size[n] * float(o.sum()) for n, o in found.items())) < 1e-2 * sum(size.values())
    if search == "role":
        assert all((o == o[0]).all() for o in found.values())
        damage = {n: d.mean().expand_as(d) for n, d in damage.items()}
    cost = torch.cat([damage[n] * 4**o / size[n] for n, o in found.items()])
    assert cost.max() / cost.min() < 1.001


@pytest.mark.parametrize("scale", [0.7, 2.0, 9.0])
def test_expected_bits_are_those_of_the_coder(scale):
    """Columns of Gaussian codes: the formula is within 4% of what rANS spends."""
    w = torch.randn(1, 4000, 64, generator=torch.Generator().manual_seed(0))
    w = w * torch.linspace(0.5, 1.5, 64) * scale
    expected = float(t.gaussian_bits(w.square().mean(1))) * w.numel()
    assert expected == pytest.approx(t.code_bits([w.round().to(torch.int16).numpy()])[0], rel=0.04)
