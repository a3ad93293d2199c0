"""The experiment on the rounds of the training: costs, and accuracy at the training length and at a longer one."""

from __future__ import annotations

from pondera.evaluation.significance import gap
from tools.docs.tables import generated, over_seeds, read, table


@generated
def train_rounds(path: str) -> str:
    """One row per setting; training costs are relative to the first row, differences are paired by seed."""
    found = read(path)
    first, rows, said = found["rows"][0], [], []
    length = first["longer_accuracy"]["context"]
    comparisons = 2 * (len(found["rows"]) - 1)
    for row in found["rows"]:
        rows.append(
            (
                f"`{row['name']}`",
                f"{row['train_flops']['mean'] / first['train_flops']['mean']:.2f} ×",
                *(over_seeds(row[key]["values"]) for key in ("accuracy", "longer_accuracy")),
            )
        )
        if row is not first:
            for key, where in (("accuracy", "at the training length"), ("longer_accuracy", f"at {length} tokens")):
                mine, other = (dict(zip(each["seeds"], each[key]["values"], strict=True)) for each in (row, first))
                one = gap(mine, other, comparisons)
                sure = (
                    one.doubt
                    if one.margin is None
                    else f"95 % CI ± {one.margin:.3f}, {one.how}, {one.seeds}: {one.judged}"
                )
                said.append(f"- {row['name']}, {where}: {one.mean:+.3f} ({sure}).")
    head = ["model", "training FLOPs", "accuracy", f"accuracy at {length} tokens"]
    source = f"`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."
    about = f"Differences to `{first['name']}` in accuracy:"
    return f"{table(head, rows)}\n\n{about}\n\n" + "\n".join(said) + f"\n\n{source}"
