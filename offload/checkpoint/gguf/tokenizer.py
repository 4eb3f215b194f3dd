"""The tokenizer that a GGUF file holds, as tokenizer.json and its settings. Refuses what it cannot rebuild exactly.

The file names the rule by which text is cut before merging (`tokenizer.ggml.pre`) but does not hold it; the rules here
are those of the tokenizers that llama.cpp's converter recognises by that name. A rule that is not in the table would
give other tokens, so such a file is refused, with the way out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload.checkpoint.documents import Json
from offload.checkpoint.gguf.header import GgufHeader, Value
from offload.errors import CorruptShard, UnsupportedModel

TOKENS, MERGES, SCORES, KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type"))
LISTS = (TOKENS, MERGES)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"
# Of real SentencePiece vocabularies the longest piece has 31 letters, and two pairs make each piece on average.
MOST_LETTERS, MOST_PAIRS, FREE_PAIRS = 256, 8, 1 << 12
# Tokens after which nothing comes, whatever the file names; those that llama.cpp looks for too, as far as they are
# control tokens of families whose answers end with them.
ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<|return|>", "<|call|>")

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _cased(ending: str, digits: str) -> str:
    """Words cut where lower case turns into upper case."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    return rf"{begin}{_UPPER}*{_LOWER}+{ending}|{begin}{_UPPER}+{_LOWER}*{ending}|{digits}{_REST_SLASH}"


@dataclass(frozen=True)
class Cutting:
    """How text is cut before merges: by these patterns, one after another; none: by GPT-2's own."""

    patterns: tuple[str, ...] = ()
    whole_words: bool = False
    """Whether a piece that is a token is taken as it is, without merging."""
    composed: bool = False
    """Whether text is brought into Unicode's composed form (NFC) first."""


_GPT_2 = Cutting()
_DIGITS = Cutting((r"\p{N}",))
_LLAMA_3 = Cutting((_WORD + r"|\p{N}{1,3}" + _REST,), whole_words=True)
_QWEN_2 = Cutting((_WORD + r"|\p{N}" + _REST,), composed=True)
_QWEN_35 = Cutting(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    composed=True,
)
_DEEPSEEK_3 = Cutting(
    (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
CUTTINGS = {
    "gpt-2": _GPT_2,
    "olmo": _GPT_2,
    "exaone4": _GPT_2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama-bpe": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "dbrx": _LLAMA_3,
    "smaug-bpe": _LLAMA_3,
    "glm4": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "qwen35": _QWEN_35,
    "deepseek-v3": _DEEPSEEK_3,
    "joyai-llm": _DEEPSEEK_3,
    "gpt-4o": Cutting((_cased(_SHORT, r"\p{N}{1,3}"),), whole_words=True),
    "llama4": Cutting((_cased(_SHORT, r"\p{N}{1,3}"),), whole_words=True),
    "tekken": Cutting((_cased("", r"\p{N}"),), whole_words=True),
}


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens with their kinds, and those that have a purpose."""

    tokens: list[str]
    kinds: Sequence[int]
    named: Mapping[str, str]
    """bos_token, eos_token …"""

    @property
    def ids(self) -> dict[str, Json]:
        """Every token's id, but for those that fill up the matrix."""
        pairs = zip(self.tokens, self.kinds, strict=True)
        return {token: index for index, (token, kind) in enumerate(pairs) if kind != UNUSED}

    def added(self) -> list[Json]:
        """Tokens that are found in text as a whole: control tokens, and those that users have defined."""
        return [
            {
                "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind in (CONTROL, UNKNOWN),
            }
            for index, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]  # fmt: skip


def tokenizer_documents(header: GgufHeader) -> dict[str, dict[str, Json] | str]:
    """The documents of the tokenizer by their names: tokenizer.json, its settings, chat templates, ends of answers.

    `header` was read with LISTS. Raises UnsupportedModel where the file does not say enough for the very same tokens.
    """
    metadata = header.metadata
    kind = metadata.get("tokenizer.ggml.model")
    vocabulary = _vocabulary(header, pieces=kind in ("llama", "gemma4"))
    if kind == "gpt2":
        model, adds_bos = _byte_level(header, vocabulary), False
    elif kind in ("llama", "gemma4"):
        model, adds_bos = _sentence_pieces(header, vocabulary, merges_given=kind == "gemma4"), True
    else:
        raise _refusal(
            header, f"holds a tokenizer of the kind {kind!r} (tokenizer.ggml.model), which is not known here"
        )
    bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos) is True
    eos = metadata.get("tokenizer.ggml.add_eos_token", False) is True
    around = _around(vocabulary, bos, eos)
    settings: dict[str, Json] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bos,
        **vocabulary.named,
    }
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added(),
            "post_processor": around, **model,
        },
        "tokenizer_config.json": settings,
        "generation_config.json": _generation(metadata, vocabulary),
        **_templates(metadata),
    }  # fmt: skip


