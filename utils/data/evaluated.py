"""Which pictures a checkpoint is evaluated on: its run's own test images, or other data; never what it was trained on.

A picture is known again by its content (`utils.data.record`), wherever it lies and whatever it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.data.catalogue import Catalogue, Entry
from utils.data.errors import DataError
from utils.data.record import Record, below_shared_folder, content_hashes, repeated_pictures
from utils.text import first_few, one_line

UNRECORDED = "the checkpoint does not say which images it was trained on"


class Evaluated(NamedTuple):
    """What is evaluated; labels index the checkpoint's class names.

    selection: finds the run's images that chose its best epoch, as they are in the data; None: not known.
    own: whether it is the run's own data, perhaps with changes, and not another tree.
    notes: what a user should know, a sentence each.
    trained_on: how many of the entries the run has learnt from or chosen its best epoch by, where they were asked for.
    """

    entries: list[Entry]
    selection: Callable[[], list[Entry]] | None = None
    own: bool = True
    notes: tuple[str, ...] = ()
    trained_on: int = 0


class Labelled(NamedTuple):
    """Pictures of a data set, whatever its parts; labels index `class_names`."""

    entries: list[Entry]
    class_names: Sequence[str]


def choose_evaluated(
    class_names: Sequence[str],
    record: Record | None,
    own: Catalogue | None,
    read_all: Callable[[], Labelled],
    *,
    selected_on_test: bool,
    include_trained: bool = False,
    asked: bool = False,
    as_many: bool = True,
) -> Evaluated:
    """Return what to evaluate of the data that lie where they were asked for.

    Test images that are as the run recorded them are evaluated as they are. Otherwise what the run was trained on is
    left out, and, unless it selected on test images, what chose its best epoch: of the run's own data what remains of
    its test images, and new ones; of other data every labelled picture. Without a record, data that were asked for are
    the run's own if they have as many images; those that were not asked for always are.

    Args:
        class_names: the checkpoint's.
        record: of its pictures; None: an older version wrote it.
        own: the data, read as the run reads its own; None: they cannot be read so.
        read_all: reads every labelled picture of the same data.
        asked: whether the user named these data.
        as_many: whether there are as many images to train on and to select by as the run had.

    Raises:
        DataError: nothing is left to evaluate.
    """
    notes: list[str] = []
    if record is None:
        if own is not None and list(own.class_names) == list(class_names) and (as_many or not asked):
            return Evaluated(own.test, notes=_unrecorded(asked, as_many))
        notes.append(f"{UNRECORDED}: some may be among these")
    elif own is not None and _is_unchanged(class_names, record, own):
        repeated = repeated_pictures(record, selected_on_test=selected_on_test)
        return Evaluated(own.test, partial(_selection, record, own), notes=tuple(repeated))
    if record is not None and own is not None and _is_own(record, own):
        labelled = Labelled(_own_test(record, own), own.class_names)
        selection = partial(_selection, record, own, class_names)
        notes.append("the run's data have changed: what is left of its test images is evaluated, and new ones")
    else:
        labelled, selection = read_all(), None
        notes.append("every labelled image is evaluated, as these are not the data of the run")
    entries, said = _of_known_classes(labelled, class_names)
    notes += said
    met = 0
    if record is not None:
        unseen, seen = _by_whether_seen(entries, record.seen(selection=not selected_on_test))
        notes += _said_of_seen(seen, len(entries), included=include_trained)
        entries, met = (entries, len(seen)) if include_trained else (unseen, 0)
    if not entries:
        raise DataError(f"there is no image to evaluate: {'; '.join(notes)}")
    return Evaluated(entries, selection, selection is not None, tuple(notes), met)


def _unrecorded(asked: bool, as_many: bool) -> tuple[str, ...]:
    if not as_many:
        return (f"{UNRECORDED}, and it had another number of them: some may be among the test images of today",)
    taken = "there are as many as it had, so these are taken for its own data and their test images evaluated"
    return (f"{UNRECORDED}: {taken}",) if asked else ()


def _is_unchanged(class_names: Sequence[str], record: Record, own: Catalogue) -> bool:
    if list(own.class_names) != list(class_names) or len(own.test) != len(record.test):
        return False
    contents = content_hashes([entry.source for entry in own.test])
    pairs = zip(own.test, record.test, strict=True)
    return all((entry.label, contents[entry.source]) == (known.label, known.content) for entry, known in pairs)


def _is_own(record: Record, own: Catalogue) -> bool:
    """Whether most of the run's pictures are there."""
    known = {picture.content for pictures in record for picture in pictures}
    return 2 * len(known & set(_contents(own).values())) > len(known)


