"""Section 5: the role table describes the whole state, and the plan of depth is the published one."""

from dataclasses import replace

import torch

import train_gpt as tg
from conftest import TINY


def layers(plan) -> list[int]:
    """The layer of each step."""
    return [step.layer for step in plan]


def variants(tiny) -> list[tg.Hyperparameters]:
    """Models with and without each optional role."""
    return [tiny, replace(tiny, head_gate_scale=0.0), replace(tiny, smear_gate="none"),
            replace(tiny, parallel_start_layer=4), replace(tiny, num_loops=0), replace(tiny, pointer=False),
            tg.Hyperparameters()]


def test_table_covers_the_state_exactly(tiny):
    """Every parameter is one row of the table with its shape, and nothing else is stored."""
    for h in variants(tiny):
        with torch.device("meta"):
            model = tg.GPT(h)
        table = tg.roles(h)
        assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == {
            f"bank.{name}": role.shape for name, role in table.items()}
        assert not list(model.buffers())


def test_optional_roles_follow_their_knobs(tiny):
    """A role that a knob switches off takes no bytes."""
    full, none = tg.roles(tiny), tg.roles(replace(tiny, head_gate_scale=0.0, smear_gate="none", parallel_start_layer=4))
    assert set(full) - set(none) == {"head_gate", "lane_keep", "lane_write", "smear_gate", "smear_scale"}


def test_every_role_has_one_optimiser_group(tiny):
    """Muon's stacks and AdamW's groups partition the parameters, each as its role says."""
    for h in variants(tiny)[:-1]:
        model = tg.GPT(h)
        optimiser = tg.Optimiser(model, tg.World())
        matrices = [p for stack in optimiser.stacks for p in stack.banks]
        held = [*matrices, *(p for group in optimiser.adam.param_groups for p in group["params"])]
        assert len(held) == len(model.bank) and {id(p) for p in held} == {id(p) for p in model.parameters()}
        kinds = {name: role.optim for name, role in tg.roles(h).items()}
        assert {name for name, p in model.bank.items() if any(p is m for m in matrices)} == {
            name for name, kind in kinds.items() if kind == "muon"}
        rates = {id(p): group["peak"] for group in optimiser.adam.param_groups for p in group["params"]}
        assert {rates[id(p)] for n, p in model.bank.items() if kinds[n] == "scalar"} == {h.scalar_lr}
        assert rates[id(model.bank["embed"])] == h.tied_embed_lr


def test_quantised_roles_name_a_tap_or_round(tiny):
    """Matrices and the embedding are calibrated and clipped; what is stored in fp16 needs neither."""
    for name, role in tg.roles(tiny).items():
        assert bool(role.tap) == (role.optim in ("muon", "embed")), name
        assert 2 <= role.bits <= 8 or role.bits == 16 and not role.tap
        if role.tap:
            assert role.sigmas > 0 and role.bits == (tiny.embed_bits if name == "embed" else tiny.matrix_bits)


def test_record_plan_and_size():
    """The submission executes 17 steps of 11 layers, and has the published number of parameters."""
    h = tg.Hyperparameters()
    plan = tg.depth_plan(h, looped=True)
    assert layers(plan) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [s.push for s in plan] == [True] * 8 + [False] * 9
    assert [s.pop for s in plan] == [None] * 8 + list(range(8)) + [None]
    assert [s.layer for s in plan if s.parallel] == [8, 9, 10] and all(s.xsa for s in plan)
    assert layers(tg.depth_plan(h, looped=False)) == list(range(11))
    with torch.device("meta"):
        count = lambda h: sum(p.numel() for p in tg.GPT(h).parameters())
        assert count(replace(h, pointer=False)) == 35_945_671
        assert count(h) == 35_945_671 + 2 * 512 * 256 + 512 + 2


def test_plans_by_hand(tiny):
    """Loop, halves, lanes and XSA of small plans."""
    plan = tg.depth_plan(tiny, looped=True)
    assert layers(plan) == [0, 1, 2, 1, 2, 3]
    assert [s.pop for s in plan] == [None, None, None, 0, 1, 2]
    assert [s.parallel for s in plan] == [False] * 5 + [True]
    assert [s.xsa for s in plan] == [False, True, True, True, True, True]
    assert tg.depth_plan(replace(tiny, num_loops=0), looped=True) == tg.depth_plan(tiny, looped=False)
    odd = tg.depth_plan(replace(tiny, num_layers=5), looped=False)
    assert [s.push for s in odd] == [True, True, False, False, False]
    assert [s.pop for s in odd] == [None, None, 0, 1, None]
    assert not any(s.parallel for s in tg.depth_plan(replace(tiny, parallel_start_layer=0), True)[:3])


def test_every_plan_pops_what_it_pushed_and_has_skip_rows(tiny):
    """Kept outputs never run out or stay behind, and each skip has weights of its own."""
    for L in range(1, 8):
        for loops in range(3):
            h = tg.Hyperparameters(**dict(TINY, num_layers=L, num_loops=loops, loop_start=0, loop_end=L - 1))
            for looped in (False, True):
                plan, depth = tg.depth_plan(h, looped), 0
                for step in plan:
                    depth -= step.pop is not None
                    assert depth >= 0
                    depth += step.push
                rows = [s.pop for s in plan if s.pop is not None]
                assert depth == 0 and rows == list(range(len(rows)))
                assert len(rows) <= tg.roles(h)["skip_weight"].shape[0]
