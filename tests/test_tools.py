"""Section 16: three tiny seeds become a records folder that passes review; a dozen forgeries do
not; reports and sweeps."""
from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import REPO, TINY, clean_env, write_dataset
from support import model_of, remembering, settings, stream, t, validation

# Enough steps and no long average, so that the artifacts are far from their initial weights; a layer less, since all is scored often.
SMALL = TINY | dict(num_layers=3, loop_end=1, parallel_start_layer=2, xsa_last_n=2, vocab_size=32, iterations=20, train_batch_tokens=128, ema_decay=0.5, train_log_every=10,
                    tied_embed_lr=0.1, ttt_lr=0.05, ttt_epochs=1, rehearsal_steps=0)
KNOBS = {n.upper(): v for n, v in SMALL.items()} | dict(RECIPE="record")
ABOUT = ["--name", "Tiny", "--author", "Ada", "--github-id", "ada", "--date", "2026-01-02"]


class Bench:
    """Where the shared runs lie, and the command line in this process."""

    def __init__(self, root: Path):
        """Makes the shards."""
        self.root, self.pack = root, remembering(t.pack_source)
        self.env = KNOBS | dict(LOGS_DIR=root / "logs", DATA_PATH=write_dataset(
            root / "shards", t.Hyperparameters(**SMALL), train=2000, val=200))

    def __call__(self, *arguments: object, **knobs: object) -> int:
        """The exit status of a command; equal sources are packed once."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t, "pack_source", self.pack)
            return t.main([str(a) for a in arguments], clean_env(**self.env | knobs))


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """Three finished seeds in logs/s1 to s3 and the folder `record` made of them."""
    bench = Bench(tmp_path_factory.mktemp("tools"))
    for seed in (1, 2, 3):
        assert bench(RUN_ID=f"s{seed}", SEED=seed) == 0
    logs = bench.root / "logs"
    assert bench("submit", logs / "s2", logs / "s1", logs / "s3", "--to", bench.root / "record", *ABOUT) == 0
    return bench


def edit(path: Path, old: str, new: str, count: int = 0) -> None:
    """Replaces a pattern in a file, which must be there."""
    text, found = re.subn(old, new, path.read_text(), count=count)
    assert found, (path, old)
    path.write_text(text)


def entry(folder: Path) -> dict:
    """submission.json of a folder."""
    return json.loads((folder / "submission.json").read_text())


# ------------------------------------------------------------------------------- submit and verify
def test_the_folder_is_complete(bench):
    """The files of a merged record: packed code, source, logs, artifacts, description."""
    assert sorted(p.name for p in (bench.root / "record").iterdir()) == sorted(
        ["README.md", "requirements.txt", "submission.json", "train_gpt.py", "train_gpt_readable.py"] +
        [n.format(s) for s in (1, 2, 3) for n in ("model_seed{}.bin", "train_seed{}.log", "documents_seed{}_ttt.txt",
                                                  "documents_seed{}_quantized.txt", "documents_seed{}_sliding.txt")])
    assert (bench.root / "record/train_gpt_readable.py").read_bytes() == (REPO / "train_gpt.py").read_bytes()
    text = (bench.root / "record/README.md").read_text()
    assert all(part in text for part in ("## Scores", "w_down", "packed code", "adaptation", "calibration", "XSA_LAST_N",
                                         "verify .` checks C1 to C4", "SEED=1 RECIPE=record"))
    assert "torch==" in (bench.root / "record/requirements.txt").read_text()


def test_every_number_follows_from_the_logs(bench):
    """submission.json, made again from the logs by other means."""
    folder = bench.root / "record"
    said, final = entry(folder), {}
    for seed in (1, 2, 3):
        text = (folder / f"train_seed{seed}.log").read_text()
        final[seed] = re.findall(r"final_ttt_exact val_loss:(\S+) val_bpb:(\S+) eval_time:(\d+)ms", text)[-1]
        mine = said["seed_results"][str(seed)]
        last = re.findall(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms step_avg:(\S+)ms", text)[-1]
        assert mine["steps"] == int(last[0]) == 20 and mine["step_avg_ms"] == pytest.approx(float(last[2]), abs=2.5)
        assert mine["train_time_s"] == pytest.approx(int(last[1]) / 1e3, abs=0.05)
        assert mine["eval_time_s"] == pytest.approx(int(final[seed][2]) / 1e3, abs=5e-3)
        assert mine["artifact_bytes"] == sum((folder / n).stat().st_size
                                             for n in (f"model_seed{seed}.bin", "train_gpt.py"))
        assert mine["artifact_bytes"] == int(re.findall(r"Total submission size rans: (\d+)", text)[-1])
        before = float(re.findall(r"final_sliding_exact \S+ val_bpb:(\S+)", text)[-1])
        assert mine["pre_ttt_val_bpb"] == pytest.approx(before, abs=1e-8)
        assert mine["ttt_gain_bpb"] == pytest.approx(before - float(final[seed][1]), abs=2e-8)
    for place, key in enumerate(("val_loss", "val_bpb")):
        values = [float(final[s][place]) for s in (1, 2, 3)]
        mean = sum(values) / 3
        assert said[key] == pytest.approx(mean, abs=1e-8)
        assert said[f"{key}_std"] == pytest.approx(math.sqrt(sum((v - mean)**2 for v in values) / 2), abs=2e-8)
        assert [said["seed_results"][str(s)][key] for s in (1, 2, 3)] == pytest.approx(values, abs=1e-8)
    sizes = [said["seed_results"][str(s)]["artifact_bytes"] for s in (1, 2, 3)]
    assert said["bytes_total"] == said["artifact_bytes_max"] == max(sizes)
    assert said["artifact_bytes_mean"] == pytest.approx(sum(sizes) / 3)
    assert said["bytes_code"] == (folder / "train_gpt.py").stat().st_size and said["seeds"] == [1, 2, 3]
    assert said["compliance"]["artifact_under_16000000_bytes"] is said["compliance"]["eval_under_600s"] is True
    assert (said["track"], said["author"], said["github_id"]) == ("non_record_16mb", "Ada", "ada")


def test_verify_passes_the_folder(bench, capfd):
    """Status 0, every check passed, the code run in new processes."""
    assert bench("verify", bench.root / "record") == 0
    lines = capfd.readouterr().out.splitlines()
    groups = {line.split()[1] for line in lines[:-1]}
    assert groups == {"files", "runs", "code", "log", "rules", "bytes", "data", "C1", "C2", "C3", "C4", "score"}
    assert all(line.startswith("pass ") for line in lines[:-1]) and "passes all" in lines[-1]
    assert any("sockets and processes opened while scoring: none" in line for line in lines)
    assert sum("documents scored again" in line for line in lines) == 9
    assert not list(bench.root.rglob("record/__pycache__"))


def test_the_folder_trains_and_scores_from_inside(bench, tmp_path):
    """Its packed script makes the very artifact again, and scores the one that lies beside it."""
    folder = shutil.copytree(bench.root / "record", tmp_path / "record")
    env = clean_env(**bench.env | dict(SEED=2, RUN_ID="again", LOGS_DIR=tmp_path / "logs"))
    for arguments, _wanted in (((), "val_bpb"), (("eval", "model_seed2.bin"), "val_bpb")):
        done = subprocess.run([sys.executable, "train_gpt.py", *arguments], cwd=folder, env=env, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
        bpb = re.findall(r"final_ttt_exact \S+ val_bpb:(\S+)", done.stdout)[-1]
        assert float(bpb) == pytest.approx(entry(folder)["seed_results"]["2"]["val_bpb"], abs=1e-8)
    assert (tmp_path / "logs/again/model.bin").read_bytes() == (folder / "model_seed2.bin").read_bytes()


def relog(folder: Path, seed: int, change) -> None:
    """Changes the RESULT of one log, with the lines above it and submission.json made to fit."""
    path = folder / f"train_seed{seed}.log"
    result = t.read_evidence(path, path.name, f"_seed{seed}", folder).result
    change(result)
    edit(path, "(?m)^RESULT .*$", lambda m: "RESULT " + json.dumps(result))
    for name, s in result["scores"].items():
        edit(path, rf"final_{name}_exact val_loss:\S+ val_bpb:\S+",
             f"final_{name}_exact val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f}")
    edit(path, "(?m)^knobs:.*$", lambda m: "knobs:" + json.dumps(result["knobs"]))
    about = {n: entry(folder)[n] for n in ("track", "name", "author", "github_id", "date", "blurb")}
    runs = t.read_record(folder)
    (folder / "submission.json").write_text(json.dumps(t.submission(runs, about), indent=2))


def better(result: dict) -> None:
    """A final score one hundredth below the true one."""
    for key in ("val_loss", "val_bpb"):
        result["scores"]["ttt"][key] *= 0.99


def hotter(result: dict) -> None:
    """Another learning rate."""
    result["knobs"]["matrix_lr"] = result["changed_knobs"]["matrix_lr"] = 0.5


def fat(folder: Path) -> None:
    """An artifact with which code and weights take 16,000,001 bytes, and a log that says so."""
    path, code = folder / "model_seed1.bin", (folder / "train_gpt.py").stat().st_size
    path.write_bytes(path.read_bytes().ljust(16_000_001 - code, b"\0"))
    relog(folder, 1, lambda r: r["bytes"].update(model=16_000_001 - code, total=16_000_001))
    edit(folder / "train_seed1.log", r"(Total submission size \w+: )\d+", r"\g<1>16000001")


def on_track(folder: Path) -> None:
    """A run without a clock in the track of ten minutes."""
    edit(folder / "submission.json", "non_record_16mb", "10min_16mb")


def forbidden(folder: Path) -> None:
    """A script that loads pickles, packed and counted as it is."""
    code = t.pack_source(f"import pickle\nprint(pickle, '{np.random.default_rng(0).bytes(1000).hex()}')\n")
    (folder / "train_gpt.py").write_bytes(code)
    for seed in (1, 2, 3):
        total = (folder / f"model_seed{seed}.bin").stat().st_size + len(code)
        edit(folder / f"train_seed{seed}.log", r"(Total submission size \w+: )\d+", rf"\g<1>{total}")
        relog(folder, seed, lambda r: r["bytes"].update(code=len(code), total=total))


FORGERIES = {
    "an edited log": (lambda f: edit(f / "train_seed2.log", r'"val_bpb": \d\.\d', '"val_bpb": 1.0'),
                      r"submission.json: .*val_bpb.* not as in the logs"),
    "an edited log that fits": (lambda f: relog(f, 2, better), r"train_seed2.log: \d+ documents of .* add up to ttt"),
    "an edited number": (lambda f: edit(f / "submission.json", r'"bytes_total": \d+', '"bytes_total": 5'),
                         "submission.json: bytes_total not as in the logs"),
    "a swapped artifact": (lambda f: shutil.copy(f / "model_seed3.bin", f / "model_seed1.bin"),
                           r"model_seed1.bin: checksum right, made by other knobs: .*'seed': 3"),
    "a damaged artifact": (lambda f: (f / "model_seed1.bin").write_bytes(
        (f / "model_seed1.bin").read_bytes()[:-1] + b"?"), "model_seed1.bin: damaged, its checksum"),
    "mixed knobs": (lambda f: relog(f, 2, hotter), "configured as train_seed1.log: MATRIX_LR=0.5 not 0.026"),
    "16,000,001 bytes": (fat, "total 16,000,001 of 16,000,000 bytes"),
    "a recipe that breaks a rule": (lambda f: relog(f, 1, lambda r: r.update(
        compliant=False, violations=["C3: validation text before it was scored"])), "not compliant: .*C3"),
    "a missing score": (lambda f: relog(f, 1, lambda r: r["scores"].pop("sliding")), "train_seed1.log: scores complete"),
    "no clock on the track": (on_track, "MAX_WALLCLOCK_SECONDS=0 of 600 s"),
    "two seeds": (lambda f: [p.unlink() for p in f.glob("*seed3*")] + [relog(f, 1, lambda r: None)],
                  "2 runs, at least 3"),
    "a missing file": (lambda f: (f / "README.md").unlink(), "missing: README.md"),
    "another source": (lambda f: edit(f / "train_gpt_readable.py", "0.5, fraction|0.5, .slope", '0.25, "slope', 1),
                       "train_gpt_readable.py does not pack to the counted bytes"),
    "bytes behind the code": (lambda f: (f / "train_gpt.py").write_bytes((f / "train_gpt.py").read_bytes() + b"#\n"),
                              r"train_gpt.py: \d+ bytes, \d+ in the log"),
    "a pickle": (forbidden, "characters unpacked, which use pickle"),
    "a log cut short": (lambda f: edit(f / "train_seed1.log", "(?m)^RESULT .*$", ""), "no RESULT line"),
    "a log of another seed": (lambda f: relog(f, 2, lambda r: r.update(seed=1)), "the log of SEED=1"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_folders_fail_for_the_right_reason(bench, forgery, tmp_path, capsys, monkeypatch):
    """Found by reading alone: the code of such a folder is never run."""
    folder = shutil.copytree(bench.root / "record", tmp_path / "record")
    change, reason = FORGERIES[forgery]
    with t.contextlib.suppress(t.Refusal):    # `relog` may already be refused what it reads again
        change(folder)
    monkeypatch.setattr(t, "in_new_process", None)
    capsys.readouterr()
    assert bench("verify", folder) in (1, 2)
    out, err = capsys.readouterr()
    failed = [line for line in out.splitlines() if line.startswith("FAIL")] + err.splitlines()
    assert re.search(reason, "\n".join(failed)), failed


BEFORE = "        with torch.no_grad(), ledger.sealed():\n            nats = nats_of(ids, targets)\n"
PEEK = "        if learn:\n            nats_of(ids, targets)\n            learn(ids, targets)\n"
CHEATS = {
    "trains before it scores": ("C3", BEFORE, PEEK + BEFORE),
    "shares that do not sum to 1": ("C2", "            nats = nats_of(ids, targets)\n",
                                    "            nats = 0.97 * nats_of(ids, targets)\n"),
    "changes the order of tokens": ("data", "return cls(torch.from_numpy(tokens.astype(np.int64)),",
                                    "return cls(torch.from_numpy(np.sort(tokens).astype(np.int64)),"),
    "counts bytes twice": ("data", "target_bytes_.astype(np.int64),", "target_bytes_.astype(np.int64) * 2,"),
    "sees the target": ("C2", "    return self._tokens[index] * inside, ",
                        "    return self._tokens[index + 1] * inside, "),
    "looks ahead": ("C1", "    return self._tokens[index] * inside, ", "    return self._tokens[(index + 2) % "
                    "len(self._scored)] * inside, "),
    "opens a file": ("C1", "def score(", "def score(*a):\n    open('/etc/hostname').close()\n    scored(*a)\n\n\ndef scored("),
    "opens a socket": ("C1", "def score(", "def score(*a):\n    import socket\n    socket.socket().close()\n"
                       "    scored(*a)\n\n\ndef scored("),
    "swapped weights": ("score", "        w = value.decode() if", "        w = 1.5 * value.decode() if"),
    None: ("", "", ""),
}


@pytest.fixture(scope="session")
def heard() -> list[str]:
    """One audit hook for all, since hooks stay."""
    return t.listen()


@pytest.mark.parametrize("cheat", CHEATS)
def test_code_that_cheats_is_caught_when_it_runs(bench, cheat, tmp_path, heard):
    """Each cheat fails the check that is meant for it, and honest code fails none."""
    group, old, new = CHEATS[cheat]
    source = (REPO / "train_gpt.py").read_text()
    assert cheat is None or source.count(old) >= 1
    path = tmp_path / "train_gpt_readable.py"
    path.write_text(source.replace(old, new, 1) if cheat else source)
    e = dataclasses.replace(t.read_record(bench.root / "record")[0], readable=path)
    failed = (f for f in t.examine(e, clean_env(**bench.env), 12, [], heard) if not f.good)
    if cheat:    # what comes after the finding need not be computed
        assert any(f.group == group for f in failed)
    else:
        assert not [*failed]


def test_a_crash_of_the_code_is_a_failure(bench, capsys, monkeypatch, tmp_path):
    """What the new process found before it died stands in the checklist, at once, and what it died
    of; other lines are progress."""
    child = tmp_path / "child.py"
    child.write_text("print('FINDING [\"C1\", true, \"as it must be\", \"s1: \"]')\n"
                     "print('score:ttt 1/4')\nraise ValueError('boom')\n")
    start = subprocess.Popen
    monkeypatch.setattr(t.subprocess, "Popen", lambda command, **options: start(
        [command[0], str(child)], **options))
    assert bench("verify", bench.root / "logs/s1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-3:-1]] == ["pass C1 s1: as it must be".split(),
                                                      "FAIL code it ended with status 1: ValueError: boom".split()]


def test_bytes_are_counted_again_from_raw_text(bench):
    """The right documents pass, a byte more in one of them does not."""
    e, h = t.read_run(bench.root / "logs/s1"), settings(data_path=str(bench.root / "shards"))
    data = t.find_dataset(h, t.World(), t.Log(t.World(), quiet=True))
    sizes = np.add.reduceat(data.val.bytes, data.val.documents[:-1])
    texts = ["x" * int(n) for n in sizes]
    assert not t.bad(t.check_data(data, data, e, texts))
    texts[3] += "y"
    assert re.search("raw documents", t.bad(t.check_data(data, data, e, texts))[0])


@pytest.mark.parametrize("name, seconds, way", [
    ("stream", 0, "stream: .* after the same 20 others"), ("sliding", 60, "sliding: .* after the same 20 others"),
    ("sliding", 0, "model: ")])
def test_probabilities_are_summed_in_three_ways(name, seconds, way, monkeypatch):
    """The whole scorer, a document for every token, or the model: 1 for honest shares, not for
    shares that were made larger."""
    monkeypatch.setattr(t, "PROBE_SECONDS", seconds)
    model = model_of(settings())
    for factor, good in ((1.0, True), (0.97, False)):
        nats = t.GPT.nats
        model.nats = model.run_nats = lambda *rest, **options: factor * nats(model, *rest, **options)
        (found, ) = t.check_normalised(t, model, name, validation(stream(97)))
        assert found.good == good and re.match(way, found.text), found


@pytest.mark.parametrize("form, name, count", [
    ("stream", "quantized", 3), ("stream", "sliding", 3), ("stream", "stream", 3), ("stream", "sliding", 99),
    ("stream", "ttt", 3), ("chunk", "ttt", 3), ("chunk", "ttt", 99)])
def test_a_sample_is_scored_as_in_the_whole_stream(form, name, count):
    """Documents at the beginning get the nats of a full score; chunk-wise TTT needs all of it."""
    h = settings(ttt=form)
    model, val = model_of(h), validation(stream(300))
    end = t.sample_end(name, h, val.documents, count)
    whole = t.stream_nats(t, model, name, val.tokens.numpy(), val.bytes)
    assert (end is None) == (form == "chunk" and count == 3)
    if end is not None:
        part = t.stream_nats(t, model, name, val.tokens[:end + 1].numpy(), val.bytes[:end])
        inside = int(val.documents[min(count, len(val.documents) - 1)])
        assert end >= inside and np.abs(part - whole[:end])[:inside].max() < 1e-5
        assert end == 300 - 1 if count == 99 else end < 100


# -------------------------------------------------------------------------------- what submit says
def refused(bench, capsys, *arguments: object, **knobs: object) -> str:
    """The sentence with which a command is refused."""
    capsys.readouterr()
    assert bench(*arguments, **knobs) == 2
    return capsys.readouterr().err


def test_submit_says_which_run_and_why(bench, tmp_path, capsys):
    """Too few, unfinished, mixed, not compliant, target in use."""
    logs, to = bench.root / "logs", ["--to", tmp_path / "new", *ABOUT]
    assert "2 runs, at least 3" in refused(bench, capsys, "submit", logs / "s1", logs / "s2", *to)
    assert "seeds [1, 1, 2]" in refused(bench, capsys, "submit", logs / "s1", logs / "s1", logs / "s2", *to)
    copy = shutil.copytree(logs, tmp_path / "logs")
    (copy / "s1/result.json").unlink()
    assert re.search("s1: no result.json.*nowhere: there is no such folder",
                     refused(bench, capsys, "submit", copy / "s1", copy / "nowhere", copy / "s3", *to))
    for run, old, new in (("s2", '"matrix_lr": 0.026', '"matrix_lr": 0.5'), ("s3", '"compliant": true',
                                                                            '"compliant": false')):
        edit(copy / run / "log.txt", old, new)
        edit(copy / run / "result.json", old, new)
    (copy / "s3/model.bin").write_bytes(b"")
    shutil.copy(logs / "s1/result.json", copy / "s1")
    sentence = refused(bench, capsys, "submit", copy / "s1", copy / "s2", copy / "s3", *to)
    assert all(re.search(words, sentence) for words in (
        "s2 is configured as .*s1: MATRIX_LR=0.5 not 0.026", "s3: rules: not compliant", "s3: bytes: model.bin: 0 bytes"))
    assert "not empty" in refused(bench, capsys, "submit", logs / "s1", "--to", bench.root / "record", *ABOUT)
    assert not (tmp_path / "new").exists()


def test_submit_refuses_the_runs_of_other_code(bench, tmp_path, capsys, monkeypatch):
    """The readable source must be the one that the runs came from."""
    monkeypatch.setattr(bench, "pack", lambda *arguments: b"other")
    logs = bench.root / "logs"
    assert "does not pack to the counted bytes" in refused(
        bench, capsys, "submit", *(logs / f"s{n}" for n in (1, 2, 3)), "--to", tmp_path / "new", *ABOUT)


@pytest.mark.parametrize("against", ["1.05", "a,b,c", "1.05,0.1,1", "nan,0,3"])
def test_a_bad_rival_is_refused(bench, against, tmp_path, capsys):
    """--against needs mean, deviation and count."""
    logs = bench.root / "logs"
    assert "--against" in refused(bench, capsys, "submit", *(logs / f"s{n}" for n in (1, 2, 3)), "--to",
                                  tmp_path / "new", *ABOUT, "--against", against)


def test_the_difference_to_another_record_is_printed(bench, tmp_path, capsys):
    """In BPB and in nats per token, with Welch's test, on the terminal and in the README."""
    logs = bench.root / "logs"
    mean = entry(bench.root / "record")["val_bpb"]
    assert bench("submit", *(logs / f"s{n}" for n in (1, 2, 3)), "--to", tmp_path / "new", *ABOUT, "--against",
                 f"{mean + 0.01:.8f},0.001,3") == 0
    s = t.read_run(logs / "s1").score
    nats = -0.01 * s["bytes"] / s["tokens"] * math.log(2)
    sentence = f"-0.01000 BPB, {nats:+.5f} nats per token"
    assert sentence in capsys.readouterr().out and sentence in (tmp_path / "new/README.md").read_text()


