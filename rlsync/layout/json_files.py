"""Files that hold one JSON object, as configurations and tokenizers do, and what is wrong with those that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlsync.errors import ConfigError, RlsyncError


def read_json_object(path: Path, *, error: type[RlsyncError] = ConfigError, remedy: str = "copy it again") -> tuple[str, dict[str, Any]]:
    """Text and content of a file. Raises ``error``, which names the file, what is wrong with it and the ``remedy``."""
    try:
        # Bytes, because newlines are part of what may be written back.
        text = path.read_bytes().decode("utf-8")
        found = json.loads(text)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}; {remedy}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text: byte {reason.start + 1}; {remedy}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not JSON: {reason}; {remedy}") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds {type(found).__name__} instead of an object; {remedy}")
    return text, found
