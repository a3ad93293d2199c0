"""Cards say what the results files say, one for every method, and `pondera methods` prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import scripts

from pondera.cli.main import main
from pondera.core import spec
from pondera.core.cards import cards

tool, claims, measured = (scripts.load(f"tools.{name}") for name in ("cards", "claims", "measured"))
CARDS = {path.stem: json.loads(path.read_text()) for path in sorted(tool.CARDS.glob("*.json"))}


def comparison(folder: Path, scores: dict[str, list[float]]) -> str:
    """A made-up results file."""

    def row(name: str, values: list[float]) -> dict[str, Any]:
        means = {"parameters": {"mean": 2e6}, "train_tokens": {"mean": 3e6}, "train_flops": {"mean": sum(values)}}
        return {"name": name, "seeds": [0, 1, 2], "bits_per_byte": {"values": values}, **means}

    rows = [row(name, values) for name, values in scores.items()]
    (folder / "found.json").write_text(json.dumps({"command": "python it.py", "rows": rows}))
    return str(folder / "found.json")


def test_cards_are_what_the_tool_generates():
    wanted = tool.files()
    assert {path for path in wanted if path.parent == tool.CARDS} == set(tool.CARDS.glob("*.json"))
    for path, text in wanted.items():
        assert path.read_text() == text, f"{path.name}: run python -m tools.cards"


def test_every_method_has_a_card_and_no_other_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PONDERA_METHODS", raising=False)
    assert set(cards()) == set(CARDS) == set(spec.index())
    for name, card in CARDS.items():
        assert card["verdict"] in claims.VERDICTS and card["claim"].endswith("."), name
        assert card["claim"].startswith("A control: ") == (card["verdict"] == "control"), name


@pytest.mark.parametrize("name", CARDS)
def test_a_number_has_its_file_and_command(name: str):
    assert CARDS[name]["measured"] or CARDS[name]["verdict"] in ("claim not tested here", "control")
    for one in CARDS[name]["measured"]:
        assert one["command"] == json.loads((scripts.ROOT / one["file"]).read_text())["command"]
        script = one["command"].split()[1:3]
        path = f"{script[1].replace('.', '/')}.py" if script[0] == "-m" else script[0]
        assert (scripts.ROOT / path).is_file(), one["command"]


def test_a_difference_is_paired_by_seed(tmp_path: Path):
    file = comparison(tmp_path, {"mine": [1.9, 2.0, 2.1], "plain": [2.0, 2.1, 2.2], "noisy": [2.4, 1.7, 2.1]})
    clear = measured.difference(file, "mine", "plain", "against plain")
    assert clear.value == pytest.approx(-0.1) and clear.significant and clear.ci95 == pytest.approx(0, abs=1e-9)
    assert (clear.seeds, clear.setting, clear.command) == (3, "2.0 M parameters, 3.00 M tokens", "python it.py")
    assert "significant" in clear.number() and "not significant" not in clear.number()
    assert "not significant" in measured.difference(file, "mine", "noisy", "against noisy").number()
    assert measured.ratio(file, "mine", "plain", "train_flops", "cost").value == pytest.approx(6.0 / 6.3)


def test_a_line_shares_what_neighbours_have_in_common():
    def one(what: str, value: Any, seeds: int | None = 3) -> Any:
        return measured.Measure(what, value, "%", "a.json", "python a.py", "small", seeds)

    claim = claims.Claim("A control: none.", "control", note="A note.")
    found = [one("recall, list", 30.0), one("recall, copy", (40.0, 50.0)), one("speed", 10.0, None)]
    assert (
        tool.line(claim, found) == "Recall: list 30 %, copy 40 to 50 % (small, 3 seeds). Speed: 10 % (small). A note."
    )


def test_methods_prints_the_card(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert main(["methods", "PonderLM2"]) == 0
    said = capsys.readouterr().out
    assert cards()["PonderLM2"].measured in said and "partly" in said
    own = tmp_path / "think" / "own_idea.py"
    own.parent.mkdir()
    own.write_text('class OwnIdea:\n    """Thinks."""\n')
    monkeypatch.setenv("PONDERA_METHODS", str(tmp_path))
    assert main(["methods", "OwnIdea", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] is None
