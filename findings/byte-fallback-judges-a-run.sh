#!/usr/bin/env bash
# tokenizers 0.23.3: a later token changes what the ByteFallback decoder made of an earlier, complete one.
#
# SentencePiece vocabularies spell bytes that have no piece as <0x41>, … ByteFallback judges a run of such tokens as a
# whole: [<0x41>] decodes to "A", but [<0x41>, <0xE2>] to two U+FFFD, so the "A" is gone. A streaming decoder that gives
# out text once it holds no U+FFFD has then shown a character that the whole text does not have. Byte-level tokenizers
# decode the same two bytes to "A" and one U+FFFD.
#
# Seen with tokenizers 0.23.3.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, decoders, models

names = [f"<0x{byte:02X}>" for byte in range(256)]
tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[], byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
first, both, whole = (tokenizer.decode(ids) for ids in ([0x41], [0x41, 0xE2], [0x41, 0xE2, 0x82, 0xAC]))
print(f"[41]: {first!r}   [41 E2]: {both!r}   [41 E2 82 AC]: {whole!r}   bytes of [41 E2]: {b'A' + bytes([0xE2])!r}")
assert (first, both, whole) == ("A", "\ufffd\ufffd", "A€")
PY
