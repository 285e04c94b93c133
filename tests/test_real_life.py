"""What happens to processes outside of a test bench: output that goes away, signals, several starts at once, dead ranks.
Runs are forked from this process, so that each takes a second; two real ones show what an interpreter says at its exit."""
from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import REPO, TINY, clean_env, ended, forked, write_dataset
from conftest import tg as t

# what only computes is left out: it has tests of its own
KNOBS = {n.upper(): v for n, v in TINY.items()} | dict(RECIPE="record", SCORES="quantized", ITERATIONS=6, REHEARSAL_STEPS=0,
                                                       TRELLIS_STATES=0, ROUNDING_STEPS=0)
ENDLESS = dict(ITERATIONS=1_000_000, RUN_ID="r")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of tiny shards."""
    return write_dataset(tmp_path_factory.mktemp("real") / "data", t.Hyperparameters(**TINY))


def run(home: Path, data: Path, out: int | None = None, before=lambda: None, encoding="utf-8", **knobs) -> int:
    """The id of a process that does a run with logs in `home`; it writes to the descriptor `out` and to the file
    home/errors. None: its output is closed, as by `>&-`."""
    def work() -> int:
        """The life of that process."""
        os.dup2(os.open(home / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)
        if out is None:
            os.close(1)
            sys.stdout = sys.__stdout__ = None
        else:
            os.dup2(out, 1)
            sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, closefd=False)
        t.pack_source = lambda *_: b"# packed\n"    # takes longer than the whole run
        before()
        return t.main([], clean_env(**KNOBS | dict(DATA_PATH=data, LOGS_DIR=home / "logs") | knobs))

    return forked(work)


def wait_for(path: Path, text: str, limit_s: float = 60) -> None:
    """Returns once the file has the text."""
    end_s = time.monotonic() + limit_s
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end_s, f"{path} has no {text}"
        time.sleep(0.02)


def broken_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def lost_terminal() -> int:
    """A terminal whose other side is closed."""
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


def stuffed_pipe() -> int:
    """A pipe that does not block and takes nothing more; its reader sleeps."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    return writer


@pytest.mark.parametrize("lose", [broken_pipe, lost_terminal, stuffed_pipe, lambda: os.open("/dev/full", os.O_WRONLY), lambda: None],
                         ids=["pipe", "terminal", "stuffed", "full", "closed"])
def test_a_run_outlives_its_output(lose, data, tmp_path):
    """log.txt is where the truth is, and the exit status says how the run ended."""
    out = lose()
    assert ended(run(tmp_path, data, out, RUN_ID="r")) == 0
    result = json.loads((tmp_path / "logs" / "r" / "result.json").read_text())
    assert (tmp_path / "logs" / "r" / "log.txt").read_text().endswith("RESULT " + json.dumps(result) + "\n")
    assert (tmp_path / "errors").read_text() == ""


@pytest.mark.parametrize("redirection", ["| head -1", ">/dev/full", ">&-"])
def test_the_interpreter_says_nothing_at_exit(redirection, tmp_path):
    """No complaint about what could not be flushed, no status of its own."""
    command = f"'{sys.executable}' '{REPO / 'train_gpt.py'}' --help {redirection}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=clean_env(), capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "0"


def test_unprintable_names(data, tmp_path):
    """Characters that the output has not are escaped there; log.txt is UTF-8."""
    reader, writer = os.pipe()
    child = run(tmp_path, data, writer, encoding="ascii", RUN_ID="прогон")
    os.close(writer)
    with open(reader, "rb") as file:
        printed = file.read().decode("ascii")
    assert ended(child) == 0 and r"run:\u043f\u0440\u043e\u0433\u043e\u043d recipe" in printed
    assert "run:прогон recipe" in (tmp_path / "logs" / "прогон" / "log.txt").read_text("utf-8")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_in_training_save(number, data, tmp_path):
    """Also with a terminal that is gone, or a `tee` that died first."""
    child = run(tmp_path, data, broken_pipe(), **ENDLESS)
    wait_for(tmp_path / "logs" / "r" / "log.txt", "step:3/")
    os.kill(child, number)
    assert ended(child) == 2 and t.checkpoints(tmp_path / "logs" / "r")
    said = (tmp_path / "errors").read_text()
    assert "stopped by a signal at step" in said and said.count("\n") == 1


