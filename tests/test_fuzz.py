"""Whatever comes in ends in one sentence: command lines, environments and files of strangers, valid, nearly valid and
absurd. The status is 0, 2 with one line on standard error, or 1 where a tool says so; never a traceback or a hang, and
no file that was there is lost or changed. Runs end where training would begin.

2,000 cases, the same each time, take about 40 s on one core; FUZZ_CASES=20000 draws as many new ones:
    FUZZ_CASES=20000 python -m pytest -n0 tests/test_fuzz.py
"""
from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import struct
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from conftest import TINY, write_dataset
from support import SMALL, WORLD, dataset, found_of, settings, stream, t

CASES, LIMIT_S = int(os.environ.get("FUZZ_CASES", 2000)), 30
HOME = Path(tempfile.gettempdir()) / f"fuzz.{os.getpid()}"    # of all cases; examples need it before any fixture
KNOBS = {n.upper(): str(int(v) if isinstance(v, bool) else v) for n, v in SMALL.items()} | dict(
    RECIPE="record", SCORES="quantized,sliding", DATA_PATH=str(HOME / "shards"), LOGS_DIR="logs", DATA_DIR="data")
BYTES = os.fsdecode(b"\xff\xfe")    # a name that is not UTF-8


PHASES = [Phase.explicit, Phase.generate]


