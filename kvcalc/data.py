"""Where the shipped `profiles/` folder lies, and its JSON files as parsed objects."""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def profiles_folder() -> Path:
    """`profiles/` inside an installed package, or beside it in a checkout (editable install)."""
    package = Path(__file__).parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


@cache
def load_profile(name: str) -> Any:  # noqa: ANN401 - the JSON border
    """Parse `profiles/<name>`."""
    return json.loads((profiles_folder() / name).read_text(encoding="utf-8"))
