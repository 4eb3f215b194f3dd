"""How a GGUF header says that positions are encoded, as rope_parameters of a config.json. Refuses what has no words."""

import math

from offload.checkpoint.documents import Json
from offload.checkpoint.gguf.facts import GgufFacts

Settings = dict[str, Json]

# Llama 3.1 and later; a GGUF holds the factors that follow from these, and their largest is the one that varies.
LLAMA_3_LOW, LLAMA_3_HIGH, LLAMA_3_CONTEXT = 1.0, 4.0, 8192


def rope(facts: GgufFacts, rotated: int | None = None) -> Settings:
    """All dimensions of a head are rotated, unless the caller knows of a part."""
    rotated = rotated or head_dim(facts)
    if facts.count("rope.dimension_count", rotated) != rotated:
        raise facts.refuse(f"rotates {facts.count('rope.dimension_count')} of {rotated} dimensions of a head")
    theta = facts.real("rope.freq_base", 10000.0)
    kind = facts.name("rope.scaling.type", "none")
    plain: Settings = {"rope_type": "default", "rope_theta": theta}
    if facts.has("rope.scale_linear"):
        return {**plain, "rope_type": "linear", "factor": facts.real("rope.scale_linear")}
    if kind == "none":
        factors = facts.factors("rope_freqs.weight")
        return plain if factors is None else {**plain, **_llama_3(facts, factors, theta, rotated)}
    factor = facts.real("rope.scaling.factor")
    if kind == "linear":
        return {**plain, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {**plain, **_yarn(facts, factor)}
    raise facts.refuse(f"scales its positions by '{kind}', which is not known here")


def head_dim(facts: GgufFacts) -> int:
    """How many numbers a head has."""
    return facts.count("attention.key_length", facts.count("embedding_length") // facts.count("attention.head_count"))


def partly(facts: GgufFacts, dim: int, default: int) -> Settings:
    """The same where a part of the `dim` dimensions of a head is rotated."""
    rotated = facts.count("rope.dimension_count", default)
    found = rope(facts, rotated)
    return found if rotated == dim else {**found, "partial_rotary_factor": rotated / dim}


def _yarn(facts: GgufFacts, factor: float) -> Settings:
    known = {
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "attention_factor": "yarn_attn_factor",
        "mscale_all_dim": "yarn_log_multiplier",
    }
    found: Settings = {
        name: facts.real(f"rope.scaling.{key}") for name, key in known.items() if facts.has(f"rope.scaling.{key}")
    }
    context = facts.count("rope.scaling.original_context_length")
    return {**found, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}


def _llama_3(facts: GgufFacts, factors: list[float], theta: float, rotated: int) -> Settings:
    """The scaling of Llama 3.1 from the factors that follow from it; others are refused."""
    factor = max(factors)
    if factor == min(factors) == 1.0:
        return {}
    expected = []
    for index in range(rotated // 2):
        turns = LLAMA_3_CONTEXT * theta ** (-2 * index / rotated) / (2 * math.pi)
        smooth = min(max((turns - LLAMA_3_LOW) / (LLAMA_3_HIGH - LLAMA_3_LOW), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(factors) != len(expected) or any(abs(a / b - 1) > 1e-3 for a, b in zip(factors, expected, strict=True)):
        raise facts.refuse("scales its positions by factors (rope_freqs.weight) that are not those of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA_3_LOW,
        "high_freq_factor": LLAMA_3_HIGH,
        "original_max_position_embeddings": LLAMA_3_CONTEXT,
    }