def share(percent: int):
    """Settings of a test that gets so many of a hundred cases."""
    return limits(max_examples=max(1, CASES * percent // 100), deadline=None, database=None, report_multiple_bugs=False,
                  derandomize="FUZZ_CASES" not in os.environ, phases=PHASES, suppress_health_check=[*HealthCheck])


class Hang(BaseException):
    """A case took too long; nothing catches it on its way."""


def alarm(*_) -> None:
    """Answers the timer."""
    raise Hang(f"no end after {LIMIT_S} s")


def tree(folder: Path) -> dict[str, tuple]:
    """Path -> what stands there, of all that is in a folder."""
    return {str(p): (p.lstat().st_mode, os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else b"")
            for p in folder.rglob("*")}


def furnish(folder: Path) -> None:
    """Paths of every kind."""
    for name in ("folder", "empty", "a b", "a\nb", BYTES):
        (folder / name).mkdir()
    for name in ("file", "folder/note.txt", "docs.jsonl", "cut.model"):
        (folder / name).write_text('{"text": "some words"}\n' * 3)
    for name, target in (("link", "nowhere"), ("loop", "loop"), ("good", "folder")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    (folder / "closed").touch(mode=0)


PATHS = st.sampled_from(["folder", "empty", "a b", "a\nb", BYTES, "file", "docs.jsonl", "cut.model", "link", "loop", "good",
                         "pipe", "closed", "", ".", "missing", "missing/far", "file/below", "link/below", "n" * 300,
                         "é" * 150, "/dev/null", "/proc/nowhere", " ", "a\rb", "\x1b[2J", "~", "$HOME", "-", "--"])


@contextlib.contextmanager
def case():
    """A furnished folder, the current one within the block, that goes away afterwards."""
    before, folder = os.getcwd(), Path(tempfile.mkdtemp(dir=HOME))
    os.chdir(folder)
    try:
        furnish(folder)
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def ends(arguments, env, statuses=(0, 2), mine=r"^$") -> int:
    """The exit status of the command line, after all that is promised of it was checked; it may change files whose
    names match `mine`."""
    env, out, error = {n: v for n, v in env.items() if v is not None}, io.StringIO(), io.StringIO()
    before, usage = tree(Path()), False
    timer = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = t.main([str(a) for a in arguments], env)
    except SystemExit as end:    # of argparse
        status, usage = end.code, True
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, timer)
    said = error.getvalue()
    assert status in statuses and "Traceback" not in said, (status, said)
    if status == 2 and not usage:
        assert said.startswith("train_gpt.py: error") and said[-1] == "\n" and said[:-1].isprintable(), said
    assert not usage or status == 0 or "error: " in said, said
    after = tree(Path())
    lost = [name for name, what in before.items() if after.get(name) != what and not re.search(mine, name)]
    assert not lost, (lost, said)
    return status


@pytest.fixture(scope="module", autouse=True)
def world():
    """What takes long is replaced: training, corpora, packing, other processes; nothing joins a group."""
    HOME.mkdir()
    write_dataset(HOME / "shards", t.Hyperparameters(**TINY))
    with pytest.MonkeyPatch.context() as patch:
        (HOME / "tiny.py").write_text("x = 1\n")
        patch.setattr(t, "SCRIPT", str(HOME / "tiny.py"))    # what verify packs again
        patch.setattr(t, "run", go_on)
        patch.setattr(t, "measured_scores", lambda *_, **__: {})
        installed = [types.SimpleNamespace(name=name, version="1") for name in ("torch", None)]
        patch.setattr(t.importlib.metadata, "distributions", lambda: installed)    # one is broken, as pip may leave it
        patch.setattr(t, "tune_process", lambda device: None)
        patch.setattr(t, "build_corpus", lambda *_: HOME / "shards")
        patch.setattr(t, "pack_source", packed)
        patch.setattr(t.dist, "init_process_group", no_group)
        patch.setattr(t, "subprocess", types.SimpleNamespace(run=other_process, Popen=other_process, PIPE=-1))
        yield
    shutil.rmtree(HOME)


def no_group(*_, **__) -> None:
    """What torch says of a group that nobody answers for."""
    raise RuntimeError("no one there")


def go_on(h, world, log, data, data_s) -> None:
    """A run that restores its checkpoint, if it has one, and ends."""
    if t.checkpoints(log.folder):
        saves = t.Checkpoints(TRAINER[0], t.Clock(world), log.folder)
        try:
            saves.resume(log)
        finally:
            t.restore_signals(saves.before)


def packed(source: str, block: str = "") -> bytes:
    """A packed script of the same text, made in no time."""
    ast.parse(t.shipped(source))
    code = t.UNPACKER.replace(b"CODER", b"lzma")
    return t.PACKED + code % t.literal(lzma.compress(b"x = 1\n", lzma.FORMAT_ALONE))


SAID = [""]    # what a process that verify starts will print


class Ended:
    """A process that said something and ended well."""

    returncode = 0

    def __init__(self):
        """What it said, line by line."""
        self.stdout = SAID[0].splitlines(keepends=True)

    def __enter__(self):
        """Itself."""
        return self

    def __exit__(self, *error):
        """Nothing."""

    def wait(self) -> int:
        """Its status."""
        return 0

    terminate = kill = wait


def other_process(*_, **__) -> Ended:
    """A process that ends well."""
    return Ended()


# --------------------------------------------------------------------------------------- environments
WORDS = sorted({word for f in t.KNOBS.values() for word in re.findall(r"\w+", f.metadata["meaning"])})
VALUES = st.one_of(
    st.sampled_from([
        "", " ", "0", "1", "-1", "1_0", "_", "0x10", "1e400", "-1e400", "nan", "inf", "-inf", "1e3", str(2**64), str(2**53),
        str(-2**63), "9" * 5000, "٣", "½", "true", "TRUE", " False", "yes", "q,v,,", ",", "quantized,", ",ttt", "ttt ",
        "8@1", "16@1", "16@.5,8@1", "9" * 5000 + "@1", "1@0.٣", "16@1,", "a\nb", "a\r\nb", "\x1b[2J", BYTES, "𝟙", "{run_id}",
        "%s", "../x", "..", "a/b", "é" * 200, "x" * 300, "x\u2028y", "\x85"]),
    st.sampled_from(WORDS), st.text(st.characters(exclude_characters="\0"), max_size=6), PATHS,
    st.integers().map(str), st.integers(0, 40).map(str), st.floats().map(str), st.integers(0, 70).map(lambda n: str(1 << n)))
PLACES = [n for n in t.KNOBS if n.endswith(("_PATH", "_DIR"))]
NAMES = st.one_of(
    st.sampled_from([*t.KNOBS]), st.sampled_from([*t.OTHER_NAMES, *t.BUILT_IN, *t.IDLE, *t.ABSENT]),
    st.sampled_from(["RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]),
    st.sampled_from([*t.KNOBS]).map(lambda name: name[:-1] + name[-1:] * 2), st.sampled_from([*t.KNOBS]).map(str.lower),
    st.text(st.characters(exclude_characters="\0="), min_size=1, max_size=9), st.sampled_from(["MODEL_DIR", "LOG_DIR", "SEEDS"]))
RECIPE_TEXTS = st.one_of(VALUES, st.lists(st.sampled_from([*t.RECIPES, "", " demo", "DEMO", "demo2"]), max_size=4).map(",".join))
POINTS = st.lists(st.one_of(st.sampled_from(["1", "2", "quantized", "demo", "", "q,v"]), VALUES), max_size=4)
AXIS = st.builds(lambda name, points, bar, end: f"{name}={bar.join(points)}{end}", st.one_of(st.sampled_from([*t.KNOBS]), NAMES),
                 POINTS, st.sampled_from(",|"), st.sampled_from(["", "|", ","]))
SWEEPS = st.one_of(VALUES, st.lists(AXIS, max_size=4).map(";".join), st.just(
    ";".join(f"{n}=" + ",".join(map(str, range(90))) for n in ("SEED", "WARMDOWN_ITERS", "EMBED_WD", "ADAM_WD", "MIN_LR"))))


@share(28)
@given(st.dictionaries(NAMES, VALUES, max_size=3))
@example({"TRAIN_SEQ_SCHEDULE": "9" * 5000 + "@1"})
@example({"DATA_PATH": "a\nb"})
def test_variables(changes):
    """Knobs of every type, names near to them or published, launchers."""
    with case():
        ends([], KNOBS | changes, mine="logs/")


@share(7)
@given(RECIPE_TEXTS, st.dictionaries(st.sampled_from([*t.KNOBS]), VALUES, max_size=1))
def test_recipes(recipe, changes):
    """Names of recipes, joined, odd or empty, with the knobs as they come."""
    with case():
        ends([], {n: KNOBS[n] for n in ("DATA_PATH", "LOGS_DIR", "DATA_DIR")} | dict(RECIPE=recipe) | changes)


@share(8)
@given(st.dictionaries(st.sampled_from([*PLACES, "RUN_ID"]), PATHS, min_size=1), st.booleans())
@example({"LOGS_DIR": "link"}, True)
@example({"LOGS_DIR": "loop"}, True)
def test_places(places, sidecar):
    """Folders and files of knobs that are others, missing, closed or oddly named."""
    with case():
        if not sidecar:
            shutil.copytree(HOME / "shards", "mine", ignore=shutil.ignore_patterns("*val_bytes*"))
        ends([], KNOBS | ({} if sidecar else dict(DATA_PATH="mine")) | places)


@share(8)
@given(SWEEPS, st.lists(st.sampled_from(["--print", "--nproc", "2", "0", "-1", "x", "9" * 5000]), max_size=3),
       st.dictionaries(st.sampled_from(["RECIPE", "RUN_ID", "LOGS_DIR", "RANK", "ITERATIONS"]), VALUES, max_size=2))
def test_sweeps(text, options, changes):
    """Grids of anything, none of which may be without end."""
    with case():
        ends(["sweep", *options], KNOBS | dict(SWEEP=text) | changes, (0, 1, 2))


# -------------------------------------------------------------------------------------- command lines
OPTIONS = dict(
    data=["--vocab", "--tokenizer", "--out", "--caseops", "--skip-bad", "--val", "--val-first"],
    submit=["--to", "--name", "--author", "--github-id", "--blurb", "--track", "--date", "--against"],
    verify=["--documents", "--text"], report=["--to"], sweep=["--print", "--nproc"], eval=[])
WORD = st.one_of(PATHS, st.sampled_from(["300", "-1", "0", "1e3", "9" * 5000, "%", "-h", "-x", "--nothing", "--out=", "1,2,3"]),
                 st.sampled_from(sum(OPTIONS.values(), [])), st.text(st.characters(exclude_characters="\0"), max_size=5))


@share(17)
@given(st.one_of(st.sampled_from([*OPTIONS, "--help", "-h", "help"]), WORD), st.lists(WORD, max_size=5), st.data())
@example("report", ["a\nb"], None)
@example("data", ["docs.jsonl", "--vocab", "280", "--out", "."], None)
@example("submit", ["runs", "--to=--"], None)
def test_command_lines(verb, words, data):
    """Every verb with options of its own and of others, without values, with paths of every kind."""
    if data and verb in OPTIONS and OPTIONS[verb]:
        for option in data.draw(st.lists(st.sampled_from(OPTIONS[verb]), max_size=4)):
            words = [*words, option, data.draw(WORD)]
    with case():
        ends([verb, *words], KNOBS, (0, 1, 2), mine=r"report\.(html|png)$")


# ---------------------------------------------------------------------------------------------- files
INT32 = st.one_of(st.sampled_from([t.SHARD_MAGIC, 1, 0, -1, 2**31 - 1, -2**31, 700]), st.integers(-2**31, 2**31 - 1))
RAW = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"\0" * 1024, b"{}", b"[]", b"null", b"[" * 99999, b"1" * 5000,
                                                         b'"\\ud800"', b"\xff\xfe", b"nan"]))


