"""Ask the server whatever /openapi.json allows, and what it forbids, with schemathesis: nothing may break it.

A server with the demo and a small context answers. schemathesis is installed into a folder of its own
(~/.cache/specexec-schemathesis, or what SPECEXEC_SCHEMATHESIS names), never here. Not checked is whether all that the
document allows is accepted: no schema says which models are here or which roles a template takes.

A call is one piece of three minutes with a seed of its own. The folder's tried.json remembers the pieces without a
fault since the last fault; the first of them has schemathesis' fixed cases too. Ends with schemathesis' exit code.

    python scripts/fuzz_server.py                    # one more piece, and how many cases there were in all
    python scripts/fuzz_server.py --afresh           # the first piece again
    python scripts/fuzz_server.py --max-time 600     # options of `schemathesis run` go on to it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import specexec
from tests.serving import serving

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("SPECEXEC_SCHEMATHESIS") or Path.home() / ".cache" / "specexec-schemathesis")
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "unsupported_method", "allow_header_conformance"),
)
CONTEXT = 48  # tokens: a request that names no length fills it


def installed() -> Path:
    """The program."""
    program = FOLDER / "bin" / "schemathesis"
    if not program.exists():
        venv.create(FOLDER, with_pip=True)
        subprocess.run([FOLDER / "bin" / "python", "-m", "pip", "install", "--quiet", "schemathesis"], check=True)
    return program


def main(options: list[str]) -> int:
    program, tried = installed(), FOLDER / "tried.json"
    pieces = json.loads(tried.read_text()) if tried.exists() and "--afresh" not in options else []
    options = [option for option in options if option != "--afresh"]
    phases = "fuzzing,stateful" if pieces else "examples,coverage,fuzzing,stateful"
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(lambda: specexec.load("demo", ctx=CONTEXT), names=("demo",)) as served,
    ):
        report = Path(folder) / "report.json"
        # One worker: with two, ast.parse of Python 3.11 fails in schemathesis now and then (SystemError).
        command = [str(program), "run", f"{served.url}/openapi.json", "--checks", ",".join(CHECKS), "--workers", "1"]
        command += ["--max-time", "180", "--request-timeout", "30", "--phases", phases, "--seed", str(len(pieces))]
        command += ["--report", "json", "--report-json-path", str(report), *options]
        ended = subprocess.run(command).returncode
        found = json.loads(report.read_text())
    if not found["test_cases"]["generated"]:
        print("no case ran: what was tried before stays")
        return ended
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    piece = {"commit": commit.strip(), "seed": found["seed"], "cases": found["test_cases"]["generated"]}
    pieces = [] if ended else [*pieces, piece]
    tried.write_text(json.dumps(pieces, indent=1) + "\n")
    print(f"{sum(piece['cases'] for piece in pieces):,} cases without a fault in {len(pieces)} pieces: {tried}")
    return ended


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
