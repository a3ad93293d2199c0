import json

import pytest

from pondera.cli.output import only_json, print_json, print_table
from pondera.cli.parser import Parser, bounded_float, positive_int
from pondera.core.errors import UserError


@pytest.fixture
def parser():
    parser = Parser("try", "Tries.", "pondera try it", settings="")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--count", type=positive_int(1), default=3)
    return parser


@pytest.mark.parametrize(
    ("words", "names", "overrides"),
    [
        ("a b", ["a", "b"], {}),
        ("--data.text X a", ["a"], {"data.text": "X"}),
        ("a --data.text X b --flag", ["a", "b"], {"data.text": "X"}),
        ("a --train.lr=1e-3 b", ["a", "b"], {"train.lr": "1e-3"}),
        ("a --train.min_lr -1", ["a"], {"train.min_lr": "-1"}),
        ("a --train.lr 1 --train.lr 2", ["a"], {"train.lr": "2"}),
        ("a --data.text=", ["a"], {"data.text": ""}),
        ("a --data.text a=b", ["a"], {"data.text": "a=b"}),
        ("a --backbone.rope_parameters.factor 8", ["a"], {"backbone.rope_parameters.factor": "8"}),
        ("a --backbone folder --name n", ["a"], {"backbone": "folder", "name": "n"}),
        ("a -- --data.text b", ["a", "--data.text", "b"], {}),
    ],
)
def test_settings_stand_anywhere(parser, words, names, overrides):
    args = parser.parse(words.split(" "))
    assert (args.names, args.overrides) == (names, overrides)


def test_values_may_start_with_a_dash(parser):
    assert parser.parse(["a", "--text", "- item"]).text == "- item"
    assert parser.parse(["a", "--text", "-"]).text == "-"
    assert parser.parse(["a", "--text=--flag"]).text == "--flag"
    with pytest.raises(UserError, match="--text needs a value"):
        parser.parse(["a", "--text", "--flag"])
    with pytest.raises(UserError, match="ignored explicit argument 'x'"):
        parser.parse(["a", "--flag=x"])


def test_options_are_not_abbreviated(parser):
    with pytest.raises(UserError, match="unknown option --tex; did you mean --text"):
        parser.parse(["a", "--tex", "b"])
    assert parser.parse(["a", "--count", "1e3"]).count == 1000


def test_settings_only_where_they_are_taken():
    some = Parser("some", "", "", settings="data.")
    assert some.parse(["--data.text", "x"]).overrides == {"data.text": "x"}
    none = Parser("none", "", "")
    for parser, word in ((some, "--train.lr"), (some, "--name"), (none, "--data.text")):
        with pytest.raises(UserError, match=f"unknown option {word}"):
            parser.parse([word, "1"])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int(0), ["0", "7", "1e3"], ["-1", "x", "1.5", "none", "", "inf", "true"]),
        (bounded_float(0), ["0", "1e-3", "2"], ["-1", "nan", ".nan", "inf", ".inf", "x", ""]),
        (bounded_float(0, 1, above=True), ["0.5", "1"], ["0", "1.1"]),
    ],
)
def test_numbers(kind, good, bad):
    from argparse import ArgumentTypeError

    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(ArgumentTypeError):
            kind(text)


def test_json_is_strict_and_alone(capsys):
    with only_json(True):
        print("noise")
    print_json({"loss": float("nan"), "best": float("inf"), "name": "é"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "best": None, "name": "é"}
    assert err == "noise\n"


def test_tables_take_text_as_it_is(capsys):
    print_table(["recipe", "loss"], [["[bold]a[/bold]", "1.5 ± 0.1"]])
    assert "[bold]a[/bold]" in capsys.readouterr().out
