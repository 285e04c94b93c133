"""`bench_gpu.py` runs to its end on a CPU with tiny sizes, and every number that it promises is in its JSON; another
script beside ours is read, killed, and told about when it fails."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import REPO, TINY, clean_env, random_tokens, write_dataset

sys.path.insert(0, str(REPO / "tests"))
import bench_export
import bench_replica

import bench_gpu
import beside

PHASES = {"data", "forward", "backward", "optimiser", "collectives", "average", "host"}
FORMS = {"fused_ms", "plain_ms", "compiled_ms", "floor_ms"}
DIRECTIONS = ("mlp_forward", "mlp_backward", "nats_forward", "nats_backward")
STEP = {"step_ms", "tokens_per_second", "share_of_peak", "peak_memory_bytes"}
SCORE = {"tokens_per_second", "full_set_8_gpus_s"}
ATTENTION = {"tokens", "forward_ms", "both_ms", "largest_error", "share_of_peak"}
EXPECTED = dict(
    training=dict(before=STEP, after=STEP, mean_keys=None), split=dict(before=PHASES, after=PHASES),
    kernels=dict.fromkeys(DIRECTIONS, FORMS) | dict(trouble=None),
    attention=dict(chosen=None, **{f"{kernel}_{T}": ATTENTION for T in (64, 96) for kernel in ("sdpa", "blocks")}),
    muon=dict.fromkeys(("step_ms", "floor_ms")),
    export=dict.fromkeys(("parameters", "artifact_bytes", "whole_s", "written_s", "curvature_s", "factors_s", "gptq_s",
                          "pack_s", "round_in_turn_s", "unpack_s")),
    scoring=dict.fromkeys(("quantized", "sliding", "stream", "ttt"), SCORE),
    losses=dict.fromkeys(("steps", "fused_ran", "fused", "plain", "difference")))
HEAD = {"machine", "ranks", "torch", "small", "knobs", "peak_flops", "fused_kernels", "data", "train_batch_tokens",
        "micro_batch_tokens"}
# Two phases at 0.1 s and 0.2 s a step in #1855's form, after one stretch that compiled; then it would run for ever.
STAND_IN = """import os, subprocess, sys, time
import torch
from flash_attn_interface import flash_attn_varlen_func
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(os.environ["PLACE"], "w") as file:
    print(os.getpid(), child.pid, file=file)
