"""Objects that tell the spec string they were built by."""

from __future__ import annotations

import inspect
from typing import Any, Self


class SpecRepr:
    """Keeps what its constructor was given, so that `repr` is a spec: `pondera.core.spec.build` makes the same of it.

    Example:
        >>> class Some(SpecRepr):
        ...     def __init__(self, size: int = 4, mode: str = "fast") -> None: ...
        >>> Some(), Some(8, mode="fast"), Some(mode="slow")
        (Some(), Some(8), Some(mode='slow'))
    """

    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        try:  # copying calls this without arguments, and then sets `_given` with all other attributes
            given = inspect.signature(cls.__init__).bind_partial(made, *args, **kwargs).arguments
        except TypeError:  # `__init__` is about to say what is wrong
            given = {}
        # A tensor without its graph, which could not be copied when an object is built from its description.
        plain = {name: value.detach() if _tensor(value) else value for name, value in list(given.items())[1:]}
        object.__setattr__(made, "_given", plain)
        return made

    def __repr__(self) -> str:
        """What it was given and is not the default."""
        given, parameters = self._given, inspect.signature(type(self)).parameters
        first = next(iter(parameters), None)
        changed = {name: value for name, value in given.items() if _tensor(value) or value != parameters[name].default}
        texts = [repr(value) if name == first else f"{name}={value!r}" for name, value in changed.items()]
        return f"{type(self).__name__}({', '.join(texts)})"


def _tensor(value: Any) -> bool:
    return hasattr(value, "detach") and not isinstance(value, SpecRepr)
