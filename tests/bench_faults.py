"""Faults: kill -9 at random moments, damaged files, full and read-only disks, a rank that dies.

    python tests/bench_faults.py [--kills 200] [--mutations 10000] [--seed 1]

Runs are forked from this process, so that each takes seconds. Prints what happened and ends with
one line `BENCH {"kills", "corrupt", "lost", "mutations", "undetected"}`: files found broken under
their final name, results or checkpoints that a later start did not find or that were not made again
bit for bit, and damaged files that were read as if they were whole or ended in anything but the
clear error. About 16 minutes on one core.
"""
from __future__ import annotations

import argparse
import builtins
import faulthandler
import hashlib
import io
import json
import lzma
import mmap
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from conftest import TINY, clean_env, write_dataset
from conftest import tg as t

KNOBS = {n.upper(): v for n, v in TINY.items()} | dict(
    RECIPE="record", ITERATIONS=40, CHECKPOINT_EVERY_S=0.05, TRAIN_LOG_EVERY=4)


class Site:
    """A folder with shards and logs, and processes forked to work there."""

    def __init__(self, root: Path):
        """Makes the shards; the script is packed once for all runs."""
        self.root, self.logs = root, root / "logs"
        h = t.Hyperparameters(**TINY)
        self.data = write_dataset(root / "shards", h)
        files = {p.name: t.file_sha256(p) for p in self.data.iterdir()}
        (self.data / "manifest.json").write_text(json.dumps(dict(builder=1, files=files)))
        packed = t.pack_source(Path(t.__file__).read_text(), t.run_block(h.changed()))
        t.pack_source = lambda *_: packed    # takes longer than a whole run

    def start(self, name: str, size: int = 1, before=lambda: None, **knobs) -> list[int]:
        """Process ids of a run on `size` ranks; `before` is called in each new process."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(size):
            env = clean_env(**KNOBS | dict(RUN_ID=name, LOGS_DIR=self.logs, DATA_PATH=self.data) | knobs)
            if size > 1:
                env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=str(port))
            pids.append(os.fork())
            if not pids[-1]:
                self.work(name, rank, env, before)
        return pids

    def work(self, name: str, rank: int, env: dict, before) -> None:
        """The life of a forked process."""
        status = 70
        try:
            for descriptor, kind in ((1, "out"), (2, "err")):
                file = os.open(self.root / f"{name}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, descriptor)
            os.environ.update(env)
            faulthandler.register(signal.SIGQUIT)    # `finish` asks what hangs where it is
            before()
            status = t.main([], env)
        except BaseException:
            t.sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def said(self, name: str, rank: int = 0) -> str:
        """What a run wrote on standard error so far."""
        path = self.root / f"{name}.{rank}.err"
        return path.read_text() if path.exists() else ""


def finish(pids: list[int], limit_s: float = 300.0) -> list[int]:
    """Exit statuses, in the order of ranks; what runs over the limit, sixty times what a run takes
    on an idle core, writes its stack to standard error, is killed and says -9."""
    end_s, statuses = time.monotonic() + limit_s, {}
    while len(statuses) < len(pids):
        late = time.monotonic() > end_s
        for number in (signal.SIGQUIT, signal.SIGKILL) if late else ():
            for pid in set(pids) - set(statuses):
                os.kill(pid, number)
            time.sleep(1)
        for pid in set(pids) - set(statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


def broken_files(folder: Path) -> list[str]:
    """The files in a run's folder that are not whole under their final name."""
    broken = []

    def check(path: Path, whole) -> None:
        """Notes a file that is not as `whole` wants it."""
        try:
            good = whole(path)
        except (t.Refusal, ValueError):
            good = False
        if not good:
            broken.append(str(path))

    for path in t.checkpoints(folder):
        check(path, lambda p: hashlib.sha256(p.read_bytes()[:-32]).digest() == p.read_bytes()[-32:])
    for name, whole in (("model.bin", lambda p: t.unpack(p.read_bytes())),
                        ("train_gpt.py", lambda p: t.unpacked(p.read_bytes(), p)),
                        ("result.json", lambda p: t.read_run(folder)), ("log.txt", lambda p: p.read_text() is not None)):
        if (folder / name).exists():
            check(folder / name, whole)
    for path in folder.glob("documents_*.txt"):
        check(path, lambda p: len(t.read_documents_nats(p)))
    return broken


