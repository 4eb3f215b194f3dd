#!/usr/bin/env bash
# llguidance 1.9.1 reads a grammar by recursion as deep as its rules or definitions refer to each other, and has no limit
# for that: a JSON schema of 24 kB, or 20,000 short Lark rules, fills a stack of 8 MiB and ends the process (SIGSEGV). A
# thread with a stack of 256 MiB reads the same schema, and a longer one is "schema too large" there.
exec "${PYTHON:-python3}" - <<'PY'
import json, subprocess, sys
child = """
import json, sys, threading
from llguidance import LLMatcher, LLTokenizer
def wrapped(schema):
    for _ in range(40):
        schema = {"items": schema}
    return schema
defs = {f"a{at}": wrapped({"$ref": f"#/$defs/a{at + 1}"}) for at in range(50)} | {"a50": {"type": "string"}}
text = LLMatcher.grammar_from_json_schema({"$ref": "#/$defs/a0", "$defs": defs})
threading.stack_size(int(sys.argv[1]) << 20)
thread = threading.Thread(target=lambda: print(LLMatcher(LLTokenizer("byte"), text).is_error()))
thread.start()
thread.join()
"""
for mebibytes in (8, 256):
    ran = subprocess.run([sys.executable, "-c", child, str(mebibytes)], capture_output=True, text=True)
    print(f"{mebibytes} MiB: exit code {ran.returncode}, refused: {ran.stdout.strip() or '-'}")
PY
