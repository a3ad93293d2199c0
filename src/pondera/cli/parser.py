"""The argument parser of the verbs: settings by dotted name, and errors that name the fix."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pondera.core import run_config
from pondera.core.errors import UserError
from pondera.kernels import CHOICES, WEIGHTS


class Parser(argparse.ArgumentParser):
    """An argument parser for one verb that raises `UserError` for wrong arguments.

    Args:
        verb: name of the verb.
        about: description of the verb.
        examples: example commands, one per line.
        settings: prefix of the settings that can be given as ``--dotted.name VALUE``; default: `None`, no settings.
        kinds: the dataclasses whose settings these are.
        notes: returns the text at the end of ``--help``.

    Example:
        >>> parser = Parser("train", "Trains.", "pondera train plain", settings="")
        >>> _ = parser.add_argument("recipe")
        >>> vars(parser.parse(["plain", "--train.steps", "20", "--backbone.hidden_size=64"]))
        {'recipe': 'plain', 'overrides': {'train.steps': '20', 'backbone.hidden_size': '64'}}
    """

    def __init__(
        self,
        verb: str,
        about: str,
        examples: str,
        settings: str | None = None,
        kinds: Sequence[type] = (run_config.RunConfig,),
        notes: Callable[[], str] | None = None,
    ) -> None:
        lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
        super().__init__(
            prog=f"pondera {verb}",
            description=about,
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._settings, self._kinds = settings, kinds
        self._notes = notes

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses the arguments; settings are in `overrides`, a mapping from dotted name to text.

        Raises:
            UserError: an unknown option (with the nearest one), a missing or extra argument, or an invalid value.
        """
        rest, overrides = self._divide(list(words))
        args = self.parse_args(rest)
        args.overrides = overrides
        return args

    def format_help(self) -> str:
        """The help of the verb, followed by its notes."""
        return super().format_help() + (f"\n{self._notes()}" if self._notes else "")

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError` with a pointer to ``--help``."""
        raise UserError(f"{message}; `{self.prog} --help` lists the arguments")

    def _divide(self, words: list[str]) -> tuple[list[str], dict[str, str]]:
        """Separates ``--setting value`` pairs, whose values argparse would treat as positional arguments."""
        rest: list[str] = []
        overrides: dict[str, str] = {}
        while words:
            word = words.pop(0)
            if word == "--":
                return [*rest, word, *words], overrides
            option, equals, value = word.partition("=")
            own = self._option_string_actions.get(option)
            if own is None and option.startswith("--"):  # settings have the names of Python; dashes are usual, too
                option = "--" + option.removeprefix("--").replace("-", "_")
            if not option.startswith("--") or (own is not None and (own.nargs == 0 or equals)):
                rest.append(word)
                continue
            if own is None and not self._is_setting(option):
                raise self._unknown_option(word.partition("=")[0])
            if not equals:
                if not words or words[0].startswith("--"):
                    raise UserError(f"{option} needs a value: {option} VALUE")
                value = words.pop(0)
            if own is not None:
                rest.append(f"{option}={value}")  # joined, so that a value can start with a dash
            else:
                overrides[option.removeprefix("--")] = value
        return rest, overrides

    def _is_setting(self, option: str) -> bool:
        """Whether an option names a setting or a field in a group of settings, which `run_config.load` checks."""
        name = option.removeprefix("--")
        known = self._setting_names()
        return name in known or ("." in name and name.split(".")[0] in {other.split(".")[0] for other in known})

    def _setting_names(self) -> list[str]:
        if self._settings is None:
            return []
        names = dict.fromkeys(name for kind in self._kinds for name in run_config.fields(kind))
        return [name for name in names if name.startswith(self._settings)]

    def _unknown_option(self, option: str) -> UserError:
        own = [name for name in self._option_string_actions if name.startswith("--")]
        named = [f"--{name}" for name in self._setting_names()]
        leaf = option.removeprefix("--").rpartition(".")[2]
        near = [name for name in named if name.removeprefix("--").rpartition(".")[2] == leaf]
        near = near or difflib.get_close_matches(option, own + named, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return UserError(f"unknown option {option}{hint} (`{self.prog} --help` lists them all)")


def positive_int(smallest: int) -> Callable[[str], int]:
    """An argument type: an integer of at least `smallest`."""

    def read(text: str) -> int:
        value = run_config.scalar(text)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or value < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {smallest}, got {text!r}")
        return value

    return read


def bounded_float(low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], float]:
    """An argument type: a number from `low` (with `above`: not `low` itself) to `high`."""

    def read(text: str) -> float:
        value: Any = run_config.scalar(text)
        fits = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        if not fits or value == float("inf"):
            bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < 1e300 else "")
            raise argparse.ArgumentTypeError(f"expected a number {bound}, got {text!r}")
        return float(value)

    return read


def add_budget(parser: Parser, several: bool = False) -> None:
    """Adds the arguments ``--effort`` and ``--max-passes``.

    Args:
        parser: the parser of the verb.
        several: allow a list of efforts.
    """
    more = "; several efforts, separated by commas, are compared" if several else ""
    parser.add_argument(
        "--effort",
        type=efforts if several else effort,
        metavar="X",
        help=f"compute per token: low, medium, high, or from 0 (one pass per token) to 1 (as trained, the default){more}",
    )
    parser.add_argument("--max-passes", type=positive_int(1), metavar="N", help="maximum number of passes per token")


def add_kv_cache(parser: Parser) -> None:
    """Adds the arguments ``--kv-cache`` and ``--calibrate``."""
    parser.add_argument(
        "--kv-cache",
        metavar="SPEC",
        help="compress the KV cache with a method such as 'SnapKV(256)', see `pondera methods kv_cache` (default: the "
        "model's own)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="with --kv-cache: calibration text for codebooks (default: the training text of the run); `pondera compress "
        "--out` saves the codebooks",
    )


def add_kernels(parser: Parser) -> None:
    """Adds the argument ``--kernels``."""
    parser.add_argument(
        "--kernels",
        choices=CHOICES,
        default="native",
        help="products of up to 8 rows on a CPU: native reads each weight once and is faster, torch is for comparison; equal "
        "up to rounding (default: native; `pondera doctor` says whether it is available)",
    )


def add_weights(parser: Parser, more: str = "") -> None:
    """Adds the argument ``--weights``.

    Args:
        parser: the parser of the verb.
        more: what the verb does with them.
    """
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="int8: linear layers with int8 weights, one scale per output, on a CPU; int8-prompts: the rows of prompts are "
        f"int8 as well, which is faster and less exact{more} (default: as saved)",
    )


def text_notes(purpose: str) -> str:
    """The part of ``--help`` on the settings that select a text.

    Args:
        purpose: use of the text, as a noun.
    """
    helps = {key: run_config.fields()[key].metadata["help"] for key in ("data.text", "data.context", "data.column")}
    lines = "\n".join(f"  --{key:14}{text}" for key, text in helps.items())
    return f"{purpose} (default: the held-out text of the run; required for a model without a run folder):\n{lines}\n"


def effort(text: str) -> str | float:
    """An argument type: a named effort or a number."""
    value: Any = run_config.scalar(text)
    return float(value) if type(value) in (int, float) else text


def efforts(text: str) -> list[str | float]:
    """An argument type: efforts, separated by commas."""
    return [effort(part.strip()) for part in text.split(",")]