@pytest.mark.parametrize("t_value, dof, p", [(-2.920, 2, 0.05), (-1.812, 10, 0.05), (-2.764, 10, 0.01), (0, 5, 0.5),
                                             (2.015, 5, 0.95)])
def test_welch_agrees_with_the_tables(t_value, dof, p):
    """One group of no spread makes Student's own test, whose quantiles are tabled."""
    n = dof + 1
    found = t.welch((t_value, math.sqrt(n), n), (0.0, 0.0, 2))
    assert found[0] == pytest.approx(t_value) and found[1] == pytest.approx(dof) and found[2] == pytest.approx(p, abs=2e-4)


def test_welch_by_hand():
    """Two groups of unequal spread: the degrees of freedom of Welch and Satterthwaite."""
    found = t.welch((1.0, 0.3, 3), (1.5, 0.4, 4))
    assert found[0] == pytest.approx(-0.5 / math.sqrt(0.03 + 0.04)) and found[1] == pytest.approx(0.07**2 / (
        0.03**2 / 2 + 0.04**2 / 3))
    assert t.welch((1, 0, 3), (2, 0, 3))[2] == 0 and t.welch((2, 0, 3), (1, 0, 3))[2] == 1


def test_the_repository_has_a_submission_without_scores(bench):
    """The fields of every submission, of which all that is measured is null."""
    said, real = json.loads((REPO / "submission.json").read_text()), entry(bench.root / "record")
    given = {"track", "name", "author", "github_id", "date", "blurb", "hardware", "seeds", "seed_results", "compliance"}
    assert set(said) == set(real) and set(said["compliance"]) == set(real["compliance"])
    assert not any(value for name, value in said.items() if name not in given)
    assert said["seeds"] == [] and said["seed_results"] == {} and "not measured" in said["hardware"]


