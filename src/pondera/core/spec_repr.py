"""SpecRepr: a base class whose `repr` is the spec string of the object."""

from __future__ import annotations

import inspect
from typing import Any, Self


class SpecRepr:
    """Records the arguments of the constructor, so that `repr` is a spec string from which `spec.build` makes an equal object.

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
        """The spec string: arguments that differ from their defaults."""
        given, parameters = self._given, inspect.signature(type(self)).parameters
        first = next(iter(parameters), None)
        changed = {name: value for name, value in given.items() if _tensor(value) or value != parameters[name].default}
        texts = [repr(value) if name == first else f"{name}={value!r}" for name, value in changed.items()]
        return f"{type(self).__name__}({', '.join(texts)})"


def _tensor(value: Any) -> bool:
    return hasattr(value, "detach") and not isinstance(value, SpecRepr)
