"""Section 6: the forward pass against formulas written out a second time, its isolation in time and between documents."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as tg
from conftest import alive, random_tokens
from support import pointer_by_hand


def batch(h: tg.Hyperparameters, B: int = 2, T: int = 16, seed: int = 0, longest: int = 10) -> tg.Batch:
    """A micro-batch with several documents in each row."""
    tokens = np.stack([random_tokens(h, T + 1, seed + row, document=6) for row in range(B)]).astype(np.int64)
    return tg.Batch(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:]),
                    tg.locate(tokens[:, :-1], longest, torch.device("cpu")))


def whole(ids: torch.Tensor) -> tg.Docs:
    """Rows that are one piece each."""
    return tg.Docs(torch.zeros(ids.shape, dtype=torch.int64), None, ids.size(1))


# -------------------------------------------------------------------------------------------------------- contract
def test_community_contract():
    """`GPT(h)(x, y)` is the mean loss, about ln V for random targets; it can be trained."""
    torch.manual_seed(0)
    h = tg.Hyperparameters(vocab_size=300, num_layers=4, model_dim=128, loop_start=1, loop_end=2, parallel_start_layer=3)
    model = tg.GPT(h)
    x, y = torch.randint(0, 300, (2, 2, 50))
    loss = model(x, y)
    assert loss.shape == () and abs(loss.item() - math.log(300)) < 0.1
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_nats_are_a_distribution(tiny):
    """Over all targets the probabilities sum to one, and each logit stays inside the softcap."""
    model, plan = alive(replace(tiny, logit_softcap=2.0)), tg.depth_plan(tiny, True)
    ids = batch(tiny).ids
    nats = torch.stack([model.nats(ids, torch.full_like(ids, v), plan) for v in range(tiny.vocab_size)])
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.neg().exp().sum(0), torch.ones(2, 16), atol=1e-5, rtol=0)
    assert float((nats.amax(0) - nats.amin(0)).detach().max()) <= 4.0


def test_initial_weights(tiny):
    """Matrices into the residual stream start at zero, the others orthogonal; so a fresh model mixes no positions."""
    torch.manual_seed(3)
    model = tg.GPT(tiny)
    for name in ("wo", "w_down"):
        assert not model.bank[name].any()
    for name in ("wq", "wk", "wv", "w_up"):
        for w in model.bank[name].detach():
            w = w if w.size(0) <= w.size(1) else w.T
            torch.testing.assert_close(w @ w.T, torch.eye(w.size(0)), atol=1e-5, rtol=0)
    assert abs(float(model.bank["embed"].detach().std()) - tg.EMBED_INIT_STD) < 5e-4
    assert not torch.equal(model.bank["wq"][0], model.bank["wq"][1])


# ------------------------------------------------------------------------------------------------------- isolation
def test_causality(tiny):
    """A changed token moves later nats and, to the bit, no earlier ones."""
    model, plan, b = alive(tiny), tg.depth_plan(tiny, True), batch(tiny)
    for docs in (None, whole(b.ids)):
        before = model.nats(b.ids, b.targets, plan, docs)
        ids = b.ids.clone()
        ids[:, 9] = 60 - ids[:, 9] % 50
        after = model.nats(ids, b.targets, plan, docs)
        assert torch.equal(before[:, :9], after[:, :9])
        assert (before[:, 9:] != after[:, 9:]).all()


def test_documents_are_isolated(tiny):
    """No token of one piece moves another piece by a bit; without `docs` it does."""
    model, plan, b = alive(tiny), tg.depth_plan(tiny, True), batch(tiny, B=1)
    ids = torch.full((1, 16), 5)
    ids[0, [0, 6]] = tg.BOS
    docs = tg.locate(ids.numpy(), 16, torch.device("cpu"))
    other = ids.clone()
    other[0, 1:6] = 40
    before, after = (model.nats(x, b.targets, plan, docs) for x in (ids, other))
    assert torch.equal(before[:, 6:], after[:, 6:]) and (before[:, 1:6] != after[:, 1:6]).all()
    before, after = (model.nats(x, b.targets, plan) for x in (ids, other))
    assert (before[:, 7:] != after[:, 7:]).any()


def test_a_document_scores_the_same_wherever_it_lies(tiny):
    """Rotary positions are relative: a document in mid-row has the nats that it has alone."""
    model, plan = alive(tiny), tg.depth_plan(tiny, True)
    ids = torch.from_numpy(random_tokens(tiny, 16, 4, document=10 ** 6).astype(np.int64))[None]
    ids[0, 7] = tg.BOS
    targets = ids.roll(-1, 1)
    packed = model.nats(ids, targets, plan, tg.locate(ids.numpy(), 16, torch.device("cpu")))
    torch.testing.assert_close(packed[:, 7:], model.nats(ids[:, 7:], targets[:, 7:], plan), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, :7], model.nats(ids[:, :7], targets[:, :7], plan), atol=2e-4, rtol=1e-4)


def test_smear_gate_never_crosses_a_document_start(tiny):
    """The embedding of a document start does not know the token before it; every other embedding does."""
    model = alive(tiny)
    with torch.no_grad():
        model.bank["smear_scale"].fill_(1.0)
    ids = torch.tensor([[1, 9, 8, 1, 7, 6]])
    before = model.embedded(ids)
    for place in range(5):
        other = ids.clone()
        other[0, place] = 33
        moved = (model.embedded(other) != before).any(-1)[0]
        expected = {place} if ids[0, place + 1] == 1 else {place, place + 1}
        assert set(moved.nonzero()[:, 0].tolist()) == expected
    row = F.embedding(ids, model.bank["embed"])[0]
    gate = torch.sigmoid(row[:, :tiny.gate_window] @ model.bank["smear_gate"][0])
    by_hand = torch.stack([row[t] + (gate[t] * row[t - 1] if t and ids[0, t] != 1 else 0) for t in range(6)])
    torch.testing.assert_close(before[0], tg.norm(by_hand))


# ------------------------------------------------------------------------------------------------------- attention
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """torch's attention under an explicit mask, key heads repeated."""
    place, G = torch.arange(q.size(1)), q.size(2) // k.size(2)
    mask = (place[:, None] >= place) & (place >= start[:, :, None])
    k, v = (t.repeat_interleave(G, 2) for t in (k, v))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask[:, None]).transpose(1, 2)


