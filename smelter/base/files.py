"""What is written: whole or not at all, and on the disk when it is said to be."""

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