# ------------------------------------------------------------------------------------------ report
def test_report_lists_runs_and_what_is_broken(bench, tmp_path, capsys):
    """Only the knobs that differ, the best run first; unfinished and damaged folders are named."""
    logs = shutil.copytree(bench.root / "logs", tmp_path / "logs")
    (logs / "dead").mkdir()
    (logs / "bad").mkdir()
    (logs / "bad/result.json").write_text("{")
    (logs / "bad/log.txt").write_text("RESULT {\n")
    capsys.readouterr()
    assert t.main(["report", str(logs)], clean_env()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1:4:2] == ["run", "SEED"] and "MATRIX_LR" not in lines[0]
    best = min((1, 2, 3), key=lambda n: t.read_run(logs / f"s{n}").score["val_bpb"])
    assert lines[2].split()[1:4:2] == [f"s{best}", str(best)]
    assert sum(line.startswith("not shown: ") for line in lines) == 2
    assert any("bad/log.txt: not JSON" in line for line in lines) and any("dead: no result.json" in line for line in lines)
    page = (logs / "report.md").read_text()
    assert page.count("\n| s") == 3 and "dead: no result.json" in page
    assert "](report.png)" in page and (logs / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib(bench, tmp_path, capsys, monkeypatch):
    """The table stays, and the page says what would bring pictures."""
    monkeypatch.setattr(t, "optional", lambda name: None)
    assert t.main(["report", str(bench.root / "logs/s1"), "--to", str(tmp_path)], clean_env()) == 0
    assert "install matplotlib" in capsys.readouterr().out and not (tmp_path / "report.png").exists()
    assert "matplotlib is not installed" in (tmp_path / "report.md").read_text()


def test_report_of_nothing_is_refused(tmp_path, capsys):
    """A folder without a single finished run."""
    assert t.main(["report", str(tmp_path)], clean_env()) == 2
    assert "no finished run" in capsys.readouterr().err


def test_options_out_of_range_are_refused(bench, capsys):
    """A sample without documents, and a report where no folder can be."""
    logs = bench.root / "logs"
    assert "--documents -1: expected 0" in refused(bench, capsys, "verify", logs / "s1", "--documents", -1)
    assert "Not a directory" in refused(bench, capsys, "report", logs / "s1", "--to", logs / "s1/log.txt/x")


# ------------------------------------------------------------------------------------------- sweep
@pytest.mark.parametrize("text, words", [
    ("MATRIX_RL=1,2", "MATRIX_RL is no knob to sweep; did you mean 'MATRIX_LR'"), ("SEED=1,,2", "expected NAME="),
    ("SEED=1;SEED=2", "once for each name"), ("RUN_ID=a", "RUN_ID is no knob"), (";", "expected NAME="),
    ("SEED=1,x", "SEED='x' must be a whole number"), ("SEED=1,1", "comes twice"),
    ("NUM_HEADS=4,5", "MODEL_DIM=32 must be a multiple of NUM_HEADS=5")])
def test_a_bad_sweep_stops_before_the_first_run(bench, text, words, tmp_path, capsys):
    """Every point of the grid is checked first."""
    assert words in refused(bench, capsys, SWEEP=text, LOGS_DIR=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, values", [
    ("SCORES=quantized,sliding|quantized", ["quantized,sliding", "quantized"]), ("SCORES=quantized,sliding|", ["quantized,sliding"]),
    ("RECIPE=pr578,demo|demo", ["pr578,demo", "demo"]), ("TTT_TARGETS=q", ["q"]), ("SCORES=quantized,sliding", None)])
