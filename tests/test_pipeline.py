"""The command from end to end on a quarter of the embedded corpus, what it leaves behind, and how it says no."""
from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY, clean_env, ended, run_forked, run_script, start_forked, write_dataset
from support import settings, t

SMALL = dict(VOCAB_SIZE=512,
             NUM_LAYERS=2,
             MODEL_DIM=32,
             NUM_HEADS=2,
             NUM_KV_HEADS=1,
             MLP_MULT=2,
             ROPE_DIMS=8,
             XSA_LAST_N=1,
             LOOP_START=0,
             LOOP_END=0,
             PARALLEL_START_LAYER=1,
             TRAIN_SEQ_LEN=64,
             MICRO_BATCH_TOKENS=2048,
             TRAIN_BATCH_TOKENS=4096,
             ITERATIONS=20,
             MAX_WALLCLOCK_SECONDS=0,
             VAL_LOSS_EVERY=10,
             TRAIN_LOG_EVERY=10,
             EVAL_SEQ_LEN=128,
             EVAL_STRIDE=96,
             EVAL_BATCH_TOKENS=16384,
             TTT_CHUNK_TOKENS=16384,
             TTT_EPOCHS=1,
             TTT_LEARNERS=1,
             TTT_STREAM_CHUNK=96,
             GPTQ_CALIBRATION_BATCHES=2, ROUNDING_STEPS=1,
             COMPILE="off",
             PRECISION="fp32",
             EMA_DECAY=0.8)
