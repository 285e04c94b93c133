"""The real command from end to end on the embedded corpus, what it leaves behind, and how it says
no."""
from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, TINY, clean_env, run_script, write_dataset

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
             GPTQ_CALIBRATION_BATCHES=2,
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
    """(folder of the run, its standard output, result.json) of one run of the real command."""
    cwd = tmp_path_factory.mktemp("pipeline")
    done = run_script(SMALL | dict(RUN_ID="one", DATA_DIR=cwd / "data"), cwd=cwd)
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
    file = folder / "train_gpt.py" if script == "packed" else REPO / "train_gpt.py"
    env = clean_env(DATA_DIR=folder.parents[1] / "data", SCORES=names)
    done = subprocess.run([sys.executable, str(file), "eval", "model.bin"],
                          cwd=folder,
                          env=env,
                          text=True,
                          capture_output=True)
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
                          (dict(NUM_HEADS=7), "MODEL_DIM=256 must be a multiple of NUM_HEADS=7"),
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
                          (["train"], "unknown verb 'train'"), (["eval"], "eval needs one"),
                          (["eval", "no/such/file"], "eval needs one"),
                          (["eval", "a", "b"], "eval needs one")])
def test_wrong_commands_are_refused(arguments, words, capsys):
    """Verbs that do not exist, and `eval` without its artifact."""
    assert words in refused(capsys, arguments, clean_env())


def upper(knobs: dict) -> dict:
    """Knobs as environment variables."""
    return {name.upper(): value for name, value in knobs.items()}


def test_over_the_budget_everything_is_saved_and_the_status_says_so(tmp_path, capsys):
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
    assert result["compliant"] is False and "over BUDGET_BYTES=1000" in result["violations"][0]
    assert sorted(p.name for p in folder.iterdir()) == left(folder, "quantized,sliding,ttt")
    assert list(t.unpack((folder / "model.bin").read_bytes())[1]) == list(t.roles(settings()))
    assert (folder / "log.txt").read_text().splitlines()[-1] == "RESULT " + json.dumps(result)


def test_what_is_missing_is_said_before_the_training(tmp_path, capsys, monkeypatch):
    """A compressor without its package and a batch that does not divide: both in one sentence,
    before any data."""
    monkeypatch.setattr(t, "brotli", None)
    monkeypatch.setattr(t, "accumulation", lambda h, world:
                        (_ for _ in ()).throw(t.Refusal("TRAIN_BATCH_TOKENS=9")))
    sentence = refused(capsys, [], clean_env(LOGS_DIR=tmp_path, COMPRESSOR="brotli"))
    assert "pip install brotli" in sentence and "TRAIN_BATCH_TOKENS=9" in sentence


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
