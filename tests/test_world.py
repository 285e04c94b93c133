"""Section 3: collectives, one process = two processes, the log and what is written; gloo on the loopback interface."""

import os
import platform
import re
import socket
import statistics
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import train_gpt as tg
from conftest import TINY, alive, on_ranks, run_script, write_dataset

STEPS = 5


def rehearsed_run(world: tg.World, folder: Path) -> None:
    """What both world sizes must agree on, saved by each rank: weights after 5 steps, moments, artifact, scores."""
    tg.SGD_CLIP = 1e9    # clipping would hide a wrong sum; this process is the rank's own
    h = tg.Hyperparameters(**dict(TINY, data_path=str(folder / "data")))
    silent = tg.Log(world, None, quiet=True)
    data = tg.find_dataset(h, world, silent)
    trainer = tg.Trainer(h, world, tg.build_model(h, world), data)
    initial = [p.detach().clone() for p in trainer.model.bank.values()]
    losses = [trainer.world.mean(trainer.step(n, n / STEPS, looped=n > 1)).item() for n in range(STEPS)]
    trained = [p.detach().clone() for p in trainer.model.bank.values()]
    model = alive(h, seed=world.rank)    # the rest starts from the same weights, on both sizes: rank 0's
    world.share_tensors(p.data for p in model.bank.values())
    model.retune(rounding_steps=0)    # Adam's first steps would make much of the last bits of a sum
    found = tg.calibrate(model, world)
    damage = tg.damage_of(model, found, {n: tg.searched_grid(model, n, found) for n in tg.tapped(h)})
    blob = world.share(tg.round_in_turn(model, found, 0, world, silent).blob)
    scores, nats = {}, {}
    for name in ("quantized", "sliding", "stream", "ttt"):
        result, ledger = tg.score_by_name(name, model, data.val, world, silent)
        scores[name], nats[name] = result, ledger.targets_nats()
    model.retune(rounding_steps=2)
    closer = tg.round_in_turn(model, found, 0, world, silent).blob
    moved = [p.detach().clone() for p in model.bank.values()]
    torch.save(dict(closer=closer, moved=moved, losses=losses, initial=initial, trained=trained, blob=blob, scores=scores, nats=nats, damage=damage,
                    momenta=[s.momentum.shape[0] for s in trainer.optimiser.stacks],
                    collectives=collectives(world)), folder / f"{world.size}-{world.rank}.pt")


def collectives(world: tg.World) -> dict[str, object]:
    """Every collective on numbers that tell the ranks apart."""
    r = float(world.rank)
    rows = torch.arange(8.0).view(4, 2) + 100 * r
    tensors = [torch.full((2,), r + 1), torch.full((1,), r + 5)]
    world.share_tensors(tensors)
    world.wait()
    clock = tg.Clock(world)
    return dict(sum=world.sum(torch.tensor([1.0, r])), mean=world.mean(torch.tensor([1.0, r])),
                scatter_mean=world.scatter_mean(rows)(), gather=world.gathered(torch.tensor([[r, r + 1]]))(),
                share=world.share(dict(rank=world.rank, raw=b"\0\xff")), share_tensors=tensors,
                clock=clock.tick(), main=world.main, size=world.size, rank=world.rank)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[int, int], dict]:
    """(size, rank) -> what `rehearsed_run` saved."""
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", tg.Hyperparameters(**TINY))
    on_ranks(2, rehearsed_run, folder)
    rehearsed_run(tg.World(), folder)
    return {(size, rank): torch.load(folder / f"{size}-{rank}.pt", weights_only=False)
            for size, rank in ((1, 0), (2, 0), (2, 1))}


