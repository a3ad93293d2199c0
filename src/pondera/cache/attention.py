"""The attention function that Pondera registers with transformers, and the hooks that route calls to it.

transformers looks up an attention function by the name in the configuration of the attention module. `route` gives each
attention module a view of its configuration. During a call that a server takes over, the view returns Pondera's name; at
any other time it returns the model's own name. `route` never changes the model's configuration itself, so masks, stock
caches and `set_attn_implementation` work as before.

A forward pre-hook of the module determines the server of a call: from a keyword argument of the decoder, or by a finder,
for example one that inspects the cache. The hook stores the server in a context variable, so threads do not interfere. A
forward hook raises if no server was called. torch.compile cannot trace context variables: it runs a routed model with
graph breaks, and fails with ``fullgraph=True``.

Shapes: B batch, T tokens, H query heads, G KV heads, K keys, D head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

from torch import Tensor, nn

from pondera.core.errors import UserError
from pondera.core.hf import AttentionInterface, PreTrainedConfig

NAME = "pondera"
"""The name of the attention function in transformers' registry; a configuration has it only during a served call."""
KEYWORD = "attend_by"
"""The keyword argument of a decoder's forward that passes a server for the calls of all its attention modules."""
SERVED = ("sdpa", "eager")
"""The attention implementations that a server can replace: their masks determine which keys a query sees."""
_REGISTRY, _EAGER, _ASKED = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "_attn_implementation"

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""``(module, query_BHTD, key_BGKD, value_BGKD, attention_mask, **kwargs) -> (out_BTHD, weights or None)``."""


class Server(Protocol):
    """Serves calls of attention modules in place of the model's own attention function."""

    def __call__(
        self,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Attention`; `base` is the attention function that the module would have called."""
        ...


class Asked:
    """A server that a decoder receives as a keyword argument; a decoder may drop keywords that it does not know.

    Args:
        server: serves the calls.

    Attributes:
        asked: whether any attention module has called the server.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.asked = server, False

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See `Server`."""
        self.asked = True
        return self.server(*args, **kwargs)

    def check(self, model_type: str) -> None:
        """Raises if the decoder has run and its attention has not called the server."""
        if not self.asked:
            raise UserError(
                f"{model_type}: its attention does not go through transformers' attention interface, or its layers drop "
                "keyword arguments, so packed calls and calls with a key bias cannot run"
            )


Finder = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Server | None]
"""Finds the server of a call from the module and its arguments; returns `None` for the model's own attention function."""


@dataclass(slots=True)
class _Running:
    """A call of an attention module that a server takes over.

    Args:
        server: serves the call.
        served: whether the server has been called.
    """

    server: Server
    served: bool = False


_RUNNING: ContextVar[_Running | None] = ContextVar("pondera_attention", default=None)


class View:
    """A view of an attention module's configuration that returns Pondera's attention function during a served call.

    Args:
        real: the configuration; the view never changes it.
    """

    def __init__(self, real: PreTrainedConfig) -> None:
        self.real = real

    @property
    def _attn_implementation(self) -> str | None:
        return self.real._attn_implementation if _RUNNING.get() is None else NAME

    def __getattr__(self, name: str) -> Any:
        if name == "real" or name.startswith("__"):  # copying and pickling look up names before `real` is set
            raise AttributeError(name)
        return getattr(self.real, name)


class _Before:
    """The forward pre-hook of a routed module, which finds the server of a call.

    Attributes:
        find: see `Finder`; default: `None`, only the keyword argument counts.
    """

    def __init__(self) -> None:
        self.find: Finder | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        server = kwargs.get(KEYWORD)
        if server is None:
            server = None if self.find is None else self.find(module, args, kwargs)
            if server is not None:
                _RUNNING.set(_Running(server))
            elif _RUNNING.get() is not None:  # set only if needed: torch.compile cannot trace it
                _RUNNING.set(None)
            return None
        _RUNNING.set(_Running(server))
        return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


def _after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    """The forward hook of a routed module; torch also calls it if the module raised."""
    running = _RUNNING.get()
    if running is None:
        return
    _RUNNING.set(None)
    if out is not None and not running.served:
        raise UserError(
            f"{type(module).__name__}: {type(running.server).__name__} serves its attention, but the module never asked "
            "transformers' attention interface for a function; use the model's stock cache"
        )


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: passes the call to its server, with the function that it replaces."""
    running = _RUNNING.get()
    if running is None:
        raise UserError(
            f"attn_implementation: Pondera sets {NAME!r} during calls that it serves, and a user cannot set it; use 'sdpa' "
            "or 'eager'"
        )
    running.served = True
    view: Any = module.config
    registry, eager = _functions(type(module))
    base = registry.get_interface(view.real._attn_implementation, eager)
    return running.server(base, module, query, key, value, attention_mask, **kwargs)


def implementation(model: nn.Module) -> str | None:
    """The name of the attention implementation of a model's text decoder."""
    config: Any = model.config
    return config.get_text_config(decoder=True)._attn_implementation


def route(model: nn.Module) -> list[nn.Module]:
    """Adds hooks to every attention module that uses transformers' attention interface, so that servers can take calls over.

    Args:
        model: the function changes it once, also if it is called again; a copy of a routed model is routed.

    Returns:
        The routed modules, in their order; an empty list if the model's attention does not use the interface.
    """
    modules = [module for module in model.modules() if _uses_interface(type(module)) and hasattr(module, "config")]
    for module in modules:
        if not isinstance(module.config, View):
            module.config = View(module.config)  # type: ignore[arg-type]
            module.register_forward_pre_hook(_Before(), with_kwargs=True)
            module.register_forward_hook(_after, always_call=True)
    return modules


def unroute(model: nn.Module) -> None:
    """Removes the views and hooks that `route` added."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), View):
            module.config = module.config.real  # type: ignore[union-attr]
            for hooks, with_kwargs in (
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
                (module._forward_hooks, module._forward_hooks_always_called),
            ):
                for key in [key for key, hook in hooks.items() if isinstance(hook, _Before) or hook is _after]:
                    del hooks[key]
                    with_kwargs.pop(key, None)


def is_routed(model: nn.Module) -> bool:
    """Whether `route` has been called."""
    return any(isinstance(getattr(module, "config", None), View) for module in model.modules())


def set_finder(module: nn.Module, find: Finder | None) -> None:
    """Sets the finder of a routed module."""
    before(module).find = find


def finder(module: nn.Module) -> Finder | None:
    """The finder that `set_finder` set, or `None`."""
    return before(module).find


def before(module: nn.Module) -> _Before:
    """The forward pre-hook of a routed module."""
    return next(hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Before))


def asks_for_sdpa(module: nn.Module) -> bool:
    """Whether a module compares the name of its implementation with ``"sdpa"``, and would run other code for another name."""
    codes = [inspect.unwrap(function).__code__ for function in _lookups(type(module))]
    return any(
        _ASKED in _names(code) and (constant == "sdpa" or (isinstance(constant, tuple) and "sdpa" in constant))
        for code in codes
        for constant in code.co_consts
    )


def _uses_interface(kind: type[nn.Module]) -> bool:
    """Whether a class of modules (not a whole model) looks up an attention function."""
    return not hasattr(kind, "get_input_embeddings") and bool(_lookups(kind))


@functools.cache
def _lookups(kind: type[nn.Module]) -> tuple[Any, ...]:
    """The functions of a class that look up an attention function, those of the class itself first."""
    lookups = []
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        functions = [inspect.unwrap(value) for value in vars(each).values() if inspect.isfunction(value)]
        lookups += [function for function in functions if _REGISTRY in _names(function.__code__)]
    return tuple(lookups)


@functools.cache
def _functions(kind: type[nn.Module]) -> tuple[Any, Attention | None]:
    """The registry in which a class of modules looks up functions, and the eager function of its file."""
    names = _lookups(kind)[0].__globals__
    return names[_REGISTRY], names.get(_EAGER)


def _names(code: CodeType) -> set[str]:
    return set(_all_names(code))


def _all_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_names(constant)


AttentionInterface.register(NAME, attention)
