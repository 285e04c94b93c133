"""Section 4: shards, batches, the validation set, the refusals of bad data; then the making of data from documents."""

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
import zstandard
from hypothesis import given, settings, strategies

import train_gpt as c
from conftest import REPO, random_tokens, write_dataset

# Larger documents, official tokenizers and the full CaseOps vectors, where somebody has them.
SHARED = REPO.parent / "shared" / "data"
SILENT = lambda line: None
CPU = torch.device("cpu")
ODD = list("ab zQ AB.\t\n\r_<s>0x41é日😀▁\u2582\U0010fffd\x00\x01\u0301\ufb01\u200b\ufeff\xa0\u3000½")
ODD += ["  ", "the ", "NASA ", *c.MARKERS, "\ue000", "\ue005"]


def odd_texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """`count` short random texts over letters, spaces, markers and awkward characters."""
    pick = random.Random(seed)
    return ["".join(pick.choices(ODD, k=pick.randrange(1, longest))) for _ in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[tuple[str, str]]:
    """(name, text) of the embedded documents, parsed once; no source is imported for it."""
    foreign = {"this", "antigravity", "idlelib", "turtle", "pydoc_data"} - set(sys.modules)
    found = c.embedded_documents()
    assert not foreign & set(sys.modules), "a source was imported"
    return found


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> Path:
    """The embedded corpus at V=1024, built once for all tests."""
    return c.embedded_corpus(tmp_path_factory.mktemp("cache"), 1024, SILENT)


@pytest.fixture(scope="session")
def lossless(embedded) -> spm.SentencePieceProcessor:
    """The tokenizer of the embedded corpus."""
    return c.load_tokenizer(embedded / "fineweb_1024_bpe.model", 1024, False)


@pytest.fixture(scope="session")
def lossy(tmp_path_factory, documents) -> Path:
    """A small tokenizer that normalises as the official ones do: runs of spaces are folded."""
    stem = tmp_path_factory.mktemp("lossy") / "lossy"
    text = [text for _, text in documents if text.startswith("a")]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(text).split("\n")), model_prefix=str(stem),
        model_type="bpe", vocab_size=500, byte_fallback=True, split_digits=True,
        normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, minloglevel=4)
    return stem.with_suffix(".model")


# ---------------------------------------------------------------------------------------- shards
def test_shard_inverse_and_layout(tmp_path):
    tokens = np.array([1, 2, 65535, 0], np.uint16)
    c.write_shard(tmp_path / "a.bin", tokens)
    raw = (tmp_path / "a.bin").read_bytes()
    assert len(raw) == 1024 + 8 and raw[:12] == b"\x88\xd84\x01\x01\0\0\0\x04\0\0\0"
    assert raw[1024:] == b"\x01\0\x02\0\xff\xff\0\0"
    back = c.read_shard(tmp_path / "a.bin")
    assert isinstance(back, np.memmap) and back.dtype == np.uint16 and (back == tokens).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(19, "No such device"), ValueError("mmap length")])
def test_a_shard_that_cannot_be_mapped_is_read(tmp_path, monkeypatch, error):
    """Some network and container file systems map no files."""
    c.write_shard(tmp_path / "a.bin", np.arange(1, 9))
    monkeypatch.setattr(c.np, "memmap", lambda *_: (_ for _ in ()).throw(error))
    assert c.read_shard(tmp_path / "a.bin").tolist() == list(range(1, 9))


def test_shard_refusals(tmp_path):
    path = tmp_path / "a.bin"
    shard_header = lambda count: np.array([20240520, 1, count] + [0] * 253, "<i4").tobytes()
    header = shard_header(2)
    bad_magic, bad_version = b"\1" + header[1:], header[:4] + b"\2" + header[5:]
    for raw, words in [(header + b"\0" * 3, "1027 bytes"), (header + b"\0" * 6, "1030 bytes"),
                       (bad_magic + b"\0" * 4, "magic number 20240385"),
                       (header[:900], "900 bytes"),
                       (bad_version + b"\0" * 4, "version 2"), (shard_header(0), "0 tokens"),
                       (shard_header(-5), "-5 tokens"), (b"", "0 bytes")]:
        path.write_bytes(raw)
        with pytest.raises(c.Refusal, match=words) as refusal:
            c.read_shard(path)
        assert str(path) in str(refusal.value)
    with pytest.raises(c.Refusal, match="no ordinary file"):
        c.read_shard(tmp_path / "none.bin")


def test_writer_splits_and_cleans_up(tmp_path):
    tokens = np.arange(2500)
    writer = c.ShardWriter(tmp_path / "x", limit=1000)
    for part in np.split(tokens, [10, 10, 1000, 1001, 2400]):
        writer.append(part)
    assert [path.name for path in writer.paths] == [f"x_{i:06d}.bin" for i in range(3)]
    shards = [c.read_shard(path) for path in writer.paths]
    assert [len(shard) for shard in shards] == [1000, 1000, 500] and writer.count == 2500
    assert (np.concatenate(shards) == tokens).all()
    writer = c.ShardWriter(tmp_path / "y", limit=1000)
    writer.append(tokens[:2000])
    assert [len(c.read_shard(path)) for path in writer.paths] == [1000, 1000]
    with pytest.raises(ZeroDivisionError), c.delivered(tmp_path / "z") as folder:
        c.ShardWriter(folder / "z").append(tokens)
        raise ZeroDivisionError
    assert not list(tmp_path.glob("*z*"))


# ------------------------------------------------------------------------------------------------------------ loader
@pytest.fixture
def wide(tiny) -> c.Hyperparameters:
    """The tiny model with a vocabulary as large as a shard allows."""
    return replace(tiny, vocab_size=65536)