def test_signals_elsewhere_end_the_run(data, tmp_path):
    """Where no checkpoint can be: one sentence, no traceback; a second signal changes nothing."""
    child = run(tmp_path, data, broken_pipe(), CHECKPOINT_EVERY_S=0, **ENDLESS)
    wait_for(tmp_path / "logs" / "r" / "log.txt", "step:3/")
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGINT)
    assert ended(child) == 2
    said = (tmp_path / "errors").read_text()
    assert "stopped by a signal (SIG" in said and said.count("\n") == 1


def test_nohup(data, tmp_path):
    """A hangup that was ignored stays ignored; the run ends in its own time."""
    child = run(tmp_path, data, broken_pipe(), lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), RUN_ID="r",
                ITERATIONS=40)
    wait_for(tmp_path / "logs" / "r" / "log.txt", "step:3/")
    os.kill(child, signal.SIGHUP)
    assert ended(child) == 0


def test_three_starts_in_one_second(data, tmp_path):
    """Three runs in three folders."""
    def same_second() -> None:
        """The clock stands still for all of them."""
        t.time.strftime = lambda _: "20260101-000000"

    children = [run(tmp_path, data, broken_pipe(), same_second) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0], (tmp_path / "errors").read_text()
    name = "20260101-000000-record-seed1337"
    assert sorted(path.parent.name for path in tmp_path.glob("logs/*/result.json")) == [name, f"{name}-2", f"{name}-3"]


def test_a_place_that_nobody_thought_of(data, tmp_path, monkeypatch):
    """No home folder, blanks and letters of other scripts in the paths."""
    home = tmp_path / "мой дом 1"
    home.mkdir()
    assert ended(run(home, data.rename(data.with_name("ein Ordner")), broken_pipe(), RUN_ID="r", HOME="/nowhere")) == 0
    assert (home / "logs" / "r" / "result.json").exists()
    data.with_name("ein Ordner").rename(data)


# ------------------------------------------------------------------------------------------------------------- ranks
def ranked(rank: int, size: int, port: int) -> None:
    """Makes this process one of a group that is about to start; five seconds become half of one."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sleep = time.sleep
    t.time.sleep = lambda s: sleep(min(s, 0.5))


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(home: Path, size: int, work) -> list[int]:
    """Ids of the processes of a group; each does `work(world)` and writes its errors to home/errors<rank>."""
    def life(rank: int) -> int:
        """What one of them does."""
        os.dup2(os.open(home / f"errors{rank}", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False)
        ranked(rank, size, port)
        try:
            world = t.World.from_env(os.environ)
            world.wait()
            (home / f"here{rank}").write_text("here")
            return work(world) or 0
        except t.Refusal as error:
            return t.complain(error)

    port = free_port()
    return [forked(lambda rank=rank: life(rank)) for rank in range(size)]


def work_alone(seconds: float) -> None:
    """Computes without a collective that could fail."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        sum(range(1000))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_dead_rank_is_named_to_all(victim, tmp_path):
    """While everybody is busy with work of their own, rank 0 as well, and no collective could notice."""
    children = ranks(tmp_path, 3, lambda _: work_alone(60))
    for rank in range(3):
        wait_for(tmp_path / f"here{rank}", "here")
    begin_s = time.monotonic()
    os.kill(children[victim], signal.SIGKILL)
    assert [ended(child) for child in children] == [-9 if rank == victim else 2 for rank in range(3)]
    assert time.monotonic() - begin_s < 8
    for rank in {0, 1, 2} - {victim}:
        said = (tmp_path / f"errors{rank}").read_text()
        assert f"train_gpt.py: error (rank {rank}, node 0 = " in said and said.count("error") == 1
        assert said.endswith(f"another rank was lost: [{victim}]; see its own messages\n")


def test_a_rank_that_is_refused_is_named_to_all(tmp_path):
    """It says why; the others, in a collective or alone, say who. Nobody names those who end because of it."""
    def work(world: t.World) -> None:
        """Rank 1 finds something wrong, rank 2 waits for it, rank 0 is busy."""
        t.require(world.rank != 1, "KNOB=1 is wrong here")
        world.wait() if world.rank else work_alone(60)

    assert [ended(child) for child in ranks(tmp_path, 3, work)] == [2, 2, 2]
    for rank, words in enumerate(("another rank was lost: [1]; see", "KNOB=1 is wrong here", "another rank was lost: [1] (")):
        said = (tmp_path / f"errors{rank}").read_text()
        assert words in said and said.count("train_gpt.py: error") == 1, said


