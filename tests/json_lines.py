"""Files of JSON lines, which most data of tests is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def written(path: Path, *records: Any) -> str:
    """The path of a file that has a line for each record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
