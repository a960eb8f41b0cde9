"""A function's source counts by its tokens: the same in every version of Python, and only that which was
compiled.
"""

import hashlib
import importlib.util
import io
import linecache
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.embedding import source as source_module
from curated_data.embedding.source import class_source, source_of
from tests.embedding import subject

FUNCTIONS = {
    "decorated": subject.decorated.__wrapped__.__wrapped__,
    "wrapper": subject.decorated,
    "helper": subject.helper,
    "first lambda": subject.pair[0],
    "second lambda": subject.pair[1],
    "outer lambda": subject.pair[2],
    "inner lambda": subject.pair[2](0),
    "lambda after letters of two bytes": subject.ünïcode,
    "method": subject.Net.forward,
    "property": subject.Net.p.fget,
    "closure": subject.made,
    "coroutine": subject.co,
}
CLASSES = {"class": subject.Net, "empty class": subject.Base, "dataclass": subject.Data}

# Recorded with Python 3.11, and found the same with 3.12.7, 3.13.2 and 3.14.2.
DIGESTS: dict[str, str] = {
    "decorated": "09f2077f233f",
    "wrapper": "984033f38663",
    "helper": "61b9f7d6be1d",
    "first lambda": "74fd94f70ccd",
    "second lambda": "f3be810f37f3",
    "outer lambda": "1afda03c01f6",
    "inner lambda": "01f7246fad35",
    "lambda after letters of two bytes": "f80f381539d7",
    "method": "0f4aa1092391",
    "property": "5dde8a20315a",
    "closure": "b339adf600eb",
    "coroutine": "222a4ea834a6",
    "class": "6dbd99a32e38",
    "empty class": "c3f123e63621",
    "dataclass": "bfe423508f08",
}


def digest(source):
    return hashlib.sha256(repr(source).encode()).hexdigest()[:12]


def test_digests_are_those_of_every_version_of_python():
    found = {name: digest(source_of(function)) for name, function in FUNCTIONS.items()}
    found |= {name: digest(class_source(kind)) for name, kind in CLASSES.items()}
    assert found == DIGESTS


def test_lambdas_of_one_line_are_told_apart():
    assert len({source_of(FUNCTIONS[name]).tokens for name in FUNCTIONS if "lambda" in name}) == 5
    assert source_of(FUNCTIONS["second lambda"]).tokens == ("lambda", "x", ":", "x", "+", "2")


def test_names_are_those_that_a_function_looks_up():
    decorated = source_of(FUNCTIONS["decorated"])
    assert {"GAIN", "helper", "other"} <= set(decorated.globals)
    assert not {"x", "y", "i", "z", "Undefined", "deco", "é"} & set(decorated.globals)
    assert {"scale", "forward"} <= set(source_of(FUNCTIONS["method"]).attributes)


def imported(path: Path, text: str, name: str = "edited"):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BODY = """
def f(x, k="a"):
    y = [v for v in x if v != 'b']
    if y:
        return {"k": k, **x}
    return f"{x!r:>4}" + k
"""

SAME = {
    "comments": BODY.replace("    if y:", "    # why\n    if y:  # so"),
    "a docstring": BODY.replace("\n    y =", '\n    """Of x."""\n    y ='),
    "layout": BODY.replace("[v for v", "[\n        v for v").replace("    ", "  "),
    "quotes": BODY.replace("'b'", '"b"').replace('"k"', "'k'"),
    "another place in the file": "import os\n\nclass C:\n    pass\n\n\n" + BODY,
    "escapes": BODY.replace("'b'", r"'\x62'"),
}
OTHER = {
    "a name": BODY.replace("if y", "if x"),
    "a number": BODY.replace(">4", ">5"),
    "a string": BODY.replace("'b'", "'c'"),
    "indentation": BODY.replace("    return f", "        return f"),
    "a default": BODY.replace('k="a"', 'k="c"'),
    "an operator": BODY.replace("!=", "=="),
}


@pytest.mark.parametrize("change", SAME)
def test_what_changes_nothing_does_not_count(tmp_path, change):
    assert SAME[change] != BODY
    before = imported(tmp_path / "a.py", BODY).f
    assert source_of(imported(tmp_path / "b.py", SAME[change]).f).tokens == source_of(before).tokens


@pytest.mark.parametrize("change", OTHER)
def test_what_changes_the_result_counts(tmp_path, change):
    assert OTHER[change] != BODY
    before = imported(tmp_path / "a.py", BODY).f
    assert source_of(imported(tmp_path / "b.py", OTHER[change]).f).tokens != source_of(before).tokens


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_token_counts(data, tmp_path_factory):
    """Any name, number or operator of the function exchanged for another."""
    text = BODY.strip() + "\n"
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in (
        tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING)]  # fmt: skip
    token = data.draw(st.sampled_from(tokens))
    other = data.draw(st.sampled_from(["z", "x", "1", "+", "in", "''", "**", "not", "]", "None"]))
    lines = text.splitlines(keepends=True)
    line = lines[token.start[0] - 1]
    lines[token.start[0] - 1] = line[: token.start[1]] + other + line[token.end[1] :]
    changed = "".join(lines)
    try:
        compile(changed, "", "exec")
    except SyntaxError:
        return
    folder = tmp_path_factory.mktemp("code")
    before = imported(folder / "a.py", text)
    try:
        after = imported(folder / "b.py", changed)
    except (NameError, TypeError):  # of a default, which is evaluated then
        return
    if other != token.string and hasattr(after, "f"):
        assert source_of(after.f) != source_of(before.f)


def test_a_file_that_was_edited_after_its_import_is_not_taken_for_the_code(tmp_path):
    module = imported(tmp_path / "a.py", BODY)
    assert source_of(module.f) is not None
    (tmp_path / "a.py").write_text(OTHER["a number"])
    linecache.clearcache()
    assert source_of(module.f) is None
    (tmp_path / "a.py").unlink()
    linecache.clearcache()
    assert source_of(module.f) is None


@pytest.mark.parametrize("text", ["", "def f(:\n", "\0", "x = 1\n"])
def test_damaged_files_have_no_source(tmp_path, text):
    module = imported(tmp_path / "a.py", BODY)
    (tmp_path / "a.py").write_text(text)
    linecache.clearcache()
    assert source_of(module.f) is None


def test_code_without_a_file_has_no_source():
    space: dict = {}
    exec("def f(x):\n    return x\nclass C:\n    pass", space)
    assert source_of(space["f"]) is None
    assert class_source(type("Made", (), {})) is None


@pytest.mark.parametrize("options", [["-O"], ["-OO"], ["-X", "no_debug_ranges"]])
def test_how_python_was_started_does_not_count(options):
    """Needs nothing but the standard library, so another Python could run it as well."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import hashlib, source, subject\n"
        "one = source.source_of(subject.helper), source.class_source(subject.Net)\n"
        "print(hashlib.sha256(repr(one).encode()).hexdigest())"
    )
    folders = [str(Path(module.__file__).parent) for module in (source_module, subject)]
    expected = source_of(subject.helper), class_source(subject.Net)
    run = subprocess.run(
        [sys.executable, *options, "-c", program, *folders], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == hashlib.sha256(repr(expected).encode()).hexdigest()
