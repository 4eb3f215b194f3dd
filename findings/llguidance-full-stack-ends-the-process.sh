#!/usr/bin/env bash
# llguidance 1.9.1: a JSON schema of 24 kB ends the process with a segmentation fault.
#
# Its definitions refer to each other in a row, each some levels deep. A grammar is read by recursion as deep as that
# goes, and no limit comes before a stack of 8 MiB is full; a Lark grammar whose rules refer to each other does the same.
# In a thread with a stack of 256 MiB the same schema is read, and a longer one is refused ("schema too large"). One
# would guess that a library which reads schemas of strangers, and counts their nesting elsewhere, refuses them here too.
#
# Seen with llguidance 1.9.1.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q llguidance==1.9.1
cat > "$folder/read.py" <<'PY'
import sys
import threading

from llguidance import LLMatcher, LLTokenizer


def wrapped(schema):
    for _ in range(40):
        schema = {"items": schema}
    return schema


defs = {f"a{at}": wrapped({"$ref": f"#/$defs/a{at + 1}"}) for at in range(50)} | {"a50": {"type": "string"}}
text = LLMatcher.grammar_from_json_schema({"$ref": "#/$defs/a0", "$defs": defs})
threading.stack_size(int(sys.argv[1]) << 20)
thread = threading.Thread(target=lambda: print("refused:", LLMatcher(LLTokenizer("byte"), text).is_error()))
thread.start()
thread.join()
PY
"$folder/venv/bin/python" "$folder/read.py" 256
code=0
"$folder/venv/bin/python" "$folder/read.py" 8 || code=$?
echo "exit code with 8 MiB: $code"
test "$code" = 139
