"""What a step costs, counted, not timed: waits for the device, operators of an update, bytes on the wire."""
from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t
from support import WORLD, settings, stream, validation

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal", "aten::is_nonzero",
         "aten::masked_select", "aten::unique_dim", "aten::_unique2"}
VIEWS = {"view", "_unsafe_view", "t", "transpose", "select", "slice", "unsqueeze", "squeeze", "expand", "detach",
         "alias", "split", "split_with_sizes", "unbind", "as_strided", "permute", "unflatten", "empty", "empty_like"}


class Count(TorchDispatchMode):
    """Counts operators that would start a kernel, and refuses those that would wait for it."""

    def __init__(self):
        """Nothing yet."""
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Books one operator."""
        name = function._schema.name
        assert name not in WAITS, f"{name} waits for the device"
        if name.removeprefix("aten::").removesuffix("_copy") not in VIEWS:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def trainer(**knobs):
    """A small training run of one process, in eager mode."""
    h = settings(**dict(train_batch_tokens=256, micro_batch_tokens=128, train_seq_len=32) | knobs)
    torch.manual_seed(0)
    tokens = torch.from_numpy(stream(4096, V=h.vocab_size, document=50)).numpy().astype("uint16")
    model = t.GPT(h)
    return t.Trainer(h, WORLD, model, t.Dataset([tokens], None, ""))


@pytest.mark.parametrize("knobs", [{}, dict(grad_clip_norm=0.0), dict(late_qat_threshold=1.0, trellis_states=0),
                                   dict(parallel_form="apart", ve_dim=16)])
def test_no_step_waits_for_the_device(knobs):
    """Loading, forward, backward, clipping, both optimisers and the averages read nothing back."""
    run = trainer(**knobs)
    run.step(0, 0.0, looped=False)
    with Count():
        for n in (1, 2):
            run.step(n, 0.95, looped=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's own watch needs CUDA")
def test_nothing_waits_on_cuda():
    """The same by CUDA's own watch, which sees copies too: training steps, and ticks of streaming TTT."""
    world = t.World(device=torch.device("cuda", 0))
    h = settings(train_seq_len=32, eval_seq_len=32, eval_batch_tokens=256)
    tokens = stream(4096, V=h.vocab_size, document=50)
    model = t.build_model(h, world)
    run = t.Trainer(h, world, model, t.Dataset([tokens.astype("uint16")], None, ""))
    run.step(0, 0.0, looped=False)
    ledger, rows, C = t.Ledger(validation(tokens), world), 2, 16
    ticks = t.document_plan(ledger.documents, C, rows, world)
    learners = t.Learners(model, rows, C, 1)
    t.score(ledger, learners.follow(ticks[:2]), learners.nats_of, learners.learn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.model.requires_grad_(True)
        for n in (1, 2):
            run.step(n, 0.95, looped=True)
        t.score(ledger, learners.follow(ticks[2:5]), learners.nats_of, learners.learn)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_seen():
    """The same watch refuses the reading of a loss."""
    run = trainer()
    with pytest.raises(AssertionError, match="waits for the device"), Count():
        run.step(0, 0.0, looped=False).item()


def one_by_one(run) -> None:
    """The flat way: every layer's matrix and every small tensor by itself."""
    h, roles = run.h, t.roles(run.h)
    for name, p in run.model.bank.items():
        if roles[name].optim == "muon":
            for w, g, m in zip(p.unbind(), p.grad.unbind(), torch.zeros_like(p).unbind()):
                m.mul_(0.9).add_(g)
                u = g.add(m, alpha=0.9)
                u.div_(u.norm(dim=-1, keepdim=True).add_(1e-7))
                w.mul_(1 - h.matrix_lr * h.muon_wd).add_(t.orthogonalise(u[None], torch.float32)[0], alpha=-h.matrix_lr)
        else:
            torch.optim.AdamW([p], lr=h.scalar_lr, fused=True).step()
        p.lerp_(p, 0.5)


def test_an_update_starts_few_kernels(capsys):
    """Stacks of equal shape are orthogonalised together, small tensors are updated together: counted on the record's
    eleven layers in miniature, at most a fifth of what one tensor at a time takes."""
    run = trainer(num_layers=11)
    gradients = lambda: [setattr(p, "grad", torch.ones_like(p)) for p in run.model.bank.values()]
    gradients()
    run.optimiser.step(1.0, 0.9)    # makes AdamW's state
    gradients()
    with Count() as ours, torch.no_grad():
        run.optimiser.step(1.0, 0.9)
        run.ema.update(0.99)
    gradients()
    with Count() as flat, torch.no_grad():
        one_by_one(run)
    ours, flat = ours.seen.total(), flat.seen.total()
    print(f"operators of an update: {ours}, one tensor at a time: {flat}")
    assert ours * 5 <= flat, (ours, flat)


class Wire(t.World):
    """Rank 0 of eight that counts what a ring sends: 7/8 of a scattered or gathered tensor, twice that of a sum."""

    sent = Counter()

    def begun(self, collective, out, *source):
        """Books a scatter or a gather."""
        whole = max([out, *source], key=torch.Tensor.numel)
        self.sent[collective.__name__] += whole.numel() * whole.element_size() * 7 // 8
        return lambda: out

    def sum(self, x):
        """Books an all-reduce."""
        self.sent["all_reduce"] += 2 * x.numel() * x.element_size() * 7 // 8
        return x


def test_bytes_on_the_wire_of_eight_ranks():
    """The record's 36.2M parameters: matrices go as bf16 once each way, the rest as one fp32 sum. A flat fp32
    all-reduce of every gradient, with every rank doing all of the work, would send 253.5 MB."""
    h = t.Hyperparameters()
    with torch.device("meta"):
        model = t.GPT(h, torch.bfloat16)
        for p in model.bank.values():
            p.grad = torch.empty_like(p)
        world = Wire(0, 8, torch.device("meta"))
        optimiser = t.Optimiser(model, world)
        optimiser.wire, optimiser.adam.step = torch.bfloat16, lambda: None
        Wire.sent.clear()
        optimiser.step(1.0, 0.9)
    flat = sum(p.numel() for p in model.parameters()) * 4 * 2 * 7 // 8
    assert flat == 253_458_303
    matrices = sum(stack.momentum.numel() * 8 for stack in optimiser.stacks)
    assert Wire.sent["reduce_scatter_tensor"] == Wire.sent["all_gather_into_tensor"] == matrices * 2 * 7 // 8
    others = sum(p.numel() for p in optimiser.others) * 4
    assert Wire.sent["all_reduce"] == 2 * others * 7 // 8 + 2 * 4 * 7 // 8
    print({**Wire.sent}, "in all", Wire.sent.total(), "flat", flat)
    assert Wire.sent.total() < 0.6 * flat


def test_every_graph_is_compiled_before_the_clock(monkeypatch, tmp_path):
    """One graph per depth plan and context in training and one for windows, each whole; parts for the stream, for what
    learns, and for rounding; none is compiled inside the clock, nor after it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(t, "running_source", lambda path, h: (None, b"code"))    # takes seconds
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    h = settings(**dict(compile="full", train_seq_len=32, micro_batch_tokens=64, max_wallclock_seconds=0.0, iterations=8,
                        eval_seq_len=128, eval_batch_tokens=128, eval_stride=64, ttt_chunk_tokens=256, run_id="a",
                        num_layers=3, loop_start=1, loop_end=1, parallel_start_layer=2, xsa_last_n=2,
                        rehearsal_steps=1, scores="quantized,sliding,ttt", train_seq_schedule="16@0.5,32@1"))
    log = t.Log(WORLD, tmp_path / "a")
    tokens = stream(4096, V=h.vocab_size, document=40)
    data = t.Dataset([tokens.astype("uint16")], validation(tokens[:600]), "test")
    t.run(h, WORLD, log, data, 0.0)
    said = [line for line in (tmp_path / "a" / "log.txt").read_text().splitlines() if line.startswith("graphs:")]
    assert said == ["graphs:30 compiled before the clock, 0 inside, 0 after"]


@pytest.mark.parametrize("rows", [3, 8, 9])
def test_learning_from_a_chunk_has_one_shape(monkeypatch, rows):
    """Whatever a chunk's size, every pass has the same one; the step is that of the mean over the real sequences."""
    h = settings(ttt_epochs=1, ttt_batch_seqs=8)    # passes of 4 sequences of 16
    monkeypatch.setattr(t, "SGD_CLIP", 1e9)
    torch.manual_seed(0)
    model, shapes = t.GPT(h), set()
    tokens = torch.from_numpy(stream(rows * h.train_seq_len + 1, V=h.vocab_size))
    nats = model.nats
    model.run_nats = lambda ids, *rest, **more: shapes.add(ids.shape) or nats(ids, *rest, **more)
    twin = t.GPT(h)
    twin.load_state_dict(model.state_dict())
    t.learn_chunk(model, torch.optim.SGD(model.bank.values(), lr=0.1), tokens[:-1], tokens[1:], WORLD)
    assert shapes == {(4, h.train_seq_len)}
    plain = torch.optim.SGD(twin.bank.values(), lr=0.1)
    for x, y in zip(*(part.view(rows, -1).split(8) for part in (tokens[:-1], tokens[1:]))):
        plain.zero_grad()
        twin.nats(x, y, t.depth_plan(h, True)).mean().backward()
        plain.step()
    for a, b in zip(model.bank.values(), twin.bank.values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
