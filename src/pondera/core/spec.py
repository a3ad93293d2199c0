"""Spec strings and the index of methods.

A spec string names a method and its arguments like a constructor call, ``PonderLM2(thoughts=1)``: in YAML, in the config of a
checkpoint and on the command line. Arguments are plain values or other methods. The string is parsed, never evaluated.

The folder is the registry. A seam is a folder of ``pondera/methods/`` (``think/``, ``kv_cache/``, ``memory/``, ``chunk/``,
``head/``), and a method is one file in it. The file name without underscores is the class name in lower case:
``think/ponder_lm2.py`` defines ``PonderLM2``. ``base.py`` and files that start with ``_`` define no method. Files are parsed,
and imported only when a method is built. ``quantize/`` has methods that are arguments of other methods, ``probe/`` has
analyses of trained models, ``objective/`` losses of GFlowNets; all are found and built in the same way.

To try a method without changing the package, put its file into a folder with the same subfolders and name that folder::

    my_methods/think/my_idea.py      # defines class MyIdea(Think)
    PONDERA_METHODS=my_methods pondera train ponderlm2 --think "MyIdea(depth=2)"

``PONDERA_METHODS`` takes several folders, separated as in ``PATH``. Loading a checkpoint of such a method needs it, too.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
import typing
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pondera.core.errors import UserError, unknown
from pondera.core.run_config import typed
from pondera.core.seams import FLOWS, PARTS, PROBES, SEAMS, TASKS

PACKAGE = Path(__file__).parent.parent / "methods"
ELSEWHERE = {
    "task": PACKAGE.parent / "data/tasks",
    "questions": PACKAGE.parent / "data/questions",
    "environment": PACKAGE.parent / "flows/environments",
}
"""Folders of the package outside of ``methods/``."""

_SCALARS = (bool, int, float, str, type(None))
_EXAMPLE = (
    "write a method with plain values, e.g. PonderLM2(thoughts=1), Some(sizes=[4, 8], mode='fast', inner=Other())"
)
_SPELLING = {"true": "True", "false": "False", "none": "None", "null": "None"}


@dataclass(frozen=True)
class Spec:
    """A method's name and its arguments: plain values, lists, tuples, mappings, other specs."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodInfo:
    """Description of a method, read from its file without importing it.

    Args:
        name: name of the class.
        seam: name of the folder.
        file: path of the file.
        module: module name for the import.
        summary: first line of the class docstring.
        paper, cost: the class attributes of these names; empty if absent.
        signature: constructor signature, e.g. ``PonderLM2(thoughts: int = 1)``.
        examples: the class attribute of this name: spec strings that the contract tests build, by name.
    """

    name: str
    seam: str
    file: Path
    module: str
    summary: str
    paper: str
    cost: str
    signature: str
    examples: dict[str, str]


def parse(text: str) -> Spec:
    """Parses a spec string.

    Args:
        text: a name, or a call whose arguments are numbers, quoted text, True, False, None, lists, tuples, mappings and
            other specs.

    Raises:
        UserError: the string has any other syntax; the message marks the place.

    Example:
        >>> parse("VQKV(bits=2.75, quantizer=SimVQ(256))")
        Spec(name='VQKV', args=(), kwargs={'bits': 2.75, 'quantizer': Spec(name='SimVQ', args=(256,), kwargs={})})
    """
    text = " ".join(text.splitlines()).strip()
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        _refuse(text, error.msg if text else "it is empty", (error.offset or 1) - 1)
    except (ValueError, MemoryError, RecursionError):
        _refuse(text, "unreadable characters, or nested too deeply", 0)
    if isinstance(node, ast.Name):
        return Spec(node.id)
    value = _value(node, text)
    if not isinstance(value, Spec):
        _refuse_node(text, "this is a value, not a method", node)
    return value


def format(spec: Spec) -> str:
    """The canonical string of a spec, the inverse of `parse`.

    Raises:
        UserError: an argument has a type that a spec does not allow.

    Example:
        >>> format(parse("PonderLM2( 2,mode = 'x' )")), format(parse("PonderLM2"))
        ("PonderLM2(2, mode='x')", 'PonderLM2()')
    """
    return _text(spec)


def index(seams: Sequence[str] = SEAMS + PARTS) -> dict[str, MethodInfo]:
    """All methods by name: those of the package, then those of ``PONDERA_METHODS``, sorted by seam.

    Args:
        seams: the folders to read.

    Raises:
        UserError: a file does not define the class of its name or is not valid Python, two methods have the same name, or
            ``PONDERA_METHODS`` names a folder without seam folders.
    """
    found: dict[str, MethodInfo] = {}
    for root in (PACKAGE, *_user_folders()):
        for seam in seams:
            folder = ELSEWHERE.get(seam, root / seam) if root == PACKAGE else root / seam
            for file in sorted(folder.glob("*.py")):
                if file.name.startswith("_") or file.name == "base.py":
                    continue
                method = _read_method(file, seam, file.read_bytes())
                if method.name in found:
                    raise UserError(
                        f"two methods are called {method.name}: {found[method.name].file}, {file}; rename one"
                    )
                found[method.name] = method
    return found


