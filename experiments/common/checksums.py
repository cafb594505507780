"""Checksums of a folder's files, kept among them: is it still what was written?"""

import hashlib
import json
import pathlib
from typing import Any

NAME = "checksums.json"

Contents = dict[str, list[Any]]
"""Size in bytes and SHA-256 of each file, by its path in the folder."""


def contents(path: pathlib.Path) -> Contents:
    """Reads every file of a folder, but for the checksums."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith(NAME):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            name = file.relative_to(path).as_posix()
            found[name] = [file.stat().st_size, digest]
    return found


def write(path: pathlib.Path) -> None:
    """Adds the checksums to a folder, whole or not at all."""
    whole = path / f"{NAME}.tmp"
    whole.write_text(json.dumps(contents(path), indent=1))
    whole.replace(path / NAME)


def defect(path: pathlib.Path) -> str | None:
    """Says what is wrong with a folder; None if it is as `write` found it."""
    file = path / NAME
    try:
        if not file.exists():
            return f"it has no {NAME}, so its write did not end"
        expected, found = json.loads(file.read_text()), contents(path)
    except ValueError:  # no JSON, or no UTF-8
        return f"{NAME} is damaged"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not isinstance(expected, dict):
        return f"{NAME} is damaged"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong to it"
        if expected[name] != found[name]:
            return f"{name} differs from what was written"
    return None