def test_collectives(outcomes):
    """Sums, means, shares and broadcasts of two ranks."""
    first, second = (outcomes[2, rank]["collectives"] for rank in (0, 1))
    for mine in (first, second):
        assert mine["sum"].tolist() == [2, 1] and mine["mean"].tolist() == [1, 0.5]
        assert mine["gather"].tolist() == [[0, 1], [1, 2]]
        assert mine["share"] == dict(rank=0, raw=b"\0\xff")
        assert [t.tolist() for t in mine["share_tensors"]] == [[1, 1], [5]]
    assert first["scatter_mean"].tolist() == [[50, 51], [52, 53]]
    assert second["scatter_mean"].tolist() == [[54, 55], [56, 57]]
    assert first["clock"] == second["clock"] > 0, "the ranks agree on the time"
    assert (first["main"], second["main"], second["rank"], second["size"]) == (True, False, 1, 2)


def test_one_process_is_the_identity():
    """At size 1 every collective returns the very tensor it was given, untouched, without a process group."""
    world, t = tg.World.from_env({}), torch.randn(4, 2)
    before = t.clone()
    assert (world.rank, world.size, world.main) == (0, 1, True) and not torch.distributed.is_initialized()
    for collective in (world.sum, world.mean, lambda rows: world.scatter_mean(rows)(), lambda rows: world.gathered(rows)(), world.share):
        assert collective(t) is t
    world.share_tensors([t])
    world.wait()
    world.leave()
    assert torch.equal(t, before)


