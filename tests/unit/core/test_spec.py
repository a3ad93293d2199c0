import math
import os
import subprocess
import sys
from keyword import iskeyword
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.core.spec import Spec

IDEA = '''
from __future__ import annotations
import dataclasses
from typing import TYPE_CHECKING, ClassVar
if TYPE_CHECKING:
    from nowhere import Missing

class Helper:
    """Not the method."""

class MyIdea:
    """Thinks twice.

    And more.
    """
    paper: ClassVar[str] = "A paper, " "arXiv 1234.5678"
    cost = "two passes"
    def __init__(self, depth: int, /, rate: float = 0.5, *rest: int, sizes: tuple[int, ...] | None = None,
                 mode: str | int = "fast", inner=None, **more):
        if depth < 0:
            raise ValueError(f"depth must not be negative, got {depth}")
        self.depth, self.rate, self.sizes, self.mode, self.inner = depth, rate, sizes, mode, inner
'''
KEEPER = '''
from dataclasses import dataclass, field
from typing import ClassVar
raise_on_import = RAISE

@dataclass
class Keeper:
    """Keeps."""
    cost: ClassVar[str] = "not yet known"
    bits: float
    flag: bool = False
    inner: object = None
'''
HINTLESS = """
from __future__ import annotations
class Hintless:
    def __init__(self, other: Missing = None, steps: int = 1):
        self.steps = steps
"""


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """A folder of user methods: think/my_idea.py, think/hintless.py, memory/keeper.py."""
    write(tmp_path / "think/my_idea.py", IDEA)
    write(tmp_path / "think/hintless.py", HINTLESS)
    write(tmp_path / "think/_shared.py", "class Shared: pass")
    write(tmp_path / "think/base.py", "class Think: pass")
    write(tmp_path / "memory/keeper.py", KEEPER.replace("RAISE", "None"))
    monkeypatch.setattr(spec, "PACKAGE", tmp_path / "no package")
    monkeypatch.setenv("PONDERA_METHODS", str(tmp_path))
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def error(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


# Text

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not iskeyword(name))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def containers(inner):
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(scalars, inner, max_size=3)
        | specs(inner)
    )


def specs(inner):
    return st.builds(Spec, names, st.lists(inner, max_size=2).map(tuple), st.dictionaries(names, inner, max_size=3))


@settings(deadline=None)
@given(specs(st.recursive(scalars, containers, max_leaves=8)))
@example(Spec("X", (math.inf, -math.inf, -0.0, (1,), ()), {"a": "\u2028\ud800\n"}))
def test_parse_reads_back_what_format_writes(value):
    text = spec.format(value)
    assert spec.parse(text) == value
    assert spec.format(spec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PonderLM2", Spec("PonderLM2")),
        (" PonderLM2( ) ", Spec("PonderLM2")),
        ("X(1, -2.5, a='é', b=None,)", Spec("X", (1, -2.5), {"a": "é", "b": None})),
        ("X(a=[1, (2,)], b={'k': -1})", Spec("X", (), {"a": [1, (2,)], "b": {"k": -1}})),
        ("X(\n  a=1,\n  b=2,\n)", Spec("X", (), {"a": 1, "b": 2})),
        (
            "VQKV(bits=2.75, quantizer=Residual(SimVQ(size=256), Plain))",
            Spec(
                "VQKV",
                (),
                {"bits": 2.75, "quantizer": Spec("Residual", (Spec("SimVQ", (), {"size": 256}), Spec("Plain")))},
            ),
        ),
    ],
)
def test_parse(text, expected):
    assert spec.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "why", "pointed"),
    [
        ("X(a=1+2)", "only names, plain values", "1+2"),
        ("X(é='é', b=1+2)", "only names, plain values", "1+2"),
        ("X(\n a=1,\n b=2*3)", "only names, plain values", "2*3"),
        ("os.system('true')", "only names, plain values", "os.system('true')"),
        ("X(a=[i for i in y])", "only names, plain values", "[i for i in y]"),
        ("X(a=lambda: 1)", "only names, plain values", "lambda: 1"),
        ("X(f'{a}')", "only names, plain values", "f'{a}'"),
        ("X(*[1])", "only names, plain values", "*[1]"),
        ("X(**{'a': 1})", "only names, plain values", "X(**{'a': 1})"),
        ("X({**{}})", "only names, plain values", "{**{}}"),
        ("X({[1]: 2})", "only names, plain values", "{[1]: 2}"),
        ("X(-True)", "only names, plain values", "-True"),
        ("X(b'raw')", "only names, plain values", "b'raw'"),
        ("X(1j)", "only names, plain values", "1j"),
        ("X(...)", "only names, plain values", "..."),
        ("X(mode=fast)", "write 'fast'", "fast"),
        ("X(a=true)", "write True", "true"),
        ("X(a=null)", "write None", "null"),
        ("X(a=1, a=2)", "a is given twice", "a=2"),
        ("3", "a value, not a method", "3"),
        ("X(a=1", "never closed", "("),
        ("X(); import os", "invalid syntax", ";"),
    ],
)
def test_unreadable_text_is_pointed_at(text, why, pointed):
    message = error(spec.parse, text)
    first, line, carets, example = message.splitlines()
    assert why in first
    assert line.strip() == " ".join(text.splitlines())
    assert line[carets.index("^") : carets.rindex("^") + 1] == pointed
    assert "PonderLM2(thoughts=1)" in example


