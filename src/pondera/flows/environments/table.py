"""Any graph, from a table of its edges. Shapes: B states, N nodes, A = E edges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.environments.base import Environment

Node = Hashable


class Table(Environment):
    """A directed acyclic graph given by its edges and the rewards of its last nodes.

    There is one action per edge. Nodes without children are the finished objects, and each needs a reward. An object that can
    also be continued needs a node of its own behind it, which stands for stopping there.

    Source: made here.
    Resolved: the root is the only node without parents. Unfinished nodes have the partial reward 1. The modes are the objects
        with the highest reward.

    Args:
        edges: pairs of parent and child; nodes are numbers or texts.
        rewards: the reward of each last node, at least 0.
        file: a YAML or JSON file with `edges` and `rewards`, in place of the two.

    Example:
        >>> env = Table([("s", "x"), ("s", "y")], {"x": 1.0, "y": 3.0})
        >>> env.graded, env.longest
        (True, 1)
    """

    paper: ClassVar[str] = "any graph, of the user"
    examples: ClassVar[dict[str, str]] = {
        "small": "Table([('s', 'a'), ('s', 'x'), ('a', 'x'), ('a', 'y')], {'x': 1.0, 'y': 2.0})"
    }
    why_graded: ClassVar[str] = "counted from the edges"

    def __init__(self, edges: list | tuple | None = None, rewards: dict | None = None, file: str | None = None) -> None:
        if file is not None:
            if edges is not None or rewards is not None:
                raise UserError("Table: give edges and rewards, or a file with both, not all three")
            edges, rewards = _read(Path(file))
        if not edges or rewards is None:
            raise UserError('Table: give edges=[("s", "x"), ...] and rewards={"x": 1.0, ...}, or file="graph.yaml"')
        pairs = _pairs(edges)
        self.names = _sorted(pairs)
        number = {name: index for index, name in enumerate(self.names)}
        log_R = _log_rewards(rewards, pairs, number)
        nodes = len(self.names)
        self.parent_E = torch.tensor([number[parent] for parent, _ in pairs])
        self.child_E = torch.tensor([number[child] for _, child in pairs])
        self.radices, self.actions = (nodes,), len(pairs)
        self.log_R_N = torch.tensor([log_R.get(name, 0.0) for name in self.names], dtype=torch.float64)
        self._last_N = torch.tensor([name in log_R for name in self.names])
        self._mode_N = self._last_N & (self.log_R_N == max(log_R.values()))
        longest, shortest = [0] * nodes, [0] * nodes  # steps to the end, from the last node to the first
        after: list[list[int]] = [[] for _ in range(nodes)]
        for parent, child in zip(self.parent_E.tolist(), self.child_E.tolist(), strict=True):
            after[parent].append(child)
        for node in reversed(range(nodes)):
            longest[node] = max((1 + longest[child] for child in after[node]), default=0)
            shortest[node] = min((1 + shortest[child] for child in after[node]), default=0)
        self.graded, self.longest = longest[0] == shortest[0], longest[0]
        self._remaining_N = torch.tensor(longest)

    def forward_mask(self, state_BC: Tensor) -> Tensor:
        """Edges that leave the node."""
        return state_BC == self.parent_E

    def backward_mask(self, state_BC: Tensor) -> Tensor:
        """Edges that enter the node."""
        return state_BC == self.child_E

    def step(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """The child of an edge."""
        return self.child_E[action_B][:, None]

    def undo(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """The parent of an edge."""
        return self.parent_E[action_B][:, None]

    def finished(self, state_BC: Tensor) -> Tensor:
        """Whether the node is one of the last."""
        return self._last_N[state_BC[:, 0]]

    def log_partial(self, state_BC: Tensor) -> Tensor:
        """Log reward of last nodes, 0 of others."""
        return self.log_R_N[state_BC[:, 0]]

    def is_mode(self, state_BC: Tensor) -> Tensor:
        """Whether the node has the highest reward."""
        return self._mode_N[state_BC[:, 0]]

    def remaining(self, state_BC: Tensor) -> Tensor:
        """Edges of the longest way to the end."""
        return self._remaining_N[state_BC[:, 0]]

    def count_states(self) -> int:
        """Nodes."""
        return len(self.names)

    def count_modes(self) -> int | None:
        """Nodes with the highest reward."""
        return int(self._mode_N.sum())

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Random last nodes."""
        last = self._last_N.nonzero()
        return last[torch.randint(len(last), (count,), generator=generator)]


