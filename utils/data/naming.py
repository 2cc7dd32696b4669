"""From what a table calls a picture to the file: with or without folder and ending, as people write them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PureWindowsPath

from utils.data.errors import DataError
from utils.data.folders import find_pictures
from utils.data.parts import part_of


class PictureIndex:
    """The pictures in a folder and below it, by their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures = find_pictures(None, root)
        self.in_one_folder = len({path.parent for path in self.pictures}) == 1
        self.known = set(self.pictures)
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_folder: dict[tuple[str, str], list[Path]] = defaultdict(list)  # by the names of the folder and the file
        for path in self.pictures:
            for name in {path.name, path.stem}:
                self.by_name[name].append(path)
                self.by_folder[path.parent.name, name].append(path)

    def knows(self, folder: Path, name: str) -> bool:
        """Whether a name is one of a picture."""
        return bool(name) and bool(self._candidates(folder, name))

    def find(self, place: str, folder: Path, name: str, part: str) -> Path:
        """The picture that a table in `folder` names at `place`, in a folder of its part where several have the name.

        A name that no picture has is a path all the same, to be missed later. Raises DataError where it is empty, lies
        outside, or is the name of several pictures.
        """
        if not name:
            raise DataError(f"{place}: expected a picture's name, got nothing")
        if ".." in Path(name).parts:
            raise DataError(f"{place}: {name!r} lies outside {self.root}, expected a picture in there")
        found = self._candidates(folder, name)
        if len(found) > 1:
            of_part = [p for p in found if part in {part_of(f) for f in p.relative_to(self.root).parts[:-1]}]
            found = of_part or found
        if len(found) > 1:
            raise DataError(
                f"{place}: {name!r} may be {found[0]} or {found[1]}: write the picture's folder into the table, too"
            )
        if not found and (elsewhere := self.by_name.get(Path(name.replace("\\", "/")).name)) and _is_absolute(name):
            raise DataError(
                f"{place}: {name!r} lies in none of its folders here, only {elsewhere[0]} is called so: write the "
                f"picture's path below {self.root} into the table"
            )
        return found[0] if found else self.root / name.lstrip("/")

    def _candidates(self, folder: Path, name: str) -> list[Path]:
        for start in (folder, self.root):
            if start / name in self.known:
                return [start / name]
        given = Path(name.replace("\\", "/"))
        if _is_absolute(name):
            # of the machine on which the table was made: the longest common end decides, which the name alone is not
            same_folder = self.by_folder.get((given.parent.name, given.name))
            named = same_folder or self.by_name.get(given.name, [])
            ends = {path: _common_end(path.parts, given.parts) for path in named}
            needed = max(ends.values(), default=0) or (0 if self.in_one_folder else 1)
            return [path for path, length in ends.items() if length == needed]
        parts = [part for part in given.parts[:-1] if part != "."]
        named = self.by_folder.get((parts[-1], given.name), []) if parts else self.by_name.get(given.name, [])
        return [path for path in named if list(path.parts[-1 - len(parts) : -1]) == parts]


def _is_absolute(name: str) -> bool:
    """Whether it is a whole path, of this machine or another one."""
    return name.startswith("/") or bool(PureWindowsPath(name).drive)


def _common_end(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    length = 0
    for one, other in zip(reversed(first[:-1]), reversed(second[:-1]), strict=False):
        if one != other:
            break
        length += 1
    return length
