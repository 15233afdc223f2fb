"""Keys of services, as they come from the environment: what a header cannot carry is refused before it is sent."""

import os
import re

from smelter.base.errors import require

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def key_from_environment(variable: str, what: str) -> str:
    """The key in an environment variable, without blanks around it; "" where there is none.

    ConfigError, which begins with `what` and does not show the key, for one with a line break or another control
    character inside: two keys, or a copy that has gone wrong.
    """
    key = os.environ.get(variable, "").strip()
    fits = not _CONTROL.search(key)
    require(
        fits, f"{what}{variable} holds a line break or another control character: export the key alone, on one line"
    )
    return key