def test_a_busy_rank_is_not_dead(tmp_path):
    """One rank holds Python's lock; the others wait for it in a collective and then leave in peace, one by one."""
    def work(world: t.World) -> None:
        """Rank 0 keeps its threads from running; who is first out is no loss to the rest."""
        if world.main:
            sys.setswitchinterval(100)
            sum(range(10_000_000))
            sys.setswitchinterval(0.005)
        world.share(1)
        if world.rank == 1:
            work_alone(2)
        world.leave()

    assert [ended(child) for child in ranks(tmp_path, 3, work)] == [0, 0, 0]
    assert "lost" not in "".join((tmp_path / f"errors{rank}").read_text() for rank in range(3))


def test_a_stop_with_a_checkpoint_is_no_death(data, tmp_path):
    """One rank is asked, all stop in the same step; one of them needs longer for it than the others wait for the dead."""
    port = free_port()

    def before(rank: int) -> None:
        """Makes the end of rank 0 a slow one."""
        ranked(rank, 2, port)
        if rank == 0:
            t.restore_signals = lambda _: work_alone(1.5)

    group = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, REHEARSAL_STEPS=0)
    children = [run(tmp_path, data, broken_pipe(), lambda rank=rank: before(rank), RANK=rank, LOCAL_RANK=rank, **ENDLESS | group)
                for rank in range(2)]
    wait_for(tmp_path / "logs" / "r" / "log.txt", "step:3/")
    os.kill(children[1], signal.SIGTERM)
    assert [ended(child) for child in children] == [2, 2] and t.checkpoints(tmp_path / "logs" / "r")
    said = (tmp_path / "errors").read_text()
    assert said.count("stopped by a signal at step") == 2 and "lost" not in said, said


@pytest.mark.parametrize("place", [dict(PATH="/nowhere"), dict(PATH=os.environ["PATH"], CXX="/bin/false", TMPDIR="/proc/none")],
                         ids=["bare", "broken"])
def test_a_machine_that_lacks_all_but_python(place, data, tmp_path):
    """No home, no user, no compiler or a broken one, a checkout that nobody may write to, under an odd name."""
    checkout = tmp_path / "мой код 1"
    checkout.mkdir()
    script = checkout / "train_gpt.py"
    script.write_bytes((REPO / "train_gpt.py").read_bytes())
    checkout.chmod(0o555)
    knobs = {n: str(int(v) if isinstance(v, bool) else v) for n, v in KNOBS.items()}
    (tmp_path / "lacks").mkdir()    # nor the minifier, which takes as long as the rest of the run
    (tmp_path / "lacks" / "python_minifier.py").write_text("raise ImportError")
    knobs |= dict(COMPILE="auto", DATA_PATH=str(data), LOGS_DIR=str(tmp_path / "logs"), RUN_ID="r", OMP_NUM_THREADS="1",
                  CUDA_VISIBLE_DEVICES="", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(tmp_path / "lacks"))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=knobs | place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compile:off (" in done.stdout and (tmp_path / "logs/r/result.json").exists()
    assert list(checkout.iterdir()) == [script]


def test_a_current_folder_that_was_deleted(tmp_path):
    """Told before torch ends the process with a riddle."""
    (tmp_path / "gone").mkdir()
    command = f"rmdir ../gone; '{sys.executable}' '{REPO / 'train_gpt.py'}'"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path / "gone", env=clean_env(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train_gpt.py: error: the current folder was deleted, go to another one\n"


def test_a_signal_inside_a_library_is_no_fault_of_the_input():
    """SentencePiece, whose text comes from a generator of ours, wraps what a signal handler raises there."""
    with pytest.raises(KeyboardInterrupt, match=r"^stopped by a signal \(SIGTERM\); none$"), t.refusing("no tokenizer", RuntimeError):
        raise RuntimeError("INTERNAL: KeyboardInterrupt: stopped by a signal (SIGTERM); none\n\nAt:\n  train_gpt.py(774)")



@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")], ids=["missing", "full"])
def test_no_place_for_temporary_files(error, tmp_path, monkeypatch, capsys):
    """A sentence, and nothing left behind."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=f"{n} words")) + "\n" for n in range(99)))
    monkeypatch.setattr(t.tempfile, "tempdir", "/proc/none")
    if error:
        def full(*_) -> None:
            """The disk has no room."""
            raise error

        monkeypatch.setattr(t.tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(t.Path, "write_text", full)
    assert t.main(["data", str(tmp_path / "a.jsonl"), "--vocab", "280", "--out", str(tmp_path / "out")], {}) == 2
    said = capsys.readouterr().err
    assert said.startswith("train_gpt.py: error: ") and said.count("\n") == 1 and (str(error) if error else "/proc/none") in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
