"""The one attention function that Pondera registers with transformers, and how a call is handed to it.

transformers looks an attention function up by the name in the configuration of the attention module. A routed module has
a view of its configuration that says Pondera's name while a call of that module is to be served by something else, and
the model's own name at any other time. The model's configuration itself is never changed, so masks, stock caches and
`set_attn_implementation` work as before.

What serves a call is found by a hook before the module: in a keyword that the decoder was given, or by a finder, such as
one that looks at the cache. It is noted in a context variable, so threads do not meet. A hook behind the module raises
where the call was never served. torch.compile runs a routed model with breaks in its graph, and not with ``fullgraph=True``,
as it does not trace context variables.

Shapes: B batch, T tokens, H query heads, G KV heads, K keys, D head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import CodeType
from typing import Any, Protocol

from torch import Tensor, nn

from pondera.core.errors import UserError
from pondera.core.hf import AttentionInterface, PreTrainedConfig

NAME = "pondera"
"""What the attention function is called in transformers' registry; no configuration says so outside of a served call."""
KEYWORD = "attend_by"
"""The keyword of a decoder's forward that says what serves the calls of all its attention modules."""
SERVED = ("sdpa", "eager")
"""The attention implementations of a model that can be stood in for: their masks say which keys a query sees."""
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
        """See `Attention`; `base` is what the module would have called."""
        ...


class Asked:
    """A server that is given by keyword to a decoder, which may drop keywords that it does not know.

    Args:
        server: serves the calls.

    Attributes:
        asked: whether any attention module has called it.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.asked = server, False

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See `Server`."""
        self.asked = True
        return self.server(*args, **kwargs)

    def check(self, model_type: str) -> None:
        """Raises where the decoder has run and its attention never called."""
        if not self.asked:
            raise UserError(
                f"{model_type}: its attention does not go through transformers' attention interface, or its layers drop the "
                "keywords of a call, so that packed and weighted calls cannot run"
            )


Finder = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Server | None]
"""Finds what serves a call of a module from its arguments; `None`: the model's own attention function."""


class _Running:
    """A call that is to be served.

    Args:
        server: serves it.

    Attributes:
        served: whether it did.
    """

    __slots__ = ("served", "server")

    def __init__(self, server: Server) -> None:
        self.server, self.served = server, False


_RUNNING: ContextVar[_Running | None] = ContextVar("pondera_attention", default=None)


class View:
    """The configuration of an attention module, which names Pondera's attention function while a call is to be served.

    Args:
        real: the configuration, which is read and never changed.
    """

    def __init__(self, real: PreTrainedConfig) -> None:
        self.real = real

    @property
    def _attn_implementation(self) -> str | None:
        return self.real._attn_implementation if _RUNNING.get() is None else NAME

    def __getattr__(self, name: str) -> Any:
        if name == "real" or name.startswith("__"):  # copying and pickling ask before there is a `real`
            raise AttributeError(name)
        return getattr(self.real, name)


class _Before:
    """The hook before a routed module: finds what serves the call.

    Attributes:
        find: see `Finder`; `None`: only the keyword counts.
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
            elif _RUNNING.get() is not None:  # never set for nothing, which torch.compile could not trace
                _RUNNING.set(None)
            return None
        _RUNNING.set(_Running(server))
        return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


def _after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    """The hook behind a routed module, also where it raised."""
    running = _RUNNING.get()
    if running is None:
        return
    _RUNNING.set(None)
    if out is not None and not running.served:
        raise UserError(
            f"{type(module).__name__}: its attention was to be served by {type(running.server).__name__}, and it never asked "
            "transformers' attention interface; use the model's stock cache"
        )


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: hands the call to what serves it, with the function that the module would have called."""
    running = _RUNNING.get()
    if running is None:
        raise UserError(
            f"attn_implementation: {NAME!r} is set by Pondera during calls that it serves, and by nobody else; use 'sdpa' or "
            "'eager'"
        )
    running.served = True
    return running.server(base(module), module, query, key, value, attention_mask, **kwargs)


def base(module: nn.Module) -> Attention:
    """The attention function that a routed module calls by itself."""
    view: Any = module.config
    registry, eager = _functions(type(module))
    return registry.get_interface(view.real._attn_implementation, eager)


def implementation(model: nn.Module) -> str | None:
    """The name of the attention implementation of a model's text decoder."""
    config: Any = model.config
    return config.get_text_config(decoder=True)._attn_implementation


def route(model: nn.Module) -> list[nn.Module]:
    """Has every attention module that uses transformers' interface look out for calls that are to be served.

    Args:
        model: changed once, however often this is called; a copy of a routed model is routed.

    Returns:
        The routed modules, in their order; none where the model's attention does not use the interface.
    """
    found = [module for module in model.modules() if _uses_interface(type(module)) and hasattr(module, "config")]
    for module in found:
        if not isinstance(module.config, View):
            module.config = View(module.config)  # type: ignore[arg-type]
            module.register_forward_pre_hook(_Before(), with_kwargs=True)
            module.register_forward_hook(_after, always_call=True)
    return found


def unroute(model: nn.Module) -> None:
    """Takes back what `route` did."""
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
    """Says how a routed module finds what serves its calls."""
    before(module).find = find


def finder(module: nn.Module) -> Finder | None:
    """What `set_finder` said."""
    return before(module).find


def before(module: nn.Module) -> _Before:
    """The hook of a routed module."""
    return next(hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Before))


def asks_for_sdpa(module: nn.Module) -> bool:
    """Whether a module itself compares its implementation with ``"sdpa"``, and would do something else."""
    codes = [inspect.unwrap(function).__code__ for function in _lookups(type(module))]
    return any(
        _ASKED in _names(code) and (constant == "sdpa" or (isinstance(constant, tuple) and "sdpa" in constant))
        for code in codes
        for constant in code.co_consts
    )


def _uses_interface(kind: type[nn.Module]) -> bool:
    """Whether a class of modules, no whole model, looks an attention function up."""
    return not hasattr(kind, "get_input_embeddings") and bool(_lookups(kind))


@functools.cache
def _lookups(kind: type[nn.Module]) -> tuple[Any, ...]:
    """The functions of a class, its own first, that look an attention function up."""
    found = []
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        functions = [inspect.unwrap(value) for value in vars(each).values() if inspect.isfunction(value)]
        found += [function for function in functions if _REGISTRY in _names(function.__code__)]
    return tuple(found)


@functools.cache
def _functions(kind: type[nn.Module]) -> tuple[Any, Attention | None]:
    """The registry that a class of modules looks functions up in, and the one that its file writes out."""
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
