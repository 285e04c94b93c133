"""The verb data with --published: a stand-in of the hub serves a small export to the real huggingface_hub."""

import http.server
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train_gpt as c

REPO_NAME, COMMIT = "somebody/some-golf", "c0" * 20
BYTE_TOKENIZER = dict(config=dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_offset=4, byte_count=256))


class Hub(http.server.BaseHTTPRequestHandler):
    """What `hf_hub_download` asks of the hub: HEAD and GET of a file of a data set, whole or from a place on."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """A file, or the status that `server.wrong` has for its path."""
        files, server = self.server.files, self.server
        found = re.fullmatch(f"/datasets/{REPO_NAME}/resolve/(main|{COMMIT})/(.*)", urllib.parse.unquote(self.path))
        name = found[2] if found else ""
        server.asked.append((self.command, name))
        status = server.wrong.get(name) or (200 if name in files else 404)
        body = files[name] if status == 200 else b""
        start = int(re.sub(r"\D", "", self.headers.get("Range") or "") or 0)
        self.send_response(206 if start and status == 200 else status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(body)}-{name}"'.replace("/", "-"))
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            for place in range(start, len(body), server.chunk):
                time.sleep(server.pause_s)
                self.wfile.write(body[place:place + server.chunk])
                if server.cuts and len(body) // 2 < place < len(body) - server.chunk:
                    server.cuts -= 1
                    self.close_connection = True
                    return

    do_HEAD = do_GET

    def log_message(self, *_):
        """Says nothing."""


class Server(http.server.ThreadingHTTPServer):
    """The hub, with what a test sets; one that goes away in the middle is no error."""

    def handle_error(self, *_):
        """Clients are killed here."""


def export() -> dict[str, bytes]:
    """The files of a small export: two data sets, one of them of bytes, three training shards each."""
    files, folder = {}, "datasets/datasets/fineweb10B_"
    rng = np.random.default_rng(0)
    header = lambda count: np.array([20240520, 1, count] + [0] * 253, "<i4").tobytes()
    for name, V in (("sp1024", 1024), ("byte260", 260)):
        for side, count in (("val", 2), ("train", 3)):
            for number in range(count):
                tokens = rng.integers(4, V, 3000 + 100 * number).astype("<u2")
                tokens[::50] = 1
                files[f"{folder}{name}/fineweb_{side}_{number:06d}.bin"] = header(len(tokens)) + tokens.tobytes()
    files["datasets/tokenizers/fineweb_1024_bpe.model"] = rng.bytes(5000)
    files["datasets/tokenizers/fineweb_1024_bpe.vocab"] = b"<unk>\t0\n" * 100
    files["datasets/tokenizers/fineweb_pure_byte_260.json"] = json.dumps(BYTE_TOKENIZER).encode()
    stats = dict(files_train=3, files_val=2)
    files["datasets/manifest.json"] = json.dumps(dict(
        datasets=[dict(name="fineweb10B_sp1024", path="datasets/fineweb10B_sp1024", tokenizer_name="sp_bpe_1024", stats=stats),
                  dict(name="fineweb10B_char", tokenizer_name="char", stats=stats),
                  dict(name="fineweb10B_byte260", tokenizer_name="pure_byte_260", stats=stats)],
        tokenizers=[dict(name="sp_bpe_1024", model_path="tokenizers/fineweb_1024_bpe.model",
                         vocab_path="tokenizers/fineweb_1024_bpe.vocab"),
                    dict(name="pure_byte_260", path="tokenizers/fineweb_pure_byte_260.json")])).encode()
    return files


def forget_hub() -> None:
    """The next import of huggingface_hub reads the environment anew."""
    for name in [n for n in sys.modules if n.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def server():
    """The stand-in, to which HF_ENDPOINT points."""
    server = Server(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.delenv("HF_TOKEN", raising=False)
        forget_hub()
        yield server
    forget_hub()
    server.shutdown()


@pytest.fixture
def hub(server):
    """The stand-in with a sound export, quick, and nothing asked."""
    server.files, server.asked, server.wrong = export(), [], {}
    server.chunk, server.pause_s, server.cuts = 1 << 20, 0, 0
    return server


def fetch(out: object, name: str = "sp1024", *more: object) -> int:
    """The exit status of the verb in this process."""
    return c.main(["data", "--published", name, "--repo", REPO_NAME, "--out", str(out), *map(str, more)], {})


def below(out: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def published(hub, name: str = "sp1024", shards: int = 3) -> dict[str, bytes]:
    """What a fetch of the export has to leave."""
    V = re.sub(r"\D", "", name)
    return {path.removeprefix("datasets/"): body for path, body in hub.files.items()
            if f"_{name}/fineweb_" in path and not re.search(rf"train_00000[{shards}-9]", path)
            or re.search(rf"/tokenizers/.*_{V}[_.]", path)}


def fetched(hub) -> list[str]:
    """The names of the files that were asked for by GET."""
    return [name.rpartition("/")[2] for command, name in hub.asked if command == "GET"]


def test_a_whole_fetch_and_the_command_to_train_on_it(hub, tmp_path, capsys, tiny):
    """Equal bytes in the official places, nothing else left; a run takes it with the knobs of the last line."""
    out = tmp_path / "my data"
    assert fetch(out, "byte260") == 0
    assert below(out) == published(hub, "byte260") and len(below(out)) == 6
    said = capsys.readouterr()
    assert re.search(r"^data: 6 of 6 files, 0\.0 MB fetched, [\d.]+ MB/s, 0 s left$", said.out, re.M) and not said.err
    command = shlex.split(said.out.splitlines()[-1].removeprefix("data: train on it with "))
    assert command[:2] == ["VOCAB_SIZE=260", f"DATA_DIR={out}"]
    assert command[2:5] == ["torchrun", "--standalone", "--nproc_per_node=8"] and Path(command[5]).samefile(c.__file__)
    data = c.find_dataset(replace(tiny, vocab_size=260, data_dir=str(out), corpus=""), c.World(), print)
    assert len(data.train) == 3 and data.byte_rule == "tokenizer fineweb_pure_byte_260.json"


def test_defaults_are_left_out_of_the_command(hub, tmp_path, capsys, monkeypatch):
    """sp8192 below ./data needs no knob."""
    monkeypatch.chdir(tmp_path)
    text = hub.files["datasets/manifest.json"].decode()
    hub.files |= {path.replace("1024", "8192"): body for path, body in hub.files.items()}
    hub.files["datasets/manifest.json"] = text.replace("1024", "8192").encode()
    assert c.main(["data", "--published=sp8192", "--repo", REPO_NAME], {}) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("data: train on it with torchrun --standalone")
    assert (tmp_path / "data/tokenizers/fineweb_8192_bpe.model").is_file()


def test_a_repository_with_another_root(hub, tmp_path):
    """Or with none: the manifest then lies at its top."""
    export = hub.files
    for root, prefix in (("some/where", "some/where/"), ("", "")):
        hub.files = {path.replace("datasets/", prefix, 1): body for path, body in export.items()}
        assert fetch(tmp_path / f"out{len(root)}", "sp1024", "--root", root) == 0
        assert len(below(tmp_path / f"out{len(root)}")) == 7


def test_shards_limit_training_only(hub, tmp_path, capsys):
    """Validation is always whole; more than there are is refused, and nothing is left."""
    assert fetch(tmp_path / "out", "sp1024", "--shards", 1) == 0
    assert below(tmp_path / "out") == published(hub, shards=1) and len(below(tmp_path / "out")) == 5
    for wrong in (0, -1, 4):
        assert fetch(tmp_path / "none", "sp1024", "--shards", wrong) == 2
        assert capsys.readouterr().err.count(f"{REPO_NAME}: manifest.json: --shards {wrong}: expected 1 to 3; ") == 1
    assert not below(tmp_path / "none")
    hub.asked.clear()
    assert fetch(tmp_path / "out", "sp1024", "--shards", 3) == 0
    assert below(tmp_path / "out") == published(hub)
    assert {name for name in fetched(hub) if name.endswith("bin")} == {"fineweb_train_000001.bin", "fineweb_train_000002.bin"}


def test_what_is_damaged_is_fetched_again(hub, tmp_path, capsys):
    """A cut shard, a wrong header and a changed tokenizer; whole shards are not touched."""
    assert fetch(tmp_path) == 0
    folder = tmp_path / "datasets/fineweb10B_sp1024"
    whole, cut, wrong = (folder / f"fineweb_train_00000{i}.bin" for i in range(3))
    before = whole.stat().st_ino, whole.stat().st_mtime_ns
    os.truncate(cut, 2000)
    wrong.write_bytes(b"x" + wrong.read_bytes()[1:])
    (tmp_path / "tokenizers/fineweb_1024_bpe.model").write_bytes(b"")
    hub.asked.clear(), capsys.readouterr()
    assert fetch(tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(rf"data: shard {cut}: 2000 bytes.*; it is fetched again", out)
    assert re.search(rf"data: shard {wrong}: magic number.*; it is fetched again", out) and str(whole) not in out
    assert below(tmp_path) == published(hub) and (whole.stat().st_ino, whole.stat().st_mtime_ns) == before
    assert sum(name.endswith("bin") for name in fetched(hub)) == 2


def test_connections_that_break_are_resumed(hub, tmp_path):
    """The library asks for the rest of a file."""
    hub.chunk, hub.cuts = 500, 1
    assert fetch(tmp_path, "sp1024", "--shards", 1) == 0
    assert below(tmp_path) == published(hub, shards=1) and len(fetched(hub)) == 6 + 1


@pytest.mark.parametrize("change, words", [
    (dict(name="sp4096"), r"manifest.json: --published sp4096: expected one of sp1024, byte260; "),
    (dict(name="char"), r"--published char: expected one of sp1024, byte260; "),
    (dict(wrong={"datasets/manifest.json": 404}), r"manifest.json: .*404.*; whole files stay, and the same command goes on from here$"),
    (dict(wrong={"datasets/manifest.json": 401}), r"manifest.json: .*401.*goes on"),
    (dict(wrong={"datasets/manifest.json": 429}), r"manifest.json: .*429.*goes on"),
    (dict(wrong={"datasets/datasets/fineweb10B_sp1024/fineweb_train_000001.bin": 404}),
     r"datasets/fineweb10B_sp1024/fineweb_train_000001.bin: .*404.*; whole files stay, and the same command goes on from here$"),
    (dict(files={"datasets/manifest.json": b"[1"}), r"manifest.json: .*JSONDecodeError"),
    (dict(files={"datasets/manifest.json": b'{"datasets": [{"name": "fineweb10B_sp1024"}]}'}), r"manifest.json: KeyError: 'stats'"),
    (dict(files={"datasets/datasets/fineweb10B_sp1024/fineweb_val_000001.bin": b"\1" * 1026}),
     r"fineweb10B_sp1024/fineweb_val_000001.bin: shard .*: magic number 16843009, expected 20240520; whole files stay"),
    (dict(more=["docs.jsonl", "--vocab", "512"]), r"data --published sp1024: does not go with docs.jsonl --vocab 512$"),
])
def test_refusals(hub, tmp_path, capsys, change, words):
    """One sentence that names repository and file, exit status 2; what came before stays, nothing half is left."""
    hub.files |= change.get("files", {})
    hub.wrong = change.get("wrong", {})
    assert fetch(tmp_path, change.get("name", "sp1024"), *change.get("more", [])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error.strip()), error
    assert REPO_NAME in error or "more" in change
    assert all(published(hub).get(path) == body for path, body in below(tmp_path).items())


def test_a_full_disk_is_one_sentence(hub, tmp_path, capsys, monkeypatch):
    """Also where the library itself finds it."""
    full = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr(c.os, "renames", full)
    assert fetch(tmp_path) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{REPO_NAME}: .*\.bin: .*No space left.*goes on from here\n$", error) and error.count("\n") == 1


def test_a_missing_library_is_one_sentence(tmp_path, capsys, monkeypatch):
    """It is not among the requirements of a run."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fetch(tmp_path) == 2
    assert "--published needs the package huggingface_hub (pip install huggingface-hub)" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", "1")])
