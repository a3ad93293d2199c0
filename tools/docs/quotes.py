"""The experiment on quotes: how often a sentence of the user's files, or what a model quotes, holds the answer."""

from __future__ import annotations

from typing import Any

from tools.docs.tables import generated, read, table


@generated
def quotes(path: str) -> str:
    """What answers, whether it is in a file, and whether it holds the answer."""
    found = read(path)
    rows = [
        (
            row["arm"],
            f"{row['questions']:,}",
            f"{100 * row['verbatim']:.0f} %",
            f"{100 * row['right_document']:.0f} %",
            _held(row),
            "" if row["words"] is None else f"{row['words']:.0f}",
            f"{row['seconds']:.3f}",
        )
        for row in found["rows"]
    ]
    head = ["answer", "questions", "verbatim", "right document", "holds the answer", "words", "seconds"]
    changed = found["changed"]
    about = (
        f"`{found['command']}`: {found['documents']} documents, {found['questions']:,} questions; 95 % intervals (Wilson). "
        "Seconds per question on one thread of a busy machine."
    )
    after = (
        f"After a number in {changed['documents']} documents was changed and their files were added again "
        f"({changed['seconds_per_document']:.2f} s each), {changed['new_answer_held']} of {changed['documents']} quotes hold "
        f"the new number; before, {changed['held_before']} held the old one."
    )
    return f"{table(head, rows)}\n\n{about}\n\n{after}"


def _held(row: dict[str, Any]) -> str:
    low, high = row["held_interval"]
    return f"{100 * row['held']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