def test_equal_weights_after_training(outcomes):
    """Two ranks and one process: losses and all weights to 1e-5 after 5 fp32 steps; both ranks alike to the bit."""
    one, *two = (outcomes[key] for key in ((1, 0), (2, 0), (2, 1)))
    for a, b in zip(two[0]["trained"], two[1]["trained"]):
        assert torch.equal(a, b)
    for a, b in zip(one["trained"], two[0]["trained"]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert one["losses"] == pytest.approx(two[0]["losses"], abs=1e-5) and len(set(one["losses"])) == STEPS
    assert all((a != b).any() for a, b in zip(one["trained"], one["initial"]))
    assert sum(two[0]["momenta"]) < sum(one["momenta"]), "each rank holds a share of the momenta"


def test_equal_artifact_bytes(outcomes):
    """Calibrated by one or two processes, the same weights give the same artifact."""
    assert outcomes[1, 0]["blob"] == outcomes[2, 0]["blob"] == outcomes[2, 1]["blob"]


def test_ranks_make_up_alike(outcomes):
    """What makes up for rounding is the same to the bit on both ranks, and nearly that of one; rank 0 has the artifact."""
    one, two, other = (outcomes[key] for key in ((1, 0), (2, 0), (2, 1)))
    assert all(map(torch.equal, two["moved"], other["moved"]))
    apart = [float((a - b).norm() / a.norm()) for a, b in zip(one["moved"], two["moved"]) if a.norm() > 0]
    assert statistics.median(apart) < 0.05
    assert two["closer"] and not other["closer"] and len(one["closer"]) == pytest.approx(len(two["closer"]), rel=0.01)


def test_equal_scores(outcomes):
    """Windows: every target's nats to the bit. Streams, whose rows are other ones: to rounding."""
    for name in ("quantized", "sliding", "stream", "ttt"):
        one, two, other = (outcomes[key] for key in ((1, 0), (2, 0), (2, 1)))
        assert (two["nats"][name] == other["nats"][name]).all()
        if name in ("stream", "ttt"):
            assert abs(one["nats"][name] - two["nats"][name]).max() < 1e-3
        else:
            assert (one["nats"][name] == two["nats"][name]).all(), name
        for key in ("val_loss", "val_bpb"):
            assert one["scores"][name][key] == pytest.approx(two["scores"][name][key], rel=1e-6)
        assert [s["scores"][name]["tokens"] for s in (one, two, other)] == [699] * 3
    assert one["scores"]["ttt"]["val_loss"] != one["scores"]["sliding"]["val_loss"]


def test_a_batch_that_does_not_divide_is_refused(tiny):
    """With the knobs to change; sizes that divide give whole micro-batches."""
    assert [tg.accumulation(tiny, tg.World(0, size)) for size in (1, 2, 4)] == [4, 2, 1]
    for size in (3, 8):
        with pytest.raises(tg.Refusal) as refusal:
            tg.accumulation(tiny, tg.World(0, size))
        assert str(refusal.value) == (f"TRAIN_BATCH_TOKENS=256 is no multiple of {size} ranks x MICRO_BATCH_TOKENS=64: "
                                      "change either, or the number of processes")
    assert tg.accumulation(tg.Hyperparameters(), tg.World(0, 8)) == 1


def test_torchrun_refuses_too(tmp_path):
    """The same sentence from the real launcher, on every rank, before any data is touched."""
    knobs = {name.upper(): value for name, value in dict(TINY, train_batch_tokens=64).items()}
    done = run_script(dict(knobs, RUN_ID="r", RECIPE="record"), cwd=tmp_path, processes=2)
    assert done.returncode != 0
    for rank in (0, 1):
        assert (f"train_gpt.py: error (rank {rank}, node 0 = {platform.node()}): TRAIN_BATCH_TOKENS=64 is no multiple of 2 ranks x "
                "MICRO_BATCH_TOKENS=64: change either, or the number of processes") in done.stderr
    assert "step:" not in done.stdout and not (tmp_path / "logs" / "r" / "model.bin").exists()


@pytest.mark.parametrize("env, words", [
    (dict(WORLD_SIZE="two"), "WORLD_SIZE=two: this group.*torchrun.*'two'"), (dict(WORLD_SIZE="0"), "WORLD_SIZE=0: .*must hold"),
    (dict(WORLD_SIZE="-2"), "WORLD_SIZE=-2: .*must hold"), (dict(RANK="1"), "RANK=1: .*must hold"),
    (dict(RANK="2", WORLD_SIZE="2"), "RANK=2 WORLD_SIZE=2: .*0 <= RANK < WORLD_SIZE"), (dict(RANK="", WORLD_SIZE="2"), "RANK= WORLD_SIZE=2: "),
    (dict(RANK="0.5", WORLD_SIZE="2"), "RANK=0.5 "), (dict(LOCAL_RANK="-1"), "LOCAL_RANK=-1: .*0 <= LOCAL_RANK"),
    (dict(WORLD_SIZE="2", RANK="0"), "cannot be joined.*torchrun .*MASTER_ADDR"),
    (dict(SLURM_NTASKS="8", SLURM_PROCID="3"), "SLURM_NTASKS=8 without RANK: .*torchrun.*WORLD_SIZE=1"),
    (dict(OMPI_COMM_WORLD_SIZE="2"), "OMPI_COMM_WORLD_SIZE=2"), (dict(PMI_SIZE="2"), "PMI_SIZE=2")])
def test_a_world_that_cannot_be_joined_is_refused(env, words, monkeypatch):
    """Ranks that make no sense, or several of them without a launcher."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(tg.Refusal, match=words) as refusal:
        tg.World.from_env(env)
    assert "\n" not in str(refusal.value)


def test_one_process_of_a_scheduler_is_alone():
    """One task, or a user who says so."""
    for env in (dict(SLURM_NTASKS="1"), dict(SLURM_NTASKS="8", WORLD_SIZE="1"), dict(PMI_SIZE="", OMPI_COMM_WORLD_SIZE="1")):
        assert tg.World.from_env(env).size == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_nobody_joins_end_in_bounded_time(rank, monkeypatch, capfd):
    """In one sentence that names the place; how long it may take was said before, once a machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tg, "JOIN_S", 1)
    place = f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK={rank} MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
    with pytest.raises(tg.Refusal, match=f"{place}: this group of ranks cannot be joined"):
        tg.World.from_env(env)
    assert (f"ranks: {place} waits for the others, at most 1 s" in capfd.readouterr().err) == (rank == 0)