FILES = ["log.txt", "model.bin", "result.json", "train_gpt.py"]
RESULT_KEYS = [
    "run_id", "seed", "recipe", "changed_knobs", "knobs", "device", "world_size", "torch", "params",
    "steps", "train_seconds", "train_tokens", "tokens_per_second", "bytes", "scores", "seconds",
    "compliant", "violations"
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str, dict]:
    """(folder of the run, its standard output, result.json) of one run of the command."""
    cwd, documents = tmp_path_factory.mktemp("pipeline"), t.embedded_documents()
    with pytest.MonkeyPatch.context() as patch:    # every document is scored ten times in this file
        patch.setattr(t, "embedded_documents", lambda: documents[::4])
        done = run_forked(SMALL | dict(RUN_ID="one", DATA_DIR=cwd / "data"), cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = cwd / "logs" / "one"
    return folder, done.stdout, json.loads((folder / "result.json").read_text())


def left(folder: Path, scores: str) -> list[str]:
    """The files that a run with these scores leaves."""
    return sorted([*FILES, *(f"documents_{name}.txt" for name in scores.split(","))])


def test_a_run_leaves_its_files_and_no_others(finished):
    """log.txt, result.json, the artifact, the packed code and the nats of each document; beside the
    data cache nothing else is written."""
    folder = finished[0]
    assert sorted(p.name for p in folder.iterdir()) == left(folder, "prequant,quantized,sliding,ttt")
    assert sorted(p.name for p in folder.parents[1].iterdir()) == ["data", "logs"]
    assert [p.name for p in (folder.parents[1] / "data").iterdir()] == ["cache"]


def test_the_log_is_what_was_printed(finished):
    """Line by line, choices made for the user before the folder existed included."""
    folder, printed, _ = finished
    log = (folder / "log.txt").read_text()
    assert printed == log
    assert "RECIPE=demo is used" in log and "CORPUS=embedded is used" in log


def test_the_result_has_the_agreed_shape(finished):
    """Every key of the contract in its order, numbers that belong together, and the last line is
    the same object."""
    folder, printed, result = finished
    assert [key for key in result if key != "peak_memory_bytes"] == RESULT_KEYS
    assert printed.splitlines()[-1] == "RESULT " + json.dumps(result)
    assert list(result["bytes"]) == ["model", "code", "total", "limit"]
    assert result["bytes"]["model"] == (folder / "model.bin").stat().st_size
    assert result["bytes"]["code"] == (folder / "train_gpt.py").stat().st_size
    assert result["bytes"]["total"] == result["bytes"]["model"] + result["bytes"]["code"] <= result[
        "bytes"]["limit"]
    assert list(result["scores"]) == ["prequant", "quantized", "sliding", "ttt"]
    for row in result["scores"].values():
        assert list(row) == ["val_loss", "val_bpb", "tokens", "bytes", "seconds"]
        assert row["val_bpb"] == pytest.approx(row["val_loss"] * row["tokens"] / row["bytes"] /
                                               0.6931471805599453)
    assert len({(row["tokens"], row["bytes"]) for row in result["scores"].values()}) == 1
    assert {"data", "rehearsal", "train", "calibration", "quantise", "pack",
            "total"} <= set(result["seconds"])
    assert set(result["knobs"]) == {f.name for f in dataclasses.fields(t.Hyperparameters)}
    assert result["knobs"]["num_layers"] == 2 == result["changed_knobs"]["num_layers"]
    assert result["steps"] == 20 and result["train_tokens"] == 20 * 4096 and result[
        "run_id"] == "one"
    assert result["compliant"] is True and result["violations"] == [] and result["world_size"] == 1


def test_the_scores_make_sense(finished):
    """Better than guessing, sliding no worse than plain, quantisation cheap; every validation
    target counted."""
    scores = finished[2]["scores"]
    assert scores["prequant"]["val_loss"] < 6.0 < 6.24  # ln 512 is 6.24
    assert scores["sliding"]["val_loss"] <= scores["quantized"]["val_loss"]
    assert scores["ttt"]["val_loss"] <= scores["sliding"]["val_loss"]
    assert abs(scores["quantized"]["val_bpb"] - scores["prequant"]["val_bpb"]) < 0.05
    targets = re.search(r"val_targets:(\d+) val_bytes:(\d+)", finished[1])
    assert scores["ttt"]["tokens"] == int(targets[1]) and scores["ttt"]["bytes"] == int(targets[2])


@pytest.mark.parametrize(
    "pattern, least",
    [(r"step:\d+/\d+ train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms.*", 3),
     (r"step:\d+/\d+ val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
      2), (r"Serialized model.*: \d+ bytes", 1), (r"Code size: \d+ bytes.*", 1),
     (r"Total submission size \w+: \d+ bytes", 1),
     (r"final_(prequant|quantized|sliding|ttt)_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}.*", 4),
     (r"recurrence:on step:7 .*", 1)])
def test_lines_keep_the_official_forms(finished, pattern, least):
    """What the leaderboard's tools read from a log."""
    lines = [line for line in finished[1].splitlines() if re.fullmatch(pattern, line)]
    assert len(lines) >= least


def test_no_line_of_the_log_comes_twice(finished):
    """The last training line is not repeated after the loop."""
    lines = [line for line in finished[1].splitlines() if line.startswith("step:")]
    assert len({line.split(" train_time")[0] for line in lines}) == len(lines)


def test_the_loss_fell(finished):
    """The last training loss is below the first."""
    losses = [float(x) for x in re.findall(r"train_loss:([\d.]+)", finished[1])]
    assert losses[-1] < losses[0] - 0.1


def exact(output: str) -> dict[str, str]:
    """Score name -> its val_loss and val_bpb with eight digits, as printed."""
    return {
        m[1]: m[2]
        for m in re.finditer(r"final_(\w+)_exact (val_loss:\S+ val_bpb:\S+)", output)
    }


@pytest.mark.parametrize("script, names", [("readable", "quantized,sliding,ttt"),
                                           ("packed", "sliding,ttt")])
def test_eval_reproduces_the_scores(finished, script, names):
    """A new process scores the artifact to the same eight digits, run by the readable or the packed
    script."""
    folder, printed, _ = finished
    knobs = dict(DATA_DIR=folder.parents[1] / "data", SCORES=names)
    done = (run_forked(knobs, "eval", "model.bin", cwd=folder) if script == "readable" else subprocess.run(
        [sys.executable, "train_gpt.py", "eval", "model.bin"], cwd=folder, env=clean_env(**knobs), text=True, capture_output=True))
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = {name: exact(printed)[name] for name in names.split(",")}
    assert exact(done.stdout) == wanted
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT ") and set(json.loads(last[7:])["scores"]) == set(wanted)
    assert sorted(p.name for p in folder.iterdir()) == left(folder, "prequant,quantized,sliding,ttt")


def refused(capsys, arguments: list, env: dict[str, str]) -> str:
    """The one sentence on standard error of a command that ends with status 2."""
    assert t.main([str(a) for a in arguments], env) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_gpt.py: error: ")
    return lines[0]


def test_a_run_id_is_never_used_twice(finished, capsys):
    """The old run stays as it is."""
    folder = finished[0]
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    env = clean_env(**SMALL,
                    RUN_ID="one",
                    LOGS_DIR=folder.parent,
                    DATA_DIR=folder.parents[1] / "data")
    assert "RUN_ID=one was used before" in refused(capsys, [], env)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_status_and_sentence_of_a_bad_knob(tmp_path):
    """Status 2, one line, no traceback, no folder: the process itself, as a shell sees it."""
    done = run_script(dict(NUM_LAYERS="many"), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
    assert done.stderr.count(
        "\n") == 1 and "NUM_LAYERS='many' must be a whole number" in done.stderr


@pytest.mark.parametrize("knobs, words",
                         [(dict(NUM_LAYRES=3), "NUM_LAYRES is no knob; did you mean NUM_LAYERS"),
                          (dict(MATRIX_LR=-1), "MATRIX_LR=-1.0 is out of range"),
                          (dict(MATRIX_LR="nan"), "MATRIX_LR=nan"),
                          (dict(RECIPE="demmo"), "no recipe 'demmo'; did you mean 'demo'"),
                          (dict(NUM_HEADS=7), "MODEL_DIM=128 must be a multiple of NUM_HEADS=7"),
                          (dict(MLP_MULT=1e308), "MLP_MULT"),
                          (dict(MODEL_DIM=10**400), "MODEL_DIM"),
                          (dict(COMPRESSOR="zip"), "COMPRESSOR='zip'"),
                          (dict(DATA_PATH="/nowhere/shards"), "DATA_PATH=/nowhere/shards")])
def test_bad_knobs_are_refused(knobs, words, tmp_path, capsys):
    """One sentence that names variable, value and what was expected."""
    assert words in refused(capsys, [],
                            clean_env(LOGS_DIR=tmp_path / "logs", DATA_DIR=tmp_path, **knobs))


@pytest.mark.parametrize("arguments, words",
                         [(["evil"], "unknown verb 'evil'; did you mean 'eval'"),
                          (["train"], "unknown verb 'train'"), (["", "a"], "unknown verb ''"), (["eval"], "eval needs one"),
                          (["eval", "no/such/file"], "eval needs one"),
                          (["eval", "a", "b"], "eval needs one")])
def test_wrong_commands_are_refused(arguments, words, capsys):
    """Verbs that do not exist, and `eval` without its artifact."""
    assert words in refused(capsys, arguments, clean_env())


def test_an_empty_word_is_no_verb(monkeypatch):
    """A variable of a shell that is not set, in quotes, is nothing, as it would be without them."""
    started = []
    monkeypatch.setattr(t, "start", lambda *_: started.append(1))
    assert t.main([""], clean_env()) == 0 and started == [1]


def upper(knobs: dict) -> dict:
    """Knobs as environment variables."""
    return {name.upper(): value for name, value in knobs.items()}


@pytest.fixture
def quick(monkeypatch):
    """Runs without the seconds of packing the script."""
    monkeypatch.setattr(t, "pack_source", lambda *_: b"# packed\n")


def test_over_the_budget_everything_is_saved_and_the_status_says_so(quick, tmp_path, capsys):
    """BUDGET_BYTES too small: the run is complete, marked, and refused at its end."""
    data = write_dataset(tmp_path / "shards", settings())
    env = clean_env(**upper(TINY),
                    RUN_ID="fat",
                    LOGS_DIR=tmp_path / "logs",
                    DATA_PATH=data,
                    BUDGET_BYTES=1000)
    sentence, folder = refused(capsys, [], env), tmp_path / "logs" / "fat"
    result = json.loads((folder / "result.json").read_text())
    assert "BUDGET_BYTES=1000" in sentence and str(result["bytes"]["total"]) in sentence
    assert "smallest possible size" in sentence
    assert result["compliant"] is False and "over BUDGET_BYTES=1000" in result["violations"][0]
    assert sorted(p.name for p in folder.iterdir()) == left(folder, "prequant,quantized,sliding,ttt")
    assert list(t.unpack((folder / "model.bin").read_bytes())[1]) == list(t.roles(settings()))
    assert (folder / "log.txt").read_text().splitlines()[-1] == "RESULT " + json.dumps(result)


def checked(tmp_path, world=t.World(), **changes) -> list[str]:
    """What preflight says of the tiny model with shards in tmp_path: lines of the log, then the
    parts of its refusal."""
    data = tmp_path / "shards"
    h = settings(**dict(logs_dir=str(tmp_path / "logs"), data_path=str(data)) | changes)
    if not data.exists():
        write_dataset(data, settings())
    lines = []
    try:
        assert t.preflight(h, world, lines.append).val.bytes.sum()
    except t.Refusal as error:
        return lines + str(error).split("; ")
    return lines


def test_a_sound_machine_is_not_complained_about(tmp_path):
    """Nothing is said and nothing is written."""
    assert checked(tmp_path) == [] and not (tmp_path / "logs").exists()


def lacking(patch, tmp_path) -> dict[str, tuple[dict, str]]:
    """What can be missing -> (knobs, the one sentence it deserves), with the machine made so."""
    disk, coders = shutil.disk_usage, t.coders
    small = lambda folder: disk(folder)._replace(free=5)
    few = lambda: {name: coder for name, coder in coders().items() if name != "brotli"}
    return {
        "brotli": (dict(compressor="brotli"), lambda: patch.setattr(t, "coders", few), "pip install brotli"),
        "disk": ({}, lambda: patch.setattr(t.shutil, "disk_usage", small), "5 bytes are free"),
        "shards": (dict(data_path="/nowhere"), lambda: None, "DATA_PATH=/nowhere: no file fineweb_train"),
        "ranks": (dict(train_batch_tokens=64 * 3), lambda: None, "TRAIN_BATCH_TOKENS=192"),
        "script": ({}, lambda: patch.setattr(t, "SCRIPT", "<stdin>"), "<stdin>: the bytes of this script count"),
        "logs": ({}, lambda: patch.setattr(t.os, "access", lambda *_: False), "is no folder that can be written"),
        "tokenizer": (dict(tokenizer_path="/no.model"), lambda: [
            p.unlink() for p in (tmp_path / "shards").glob("fineweb_val_bytes*")], "tokenizer /no.model"),
    }


@pytest.mark.parametrize("names", [["brotli"], ["disk"], ["shards"], ["ranks"], ["logs"], ["tokenizer"], ["script"],
                                   ["brotli", "disk", "shards", "ranks", "logs"]])
def test_preflight_lists_exactly_what_is_missing(names, tmp_path, monkeypatch):
    """Each alone, and all at once in one refusal."""
    checked(tmp_path)
    table = lacking(monkeypatch, tmp_path)
    changes = {}
    for name in names:
        table[name][1]()
        changes |= table[name][0]
    said = checked(tmp_path, t.World(0, 2 if "ranks" in names else 1), **changes)
    assert len(said) == len(names), said
    for name in names:
        assert sum(table[name][2] in sentence for sentence in said) == 1, (name, said)


@pytest.mark.parametrize("kernel, words", [("varlen", ["attention:varlen"]), ("fa3", []), ("sdpa", ["attention:sdpa"])])
def test_preflight_says_which_attention_is_slower(kernel, words, tmp_path, monkeypatch):
    """And goes on."""
    monkeypatch.setattr(t, "attention_kernel", lambda h, device: kernel)
    said = checked(tmp_path, t.World(0, 1, t.torch.device("cuda", 0)))
    assert len(said) == len(words) and all(a.startswith(b) for a, b in zip(said, words))


def test_nothing_is_built_where_something_is_wrong(tmp_path, capsys, monkeypatch):
    """The embedded corpus takes half a minute: it waits until the rest is right."""
    monkeypatch.setattr(t, "build_corpus", None)
    monkeypatch.setattr(t, "coders", dict)
    sentence = refused(capsys, [], clean_env(LOGS_DIR=tmp_path, DATA_DIR=tmp_path, COMPRESSOR="brotli"))
    assert "pip install brotli" in sentence and "embedded" not in sentence and not list(tmp_path.iterdir())
    monkeypatch.setattr(t, "sentencepiece", None)
    sentence = refused(capsys, [], clean_env(LOGS_DIR=tmp_path, DATA_DIR=tmp_path, COMPRESSOR="brotli"))
    assert "pip install brotli" in sentence and "pip install sentencepiece" in sentence


def test_a_changed_validation_file_is_refused(tmp_path):
    """Where the folder has a manifest, validation shard, sidecar and tokenizer are held to it."""
    checked(tmp_path)
    data = tmp_path / "shards"
    files = {p.name: t.file_sha256(p) for p in data.iterdir()}
    (data / "manifest.json").write_text(json.dumps(dict(builder=1, files=files)))
    assert checked(tmp_path) == []
    for name, bad in (("fineweb_train_000000.bin", False), ("fineweb_val_bytes_000000.bin", True)):
        raw = bytearray((data / name).read_bytes())
        raw[-2] ^= 1
        (data / name).write_bytes(raw)
        assert [bool(re.search("not what manifest.json says", line)) for line in checked(tmp_path)] == [True] * bad


def test_an_unfinished_run_goes_on_only_as_it_was(tmp_path):
    """Its checkpoint belongs to its knobs and its number of ranks; an artifact without a checkpoint
    is never overwritten; a folder that holds only a log is used again."""
    folder, h = tmp_path / "logs" / "r", settings(checkpoint_every_s=1e-9, iterations=1)
    world = t.World()
    data = write_dataset(tmp_path / "shards", h)
    trained = t.Trainer(h, world, t.build_model(h, world), t.find_dataset(
        dataclasses.replace(h, data_path=str(data)), world, print))
    log = t.Log(world, folder, quiet=True)
    t.train(trained, 0.0, log, lambda: "")
    log.lock.close()
    same = dict(run_id="r", checkpoint_every_s=1e-9, iterations=1)
    assert checked(tmp_path, **same) == []
    (sentence, ) = checked(tmp_path, **same | dict(matrix_lr=0.5))
    assert "RUN_ID=r: its checkpoint was made by 1 ranks" in sentence and "'matrix_lr': 0.5" in sentence
    assert "not by 2" in checked(tmp_path, t.World(0, 2), **same)[0]
    (folder / "model.bin").touch()
    assert checked(tmp_path, **same) == []
    for path in t.checkpoints(folder):
        path.unlink()
    assert "RUN_ID=r was used before" in checked(tmp_path, **same)[0]
    (folder / "model.bin").unlink()
    assert checked(tmp_path, **same) == []
    os.mkfifo(folder / "checkpoint000000001.bin")    # to open a pipe would wait for ever
    assert checked(tmp_path, **same) == []
    (folder / "log.txt").unlink()
    os.mkfifo(folder / "log.txt")
    assert checked(tmp_path, **same) == [f"{folder / 'log.txt'}: expected an ordinary file"]


def test_a_name_too_long_for_a_file_is_refused(tmp_path):
    """In bytes, of which some letters take several."""
    assert checked(tmp_path, run_id="a" * 255) == []
    for run_id in ("a" * 256, "п" * 128):
        with pytest.raises(t.Refusal, match=f"RUN_ID={run_id}: 256 bytes, expected a name of at most 255"):
            t.preflight(settings(run_id=run_id, logs_dir=str(tmp_path)), t.World(), t.Log(t.World(), quiet=True))


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("CppCompileError: C++ compile error\n\nOutput:\nx.cpp:1:10: fatal error: Python.h: No such file"),
     "x.cpp:1:10: fatal error: Python.h: No such file"),
    (RuntimeError("No working C++ compiler found\n\nSet X"), "No working C++ compiler found"),
    (PermissionError(13, "Permission denied", "/cache"), "[Errno 13] Permission denied: '/cache'")])
