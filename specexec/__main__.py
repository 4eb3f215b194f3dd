"""Where the program starts: `specexec`, or `python -m specexec`. The packages beside this one are the ones that run."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import resolve_name

_BESIDE = ("offload", "cli")


def main() -> int:
    """Run the command line; a `cli.py` of the user's that lies earlier on Python's path is not taken for ours."""
    for name in _BESIDE:
        _load(name)
    code = resolve_name("cli.app:main")()
    return code if isinstance(code, int) else 0


def _load(name: str) -> None:
    folder = Path(__file__).parent.parent / name
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    sys.exit(main())
