"""Packs run folders into one compressed archive and unpacks it.

An archive stores run folders by name. It is reproducible, the same files give the same bytes: names are sorted, and times,
owners and permissions are not stored.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from pondera.core.errors import UserError
from pondera.core.run_folder import write_atomic

ARCHIVE = "runs.tar.xz"
"""File name of a committed archive of run folders."""


def pack(folder: Path, archive: Path) -> int:
    """Writes every file below `folder` to `archive` and returns the number of files.

    Args:
        folder: the folder to pack; files are stored under their paths relative to it.
        archive: the file to write; an existing one is replaced.

    Raises:
        UserError: the folder does not exist or contains no file.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise UserError(f"nothing to pack in {str(folder)!r}; give a folder that contains run folders")
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w:xz", format=tarfile.PAX_FORMAT) as tar:
        for path in files:
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.size = path.stat().st_size
            with open(path, "rb") as file:
                tar.addfile(member, file)
    archive.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(archive, stored.getvalue())
    return len(files)


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Restores the run folders of an archive below `folder`, and returns them sorted by name.

    Raises:
        UserError: the file is missing or is not an archive of run folders.
    """
    try:
        with tarfile.open(archive, "r:xz") as tar:
            tar.extractall(folder, filter="data")
            names = {name.partition("/")[0] for name in tar.getnames()}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"cannot unpack {str(archive)!r}: {error}; give a {ARCHIVE} that `pack` wrote") from None
    return [folder / name for name in sorted(names)]