def _read(file: Path) -> tuple[Any, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML or JSON: {error}") from None
    if not isinstance(found, Mapping) or set(found) != {"edges", "rewards"}:
        raise UserError(f"{file}: expected `edges`, a list of pairs, and `rewards`, a mapping from node to reward")
    return found["edges"], found["rewards"]


def _pairs(edges: Any) -> list[tuple[Node, Node]]:
    """The edges, checked: pairs of plain names, none twice."""
    pairs: list[tuple[Node, Node]] = []
    for edge in edges:
        fits = isinstance(edge, Sequence) and not isinstance(edge, str) and len(edge) == 2
        if not fits or not all(isinstance(node, (int, str)) for node in edge):
            raise UserError(f"edges: expected pairs of parent and child, numbers or texts, got {edge!r}")
        pairs.append((edge[0], edge[1]))
    if twice := [pair for pair, count in Counter(pairs).items() if count > 1]:
        raise UserError(f"edges: {twice[0]} is given twice; remove one")
    return pairs


def _sorted(pairs: list[tuple[Node, Node]]) -> list[Node]:
    """The nodes, parents before children, from the root.

    Raises:
        UserError: there is a cycle, or not exactly one root.
    """
    after: dict[Node, list[Node]] = {}
    parents: dict[Node, int] = {}
    for parent, child in pairs:
        after.setdefault(parent, []).append(child)
        after.setdefault(child, [])
        parents[child] = parents.get(child, 0) + 1
        parents.setdefault(parent, 0)
    roots = [node for node, count in parents.items() if count == 0]
    waiting, order = list(roots), []
    while waiting:
        order.append(node := waiting.pop())
        for child in after[node]:
            parents[child] -= 1
            if parents[child] == 0:
                waiting.append(child)
    if len(order) < len(parents):
        raise UserError(
            f"edges: there is a cycle, {' -> '.join(map(str, _cycle(after, set(order))))}; remove one of its edges"
        )
    if len(roots) > 1:
        listing = ", ".join(map(repr, roots))
        raise UserError(
            f"edges: {listing} have no parents, so all but one of them cannot be reached; give edges from one root to "
            "the others"
        )
    return order


def _cycle(after: dict[Node, list[Node]], sorted_out: set[Node]) -> list[Node]:
    """A cycle among the nodes that could not be sorted: from the first of them, back by way of unsorted parents."""
    before = {child: parent for parent, children in after.items() if parent not in sorted_out for child in children}
    node = next(node for node in after if node not in sorted_out)
    way: list[Node] = []
    while node not in way:
        way.append(node)
        node = before[node]
    return [node, *reversed(way[way.index(node) :])]


def _log_rewards(rewards: Any, pairs: list[tuple[Node, Node]], number: dict[Node, int]) -> dict[Node, float]:
    """The log reward of each last node.

    Raises:
        UserError: a reward is missing, of a node that is none or goes on, or not a number of at least 0; or all are 0.
    """
    if not isinstance(rewards, Mapping):
        raise UserError(f"rewards: expected a mapping from node to reward, got {rewards!r:.60}")
    going_on = {parent for parent, _ in pairs}
    for node, reward in rewards.items():
        if node not in number:
            raise UserError(f"rewards: {node!r} is in no edge, so it cannot be reached; add an edge to it")
        if node in going_on:
            raise UserError(
                f"rewards: {node!r} has children, so it is no finished object; add an edge from it to a node of its own, "
                f"such as {f'{node} stop'!r}, and give that one the reward"
            )
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not 0 <= reward < math.inf:
            raise UserError(f"rewards: {node!r} has the reward {reward!r}; give a finite number of at least 0")
    missing = [node for node in number if node not in going_on and node not in rewards]
    if missing:
        raise UserError(f"rewards: {missing[0]!r} has no children and no reward; give it one, 0 to forbid it")
    if not any(rewards.values()):
        raise UserError("rewards: all are 0, so there is nothing to draw; give one a reward above 0")
    return {node: math.log(reward) if reward else -math.inf for node, reward in rewards.items()}