@pytest.mark.parametrize("text", ["", "X(\0)", "X('\ud800')", "(" * 500, "-" * 20000 + "1"])
def test_hostile_text_is_a_user_error(text):
    assert "cannot read this spec" in error(spec.parse, text)


def test_parsing_runs_nothing(tmp_path):
    error(spec.parse, f"X(open({str(tmp_path / 'made')!r}, 'w').close())")
    spec.parse(f"open({str(tmp_path / 'made')!r}, 'w')")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [float("nan"), object(), {1}, Spec])
def test_format_refuses_what_text_cannot_hold(value):
    assert "cannot be written in a spec" in error(spec.format, Spec("X", (value,)))


# Index


def test_index_reads_files_without_importing(methods):
    write(methods / "memory/keeper.py", KEEPER.replace("RAISE", "1 / 0"))
    found = spec.index()
    assert list(found) == ["Hintless", "MyIdea", "Keeper"]
    idea = found["MyIdea"]
    assert (idea.seam, idea.file, idea.summary) == ("think", methods / "think/my_idea.py", "Thinks twice.")
    assert (idea.paper, idea.cost) == ("A paper, arXiv 1234.5678", "two passes")
    assert idea.signature == (
        "MyIdea(depth: int, rate: float = 0.5, sizes: tuple[int, ...] | None = None, "
        "mode: str | int = 'fast', inner = None)"
    )
    assert found["Keeper"].signature == "Keeper(bits: float, flag: bool = False, inner: object = None)"
    assert (found["Keeper"].seam, found["Keeper"].paper, found["Keeper"].cost) == ("memory", "", "not yet known")
    assert found["Hintless"].summary == ""
    with pytest.raises(ZeroDivisionError):
        spec.build("Keeper(bits=1)", "memory")


def test_shipped_methods_say_what_they_are(monkeypatch):
    monkeypatch.delenv("PONDERA_METHODS", raising=False)
    for name, method in spec.index().items():
        assert method.module == f"pondera.methods.{method.seam}.{method.file.stem}"
        assert all((method.summary, method.paper, method.cost)), name


def test_examples_are_read_without_importing(methods):
    found = methods / "memory" / "keeper.py"
    line = '    examples = {"exact": "Keeper(bits=1)"}\n    cost: ClassVar'
    write(found, KEEPER.replace("RAISE", "1 / 0").replace("    cost: ClassVar", line))
    assert spec.index()["Keeper"].examples == {"exact": "Keeper(bits=1)"} and spec.index()["MyIdea"].examples == {}
    write(
        found,
        KEEPER.replace("RAISE", "None").replace("    cost: ClassVar", "    examples = made()\n    cost: ClassVar"),
    )
    assert "examples: write text by name" in error(spec.index)


def test_shipped_examples_are_specs_of_their_methods():
    for name, method in spec.index(spec.SEAMS + spec.PARTS).items():
        if method.file.is_relative_to(spec.PACKAGE):
            assert method.examples and {spec.parse(text).name for text in method.examples.values()} == {name}


def test_a_missing_seam_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(spec, "PACKAGE", tmp_path)
    monkeypatch.delenv("PONDERA_METHODS", raising=False)
    assert spec.index() == {}
    assert "there are none yet" in error(spec.find, "MyIdea", "think")


