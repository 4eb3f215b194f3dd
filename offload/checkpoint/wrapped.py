"""The language model inside a checkpoint that sees or hears too: its settings and its tensors. Loads no torch itself.

Such a checkpoint wraps one language model: config.json nests its settings, names of its tensors have a prefix. All
sums are about that model alone; what else is there stays on disk.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from offload.checkpoint.documents import Json
from offload.checkpoint.roles import HEAD

# Settings of a part that is no language model, and where those of the language model are.
_OTHERS = re.compile(r"(vision|visual|vit|audio|speech|sound|encoder|thinker)\w*_config")
_TEXT = "text_config"
# With these a plan can be made; where config.json leaves defaults out, transformers is asked.
_NUMBERS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# What repositories call the language model in the names of its tensors before the first number, and all else.
_MODEL = re.compile(r"(^|\.)(language_model|text_model|llm)\.")
_OTHER = re.compile(
    r"(^|\.)(visual|vision|high_res_vision|vit|image|audio|speech|sound|embed_vision|embed_audio|multi_modal|mm_|connector"
    r"|projector|aligner|merger|patch|mtp|encoder|talker|token2wav|code2wav)\w*\."
)
# Of all else, what images go through before the language model reads them.
_SEES = re.compile(
    r"(^|\.)(visual|vision|high_res_vision|vit|image|embed_vision|multi_modal|mm_|connector|projector|aligner|merger|patch)"
    r"\w*\."
)
_NUMBER = re.compile(r"\.\d+\.")
_OUTER = ("quantization_config", "quantization", "dtype", "torch_dtype")
T = TypeVar("T")


def is_wrapper(config: Mapping[str, Json]) -> bool:
    """Does config.json describe a language model inside another one? Heads that draft name the settings of theirs."""
    parts = (
        key for key, given in config.items() if isinstance(given, dict) and (key == _TEXT or _OTHERS.fullmatch(key))
    )
    return not str(config.get("model_type")).endswith("_assistant") and any(parts)


def text_settings(config: Mapping[str, Json]) -> dict[str, Json] | None:
    """The settings of the language model as a config.json of its own; None where transformers finds none."""
    given = config.get(_TEXT)
    whole = isinstance(given, dict) and isinstance(given.get("model_type"), str)
    text = given if isinstance(given, dict) and whole and all(given.get(name) for name in _NUMBERS) else _asked(config)
    if text is None:
        return None
    outer = {key: config[key] for key in _OUTER if config.get(key)}
    return {**outer, **{key: value for key, value in text.items() if value is not None or key not in outer}}


def text_tensors(entries: Mapping[str, T]) -> dict[str, T]:
    """Those of the language model, by the names that repositories give them."""
    places = {name: _NUMBER.split(name, maxsplit=1)[0] + "." for name in entries}
    marked = any(_MODEL.search(place) for place in places.values())
    return {
        name: entries[name]
        for name, place in places.items()
        if not _OTHER.search(place) and (not marked or _MODEL.search(place) or HEAD.search(place))
    }


def tower_tensors(beside: Mapping[str, T]) -> dict[str, T]:
    """Those of a wrapper's other tensors that images go through, by the names that repositories give them."""
    return {name: entry for name, entry in beside.items() if _SEES.search(_NUMBER.split(name, maxsplit=1)[0] + ".")}


def _asked(config: Mapping[str, Json]) -> dict[str, Json] | None:
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    try:
        # Infinity is an object in the JSON that transformers writes (Nemotron-H).
        whole = CONFIG_MAPPING[model_type].from_dict(PreTrainedConfig._decode_special_floats({**config}))
        text = whole.get_text_config()
        return None if text is whole else text.to_dict()
    except Exception:  # whatever it is, loading meets it again and says so in words
        return None