def kills(site: Site, count: int, size: int, rng: random.Random) -> dict[str, int]:
    """Kills `count` times; each run is killed up to four times, then let go to its end."""
    tally = dict(kills=0, corrupt=0, lost=0, runs=0, resumed=0, training=0, later=0)
    for name in ("first", "whole"):    # the first one reads libraries from the disk
        begin_s = time.monotonic()
        assert finish(site.start(f"{name}{size}", size)) == [0] * size, site.said(f"{name}{size}")
        takes_s = time.monotonic() - begin_s
    wanted = (site.logs / f"whole{size}" / "model.bin").read_bytes()
    while tally["kills"] < count:
        name = f"cut{size}-{tally['runs']}"
        tally["runs"] += 1
        folder = site.logs / name
        for _ in range(rng.randint(1, 4)):
            pids = site.start(name, size)
            time.sleep(rng.uniform(0, takes_s))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            tally["kills"] += -9 in finish(pids)
            tally["corrupt"] += len(broken_files(folder))
            tally["later" if (folder / "model.bin").exists() else "training"] += 1
            if (folder / "result.json").exists():
                break
        tally["lost"] += lost(site, name, size, wanted, tally)
        shutil.rmtree(folder)
        print(f"\r{size} rank(s): {tally}", end="", flush=True)
    print()
    return tally


def lost(site: Site, name: str, size: int, wanted: bytes, tally: dict[str, int]) -> int:
    """1 where a finished run was touched, or an unfinished one did not go on from its newest
    checkpoint to the artifact of an uninterrupted run, or left a file broken."""
    folder = site.logs / name
    finished = (folder / "result.json").exists()
    before = (folder / "result.json").read_bytes() if finished else b""
    newest = [int(p.stem.removeprefix("checkpoint")) for p in t.checkpoints(folder)][-1:]
    statuses = finish(site.start(name, size))
    if finished:
        return int(statuses[0] != 2 or "was used before" not in site.said(name) or
                   (folder / "result.json").read_bytes() != before)
    resumed = [int(s) for s in re.findall(r"^resumed:step (\d+) ", (folder / "log.txt").read_text(), re.M)][-1:]
    tally["resumed"] += bool(newest)
    good = (statuses == [0] * size and (not newest or resumed == newest) and
            (folder / "model.bin").read_bytes() == wanted and not broken_files(folder))
    if not good:
        print(f"\n{name}: status {statuses}, newest {newest}, resumed {resumed}, {broken_files(folder)}")
        for rank in range(size):
            print(f"rank {rank}: {site.said(name, rank)[-3000:]}")
    return int(not good)


def one_rank_dies(site: Site, count: int, rng: random.Random) -> tuple[float, int]:
    """(slowest exit in s, times that a survivor did not end by itself and name the dead rank)."""
    slowest_s, unnamed = 0.0, 0
    for number in range(count):
        name, victim = f"dies{number}", number % 2
        pids = site.start(name, 2, ITERATIONS=100000)
        while not (site.root / f"{name}.0.out").exists() or "step:4/" not in (site.root / f"{name}.0.out").read_text():
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(pids[victim], signal.SIGKILL)
        begin_s = time.monotonic()
        statuses = finish(pids, 30)
        slowest_s = max(slowest_s, time.monotonic() - begin_s)
        good = statuses[1 - victim] == 2 and f"lost: [{victim}]" in site.said(name, 1 - victim)
        if not good:
            print(f"{name}: {statuses} {site.said(name, 1 - victim)[-500:]}")
        unnamed += not good
        shutil.rmtree(site.logs / name)
    return slowest_s, unnamed