def test_values_with_commas_are_parted_by_bars(text, values):
    """A knob whose values hold commas takes bars; without one it is refused, never cut."""
    name = text.split("=")[0]
    if values is None:
        with pytest.raises(t.Refusal, match="values of SCORES hold commas; put bars between them"):
            t.sweep_runs(dict(SWEEP=text))
    else:
        assert [env[name] for env in t.sweep_runs(dict(SWEEP=text, RECIPE="demo")).values()] == values


def test_names_of_sweeps_fit_into_a_folder():
    """However long the values are; and each is one of its own."""
    runs = t.sweep_runs(dict(SWEEP="TRAIN_SEQ_SCHEDULE=" + "|".join(
        ",".join(f"{n}@{i / 100:.2f}" for i in range(10, 99)) for n in (64, 128)), RECIPE="demo"))
    assert len(runs) == 2 and all(len(name) <= 100 for name in runs)


def test_a_sweep_runs_what_is_not_finished(bench, tmp_path, capsys, monkeypatch):
    """Four points; one finished before stays untouched, one dead with an artifact is set aside; a
    failure does not stop the rest, and the report comes last."""
    started = []

    class Process:
        """Stands for a new process: finishes the run at once, or fails."""

        def __init__(self, command: list, env: dict):
            """Notes what was started."""
            started.append(env["RUN_ID"])
            assert "SWEEP" not in env and env["SEED"] in "12" and env["MATRIX_LR"] in ("0.02", "0.5")
            self.status = 2 if env["MATRIX_LR"] == "0.5" and env["SEED"] == "2" else 0
            if not self.status:
                shutil.copytree(bench.root / "logs/s1", tmp_path / env["RUN_ID"])

        def wait(self) -> int:
            """The exit status."""
            return self.status

    monkeypatch.setattr(t.subprocess, "Popen", Process)
    shutil.copytree(bench.root / "logs/s1", tmp_path / "try-matrix_lr0.02-seed1")
    shutil.copytree(bench.root / "logs/s1", tmp_path / "try-matrix_lr0.02-seed2")
    (tmp_path / "try-matrix_lr0.02-seed2/result.json").unlink()
    knobs = dict(SWEEP="MATRIX_LR=0.02,0.5;SEED=1,2", RUN_ID="try", LOGS_DIR=tmp_path)
    capsys.readouterr()
    assert bench(**knobs) == 1
    names = [f"try-matrix_lr{lr}-seed{s}" for lr in ("0.02", "0.5") for s in (1, 2)]
    out = capsys.readouterr().out
    assert started == names[1:] and f"failed: {names[3]}" in out and f"{names[0]} is finished" in out
    assert (tmp_path / "try-matrix_lr0.02-seed2.unfinished1/model.bin").exists()
    assert (tmp_path / "report.md").exists() and "| run " in out
    started.clear()
    assert bench(**knobs) == 1 and started == names[3:], "the same command goes on where it stopped"


