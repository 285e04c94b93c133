"""The packed script (section 11): it behaves like the readable one and stays small."""
from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import linecache
import os
import random
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from conftest import REPO
from support import found_of, model_of, settings, t

LIMIT_BYTES = 48_000
VARIETY = '''
"""Title that must not be packed."""
from __future__ import annotations
import functools, inspect, json, os, sys
from dataclasses import dataclass, field, fields, replace
from typing import Callable, NamedTuple

def jit(function):
    """Like Triton: reads the source and the annotations of what it decorates."""
    function.src = inspect.getsource(function)
    function.constexprs = [n for n, a in function.__annotations__.items() if "constexpr" in str(a)]
    return function

def knob(default, help: str, check: Callable = lambda v: True):
    """A field with a sentence."""
    return field(default=default, metadata=dict(help=help, check=check))

positive_number = lambda value: value > 0

class Refusal(Exception):
    """A mistake of the user."""

@dataclass(frozen=True)
class Hyperparameters:
    """Every setting."""
    num_layers: int = knob(11, "layers whose weights are stored", positive_number)
    matrix_lr: float = knob(0.02, "step size", positive_number)
    run_id: str = knob("", "name of the run")
    ttt_enabled: bool = knob(False, "learn while scoring")
    @classmethod
    def from_env(cls, environment):
        """Values of the variables that are set."""
        parse = dict(int=int, float=float, str=str, bool=lambda s: {"0": False, "1": True}[s])
        return cls(**{f.name: parse[f.type](raw) for f in fields(cls)
                      if (raw := environment.get(f.name.upper())) is not None})

class Step(NamedTuple):
    """One executed block."""
    layer: int
    push: bool = False
    recipe: Hyperparameters | None = None

@jit
def kernel(source_pointer, rows, BLOCK_SIZE: tl.constexpr, other: int = 3):
    """Never runs on a device; its text is read."""
    accumulator = 0
    for block_index in range(rows):
        accumulator += block_index * BLOCK_SIZE
    return accumulator if other is not None else None

def depth(plan: tuple[Step, ...], *, extra_width: int = 2) -> str:
    """A match, a walrus, nested quotes."""
    described: list[str] = []
    unused_note: int
    for entry in plan:
        match entry:
            case Step(layer=0): described.append("first")
            case Step(layer=number, push=True) if number > 3:
                described.append(f"pushed {number!r:>4} {'it' + chr(39)} {{}}")
            case Step(layer=other):
                described.append(f"layer {other:0{extra_width}d} {entry.recipe}")
    def closing(suffix):
        nonlocal described
        described = [*described, suffix]
    closing(suffix="end \\\\ \\x00 \\r \\n \\u00e9 \\u2028 \\x0c " + chr(39) * 3 + chr(34) * 3)
    if any((longest := word).startswith("push") for word in described):
        described.append(longest)
    return "|".join(described)

class GPT:
    """The model."""
    limit = 7
    __slots__ = ("settings", "_hidden")
    def __init__(self, settings):
        """From its settings."""
        self.settings, self._hidden = settings, {"a b": [1, None, True]}
    @property
    def width(self) -> int:
        """A number."""
        return self.settings.num_layers * self.limit
    @staticmethod
    @functools.lru_cache
    def doubled(amount_of_things: int) -> int:
        """Twice."""
        return 2 * amount_of_things
    def fails(self, dividend):
        """ZeroDivisionError, always."""
        denominator = dividend - dividend
        return dividend / denominator

# >>> not packed: the tools
def tool_of_the_trade():
    """Stays at home."""
    return "tools"
# <<< not packed

def main(arguments=None):
    """The program."""
    h = Hyperparameters.from_env(os.environ)
    plan = depth((Step(0), Step(2, recipe=h), Step(5, push=True)))
    print(json.dumps(dict(h=h.__dict__, name=__name__, plan=plan)))
    if "fail" in sys.argv: GPT(h).fails(dividend=kernel and 3)
    return 0

if __name__ == "__main__":
    raise SystemExit(main())
'''.lstrip()


def load(path: Path, name: str):
    """The module of the file at `path`, registered under `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(readable module, packed module, folder) of VARIETY."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "plain.py").write_text(VARIETY)
    (folder / "packed.py").write_bytes(t.pack_source(VARIETY))
    return load(folder / "plain.py", "plain"), load(folder / "packed.py", "packed"), folder


@pytest.fixture(scope="module")
def shipped_script(tmp_path_factory):
    """(packed train_gpt.py as a module, its path)."""
    path = tmp_path_factory.mktemp("shipped") / "train_gpt.py"
    source = (REPO / "train_gpt.py").read_text()
    path.write_bytes(t.pack_source(source, "RECIPE=demo SEED=5"))
    return load(path, "shipped_train_gpt"), path


def test_the_packed_script_is_at_most_48_000_bytes():
    """As a run ships it, the demo from a CPU: minified, compressed, with the lines that run it. The record's line is shorter."""
    h = t.Hyperparameters.from_env(dict(RECIPE="demo", FUSED_KERNELS="0"))
    code = t.running_source(REPO / "train_gpt.py", h)[1]
    assert code.startswith(t.PACKED) and len(code) <= LIMIT_BYTES