def test_a_compiler_that_cannot_compile(error, reason, monkeypatch):
    """COMPILE=auto says why it is off; who asked for compiling is refused before the clock."""
    def broken(*_, **__):
        """Stands for torch.compile."""
        raise error

    monkeypatch.setattr(t.subprocess, "run", lambda *_, **__: None)    # whoever is asked is there
    monkeypatch.setattr(t.torch, "compile", broken)
    lines, cpu = [], t.torch.device("cpu")
    assert t.compile_mode(settings(compile="off"), cpu, lines.append) == "off" and lines == []
    assert t.compile_mode(settings(compile="auto"), cpu, lines.append) == "off"
    assert lines[0].startswith(f"compile:off ({reason}; install")
    for mode in ("block", "full"):
        with pytest.raises(t.Refusal, match=re.escape(f"COMPILE={mode} cannot work here ({reason})")):
            t.compile_mode(settings(compile=mode), cpu, lines.append)


@pytest.mark.parametrize("compiler, reason", [
    ("'{}/hang' -x", r"timed out after 0\.1 s"), ("{}/none", "No such file"), ("g++ 'x", "No closing quotation")])
def test_a_compiler_that_does_not_answer(compiler, reason, tmp_path, monkeypatch):
    """It is asked for its version first, since torch would wait for it without end."""
    hang, ask = tmp_path / "hang", t.subprocess.run
    hang.write_text("#!/bin/sh\nexec sleep 60\n")
    hang.chmod(0o755)
    monkeypatch.setenv("CXX", compiler.format(tmp_path))
    monkeypatch.setattr(t.subprocess, "run", lambda *a, **k: ask(*a, **k | dict(timeout=k["timeout"] / 600)))
    lines = []
    assert t.compile_mode(settings(compile="auto"), t.torch.device("cpu"), lines.append) == "off"
    assert re.match(f"compile:off \\(.*{reason}", lines[0]) and len(lines) == 1