def test_collectives_wait_for_a_day(monkeypatch):
    """One rank may work alone for hours; the store, which NCCL asks at its first collective, waits as long."""
    store, asked = tg.dist.HashStore(), {}
    monkeypatch.setattr(tg.dist, "rendezvous", lambda *_, timeout: asked.update(join=timeout) or iter([(store, 0, 2)]))
    monkeypatch.setattr(tg.dist, "init_process_group", lambda *_, **options: asked.update(options))
    monkeypatch.setattr(tg, "Watch", lambda *_: "watch")
    world = tg.World.from_env(dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1", TORCHELASTIC_RESTART_COUNT="3"))
    assert world.watch == "watch" and asked["join"] == timedelta(seconds=tg.JOIN_S)
    assert asked["timeout"] == store.timeout == timedelta(days=1)
    asked["store"].set("key", "")
    assert store.check(["3/key"]), "a group that is started again finds no keys of the one before"


def test_strangers_do_not_join(monkeypatch):
    """Scanners of ports that say nothing or rubbish, hang up, or guess a rank, while the ranks call."""
    store, watches = tg.dist.HashStore(), {}
    threads = [threading.Thread(target=lambda rank=rank: watches.update({rank: tg.Watch(rank, 3, store, "localhost")}))
               for rank in range(3)]
    begin_s = time.monotonic()
    threads[0].start()
    port, token = store.get("watch").decode().split()
    lines = [socket.create_connection(("127.0.0.1", int(port))) for _ in range(4)]
    for line, words in zip(lines, (b"", b"GET / HTTP/1.0\r\n\r\n", f"{'0' * 32}{1:8}".encode(), f"{token}{7:8}".encode())):
        line.sendall(words)
    lines.pop().close()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(watches) == [0, 1, 2] and time.monotonic() - begin_s < 10
    assert sorted(watches[0].lines.values()) == [1, 2] and [*watches[1].lines.values()] == [0]
    assert all(line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for watch in watches.values() for line in watch.lines)
    for watch in watches.values():
        watch.left = True    # else a thread would end this process
    for rank in (1, 2, 0):
        watches[rank].tell("left")
    assert not any(watch.lost for watch in watches.values())
    for line in lines:
        line.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(port)))


def test_a_rank_that_does_not_call_is_named(monkeypatch):
    """By rank 0, when the time is over."""
    monkeypatch.setattr(tg, "JOIN_S", 0.5)
    with pytest.raises(TimeoutError, match=re.escape("ranks [1, 2] did not call rank 0")):
        tg.Watch(0, 3, tg.dist.HashStore(), "localhost")


def lose_a_rank(world: tg.World, folder: Path) -> None:
    """Rank 1 dies; rank 0 saves what the next collective raises."""
    world.wait()
    if world.rank:
        os._exit(0)
    try:
        world.wait()
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")


def test_a_lost_rank_is_refused(tmp_path):
    """The others stop with one sentence instead of waiting for it or printing a traceback."""
    on_ranks(2, lose_a_rank, tmp_path)
    assert (tmp_path / "error.txt").read_text().startswith("Refusal: another rank was lost: [1] (")


# ------------------------------------------------------------------------------------------------------------- files
def test_writes_are_atomic(tmp_path, monkeypatch):
    """The new content or the old one; a full disk is a refusal that leaves no fragment."""
    path = tmp_path / "a.bin"
    tg.write_atomically(path, b"one", b"two")
    assert path.read_bytes() == b"onetwo"

    def full(descriptor: int) -> None:
        """Stands for a disk without space."""
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg.os, "fsync", full)
    with pytest.raises(tg.Refusal, match=r"a.bin: 1,000 bytes could not be written \(No space left on device\)"):
        tg.write_atomically(path, b"x" * 1000)
    assert path.read_bytes() == b"onetwo" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_log(tmp_path, capsys):
    """Rank 0 prints and keeps each line; other ranks and quiet logs say nothing; a folder has one owner at a time, and none
    once its run is finished."""
    folder = tmp_path / "logs" / "r"
    log = tg.Log(tg.World(), folder)
    log("one")
    log.progress("two")
    tg.Log(tg.World(1, 2), folder)("from rank 1")
    tg.Log(tg.World(), None, quiet=True)("quiet")
    tg.Log(tg.World(), None)("no file")
    assert capsys.readouterr().out == "one\ntwo\nno file\n"
    assert (folder / "log.txt").read_text() == "one\ntwo\n"
    with pytest.raises(tg.Refusal, match=re.escape(f"RUN_ID=r: another process is at work in {folder}")):
        tg.Log(tg.World(), folder)
    log.lock.close()
    tg.Log(tg.World(), folder)("three")
    (folder / "result.json").touch()
    with pytest.raises(tg.Refusal, match=re.escape(f"RUN_ID=r was used before: {folder} exists")):
        tg.Log(tg.World(), folder)
    assert (folder / "log.txt").read_text() == "one\ntwo\nthree\n"
    (tmp_path / "file").touch()
    with pytest.raises(tg.Refusal, match="LOGS_DIR=.*file is not writable"):
        tg.Log(tg.World(), tmp_path / "file" / "r")


