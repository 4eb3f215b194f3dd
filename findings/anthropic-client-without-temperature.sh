#!/usr/bin/env bash
# anthropic 2.14.0: messages.create() and messages.stream() have no argument temperature, top_p or top_k any more.
#
# Versions 0.x took them, the OpenAI client does, and so do servers of this protocol. Here passing one is a TypeError in
# the client, before anything is sent; through extra_body it goes out as an ordinary field of the request. Code written
# for a local server of the Messages protocol that asks for greedy text has to be changed.
#
# Seen with anthropic 2.14.0 (and 0.60.0 for the former signature), against an HTTP server of the standard library.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
for version in 0.60.0 2.14.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "anthropic==$version"
    "$folder/$version/bin/python" - "$version" <<'PY'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import anthropic

seen = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = json.dumps({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
            "stop_sequence": None, "content": [{"type": "text", "text": "ok"}],
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="none", max_retries=0)
asked = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
refused = []
for name, value in (("temperature", 0), ("top_p", 0.5), ("top_k", 1)):
    try:
        client.messages.create(**asked, **{name: value})
    except TypeError:
        refused.append(name)
client.messages.create(**asked, extra_body={"temperature": 0})
print(f"anthropic {sys.argv[1]}: refused as arguments {refused}; by extra_body the server read", seen[-1]["temperature"])
assert refused == ([] if sys.argv[1].startswith("0.") else ["temperature", "top_p", "top_k"])
assert seen[-1]["temperature"] == 0
PY
done