def test_a_compiler_that_works(monkeypatch):
    """Auto means blocks on a CPU; what was asked for stays."""
    monkeypatch.setattr(t.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(t.torch, "compile", lambda function: function)
    assert [t.compile_mode(settings(compile=mode), t.torch.device("cpu"), print)
            for mode in ("auto", "block", "full")] == ["block", "block", "full"]
    short = [t.compile_mode(settings(compile=mode, max_wallclock_seconds=s), t.torch.device("cpu"), print)
             for mode, s in (("auto", 60), ("block", 60), ("auto", 400))]
    assert short == ["off", "block", "block"]


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("can't start new thread"), t.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")])
def test_too_little_memory_is_one_sentence(error, monkeypatch, capsys):
    """Whatever said it; a mistake that only speaks of memory keeps its traceback."""
    def work(*_) -> None:
        """Asks for too much."""
        raise error

    monkeypatch.setattr(t, "start", work)
    told = str(error).split("\n")[0] or "MemoryError"
    assert refused(capsys, [], clean_env()) == ("train_gpt.py: error: too little memory, which MICRO_BATCH_TOKENS and "
                                                f"EVAL_BATCH_TOKENS decide, or too few threads ({told})")
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError):
        t.main([], clean_env())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
@pytest.mark.parametrize("verb", ["", "report"])
def test_a_signal_ends_any_stage_in_one_sentence(name, verb, monkeypatch, capsys):
    """Of a run and of the tools; afterwards the signals are what they were."""
    number = getattr(t.signal, name)
    before = t.signal.signal(number, t.signal.default_int_handler)

    def work(*_) -> None:
        """Is asked to stop."""
        t.os.kill(t.os.getpid(), number)

    monkeypatch.setattr(t, "start", work)
    monkeypatch.setitem(t.TOOLS, "report", work)
    assert f"stopped by a signal ({name})" in refused(capsys, [verb] * bool(verb), clean_env())
    assert t.signal.signal(number, before) == t.signal.default_int_handler


