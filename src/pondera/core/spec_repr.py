"""SpecRepr: a base class whose `repr` is the spec string of the object."""

from __future__ import annotations

import functools
import inspect
from typing import Any


class SpecRepr:
    """Records the arguments of the constructor, so that `repr` is a spec string from which `spec.build` makes an equal object.

    Example:
        >>> class Some(SpecRepr):
        ...     def __init__(self, size: int = 4, mode: str = "fast") -> None: ...
        >>> Some(), Some(8, mode="fast"), Some(mode="slow")
        (Some(), Some(8), Some(mode='slow'))
    """

    _given: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        construct = cls.__init__

        @functools.wraps(construct)
        def noting(self: Any, *args: Any, **kwargs: Any) -> None:
            if "_given" not in vars(self):  # recorded by the class itself, not by a base class
                given = inspect.signature(construct).bind(self, *args, **kwargs).arguments
                # Detached, because a tensor with a graph cannot be copied.
                plain = {name: value.detach() if _tensor(value) else value for name, value in given.items()}
                object.__setattr__(self, "_given", {name: plain[name] for name in plain if name != "self"})
            construct(self, *args, **kwargs)

        cls.__init__ = noting

    def __repr__(self) -> str:
        """The spec string: arguments that differ from their defaults."""
        given, parameters = self._given, inspect.signature(type(self)).parameters
        first = next(iter(parameters), None)
        changed = {name: value for name, value in given.items() if _tensor(value) or value != parameters[name].default}
        texts = [repr(value) if name == first else f"{name}={value!r}" for name, value in changed.items()]
        return f"{type(self).__name__}({', '.join(texts)})"


def _tensor(value: Any) -> bool:
    return hasattr(value, "detach") and not isinstance(value, SpecRepr)
