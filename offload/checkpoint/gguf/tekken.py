"""tekken.json, Mistral's own tokenizer file, as tokenizer.json and its settings. Knows no weight and no torch.

It lists byte strings by rank; a token's id is its rank behind the special tokens. Merges follow from the ranks: a token
is made of the two that merging by rank leaves last.
"""

import base64
import binascii
from collections.abc import Mapping
from heapq import heappop, heappush

from offload.checkpoint.documents import Json
from offload.errors import BadModelDir

# Of files that do not name their special tokens (version 3 and before); the others are <SPECIAL_n>.
FIRST = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
)  # fmt: skip
BOS, EOS = "<s>", "</s>"
GONE = -1  # where a part was that has become the end of another


def tekken_documents(told: Mapping[str, Json], where: str) -> dict[str, dict[str, Json]]:
    """tokenizer.json, tokenizer_config.json and generation_config.json. Raises BadModelDir."""
    config, listed = told.get("config"), told.get("vocab")
    if not isinstance(config, dict) or not isinstance(listed, list):
        raise _nonsense(where, "config and vocab are not there")
    special, whole = _count(config, "default_num_special_tokens", where), _count(config, "default_vocab_size", where)
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not special < whole <= special + len(listed):
        raise _nonsense(where, f"default_vocab_size is {whole}, and there are {special} + {len(listed)} tokens")
    names = _special(told.get("special_tokens"), special, where)
    ranks = _ranks(listed[: whole - special], where)
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary: dict[str, Json] = {name: index for index, name in enumerate(names)}
    vocabulary |= {spelled[token]: rank + special for token, rank in ranks.items()}
    merges: list[Json] = []
    for token in ranks:
        if len(token) > 1 and (parts := two_parts(token, ranks)):
            merges.append([spelled[one] for one in parts])
    added: list[Json] = [
        {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for index, name in enumerate(names)
    ]  # fmt: skip
    cut: Json = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level: dict[str, Json] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    piece: Json = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text: list[Json] = [{"Sequence": {"id": one, "type_id": 0}} for one in ("A", "B")]
    around: Json = {
        "type": "TemplateProcessing", "single": [piece, text[0]], "pair": [piece, *text],
        "special_tokens": {BOS: {"id": BOS, "ids": [names.index(BOS)], "tokens": [BOS]}},
    }  # fmt: skip
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]}, "post_processor": around,
            "decoder": {**level, "add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                "vocab": vocabulary, "merges": merges,
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "bos_token": BOS,
            "eos_token": EOS, "unk_token": "<unk>",
        },
        "generation_config.json": {"bos_token_id": names.index(BOS), "eos_token_id": names.index(EOS)},
    }  # fmt: skip


def two_parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes] | None:
    """The two tokens that become this one: what merging by rank leaves of its bytes; None where it leaves more.

    Pairs wait in a heap, so a long token takes about as much time a byte as a short one.
    """
    length, own = len(token), ranks[token]
    after, before = [*range(1, length + 1)], [*range(-1, length - 1)]  # where the neighbours of a part begin
    pairs: list[tuple[int, int, int]] = []  # a rank, and where its token begins and ends

    def consider(start: int) -> None:
        if start >= 0 and (middle := after[start]) < length:
            rank = ranks.get(token[start : after[middle]])
            if rank is not None and rank < own:
                heappush(pairs, (rank, start, after[middle]))

    for start in range(length - 1):
        consider(start)
    parts = length
    while parts > 2:
        if not pairs:
            return None
        _, start, stop = heappop(pairs)
        middle = after[start]
        if middle in (GONE, length) or after[middle] != stop:
            continue  # one of the two has become part of another since
        after[start], after[middle] = stop, GONE
        if stop < length:
            before[stop] = start
        parts -= 1
        consider(before[start])
        consider(start)
    return [token[: after[0]], token[after[0] :]]


def _count(config: Mapping[str, Json], name: str, where: str) -> int:
    found = config.get(name)
    if type(found) is not int or not 0 < found < 1 << 24:
        raise _nonsense(where, f"{name} is {found!r}")
    return found


def _special(listed: Json, count: int, where: str) -> list[str]:
    names = [*FIRST, *(f"<SPECIAL_{index}>" for index in range(len(FIRST), count))][:count]
    for one in listed if isinstance(listed, list) else []:
        rank, name = (one.get("rank"), one.get("token_str")) if isinstance(one, dict) else (None, None)
        if type(rank) is not int or not isinstance(name, str) or not 0 <= rank < count:
            raise _nonsense(where, f"special_tokens names {one!r}")
        names[rank] = name
    if len({*names}) != count or not {BOS, EOS} <= {*names}:
        raise _nonsense(where, f"special_tokens are {count} names, some of them the same or without {BOS} and {EOS}")
    return names


def _ranks(listed: list[Json], where: str) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for rank, one in enumerate(listed):
        coded = one.get("token_bytes") if isinstance(one, dict) and one.get("rank") == rank else None
        try:
            token = base64.b64decode(coded, validate=True) if isinstance(coded, str) else b""
        except binascii.Error as error:
            raise _nonsense(where, f"token_bytes of vocab[{rank}] is not base64") from error
        if not token or token in found:
            raise _nonsense(where, f"vocab[{rank}] is {str(one)[:60]!r}, without token_bytes of its own")
        found[token] = rank
    if any(bytes([byte]) not in found for byte in range(256)):
        raise _nonsense(where, "its vocab does not list every byte")
    return found


def _letters() -> list[str]:
    """GPT-2's letter for each byte: those that can be seen are their own, the others follow from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, others = {byte: chr(byte) for byte in seen}, 256
    for byte in range(256):
        if byte not in letters:
            letters[byte], others = chr(others), others + 1
    return [letters[byte] for byte in range(256)]


def _nonsense(where: str, why: str) -> BadModelDir:
    return BadModelDir(f"{where} cannot be read: {why}.", None, "the model's own tokenizer.json beside it.")