@st.composite
def damaged(draw, raw: bytes) -> bytes:
    """The bytes with some of them flipped, cut, doubled, or others."""
    raw = bytearray(raw)
    for kind in draw(st.lists(st.sampled_from("flip flip cut grow other".split()), min_size=1, max_size=3)):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        if kind == "flip" and raw:
            raw[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[place:]
        elif kind == "grow":
            raw[place:place] = draw(RAW)
        elif draw(st.integers(0, 3)) == 0:
            raw = bytearray(draw(RAW))
    return bytes(raw)


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, 1, -1, 2**53, 2**64, 10**400, -10**4000, "NEST", "", "x",
                                                              "a\0b", "\ud800", "a\nb", "$x^$", "../../x", "/dev/zero", "nan",
                                                              "\x1b[2J", 1e308, -1e308, 5e-324, [], {}, [[]], {"": 0}]),
    st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)).map(copy.deepcopy)    # `changed` goes on changing what it drew


@st.composite
def changed(draw, value) -> str:
    """The text of some JSON in which some values, anywhere, are others, more or gone."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        at = value
        while isinstance(at, (dict, list)) and at:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.integers(0, 3)) == 0:
                kind = draw(st.sampled_from("other other other gone more".split()))
                if kind == "gone":
                    del at[key]
                elif kind == "other":
                    at[key] = draw(JSON)
                elif isinstance(at, dict):
                    at[draw(st.text(max_size=4))] = draw(JSON)
                else:
                    at.append(draw(JSON))
                break
            at = at[key]
    return json.dumps(value).replace('"NEST"', "[" * 50_000 + "]" * 50_000)


@share(7)
@given(st.sampled_from(["train_000000", "train_000001", "val_000000", "val_bytes_000000"]),
       st.dictionaries(st.integers(0, 5), INT32, max_size=2), st.lists(st.tuples(st.integers(0, 700), st.integers(0, 65535)), max_size=3),
       st.one_of(st.none(), st.integers(0, 3000)), st.one_of(st.none(), RAW), st.booleans())
def test_shards(name, header, tokens, cut, manifest, alone):
    """Headers of any numbers, tokens of any size, files of any length, beside a manifest of anything."""
    with case():
        shutil.copytree(HOME / "shards", "mine")
        path = Path("mine") / f"fineweb_{name}.bin"
        words = np.fromfile(path, "<u2")
        for place, number in header.items():
            words[2 * place:2 * place + 2] = np.array([number], "<i4").view("<u2")
        for place, token in tokens:
            words[min(512 + place, len(words) - 1)] = token
        path.write_bytes(words.tobytes()[:cut])
        if manifest is not None:
            Path("mine/manifest.json").write_bytes(manifest)
        if alone:
            for other in {*Path("mine").glob("*.bin")} - {path}:
                other.unlink()
        ends([], KNOBS | dict(DATA_PATH="mine"))


MANIFEST = dict(builder=1, vocab_size=64, caseops=False, files={"fineweb_val_000000.bin": "0" * 64, "fineweb_train_000000.bin": ""})


@share(3)
@given(changed(MANIFEST))
@example(json.dumps(MANIFEST | dict(files={"/dev/zero": ""})))
def test_manifests(text):
    """What verb data would write, with other values in it."""
    with case():
        shutil.copytree(HOME / "shards", "mine")
        Path("mine/manifest.json").write_text(text)
        ends([], KNOBS | dict(DATA_PATH="mine"))


CHARACTERS = dict(config=dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, chars=[chr(40 + n) for n in range(60)]))
TOKENIZER = []    # the bytes of a model of 280 pieces


def tokenizer() -> bytes:
    """A SentencePiece model, made once."""
    if not TOKENIZER:
        path = Path(tempfile.mkdtemp(dir=HOME)) / "m.model"
        t.train_tokenizer(["some words of a text that has words, and words again"] * 9, 280, path)
        TOKENIZER.append(path.read_bytes())
    return TOKENIZER[0]


@share(4)
@given(st.one_of(changed(CHARACTERS).map(str.encode), st.none()), st.data())
def test_tokenizers(text, data):
    """JSON vocabularies with other values, SentencePiece models that are flipped or cut."""
    with case():
        shutil.copytree(HOME / "shards", "mine", ignore=shutil.ignore_patterns("*val_bytes*"))
        raw = text if text is not None else data.draw(damaged(tokenizer()))
        path = Path("v.json" if text is not None else "v.model")
        path.write_bytes(raw)
        V = 64 if text is not None else 280
        ends([], KNOBS | dict(DATA_PATH="mine", TOKENIZER_PATH=str(path), VOCAB_SIZE=str(V)))
        ends(["data", "docs.jsonl", "--vocab", V, "--tokenizer", path, "--out", "out"], {})


ROWS = st.one_of(st.binary(max_size=20), JSON.map(lambda v: json.dumps(dict(text=v)).encode()), st.just(b'{"text": "plain words"}'),
                 st.text(max_size=30).map(lambda v: json.dumps(dict(text=v)).encode()),
                 changed(dict(text="x", other=dict(a=[1]))).map(str.encode), RAW)


@share(8)
@given(st.lists(ROWS, max_size=6), st.sampled_from(["a.jsonl", "a.jsonl.zst", "a.txt", BYTES + ".jsonl", "a.json"]),
       st.sampled_from([[], ["--skip-bad"], ["--val-first", "1"], ["--val", "docs.jsonl"], ["--caseops"], ["--val-first", "-1"]]),
       st.booleans(), st.data())
def test_documents(rows, name, options, whole, data):
    """Rows of any bytes, packed whole or damaged; the folder is there in full or not at all."""
    with case():
        raw = b"\n".join(rows)
        if name.endswith(".zst"):
            raw = t.zstandard.ZstdCompressor().compress(raw)
        Path(name).write_bytes(raw if whole else data.draw(damaged(raw)))
        Path("t.model").write_bytes(tokenizer())
        status = ends(["data", name, *options, "--vocab", 280, "--tokenizer", "t.model", "--out", "out"], {})
        assert Path("out/manifest.json").exists() == (status == 0) and (status == 0 or not Path("out").exists())


ARTIFACT = {}    # coder -> header, streams


def artifact(coder: str = "zlib") -> tuple[dict, list[bytes]]:
    """The header and the streams of an artifact, made once."""
    if coder not in ARTIFACT:
        h = settings(compressor=coder, trellis_states=8, num_loops=0)
        model = t.GPT(h)
        blob = t.pack(h, t.quantise(model, found_of(model, 1)), quick=True)[0]
        _, _, lengths, first = t.read_header(blob, "artifact")
        header = lzma.decompress(blob[len(t.MAGIC) + 4:first], lzma.FORMAT_ALONE)
        body = io.BytesIO(blob[first:])
        ARTIFACT[coder] = json.loads(header), [body.read(n) for n in lengths]
    return ARTIFACT[coder]


def sealed(header: bytes, streams: list[bytes]) -> bytes:
    """An artifact with a right checksum."""
    coded = lzma.compress(header, lzma.FORMAT_ALONE, preset=0)
    blob = t.MAGIC + struct.pack("<I", len(coded)) + coded + b"".join(streams)
    return blob + hashlib.sha256(blob).digest()[:t.CHECKSUM_BYTES]


@share(8)
@given(st.sampled_from(["header", "streams", "rans", "lengths", "file", "whole"]), st.dictionaries(st.sampled_from([*t.KNOBS]), VALUES, max_size=1),
       st.data())
def test_artifacts(kind, changes, data):
    """Hostile headers and streams behind right checksums, damaged files, knobs beside them."""
    header, streams = artifact("rans" if kind in ("rans", "lengths") else "zlib")
    text, streams = json.dumps(header), [*streams]
    if kind == "header":
        text = data.draw(changed(header))
    elif kind in ("streams", "rans", "lengths"):
        n = data.draw(st.integers(0, len(streams) - 1))
        streams[n] = data.draw(damaged(streams[n]))
        if kind == "lengths":
            text = json.dumps(header | dict(streams=[len(s) for s in streams]))
    blob = sealed(text.encode(), streams)
    with case():
        Path("model.bin").write_bytes(data.draw(damaged(blob)) if kind == "file" else blob)
        ends(["eval", "model.bin"], {n: KNOBS[n] for n in ("DATA_PATH", "LOGS_DIR", "DATA_DIR")} | changes)


TRAINER = []    # the trainer that go_on restores, the bytes of a checkpoint


def checkpoint() -> tuple[t.Trainer, bytes]:
    """A trainer and its checkpoint, made once."""
    if not TRAINER:
        h = checkpointed()
        trainer = t.Trainer(h, WORLD, t.GPT(h), dataset(stream(3000)))
        folder = Path(tempfile.mkdtemp(dir=HOME))
        saves = t.Checkpoints(trainer, t.Clock(WORLD), folder)
        t.restore_signals(saves.before)
        saves.save(5)
        TRAINER.extend([trainer, t.checkpoints(folder)[0].read_bytes()])
    return TRAINER[0], TRAINER[1]


def checkpointed() -> t.Hyperparameters:
    """The hyperparameters of KNOBS, which save."""
    return t.Hyperparameters.from_env(KNOBS | dict(CHECKPOINT_EVERY_S="1"))


@share(5)
@given(st.booleans(), st.booleans(), st.data())
def test_checkpoints(right, two, data):
    """Damaged ones, and hostile JSON with a right hash, alone or before a good one."""
    _, blob = checkpoint()
    if right:
        head, rest = blob[:-32].split(b"\n", 1)
        text = data.draw(st.one_of(changed(json.loads(head)), changed(json.loads(head)[4])))
        body = text.encode() + b"\n" + data.draw(st.one_of(st.just(rest), damaged(rest)))
        bad = body + hashlib.sha256(body).digest()
    else:
        bad = data.draw(damaged(blob))
    with case():
        folder = Path("logs/r")
        folder.mkdir(parents=True)
        (folder / "checkpoint000000009.bin").write_bytes(bad)
        if two:
            (folder / "checkpoint000000005.bin").write_bytes(blob)
        ends([], KNOBS | dict(CHECKPOINT_EVERY_S="1", RUN_ID="r"), mine="log.txt")


# ----------------------------------------------------------------------------------- what runs leave
RUNS = []    # the folders of three finished runs


def finished() -> list[Path]:
    """Three runs that the tools accept, made once: of one real artifact, with made-up scores."""
    if not RUNS:
        header, streams = artifact()
        blob = sealed(json.dumps(header).encode(), streams)
        code = packed("x = 1\n")
        for seed in (1, 2, 3):
            h = settings(scores="quantized,sliding", seed=seed, run_id=f"s{seed}", compressor="zlib", trellis_states=8, num_loops=0)
            body = json.dumps(dict(knobs=header["knobs"] | h.changed(), coder=header["coder"],
                                   streams=header["streams"])).encode()
            blob, folder = sealed(body, streams), HOME / "runs" / f"s{seed}"
            folder.mkdir(parents=True)
            table = np.array([[30, 60, 100.25 + seed], [66, 132, 200.5]])
            targets, size, nats = table.sum(0)
            score = dict(val_loss=nats / targets, val_bpb=nats / size / np.log(2), tokens=int(targets), bytes=int(size),
                         seconds=1.5)
            total = len(blob) + len(code)
            result = dict(run_id=h.run_id, seed=seed, recipe="record", changed_knobs=h.changed(), knobs=t.asdict(h),
                          device="cpu", world_size=1, torch="2.0", params=9, steps=4, train_seconds=1.5, train_tokens=9,
                          tokens_per_second=9.5, bytes=dict(model=len(blob), code=len(code), total=total, limit=10**7),
                          scores=dict(quantized=score, sliding=score), seconds=dict(train=1.5, adaptation=0.5, total=9.0),
                          compliant=True, violations=[])
            lines = [f"knobs:{json.dumps(t.asdict(h))}", "step:4/4 train_loss:3.1000 train_time:1500ms step_avg:375.00ms",
                     "bytes:w_down 500 bits_per_weight:4.0", f"Total submission size rans: {total} bytes"]
            lines += [f"final_{n}_exact val_loss:{s['val_loss']:.8f} val_bpb:{s['val_bpb']:.8f} eval_time:1500ms"
                      for n, s in result["scores"].items()]
            for name in result["scores"]:
                rows = "".join(f"{row[0]:.0f} {row[1]:.0f} {row[2]:.6f}\n" for row in table)
                (folder / f"documents_{name}.txt").write_text("targets bytes nats\n" + rows)
            (folder / "log.txt").write_text("\n".join([*lines, f"RESULT {json.dumps(result)}", ""]))
            (folder / "result.json").write_text(json.dumps(result, indent=1))
            (folder / "model.bin").write_bytes(blob)
            (folder / "train_gpt.py").write_bytes(code)
            RUNS.append(folder)
    return RUNS


ABOUT = ["--name", "N", "--author", "A", "--github-id", "a"]
LINES = st.sampled_from([
    "bytes:x " + "9" * 5000, "bytes:x 9", "step:1/2 train_loss:1.2.3 train_time:5ms", "step:1/2 train_loss:. train_time:5ms",
    "step:1/2 val_loss:x val_bpb:inf train_time:" + "9" * 400 + "ms", "knobs:{", "knobs:" + "[" * 99999, "RESULT", "RESULT {}",
    "RESULT " + "[" * 99999, "RESULT 5", "final_quantized_exact val_loss: val_bpb:", "Total submission size x: 5 bytes"])
FOUND = st.one_of(st.just(""), st.text(max_size=9), st.one_of(RAW.map(lambda raw: raw.decode("latin-1")), changed(
    ["C1", True, "fine", "s1: "])).map(lambda text: f"FINDING {text}\n"))


def test_the_made_up_runs_are_accepted():
    """Else the cases below would all end at the first check."""
    with case():
        SAID[0] = 'FINDING ["C1", true, "fine", ""]\n'
        assert ends(["report", *finished(), "--to", "out"], {}) == 0
        assert ends(["submit", *finished(), "--to", "record", *ABOUT], {}) == 0
        assert ends(["verify", "record"], {}) == 0 and ends(["verify", finished()[0]], {}) == 0


@share(7)
@given(st.sampled_from(["result", "result", "log", "line", "table", "file", "entry", "none"]), st.booleans(), FOUND, st.data())
def test_what_runs_leave(kind, record, said, data):
    """Logs, results, tables, artifacts, scripts and submission.json with other values in them."""
    with case():
        SAID[0] = said
        home = Path("runs")
        shutil.copytree(finished()[0].parent, home)
        if record or kind == "entry":
            assert ends(["submit", *sorted(home.iterdir()), "--to", "record", *ABOUT], {}) == 0
        folder = home / "s1"
        log, result = folder / "log.txt", json.loads((folder / "result.json").read_text())
        if kind == "result":
            text = data.draw(changed(result))
            (folder / "result.json").write_text(text)
            log.write_text(re.sub("(?m)^RESULT .*$", lambda _: f"RESULT {text}", log.read_text()))
            if data.draw(st.booleans()):
                knobs = re.search('"knobs": ({.*?})', text)
                log.write_text(re.sub("(?m)^knobs:.*$", lambda _: f"knobs:{knobs and knobs[1]}", log.read_text()))
        elif kind == "log":
            log.write_bytes(data.draw(damaged(log.read_bytes())))
        elif kind == "line":
            line = data.draw(LINES)
            log.write_text(log.read_text() + line + "\n" if line.startswith(("knobs", "RESULT")) else f"{line}\n{log.read_text()}")
        elif kind == "table":
            rows = data.draw(st.lists(st.lists(st.one_of(VALUES, st.integers().map(str)), min_size=3, max_size=3).map(" ".join), max_size=3))
            for name in ("quantized", "sliding"):
                (folder / f"documents_{name}.txt").write_text("\n".join(["targets bytes nats", *rows]), errors="replace")
        elif kind == "file":
            path = data.draw(st.sampled_from(sorted(folder.iterdir())))
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        elif kind == "entry":
            Path("record/submission.json").write_text(data.draw(st.one_of(
                changed(json.loads(Path("record/submission.json").read_text())), JSON.map(json.dumps), st.just("[" * 99999))))
        if record and kind != "entry":    # the same in a records folder
            for path in folder.iterdir():
                name = {"log.txt": "train_seed1.log", "train_gpt.py": "train_gpt.py"}.get(path.name, f"{path.stem}_seed1{path.suffix}")
                if path.name.startswith("documents_"):
                    name = path.name.replace("documents_", "documents_seed1_")
                if path.name != "result.json":
                    shutil.copyfile(path, Path("record") / name)
        if record or kind == "entry":
            ends(["verify", "record"], {}, (0, 1, 2))
        else:
            ends(["verify", folder], {}, (0, 1, 2))
            ends(["report", home, "--to", "out"], {}, (0, 1, 2))
            ends(["submit", *sorted(home.iterdir()), "--to", "other", *ABOUT], {}, (0, 2))


@share(2)
@given(st.sampled_from(["--name", "--author", "--blurb", "--date", "--against", "--to"]), st.one_of(VALUES, st.lists(
    st.one_of(st.floats().map(str), st.integers(0, 9).map(str)), min_size=3, max_size=3).map(",".join)), st.sampled_from(
        ["s1", BYTES, "a $x^$ b", "é", "a\nb"]))
def test_what_people_say_of_runs(option, value, name):
    """Titles, authors, rivals and folders of any text."""
    with case():
        shutil.copytree(finished()[0].parent, "runs")
        if name != "s1":
            shutil.move("runs/s1", f"runs/{name}")
        ends(["submit", *sorted(Path("runs").iterdir()), "--to", "record", *ABOUT, f"{option}={value}"], {}, (0, 2))
        ends(["report", "runs", "--to", "out"], {}, (0, 2))
