"""Ask the server whatever /openapi.json allows, and what it forbids, with schemathesis: nothing may break it.

A server with the demo and a small context answers. schemathesis is installed into a folder of its own
(~/.cache/specexec-schemathesis, or what SPECEXEC_SCHEMATHESIS names), never here. Not checked is whether all that the
document allows is accepted: no schema says which models are here or which roles a template takes. Ends with its exit
code.

    python scripts/fuzz_server.py                    # three minutes
    python scripts/fuzz_server.py --max-time 600     # options of `schemathesis run` go on to it
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import specexec
from tests.serving import serving

FOLDER = Path(os.environ.get("SPECEXEC_SCHEMATHESIS") or Path.home() / ".cache" / "specexec-schemathesis")
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "unsupported_method", "allow_header_conformance"),
)
CONTEXT = 96  # tokens: a request that names no length fills it


def installed() -> Path:
    """The program."""
    program = FOLDER / "bin" / "schemathesis"
    if not program.exists():
        venv.create(FOLDER, with_pip=True)
        subprocess.run([FOLDER / "bin" / "python", "-m", "pip", "install", "--quiet", "schemathesis"], check=True)
    return program


def main(options: list[str]) -> int:
    program = installed()
    with serving(lambda: specexec.load("demo", ctx=CONTEXT), names=("demo",)) as served:
        command = [str(program), "run", f"{served.url}/openapi.json", "--checks", ",".join(CHECKS), "--max-time", "180"]
        return subprocess.run([*command, "--request-timeout", "30", "--workers", "2", *options]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