def test_threads_are_no_more_than_processors(monkeypatch):
    """Nor more than torch takes by itself; OMP_NUM_THREADS is what the user wants."""
    asked = []
    monkeypatch.setattr(t.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(t.torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for count in (3, 16):
        monkeypatch.setattr(t, "cpu_count", lambda count=count: count)
        t.tune_process(t.torch.device("cuda"))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    t.tune_process(t.torch.device("cuda"))
    assert asked == [3, 8]


def test_two_processes_with_one_run_id(tmp_path, capsys):
    """The second is refused while the first lives, and leaves its files alone."""
    log = t.Log(t.World(), tmp_path / "logs" / "two", quiet=True)
    data = write_dataset(tmp_path / "shards", settings())
    env = clean_env(**upper(TINY), RUN_ID="two", LOGS_DIR=tmp_path / "logs", DATA_PATH=data, RECIPE="record")
    assert "RUN_ID=two: another process is at work" in refused(capsys, [], env)
    assert [p.name for p in log.folder.iterdir()] == ["log.txt"] and (log.folder / "log.txt").read_text() == ""
    log.lock.close()


def test_after_kill_9_the_same_command_goes_on(quick, tmp_path):
    """A process killed in mid-training leaves a good checkpoint; the next one makes the artifact
    that was to be made, and clears the checkpoints away."""
    data = write_dataset(tmp_path / "shards", settings())
    env = clean_env(**upper(TINY) | dict(ITERATIONS=12, CHECKPOINT_EVERY_S="1e-9", LOGS_DIR=tmp_path / "logs",
                                         RECIPE="record", DATA_PATH=data, SCORES="quantized"))
    assert t.main([], env | dict(RUN_ID="whole")) == 0
    reader, writer = t.os.pipe()
    child = start_forked(env | dict(RUN_ID="cut"), cwd=tmp_path, out=writer, errors=2)
    t.os.close(writer)
    folder = tmp_path / "logs" / "cut"
    with open(reader) as printed:
        assert any(line.startswith("step:3/") for line in printed)
        t.os.kill(child, t.signal.SIGKILL)
        assert ended(child) == -t.signal.SIGKILL
    assert t.checkpoints(folder) and not (folder / "result.json").exists()
    (folder / ".model.bin.1.partial").touch()    # what a process killed while it writes leaves
    assert t.main([], env | dict(RUN_ID="cut")) == 0
    assert (folder / "model.bin").read_bytes() == (tmp_path / "logs/whole/model.bin").read_bytes()
    assert re.search(r"^resumed:step \d+ ", (folder / "log.txt").read_text(), re.M)
    assert sorted(p.name for p in folder.iterdir()) == left(folder, "quantized")


def test_a_clock_that_was_interrupted_does_not_comply(tmp_path):
    """With MAX_WALLCLOCK_SECONDS a resumed run is marked: what was lost is on no clock."""
    for resumed, limit, marked in ((0, 5.0, False), (3, 5.0, True), (3, 0.0, False)):
        h = settings(max_wallclock_seconds=limit, run_id="r")
        folder = tmp_path / f"{resumed}{limit}"
        log = t.Log(t.World(), folder, quiet=True)
        result = t.conclude(h, t.World(), t.GPT(h), t.Trained(4, 1.0, resumed), 1.0,
                            dict(model=1, code=1, total=2, limit=9), {}, {}, log)
        assert result["compliant"] is not marked and ("resumed at step 3" in str(result["violations"])) == marked


@pytest.mark.parametrize("change", ["flip", "cut", "empty"])
def test_a_damaged_artifact_is_refused(finished, change, tmp_path, capsys):
    """Status 2 and the file's name."""
    blob = bytearray((finished[0] / "model.bin").read_bytes())
    blob[len(blob) // 2] ^= 4
    path = tmp_path / "model.bin"
    path.write_bytes(dict(flip=bytes(blob), cut=bytes(blob[:-9]), empty=b"")[change])
    assert str(path) in refused(capsys, ["eval", path], clean_env())


def test_knobs_that_contradict_the_artifact_are_refused(finished, capsys):
    """An artifact brings its own model; NUM_LAYERS=4 cannot be meant."""
    sentence = refused(capsys, ["eval", finished[0] / "model.bin"], clean_env(NUM_LAYERS=4))
    assert "NUM_LAYERS=4 contradicts" in sentence


def test_the_packed_code_of_the_run_is_python(finished):
    """It begins with its marker, parses, and is what the readable script packs to."""
    code = (finished[0] / "train_gpt.py").read_bytes()
    assert code.startswith(t.PACKED)
    ast.parse(code)