def _vocabulary(header: GgufHeader, pieces: bool) -> _Vocabulary:
    metadata = header.metadata
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise _refusal(header, f"holds no tokenizer ({TOKENS} is missing)")
    words = [str(token) for token in tokens]
    kinds = metadata.get(KINDS, [NORMAL] * len(words))
    if not isinstance(kinds, list) or len(kinds) != len(words):
        raise _damaged(header, KINDS, f"has not the length {len(words)} of {TOKENS}")
    numbers = [int(kind) for kind in kinds]
    if pieces:  # the converter wrote the blanks of such tokens as blanks
        words = [w.replace(" ", SPACE) if k == USER_DEFINED else w for w, k in zip(words, numbers, strict=True)]
    named: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(words):
            raise _damaged(header, f"tokenizer.ggml.{key}_token_id", f"is {index!r}, there are {len(words)} tokens")
        named[f"{name}_token"] = words[index]
    found = _Vocabulary(words, numbers, named)
    used = sum(kind != UNUSED for kind in numbers)
    if len(found.ids) != used:
        raise _damaged(header, TOKENS, f"names {used - len(found.ids)} tokens twice")
    return found


def _byte_level(header: GgufHeader, vocabulary: _Vocabulary) -> dict[str, Json]:
    """GPT-2's kind: bytes spelled as letters, merges from the file."""
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in CUTTINGS:
        raise _refusal(header, f"cuts text by the rule {pre!r} (tokenizer.ggml.pre), which is not known here")
    pairs, cutting = _merges(header), CUTTINGS[pre]
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in cutting.patterns
    ]
    by_gpt_2 = cutting in (_GPT_2, _DIGITS)
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": by_gpt_2})
    return {
        "normalizer": {"type": "NFC"} if cutting.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _pair_merging(vocabulary, pairs, ignore_merges=cutting.whole_words),
    }


def _merges(header: GgufHeader) -> list[Json]:
    merges = header.metadata.get(MERGES)
    if not isinstance(merges, list):
        raise _damaged(header, MERGES, "is missing")
    return [[*str(merge).split(" ", 1)] for merge in merges]


def _sentence_pieces(header: GgufHeader, vocabulary: _Vocabulary, *, merges_given: bool) -> dict[str, Json]:
    """SentencePiece's BPE; unknown characters become bytes.

    Pieces have scores, from which the merges follow, unless the file holds those too.
    """
    metadata = header.metadata
    leads = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    in_order = metadata.get("general.architecture") in ("gemma", "gemma2", "gemma3")
    scores = metadata.get(SCORES)
    if not (in_order or merges_given) and (not isinstance(scores, list) or len(scores) != len(vocabulary.tokens)):
        raise _damaged(header, SCORES, f"has not the length {len(vocabulary.tokens)} of {TOKENS}")
    # Gemma's scores are not the order of its merges; that of its tokens is.
    ranks = [-float(score) for score in scores] if isinstance(scores, list) and not in_order else None
    blank: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    begin: list[Json] = [{"type": "Prepend", "prepend": SPACE}] if leads else []
    end: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if leads else []
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *end,
    ]  # fmt: skip
    merges = _merges(header) if merges_given else _merges_of(header, vocabulary, ranks)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, blank]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **_pair_merging(vocabulary, merges, ignore_merges=False),
            "unk_token": vocabulary.named.get("unk_token"), "fuse_unk": True, "byte_fallback": True,
        },
    }  # fmt: skip


