"""A table that knows whether it is as it was written: its own SHA-256 stands in it.

Manifests hold the digests of the files beside them; this is the manifest's own, without which one flipped bit makes
another number of it, and nobody notices.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, which JSON can hold, with their digest as the last key."""
    rest = {key: value for key, value in values.items() if key != SEAL}
    return {**rest, SEAL: _digest(rest)}


def is_intact(values: Mapping[str, Any]) -> bool:
    """Whether a table that was read is what `sealed` made; also where it has no seal, as older versions wrote it."""
    return SEAL not in values or values[SEAL] == sealed(values)[SEAL]


def _digest(values: Mapping[str, Any]) -> str:
    """Of the values, however they are laid out: as they are once JSON has been read."""
    read = json.loads(json.dumps(values, allow_nan=False))
    return hashlib.sha256(json.dumps(read, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
