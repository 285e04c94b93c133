"""Training: a rehearsal leaves no trace, the loop learns, recurrence follows the progress, bad
losses are refused."""
from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from conftest import on_ranks
from support import WORLD, Lines, dataset, repetitive, settings, stream, t


def trainer(h: t.Hyperparameters, tokens: np.ndarray | None = None) -> tuple[t.Trainer, t.Dataset]:
    """A trainer at step zero, and its data."""
    data = dataset(stream(3000) if tokens is None else tokens)
    return t.Trainer(h, WORLD, t.build_model(h, WORLD), data), data


def tensors(value) -> list[torch.Tensor]:
    """Every tensor and number inside a nested state, in order, as tensors."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in tensors(item)]
    return [value if torch.is_tensor(value) else torch.tensor(hash(value))]


def same(a, b) -> bool:
    """True where two states are equal bit for bit."""
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_rehearsal_is_rewound_bit_for_bit(steps):
    """Weights, optimiser, average, loader and generator are as before, at step zero and in mid-
    run."""
    h = settings(scores="prequant,quantized,sliding,stream,ttt", rehearsal_steps=2)
    trained, data = trainer(h)
    for number in range(steps):
        trained.step(number, 0.0, True)
    before = trained.snapshot()
    log = Lines()
    reserve_s = t.rehearse(trained, data, log)
    assert same(before,
                trained.snapshot()) and trained.loader.position == steps * t.accumulation(h, WORLD)
    assert all(p.grad is None for p in trained.model.parameters())
    assert reserve_s == 0 and re.match(r"rehearsal:[\d.]+s .*reserve:[\d.]+s", log.lines[-1])


def test_steps_after_a_rehearsal_are_those_without_one():
    """Four steps with and without a rehearsal in front make the same losses and weights, bit for
    bit."""
    h, runs = settings(), []
    for rehearsed in (False, True):
        trained, data = trainer(h)
        if rehearsed:
            t.rehearse(trained, data, Lines())
        losses = [float(trained.step(n, n / 4, n > 1)) for n in range(4)]
        runs.append((losses, trained.snapshot()))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


class Forbidden:
    """A validation set that nobody may look at."""
    def __getattribute__(self, name):
        """Raises for whatever is asked of it."""
        raise AssertionError(f"the rehearsal read {name} of the validation set")


def test_the_rehearsal_reads_no_validation_text():
    """Its scorers get training text, so that validation text stays untouched until it is scored."""
    trained, data = trainer(settings(scores="prequant,quantized,sliding,stream,ttt"))
    t.rehearse(trained, data._replace(val=Forbidden()), Lines())


def test_the_random_generator_is_rewound():
    """Numbers drawn after a restore are those that would have been drawn at the snapshot."""
    trained, _ = trainer(settings())
    state = trained.snapshot()
    drawn = torch.rand(4)
    trained.restore(state)
    assert torch.equal(torch.rand(4), drawn)


def test_training_lowers_the_loss():
    """On a text that repeats, 30 steps take the loss from ln V to less than half of it."""
    h = settings(iterations=30, muon_momentum_warmup_steps=10, ema_decay=0.5)
    trained, _ = trainer(h, repetitive(3000))
    log = Lines()
    done, _ = t.train(trained, 0.0, log, lambda: "")
    losses = [float(m[1]) for line in log.lines if (m := re.search(r"train_loss:([\d.]+)", line))]
    assert done.steps == 30 and abs(losses[0] - math.log(64)) < 0.2 and losses[-1] < losses[0] / 2


def test_the_exported_weights_are_the_average():
    """After `train` the weights are the moving average, which differs from the last weights."""
    h = settings(iterations=5)
    trained, _ = trainer(h)
    kept = []
    update = trained.ema.update
    trained.ema.update = lambda decay: (
        update(decay),
        kept.append(
            ([p.detach().clone()
              for p in trained.model.bank.values()], [m.clone() for m in trained.ema.mean])))
    t.train(trained, 0.0, Lines(), lambda: "")
    live, mean = kept[-1]
    assert same(list(trained.model.bank.values()), mean) and not same(live, mean)


@pytest.mark.parametrize("at, first", [(0.0, 0), (0.5, 3), (0.34, 3), (1.0, None)])
def test_recurrence_switches_on_by_progress(at, first):
    """Of 6 steps, those from ENABLE_LOOPING_AT on are looped; the log says when it began."""
    trained, _ = trainer(settings(enable_looping_at=at))
    assert looped_steps(trained) == ([first is not None and n >= first for n in range(6)], first)


def test_no_loops_means_no_recurrence():
    """NUM_LOOPS=0 never switches."""
    trained, _ = trainer(settings(num_loops=0, enable_looping_at=0.0))
    assert looped_steps(trained) == ([False] * 6, None)


def looped_steps(trained: t.Trainer) -> tuple[list[bool], int | None]:
    """Which steps of a run were looped, and the step at which the log says it began."""
    seen, step, log = [], trained.step, Lines()
    trained.step = lambda number, progress, looped: seen.append(looped) or step(
        number, progress, looped)
    t.train(trained, 0.0, log, lambda: "")
    said = [int(m[1]) for line in log.lines if (m := re.match(r"recurrence:on step:(\d+) ", line))]
    assert len(said) <= 1
    return seen, said[0] if said else None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(bad):
    """A NaN in the weights stops the run with a sentence that names step and rates."""
    trained, _ = trainer(settings())
    with torch.no_grad():
        trained.model.bank["embed"].fill_(bad)
    with pytest.raises(t.Refusal, match="loss is nan at step 1.*MATRIX_LR"):
        t.train(trained, 0.0, Lines(), lambda: "")


def test_weights_that_are_broken_are_refused_by_calibration():
    """The last step, or the rehearsal's, may have been one too many; on GPUs a draw from NaN would end the process."""
    trained, _ = trainer(settings())
    with torch.no_grad():
        trained.model.bank["embed"].fill_(math.nan)
    with pytest.raises(t.Refusal, match="^training broke the weights: lower MATRIX_LR="):
        t.calibrate(trained.model, trained.world)


