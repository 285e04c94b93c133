"""Several nodes: two launchers of two ranks each, as on two machines, over the loopback interface."""
from __future__ import annotations

import contextlib
import json
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conftest import REPO, TINY, clean_env, ended, run_forked, said_in, start_forked, write_dataset
from conftest import tg as t

KNOBS = {name.upper(): value for name, value in TINY.items()} | dict(RECIPE="record", CHECKPOINT_EVERY_S=0, SCORES="quantized")
LIMIT_S = 60    # within which a wrong situation must have ended on every node


def on_nodes(cwd: Path, *changes: dict[str, object], limit_s: int = LIMIT_S) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of each node; node n runs with the knobs changes[n] and in a folder of its own, so
    that nothing but the network joins them. Raises `subprocess.TimeoutExpired` after `limit_s`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for number, knobs in enumerate(changes):
        (home := cwd / f"node{number}").mkdir(exist_ok=True)
        nodes.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(changes)}", f"--node_rank={number}",
             "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}", str(REPO / "train_gpt.py")],
            cwd=home, env=clean_env(**KNOBS | knobs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [node.communicate(timeout=limit_s) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *text) for node, text in zip(nodes, said)]


def on_forked_nodes(cwd: Path, *changes: dict[str, object]) -> list[tuple[list[int], str, str]]:
    """The same with the exit statuses of the ranks, which are forked from this process, with the variables of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [(node, local) for node in range(len(changes)) for local in (0, 1)]
    with contextlib.ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in ranks]
        children = []
        for rank, (node, local) in enumerate(ranks):
            (home := cwd / f"node{node}").mkdir(exist_ok=True)
            place = dict(RANK=rank, LOCAL_RANK=local, GROUP_RANK=node, WORLD_SIZE=len(ranks), LOCAL_WORLD_SIZE=2,
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            out, errors = (file.fileno() for file in files[rank])
            children.append(start_forked(KNOBS | changes[node] | place, cwd=home, out=out, errors=errors))
        statuses = [ended(child, LIMIT_S) for child in children]
        said = [[said_in(file) for file in pair] for pair in files]
    return [(statuses[n:n + 2], said[n][0] + said[n + 1][0], said[n][1] + said[n + 1][1]) for n in range(0, len(ranks), 2)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder of tiny shards."""
    return write_dataset(tmp_path_factory.mktemp("nodes") / "data", t.Hyperparameters(**TINY))


def refusals(errors: str) -> list[str]:
    """What train_gpt.py itself said, without the launcher's report."""
    return [line for line in errors.splitlines() if "train_gpt.py: error" in line]


def test_two_nodes_are_one_with_all_ranks(shards, tmp_path):
    """Two nodes of two ranks: one log, on the first node, and the result of one process alone."""
    knobs = dict(DATA_PATH=shards, RUN_ID="r")
    found = on_nodes(tmp_path, knobs, knobs, limit_s=150)
    assert [status for status, *_ in found] == [0, 0], found
    assert "RESULT " in found[0][1] and found[1][1] == "", "one rank speaks"
    assert not (tmp_path / "node1" / "logs").exists()
    (tmp_path / "one").mkdir()
    done = run_forked(KNOBS | knobs, cwd=tmp_path / "one")
    assert done.returncode == 0, done.stderr
    two, one = (json.loads((tmp_path / home / "logs" / "r" / "result.json").read_text()) for home in ("node0", "one"))
    assert (two["world_size"], one["world_size"]) == (4, 1) and two["steps"] == one["steps"] == TINY["iterations"]
    for name, score in one["scores"].items():
        assert two["scores"][name]["val_loss"] == pytest.approx(score["val_loss"], rel=1e-5), name
    # last bits of sums decide which neighbour a step of a row becomes, in quarters of an octave
    assert two["bytes"]["model"] == pytest.approx(one["bytes"]["model"], rel=0.005)


def test_a_node_without_data_is_named(shards, tmp_path):
    """Its ranks say what is missing and where they run; the other node's say which ranks they lost."""
    first, second = on_forked_nodes(tmp_path, dict(DATA_PATH=shards), dict(DATA_PATH=tmp_path / "nowhere"))
    assert first[0] == second[0] == [2, 2]
    missing = refusals(second[2])
    assert missing and all(f"node 1 = {platform.node()}" in line and "nowhere" in line for line in missing), second
    assert any("another rank was lost" in line and "node 0" in line for line in refusals(first[2])), first
    assert "step:" not in first[1]


def test_nodes_with_other_knobs_are_refused(shards, tmp_path):
    """A knob that one node was not given would train another model there; paths may differ."""
    first, second = on_forked_nodes(tmp_path, dict(DATA_PATH=shards), dict(DATA_PATH=shards, LOGS_DIR="elsewhere", MATRIX_LR=0.5))
    assert first[0] == second[0] == [2, 2]
    said = refusals(second[2])
    assert said and all("('matrix_lr', 0.5)" in line and "node 1" in line and "logs_dir" not in line for line in said), said
    assert "step:" not in first[1]