def test_a_stopped_sweep_stops_its_run(bench, tmp_path, capsys, monkeypatch):
    """SIGTERM is handed on to the run, which is waited for; no other run begins."""
    heard = []

    class Process:
        """Stands for a run during which the sweep is told to stop."""

        def __init__(self, command: list, env: dict):
            """Notes that it began."""
            heard.append("began")

        def terminate(self) -> None:
            """Notes that it was told."""
            heard.append("told")

        def wait(self) -> int:
            """The signal comes during the first wait."""
            if heard[-1] == "began":
                t.os.kill(t.os.getpid(), t.signal.SIGTERM)
            heard.append("waited")
            return 2

    monkeypatch.setattr(t.subprocess, "Popen", Process)
    before = t.signal.getsignal(t.signal.SIGTERM)
    assert bench(SWEEP="SEED=1,2", LOGS_DIR=tmp_path) == 130
    assert heard == ["began", "told", "waited"] and t.signal.getsignal(t.signal.SIGTERM) == before
    assert "the same command goes on" in capsys.readouterr().out


def test_a_sweep_can_print_its_commands(bench, tmp_path, capsys):
    """One shell line per run, with torchrun for several processes."""
    capsys.readouterr()
    assert bench("sweep", "--print", "--nproc", 2, SWEEP="SEED=1,2", LOGS_DIR=tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "SEED=2" in lines[1] and "RUN_ID=sweep-seed2" in lines[1] and "--nproc_per_node=2" in lines[1]


def test_sweeps_under_torchrun_are_refused(bench, tmp_path, capsys):
    """Each rank would start its own."""
    assert "sweep --nproc" in refused(bench, capsys, SWEEP="SEED=1,2", RANK=0, LOGS_DIR=tmp_path)
    assert "SWEEP is not set" in refused(bench, capsys, "sweep", LOGS_DIR=tmp_path)
    assert "--nproc 0: expected 1" in refused(bench, capsys, "sweep", "--nproc", 0, SWEEP="SEED=1", LOGS_DIR=tmp_path)
