"""The memory of a sweep beside weights and keys of the text, from config.json alone. Knows no torch; `plan` uses it.

The sizes below bound what exists at a time; the code that computes takes them from here, so that the sums stay true.
H hidden size   R rows of the largest sweep: a whole context and its guesses
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from specexec.errors import BadOption

MOST_NODES = 4096  # of one sweep, all sequences together, where memory allows
FIRST_NODES = 64  # of each sequence, while nothing is known about costs; none joins others unless memory holds these
CHUNK = 256  # rows that run through a layer, or through one linear, at a time
QUERY_BLOCK = 256  # query rows and
KEY_BLOCK = 1024  # keys of one block of attention
INDEX_SCORES = 1 << 22  # scores of single heads of an index at once
SUMMED = 128  # keys whose weights, and whose weighted values, are summed at a time
AT_ONCE = 64  # query rows that need not ask for a whole block of scores where they see fewer keys
WIDENED = 1 << 22  # weights of 16 bits that are there in float32 at a time, at most
HEAD_ROWS = 64  # rows whose logits exist at a time
GROWTH_ROWS = 256  # keys and values grow by whole multiples: a copy so often is nothing beside a sweep
SNAPSHOTS = 4  # earlier states of recurrent layers that a text keeps in RAM, beside
STATES = 2  # where they compute: that of the committed text, and that after what a sweep adds to it
TRIANGLE = 128  # nodes whose writes into a recurrent state are found together
SELECTIVE_STATES = 1 << 20  # numbers in states of Mamba-1 that exist at a time, of some of its channels
SNAPSHOT_TOKENS = 4096  # at least one in so many tokens
TAPPED = 4096  # last tokens of a text whose hidden states are kept for drafters that read them
TRIED_ROWS = 1024  # of a sweep, at most, whose states are also recorded where a head may be meant to read them
LAST = -1  # the place where hidden states are read behind the last norm
SINKS = 4  # first tokens of a text that a drafter with a window goes on seeing
PARD_PLACES = 12  # tokens that a model with a pard_token guesses at once, as its authors let it
KERNELS_B = 88 << 20  # that a CPU compiles for linears in float32: of five shapes, and of those that are tried
PIECE = 512  # the most of a text that it reads at a time
BEAMS = 128  # nodes that a drafter is asked about at a time, and rows that go through its head
PASSES = 16  # about as many let a large tree grow: more nodes are asked about at a time
ALONG = 128  # rows of one text that a drafter has read before it was asked about them, at a time
AHEAD = 2  # a tree may grow to this many times the nodes it submits
EXIT_ROWS = 512  # more nodes to ask a drafter about: whole next trees, guessed while a sweep streams
CANDIDATES = 64  # children whose scores are kept of every node that was asked about: a tree takes half of them at most
LEVELS = 64  # positions of a tree whose noise is kept
LEAST_NODES = 256  # that `auto` makes room for, and
SKIP_SHARE = 0.5  # of the target's weights may be copied to draft with some of its sublayers
FREE_FOR_GUESSES = 8  # the part of the free memory that more may take: the rest is for layers, which save more
# Token ids, parents, positions and intervals of a row, as Python and numpy hold them.
ROW_B = 256
FIRST_IMAGE_ROW = 1 << 62  # the least id of an image's row (image_rows.py); tokens of a vocabulary are far below
IMAGE_ROWS = 2048  # of one image, larger ones are made smaller; and of those whose rows are kept
TILE_ROWS = 4096  # the same for models that cut images into tiles of one size
# Settings that say how many patches of a tower, in height and in width, make one row.
MERGES = ("spatial_merge_size", "pooling_kernel_size", "scale_factor", "downsample_factor")
DOWNSAMPLED = {"4x": 4, "16x": 16}  # patches that make one row, as MiniCPM-V says it
TOWER_COPIES = 8  # of what a tower knows of a patch: in, normed, queries, keys, values, mixed, out, and their sum
# Models that see whose images are read (text/image_prompts.py says how), and the most rows that one may take.
SEEING = {
    **dict.fromkeys(
        (
            "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4",
            "gemma4_unified", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "kimi_k25", "llama4", "minimax_m3_vl",
            "mistral3", "lighton_ocr", "exaone4_5", "hunyuan_vl", "hyperclovax_vision_v2", "lfm3_vl", "video_llama_3",
        ),
        IMAGE_ROWS,
    ),
    **dict.fromkeys(
        (
            "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "got_ocr2", "idefics2",
            "idefics3", "internvl", "lfm2_vl", "llava", "llava_next", "llava_next_video", "llava_onevision",
            "minicpmv4_6", "ovis2", "smolvlm", "vipllava",
        ),
        TILE_ROWS,
    ),
}  # fmt: skip
F32_B, F64_B = 4, 8
CANDIDATE_B = 16


def check_budget(nodes: object) -> None:
    """Refuse what is no number of guesses. Raises BadOption."""
    whole = isinstance(nodes, int) and not isinstance(nodes, bool)
    if nodes != "auto" and not (whole and 0 <= nodes <= MOST_NODES):  # type: ignore[operator]  # whole, so a number
        raise BadOption(f"budget is {nodes!r}; allowed: 'auto' or 0 to {MOST_NODES}.")


def rows_held(rows: int) -> int:
    """Rows that a cache holds memory for when it has to hold `rows`."""
    return -(-rows // GROWTH_ROWS) * GROWTH_ROWS


def windowed(tokens: int, window: int | None) -> int:
    """Rows of a text of so many tokens that a drafter's cache holds at most, where it sees the last `window`."""
    return tokens if window is None else min(tokens, SINKS + window + GROWTH_ROWS + PIECE)