@pytest.mark.parametrize("B, T, H, K, E, block", [
    (2, 16, 4, 2, 8, 8), (2, 21, 4, 2, 8, 8), (1, 5, 4, 1, 8, 8), (3, 1, 2, 2, 4, 8), (2, 17, 6, 3, 16, 8), (1, 33, 8, 2, 4, 32),
    (1, 300, 2, 1, 8, None)])
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("kernel", ["blocks", "sdpa"])
def test_attention_equals_torch(monkeypatch, tiny, B, T, H, K, E, block, cut, kernel):
    """Output and gradients of grouped heads inside pieces, for rows that are no multiple of the block; fp32 and bf16."""
    if block:
        monkeypatch.setattr(tg, "QUERY_BLOCK", block)
    g = torch.Generator().manual_seed(T)
    tokens = np.stack([random_tokens(tiny, T, row, document=7) for row in range(B)]).astype(np.int64)
    docs = tg.locate(tokens, 9, torch.device("cpu")) if cut else whole(torch.from_numpy(tokens))
    for dtype, close in ((torch.float32, dict(atol=2e-6, rtol=2e-5)), (torch.bfloat16, dict(atol=4e-2, rtol=4e-2))):
        make = lambda heads: torch.randn(B, T, heads, E, generator=g).to(dtype).float()
        inputs, grad = (make(H), make(K), make(K)), make(H)
        twin = [t.clone().requires_grad_() for t in inputs]
        ours = [t.to(dtype).requires_grad_() for t in inputs]
        expected, y = sdpa(*twin, docs.start), tg.attend(*ours, docs, kernel)
        assert y.dtype == dtype and y.shape == (B, T, H, E)
        torch.testing.assert_close(y.float(), expected, **close)
        expected.backward(grad)
        y.backward(grad.to(dtype))
        for mine, theirs in zip(ours, twin):
            torch.testing.assert_close(mine.grad.float(), theirs.grad, **close)


def test_attention_is_chosen_by_name():
    """ATTENTION takes what is there; what is not is refused by its name."""
    cpu = torch.device("cpu")
    chosen = lambda name: tg.attention_kernel(tg.Hyperparameters(attention=name), cpu)
    assert [chosen(name) for name in ("auto", "blocks", "sdpa")] == ["blocks", "blocks", "sdpa"]
    for name in ("fa3", "fa2", "varlen"):
        with pytest.raises(tg.Refusal, match=f"ATTENTION={name}: not on cpu"):
            chosen(name)
    with pytest.raises(tg.Refusal, match="ATTENTION"):
        tg.Hyperparameters.from_env(dict(ATTENTION="flash"))


