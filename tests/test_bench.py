"""`bench_gpu.py` runs to its end on a CPU with tiny sizes, and every number that it promises is in its JSON."""
from __future__ import annotations

import json
import subprocess
import sys

from conftest import REPO, clean_env

PHASES = {"data", "forward", "backward", "optimiser", "collectives", "average", "host"}
FORMS = {"fused_ms", "plain_ms", "compiled_ms", "floor_ms"}
DIRECTIONS = ("mlp_forward", "mlp_backward", "nats_forward", "nats_backward", "gram_forward")
STEP = {"step_ms", "tokens_per_second", "share_of_peak", "peak_memory_bytes"}
SCORE = {"tokens_per_second", "full_set_8_gpus_s"}
ATTENTION = {"tokens", "forward_ms", "both_ms", "largest_error", "share_of_peak"}
EXPECTED = dict(
    training=dict(before=STEP, after=STEP, mean_keys=None), split=dict(before=PHASES, after=PHASES),
    kernels=dict.fromkeys(DIRECTIONS, FORMS) | dict(trouble=None),
    attention=dict(chosen=None, blocks_64=ATTENTION, blocks_96=ATTENTION),
    muon=dict.fromkeys(("plain_ms", "symmetric_ms", "floor_ms")),
    export=dict.fromkeys(("parameters", "artifact_bytes", "whole_s", "calibration_s", "factors_s", "damage_s", "gptq_s",
                          "pack_s", "fit_budget_s", "unpack_s")),
    scoring=dict.fromkeys(("quantized", "sliding", "stream", "ttt"), SCORE),
    losses=dict.fromkeys(("steps", "fused_ran", "fused", "plain", "difference")))
HEAD = {"machine", "ranks", "torch", "small", "peak_flops", "fused_kernels", "train_batch_tokens", "micro_batch_tokens"}


def bench(*arguments: str, cwd) -> subprocess.CompletedProcess:
    """The command with these arguments."""
    return subprocess.run([sys.executable, str(REPO / "tests" / "bench_gpu.py"), "--small", *arguments], cwd=cwd,
                          env=clean_env(), capture_output=True, text=True, timeout=120)


def test_every_number_is_there(tmp_path):
    """All sections run, and the last line is the JSON of what the table shows."""
    done = bench(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout, done.stdout
    *_, last = done.stdout.splitlines()
    assert last.startswith("BENCH ")
    results = json.loads(last[6:])
    assert set(results) == HEAD | set(EXPECTED)
    for name, parts in EXPECTED.items():
        assert set(results[name]) == set(parts), name
        for part, keys in parts.items():
            assert keys is None or set(results[name][part]) == keys, (name, part)
    for side in ("before", "after"):
        assert results["training"][side]["tokens_per_second"] > 0 and results["split"][side]["backward"] > 0
    assert results["attention"]["blocks_64"]["largest_error"] < 0.05
    assert abs(results["losses"]["difference"]) < 0.05 and results["export"]["artifact_bytes"] > 0


def test_sections_are_chosen_and_may_fail(tmp_path, capsys):
    """Only what was asked for runs; a broken section is null and the next one still runs; a wrong name is told."""
    sys.path.insert(0, str(REPO / "tests"))
    import bench_gpu

    def broken(b) -> dict:
        """Fails."""
        raise RuntimeError("out of memory")

    world = bench_gpu.MarkedWorld()
    b = bench_gpu.Bench(None, world, None, True, None, None, None)
    results = bench_gpu.measure(b, dict(training=broken, muon=lambda b: dict(plain_ms=1.0)))
    assert results == dict.fromkeys(bench_gpu.SECTIONS) | dict(muon=dict(plain_ms=1.0))
    assert "training: failed (RuntimeError: out of memory)" in capsys.readouterr().out
    wrong = bench("kernel", cwd=tmp_path)
    assert wrong.returncode and "unknown: {'kernel'}" in wrong.stderr