def test_the_packed_script_has_the_same_knobs(shipped_script):
    """Names, types, defaults and meanings of every field; refusals by the same words; the same recipes and one more."""
    packed = shipped_script[0]
    row = lambda f: (f.name, f.type, f.default, f.metadata["meaning"])
    ours, theirs = (list(map(row, dataclasses.fields(m.Hyperparameters))) for m in (t, packed))
    assert ours == theirs
    assert dataclasses.asdict(packed.Hyperparameters.from_env({}, "run")) == dataclasses.asdict(
        t.Hyperparameters.from_env(dict(RECIPE="demo", SEED="5"))) | dict(recipe="run")
    environment = dict(NUM_LAYERS="12", TTT_ENABLED="0", RECIPE="demo")
    ours, theirs = (dataclasses.asdict(m.Hyperparameters.from_env(environment))
                    for m in (t, packed))
    assert ours == theirs
    for bad in (dict(NUM_LAYERS="0"), dict(NUM_LAYRES="3"), dict(MATRIX_LR="fast")):
        sentences = []
        for module in (t, packed):
            with pytest.raises(Exception) as error:
                module.Hyperparameters.from_env(bad)
            sentences.append((type(error.value).__name__, str(error.value)))
        assert sentences[0] == sentences[1] and sentences[0][0] == "Refusal"