@pytest.mark.parametrize("chip, precision, kernel", [((9, 0), "bf16", "fa3"), ((8, 0), "bf16", "varlen"),
                                                     ((7, 5), "bf16", "sdpa"), ((9, 0), "fp32", "sdpa")])
def test_attention_fits_chip_and_precision(monkeypatch, chip, precision, kernel):
    """FlashAttention 3 is for Hopper, variable lengths begin with Ampere, and neither multiplies fp32."""
    monkeypatch.setattr(tg, "flash_attn_3", object())
    monkeypatch.setattr(tg, "torch_varlen", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: chip >= (8, 0))
    h = tg.Hyperparameters(precision=precision)
    assert tg.attention_kernel(h, torch.device("cuda", 0)) == kernel


def test_attention_gradients_numerically():
    """The hand-written backward pass against finite differences in fp64 where it keeps fp64, else loosely."""
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(1, 7, heads, 4, generator=g) for heads in (4, 2, 2, 4))
    start = torch.tensor([[0, 0, 0, 3, 3, 5, 5]])
    inputs = [t.requires_grad_() for t in (q, k, v)]
    (tg.by_blocks(*inputs, start) * weight).sum().backward()
    for t in inputs:
        for place in ((0, 1, 0, 2), (0, 4, 1, 0), (0, 6, 1, 3)):
            shifted = []
            for delta in (1e-2, -1e-2):
                moved = [x.detach().clone() for x in inputs]
                moved[[t is x for x in inputs].index(True)][place] += delta
                shifted.append((tg.by_blocks(*moved, start) * weight).sum())
            assert abs(float((shifted[0] - shifted[1]) / 2e-2 - t.grad[place])) < 5e-3


def test_rotary(tiny):
    """Norms stay, products depend on the distance only, the trailing dimensions pass through."""
    cos, sin = tg.rope_table(tiny, 12, torch.zeros(()))
    q, k = torch.randn(2, 1, 1, 1, 8)
    turned_q, turned_k = (tg.rotate(t.expand(1, 12, 1, 8), cos, sin)[0, :, 0] for t in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(12))
    products = turned_q @ turned_k.T
    for lag in range(5):
        diagonal = products.diagonal(-lag)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert products[1, 0] != products[2, 0]
    assert torch.equal(turned_q[:, tiny.rope_dims:], q[0, 0, :, tiny.rope_dims:].expand(12, -1))
    torch.testing.assert_close(cos[3, 0], torch.tensor([3.0, 3.0 * tiny.rope_base ** -0.5]).cos())