def test_without_a_network_it_ends_at_once(hub, tmp_path, capsys, monkeypatch, name, value):
    """With the connection refused, or asked to stay offline; the second is also how a process of its own is told."""
    monkeypatch.setenv(name, value)
    forget_hub()
    begin_s = time.monotonic()
    assert c.main(["data", "--published", "sp8192", "--out", str(tmp_path / "out")], {}) == 2
    error = capsys.readouterr().err
    assert time.monotonic() - begin_s < 15 and error.count("\n") == 1
    assert re.search("willdepueoai/parameter-golf: manifest.json: .*; whole files stay, and the same command goes on", error), error
    assert not below(tmp_path)
    forget_hub()


def test_documents_still_ask_for_their_options(capsys):
    """Without --published nothing has changed."""
    with pytest.raises(SystemExit) as status:
        c.make_dataset(["--out", "x"])
    assert status.value.code == 2 and "required: files, --vocab" in capsys.readouterr().err


def killed_fetch(out: Path) -> None:
    """The verb, in a process that is killed."""
    sys.stdout = open(os.devnull, "w")
    os._exit(fetch(out))


def test_killed_at_any_moment_it_goes_on(hub, tmp_path):
    """Every file under its name is whole after each SIGKILL, and the last fetch leaves the export and nothing else."""
    kills, pick, torn = int(os.environ.get("TEST_KILLS", 8)), random.Random(0), 0
    want, hub.chunk = published(hub), 400
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # noqa: F401  (not in each process anew)
    for kill in range(kills + 1):
        hub.pause_s = 0.01 if kill < kills else 0
        hub.asked.clear()
        process = multiprocessing.get_context("fork").Process(target=killed_fetch, args=(tmp_path,))
        process.start()
        if kill < kills:
            deadline_s = time.monotonic() + 20
            while len(fetched(hub)) < 2 and time.monotonic() < deadline_s:    # the manifest is the first
                time.sleep(0.005)
            time.sleep(pick.uniform(0, 0.5))
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if kill < kills else 0)
        left = below(tmp_path)
        torn += any(path.endswith(".incomplete") for path in left)
        assert all(want[path] == body for path, body in left.items() if not path.startswith(".published_1024/"))
        if kill % 3 == 2 and kill < kills:    # so that the later ones have something to fetch as well
            shutil.rmtree(tmp_path / "datasets", ignore_errors=True)
    assert below(tmp_path) == want and torn > kills // 3
