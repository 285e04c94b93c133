"""Section 14: every fused kernel equals its plain twin, forward and backward, whole and odd sizes. Without a GPU
they run in Triton's interpreter, which must be asked for before Triton is imported: in a process of its own."""
from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t
from conftest import REPO
from support import settings

GPU = not t.INTERPRETED and not t.kernels_trouble()
DEVICE = "cuda" if GPU else "cpu"
SLACK = 1 if GPU else 2    # the interpreter cuts bf16 off where a chip rounds


def dot_of_bf16(self, a, b, total, *unused):
    """The interpreter's tl.dot multiplies the bits of bf16 tiles as integers: this one widens."""
    wide = [(x.data.astype(np.uint32) << 16).view(np.float32) if x.data.dtype == np.uint16 else x.data
            for x in (a, b)]
    return type(total)(np.matmul(*wide, dtype=np.float32) + total.data, total.dtype.scalar)


@pytest.fixture(scope="module")
def k():
    """The script with working kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if t.INTERPRETED:
            from triton.runtime import interpreter
            patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bf16)
        if "PACKED" in os.environ:
            packed = sys.modules["packed"] = types.ModuleType("packed")
            packed.__file__ = "packed"
            source = (REPO / "train_gpt.py").read_text()
            exec(compile(t.pack_source(source, "RECIPE=demo"), "packed", "exec"), vars(packed))
            yield packed
            return
        assert t.kernels_trouble() == ""
        yield t


@pytest.fixture(autouse=True)
def seed():
    """Equal numbers in every test."""
    torch.manual_seed(0)


def normal(*shape, dtype=torch.bfloat16, scale=1.0):
    """Normal numbers on the device."""
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def gradients(function, inputs, slope):
    """(value, gradients) of a function of tensors, each a fresh leaf."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, slope)


def error(got, wanted):
    """Root mean square error over the root mean square of what was wanted."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("slope", [0.5, 0.0])
@pytest.mark.parametrize("shape, D, F_", [((64, ), 32, 64), ((2, 33), 48, 80), ((3, 7), 16, 48),
                                          ((1, ), 16, 16), ((2, 150), 32, 112)])
def test_mlp_equals_plain(k, shape, D, F_, slope):
    """Value and all three gradients are as near to fp64 as those of the plain form."""
    inputs = normal(*shape, D), normal(F_, D, scale=D**-0.5), normal(D, F_, scale=F_**-0.5)
    dy = normal(*shape, D)
    exact, exact_slopes = gradients(lambda *a: k.mlp(*a, slope), [x.double() for x in inputs], dy.double())
    plain, plain_slopes = gradients(lambda *a: k.mlp(*a, slope), inputs, dy)
    fused, fused_slopes = gradients(lambda *a: k.mlp(*a, slope, fused=True), inputs, dy)
    assert fused.dtype == torch.bfloat16 and fused.shape == (*shape, D)
    for got, twin, wanted in zip([fused, *fused_slopes], [plain, *plain_slopes], [exact, *exact_slopes]):
        assert got.shape == wanted.shape
        # rounding errors of few hidden values do not cancel: on a chip those of 16 put gradients 0.0020 above the twin
        assert error(got, wanted) <= 1.25 * SLACK * error(twin, wanted) + 1e-3 + 2**-8 * (math.prod(shape) * F_)**-0.5


def test_activations_say_their_side_and_have_no_bias(k):
    """The lowest bit is 1 above zero and 0 below; the rest is off by one unit of bf16 at most and by nothing on average."""
    x, up = normal(300, 32), normal(128, 32, scale=0.2)
    z = x.float() @ up.float().mT
    h = torch.ops.golf.mlp(x, up, normal(32, 128), 0.5)[1]
    wanted = torch.nn.functional.leaky_relu(z, 0.5).square()
    clear = z.abs() > 1e-3    # nearer to zero the order of summation decides
    assert torch.equal((h.view(torch.int16) & 1).bool()[clear], (z > 0)[clear])
    for side in (z > 1e-3, z < -1e-3):
        off = (h.float() / wanted - 1)[side]
        assert off.abs().max() <= 2**-7 * 1.01 and abs(off.mean()) < 4 * off.std() / len(off)**0.5


def test_mlp_without_gradients_and_with_frozen_weights(k):
    """Scoring computes the same; frozen weights cost no gradient."""
    x, up, down = normal(40, 16), normal(48, 16), normal(16, 48)
    with torch.no_grad():
        quiet = k.mlp(x, up, down, 0.5, fused=True)
    y = k.mlp(x.requires_grad_(), up, down, 0.5, fused=True)
    assert torch.equal(y, quiet)
    y.sum().backward()
    assert up.grad is None and x.grad.shape == x.shape


def test_what_the_kernels_were_not_made_for_takes_the_plain_way(k, monkeypatch):
    """fp32, and rows that do not start at multiples of 16 bytes."""
    def never(*arguments):
        """No launch is allowed."""
        raise AssertionError("launched")

    monkeypatch.setattr(k, "launch_mlp", never)
    for width, dtype in ((15, torch.bfloat16), (16, torch.float32)):
        k.mlp(normal(4, width, dtype=dtype), normal(24, width, dtype=dtype),
              normal(width, 24, dtype=dtype), 0.5, fused=True)


@pytest.mark.parametrize("N, V, cap, scale", [(5, 64, 30.0, 3.0), (7, 104, 15.0, 30.0),
                                              (3, 8192 + 80, 30.0, 10.0), (2, 8, 100.0, 400.0)])
def test_nats_equal_plain(k, N, V, cap, scale):
    """One loss per row and its gradient; any vocabulary."""
    logits, targets = normal(N, V, scale=scale), torch.randint(V, (N, ), device=DEVICE)
    slope = torch.rand(N, device=DEVICE) / N
    plain, (wanted, ) = gradients(lambda z: k.softcapped_nats(z, targets, cap), [logits.float()], slope)
    fused, (got, ) = gradients(lambda z: k.softcapped_nats(z, targets, cap, True), [logits], slope)
    assert fused.dtype == torch.float32 and got.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-5 if not GPU else 1e-4)
    torch.testing.assert_close(got.float(), wanted, rtol=1.05 * SLACK * 2**-8, atol=1e-7)


class NoLargeFloats(TorchDispatchMode):
    """Fails on any fp32 result of `limit` elements or more."""

    def __init__(self, limit):
        """Keeps the limit."""
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Looks at what the operator returns."""
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float32
                        and x.numel() >= self.limit), function
        return out


