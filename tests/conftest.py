"""What all tests share: the module on the path, a tiny model, small shards, the script as users run it or forked, several
ranks."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")    # read at import: workers of the suite share the cores

import numpy as np
import pytest
import torch

# here, since the first optimiser of each forked run would import it
import torch._dynamo
import torch.multiprocessing

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import train_gpt as tg

torch.set_num_threads(1)

# Files that take longest, so that no worker of the suite ends long after the others with one of them.
LONGEST_FIRST = ["ttt", "recipes", "tools", "pipeline", "fast_paths", "kernels", "artifact", "counts", "nodes", "bench", "real_life",
                 "data", "fuzz", "model", "world", "config"]


def pytest_collection_modifyitems(items) -> None:
    """The longest files first; the others and the tests of each file keep their order."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


# Every seam is in use: grouped heads, a loop, skips, lanes, XSA on some layers only, both gates; fp32, no compiler.
TINY = dict(
    vocab_size=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, rope_dims=4,
    qk_gain_init=2.0, xsa_last_n=3, num_loops=1, loop_start=1, loop_end=2,
    parallel_start_layer=3, iterations=4, max_wallclock_seconds=0.0, train_batch_tokens=256,
    micro_batch_tokens=64, train_seq_len=16, rehearsal_steps=1, muon_momentum_warmup_steps=10,
    train_log_every=1, compile="off", precision="fp32", gptq_calibration_batches=4, rounding_steps=1,
    eval_seq_len=16, eval_stride=4, eval_batch_tokens=64, ttt_chunk_tokens=128, ttt_batch_seqs=4,
    ttt_epochs=2, ttt_lora_rank=2)


@pytest.fixture
def tiny() -> tg.Hyperparameters:
    """Hyperparameters of a model that takes milliseconds."""
    return tg.Hyperparameters(**TINY)


def alive(h: tg.Hyperparameters, seed: int = 0, dtype: torch.dtype = torch.float32) -> tg.GPT:
    """A model with every bank moved off its initial value: a fresh one has zero outputs, which hide mistakes."""
    torch.manual_seed(seed)
    model = tg.GPT(h, dtype)
    with torch.no_grad():
        for p in model.bank.values():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def random_tokens(h: tg.Hyperparameters, count: int, seed: int = 0, document: int = 12) -> np.ndarray:
    """(count,) tokens that start with a document and open another about every `document` tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, h.vocab_size, count).astype(np.uint16)
    tokens[rng.random(count) < 1 / document] = tg.BOS
    tokens[0] = tg.BOS
    return tokens


def write_dataset(folder: Path, h: tg.Hyperparameters, train: int = 5000, val: int = 700, sidecar: bool = True) -> Path:
    """Two train shards, a validation shard and its sidecar of random tokens in `folder`, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = random_tokens(h, train)
    tg.write_shard(folder / "fineweb_train_000000.bin", tokens[:train // 3])
    tg.write_shard(folder / "fineweb_train_000001.bin", tokens[train // 3:])
    held = random_tokens(h, val, seed=1)
    tg.write_shard(folder / "fineweb_val_000000.bin", held)
    if sidecar:
        tg.write_shard(folder / "fineweb_val_bytes_000000.bin", np.where(held == tg.BOS, 0, 1 + held % 5))
    return folder


def clean_env(**knobs: object) -> dict[str, str]:
    """This process's environment without knobs or ranks, on the CPU, with one thread, plus `knobs`."""
    ours = {name.upper() for name in tg.Hyperparameters.__dataclass_fields__} | {
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}
    base = {name: value for name, value in os.environ.items() if name not in ours}
    text = {name: str(int(v) if isinstance(v, bool) else v) for name, v in knobs.items()}
    return base | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | text


def run_script(env: dict[str, object], *args: str, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess:
    """train_gpt.py in a process of its own (torchrun for several) with the knobs `env`; nothing is checked."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(REPO / "train_gpt.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=clean_env(**env), capture_output=True, text=True, timeout=300)


def forked(work) -> int:
    """The id of a new process that ends with the status that `work()` returns."""
    if child := os.fork():
        return child
    status = 70
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = work()
    finally:
        os._exit(status)


def ended(child: int, limit_s: float = 60) -> int:
    """The exit status of the process; kills it after the limit."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def start_forked(env: dict[str, object], *args: str, cwd: Path, out: int, errors: int) -> int:
    """The id of a process that does what train_gpt.py would do there with the knobs `env`, and writes to two descriptors: forked
    from this one, since a new interpreter imports torch for longer than most runs of tests take."""
    def work() -> int:
        """The life of that process."""
        os.dup2(out, 1), os.dup2(errors, 2)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)
        ours = clean_env(**env)
        os.environ.clear()
        os.environ.update(ours)
        os.chdir(cwd)
        status = tg.main([*map(str, args)], os.environ)
        sys.stdout.flush()
        return status

    return forked(work)


def run_forked(env: dict[str, object], *args: str, cwd: Path, limit_s: float = 600) -> subprocess.CompletedProcess:
    """Like `run_script` for one process, forked from this one."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        status = ended(start_forked(env, *args, cwd=cwd, out=out.fileno(), errors=errors.fileno()), limit_s)
        return subprocess.CompletedProcess(args, status, said_in(out), said_in(errors))


def said_in(file) -> str:
    """All text of an open file."""
    file.seek(0)
    return file.read().decode()


def rank_main(rank: int, size: int, port: int, work, arguments: tuple) -> None:
    """One rank of `on_ranks`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    world = tg.World.from_env(os.environ)
    try:
        work(world, *arguments)
    finally:
        world.leave()


def on_ranks(size: int, work, *arguments) -> None:
    """Runs `work(world, *arguments)`, a function of a test module, on `size` gloo processes; raises what a rank raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked ranks need no second import of torch, which takes longer than most of what they do. CUDA does not outlive a fork.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(rank_main, (size, port, work, arguments), nprocs=size, start_method=method)