def _contents(own: Catalogue) -> dict[Path | int, str]:
    return content_hashes([entry.source for entry in own.entries])


def _own_test(record: Record, own: Catalogue) -> list[Entry]:
    """Today's test images, and those of the run that are to be trained on today: a split by a seed moves pictures."""
    contents, tested = _contents(own), {picture.content for picture in record.test}
    test = set(own.test)
    return own.test + [entry for entry in own.entries if entry not in test and contents[entry.source] in tested]


def _selection(record: Record, own: Catalogue, class_names: Sequence[str] | None = None) -> list[Entry]:
    """The images that chose the best epoch, with the labels of `class_names`; None: these are the data's.

    Where two have the content of one of them, the one that lies where it lay, or else the first.
    """
    contents, names = _contents(own), below_shared_folder([entry.source for entry in own.entries])
    wanted = {(picture.content, picture.path) for picture in record.selection}
    known = [(contents[entry.source], names[entry.source]) for entry in own.entries]
    left = {picture.content for picture in record.selection} - {content for content, _ in wanted.intersection(known)}
    found = []
    for entry, (content, name) in zip(own.entries, known, strict=True):
        if (content, name) in wanted or content in left:
            found.append(entry)
            left.discard(content)
    if class_names is None:
        return found
    return _of_known_classes(Labelled(found, own.class_names), class_names)[0]


def _of_known_classes(labelled: Labelled, class_names: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """The pictures of classes that the checkpoint knows, with its labels, and what is to be said of the others."""
    labels = {name: label for label, name in enumerate(class_names)}
    names = labelled.class_names
    entries = [e._replace(label=labels[names[e.label]]) for e in labelled.entries if names[e.label] in labels]
    unknown = list(dict.fromkeys(names[e.label] for e in labelled.entries if names[e.label] not in labels))
    present = {entry.label for entry in entries}
    absent = [name for label, name in enumerate(class_names) if label not in present]
    said = []
    if unknown:
        left_out = len(labelled.entries) - len(entries)
        said.append(
            f"{len(unknown)} classes that the checkpoint does not know are left out, with {left_out} images: "
            f"{_first(unknown)}"
        )
    if absent:
        said.append(f"{len(absent)} of the checkpoint's {len(class_names)} classes have no image: {_first(absent)}")
    return entries, said


def _by_whether_seen(entries: list[Entry], seen: set[str]) -> tuple[list[Entry], list[Entry]]:
    """Return the pictures whose content is not among what was seen, and the others."""
    contents = content_hashes([entry.source for entry in entries])
    unseen = [entry for entry in entries if contents[entry.source] not in seen]
    return unseen, [entry for entry in entries if contents[entry.source] in seen]


def _said_of_seen(seen: Sequence[Entry], images: int, *, included: bool) -> list[str]:
    if not seen:
        return []
    first = one_line(str(seen[0].source))
    if included:
        return [
            f"{len(seen)} of {images} images are ones that the run was trained on or chose its best epoch by, the "
            f"first is {first}: figures of them are optimistic (--include_trained asked for them)"
        ]
    return [
        f"{len(seen)} images are left out, as the run was trained on them or chose its best epoch by them, the "
        f"first is {first} (--include_trained evaluates them, too)"
    ]


def _first(names: Sequence[str]) -> str:
    return first_few([repr(one_line(name)) for name in names])