def test_progress_updates_one_line_on_a_terminal(capsys, monkeypatch):
    """A shorter line covers a longer one, and the next ordinary line starts clean."""
    monkeypatch.setattr(tg.sys.stdout, "isatty", lambda: True, raising=False)
    log = tg.Log(tg.World(), None)
    log.progress("longer line")
    log.progress("short")
    log("done")
    assert capsys.readouterr().out == "\rlonger line\rshort      \r           \rdone\n"


def failing(number: int):
    """A system call that always fails with this error."""
    def call(*_):
        """Raises."""
        raise OSError(number, tg.os.strerror(number))
    return call


@pytest.mark.parametrize("name", ["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks(name, tmp_path, monkeypatch, capsys):
    """The run goes on, and says that nothing keeps a second one of its name away."""
    monkeypatch.setattr(tg.fcntl, "flock", failing(getattr(tg.errno, name)))
    tg.Log(tg.World(), tmp_path / "r")("one")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lock: none") and "RUN_ID=r" in lines[0] and lines[1] == "one"


def test_a_file_system_without_fsync(tmp_path, monkeypatch):
    """EINVAL means that there is nothing to wait for; a disk that fails is still refused."""
    monkeypatch.setattr(tg.os, "fsync", failing(tg.errno.EINVAL))
    tg.write_atomically(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    monkeypatch.setattr(tg.os, "fsync", failing(tg.errno.EIO))
    with pytest.raises(tg.Refusal):
        tg.write_atomically(tmp_path / "a", b"y")


def test_a_log_without_output(monkeypatch, tmp_path):
    """sys.stdout may be None; what cannot be encoded is escaped in the file."""
    monkeypatch.setattr(tg.sys, "stdout", None)
    log = tg.Log(tg.World(), tmp_path / "r")
    log("one \udcff")
    log.progress("two")
    assert (tmp_path / "r" / "log.txt").read_bytes() == b"one \\udcff\ntwo\n"


def test_a_long_silence_is_broken(monkeypatch, capsys):
    """With what is under way and its age, again and again, until the block ends."""
    monkeypatch.setattr(tg, "SILENCE_S", 0.05)
    log = tg.Log(tg.World())
    with log.awake():
        log("one")
        log.begin("quantise")
        tg.time.sleep(0.5)
    said = capsys.readouterr().out.splitlines()
    assert len(said) > 2 and all(re.fullmatch(r"busy:\d+s since quantise", line) for line in said[1:])


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_due(terminal, monkeypatch):
    """Often on a terminal, rarely in a file, never on a quiet log."""
    monkeypatch.setattr(tg, "on_terminal", lambda: terminal)
    log, now = tg.Log(tg.World()), tg.time.monotonic()
    monkeypatch.setattr(tg.time, "monotonic", lambda: now + 1)
    assert log.due() == terminal
    monkeypatch.setattr(tg.time, "monotonic", lambda: now + 30)
    assert log.due() and not tg.Log(tg.World(), quiet=True).due()