def test_no_fp32_tensor_is_as_large_as_the_logits(k):
    """Neither the logits nor their gradient exist in fp32; the plain twin shows that the watch sees."""
    table, x = normal(56, 16).requires_grad_(), normal(6, 16)
    targets = torch.arange(6, device=DEVICE)
    with NoLargeFloats(6 * 56):
        k.softcapped_nats(x @ table.mT, targets, 30.0, True).mean().backward()
    with pytest.raises(AssertionError), NoLargeFloats(6 * 56):
        k.softcapped_nats(x @ table.mT, targets, 30.0)


@pytest.mark.parametrize("looped", [False, True])
def test_the_model_with_kernels_equals_the_plain_one(k, looped):
    """Loss and every gradient of a whole model within bf16 rounding."""
    found = []
    h = k.Hyperparameters(**{f: v for f, v in vars(settings(matrix_init="uniform")).items()})
    ids = torch.randint(2, h.vocab_size, (2, 64), device=DEVICE)
    for fused in (True, False):
        torch.manual_seed(0)
        model = k.GPT(dataclasses.replace(h, fused_kernels=fused), torch.bfloat16).to(DEVICE)
        assert model.h.fused_kernels == fused
        with torch.no_grad():
            for _name, p in model.bank.items():
                if not p.any():
                    p.normal_(std=0.1)
        nats = model.nats(ids, ids.roll(-1, 1), t.depth_plan(settings(matrix_init="uniform"), looped))
        nats.mean().backward()
        found.append([nats.detach(), *(p.grad for p in model.bank.values() if p.grad is not None)])
    for got, wanted in zip(*found):    # a small tensor's gradient is a sum that mostly cancels
        assert error(got, wanted) < (0.03 if wanted.numel() > 500 else 0.1) * SLACK


def test_steps_with_and_without_kernels(k):
    """Equal data, equal losses to 0.02 nats on average of the last ten; the model learns. Fewer steps in the interpreter."""
    found, tokens = {}, torch.arange(2001, device=DEVICE) * 7 % 50 + 2
    h = settings(num_layers=1, loop_start=0, loop_end=0, parallel_start_layer=1, xsa_last_n=1, model_dim=16, num_heads=1, num_kv_heads=1,
                 train_seq_len=16, micro_batch_tokens=16, train_batch_tokens=16)
    for fused in (True, False):
        torch.manual_seed(0)
        model = k.GPT(dataclasses.replace(h, fused_kernels=fused), torch.bfloat16).to(DEVICE)
        optimiser, plan, losses = k.Optimiser(model, k.World(device=torch.device(DEVICE))), k.depth_plan(h, True), []
        for step in range(100 if GPU else 20):
            batch = tokens[20 * step:20 * step + 17]
            nats = model.nats(batch[None, :-1], batch[None, 1:], plan).mean()
            nats.backward()
            optimiser.step(0.5, 0.9)
            losses.append(float(nats.detach()))
        found[fused] = losses
    ends = [sum(found[fused][-10:]) / 10 for fused in (True, False)]
    assert abs(found[True][0] - found[False][0]) < 0.01 * SLACK
    assert ends[1] < found[False][0] - 1 and abs(ends[0] - ends[1]) < 0.02 * SLACK, ends