def find(name: str, seam: str | None = None) -> MethodInfo:
    """Finds a method by name.

    Args:
        name: name of the class.
        seam: required seam; default: `None`, any seam.

    Raises:
        UserError: no such method (the message has the nearest name), or it belongs to another seam.
    """
    methods = index((seam,)) if seam in (*PROBES, *TASKS, *FLOWS) else index()
    method = methods.get(name)
    if method is None:
        allowed = [known.name for known in methods.values() if seam in (None, known.seam)]
        error = unknown(f"{seam} method" if seam else "method", name, allowed)
        if not difflib.get_close_matches(name.lower(), [known.lower() for known in allowed], cutoff=0.7):
            error = UserError(
                f"{error}; if it is a method of your own, set PONDERA_METHODS to the folder that has {seam or 'its'}/"
            )
        raise error
    if seam not in (None, method.seam):
        raise UserError(
            f"{name} is a {method.seam} method; write {method.seam}: {name}(...) instead of {seam}: {name}(...)"
        )
    return method


def build(spec: str | Spec, seam: str) -> Any:
    """Constructs the method of a spec, and the methods among its arguments, importing only their files.

    The arguments must be parameters of the constructor. Those annotated with plain types are checked.

    Args:
        spec: a spec or spec string.
        seam: required seam; methods among the arguments may belong to any seam.

    Raises:
        UserError: a syntax error, an unknown method, an unknown, missing or wrongly typed argument, or a `ValueError` of
            the constructor.
    """
    return _construct(parse(spec) if isinstance(spec, str) else spec, seam)


def _construct(spec: Spec, seam: str | None) -> Any:
    method = find(spec.name, seam)
    cls = load_class(method)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [item for item in inspect.signature(cls).parameters.values() if item.kind not in variadic]
    for key in spec.kwargs:
        if key not in {item.name for item in named}:
            raise unknown(f"argument of {method.name}", key, [item.name for item in named])
    args, kwargs = _built(spec.args), _built(spec.kwargs)
    try:
        bound = inspect.Signature(named).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{format(spec)}: {error}; write {method.signature}") from None
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:  # an annotation that is imported for type checkers only: cannot be checked
        hints = {}
    for name, value in bound.arguments.items():
        bound.arguments[name] = typed(hints.get(name, Any), value, f"{method.name}: {name}")
    try:
        return cls(*bound.args, **bound.kwargs)
    except ValueError as error:
        raise UserError(f"{format(spec)}: {error}") from error


def _built(value: Any) -> Any:
    """Replaces every spec in a value by the constructed method."""
    if isinstance(value, Spec):
        return _construct(value, None)
    if isinstance(value, (list, tuple)):
        return type(value)(_built(item) for item in value)
    if isinstance(value, dict):
        return {key: _built(item) for key, item in value.items()}
    return value


def load_class(method: MethodInfo) -> type:
    """The class that a file of the index holds; imports the file."""
    return getattr(_import(method), method.name)


def _import(method: MethodInfo) -> Any:
    if method.module.startswith("pondera.") or method.module in sys.modules:
        return importlib.import_module(method.module)
    found = importlib.util.spec_from_file_location(method.module, method.file)
    assert found is not None and found.loader is not None
    module = sys.modules[method.module] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[method.module]
        raise
    return module


def _user_folders() -> list[Path]:
    folders = [
        Path(part).expanduser().resolve() for part in os.environ.get("PONDERA_METHODS", "").split(os.pathsep) if part
    ]
    for folder in folders:
        if not any((folder / seam).is_dir() for seam in SEAMS + PARTS + PROBES + TASKS + FLOWS):
            listing = ", ".join(f"{seam}/" for seam in SEAMS + PARTS + PROBES + TASKS + FLOWS)
            raise UserError(f"PONDERA_METHODS: {str(folder)!r} contains none of the folders {listing}")
    return folders


# Reading a method's file