def test_xsa_formula(tiny):
    """y - (y . v) v / |v|^2 for each query head and the value of its own position: nothing along v is left."""
    model, b = alive(replace(tiny, head_gate_scale=0.0)), batch(tiny)
    w, x = model.layers()[0]._replace(wo=torch.eye(32)), torch.randn(2, 16, 32)    # so that the heads come out
    y, plain = (model.attention(w, x, tg.rope_table(tiny, 16, x), b.docs, xsa, {}).detach().view(2, 16, 2, 2, 8)
                for xsa in (True, False))
    v = (x @ w.wv.detach().T).view(2, 16, 2, 1, 8)
    torch.testing.assert_close(y, plain - (plain * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v,
                               atol=1e-5, rtol=1e-4)
    assert (y * v).sum(-1).abs().max() < 1e-4 < (plain * v).sum(-1).abs().max()


# ------------------------------------------------------------------------------------------------------ plain twin
def rms(x: torch.Tensor) -> torch.Tensor:
    """x over its root mean square."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def turned(x: torch.Tensor, h: tg.Hyperparameters) -> torch.Tensor:
    """One head (T, E) with pairs (j, j + n) multiplied as complex numbers by exp(-i * position * base^(-j / n))."""
    n = h.rope_dims // 2
    z = torch.complex(x[:, :n].contiguous(), x[:, n:2 * n].contiguous())
    angle = torch.arange(x.size(0))[:, None] * h.rope_base ** (-torch.arange(n) / n)
    z = z * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((z.real, z.imag, x[:, 2 * n:]), 1)


def twin_attention(h, bank, layer: int, n: torch.Tensor, xsa: bool) -> torch.Tensor:
    """One row (T, D), head by head and position by position."""
    T, E, group = n.size(0), h.head_dim, h.num_heads // h.num_kv_heads
    q, k, v = (n @ bank[name][layer].T for name in ("wq", "wk", "wv"))
    heads = []
    for head in range(h.num_heads):
        mine, shared = slice(head * E, head * E + E), slice(head // group * E, head // group * E + E)
        qh = turned(rms(q[:, mine]), h) * bank["q_gain"][layer, head]
        kh, vh = turned(rms(k[:, shared]), h), v[:, shared]
        rows = []
        for t in range(T):
            y = torch.softmax(kh[:t + 1] @ qh[t] / math.sqrt(E), 0) @ vh[:t + 1]
            own = vh[t] / vh[t].norm()
            rows.append(y - (y @ own) * own if xsa else y)
        gate = torch.sigmoid(h.head_gate_scale * n[:, :h.gate_window] @ bank["head_gate"][layer, head])
        heads.append(torch.stack(rows) * gate[:, None])
    return torch.cat(heads, 1) @ bank["wo"][layer].T


def twin_mlp(h, bank, layer: int, n: torch.Tensor) -> torch.Tensor:
    """(T, D) -> squared leaky ReLU network (T, D)."""
    up = n @ bank["w_up"][layer].T
    return torch.where(up > 0, up, h.leaky_slope * up).square() @ bank["w_down"][layer].T


def twin_states(h, bank, x0: torch.Tensor, looped: bool) -> torch.Tensor:
    """Embedded row (T, D) -> final states: the order of layers, skips, mixes and lanes spelled out."""
    order, push = ([0, 1, 2, 1, 2, 3], 3) if looped else ([0, 1, 2, 3], 2)
    a, kept = x0, []
    for slot, layer in enumerate(order):
        n_scale = 1 / math.sqrt(layer + 1)
        if slot >= push:
            gate = torch.sigmoid(bank["skip_gate"][slot - push])
            a = gate * a + (1 - gate) * bank["skip_weight"][slot - push] * kept.pop()
        read = bank["mix_x"][layer] * a + bank["mix_x0"][layer] * x0
        xsa = layer >= h.num_layers - h.xsa_last_n
        attn = bank["attn_scale"][layer] * twin_attention(h, bank, layer, rms(read) * n_scale, xsa)
        if layer < h.parallel_start_layer:
            a = read + attn
            a = a + bank["mlp_scale"][layer] * twin_mlp(h, bank, layer, rms(a) * n_scale)
            m = a
        else:
            mlp = bank["mlp_scale"][layer] * twin_mlp(h, bank, layer, rms(m) * n_scale)
            keep, write = bank["lane_keep"][layer], bank["lane_write"][layer]
            a, m = (keep[i] * old + write[0, i] * attn + write[1, i] * mlp for i, old in enumerate((a, m)))
        if slot < push:
            kept.append(a)
    return rms((a + m) / 2)


def test_one_serial_block_equals_its_formula(tiny):
    """GPT.block against the twin above, at a layer with XSA, gates and depth scale."""
    model = alive(tiny)
    bank = {name: p.detach() for name, p in model.bank.items()}
    a, x0 = torch.randn(2, 1, 16, 32)
    layer, docs = 2, whole(torch.zeros(1, 16, dtype=torch.int64))
    other = a + 1
    out, through = model.block(model.layers()[layer], a, other, x0, tg.rope_table(tiny, 16, a), docs, False, True)
    read = bank["mix_x"][layer] * a[0] + bank["mix_x0"][layer] * x0[0]
    mid = read + bank["attn_scale"][layer] * twin_attention(tiny, bank, layer, rms(read) / math.sqrt(3), True)
    expected = mid + bank["mlp_scale"][layer] * twin_mlp(tiny, bank, layer, rms(mid) / math.sqrt(3))
    assert through is other
    torch.testing.assert_close(out[0], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("looped, pointer", [(False, False), (True, False), (True, True)])
def test_the_whole_model_equals_its_formula(tiny, looped, pointer):
    """Loops, U-Net skips, lanes, final mean, softcapped cross-entropy and pointer against the twin; all probabilities of
    the target's, too."""
    tiny = replace(tiny, pointer=pointer)
    model, b = alive(tiny), batch(tiny, B=1)
    torch.nn.init.normal_(model.bank["lane_write"])
    ids, targets = b.ids.clamp_min(2), b.targets
    ids[0, [3, 7, 8]] = torch.tensor([9, 9, tg.BOS])
    bank = {name: p.detach() for name, p in model.bank.items()}
    x = twin_states(tiny, bank, model.embedded(ids)[0].detach(), looped)
    p = (tiny.logit_softcap * torch.tanh(x @ bank["embed"].T / tiny.logit_softcap)).softmax(-1)
    if pointer:
        bank["copy_bias"].fill_(0.5)    # so that much is copied
        p = pointer_by_hand(bank, x, ids[0], p)
        torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
    nats = model.nats(ids, targets, tg.depth_plan(tiny, looped))[0].detach()
    torch.testing.assert_close(nats, -p.gather(1, targets[0][:, None])[:, 0].log(), atol=2e-4, rtol=2e-4)
    logs = model.log_probs(model.hidden(ids, tg.depth_plan(tiny, looped)), ids, model.bank)[0].detach()
    torch.testing.assert_close(logs, p.log(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("T", [63, 60, 56, 64])    # in blocks of 1, 4, 8 and 64 queries
def test_the_pointer_sees_the_pieces_of_a_packed_row_apart(tiny, T):
    """One long row of documents, as kernels for variable lengths take it, gives each document the nats that it has alone."""
    model, plan = alive(tiny), tg.depth_plan(tiny, True)
    model.bank["copy_bias"].data.fill_(0.5)
    tokens = torch.from_numpy(random_tokens(tiny, T + 1, document=9).astype(np.int64))
    ids, targets = tokens[None, :-1], tokens[None, 1:]
    docs = tg.locate(ids.numpy(), 12, ids.device)
    nats = model.nats(ids, targets, plan, docs)[0]
    starts = [*torch.unique(docs.start[0]).tolist(), T]
    assert max(b - a for a, b in zip(starts, starts[1:])) == 12
    for a, b in zip(starts, starts[1:]):
        if ids[0, a] == tg.BOS:    # behind a cut the smear and the pointer's first key know what was before
            alone = model.nats(ids[:, a:b], targets[:, a:b], plan)[0]
            torch.testing.assert_close(nats[a:b], alone, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- seams and precision
def test_bf16_is_close_to_fp32(tiny):
    """The same weights in both number formats; the loss itself is fp32."""
    b, plan = batch(tiny), tg.depth_plan(tiny, True)
    exact, rounded = (alive(tiny, dtype=dtype).nats(b.ids, b.targets, plan, b.docs)
                      for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32 and 0 < (exact - rounded).abs().mean().item() < 0.15


def test_gradients_do_not_depend_on_the_batch_split(tiny):
    """Rows are independent: the gradient of a batch is the sum over its rows."""
    b, plan, grads = batch(tiny, B=4), tg.depth_plan(tiny, True), []
    for rows in ([slice(0, 4)], [slice(i, i + 1) for i in range(4)]):
        model = alive(tiny)
        for r in rows:
            model.nats(b.ids[r], b.targets[r], plan, b.docs._replace(start=b.docs.start[r])).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for whole_grad, summed in zip(*grads):
        torch.testing.assert_close(whole_grad, summed, atol=1e-3, rtol=1e-3)


def nats_and_gradients(h: tg.Hyperparameters, mode: str, looped: bool) -> list[torch.Tensor]:
    """What training computes from one micro-batch under COMPILE=mode."""
    model, b = alive(h), batch(h)
    model.compile(mode)
    nats = model.run_nats(b.ids, b.targets, tg.depth_plan(h, looped), b.docs)
    nats.sum().backward()
    return [nats.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("mode", ["block", "full"])
def test_traced_model_equals_eager(tiny, monkeypatch, mode):
    """The graphs that torch.compile takes, `full` in one piece, run by eager kernels: the same nats and gradients."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    h = replace(tiny, num_layers=3, loop_end=1, parallel_start_layer=2, xsa_last_n=2)    # all seams in two thirds of the blocks
    for eager, traced in zip(nats_and_gradients(h, "off", True), nats_and_gradients(h, mode, True)):
        torch.testing.assert_close(eager, traced, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_block_equals_eager(tiny):
    """COMPILE=block with the real compiler, one layer."""
    h = replace(tiny, num_loops=0, num_layers=1, parallel_start_layer=1)
    torch._dynamo.reset()
    for eager, compiled in zip(nats_and_gradients(h, "off", False), nats_and_gradients(h, "block", False)):
        torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-4)
