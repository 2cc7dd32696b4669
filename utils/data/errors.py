"""What is wrong with the data on disk: one class, one sentence."""

from __future__ import annotations

import errno

from PIL import UnidentifiedImageError

from utils.errors import UserError
from utils.text import one_line


class LoadingError(UserError):
    """One sentence, also out of a loader's worker, which raises the error anew from the text of its traceback.

    That text's last line is the error's class and the sentence. It stays one line whatever a hostile file or its name
    puts into it.
    """

    def __init__(self, sentence: str) -> None:
        name = type(self).__name__
        if sentence.startswith(f"Caught {name} in "):
            last_line = sentence.rstrip("\n").rpartition("\n")[2]
            sentence = last_line.partition(f"{name}: ")[2]
        super().__init__(one_line(sentence))


class DataError(LoadingError):
    """The data are not as they should be: one sentence with what is there, what was expected and what to do."""


def describe(error: Exception) -> str:
    """What went wrong, in a few words on one line, without the name of the file."""
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no known picture format"
    words = error.strerror if isinstance(error, OSError) else None
    return one_line(words or str(error) or type(error).__name__)


def is_shortage(error: Exception) -> bool:
    """Whether this machine lacks memory or open files, which is no file's fault."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