def test_the_packed_model_computes_the_same(shipped_script):
    """`GPT(h)(x, y)` equals the readable model's loss bit for bit, gradients included."""
    packed, results = shipped_script[0], []
    ids = torch.arange(2, 34).view(2, 16)
    for module in (t, packed):
        torch.manual_seed(0)
        model = module.GPT(module.Hyperparameters(**dataclasses.asdict(settings())))
        loss = model(ids, ids)
        loss.backward()
        results.append((loss, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(results[0]) > 5 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_packed_main_answers(shipped_script, capsys):
    """`main` prints the same help, and refuses a wrong verb with status 2."""
    said = []
    for module in (t, shipped_script[0]):
        assert module.main(["--help"], {}) == 0 and module.main(["evil"], {}) == 2
        out, err = capsys.readouterr()
        knobs = re.findall(r"^  ([A-Z_0-9]+ +\w+ .{14}).*", out, re.M)    # without their meanings
        said.append(([k.rstrip() for k in knobs], err))
    assert said[0] == said[1] and len(said[0][0]) > 90 and "eval" in said[0][1]


def test_artifacts_cross_between_readable_and_packed(shipped_script):
    """Some names inside are shortened, but what one packs the other unpacks."""
    packed, model = shipped_script[0], model_of(settings())
    blob = t.pack(settings(), t.quantise(model, found_of(model)), quick=True)[0]
    reader = next(f for f in vars(packed).values() if inspect.isfunction(f)
                  and "lengths of its streams" in inspect.getsource(f))
    h, banks = reader(blob, "artifact")
    assert dataclasses.asdict(h) == dataclasses.asdict(t.unpack(blob)[0]) and list(banks) == list(
        t.roles(settings()))


def test_a_packed_script_counts_itself(tmp_path):
    """Where the script that runs is itself packed, its own bytes are the code."""
    script, h = tmp_path / "s.py", settings(seed=7)
    script.write_text(VARIETY)
    text, packed = t.running_source(script, h)
    assert text == VARIETY and packed.startswith(t.PACKED)
    assert packed == t.running_source(script, settings(seed=8))[1] != t.pack_source(VARIETY)    # seeds share one script
    script.write_bytes(packed)
    assert t.running_source(script, h) == (None, packed)


def test_fields_keep_names_types_defaults_and_metadata(pair):
    """Dataclasses and NamedTuples are what they were."""
    plain, packed, _ = pair
    row = lambda f: (f.name, f.type, f.default, f.metadata["check"](0))
    ours, theirs = (list(map(row, dataclasses.fields(m.Hyperparameters))) for m in (plain, packed))
    assert ours == theirs
    parsed = packed.Hyperparameters.from_env({"NUM_LAYERS": "3", "TTT_ENABLED": "1"})
    assert parsed == packed.Hyperparameters(3, ttt_enabled=True)
    step = next(c for c in vars(packed).values() if getattr(c, "_fields", ()) == plain.Step._fields)
    assert step._field_defaults == plain.Step._field_defaults
    assert packed.Hyperparameters.__module__ == "packed" and packed.Hyperparameters.__name__ == "Hyperparameters"


def test_behaviour_is_the_same(pair, capsys):
    """Output, properties, caches and keyword arguments."""
    plain, packed, _ = pair
    said = []
    for module in (plain, packed):
        assert module.main() == 0
        said.append(capsys.readouterr().out.replace(module.__name__, "NAME"))
        assert module.GPT(
            module.Hyperparameters()).width == 77 and module.GPT.doubled(amount_of_things=4) == 8
    assert said[0] == said[1]


def test_decorators_can_read_source_and_annotations(pair):
    """Triton reads both; builtins and None are not aliased in what it reads."""
    plain, packed, _ = pair
    kernel = next(f for f in vars(packed).values() if hasattr(f, "src"))
    assert kernel.constexprs == plain.kernel.constexprs == ["BLOCK_SIZE"]
    assert "BLOCK_SIZE" in kernel.src and "range(" in kernel.src and "None" in kernel.src
    assert "Never runs" not in kernel.src
    ast.parse(kernel.src)
    assert kernel(None, 4, 5) == plain.kernel(None, 4, 5) == 30


def test_sources_and_tracebacks_show_the_text_that_runs(pair):
    """`inspect.getsource` and the last line of a traceback come from the unpacked text."""
    _, packed, _ = pair
    assert inspect.getsource(packed.GPT.fails).lstrip().startswith("def fails(")
    linecache.checkcache()
    with pytest.raises(ZeroDivisionError) as error:
        packed.GPT(None).fails(3)
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert last.name == "fails" and "dividend" in last.line and last.filename.endswith(
        "packed.py*")


def test_fenced_regions_and_docstrings_are_gone(pair):
    """What stands between the fences, comments and docstrings cost nothing."""
    plain, packed, _ = pair
    assert hasattr(plain, "tool_of_the_trade") and not hasattr(packed, "tool_of_the_trade")
    text = t.unpacked((pair[2] / "packed.py").read_bytes(), "packed.py")
    assert not any(word in text for word in ("of_the_trade", "Title", "nested quotes", "#"))


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """The finished command, its output as text, every warning an error."""
    return subprocess.run(command,
                          cwd=folder,
                          env={
                              **os.environ, "PYTHONWARNINGS": "error",
                              **env
                          },
                          capture_output=True,
                          text=True)


def test_as_a_program(pair):
    """Run, imported by its name, run as a module, and failing with an ordinary traceback."""
    folder = pair[2]
    outputs = [
        run(folder, sys.executable, name, NUM_LAYERS="5") for name in ("plain.py", "packed.py")
    ]
    assert outputs[0].stdout == outputs[1].stdout and '"num_layers": 5' in outputs[1].stdout
    assert '"name": "__main__"' in outputs[1].stdout and [o.returncode for o in outputs
                                                          ] == [0, 0], outputs[1].stderr
    failed = run(folder, sys.executable, "packed.py", "fail")
    assert failed.returncode == 1 and failed.stderr.rstrip().endswith(
        "ZeroDivisionError: division by zero")
    assert failed.stderr.isascii() and "in fails" in failed.stderr
    imported = run(folder, sys.executable, "-c",
                   "import packed as p; print(p.Hyperparameters().num_layers, p.GPT)")
    assert imported.returncode == 0 and imported.stdout.startswith("11 <class 'packed.GPT'>")
    assert run(folder, sys.executable, "-m", "packed").returncode == 0


@pytest.mark.parametrize("data", [
    b"", b"'", b'"', b"'''", b"''''", b"\"\"\"'''", b"a\\", b"\\'''", b"\0", b"\x001", b"\x008",
    b"\r\n\r", b"\n", b"\0\0007",
    bytes(range(256)),
    bytes(range(256)) * 2 + b"'\"'\"\"\"'''", b"\\0", b"''\"\"", b"\x1a\x0c\x85"
])
def test_any_bytes_survive_as_a_literal(data, tmp_path):
    """Through a real file, with warnings as errors."""
    file = tmp_path / "literal_file.py"
    file.write_bytes(b"# coding:latin-1\nx=" + t.literal(data) + b"\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(file, "literal_file").x.encode("latin-1") == data


def test_random_bytes_survive_as_a_literal():
    """Two thousand strings of the awkward characters."""
    rng = random.Random(0)
    for _ in range(2000):
        data = bytes(rng.choice(b"\0\r\n\\'\"'\"'\"'\"01a\xff") for _ in range(rng.randrange(40)))
        assert ast.literal_eval(t.literal(data).decode("latin-1")).encode("latin-1") == data


@pytest.mark.parametrize("text, line",
                         [("# >>> not packed\n", 1), ("a=1\n# <<< not packed\n", 2),
                          ("# >>> not packed\n# >>> not packed\n# <<< not packed\n", 1)])
def test_unpaired_fences_are_refused(text, line):
    """The sentence says where."""
    with pytest.raises(t.Refusal, match=f"line {line}:"):
        t.shipped(text)


def test_without_the_minifier_it_says_so_and_still_works(monkeypatch, tmp_path):
    """A longer file and a warning, no failure."""
    monkeypatch.setattr(t, "python_minifier", None)
    with pytest.warns(UserWarning, match="python_minifier"):
        packed = t.pack_source(VARIETY)
    assert len(packed) < 1.6 * len(VARIETY)
    (tmp_path / "fallback.py").write_bytes(packed)
    assert load(tmp_path / "fallback.py", "fallback").Hyperparameters().num_layers == 11