@pytest.mark.parametrize("states, rows, length", [(4, 1, 100), (8, 2, 300), (16, 1, 1000), (8, 1, 7)])
def test_the_trellis_equals_its_plain_twin(k, states, rows, length):
    """Code for code in the interpreter; on a GPU, which rounds products differently, in the error that is left. Rows
    that no run of 64 divides, layers in a transposed tensor, huge targets."""
    x = (torch.randn(length, rows) * 5).to(DEVICE).T
    x[0, :3] = torch.tensor([1e9, -1e9, 4e4])
    weight = torch.rand(rows, length).to(DEVICE) + 0.1
    fused, plain = (k.trellis_codes(x, states, weight, fused=f) for f in (True, False))
    t.check_trellis(fused.cpu().numpy()[:, :, None], states)
    left = [((x.clamp(-32_760, 32_760) - codes).square() * weight).sum(1) for codes in (fused, plain)]
    assert torch.allclose(*left, rtol=1e-4)
    assert GPU or torch.equal(fused, plain)


def test_gptq_along_the_fused_trellis(k):
    """A whole bank comes out alike, errors pushed on included."""
    w, moment = torch.randn(2, 40, 3, device=DEVICE), torch.eye(3, device=DEVICE).expand(2, 3, 3) + 0.3
    factor, grid = k.inverse_factor(moment, 0.01), k.uniform_grid(w, 4, 4.0)
    fused, plain = (k.gptq(w, factor, grid, states=8, fused=f).decode() for f in (True, False))
    assert GPU or torch.equal(fused, plain)
    assert abs(float((fused - w).norm() / (plain - w).norm()) - 1) < 0.01


def test_one_graph_holds_the_operators(k, monkeypatch):
    """fullgraph compilation of an MLP and the loss equals the eager form; traced alone where no GPU compiles."""
    import torch._inductor.config
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="inductor" if GPU else "aot_eager")
    inputs = normal(2, 24, 16), normal(48, 16, scale=0.3), normal(16, 48, scale=0.2), normal(64, 16)
    targets = torch.randint(64, (48, ), device=DEVICE)

    def loss(x, up, down, table):
        """A head on a residual MLP, mean nats."""
        states = x + k.mlp(x, up, down, 0.5, fused=True)
        return k.softcapped_nats(states.flatten(0, -2) @ table.mT, targets, 30.0, True).mean()

    value, slopes = gradients(loss, inputs, None)
    got, got_slopes = gradients(compiled(loss), inputs, None)
    torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-3)
    for a, b in zip(got_slopes, slopes):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=1e-3)


def test_operators_pass_torchs_own_checks(k):
    """Schema, fake tensors and registration of gradients."""
    x, up, down = (a.requires_grad_() for a in (normal(8, 16), normal(48, 16), normal(16, 48)))
    few = dict(test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    golf, ones = torch.ops.golf, torch.ones(4, device=DEVICE)
    torch.library.opcheck(golf.mlp.default, (x, up, down, 0.5), **few)
    torch.library.opcheck(golf.mlp_slope.default, (x.detach(), down.detach(), normal(8, 48), 0.5), **few)
    where = torch.arange(4, device=DEVICE)
    torch.library.opcheck(golf.nats.default, (normal(4, 8).requires_grad_(), where, 30.0), **few)
    torch.library.opcheck(golf.nats_slope.default, (normal(4, 8), where, ones, ones, 30.0), **few)


def test_wrong_kernels_are_refused(k, monkeypatch):
    """The comparison with the plain twins notices a kernel that is off by a tenth."""
    monkeypatch.setattr(k, "register_kernels", lambda: None)
    plain = k.mlp
    monkeypatch.setattr(k, "mlp", lambda *a, fused=False: plain(*a) * (1.1 if fused else 1.0))
    assert k.kernels_trouble.__wrapped__().startswith("they are off by")


if not GPU and not t.INTERPRETED:
    # what is above runs in the process that the test below starts
    for name in [n for n in globals() if n.startswith("test_")]:
        del globals()[name]

    @pytest.mark.parametrize("script", [{}, dict(PACKED="1")], ids=["readable", "packed"])
    def test_all_kernels_in_the_interpreter(script):
        """Every test above, where no GPU runs the kernels themselves; of the packed script, a whole model."""
        pytest.importorskip("triton")
        chosen = ["-k", "the_model_with_kernels and False"] if script else []
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *chosen, __file__],
                              env=os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1") | script, capture_output=True, text=True)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]

    @pytest.mark.parametrize("states", [8, 16])
    def test_the_trellis_compiles_for_a_chip(states):
        """To machine code of Hopper: what the interpreter takes a compiler may refuse."""
        triton = pytest.importorskip("triton")
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        kinds = dict(x="*fp32", weight="*fp32", codes="*i16", taken="*i64", R="i32")
        names, taps = t.trellis_kernel.arg_names, [tap >> 1 for tap in t.TRELLIS_TAPS[states]]
        fixed = {(names.index(name), ): value for name, value in zip(("S", "PARITY", "UPPER"), (states, *taps))}
        source = ASTSource(t.trellis_kernel, {name: kinds.get(name, "constexpr") for name in names}, fixed)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=1))
        assert made.asm["cubin"] and not made.metadata.shared

    def test_a_machine_without_the_kernels_says_why_and_is_plain():
        """The model then has the knob off, whatever it was asked for."""
        assert "Hopper" in t.kernels_trouble() or "Triton" in t.kernels_trouble()
        assert not t.GPT(settings(fused_kernels=True)).h.fused_kernels