@dataclass(frozen=True)
class Widths:
    """The sizes of a model that decide, and bytes of the numbers it computes with and of one token in its cache.

    `keeping`: layers that keep rows of a token. `kept`: numbers of one token that the layer keeps which keeps most.
    """

    hidden: int
    ff: int
    heads: int
    head: int
    keeping: int
    vocabulary: int
    item_B: int
    token_B: int
    kept: int
    states_B: int = 0
    """States of all recurrent layers after one text."""
    node_states_B: int = 0
    """What those layers keep of one guess."""
    state_heads: int = 0
    state_row_B: int = 0
    states_at_once_B: int = 0
    """What of each row is there while states are read, and of all of them together at most."""
    reads_B: int = 0
    """Hidden states of one token that it reads of another model."""
    sum_B: int = F32_B
    """Of a number while attention sums."""
    index_most: int = 0
    index_width: int = 0
    """Where an index chooses keys: how many for a row, and the numbers of a key of the index."""


def widths_of(config: Mapping[str, object], item_B: int, kept: Sequence[int]) -> Widths:
    """Read from a config.json; `kept` are the numbers that each layer keeps of one token."""

    def number(default: int, *names: str) -> int:
        found = [value for name in names if isinstance(value := config.get(name), int) and value]
        return found[0] if found else default

    hidden = number(1, "hidden_size", "n_embd")
    heads = number(1, "num_attention_heads", "n_head")
    active = number(1, "num_experts_per_tok")
    return Widths(
        hidden=hidden,
        ff=max(
            number(4 * hidden, "intermediate_size", "ffn_dim", "n_inner"), active * number(0, "moe_intermediate_size")
        ),
        heads=heads,
        head=max(number(hidden // heads, "head_dim"), number(0, "global_head_dim"), _widest_head(config)),
        keeping=sum(map(bool, kept)) or 1,
        vocabulary=number(1, "vocab_size"),
        item_B=item_B,
        token_B=sum(kept) * item_B,
        kept=max(kept, default=0),
        index_most=number(0, "index_topk"),
        index_width=number(0, "index_head_dim"),
    )


def _widest_head(config: Mapping[str, object]) -> int:
    """Of layers that differ from the others."""
    given = config.get("per_layer_config")
    sizes = [one.get("head_dim") for one in given.values() if isinstance(one, dict)] if isinstance(given, dict) else []
    return max((size for size in sizes if isinstance(size, int)), default=0)


def workspace(widths: Widths, ctx: int, nodes: int) -> dict[str, int]:
    """Bytes by what they are for, of one text of `ctx` tokens with `nodes` guesses below it: its largest sweep. What
    recurrent layers keep is not among them: it may live elsewhere.
    """
    return _sweep_B(widths, ctx + nodes, HEAD_ROWS)


def recurrent_B(widths: Widths, nodes: int) -> int:
    """States of one text where they compute, and what recurrent layers keep of `nodes` guesses below it."""
    return STATES * widths.states_B + nodes * widths.node_states_B


def snapshots_B(widths: Widths) -> int:
    """Earlier states of one text, in RAM."""
    return SNAPSHOTS * widths.states_B


def beams(nodes: int) -> int:
    """Nodes that a drafter is asked about at a time while a tree of `nodes` grows."""
    return max(BEAMS, nodes // PASSES)


def drafted(nodes: int) -> int:
    """The most nodes of one text that a drafter is asked about while a tree of `nodes` grows, and beyond it."""
    return AHEAD * nodes + EXIT_ROWS if nodes else 0


def drafter_rows(nodes: int) -> int:
    """The most rows of one text's nodes in a drafter's cache: those it is asked about, and some that it may be."""
    return drafted(nodes) + ALONG if nodes else 0


def drafting_B(widths: Widths, ctx: int, nodes: int, window: int | None = None) -> int:
    """The same for a model that drafts: it keeps keys of a larger tree, and is asked about a few nodes at a time."""
    rows = windowed(ctx, window)
    scores_B = drafted(nodes) * CANDIDATES * CANDIDATE_B
    sweep_B = sum(_sweep_B(widths, max(rows, beams(nodes)), BEAMS).values())
    states_B = recurrent_B(widths, drafter_rows(nodes)) + snapshots_B(widths)
    return guesses_B(widths, rows, drafter_rows(nodes)) + scores_B + sweep_B + states_B + read_B(widths, ctx, nodes)


def read_B(widths: Widths, ctx: int, nodes: int) -> int:
    """Hidden states that a model reads: kept of the text, joined by new ones, side by side; and its own rows'."""
    return 4 * min(ctx, TAPPED) * widths.reads_B + 2 * drafter_rows(nodes) * _output_B(widths)


def node_B(target: Widths, drafters: Iterable[Widths]) -> int:
    """One more guess in a sweep of many texts, beside its keys and values: at most this."""
    own_B = _row_B(target) + target.node_states_B
    return own_B + sum(
        _row_B(drafter) + AHEAD * (CANDIDATES * CANDIDATE_B + drafter.node_states_B + 2 * _output_B(drafter))
        for drafter in drafters
    )


def _output_B(widths: Widths) -> int:
    """What is kept of a row's own hidden state, where other rows are computed from it."""
    return widths.hidden * widths.item_B if widths.reads_B else 0


def text_B(target: Widths, drafters: Iterable[Widths]) -> int:
    """What a text takes where it computes however short it is."""
    drafts_B = (
        recurrent_B(drafter, drafter_rows(1)) + snapshots_B(drafter) + TAPPED * drafter.reads_B for drafter in drafters
    )
    return noise_B(target) + recurrent_B(target, 0) + sum(drafts_B)


def images_B(whole: Mapping[str, object], widths: Widths, ctx: int) -> int:
    """An image of as many rows as are allowed, on its way through a tower, and the rows that are kept of images.

    `whole` is the config.json of all that the checkpoint holds.
    """
    given = whole.get("vision_config")
    vision = given if isinstance(given, Mapping) else {}

    def number(default: int, *names: str) -> int:
        places = [*(vision.get(name) for name in names), *(whole.get(name) for name in names)]
        return next((value for value in places if isinstance(value, int) and value), default)

    most = SEEING.get(str(whole.get("model_type")), IMAGE_ROWS)
    rows = min(most, ctx, number(most, "mm_tokens_per_image"))
    ratio = whole.get("downsample_ratio")  # InternVL's
    merged = round(ratio**-2) if isinstance(ratio, float) else number(1, *MERGES) ** 2
    merged = DOWNSAMPLED.get(str(whole.get("downsample_mode")), merged)
    patch = number(16, "patch_size")
    patches = rows * merged
    if fixed := whole.get("mm_tokens_per_image"):
        patches = max(patches, (number(0, "image_size") // patch) ** 2 * rows // int(str(fixed)))
    hidden, ff = number(1024, "hidden_size", "embed_dim"), number(4096, "intermediate_size")
    pixels_B = 2 * F32_B * 3 * patch**2 * number(1, "temporal_patch_size")
    patch_B = (TOWER_COPIES * hidden + 2 * ff) * widths.item_B + hidden * 2 * F32_B + pixels_B
    layers = vision.get("deepstack_visual_indexes")
    kept = 1 + (len(layers) if isinstance(layers, Sequence) else 0)
    return patches * patch_B + 2 * most * kept * widths.hidden * widths.item_B


def noise_B(widths: Widths) -> int:
    """Remembered for each text; once more of one text at a time, side by side."""
    return LEVELS * widths.vocabulary * F32_B


def guesses_B(widths: Widths, ctx: int, nodes: int) -> int:
    """Keys and values of the guesses, and the old rows of one layer's keys while they move into larger memory."""
    return (rows_held(ctx + nodes) - ctx) * widths.token_B + ctx * widths.token_B // widths.keeping // 2


def nodes_of(budget: int | Literal["auto"], widths: Widths, ctx: int, free_B: int) -> int:
    """The most guesses that one sweep carries; under `auto` as many as a small part of the free memory holds."""
    if budget != "auto":
        return budget

    def taken_B(nodes: int) -> int:
        kept_B = guesses_B(widths, ctx, nodes) + recurrent_B(widths, nodes)
        return kept_B + sum(workspace(widths, ctx, nodes).values())

    nodes = MOST_NODES
    while nodes > LEAST_NODES and taken_B(nodes) - taken_B(0) > free_B // FREE_FOR_GUESSES:
        nodes //= 2
    return nodes


def _sweep_B(widths: Widths, rows: int, head_rows: int) -> dict[str, int]:
    norm_B = rows * _norm_B(widths)
    logits_B = head_rows * widths.vocabulary * (widths.item_B + 4 * F32_B)  # as computed, float32, noise, sum and best
    block_B = max(_attention_B(widths, rows), _mlp_B(widths, rows), _states_B(widths, rows), norm_B, logits_B)
    return {
        "activations": rows * (_row_B(widths) - _norm_B(widths)),
        "a block of attention, MLP or logits": block_B,
        "noise": 2 * noise_B(widths),
    }


def _row_B(widths: Widths) -> int:
    """A row on its way: what goes into a layer, chunks that are through and their concatenation; positions; names."""
    return 3 * widths.hidden * widths.item_B + 3 * widths.head * F32_B + ROW_B + _norm_B(widths)


def _norm_B(widths: Widths) -> int:
    """The last norm has all rows in float32, twice; chunks are gone by then."""
    return widths.hidden * (2 * F32_B - widths.item_B)


def _mlp_B(widths: Widths, rows: int) -> int:
    """Gate, up and their product; linears of 16 bits sum in float32, on some CPUs of weights in float32."""
    widened_B = min(WIDENED, widths.ff * widths.hidden) * F32_B if widths.item_B < F32_B else 0
    return min(rows, CHUNK) * widths.ff * (3 * widths.item_B + F32_B) + widened_B


def _states_B(widths: Widths, rows: int) -> int:
    """Of every head how much of each node reaches each other one: exponents in float64, and in float32 twice two.

    Where each channel decays by itself, what is left of its keys, or its states.
    """
    triangle_B = widths.state_heads * min(rows, TRIANGLE) ** 2 * (2 * F32_B + 4 * F32_B + 2 * F32_B)
    return triangle_B + min(rows * widths.state_row_B, widths.states_at_once_B)


def _attention_B(widths: Widths, rows: int) -> int:
    """Scores of one block, its mask, and in float32 queries, keys and values of the block; its last keys once more."""
    queries, keys = min(rows, QUERY_BLOCK), min(rows, KEY_BLOCK)
    scores_B = widths.heads * queries * KEY_BLOCK * widths.sum_B
    hidden_B = 4 * queries * keys
    own_B = (6 * widths.heads * queries * widths.head + 2 * keys * widths.kept) * widths.sum_B
    last_B = widths.heads * queries * SUMMED * (widths.sum_B + F32_B)  # filled up, and sums of the others
    return scores_B + hidden_B + own_B + last_B + _index_B(widths, queries, rows)


def _index_B(widths: Widths, queries: int, rows: int) -> int:
    """Scores of a block of queries with all keys, its masks, the keys of the index, and what all rows have chosen."""
    if not widths.index_most:
        return 0
    scores_B = queries * rows * (2 * F32_B + 5) + 2 * INDEX_SCORES * F32_B
    return scores_B + rows * (widths.index_width * F32_B + widths.index_most * F32_B)
