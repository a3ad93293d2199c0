"""Objects that tell the spec string they were built by."""

from __future__ import annotations

import functools
import inspect
from typing import Any


class SpecRepr:
    """Notes what its constructor was given, so that `repr` is a spec: `pondera.core.spec.build` makes the same of it.

    Example:
        >>> class Some(Described):
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
            if "_given" not in vars(self):  # by the class itself, not by the one it is derived from
                given = inspect.signature(construct).bind(self, *args, **kwargs).arguments
                # A tensor without its graph, which could not be copied when an object is built from its description.
                plain = {name: value.detach() if _tensor(value) else value for name, value in given.items()}
                object.__setattr__(self, "_given", {name: plain[name] for name in plain if name != "self"})
            construct(self, *args, **kwargs)

        cls.__init__ = noting

    def __repr__(self) -> str:
        """What it was given and is not the default."""
        given, parameters = self._given, inspect.signature(type(self)).parameters
        first = next(iter(parameters), None)
        changed = {name: value for name, value in given.items() if _tensor(value) or value != parameters[name].default}
        texts = [repr(value) if name == first else f"{name}={value!r}" for name, value in changed.items()]
        return f"{type(self).__name__}({', '.join(texts)})"


def _tensor(value: Any) -> bool:
    return hasattr(value, "detach") and not isinstance(value, SpecRepr)