def test_several_user_folders(methods, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    write(other / "chunk/cutter.py", "class Cutter: pass")
    monkeypatch.setenv("PONDERA_METHODS", f"{methods}{os.pathsep}{other}{os.pathsep}")
    assert {"MyIdea", "Cutter"} <= spec.index().keys()
    write(other / "think/my_idea.py", IDEA)
    message = error(spec.index)
    assert "two methods are called MyIdea" in message and str(other) in message and str(methods) in message


def test_a_folder_without_seams_is_refused(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "absent"):
        monkeypatch.setenv("PONDERA_METHODS", str(folder))
        assert f"PONDERA_METHODS: {str(folder)!r} contains none of the folders think/" in error(spec.index)


def test_a_file_without_its_class_is_refused(methods):
    write(methods / "think/other_idea.py", "class Idea: pass")
    assert "no class whose name in lower case is 'otheridea'" in error(spec.index)


def test_a_broken_file_is_named(methods):
    write(methods / "think/my_idea.py", "class MyIdea:\n    x = = 1")
    message = error(spec.index)
    assert "my_idea.py: not valid Python" in message and "line 2" in message


def test_a_file_is_parsed_once_and_again_when_it_says_something_else(methods):
    before = spec.index()["MyIdea"]
    assert spec.index()["MyIdea"] is before
    write(methods / "think/my_idea.py", IDEA.replace("Thinks twice.", "Thinks never."))
    assert spec.index()["MyIdea"].summary == "Thinks never."


def test_find(methods):
    assert spec.find("MyIdea", "think") == spec.find("MyIdea") == spec.index()["MyIdea"]
    assert error(spec.find, "myidea", "think") == (
        "unknown think method 'myidea'; did you mean 'MyIdea'? (allowed: Hintless, MyIdea)"
    )
    assert "did you mean 'Keeper'" in error(spec.find, "Keepr")
    assert "Keeper is a memory method; write memory: Keeper(...)" in error(spec.find, "Keeper", "think")


# Build


def test_build(methods):
    idea = spec.build("MyIdea(3, rate=1, sizes=[4, 8], inner=Keeper(bits=2, inner=[MyIdea(1)]))", "think")
    assert (idea.depth, idea.rate, idea.sizes, idea.mode) == (3, 1.0, (4, 8), "fast")
    assert type(idea.rate) is float
    assert type(idea.inner).__name__ == "Keeper" and idea.inner.bits == 2.0
    (innermost,) = idea.inner.inner
    assert type(innermost) is type(idea), "a file is imported once"
    assert spec.build(Spec("Keeper", (), {"bits": 1}), "memory").bits == 1.0
    assert spec.build("Hintless(steps=2)", "think").steps == 2


def test_equal_stems_in_different_folders_are_different_modules(methods, tmp_path_factory, monkeypatch):
    first = type(spec.build("MyIdea(1)", "think"))
    other = tmp_path_factory.mktemp("other")
    write(other / "think/my_idea.py", IDEA)
    monkeypatch.setenv("PONDERA_METHODS", str(other))
    assert type(spec.build("MyIdea(1)", "think")) is not first


def test_a_failed_import_is_not_remembered(methods):
    write(methods / "memory/keeper.py", KEEPER.replace("RAISE", "1 / 0"))
    with pytest.raises(ZeroDivisionError):
        spec.build("Keeper(bits=1)", "memory")
    write(methods / "memory/keeper.py", KEEPER.replace("RAISE", "None"))
    assert spec.build("Keeper(bits=1)", "memory").bits == 1.0


@pytest.mark.parametrize(
    ("text", "seam", "message"),
    [
        ("MyIdea(1, rat=2)", "think", "unknown argument of MyIdea 'rat'; did you mean 'rate'?"),
        ("MyIdea", "think", "MyIdea(): missing a required argument: 'depth'; write MyIdea(depth: int, rate"),
        (
            "Keeper(flag=True)",
            "memory",
            "Keeper(flag=True): missing a required argument: 'bits'; write Keeper(bits: float",
        ),
        ("MyIdea(1, 0.5, 7)", "think", "MyIdea(1, 0.5, 7): too many positional arguments; write MyIdea(depth"),
        ("MyIdea(1, 0.5, rate=1.0)", "think", "multiple values for argument 'rate'"),
        ("MyIdea('two')", "think", "MyIdea: depth: expected int, got 'two'"),
        ("MyIdea(True)", "think", "MyIdea: depth: expected int, got True"),
        ("MyIdea(1.5)", "think", "MyIdea: depth: expected int, got 1.5"),
        ("MyIdea(1, mode=None)", "think", "MyIdea: mode: expected str or int, got None"),
        ("MyIdea(1, sizes=3)", "think", "MyIdea: sizes: expected tuple or none, got 3"),
        ("Keeper(bits=None)", "memory", "Keeper: bits: expected float, got None"),
        ("Keeper(1, flag=1)", "memory", "Keeper: flag: expected bool, got 1"),
        ("MyIdea(-1)", "think", "MyIdea(-1): depth must not be negative, got -1"),
        ("Keeper(1, inner=MyIdea(-1))", "memory", "MyIdea(-1): depth must not be negative, got -1"),
        ("Keeper(1, inner=Nothing())", "memory", "unknown method 'Nothing'"),
        ("Keeper(1)", "think", "Keeper is a memory method"),
        ("Keeper(1", "memory", "cannot read this spec"),
    ],
)
def test_build_refuses(methods, text, seam, message):
    assert message in error(spec.build, text, seam)


def test_indexing_imports_no_heavy_library():
    code = (
        "import sys; from pondera.core import run_config, spec; spec.index(); spec.parse('X(a=1)');"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    env = {key: value for key, value in os.environ.items() if key != "PONDERA_METHODS"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(spec.PACKAGE.parent.parent), env.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