def _merges_of(header: GgufHeader, vocabulary: _Vocabulary, ranks: Sequence[float] | None) -> list[Json]:
    """Every pair of tokens that makes a token, the best token first: by rank, or by its place.

    Of one token's pairs, published tokenizers have that with the earliest left part first, Gemma's the longest.
    """
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    most = len(ids) * MOST_PAIRS + FREE_PAIRS
    found: list[tuple[float, int, int, str, str]] = []
    for index, token in enumerate(vocabulary.tokens):
        if vocabulary.kinds[index] in (CONTROL, BYTE, UNUSED, UNKNOWN):
            continue
        if len(token) > MOST_LETTERS:
            raise _damaged(header, TOKENS, f"has a piece of {len(token)} letters, more than {MOST_LETTERS}")
        rank = ranks[index] if ranks else float(index)
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((rank, ids[left] if ranks else -len(left), ids[right], left, right))
        if len(found) > most:
            raise _damaged(header, TOKENS, f"has more than {most} pairs that make one of its {len(ids)} pieces")
    found.sort()
    return [[left, right] for *_, left, right in found]


def _pair_merging(vocabulary: _Vocabulary, merges: list[Json], *, ignore_merges: bool) -> dict[str, Json]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
        "vocab": vocabulary.ids, "merges": merges,
    }  # fmt: skip


def _around(vocabulary: _Vocabulary, bos: bool, eos: bool) -> Json:
    """What the tokenizer puts around raw text."""
    before = vocabulary.named.get("bos_token") if bos else None
    after = vocabulary.named.get("eos_token") if eos else None
    single: list[Json] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair: list[Json] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special: dict[str, Json] = {}
    for token, first in ((before, True), (after, False)):
        if token is None:
            continue
        piece: Json = {"SpecialToken": {"id": token, "type_id": 0}}
        single, pair = ([piece, *single], [piece, *pair]) if first else ([*single, piece], [*pair, piece])
        special[token] = {"id": token, "ids": [vocabulary.tokens.index(token)], "tokens": [token]}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _generation(metadata: Mapping[str, Value], vocabulary: _Vocabulary) -> dict[str, Json]:
    """Where answers end: what the file names, and control tokens that are only there for that."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = [index for index in named if type(index) is int and index < len(vocabulary.tokens)]
    ids = vocabulary.ids
    ends += [index for end in ENDS if type(index := ids.get(end)) is int and vocabulary.kinds[index] == CONTROL]
    found: dict[str, Json] = {"eos_token_id": [*dict.fromkeys(ends)]} if ends else {}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        if f"{name}_token" in vocabulary.named:
            found[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{key}_token_id"]  # type: ignore[assignment]  # an int
    return found


def _templates(metadata: Mapping[str, Value]) -> dict[str, dict[str, Json] | str]:
    found: dict[str, dict[str, Json] | str] = {}
    for key, text in metadata.items():
        name = key.removeprefix("tokenizer.chat_template")
        if key == name or not isinstance(text, str) or not text:
            continue
        plain = name.removeprefix(".")
        if not name:
            found["chat_template.jinja"] = text
        elif plain.isidentifier():
            found[f"additional_chat_templates/{plain}.jinja"] = text
    return found


def _refusal(header: GgufHeader, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{header.file.name} {what}.",
        "Its tokens could differ from those that the model was trained with.",
        "a folder with this file and the model's own tokenizer.json and tokenizer_config.json, and -m FOLDER.",
    )


def _damaged(header: GgufHeader, key: str, why: str) -> CorruptShard:
    return CorruptShard(f"{header.file.name} is damaged: {key} {why}.", hint="download the file again.")
