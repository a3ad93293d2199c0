"""Opens a file that the user named, compressed or not, and says what is wrong with it."""

from __future__ import annotations

import difflib
import gzip
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pondera.core.errors import UserError
from pondera.data.row_files import READERS, BadRows, NoRows

ADVICE = f"give UTF-8 text or rows ({', '.join(READERS)}), optionally compressed as .xz or .gz"


class NotText(UserError):
    """A file that cannot be read as text: an error if the user named it, skipped if it is in a folder."""

    def __init__(self, path: Path, reason: str, advice: str = ADVICE, setting: str = "data.text"):
        super().__init__(f"{setting}: {str(path)!r} cannot be read as text ({reason}); {advice}")
        self.reason = reason


@contextmanager
def opened(path: Path, setting: str = "data.text") -> Iterator[IO[bytes]]:
    """Opens a file; if it is compressed as ``.xz`` or ``.gz``, its contents are read unpacked.

    Args:
        path: the file.
        setting: the setting or option that names it, for messages.

    Raises:
        NotText: from the block, if the file cannot be read.
        UserError: from the block, if a row of it cannot be read.
    """
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except UnicodeDecodeError:
        raise NotText(path, "binary, or not UTF-8", setting=setting) from None
    except NoRows as error:
        raise NotText(path, str(error), setting=setting) from None
    except BadRows as error:
        raise UserError(f"{setting}: {error}") from None
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError):
        raise NotText(path, "damaged archive", "download or compress it again", setting) from None
    except OSError as error:
        raise NotText(path, error.strerror or "unreadable", "check the file", setting) from None


def nearest(path: Path, others: Sequence[str] = ()) -> str:
    """A hint with the most similar file name in the same folder, or an empty string.

    Args:
        path: a file that does not exist.
        others: further names that could have been meant.
    """
    folder = path.expanduser().parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, [*others, *names], n=1)
    return f"; did you mean {near[0] if near[0] in others else str(path.with_name(near[0]))!r}?" if near else ""
