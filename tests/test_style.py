"""House rules that a machine can check on train_gpt.py; each failure lists the lines."""
from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest

from conftest import REPO

SOURCE = (REPO / "train_gpt.py").read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
DEFINITIONS = [
    n for n in ast.walk(TREE)
    if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
]
TOKENS = [*tokenize.generate_tokens(io.StringIO(SOURCE).readline)]


def report(found) -> None:
    """Fails with one line per finding, unless there are none."""
    found = list(found)
    assert not found, f"{len(found)} places:\n" + "\n".join(map(str, found[:60]))


def test_no_mutable_module_state():
    """No `global` statement, and no function of the module assigns to an imported module's
    attribute."""
    report(f"{n.lineno}: global" for n in ast.walk(TREE) if isinstance(n, ast.Global))


def test_nothing_can_execute_what_a_file_says():
    """No pickle, no torch.load, no eval or exec of data, no dynamic namespaces."""
    calls = [n for n in ast.walk(TREE) if isinstance(n, ast.Call)]
    report(f"{n.lineno}: {ast.unparse(n)[:60]}" for n in calls if isinstance(n.func, ast.Name)
           and n.func.id in {"eval", "exec", "globals", "locals", "vars", "setattr"})
    imports = [n for n in ast.walk(TREE) if isinstance(n, (ast.Import, ast.ImportFrom))]
    report(f"{n.lineno}: {ast.unparse(n)}" for n in imports
           if {"pickle", "marshal", "shelve", "dill"} & {a.name.split(".")[0]
                                                         for a in n.names})
    report(f"{n.lineno}: {ast.unparse(n)[:60]}" for n in calls
           if ast.unparse(n.func) in {"torch.load", "np.load"})


def test_lines_are_at_most_100_columns():
    """Wide lines do not fit beside each other in a review."""
    report(f"{i}: {len(line)} columns" for i, line in enumerate(LINES, 1) if len(line) > 100)


def test_functions_are_at_most_60_lines():
    """One screen."""
    report(f"{n.lineno}: {n.name} has {n.end_lineno - n.lineno + 1} lines" for n in DEFINITIONS
           if not isinstance(n, ast.ClassDef) and n.end_lineno - n.lineno >= 60)


def test_every_definition_has_a_docstring():
    """Functions, methods, classes and closures: what it returns or means. Properties too."""
    report(f"{n.lineno}: {n.name}" for n in DEFINITIONS if not (ast.get_docstring(n) or "").strip())


def test_docstrings_are_sentences():
    """They begin with a capital, a digit or a shape, and end with a full stop or a closing
    bracket."""
    texts = [(n.lineno, n.name, ast.get_docstring(n).strip()) for n in DEFINITIONS
             if ast.get_docstring(n)]
    report(f"{line}: {name}: {text[-40:]!r}" for line, name, text in texts
           if not re.search(r"[.)]$", text))


def test_a_quarter_of_the_lines_explains():
    """Lines of comments and docstrings are 20 to 28 percent of those that are not blank."""
    words = {token.start[0] for token in TOKENS
             if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")}
    for node in [TREE, *DEFINITIONS]:
        if ast.get_docstring(node) is not None:
            words |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    share = len(words) / sum(bool(line.strip()) for line in LINES)
    assert 0.20 <= share <= 0.28, f"{share:.1%}"


def test_no_line_ends_in_blanks_and_no_tabs():
    """What nobody sees must not differ."""
    report(f"{i}" for i, line in enumerate(LINES, 1) if line != line.rstrip() or "\t" in line)
    assert SOURCE.endswith("\n") and not SOURCE.endswith("\n\n")


def test_errors_are_not_swallowed():
    """No bare except, and no handler that only passes."""
    handlers = [n for n in ast.walk(TREE) if isinstance(n, ast.ExceptHandler)]
    report(f"{n.lineno}: except" for n in handlers
           if n.type is None or all(isinstance(b, ast.Pass) for b in n.body))


def test_sections_follow_the_map():
    """Banners are numbered in rising order, each with a purpose below, and the title's map names
    them all."""
    banners = [
        (int(m[1]), m[2]) for i, line in enumerate(LINES)
        if (m := re.fullmatch(r"# (\d+)\. (.+)", line)) and LINES[i - 1].startswith("# =====")
    ]
    numbers = [number for number, _ in banners]
    assert numbers == sorted(set(numbers)) and numbers[0] == 1 and len(numbers) >= 14
    doc = " ".join(ast.get_docstring(TREE).split()).lower()
    report(name for number, name in banners if f"{number} {name.lower()}" not in doc)


def test_ruff_finds_nothing():
    """Unused names, likely mistakes, order of imports: the rules of .ruff.toml, on the script and the tests."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", REPO], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    """What it is and how to run it; figures stand in tests/README.md."""
    assert len((REPO / "README.md").read_text()) <= 12_000


def test_the_file_is_short():
    """One person can hold it in mind."""
    assert len(LINES) <= 6_400


@pytest.mark.parametrize("name", ["TODO", "FIXME", "XXX", "HACK"])
def test_nothing_is_left_for_later(name):
    """What is not done is an issue, not a comment."""
    report(f"{i}: {line.strip()[:60]}" for i, line in enumerate(LINES, 1)
           if re.search(rf"\b{name}\b", line))