print("warmup_step: 1/20")
batch, last, spent_s = int(os.environ["TRAIN_BATCH_TOKENS"]), int(os.environ["ITERATIONS"]), 0.0
for step in range(1, last + 1):
    if step == last // 2 + 1:
        print(f"layer_loop:enabled step:{step - 1} frac:0.500 encoder:[0] decoder:[1]")
    spent_s += (0.1 if step <= last // 2 else 0.2) + 5.0 * (step == last // 2 + 1)
    if step <= 5 or step % int(os.environ["TRAIN_LOG_EVERY"]) == 0:
        print(f"{step}/{last} train_loss: 9.0087 train_time: {spent_s / 60:.1f}m tok/s: {step * batch / spent_s:.0f}")
        print(f"peak memory allocated: {100 + step} MiB reserved: 47140 MiB")
    time.sleep(0.02)
time.sleep(600)
"""


def bench(*arguments: str, cwd, **knobs) -> subprocess.CompletedProcess:
    """The command with these arguments."""
    return subprocess.run([sys.executable, str(REPO / "tests" / "bench_gpu.py"), "--small", *arguments], cwd=cwd,
                          env=clean_env(**knobs), capture_output=True, text=True, timeout=120)


def result(done: subprocess.CompletedProcess) -> dict:
    """The JSON in the last line."""
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("BENCH ")
    return json.loads(last[6:])


def running(pid: int) -> bool:
    """True while a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_every_number_is_there(tmp_path):
    """All sections run, and the last line is the JSON of what the table shows."""
    done = bench("LEAKY_SLOPE=0.25", cwd=tmp_path)
    assert "failed" not in done.stdout, done.stdout
    results = result(done)
    assert set(results) == HEAD | set(EXPECTED) and results["data"] == "random tokens" and results["knobs"] == "LEAKY_SLOPE=0.25"
    for name, parts in EXPECTED.items():
        assert set(results[name]) == set(parts), name
        for part, keys in parts.items():
            assert keys is None or set(results[name][part]) == keys, (name, part)
    for side in ("before", "after"):
        assert results["training"][side]["tokens_per_second"] > 0 and results["split"][side]["backward"] > 0
    assert results["attention"]["blocks_64"]["largest_error"] < 0.05
    assert abs(results["losses"]["difference"]) < 0.05 and results["export"]["artifact_bytes"] > 0


def test_sections_are_chosen_and_may_fail(capsys, monkeypatch):
    """Only what was asked for runs; a broken section is null and the next one still runs; a wrong name is told."""
    def broken(b) -> dict:
        """Fails."""
        raise RuntimeError("out of memory")

    world = bench_gpu.MarkedWorld()
    b = bench_gpu.Bench(None, world, None, True, None, None, None)
    results = bench_gpu.measure(b, dict(training=broken, muon=lambda b: dict(plain_ms=1.0)))
    assert results == dict.fromkeys(bench_gpu.SECTIONS) | dict(muon=dict(plain_ms=1.0))
    assert "training: failed (RuntimeError: out of memory)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "kernel"])
    with pytest.raises(SystemExit, match="unknown: {'kernel'}"):
        bench_gpu.main()


def test_real_shards_are_measured_and_another_script_is_read_and_killed(tmp_path):
    """Shards of DATA_PATH take the place of random tokens; the script beside ours sees the same ones, its compilation
    is left out, and neither it nor what it started is there afterwards."""
    h = replace(tg.Hyperparameters(**TINY), vocab_size=128)
    data, place = write_dataset(tmp_path / "shards", h, train=9000), tmp_path / "pids"
    (tmp_path / "other.py").write_text(STAND_IN)
    begin_s = time.monotonic()
    done = bench("--beside", "other.py", "training", cwd=tmp_path, DATA_PATH=data, VOCAB_SIZE=128, PLACE=place)
    results = result(done)
    assert results["data"] == str(data) and str(data) in done.stdout.splitlines()[0]
    assert results["training"]["mean_keys"] < 20    # documents of 12 tokens, not of 800
    found = results["beside"]
    assert found["before"]["tokens_per_second"] == pytest.approx(1024 / 0.1, rel=1e-3)
    assert found["after"]["tokens_per_second"] == pytest.approx(1024 / 0.2, rel=1e-3)
    assert found["after"]["ratio"] == pytest.approx(
        results["training"]["after"]["tokens_per_second"] / found["after"]["tokens_per_second"])
    assert found["peak_memory_bytes"] == (100 + 32) << 20    # its last word before the line that sufficed
    assert time.monotonic() - begin_s < 100
    pids = [int(pid) for pid in place.read_text().split()]
    assert len(pids) == 2 and not any(map(running, pids))


def test_a_script_that_dies_is_null_and_told(tmp_path, monkeypatch):
    """Nothing known: null, one sentence with its last words; the bench itself goes on to its last line."""
    (tmp_path / "other.py").write_text("print('hello')\nraise RuntimeError('CUDA is required')\n")
    done = bench("--beside", "other.py", "muon", cwd=tmp_path)
    assert result(done)["beside"] is None
    assert "beside: other.py ended by itself, exit status 1, after" in done.stdout
    assert "its speed before and after recurrence is not known" in done.stdout
    assert "RuntimeError: CUDA is required" in done.stdout and "    hello" in done.stdout
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--beside", "nowhere.py"])
    with pytest.raises(SystemExit, match="--beside nowhere.py: there is no such file"):
        bench_gpu.main()


def test_a_script_that_hangs_is_killed_in_time(tmp_path, monkeypatch):
    """The limit counts whether or not it prints or holds its output open; what it told before is kept."""
    h = tg.Hyperparameters(**TINY)
    h = replace(h, data_path=str(write_dataset(tmp_path / "shards", h)))
    script = tmp_path / "other.py"
    for close in ("", "os.close(1), os.close(2)"):
        script.write_text("import os, time\nfor n in (4, 8):\n    print(f'step:{n}/40 loss train_time:{250 * n}ms')\n"
                          f"{close}\ntime.sleep(600)\n")
        monkeypatch.setattr(beside, "__file__", str(script))    # started at once, without torch before it
        begin_s = time.monotonic()
        found, trouble = beside.measured(h, 1, script, 3.0)
        assert time.monotonic() - begin_s < 20
        assert found.speed(False) == 1024.0 and found.speed(True) is None
        assert trouble.startswith("was killed after 3 s; its speed after recurrence is not known; its last lines:\n  ")


def test_the_environment_of_another_script(tmp_path, monkeypatch):
    """Neither our knobs nor torchrun's variables reach it; with byte counts any tokenizer does, without it is ours."""
    foreign = {"NUM_LAYERS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    for name in foreign | {"CUDA_VISIBLE_DEVICES"}:
        monkeypatch.setenv(name, "7")
    h = tg.Hyperparameters(**TINY)
    for sidecar in (True, False):
        data = write_dataset(tmp_path / str(sidecar), h, sidecar=sidecar)
        env = beside.environment(replace(h, data_path=str(data), tokenizer_path="mine.model"), tmp_path)
        assert env["CUDA_VISIBLE_DEVICES"] == "7" and not foreign & set(env)
        assert env["DATA_PATH"] == str(data) and env["CASEOPS_ENABLED"] == str(int(sidecar))
        assert env["TOKENIZER_PATH"] == str(tmp_path / "pieces.model" if sidecar else Path("mine.model").absolute())
        assert env["TRAIN_BATCH_TOKENS"] == "256" and env["TRAIN_SEQ_LEN"] == "16" and env["VOCAB_SIZE"] == "64"


def test_lines_of_either_form_are_read():
    """Milliseconds as they are; minutes only with a mean speed that agrees with them; our own log too."""
    found = beside.Readings(1000)
    for line in ("step:4/40 train_loss:9.0 train_time:400ms step_avg:100.00ms tok/s:10000", "recurrence:on step:8 p",
                 "stopping_early: wallclock_cap train_time: 900ms step: 9/40", "12/40 train_loss: 9 train_time: 0.2m",
                 "12/40 train_loss: 9.0 train_time: 0.2m tok/s: 1000", "16/40 train_loss: 9 train_time: 0.2m tok/s: 9",
                 "8/40 val_loss: 2.35 val_bpb: 1.07", "peak memory allocated: 41717 MiB reserved: 47140 MiB"):
        found.read(line)
    assert found.marks == [(4, 0.4), (12, 12.0)]
    assert found.loop == 8 and found.peak_bytes == 41717 << 20


def test_stand_ins_compute_what_ours_does():
    """Documents by padded ends, and whole rows, as `attend` does it, with gradients; traced as one graph; nothing that
    the kernel would have to do otherwise is taken."""
    h, device = tg.Hyperparameters(**TINY), torch.device("cpu")
    functions = beside.stand_ins(device)
    ids = random_tokens(h, 96)[None].astype(np.int64)
    docs = tg.locate(ids, 16, device)
    ends = np.append(np.flatnonzero(docs.start[0].numpy() == np.arange(96)), [96, 96, 96]).astype(np.int32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(96, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    varlen = lambda q, k, v: functions["flash_attn_varlen_func"](
        q, k, v, cu_seqlens_q=torch.from_numpy(ends), cu_seqlens_k=torch.from_numpy(ends), max_seqlen_q=16,
        max_seqlen_k=16, causal=True, window_size=(-1, -1))
    traced = torch.compile(varlen, fullgraph=True, dynamic=False, backend="eager")
    exact = tg.attend(q[None], k[None], v[None], docs, "sdpa")[0]
    slope = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, (q, k, v), slope)
    for form in (varlen, traced):
        torch.testing.assert_close(form(q, k, v), exact, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(form(q, k, v), (q, k, v), slope), wanted, atol=1e-5, rtol=1e-4)
    rows = [t.detach().view(3, 32, -1, 8) for t in (q, k, v)]
    torch.testing.assert_close(functions["flash_attn_func"](*rows, causal=True),
                               tg.attend(*rows, tg.whole_rows(torch.zeros(3, 32, dtype=torch.long)), "sdpa"))
    with pytest.raises(NotImplementedError):
        functions["flash_attn_func"](*rows)


def test_the_made_up_tokenizer_has_its_size(tmp_path):
    """SentencePiece reads it, and finds the space that scripts ask for."""
    sentencepiece = pytest.importorskip("sentencepiece")
    made = sentencepiece.SentencePieceProcessor(model_file=str(beside.made_tokenizer(tmp_path / "m.model", 8192)))
    assert made.vocab_size() == 8192 and made.piece_to_id("\u2581") != made.unk_id()


def test_the_cost_model_and_the_paired_difference():
    """The field's form takes 120 ms; ratios are met within 5%; what computes or stores more costs more. Two arms that differ by
    a constant number of bits per byte have that difference and no error."""
    cost, errors = bench_replica.fitted_cost()
    field = tg.Hyperparameters.from_env(dict(RECIPE="field"))
    ms = lambda **knobs: bench_replica.cost_ms(replace(field, **knobs), field, *cost)
    assert ms() == pytest.approx(120) and max(map(abs, errors.values())) < 0.05
    assert ms(num_loops=0) < ms(num_loops=1) < ms() < ms(mlp_mult=4.5) < ms(num_layers=12)
    assert ms() < ms(pointer=True) < ms(num_layers=12)
    sizes = np.array([10, 200, 3000])
    base = [sizes * 1.0, sizes * 1.1]
    mean, error = bench_replica.compared([nats + 0.01 * sizes * np.log(2) for nats in base], base, sizes)
    assert mean == pytest.approx(0.01) and error < 1e-9
    assert bench_replica.compared([base[0] + np.array([5, 0, 0])], base[:1], sizes)[1] > 1e-4


def test_the_artifact_of_a_small_model(capsys):
    """`bench_export.py` finds steps, reads back and scores; its line has every number."""
    bench_export.main(tg.run_block(TINY).split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("BENCH "))
    assert set(found) == {"curvature_s", "curvature_peak_bytes", "search_s", "unpack_s", "search_peak_bytes", "score_s", "parameters",
                          "bytes", "limit", "filled", "val_loss"}
    assert 0 < found["filled"] < 0.01 and 0 < found["val_loss"] < 20 and found["search_peak_bytes"] > 1e8


def test_arms_that_only_score_otherwise_share_a_model_and_not_a_verdict(monkeypatch, tmp_path):
    """A second arm with another EVAL_ knob trains nothing, and is judged by itself."""
    monkeypatch.setattr(bench_replica, "CACHE", tmp_path)
    monkeypatch.setattr(bench_replica, "shards", lambda V: write_dataset(tmp_path / "data", tg.Hyperparameters(**TINY), val=300))
    monkeypatch.setattr(bench_replica, "COMMON", dict(word.split("=") for word in tg.run_block(TINY).split()) | dict(
        EVAL_SEQ_LEN="8", EVAL_STRIDE="4", SHORT_VAL_ALLOWED="1"))
    monkeypatch.setattr(bench_replica, "SCALES", dict(S={}))
    found = [bench_replica.judge("S", 1, knobs, 3, 10**6, 100, 1) for knobs in ({}, dict(EVAL_SEQ_LEN="16"))]
    assert len(list(tmp_path.glob("replica*/model.pt"))) == 1 and len(list(tmp_path.glob("replica*/judged*"))) == 2
    assert found[0].nats["prequant"] != found[1].nats["prequant"]
    assert bench_replica.judge("S", 1, {}, 3, 10**6, 100, 1).nats == found[0].nats