def test_a_loss_that_breaks_late_is_refused_before_the_export():
    """Between two log lines nothing is read, but the last line of the loop checks the loss
    again."""
    trained, _ = trainer(settings())
    step = trained.step

    def breaking(number, progress, looped):
        """The ordinary step; the fifth one poisons the embedding."""
        loss = step(number, progress, looped)
        return loss * math.nan if number == 5 else loss

    trained.step = breaking
    before = trained.snapshot()["mean"]
    with pytest.raises(t.Refusal, match="step 6"):
        t.train(trained, 0.0, Lines(), lambda: "")
    assert not same(before, trained.snapshot()["weights"])


@pytest.mark.parametrize("reserve_s", [2.0, 3.5])
def test_a_clock_too_short_is_refused(reserve_s):
    """Where the reserve eats the clock, the sentence names the knob and both times."""
    trained, _ = trainer(settings(max_wallclock_seconds=2.0))
    with pytest.raises(t.Refusal, match=f"MAX_WALLCLOCK_SECONDS=2 leaves no time.*{reserve_s} s"):
        t.train(trained, reserve_s, Lines(), lambda: "")


def fake_time(monkeypatch, trained: t.Trainer, step_s: float):
    """Makes a step take `step_s` seconds and nothing else any; returns a function that lets seconds
    pass."""
    now, step = [0.0], trained.step
    monkeypatch.setattr(t.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        """Lets time pass."""
        now[0] += seconds

    trained.step = lambda *arguments: spend(step_s) or step(*arguments)
    return spend


def test_the_clock_ends_training_before_the_budget(monkeypatch):
    """With a step a second, 20 s and a reserve of 5.5 s, 13 or 14 steps are made and progress
    follows the clock."""
    trained, _ = trainer(settings(iterations=0, max_wallclock_seconds=20.0))
    fake_time(monkeypatch, trained, 1.0)
    progress, step = [], trained.step
    trained.step = lambda number, done, looped: progress.append(done) or step(number, done, looped)
    done, _ = t.train(trained, 5.5, Lines(), lambda: "")
    assert done.steps in (13, 14) and done.seconds == done.steps <= 14.5
    assert progress == pytest.approx([n / 14.5 for n in range(done.steps)])


def test_a_resumed_run_uses_its_clock_to_the_end(monkeypatch):
    """The seconds before a stop are no step's: resumed at 300 of 320 s, with a step a second, 17 to 19 more are made."""
    trained, _ = trainer(settings(iterations=0, max_wallclock_seconds=320.0))
    fake_time(monkeypatch, trained, 1.0)

    def resume(saves, log) -> int:
        """As if a checkpoint of step 5 had been read."""
        saves.saved_s = saves.clock.agreed_s = 300.0
        saves.clock.pause(-300.0)
        return 5

    monkeypatch.setattr(t.Checkpoints, "resume", resume)
    done, _ = t.train(trained, 0.0, Lines(), lambda: "")
    assert done.resumed == 5 and 22 <= done.steps <= 24 and 317 <= done.seconds <= 320


def test_validation_inside_training_is_not_counted(monkeypatch):
    """VAL_LOSS_EVERY pauses the clock for good, and writes the official line."""
    trained, _ = trainer(settings(iterations=4, val_loss_every=2, max_wallclock_seconds=20.0))
    spend, log = fake_time(monkeypatch, trained, 1.0), Lines()
    done, clock = t.train(trained, 0.0, log,
                          lambda: spend(100.0) or "val_loss:1.0000 val_bpb:2.0000")
    pattern = r"step:[02]/4 val_loss:1\.0000 val_bpb:2\.0000 train_time:(0|2000)ms step_avg:\S+ms"
    assert sum(bool(re.fullmatch(pattern, line)) for line in log.lines) == 2
    # The same clock goes on through adaptation: with the pauses in it, the run would seem to
    # break its limit.
    assert done.steps == 4 and done.seconds == 4 and clock.read_s() == 4


def test_training_lines_keep_the_official_form():
    """step:a/b train_loss:x train_time:yms step_avg:zms, then ours."""
    trained, _ = trainer(settings(train_log_every=2))
    log = Lines()
    t.train(trained, 0.0, log, lambda: "")
    pattern = r"step:\d+/6 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms tok/s:\d+"
    assert {int(line.split("/")[0][5:])
            for line in log.lines if re.fullmatch(pattern, line)} == {1, 2, 3, 4, 6}


def test_training_says_the_time_left(monkeypatch):
    """Between the official lines: step, loss of the last read, tokens/s, time left by the clock or by steps."""
    monkeypatch.setattr(t.Log, "due", lambda *_: True)
    for limit_s, left in ((0.0, [50, 40, 30, 20, 10]), (41.0, [31, 21])):
        trained, _ = trainer(settings(max_wallclock_seconds=limit_s))
        fake_time(monkeypatch, trained, 10.0)
        log = Lines()
        t.train(trained, 0.0, log, lambda: "")
        found = [re.fullmatch(r"train:(\d)/6 loss:(\d\.\d{4}) tok/s:13 left:(\d+)s", line) for line in log.lines]
        assert [int(m[3]) for m in found if m] == left
        assert found[1] is None or found[1][2] in log.lines[0]


def test_the_rehearsal_says_what_it_does():
    """Each stage as it begins, and how long every score will take."""
    trained, data = trainer(settings(scores="prequant,sliding"))
    log = Lines()
    t.rehearse(trained, data, log, documents=[0, 10**6])
    assert [line for line in log.lines if line.startswith("rehearse:")] == [
        "rehearse:train", "rehearse:calibrate", "rehearse:quantise and pack", "rehearse:score prequant",
        "rehearse:score sliding"]
    costs = [line for line in log.lines if line.startswith("cost:")]
    assert [re.match(r"cost:(.*?) +about +\d+ s$|cost:(bytes) [\d,]+ at most, memory [\d,]+ so far", c)[0] and
            c[5:20].split("  ")[0].strip() for c in costs] == [
                "rehearsal", "training", "calibrate", "quantise", "score prequant", "score sliding", "bytes 16,000,00"]


def test_training_lines_count_the_steps_they_name(monkeypatch):
    """Where a step of 128 tokens takes ten seconds, the line of step n says 10 n seconds and 13
    tokens/s."""
    trained, _ = trainer(settings(train_log_every=1))
    fake_time(monkeypatch, trained, 10.0)
    log = Lines()
    t.train(trained, 0.0, log, lambda: "")
    found = [
        re.match(r"step:(\d+)/6 .*train_time:(\d+)ms step_avg:(\S+)ms tok/s:(\d+)", line)
        for line in log.lines
    ]
    assert {m.groups() for m in found if m} == {
        (str(n), str(10_000 * n), "10000.00", "13") for n in range(1, 7)}


def test_a_restored_run_goes_on_as_if_never_stopped():
    """Six steps at a stretch equal three, a snapshot carried to a fresh trainer, and three more."""
    h = settings()
    whole, _ = trainer(h)
    for n in range(6):
        whole.step(n, n / 6, n > 2)
    first, _ = trainer(h)
    for n in range(3):
        first.step(n, n / 6, n > 2)
    second, _ = trainer(h)
    second.restore(first.snapshot())
    for n in range(3, 6):
        second.step(n, n / 6, n > 2)
    assert same(whole.snapshot(), second.snapshot())


def test_a_snapshot_is_a_copy():
    """Steps after a snapshot do not change it."""
    trained, _ = trainer(settings())
    trained.step(0, 0.0, False)
    state = trained.snapshot()
    kept = [x.clone() for x in tensors(state)]
    trained.step(1, 0.5, True)
    assert same(kept, state)


def test_accumulation_divides_or_says_which_knobs_to_change():
    """Steps of 128 tokens are two micro-batches of 64 on one rank, one on two, and nothing on
    three."""
    h = settings()
    assert t.accumulation(h, WORLD) == 2 and t.accumulation(h, t.World(0, 2)) == 1
    with pytest.raises(t.Refusal, match="TRAIN_BATCH_TOKENS=128.*3 ranks.*MICRO_BATCH_TOKENS=64"):
        t.accumulation(h, t.World(0, 3))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Two micro-batches of 64 tokens leave the gradients of one of 128."""
    grads = []
    for micro in (64, 128):
        trained, _ = trainer(settings(micro_batch_tokens=micro))
        trained.loader.arrange(0)
        trained.loader.order = np.arange(trained.loader.blocks)
        trained.optimiser.step = lambda *_: None
        trained.step(0, 0.0, True)
        grads.append([p.grad for p in trained.model.bank.values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


# ------------------------------------------------------------------------------------- checkpoints
class Killed(BaseException):
    """Stands for the end of a process."""


def make_mortal(trained, stop):
    """The trainer dies in front of step `stop`."""
    step = trained.step

    def mortal(number, progress, looped):
        """The ordinary step, or the end."""
        if number == stop:
            raise Killed
        return step(number, progress, looped)

    trained.step = mortal


def saving(folder, stop=None, **changes):
    """(trained, weights and average at the end) of 6 steps in a run's folder with a checkpoint at
    every step; dies in front of step `stop`."""
    trained, _ = trainer(settings(checkpoint_every_s=1e-9, **changes))
    make_mortal(trained, stop)
    log = t.Log(WORLD, folder, quiet=True)
    try:
        return t.train(trained, 0.0, log, lambda: "")[0], trained.snapshot()
    finally:
        log.lock.close()


def names(folder) -> list[str]:
    """The checkpoints that lie in a folder."""
    return [path.name for path in t.checkpoints(folder)]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_ends_with_the_same_bits(stop, tmp_path):
    """Weights, average, optimiser, loader and generator, wherever it was interrupted."""
    _, whole = saving(tmp_path / "whole")
    with pytest.raises(Killed):
        saving(tmp_path / "cut", stop)
    done, state = saving(tmp_path / "cut")
    assert done == t.Trained(6, done.seconds, stop) and same(whole, state)
    assert names(tmp_path / "cut") == ["checkpoint000000005.bin", "checkpoint000000006.bin"]
    again, state = saving(tmp_path / "cut")    # from the end of training: what dies while scoring
    assert again.resumed == again.steps == 6 and same(whole["weights"], state["weights"])


def test_the_clock_goes_on_where_it_stood(tmp_path, monkeypatch):
    """Seconds of the first part count: with 10 s a step, 45 s and a stop in front of the third, two
    more are made."""
    knobs = dict(iterations=0, max_wallclock_seconds=50.0)
    now = [0.0]
    monkeypatch.setattr(t.time, "perf_counter", lambda: now[0])
    step = t.Trainer.step
    monkeypatch.setattr(t.Trainer, "step", lambda *arguments: now.__setitem__(0, now[0] + 10) or step(*arguments))
    whole = saving(tmp_path / "whole", **knobs)
    with pytest.raises(Killed):
        saving(tmp_path / "cut", 2, **knobs)
    now[0] += 1000
    cut = saving(tmp_path / "cut", **knobs)
    assert whole[0].seconds == cut[0].seconds == 10.0 * whole[0].steps and same(whole[1], cut[1])


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    """The one before it serves; where all are damaged the run is refused, not begun anew."""
    with pytest.raises(Killed):
        saving(tmp_path / "cut", 4)
    for count, path in enumerate(reversed(t.checkpoints(tmp_path / "cut")), 1):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        if count == 1:
            assert t.read_checkpoint(tmp_path / "cut")[0] == 3
    with pytest.raises(t.Refusal, match="checkpoint000000003.bin: damaged"):
        saving(tmp_path / "cut")
    for path in t.checkpoints(tmp_path / "cut"):
        path.write_bytes(b"")
    with pytest.raises(t.Refusal, match="damaged"):
        saving(tmp_path / "cut")


def test_a_checkpoint_is_one_line_of_json_and_numbers(tmp_path):
    """Nothing in it can be executed: the state is described in JSON, the rest are the tensors' own
    bytes and SHA-256."""
    _, state = saving(tmp_path / "r")
    path = t.checkpoints(tmp_path / "r")[-1]
    raw = path.read_bytes()
    line, rest = raw.split(b"\n", 1)
    step, seconds, ranks, knobs, described = t.json.loads(line)
    assert (step, ranks, knobs["num_layers"]) == (6, 1, 4) and seconds > 0
    stored = [x for x in tensors(state) if x.dim() or x.is_floating_point()]
    assert len(rest) == 32 + sum(x.numel() * x.element_size() for x in stored)
    assert t.read_checkpoint(tmp_path / "r")[4]["optimiser"]["adam"]["state"][0]["exp_avg"].shape == (64, 32)
    assert described["weights"] == [dict(dtype="float32", shape=[*x.shape]) for x in state["weights"]]


@pytest.mark.parametrize("every, limit, on", [(600, 600, False), (600, 599, False), (600, 601, True), (600, 0, True),
                                              (0, 0, False), (0, 700, False)])
def test_checkpoints_are_for_runs_longer_than_their_distance(every, limit, on, tmp_path):
    """None in the 10-minute track, and none at CHECKPOINT_EVERY_S=0; then no signal is caught."""
    trained, _ = trainer(settings(checkpoint_every_s=every, max_wallclock_seconds=limit))
    saves = t.Checkpoints(trained, t.Clock(WORLD), tmp_path)
    assert bool(saves.on) == on == bool(saves.before)
    for number, handler in saves.before.items():
        t.signal.signal(number, handler)
    saves = t.Checkpoints(trained, t.Clock(WORLD), None)
    assert not saves.on, "without a folder nothing is saved"


@pytest.mark.parametrize("number", [t.signal.SIGTERM, t.signal.SIGINT, t.signal.SIGUSR1, t.signal.SIGUSR2])
def test_a_signal_saves_and_stops(number, tmp_path):
    """The step ends, its checkpoint is whole, the sentence says how to go on; then the signals are
    what they were."""
    _, whole = saving(tmp_path / "whole")
    h = settings(checkpoint_every_s=1e9)
    trained, _ = trainer(h)
    step, log = trained.step, t.Log(WORLD, tmp_path / "cut", quiet=True)
    before = t.signal.getsignal(number)
    trained.step = lambda n, *rest: (t.os.kill(t.os.getpid(), number) if n == 2 else None, step(n, *rest))[1]
    with pytest.raises(t.Refusal, match="stopped by a signal at step 3.*RUN_ID=cut goes on from there"):
        t.train(trained, 0.0, log, lambda: "")
    log.lock.close()
    t.signal.signal(number, before)
    assert names(tmp_path / "cut") == ["checkpoint000000003.bin"]
    done, state = saving(tmp_path / "cut")
    assert done.resumed == 3 and same(whole, state)
    assert t.signal.getsignal(number) == before


def resumed_on_ranks(world, folder) -> None:
    """Six steps at a stretch and six with a stop in front of the fourth, on these ranks."""
    tokens = stream(3000)
    for name, stop in (("whole", None), ("cut", 3), ("cut", None)):
        h = settings(checkpoint_every_s=1e-9)
        trained = t.Trainer(h, world, t.build_model(h, world), dataset(tokens))
        make_mortal(trained, stop)
        log = t.Log(world, folder / name, quiet=True)
        try:
            t.train(trained, 0.0, log, lambda: "")
            torch.save(trained.snapshot(), folder / f"{name}{world.rank}.pt")
        except Killed:
            trained.loader.worker.shutdown()
        if world.main:
            log.lock.close()
        world.wait()


def test_two_ranks_resume_to_the_same_bits(tmp_path):
    """One file holds the momenta of both, and each takes its own share of them."""
    on_ranks(2, resumed_on_ranks, tmp_path)
    states = {(name, rank): torch.load(tmp_path / f"{name}{rank}.pt", weights_only=False)
              for name in ("whole", "cut") for rank in (0, 1)}
    for rank in (0, 1):
        assert same(states["whole", rank], states["cut", rank])
    assert same(states["cut", 0]["weights"], states["cut", 1]["weights"])
