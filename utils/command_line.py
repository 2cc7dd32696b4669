"""Settings as flags of the command line: one for each field of a dataclass, in the blocks in which they stand."""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.flags import add_flags, from_words
from utils.options import SettingsError, hints, shortened, shown
from utils.other_flags import advice


class Parser(argparse.ArgumentParser):
    """Reports what is wrong in one sentence, without printing the usage first. Raises SettingsError."""

    def error(self, message: str) -> typing.NoReturn:
        printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        raise SettingsError(f"{shortened(printable.removeprefix('argument '))} (--help lists all settings)") from None

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse, and say what an unknown flag is called here, or what it may have been meant for."""
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return given

    def refuse(self, unknown: Sequence[str]) -> typing.NoReturn:
        """Raise SettingsError for words that this parser does not know."""
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        self.error(f"unrecognized arguments: {' '.join(unknown)}{advice(flag, self._option_string_actions)}")


def nonempty_path(word: str) -> Path:
    """A path from the command line; an empty one would be the current folder."""
    if not word.strip() or "\0" in word:
        raise argparse.ArgumentTypeError(f"{shown(word)}; expected a path")
    return Path(word)


def first_value(arguments: Sequence[str] | None, name: str, default: object) -> Any:
    """Return what one flag is given, whatever the others are. Raises SettingsError where its value is missing."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default)
    return getattr(parser.parse_known_args(arguments)[0], name)


def parse_flags(
    arguments: Sequence[str] | None,
    records: Mapping[str, type],
    *,
    description: str,
    explain: Callable[[str], str | None],
    edited: Mapping[str, object] | None = None,
) -> list[dict[str, object]]:
    """Return, for each of `records`, what the command line gives for its fields.

    `records`: dataclasses by a title; a title of "" lists the fields under the headings in the source. `explain` is
    asked about a flag that none of them has: a sentence for the user, or None. `edited`: values by name that help shows
    in place of the fields' own. Raises SettingsError for malformed values and unknown names; `--help` prints and ends
    the program.
    """
    parser = Parser(
        description=description,
        usage="%(prog)s [--setting value ...]",
        argument_default=argparse.SUPPRESS,  # what is not given stays out: the defaults are checked as they are
        allow_abbrev=False,
        add_help=False,
    )
    groups = []
    for title, record in records.items():
        defaults = record(**{name: value for name, value in (edited or {}).items() if name in hints(record)})
        fields = blocks(record) if title == "" else {title: list(hints(record))}
        groups += [(heading, defaults, names) for heading, names in fields.items()]
    parser.add_argument("-h", "--help", action=_Overview, groups=groups, help="all settings and their values")
    parser.add_argument("--help_all", action="help", help="the same with explanations")
    for heading, defaults, names in groups:
        add_flags(parser.add_argument_group(heading), defaults, names)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        sentence = explain(flag.removeprefix("--").removeprefix("no-")) if flag.startswith("--") else None
        if sentence is not None:
            raise SettingsError(sentence)
        parser.refuse(unknown)
    return [
        {name: from_words(record, name, value) for name, value in vars(given).items() if name in hints(record)}
        for record in records.values()
    ]


@functools.cache
def blocks(record: type) -> dict[str, list[str]]:
    """Return a dataclass's fields by the headings in its source, but a dict of any values, which is no flag."""
    found: dict[str, list[str]] = {}
    for title, name in re.findall(r"^    (?:# ---- (.*?) -+|(\w+): .*)$", inspect.getsource(record), re.MULTILINE):
        if title:
            found[title] = names = []
        elif name in hints(record) and hints(record)[name] != dict[str, Any]:  # not of a docstring's lines
            names.append(name)
    return found


class _Overview(argparse.Action):
    """Prints the settings with their values, without explanations, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, groups: list, **options: object):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)
        self.groups = groups

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> typing.NoReturn:
        lines = [f"usage: {parser.usage % {'prog': parser.prog}}", "", parser.description, ""]
        for heading, defaults, names in (group for group in self.groups if group[2]):
            words = (f"--{name} {shown(getattr(defaults, name))}".replace(" ", "\0") for name in names)
            text = textwrap.fill("  ".join(words), 118, initial_indent="  ", subsequent_indent="  ")
            lines += [f"{heading}:", text.replace("\0", " ")]
        lines += ["", "None: that of the recipe, the data set or the model. --no-NAME switches off what is True."]
        lines += ["--help_all explains every setting; --model NAME --help shows those of another system."]
        print("\n".join(lines))
        parser.exit()
