"""What a folder says of a Gemma 4 assistant, and whether it is that of a target. Knows no torch.

Its layers have queries alone: they attend to the keys and values of the target's last layer of their kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

from specexec.drafters.heads.refusal import of_another, unread
from specexec.model.architecture import shared_keys

KIND = "Gemma 4 assistant"
TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
OUT, TABLE, ORDER = "lm_head.weight", "embed_tokens.weight", "masked_embedding.token_ordering"
# Of one layer the sizes of all heads of keys and of values.
Heads = tuple[int, ...]


def own_name(name: str) -> str:
    """What one of its tensors is called here: its own embeddings are its head, for it looks up the target's."""
    name = name.removeprefix("model.")
    return OUT if name == TABLE else name


def layer_config(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings of its layers, whose kind they do not name, as those of a model that keeps no keys and values."""
    given = settings.get("text_config")
    layer = {key: one for key, one in given.items() if key != "model_type"} if isinstance(given, Mapping) else {}
    return layer | {"num_kv_shared_layers": layer.get("num_hidden_layers", 0)}


def read_layers(kinds: object, theirs: object, shared: object) -> tuple[int, ...]:
    """Of its layers, of these kinds, the target's that they attend to: as further layers that share keys would.

    `theirs` are the kinds of the target's layers, the last `shared` of which have no keys either. None where one is no
    list, or the target has no layer of a kind.
    """
    if not isinstance(kinds, list | tuple) or not isinstance(theirs, list):
        return ()
    own = theirs[: len(theirs) - shared] if isinstance(shared, int) else theirs
    both = [*own, *kinds]
    return tuple(shared_keys(both, len(kinds), len(both)).values()) if {*kinds} <= {*own} else ()


@dataclass(frozen=True)
class AssistantFields:
    """One assistant. `hidden` is the target's hidden size, `kinds` those of its own layers.

    With `clusters` it compares the tokens of the `best` of them alone, by centroids of its embeddings.
    """

    hidden: int
    vocabulary: int
    kinds: tuple[str, ...]
    clusters: int = 0
    best: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, object], name: str) -> AssistantFields:
        """Raises BadDrafter, by name, for what is missing or not understood."""
        refused, layer = partial(unread, KIND, name), layer_config(settings)
        kinds, hidden, vocabulary = (
            layer.get("layer_types"), settings.get("backbone_hidden_size"), layer.get("vocab_size")
        )  # fmt: skip
        if not isinstance(kinds, list) or type(hidden) is not int or type(vocabulary) is not int:
            raise refused("its config.json lacks backbone_hidden_size, or text_config with layer_types and vocab_size")
        if len(kinds) != layer.get("num_hidden_layers"):
            raise refused(f"{len(kinds)} layer_types for {layer.get('num_hidden_layers')!r} layers")
        if not settings.get("use_ordered_embeddings"):
            return cls(hidden, vocabulary, tuple(kinds))
        clusters, best = settings.get("num_centroids", 2048), settings.get("centroid_intermediate_top_k", 32)
        if type(clusters) is not int or type(best) is not int or not 0 < best <= clusters or vocabulary % clusters:
            raise refused(f"{vocabulary} tokens in {clusters!r} clusters, of which it compares {best!r}")
        return cls(hidden, vocabulary, tuple(kinds), clusters, best)

    def check(
        self,
        settings: Mapping[str, object],
        heads: Items[Heads],
        target: Mapping[str, object],
        target_heads: Items[Heads],
        name: str,
    ) -> None:
        """Raises BadDrafter for an assistant of another model. `heads`: what each of its layers attends to."""
        for words, given, ours in (
            ("hidden numbers", self.hidden, target.get("hidden_size")),
            ("tokens", self.vocabulary, target.get("vocab_size")),
        ):
            if given != ours:
                raise of_another(KIND, name, given, ours, words)
        if not str(target.get("model_type")).startswith("gemma4"):
            raise of_another(KIND, name, "Gemma 4's", f"those of {target.get('model_type')!r}", "layers")
        layers = read_layers(self.kinds, target.get("layer_types"), target.get("num_kv_shared_layers"))
        if not layers:
            theirs = target.get("layer_types")
            raise of_another(KIND, name, " and ".join(sorted({*self.kinds})), theirs, "layers")
        queries = layer_config(settings).get("num_attention_heads")
        for own, layer in zip(heads, layers, strict=True):
            keys = target_heads[layer]
            if max(own) != max(keys) or not isinstance(queries, int) or queries % (len(keys) // 2):
                asking, asked = f"{queries} heads of {max(own)} numbers", f"{len(keys) // 2} heads of {max(keys)}"
                raise of_another(KIND, name, asking, asked, f"for the keys of layer {layer}")
