"""Where our files are kept: the folders of the XDG standard, or all of them below SPECEXEC_HOME. Creates nothing."""

import os
from pathlib import Path
from typing import Literal


def folder_of(kind: Literal["config", "data", "state", "cache"]) -> Path:
    """Our folder for files of one kind."""
    home = os.environ.get("SPECEXEC_HOME")
    if home:
        return Path(home).expanduser().absolute() / kind
    import platformdirs

    find = {
        "config": platformdirs.user_config_path,
        "data": platformdirs.user_data_path,
        "state": platformdirs.user_state_path,
        "cache": platformdirs.user_cache_path,
    }
    return find[kind]("specexec")