class Full(io.FileIO):
    """A file on a disk that is full after half of what is written to it."""

    def write(self, data) -> int:
        """Writes half, then fails."""
        super().write(bytes(data)[:len(data) // 2])
        raise OSError(28, "No space left on device")


def fail_at(number: int, folder: Path, kind: str):
    """A `before` that lets the number-th write into `folder` fail, counted from 1."""
    true_open, seen = builtins.open, mmap.mmap(-1, 8)    # which parent and child share

    def opening(path, mode="r", *rest, **options):
        """open, which fails for one write."""
        if isinstance(path, (str, Path)) and Path(path).is_relative_to(folder) and set(mode) & set("wax+"):
            count = int.from_bytes(seen[:8], "big") + 1
            seen[:8] = count.to_bytes(8, "big")
            if count == number and kind == "read-only":
                raise OSError(30, "Read-only file system")
            if count == number:
                buffered = io.BufferedWriter(Full(path, mode.replace("b", "")))
                return buffered if "b" in mode else io.TextIOWrapper(buffered, "utf-8")
        return true_open(path, mode, *rest, **options)

    def before() -> None:
        """Takes the place of open in the new process."""
        builtins.open = opening

    return before, seen


def bad_disks(site: Site, step: int) -> tuple[int, int]:
    """(writes that failed, times that this had not one clear sentence and whole files)."""
    failed = wrong = 0
    for kind in ("full", "read-only"):
        number = 1
        while True:
            name = f"disk-{kind}-{number}"
            before, seen = fail_at(number, site.logs / name, kind)
            (status, ) = finish(site.start(name, 1, before, ITERATIONS=6, CHECKPOINT_EVERY_S=0.001))
            folder = site.logs / name
            if int.from_bytes(seen[:8], "big") < number:
                break    # the run has fewer writes
            error = site.said(name)    # a file that is only locked can stand a full disk
            good = status == 0 or (status == 2 and len(error.splitlines()) == 1 and ("No space" in error or "Read-only" in error) and
                    not broken_files(folder) and not [*folder.glob(".*.partial")])
            if not good:
                print(f"\n{name}: status {status} {error[-800:]} {broken_files(folder)}")
            failed, wrong, number = failed + 1, wrong + (not good), number + step
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{kind}: {number - 1} writes")
    for limit in (3000, 20_000, 60_000, 200_000):    # a true limit of the system on every file
        name = f"limit-{limit}"
        (status, ) = finish(site.start(name, 1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                                       ITERATIONS=6, CHECKPOINT_EVERY_S=0.001))
        good = status == 2 and "File too large" in site.said(name).splitlines()[-1] and not broken_files(
            site.logs / name)
        if status:
            failed, wrong = failed + 1, wrong + (not good)
        if status and not good:
            print(f"{name}: {site.said(name)[-800:]}")
    return failed, wrong


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """A flipped bit, a cut, bytes put in, a stretch overwritten, or a piece repeated."""
    at, kind = rng.randrange(len(raw)), rng.randrange(5)
    if kind == 0:
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
    if kind == 1:
        return raw[:at]
    junk = rng.randbytes(rng.randint(1, 64))
    return raw[:at] + junk + raw[at + (0 if kind == 2 else len(junk)):] if kind < 4 else raw + raw[at:]


def resigned(raw: bytes, rng: random.Random) -> bytes:
    """An artifact with a header or streams changed by somebody who also corrects the checksum."""
    body, first = raw[:-t.CHECKSUM_BYTES], len(t.MAGIC) + 4
    (length, ) = struct.unpack_from("<I", body, len(t.MAGIC))
    header = json.loads(lzma.decompress(body[first:first + length]))
    if rng.random() < 0.6:
        place = header["knobs"] if rng.random() < 0.7 else header
        place[rng.choice([*place])] = rng.choice([
            0, -1, 1, 3, 1 << 40, 1e300, float("nan"), "", "x", None, [], [1] * 9, {}, True, "os.system('false')"])
        packed = lzma.compress(json.dumps(header).encode(), lzma.FORMAT_ALONE)
        body = t.MAGIC + struct.pack("<I", len(packed)) + packed + body[first + length:]
    else:
        streams = bytearray(body)
        for _ in range(rng.randint(1, 8)):
            streams[rng.randrange(first + length, len(streams))] = rng.randrange(256)
        body = bytes(streams)
    return body + hashlib.sha256(body).digest()[:t.CHECKSUM_BYTES]


class Watch:
    """Counts what no reader of data may do."""

    def __init__(self):
        """Listens from now on."""
        self.events = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        """Notes an execution, a process, a socket or an unpickling."""
        if event in ("exec", "compile", "os.system", "pickle.find_class") or event.startswith(
                ("subprocess.", "socket.", "os.exec", "os.posix_spawn")):
            self.events.append((event, str(arguments)[:80]))


def mutations(site: Site, count: int, rng: random.Random) -> tuple[int, int]:
    """(mutations read, those that were taken for whole or ended in another error than `Refusal`)."""
    raw = (site.logs / "whole1" / "model.bin").read_bytes()
    h = t.Hyperparameters(**TINY | dict(data_path=str(site.data)))
    silent = t.Log(t.World(), quiet=True)
    t.unpack(raw), t.find_dataset(h, t.World(), silent)    # imports and tables before the watch
    watch, before_kb, bad = Watch(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    names = sorted(p.name for p in site.data.glob("*.bin"))
    for number in range(count):
        signed = False
        try:
            if number % 3 < 2:    # the artifact: half of them with a corrected checksum
                signed = number % 3 == 1
                changed = resigned(raw, rng) if signed else mutate(raw, rng)
                if changed == raw:
                    continue
                t.unpack(changed)
            else:
                damage_shard(site.data / rng.choice(names), rng, lambda: t.find_dataset(h, t.World(), silent))
        except t.Refusal:
            continue
        except Exception as error:    # a crash: anything but the clear error
            print(f"mutation {number}: {type(error).__name__}: {error}")
            bad += 1
            continue
        # Who corrects the checksum has made another artifact, which may be read, but not crash.
        bad += not signed
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1e3
    print(f"mutations: {count}, memory grew by {grown_mb:.0f} MB, executed: {watch.events or 'nothing'}")
    return count, bad + len(watch.events) + (grown_mb > 500)


def damage_shard(path: Path, rng: random.Random, read) -> None:
    """Reads the data set with one shard damaged, which is then made good again. Of a training shard
    the header and the length are damaged: its tokens have no checksum, and no score reads them."""
    raw = path.read_bytes()
    if "train" in path.name:
        field = rng.randrange(4)
        value = struct.pack("<i", rng.randrange(-2**31, 2**31))
        damaged = raw[:rng.randrange(len(raw))] if field == 3 else raw[:4 * field] + value + raw[4 * field + 4:]
    else:
        damaged = mutate(raw, rng)
    if damaged == raw:
        raise t.Refusal("nothing was changed")
    try:
        path.write_bytes(damaged)
        read()
    finally:
        path.write_bytes(raw)


def main() -> None:
    """All of it, then the table and the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="three of four on one rank, the rest on two")
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=8, help="times that one of two ranks dies")
    parser.add_argument("--stride", type=int, default=1, help="every so many-th write fails")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, begin_s = random.Random(options.seed), time.monotonic()
    print(f"{t.device_name(torch.device('cpu'))}, torch {torch.__version__}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as root:
        site = Site(Path(root))
        two = kills(site, options.kills - options.kills * 3 // 4, 2, rng)
        one = kills(site, options.kills * 3 // 4, 1, rng)
        slowest_s, unnamed = one_rank_dies(site, options.ranks, rng)
        failed, wrong = bad_disks(site, options.stride)
        count, undetected = mutations(site, options.mutations, rng)
    print(f"\n{'kill -9':28} {'one rank':>9} {'two ranks':>9}")
    for key in one:
        print(f"{key:28} {one[key]:9} {two[key]:9}")
    print(f"one of two ranks killed: {options.ranks} times, slowest exit {slowest_s:.1f} s, unnamed {unnamed}")
    print(f"failed writes: {failed}, without the clear error or with a broken file: {wrong}")
    print(f"{time.monotonic() - begin_s:.0f} s")
    print("BENCH " + json.dumps(dict(kills=one["kills"] + two["kills"], corrupt=one["corrupt"] + two["corrupt"] + wrong,
                                     lost=one["lost"] + two["lost"] + unnamed, mutations=count,
                                     undetected=undetected)))


if __name__ == "__main__":
    main()