@functools.cache
def _read_method(file: Path, seam: str, source: bytes) -> MethodInfo:
    # The index is read for every model that is built; a file is parsed again only if its content changed.
    wanted = file.stem.replace("_", "")
    try:
        body = ast.parse(source, filename=file.name).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file}: not valid Python: {error}") from None
    cls = next((node for node in body if isinstance(node, ast.ClassDef) and node.name.lower() == wanted), None)
    if cls is None:
        raise UserError(
            f"{file}: a file in {seam}/ must define the method of its name, but there is no class whose name in lower "
            f"case is {wanted!r}; rename the class or the file (start the file name with an underscore if it is no method)"
        )
    folder = ELSEWHERE.get(seam, PACKAGE / seam)
    package = ".".join(folder.relative_to(PACKAGE.parent).parts)
    module = f"pondera.{package}.{file.stem}"
    if not any(
        file.is_relative_to(folder) for folder in (PACKAGE, *ELSEWHERE.values())
    ):  # several folders may have a file of the same name
        module = f"pondera_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    texts = _texts(cls)
    return MethodInfo(
        name=cls.name,
        seam=seam,
        file=file,
        module=module,
        summary=(ast.get_docstring(cls) or "").partition("\n")[0],
        paper=texts.get("paper", ""),
        cost=texts.get("cost", ""),
        signature=f"{cls.name}({', '.join(_parameters(cls))})",
        examples=_examples(cls, file),
    )


def _examples(cls: ast.ClassDef, file: Path) -> dict[str, str]:
    """The class attribute `examples`, which is a literal."""
    for node in cls.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and "examples" in map(_name, targets) and node.value:
            try:
                found = ast.literal_eval(node.value)
            except ValueError:
                found = None
            if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
                raise UserError(f'{file}: examples: write text by name, such as {{"exact": "{cls.name}()"}}')
            return found
    return {}


def _name(target: ast.AST | None) -> str:
    return target.id if isinstance(target, ast.Name) else ""


def _texts(cls: ast.ClassDef) -> dict[str, str]:
    """The class attributes that are string literals."""
    found: dict[str, str] = {}
    for node in cls.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if isinstance(node.value.value, str):
                found |= {target.id: node.value.value for target in targets if isinstance(target, ast.Name)}
    return found


def _parameters(cls: ast.ClassDef) -> Iterator[str]:
    """The parameters of the constructor as text, from ``__init__`` or from the fields of a dataclass."""
    parameters: list[tuple[str, ast.expr | None, ast.expr | None]] = []
    init = next((node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    if init is not None:
        args = init.args.posonlyargs + init.args.args
        defaults = [None] * (len(args) - len(init.args.defaults)) + init.args.defaults + init.args.kw_defaults
        arguments = zip(args + init.args.kwonlyargs, defaults, strict=True)
        parameters = [(arg.arg, arg.annotation, default) for arg, default in arguments][1:]
    elif any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
        assigned = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
        parameters = [(ast.unparse(node.target), node.annotation, node.value) for node in assigned]
    for name, annotation, default in parameters:
        kind = ast.unparse(annotation) if annotation else ""
        if "ClassVar" not in kind:
            yield name + (f": {kind}" if kind else "") + (f" = {ast.unparse(default)}" if default else "")


# Spec text


def _value(node: ast.AST, text: str) -> Any:
    match node:
        case ast.Constant(value=value) if type(value) in _SCALARS:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as n)) if not isinstance(n, bool):
            return -n
        case ast.List(elts=items):
            return [_value(item, text) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, text) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = [(_value(key, text), _value(value, text)) for key, value in zip(keys, values, strict=True) if key]
            if all(type(key) in _SCALARS for key, _ in pairs):
                return dict(pairs)
        case ast.Name(id=name) if name[0].isupper():
            return Spec(name)
        case ast.Name(id=name):
            _refuse_node(text, f"write {_SPELLING.get(name.lower(), repr(name))}", node)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(word.arg for word in keywords):
            kwargs: dict[str, Any] = {}
            for word in keywords:
                if word.arg in kwargs:
                    _refuse_node(text, f"{word.arg} is given twice", word)
                kwargs[str(word.arg)] = _value(word.value, text)
            return Spec(name, tuple(_value(arg, text) for arg in args), kwargs)
    _refuse_node(text, "only names, plain values and other methods are allowed here", node)


def _text(value: Any) -> str:
    if isinstance(value, Spec):
        args = [_text(arg) for arg in value.args] + [f"{key}={_text(arg)}" for key, arg in value.kwargs.items()]
        return f"{value.name}({', '.join(args)})"
    if type(value) is list:
        return f"[{', '.join(map(_text, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        return f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
    if type(value) is float and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # Python has no literal for infinity; this one overflows to it
    if type(value) not in _SCALARS or value != value:
        raise UserError(f"{value!r} cannot be written in a spec; use numbers, text, lists, tuples, mappings or specs")
    return repr(value)


def _refuse_node(text: str, why: str, node: Any) -> NoReturn:
    line = text.encode()  # ast counts bytes
    start, length = len(line[: node.col_offset].decode()), len(line[node.col_offset : node.end_col_offset].decode())
    _refuse(text, why, start, length)


def _refuse(text: str, why: str, start: int, length: int = 1) -> NoReturn:
    raise UserError(f"cannot read this spec: {why}\n  {text}\n  {' ' * start}{'^' * length}\n{_EXAMPLE}")