def counted_shards(h: c.Hyperparameters, blocks: int, spare: int = 7) -> list[np.ndarray]:
    """Three shards of consecutive numbers, so that a token tells its place: `blocks` blocks, a target and a tail."""
    tokens = np.arange(blocks * h.micro_batch_tokens + 1 + spare, dtype=np.uint16)
    return np.split(tokens, [len(tokens) // 5, len(tokens) // 2])


def read_blocks(h: c.Hyperparameters, shards, ranks: int, count: int, start: int = 0) -> list[list[torch.Tensor]]:
    """The tokens of `count` steps, one row of each rank's blocks per step."""
    loaders = [c.Loader(h, c.World(rank, ranks), shards) for rank in range(ranks)]
    for loader in loaders:
        loader.position = start
    return [[loader.next() for loader in loaders] for _ in range(count)]


def identity(batch: c.Batch) -> tuple[int, ...]:
    """All tokens of a block."""
    return tuple(batch.ids.flatten().tolist())


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_block_comes_once_per_epoch(wide, ranks):
    """Over all ranks: every token of an epoch once, before any comes again; each epoch in another order."""
    shards, blocks = counted_shards(wide, 12), 12
    epochs = []
    loaders = [c.Loader(wide, c.World(rank, ranks), shards) for rank in range(ranks)]
    for _epoch in range(3):
        batches = [loader.next() for _ in range(blocks // ranks) for loader in loaders]
        tokens = torch.cat([b.ids.flatten() for b in batches])
        assert len(tokens.unique()) == len(tokens) == blocks * wide.micro_batch_tokens
        assert all(b.ids.shape == (4, 16) and b.ids.dtype == torch.int64 for b in batches)
        epochs.append([identity(b) for b in batches])
    assert len({tuple(e) for e in epochs}) == 3
    single = c.Loader(wide, c.World(), [np.arange(12 * 64 + 1, dtype=np.uint16)])
    places = [int(single.next().ids[0, 0]) for _ in range(12)]
    assert places != sorted(places) == list(range(0, 12 * 64, 64)), "blocks come in a drawn order"


def test_targets_are_the_next_tokens(wide):
    """Across rows, blocks and the ends of shards, in the order in which the epoch laid the shards."""
    shards = counted_shards(wide, 12)
    loader = c.Loader(wide, c.World(), shards)
    for _ in range(36):
        batch = loader.next()
        stream = np.concatenate(loader.stream)
        after = dict(zip(stream[:-1].tolist(), stream[1:].tolist()))
        assert [after[i] for i in batch.ids.flatten().tolist()] == batch.targets.flatten().tolist()


def test_ranks_share_one_sequence(wide):
    """Any number of ranks reads the same blocks at each step: block number position * size + rank."""
    shards = counted_shards(wide, 12)
    one = [identity(row[0]) for row in read_blocks(wide, shards, 1, 30)]
    for ranks in (2, 3):
        many = [identity(b) for row in read_blocks(wide, shards, ranks, 30 // ranks) for b in row]
        assert many == one


def test_the_order_follows_the_seed(wide):
    """Equal seeds read alike, another seed differently."""
    shards = counted_shards(wide, 40)
    first, again, other = ([identity(row[0]) for row in read_blocks(h, shards, 1, 50)]
                           for h in (wide, wide, replace(wide, seed=7)))
    assert first == again != other and set(first[:40]) != set(other[:40]), "another order of the shards moves the cuts"


def test_rewinding_gives_the_same_batches(wide):
    """`position` is the whole state: back and forth, also over the end of an epoch."""
    loader = c.Loader(wide, c.World(), counted_shards(wide, 12))
    first = [loader.next() for _ in range(20)]
    for position in (0, 5, 15, 3):
        loader.position = position
        for expected in first[position:position + 4]:
            batch = loader.next()
            assert torch.equal(batch.ids, expected.ids) and torch.equal(batch.targets, expected.targets)
            assert torch.equal(batch.docs.start, expected.docs.start)
    assert loader.position == 7


def test_errors_of_the_reading_thread_reach_the_step(wide, monkeypatch):
    """A shard that fails in mid-run stops the run, it does not hang or skip."""
    loader = c.Loader(wide, c.World(), counted_shards(wide, 12))
    loader.next()
    concurrent.futures.wait(loader.ahead.values())
    monkeypatch.setattr(loader, "tokens", lambda lo, count: 1 / 0)
    loader.next()
    with pytest.raises(ZeroDivisionError):
        loader.next()


def test_a_token_outside_the_vocabulary_is_refused_when_its_block_is_read(tiny):
    """However rare it is: a sample of a huge shard may have missed it."""
    shard = np.full(12 * tiny.micro_batch_tokens + 1, 5, np.uint16)
    shard[7 * tiny.micro_batch_tokens] = tiny.vocab_size
    loader = c.Loader(tiny, c.World(), [shard])
    with pytest.raises(c.Refusal, match=f"token {tiny.vocab_size} is outside VOCAB_SIZE={tiny.vocab_size}"):
        for _ in range(12):
            loader.next()


def test_too_few_tokens_are_refused(wide):
    """Less than one block for each rank."""
    shards = counted_shards(wide, 1)
    c.Loader(wide, c.World(), shards)
    with pytest.raises(c.Refusal, match="hold 72 tokens, too few for one .*MICRO_BATCH_TOKENS=64 on each of 2"):
        c.Loader(wide, c.World(0, 2), shards)


# ------------------------------------------------------------------------------------------------------------ pieces
def pieces_by_hand(row: list[int], longest: int) -> list[int]:
    """The first place of each token's piece, token by token."""
    starts, opened = [], 0
    for place, token in enumerate(row):
        if token == 1 or place - opened == longest:
            opened = place
        starts.append(opened)
    return starts


def test_pieces_are_cut_at_documents_and_at_the_longest_length(tiny):
    """By hand, and against a walk over random rows; a row's start always opens a piece."""
    row = np.array([[5, 6, 1, 7, 8, 9, 4, 4, 1, 1, 2, 3]])
    assert c.locate(row, 3, CPU).start.tolist() == [[0, 0, 2, 2, 2, 5, 5, 5, 8, 9, 9, 9]]
    assert c.locate(row, 12, CPU).start.tolist() == [[0, 0, 2, 2, 2, 2, 2, 2, 8, 9, 9, 9]]
    rows = np.stack([random_tokens(tiny, 50, seed) for seed in range(20)])
    for longest in (1, 4, 7, 50, 99):
        assert c.locate(rows, longest, CPU).start.tolist() == [pieces_by_hand(r.tolist(), longest) for r in rows]


def test_locate_bounds_the_pieces(tiny):
    """On CPUs the starts; for variable-length kernels the ends, padded with empty pieces, none longer than `longest`."""
    tokens = random_tokens(tiny, 128, 3)[None].astype(np.int64)
    docs = c.locate(tokens, 10, CPU)
    assert docs.bounds is None and docs.longest == 10 and docs.start.tolist() == [pieces_by_hand(tokens[0].tolist(), 10)]
    assert c.locate(tokens, 999, CPU).longest == 128
    gpu = c.locate(tokens, 10, torch.device("cuda"))
    bounds = gpu.bounds.tolist()
    assert bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] == 128 and gpu.bounds.dtype == torch.int32
    assert sorted(set(bounds)) == [*sorted(set(docs.start[0].tolist())), 128]
    assert max(np.diff(bounds)) <= 10 and len(bounds) & len(bounds) - 1 == 0


# -------------------------------------------------------------------------------------------------------- validation
def test_validation_keeps_every_token(tiny):
    """No dropped tail: each token but the first is a target, with its own bytes, in exactly one document."""
    tokens = random_tokens(tiny, 701, 2)
    val = c.Validation.of(tokens, np.arange(700, dtype=np.uint16))
    assert val.tokens.tolist() == tokens.tolist() and val.bytes.tolist() == list(range(700))
    assert val.documents.tolist() == [*np.flatnonzero(tokens[:-1] == 1), 700]
    tokens[0], tokens[-1] = 5, 1
    edge = c.Validation.of(tokens, np.zeros(700, np.uint16))
    assert edge.documents.tolist() == [0, *np.flatnonzero(tokens[:-1] == 1), 700], "a start at the very end opens nothing"


def test_find_dataset(tiny, tmp_path):
    """All shards of both sides, the sidecar's bytes of the targets, and how they were counted."""
    folder = write_dataset(tmp_path / "d", tiny)
    more = random_tokens(tiny, 50, 9)
    c.write_shard(folder / "fineweb_val_000001.bin", more)
    c.write_shard(folder / "fineweb_val_bytes_000001.bin", np.full(50, 3))
    data = c.find_dataset(replace(tiny, data_path=str(folder)), c.World(), SILENT)
    assert [len(s) for s in data.train] == [1666, 3334] and len(data.val.tokens) == 750
    first = c.read_shard(folder / "fineweb_val_000000.bin")
    assert data.val.tokens.tolist() == [*first, *more]
    assert data.val.bytes.tolist() == [*np.where(first == 1, 0, 1 + first % 5)[1:], *[3] * 50]
    assert data.byte_rule == "sidecar fineweb_val_bytes_000000.bin"
    by_default = tmp_path / "datasets" / "fineweb10B_sp64"
    by_default.parent.mkdir()
    folder.rename(by_default)
    assert len(c.find_dataset(replace(tiny, data_dir=str(tmp_path)), c.World(), SILENT).val.tokens) == 750


def test_bytes_by_the_tokenizer_where_there_is_no_sidecar(tiny, tmp_path, lossy):
    """The challenge's rule, from TOKENIZER_PATH or the official place under DATA_DIR."""
    h = replace(tiny, vocab_size=500, data_dir=str(tmp_path))
    folder = write_dataset(tmp_path / "d", h, sidecar=False)
    tokens = c.read_shard(folder / "fineweb_val_000000.bin").tolist()
    expected = rule_by_hand(spm.SentencePieceProcessor(model_file=str(lossy)), tokens)
    given = c.find_dataset(replace(h, data_path=str(folder), tokenizer_path=str(lossy)), c.World(), SILENT)
    assert given.val.bytes.tolist() == expected and given.byte_rule == "tokenizer lossy.model"
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "fineweb_500_bpe.model").write_bytes(lossy.read_bytes())
    found = c.find_dataset(replace(h, data_path=str(folder)), c.World(), SILENT)
    assert found.val.bytes.tolist() == expected and found.byte_rule == "tokenizer fineweb_500_bpe.model"


def edit(path: Path, place: int, raw: bytes) -> None:
    """Overwrites bytes of a file."""
    content = bytearray(path.read_bytes())
    content[place:place + len(raw)] = raw
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Drops the last three bytes of a file."""
    path.write_bytes(path.read_bytes()[:-3])


TRAIN, VAL, SIDECAR = "fineweb_train_000001.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"


@pytest.mark.parametrize("damage, words", [
    (lambda d: edit(d / TRAIN, 0, b"\1"), TRAIN + ": magic number 20240385, expected 20240520"),
    (lambda d: edit(d / VAL, 4, b"\7"), VAL + ": version 7, expected 1"),
    (lambda d: cut(d / TRAIN), TRAIN + ": 7689 bytes, but a header of 3334 tokens asks for 7692"),
    (lambda d: cut(d / VAL), VAL + ": 2421 bytes, but"),
    (lambda d: (d / VAL).write_bytes(b""), VAL + ": 0 bytes are too few"),
    (lambda d: edit(d / TRAIN, 2000, b"\x40\0"), TRAIN + ": token 64 is outside VOCAB_SIZE=64; shards and vocabulary do not"),
    (lambda d: edit(d / VAL, 1030, b"\0\x20"), VAL + ": token 8192 is outside VOCAB_SIZE=64"),
    (lambda d: c.write_shard(d / SIDECAR, np.ones(699)), SIDECAR + ": 699 byte counts for 700"),
    (lambda d: c.write_shard(d / VAL, np.full(700, 5)), VAL + r": no document start \(token 1\) among 700 tokens"),
    (lambda d: c.write_shard(d / VAL, np.ones(1)), VAL + r": no document start \(token 1\) among 1 tokens"),
    (lambda d: [c.write_shard(p, np.full(900, 5)) for p in d.glob("fineweb_train*")],
     r"fineweb_train_000000.bin: no document start \(token 1\) in the training shards, while validation has some"),
    (lambda d: (c.write_shard(d / VAL, [5, 1]), c.write_shard(d / SIDECAR, [0, 0])), "among 2 tokens, or none before the last"),
    (lambda d: c.write_shard(d / SIDECAR, np.zeros(700)), "every byte count is zero by sidecar " + SIDECAR),
    (lambda d: [p.unlink() for p in d.glob("fineweb_train*")], r"no file fineweb_train_\*.bin there"),
    (lambda d: (d / VAL).unlink(), r"no file fineweb_val_\*.bin there"),
    (lambda d: [p.unlink() for p in d.iterdir()], "DATA_PATH=.*: no file fineweb_train"),
    (lambda d: [c.write_shard(d / name.replace("000000", "000002"), np.ones(9)) for name in (VAL, SIDECAR)],
     r"DATA_PATH=.*d: its val files have the numbers \[0, 2\]; one is there twice, or missing"),
    (lambda d: [(d / name.replace(".", " (1).")).write_bytes((d / name).read_bytes()) for name in (VAL, SIDECAR)],
     r"the numbers \[0, 0\]"),    # as browsers name what comes again
    (lambda d: (d / SIDECAR).unlink(), "tokenizer .*fineweb_64_bpe.model: there is no ordinary file of this name")])
def test_bad_shards_are_refused(tiny, tmp_path, damage, words):
    """Before any training, with the file and what was expected of it."""
    folder = write_dataset(tmp_path / "d", tiny)
    damage(folder)
    with pytest.raises(c.Refusal, match=words):
        c.find_dataset(replace(tiny, data_path=str(folder), data_dir=str(tmp_path)), c.World(), SILENT)


def test_a_huge_training_shard_is_looked_at_in_blocks(tmp_path):
    """A few megabytes of whole blocks, of both ends and between, so that a network disk is not read as a whole."""
    looked = []

    class Shard(np.ndarray):
        """Tokens that note what is read of them."""

        def __getitem__(self, place):
            """The same, noted."""
            looked.append(place)
            return super().__getitem__(place)

    shard = np.full(20_000_000, 1, np.uint16).view(Shard)
    c.check_training({tmp_path: shard}, 64)
    assert all(place.step is None for place in looked) and looked[0].start == 0 and looked[-1].stop == len(shard)
    assert sum(place.stop - place.start for place in looked) * 2 <= 4 << 20
    for place in (0, 999_999, 524_288):
        small = np.full(1_000_000, 1, np.uint16)
        small[place] = 64
        with pytest.raises(c.Refusal, match="token 64 is outside VOCAB_SIZE=64"):
            c.check_training({tmp_path: small}, 64)


@pytest.mark.parametrize("text", ['{"version":"1","num_docs":1,"datasets":[],"tokenizers":[]}', "[]", "7", '"files builder"',
                                  '{"files": [], "builder": 1}', "{", "\xff", "[" * 100_000, '{"files": {}}'])
def test_a_manifest_of_others_is_passed_over_and_said(tiny, tmp_path, text):
    """The official export writes a manifest.json of its own beside the shards."""
    folder, said = write_dataset(tmp_path / "d", tiny), []
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    c.find_dataset(replace(tiny, data_path=str(folder)), c.World(), said.append)
    assert said == [f"data: {folder}/manifest.json is not of the verb data and is passed over"]


IDS = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
PURE_BYTE = dict(tokenizer_type="pure_byte", config=IDS | dict(byte_offset=4, byte_count=256), vocab_size=260)


def published_dataset(root: Path, h: c.Hyperparameters, tokens: list[int], tokenizer: object) -> c.Validation:
    """The validation set of byte shards under the official names in DATA_DIR."""
    folder = root / "datasets" / "fineweb10B_byte260"
    folder.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    for side in "train", "val":
        c.write_shard(folder / f"fineweb_{side}_000000.bin", tokens)
    (root / "tokenizers" / "fineweb_pure_byte_260.json").write_text(json.dumps(tokenizer))
    return c.find_dataset(replace(h, vocab_size=260, data_dir=str(root)), c.World(), SILENT)


def test_the_published_byte_vocabulary(tiny, tmp_path):
    """Shards and tokenizer are found under their official names; a token is a byte, a special one is none."""
    tokens = [1, *(4 + byte for byte in "é日 a".encode()), 2, 1, 3, 260 - 1]
    data = published_dataset(tmp_path, tiny, tokens, PURE_BYTE)
    assert data.val.bytes.tolist() == [1] * 7 + [0, 0, 0, 1] and data.byte_rule == "tokenizer fineweb_pure_byte_260.json"


def test_the_published_character_vocabulary(tmp_path):
    """The id of a character is its place + 4."""
    path = tmp_path / "fineweb_char.json"
    path.write_text(json.dumps(dict(tokenizer_type="char", config=IDS | dict(chars=["e", "é", "日", "😀"]), vocab_size=8)))
    assert c.symbol_bytes(path, 8).tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    with pytest.raises(c.Refusal, match="fineweb_char.json: 8 ids, expected VOCAB_SIZE 9"):
        c.symbol_bytes(path, 9)


@pytest.mark.parametrize("text", ["{}", "[]", "7", "x", "\xff", '{"model": {"type": "BPE"}}', "[" * 100_000,
                                  json.dumps(PURE_BYTE | dict(config=IDS)),
                                  json.dumps(PURE_BYTE | dict(config=PURE_BYTE["config"] | dict(byte_offset=3))),
                                  json.dumps(dict(config=IDS | dict(chars="\ud800"))),
                                  json.dumps(dict(config=IDS | dict(chars=[7]))),
                                  json.dumps(dict(config=IDS | dict(bos_id=0, chars=["a"])))])
def test_any_other_json_is_no_tokenizer(tmp_path, text):
    """One sentence, whatever it is."""
    (tmp_path / "t.json").write_text(text, encoding="latin-1")
    with pytest.raises(c.Refusal, match="t.json: neither a published JSON tokenizer"):
        c.symbol_bytes(tmp_path / "t.json", 260)
    with pytest.raises(c.Refusal, match="none.json: there is no ordinary file of this name"):
        c.symbol_bytes(tmp_path / "none.json", 260)


def test_wrong_tokenizers_are_refused(tiny, tmp_path, lossy):
    """Another size than VOCAB_SIZE, or no model at all."""
    h = replace(tiny, data_path=str(write_dataset(tmp_path / "d", tiny, sidecar=False)), tokenizer_path=str(lossy))
    with pytest.raises(c.Refusal, match="lossy.model: 500 pieces, expected VOCAB_SIZE 64"):
        c.find_dataset(h, c.World(), SILENT)
    (tmp_path / "m").write_bytes(b"no model")
    with pytest.raises(c.Refusal, match="not a SentencePiece model"):
        c.find_dataset(replace(h, tokenizer_path=str(tmp_path / "m")), c.World(), SILENT)


def test_missing_shards_are_refused_or_embedded(tiny, tmp_path, monkeypatch):
    """A folder that was asked for must exist; where nothing was asked for, the embedded corpus is announced."""
    for h in (replace(tiny, data_path=str(tmp_path / "none")), replace(tiny, corpus="shards", data_dir=str(tmp_path))):
        with pytest.raises(c.Refusal, match=r"no file fineweb_train_\*.bin there"):
            c.find_dataset(h, c.World(), SILENT)
    built = write_dataset(tmp_path / "built", tiny)
    monkeypatch.setattr(c, "build_corpus", lambda folder, V, say, caseops: built)
    said = []
    c.find_dataset(replace(tiny, data_dir=str(tmp_path)), c.World(), said.append)
    assert said == [f"corpus: no shards in {tmp_path}/datasets/fineweb10B_sp64; CORPUS=embedded is used "
                    "(set DATA_PATH for shards)"]
    c.find_dataset(replace(tiny, corpus="embedded", data_dir=str(tmp_path)), c.World(), said.append)
    assert len(said) == 1, "what was asked for is not announced"
    monkeypatch.setattr(c, "build_corpus", None)
    with pytest.raises(c.Refusal, match="CORPUS=embedded: .* is not there and this packed script cannot build it"):
        c.find_dataset(replace(tiny, corpus="embedded", data_dir=str(tmp_path)), c.World(), SILENT)


# ------------------------------------------------------------------------------------- documents
def test_read_documents(tmp_path):
    texts = ["one\n two", "", "drei ▁ 日\u2028x", "\u0000"]
    rows = "".join(json.dumps({"text": text, "source": 1}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(rows + b"\n  \n")
    two_frames = zstandard.compress(rows[:20]) + zstandard.compress(rows[20:])
    (tmp_path / "b.jsonl.zst").write_bytes(two_frames)
    (tmp_path / "c.txt").write_bytes(b"line\r\nend ")
    read = list(c.read_documents([tmp_path / n for n in ("a.jsonl", "b.jsonl.zst", "c.txt")]))
    assert read == texts + texts + ["line\r\nend "]


def test_reading_streams(tmp_path):
    """The first document arrives although a later line is bad: nothing is read ahead of need."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": \n')
    documents = c.read_documents([path])
    assert next(documents) == "good"
    with pytest.raises(c.Refusal, match=r"a.jsonl, line 2: not JSON"):
        next(documents)


@pytest.mark.parametrize("name, raw, words", [
    ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: expected an object"),
    ("a.jsonl", b'{"txt": "x"}\n', 'line 1: expected an object with a string field "text"'),
    ("a.jsonl", b'{"text": 3}\n', "line 1: expected an object"),
    ("a.jsonl", b'\n{"text": "\xff"}\n', r"line 2: byte 10 \(0xff\) is not UTF-8"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: half of a surrogate"),
    ("a.jsonl", b'{"text": null}\n', 'line 1: expected an object with a string field "text"'),
    ("a.jsonl", b'{"text": "x"} words\n', "line 1: not JSON .Extra data, column 15"),
    ("a.jsonl", b'{"text": "x", "f": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: nested too deeply"),
    ("a.txt", b"ab\xe9", r"a.txt: byte 2 \(0xe9\) is not UTF-8"),
    ("a.jsonl.zst", b"not zstd at all", "damaged zstd stream"),
    ("a.jsonl.zst", zstandard.compress(b'{"text": "' + os.urandom(9999).hex().encode())[:5000],
     "ends in the middle of a frame"),
    ("a.jsonl.zst", b"", "ends in the middle of a frame"),
    ("a.csv", b"x", "expected a name ending in"),
    (None, b"", "no ordinary file")])
def test_document_refusals(tmp_path, name, raw, words):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(raw)
    with pytest.raises(c.Refusal, match=words) as refusal:
        list(c.read_documents([path]))
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("row, text", [
    ('{"n": ' + "9" * 5000 + ', "text": "x"}', "x"), ('{"text": "a", "f": NaN, "text": "b"}', "b"),
    ('{"f": -Infinity, "text": "x"}', "x"), ("\ufeff" + '{"text": "x"}', "x"), ('{"text": "\ufeffx"}', "\ufeffx")])
def test_odd_json_rows_are_read(tmp_path, row, text):
    """Fields that nobody needs may hold anything; a byte order mark is no part of the text."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "first"}}\n{row}\n', encoding="utf-8")
    assert list(c.read_documents([tmp_path / "a.jsonl"])) == ["first", text]


def test_byte_order_marks(tmp_path):
    """UTF-8's is left out of .jsonl and .txt, any other encoding is refused by its name."""
    for name, raw in (("a.txt", b"\xef\xbb\xbfplain"), ("a.jsonl", b'\xef\xbb\xbf{"text": "plain"}\n')):
        (tmp_path / name).write_bytes(raw)
        assert list(c.read_documents([tmp_path / name])) == ["plain"]
    for code in ("UTF-16-LE", "UTF-16-BE", "UTF-32-LE", "UTF-32-BE"):
        for name in ("b.txt", "b.jsonl"):
            (tmp_path / name).write_bytes('\ufeff{"text": "x"}\n'.encode(code))
            with pytest.raises(c.Refusal, match=f"{name}.*byte order mark says {code}, expected UTF-8"):
                list(c.read_documents([tmp_path / name]))


def test_zstd_streams_of_every_kind(tmp_path):
    """The largest window, frames that are skipped, a document that is longer than what is read at once."""
    long = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(
        window_log=31, compression_level=1, write_content_size=False)).compressobj()
    texts = ["one", os.urandom(300_000).hex(), "three"]
    rows = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    raw = skipped + long.compress(rows[:400_000]) + long.flush() + skipped + zstandard.compress(rows[400_000:]) + skipped
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(raw)
    assert list(c.read_documents([path])) == texts
    for end in (len(raw) - 3, len(raw) - len(skipped) - 3, 300_000, 7):
        path.write_bytes(raw[:end])
        with pytest.raises(c.Refusal, match="ends in the middle of a frame"):
            list(c.read_documents([path]))


def test_missing_zstandard(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setattr(c, "zstandard", None)
    with pytest.raises(c.Refusal, match="pip install zstandard"):
        list(c.read_documents([tmp_path / "a.jsonl.zst"]))


# ------------------------------------------------------------------------------------- tokenizer
def test_tokenizer_is_lossless(lossless, documents):
    special = lossless.pad_id(), lossless.bos_id(), lossless.eos_id(), lossless.unk_id()
    assert special == (0, 1, 2, 3)
    texts = odd_texts(5000) + [text for _, text in documents[::20]]
    encoded = lossless.encode(texts)
    assert lossless.decode(encoded) == texts
    assert not any(token in (0, 1, 2, 3) for ids in encoded for token in ids)


@settings(max_examples=300, deadline=None)
@given(text=strategies.text(strategies.characters(exclude_categories=["Cs"])))
def test_tokenizer_is_lossless_on_any_text(lossless, text):
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    if ids:
        exact = c.raw_bytes(lossless, ids, text, c.utf8_widths(text))
        assert exact.sum() == len(text.encode()) and exact.min() >= 0


def test_tokenizer_training_is_quiet_and_deterministic(tmp_path, capfd, documents):
    texts = [text for _, text in documents][:60]
    for name in "ab":
        c.train_tokenizer(texts, 600, tmp_path / name, c.MARKERS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert capfd.readouterr() == ("", "")
    model = c.load_tokenizer(tmp_path / "a", 600, True)
    assert [model.piece_to_id(mark) for mark in c.MARKERS] == [4, 5, 6, 7]


def test_tokenizer_refusals(tmp_path, embedded, capfd):
    with pytest.raises(c.Refusal, match="VOCAB_SIZE 5000: no tokenizer of this size"):
        c.train_tokenizer(["short text"], 5000, tmp_path / "m")
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    model = embedded / "fineweb_1024_bpe.model"
    with pytest.raises(c.Refusal, match="1024 pieces, expected VOCAB_SIZE 4096"):
        c.load_tokenizer(model, 4096, False)
    with pytest.raises(c.Refusal, match="no pieces for the four CaseOps markers"):
        c.load_tokenizer(model, 1024, True)
    with pytest.raises(c.Refusal, match="not a SentencePiece model"):
        c.load_tokenizer(embedded / "manifest.json", 1024, False)
    with pytest.raises(c.Refusal, match="no ordinary file"):
        c.load_tokenizer(tmp_path / "none.model", 1024, False)


# ----------------------------------------------------------------------------------------- bytes
def rule_by_hand(tokenizer: spm.SentencePieceProcessor, tokens: list[int]) -> list[int]:
    """The challenge's rule spelled out for one target after the other."""
    sizes = []
    for before, token in zip(tokens, tokens[1:]):
        piece = tokenizer.id_to_piece(token)
        if tokenizer.is_byte(token):
            sizes.append(1)
        elif tokenizer.is_control(token) or tokenizer.is_unknown(token):
            sizes.append(0)
        else:
            start = tokenizer.is_control(before) or tokenizer.is_unknown(before)
            sizes.append(len(piece.removeprefix("▁").encode())
                         + (piece.startswith("▁") and not start))
    return sizes


def test_byte_rule(lossy):
    tokenizer = spm.SentencePieceProcessor(model_file=str(lossy))
    tokens = [1, *tokenizer.encode("This is the naïve 日 test of it"), 1, 3,
              *tokenizer.encode(" again"), 2, tokenizer.piece_to_id("▁the"), 1, 0]
    assert tokenizer.piece_to_id("▁the") > 3
    sizes = c.target_bytes(np.array(tokens, np.uint16), tokenizer)
    assert sizes.dtype == np.uint16 and sizes.tolist() == rule_by_hand(tokenizer, tokens)
    assert sizes[-3] == 3  # no byte for the space behind a boundary


def test_a_space_without_a_piece_is_one_byte(tmp_path):
    """A vocabulary made of text without spaces has no U+2581: each space is three byte pieces (#897)."""
    stem, text = tmp_path / "bare", "abc abd xyz " * 200
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["abcabd", "xyzabc"] * 20), model_prefix=str(stem), model_type="bpe", vocab_size=272,
        byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="identity", pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, hard_vocab_limit=False, remove_extra_whitespaces=False, minloglevel=4)
    tokenizer = spm.SentencePieceProcessor(model_file=f"{stem}.model")
    assert tokenizer.piece_to_id("\u2581") == tokenizer.unk_id()
    ids = tokenizer.encode(text)
    assert len(ids) > 3 * text.count(" ")
    assert c.target_bytes(np.array([1, *ids]), tokenizer).sum() == len(text) == 2400
    assert c.raw_bytes(tokenizer, ids, text, c.utf8_widths(text)).sum() == 2400
    # behind a boundary it is the tokenizer's own mark, as for any other vocabulary
    assert c.target_bytes(np.array([1, *tokenizer.encode(" a")]), tokenizer).sum() == 1


def test_raw_bytes_equal_the_rule_on_plain_text(lossless, lossy):
    """Both tokenizers: on text that the normaliser leaves alone, token by token."""
    text = "The naïve 日本 reader of 1,234 words - in the house of code and the rest"
    for tokenizer in lossless, spm.SentencePieceProcessor(model_file=str(lossy)):
        ids = tokenizer.encode(text)
        exact = c.raw_bytes(tokenizer, ids, text, c.utf8_widths(text))
        rule = c.target_bytes(np.array([1, *ids]), tokenizer)
        assert exact.tolist() == rule.tolist() and exact.sum() == len(text.encode())


def test_raw_bytes_of_a_lossy_tokenizer(lossy):
    """What the normaliser drops or folds is still counted, once, with a token at hand."""
    tokenizer = spm.SentencePieceProcessor(model_file=str(lossy))
    ids = tokenizer.encode("  a\n\n  b \n")
    assert tokenizer.id_to_piece(ids) == ["a", "▁b"]
    spans = c.raw_bytes(tokenizer, ids, "  a\n\n  b \n", np.ones(10, int))
    assert spans.tolist() == [3, 7]  # the space is the first newline, what follows it is dropped
    for text in odd_texts(3000, seed=1):
        ids = tokenizer.encode(text)
        if ids:
            exact = c.raw_bytes(tokenizer, ids, text, c.utf8_widths(text))
            assert exact.sum() == len(text.encode()) and exact.min() >= 0


def test_raw_bytes_of_caseops_text(tmp_path, documents):
    """Against a walk over characters, with pieces that hold several of them."""
    originals = [text for _, text in documents[:80]]
    c.train_tokenizer(map(c.caseops_encode, originals), 700, tmp_path / "m", c.MARKERS)
    tokenizer = c.load_tokenizer(tmp_path / "m", 700, True)
    original = "NASA \ue004 and The \ue001PhD, x\ue002Y and iPhone users \ue004\ue004A the"
    text = c.caseops_encode(original)
    ids = tokenizer.encode(text)
    characters, escaped, expected = iter(text), False, []
    for token in ids:
        expected.append(0)
        for character in tokenizer.id_to_piece(token) if not tokenizer.is_byte(token) else "":
            assert next(characters) == character.replace("▁", " ")
            marker = character in c.MARKERS
            if not marker or escaped:
                expected[-1] += 1 if character == "▁" else len(character.encode())
            escaped = marker and not escaped and character == c.ESCAPE
    assert next(characters, None) is None and max(map(len, map(tokenizer.id_to_piece, ids))) > 2
    exact = c.raw_bytes(tokenizer, ids, text, c.caseops_weights(text))
    assert exact.tolist() == expected and sum(expected) == len(original.encode())
    for original in odd_texts(3000, seed=2):
        text = c.caseops_encode(original)
        assert c.caseops_weights(text).sum() == len(original.encode())
        ids = tokenizer.encode(text)
        exact = c.raw_bytes(tokenizer, ids, text, c.caseops_weights(text))
        assert exact.sum() == len(original.encode())


def test_tokens_that_do_not_cover_the_text_are_refused(lossless):
    with pytest.raises(c.Refusal, match="cannot be exact"):
        c.raw_bytes(lossless, [300], "a long text", np.ones(11))


@pytest.mark.skipif(not (SHARED / "tokenizers").is_dir(), reason="needs the shared documents")
@pytest.mark.parametrize("name, V, caseops", [
    ("fineweb_4096_bpe", 4096, False), ("fineweb_8192_bpe", 8192, False),
    ("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved", 8192, True)])
def test_raw_bytes_of_published_tokenizers(name, V, caseops):
    tokenizer = c.load_tokenizer(SHARED / "tokenizers" / f"{name}.model", V, caseops)
    equal = 0
    originals = list(c.read_documents([SHARED / "docs_val.jsonl.zst"]))[::4] + odd_texts(1500)
    for original in originals:
        text = c.caseops_encode(original) if caseops else original
        weights = c.caseops_weights(text) if caseops else c.utf8_widths(text)
        ids = tokenizer.encode(text)
        if ids:
            exact = c.raw_bytes(tokenizer, ids, text, weights)
            assert exact.sum() == len(original.encode()) and exact.min() >= 0
            if not caseops and tokenizer.decode(ids) == text and text[0] != " ":
                rule = c.target_bytes(np.array([1, *ids]), tokenizer)
                assert exact.tolist() == rule.tolist()
                equal += 1
    assert caseops or equal > 20


# --------------------------------------------------------------------------------------- CaseOps
T, A, N, E = c.MARKERS
MARKED = re.compile(f"{E}([{c.MARKERS}])|[{T}{N}]([a-z])|{A}([a-z]+)")


def caseops_decode(text: str) -> str:
    """The original of a CaseOps text; refuses text that caseops_encode cannot give."""
    original = MARKED.sub(lambda match: match[1] or (match[2] or match[3]).upper(), text)
    c.require(c.caseops_encode(original) == text, "CaseOps text: a marker stands where the transform never puts one")
    return original


@pytest.mark.parametrize("original, encoded", [
    ("", ""), ("plain text 42 é", "plain text 42 é"), ("The End", f"{T}the {T}end"), ("X", f"{T}x"),
    ("BBC AND ITV", f"{A}bbc {A}and {A}itv"), ("gRPC", f"g{N}r{N}p{N}c"), ("WWw", f"{T}w{N}ww"),
    ("OpenBSD", f"{T}open{N}b{N}s{N}d"), ("O'NEIL", f"{T}o'{A}neil"), ("7UP", f"7{A}up"),
    ("ÉTÉ Été", f"É{T}tÉ Été"), (f"a{T}b", f"a{E}{T}b"), (E, E + E),
    (f"{N}{A}Go", f"{E}{N}{E}{A}{T}go")])
def test_caseops_by_hand(original, encoded):
    assert c.caseops_encode(original) == encoded and caseops_decode(encoded) == original


@pytest.mark.skipif(not (SHARED / "caseops_vectors.jsonl").is_file(), reason="needs the shared documents")
def test_caseops_vectors():
    rows = [json.loads(line) for line in (SHARED / "caseops_vectors.jsonl").open()]
    assert len(rows) == 312
    for row in rows:
        assert c.caseops_encode(row["text"]) == row["encoded"]
        assert caseops_decode(row["encoded"]) == row["text"]
        assert c.caseops_weights(row["encoded"]).sum() == row["bytes"]


def test_caseops_round_trip_of_100000_random_texts():
    texts = odd_texts(100_000, seed=3)
    encoded = [c.caseops_encode(text) for text in texts]
    assert all(not any("A" <= letter <= "Z" for letter in text) for text in encoded[:2000])
    assert [caseops_decode(text) for text in encoded] == texts
    assert len(set(encoded)) == len(set(texts))


@pytest.mark.parametrize("text", ["A", "\ue001", "\ue001A", "\ue002a", "a\ue001b", "\ue003a",
                                  "\ue004x", "\ue002aa\ue003b", "\ue001\ue001a"])
def test_caseops_refuses_what_it_never_writes(text):
    with pytest.raises(c.Refusal, match="CaseOps text"):
        caseops_decode(text)


def test_caseops_is_linear_in_long_runs():
    text = "a" * 100_000 + " " + "b" * 100_000 + "B"
    start_s = time.process_time()
    assert c.caseops_encode(text) == text[:-1] + c.CAP_NEXT + "b"
    assert time.process_time() - start_s < 5, "a quadratic scan takes minutes"


# ------------------------------------------------------------------------------ embedded documents
def test_embedded_documents(documents):
    assert documents == c.embedded_documents()
    names, texts = zip(*documents)
    assert len(set(names)) == len(names) > 300 and len(set(texts)) == len(texts)
    assert sum(len(text.encode()) for text in texts) >= 2_000_000
    assert min(len(text.encode()) for text in texts) >= 200
    assert not any(part in ("test", "idlelib") for name in names for part in name.split("."))
    held = [len(text) for name, text in documents if c.held_out(name)]
    assert 0.02 < sum(held) / sum(map(len, texts)) < 0.10 and len(held) >= 10


def test_module_text():
    source = (b"# -*- coding: latin-1 -*-\n'''About \xe9.'''\nif 1:\n"
              b'  def f(a, *, b=1):\n    "Doc f."\n'
              b"    x = 1  # aside\n    # One\n    #  two.\nclass C:\n"
              b"  async def g(self): 'Doc g.'\n")
    assert c.module_text("m", source) == (
        "m\n\nAbout \xe9.\n\nf(a, *, b=1)\n\nDoc f.\n\nOne\n two.\n\ng(self)\n\nDoc g.")


def test_embedded_needs_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(c.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(c.Refusal, match="CORPUS=embedded.* holds 0 bytes"):
        c.embedded_documents()


def test_embedded_corpus(embedded, lossless, documents):
    manifest = json.loads((embedded / "manifest.json").read_text())
    val = c.read_shard(embedded / "fineweb_val_000000.bin")
    sidecar = c.read_shard(embedded / "fineweb_val_bytes_000000.bin")
    held = [text for name, text in documents if c.held_out(name)]
    assert len(val) == len(sidecar) == manifest["val_tokens"]
    held_bytes = sum(len(text.encode()) for text in held)
    assert sidecar.sum(dtype=np.int64) == held_bytes == manifest["val_bytes"]
    starts = np.flatnonzero(val == 1)
    assert starts[0] == 0 and len(starts) == len(held) and not sidecar[starts].any()
    chunks = np.split(val, starts[1:])
    assert [lossless.decode(chunk[1:].tolist()) for chunk in chunks] == held
    train = c.read_shard(embedded / "fineweb_train_000000.bin")
    assert train[0] == 1 and train.max() < 1024
    assert (train == 1).sum() == manifest["train_documents"] == len(documents) - len(held)
    rule = c.target_bytes(val, lossless)
    assert (rule == sidecar[1:]).all(), "no document of the library starts with a space"


def test_embedded_cache_is_kept_and_repaired(embedded):
    model = embedded / "fineweb_1024_bpe.model"
    inode = model.stat().st_ino
    assert c.embedded_corpus(embedded.parent, 1024, SILENT) == embedded
    assert model.stat().st_ino == inode, "an intact cache is not built again"
    before = {path.name: c.file_sha256(path) for path in embedded.iterdir()}
    shard = embedded / "fineweb_val_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[2000] ^= 1
    shard.write_bytes(raw)
    said = []
    c.embedded_corpus(embedded.parent, 1024, said.append)
    assert "damaged" in said[0]
    assert before == {path.name: c.file_sha256(path) for path in embedded.iterdir()}
    assert [path.name for path in embedded.parent.iterdir()] == [embedded.name]


def build(folder: Path, few: list[tuple[str, str]]) -> None:
    """One of two processes that want the same corpus."""
    c.embedded_documents = lambda: few
    c.embedded_corpus(folder, 600, SILENT)


def test_two_processes_build_at_once(tmp_path, documents):
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=build, args=(tmp_path, documents[:120])) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1 and c.intact(next(tmp_path.iterdir()))


# ------------------------------------------------------------------------------------- verb data
def write_jsonl(path: Path, texts: list[str]) -> Path:
    """`path`, filled with one JSON document per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def library(documents) -> list[str]:
    """300 real documents."""
    return [text[:3000] for _, text in documents][:300]


@pytest.mark.parametrize("caseops", [False, True])
def test_data_verb(tmp_path, library, caseops, monkeypatch):
    monkeypatch.setattr(c, "BATCH_CHARACTERS", 50_000)
    # Copies must not straddle the sides; empty documents have no token to carry them.
    source = write_jsonl(tmp_path / "docs.jsonl", library + library[:50] + ["", ""])
    out, said = tmp_path / "deep" / "out", []
    manifest = c.make_dataset([str(source), "--vocab", "700", "--out", str(out)]
                              + ["--caseops"] * caseops, said.append)
    assert sorted(path.name for path in out.iterdir()) == [
        "fineweb_700_bpe.model", "fineweb_train_000000.bin", "fineweb_val_000000.bin",
        "fineweb_val_bytes_000000.bin", "manifest.json"]
    assert c.intact(out) and manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["files"]["fineweb_700_bpe.model"] == hashlib.sha256(
        (out / "fineweb_700_bpe.model").read_bytes()).hexdigest()
    assert manifest["empty_documents"] == 2 and len(said) >= 3
    tokenizer = c.load_tokenizer(out / "fineweb_700_bpe.model", 700, caseops)
    sides = {}
    for side in "train", "val":
        tokens = c.read_shard(out / f"fineweb_{side}_000000.bin")
        chunks = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
        texts = [tokenizer.decode(chunk[1:].tolist()) for chunk in chunks]
        sides[side] = [caseops_decode(text) for text in texts] if caseops else texts
        assert manifest[f"{side}_documents"] == len(chunks)
    assert sorted(sides["train"] + sides["val"]) == sorted(library + library[:50])
    assert not set(sides["train"]) & set(sides["val"]) and sides["val"]
    sidecar = c.read_shard(out / "fineweb_val_bytes_000000.bin")
    assert sidecar.sum(dtype=np.int64) == sum(len(text.encode()) for text in sides["val"])
    assert not list(out.parent.glob(".*")), "no workshop is left"


def test_data_verb_with_tokenizer_and_val(tmp_path, library, lossy):
    source = write_jsonl(tmp_path / "docs.jsonl", library[:100])
    held = write_jsonl(tmp_path / "val.jsonl", library[90:130] + [" \n "])
    out = tmp_path / "out"
    out.mkdir()
    manifest = c.make_dataset([str(source), "--vocab", "500", "--tokenizer", str(lossy), "--out",
                               str(out), "--val", str(held)], SILENT)
    assert manifest["train_documents"] == 90 and manifest["val_documents"] == 40
    assert manifest["empty_documents"] == 1  # the official normaliser leaves nothing of it
    assert manifest["val_documents_decoded_exactly"] < 40
    sidecar = c.read_shard(out / "fineweb_val_bytes_000000.bin")
    assert sidecar.sum(dtype=np.int64) == sum(len(text.encode()) for text in library[90:130])
    assert (out / "fineweb_500_bpe.model").read_bytes() == lossy.read_bytes()


def test_data_verb_refusals(tmp_path, library, lossy):
    source = str(write_jsonl(tmp_path / "docs.jsonl", library[:60]))
    few = str(write_jsonl(tmp_path / "few.jsonl", ["only this one document"] * 30))
    full = tmp_path / "full"
    full.mkdir()
    (full / "fineweb_val_000000.bin").touch()
    blank = tmp_path / "blank.txt"
    blank.write_text("a" + " " * 70_000 + "b")
    for arguments, words in [
            ([source, "--vocab", "500", "--out", str(full)], "already there and not empty"),
            ([source, "--vocab", "100000"], "VOCAB_SIZE 100000: expected 260 to 65536"),
            ([source, "--vocab", "60000"], "VOCAB_SIZE 60000: no tokenizer of this size"),
            ([source, "--vocab", "512", "--tokenizer", str(lossy)], "500 pieces, expected VOCAB"),
            ([source, "--vocab", "500", "--tokenizer", str(lossy), "--caseops"], "no pieces for"),
            ([few, "--vocab", "500", "--tokenizer", str(lossy)], "none fell to"),
            ([source, "--vocab", "500", "--tokenizer", str(lossy), "--val", str(blank)],
             "one token stands for 700.. bytes"),
            ([str(tmp_path / "none.jsonl"), "--vocab", "500"], "no ordinary file")]:
        if "--out" not in arguments:
            arguments = [*arguments, "--out", str(tmp_path / "out")]
        with pytest.raises(c.Refusal, match=words):
            c.make_dataset(arguments, SILENT)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"docs.jsonl", "few.jsonl", "full", "blank.txt"}, "a refusal leaves nothing"


def made(tmp_path: Path, *arguments: object, say=SILENT) -> dict:
    """The manifest of the verb data in tmp_path / "out"."""
    return c.make_dataset([*map(str, arguments), "--out", str(tmp_path / "out")], say)


def texts_of(folder: Path, side: str, tokenizer: spm.SentencePieceProcessor) -> list[str]:
    """The documents of one side, decoded."""
    tokens = c.read_shard(folder / f"fineweb_{side}_000000.bin")
    return [tokenizer.decode(d[1:].tolist()) for d in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def test_bad_rows_are_found_before_the_first_is_encoded(tmp_path, library, lossless, embedded, monkeypatch):
    """A bad last row costs one reading; with --skip-bad bad ones are left out and counted."""
    source, model = write_jsonl(tmp_path / "docs.jsonl", library), embedded / "fineweb_1024_bpe.model"
    with source.open("ab") as file:
        file.write(b'{"text": null}\n{"text": "\\ud800"}\n{"txt": 1}\n{"text": "x"} y\n\xff\n')
    arguments, encode = (source, "--vocab", 1024, "--tokenizer", model), c.write_shards
    monkeypatch.setattr(c, "write_shards", None)
    with pytest.raises(c.Refusal, match="docs.jsonl, line 301: expected an object"):
        made(tmp_path, *arguments)
    monkeypatch.setattr(c, "write_shards", encode)
    said = []
    manifest = made(tmp_path, *arguments, "--skip-bad", say=said.append)
    assert manifest["bad_rows"] == 5 and manifest["train_documents"] + manifest["val_documents"] == len(library)
    assert sum("5 bad rows are left out, the first documents" in line and "line 301" in line for line in said) == 1
    assert sorted(texts_of(tmp_path / "out", "train", lossless) + texts_of(tmp_path / "out", "val", lossless)) == sorted(library)


@pytest.mark.parametrize("name, option, held", [
    ("docs.jsonl", ["--val-first", 7], 7), ("docs_selected.jsonl", [], 5), ("docs_selected.jsonl", ["--val-first", 9], 9)])
def test_the_first_documents_are_validation(tmp_path, library, lossless, embedded, monkeypatch, name, option, held):
    """As in the official export, whose own file is known by its name; copies of them are no training text."""
    monkeypatch.setattr(c, "OFFICIAL_VAL_DOCUMENTS", 5)
    said, source = [], write_jsonl(tmp_path / name, library[:60] + library[:3])
    made(tmp_path, source, "--vocab", 1024, "--tokenizer", embedded / "fineweb_1024_bpe.model", *option, say=said.append)
    assert texts_of(tmp_path / "out", "val", lossless) == library[:held]
    assert texts_of(tmp_path / "out", "train", lossless) == library[held:60]
    assert any("official export" in line for line in said) == (not option)


def test_validation_is_by_hash_where_nothing_is_the_first(tmp_path, library, embedded):
    """--val-first 0 asks for it also where the official file is read."""
    source = write_jsonl(tmp_path / "docs_selected.jsonl", library)
    manifest = made(tmp_path, source, "--vocab", 1024, "--tokenizer", embedded / "fineweb_1024_bpe.model", "--val-first", 0)
    assert manifest["val_documents"] == sum(map(c.held_out, library))
    with pytest.raises(c.Refusal, match="none fell to val"):
        made(tmp_path / "none", source, "--vocab", 1024, "--val-first=-1")


def test_one_text_file_is_refused_at_once(tmp_path, monkeypatch):
    """It is a single document; what to do is said before anything is read."""
    (tmp_path / "input.txt").write_text("text")
    monkeypatch.setattr(c, "build_dataset", None)
    with pytest.raises(c.Refusal, match="input.txt: a .txt file is one document.*--val, give more files, or .*jsonl"):
        made(tmp_path, tmp_path / "input.txt", "--vocab", 512)


def test_a_side_without_documents_is_refused_before_encoding(tmp_path, library, embedded, monkeypatch):
    """Empty --val files, too many first ones, or nothing that fell to validation."""
    monkeypatch.setattr(c, "write_shards", None)
    (tmp_path / "empty.jsonl").touch()
    train = write_jsonl(tmp_path / "a.jsonl", [text for text in library if not c.held_out(text)])
    arguments = train, "--vocab", 1024, "--tokenizer", embedded / "fineweb_1024_bpe.model"
    for more, side in ((["--val", tmp_path / "empty.jsonl"], "val"), ([], "val"), (["--val-first", 999], "train")):
        with pytest.raises(c.Refusal, match=f"none fell to {side}"):
            made(tmp_path, *arguments, *more)
    with pytest.raises(c.Refusal, match="none.jsonl: there is no ordinary file of this name"):
        made(tmp_path, tmp_path / "none.jsonl", *arguments, "--val", train)


def test_an_empty_folder_is_filled_in_place(tmp_path):
    """A mounted volume cannot be renamed onto; its manifest comes first, so that half of the files is not intact."""
    out, moved = tmp_path / "out", []
    (out / "lost+found").mkdir(parents=True)
    inode, rename = out.stat().st_ino, os.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c.os, "rename", lambda a, b: (moved.append(b.name), rename(a, b)))
        with c.delivered(out, "--out") as folder:
            assert folder.parent.parent == out and folder.stat().st_mode & 0o755 == 0o755
            for name in ("a.bin", "manifest.json", "z.bin"):
                (folder / name).touch()
            with pytest.raises(c.Refusal, match="--out .*already there and not empty"), c.delivered(out, "--out"):
                pass
    assert moved[0] == "manifest.json" and out.stat().st_ino == inode
    assert sorted(path.name for path in out.iterdir()) == ["a.bin", "lost+found", "manifest.json", "z.bin"]


def test_a_folder_that_cannot_be_made_is_refused_first(tmp_path, monkeypatch):
    """Before the first document: a parent that is a file or read-only; later a disk that is full."""
    (tmp_path / "file").touch()
    for out in ("file/out", "link"):
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(c.Refusal, match=f"--out .*{out}: cannot be made"), c.delivered(tmp_path / out, "--out"):
            pytest.fail("nothing is made")
        (tmp_path / "link").unlink()
    with pytest.raises(c.Refusal, match="--to .*cannot be made .*No space left"), c.delivered(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(c.tempfile, "mkdtemp", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(c.Refusal, match="--out .*cannot be made .*Read-only"), c.delivered(tmp_path / "out", "--out"):
        pytest.fail("nothing is made")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_of_any_bytes(tmp_path, library, embedded):
    """Files and folders whose names are no ASCII, or no UTF-8."""
    source = write_jsonl(tmp_path / os.fsdecode(b"\xff.jsonl"), library)
    for name in ("данные", os.fsdecode(b"\xfe")):
        said, arguments = [], [str(source), "--vocab", "1024", "--out", str(tmp_path / name)]
        c.make_dataset([*arguments, "--tokenizer", str(embedded / "fineweb_1024_bpe.model")], said.append)
        assert c.intact(tmp_path / name) and said[-1].endswith(f"in {tmp_path / name}")


def test_progress_says_what_is_left(monkeypatch):
    """By the bytes of the files: every 30 s into a file, and at the end."""
    now = itertools.count(0, 10)
    monkeypatch.setattr(c.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(c, "BATCH_CHARACTERS", 1)
    tally, said = c.Tally(size_bytes=900), []

    def corpus():
        """Nine documents of 100 bytes."""
        for number in range(9):
            tally.read_bytes += 100
            yield number == 8, "x"

    list(c.batches(corpus(), "reading", said.append, tally))
    assert [line.split(", ")[0] for line in said] == [f"data reading: {n} documents" for n in (3, 6, 9, 9)]
    assert said[0].endswith("M/s, 60 s left") and said[1].endswith("30 s left") and said[-1].endswith("M/s")
    assert tally.sides == [8, 1]


def test_threads_keep_to_what_the_process_may_use(tmp_path, monkeypatch):
    """Its affinity, within the quota of its container."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    limit = tmp_path / "cpu.max"
    assert c.cpu_count(limit) == 4
    for text, count in (("max 100000\n", 4), ("250000 100000\n", 2), ("50000 100000\n", 1), ("900000 100000\n", 4)):
        limit.write_text(text)
        assert c.cpu_count(limit) == count


def test_sample_is_bounded_and_does_not_depend_on_order(library):
    shuffled = random.Random(0).sample(library, len(library))
    sample = c.sample_texts(library, 50_000)
    assert sample == c.sample_texts(shuffled, 50_000)
    assert 40_000 < sum(len(text.encode()) for text in sample) <= 50_000
    assert sorted(c.sample_texts(library)) == sorted(library)


def test_held_out_is_stable():
    assert [c.fingerprint("a"), c.held_out("io"), c.held_out("os")] == [
        int(hashlib.blake2b(b"a", digest_size=8).hexdigest(), 16), True, False]
    assert 0.04 < np.mean([c.held_out(str(i)) for i in range(20_000)]) < 0.06
