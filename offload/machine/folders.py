"""Where our files are kept: the folders of the XDG standard, or all of them below SPECEXEC_HOME. Creates nothing."""

import os
from pathlib import Path
from typing import Literal


def typed_path(text: str | Path) -> Path:
    """A path as people type it: ~ and ~USER are homes; those of no user stay as they are, and are not found."""
    return Path(os.path.expanduser(text))


def folder_of(kind: Literal["config", "data", "state", "cache"]) -> Path:
    """Our folder for files of one kind."""
    home = os.environ.get("SPECEXEC_HOME")
    if home:
        return typed_path(home).absolute() / kind
    import platformdirs

    find = {
        "config": platformdirs.user_config_path,
        "data": platformdirs.user_data_path,
        "state": platformdirs.user_state_path,
        "cache": platformdirs.user_cache_path,
    }
    return find[kind]("specexec")
