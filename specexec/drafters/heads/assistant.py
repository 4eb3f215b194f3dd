"""A Gemma 4 assistant as a model that drafts: a few layers of queries that attend to the target's keys and values.

    x = pre_projection [E t ; h],   E t: the target's embedding, scaled as the target does
    h: the target's last hidden state behind its norm, of the token before; for a guess its parent's post_projection y
    layers of Gemma 4's kind, each attending to all that the target's last layer of the same kind keeps of the text,
    with the position of the text's last token whatever the depth;   y = norm(x),   logits = lm_head y

There is no cache: a row needs its parent's y and the target's cache, so that going back costs nothing. Some compare a
few thousand tokens alone: those of the clusters whose centroids, times y, are the highest.
Reference: transformers' Gemma4AssistantForCausalLM and SinglePositionMultiTokenCandidateGenerator (5.23).
R rows   H hidden size   F features   V vocabulary   C clusters   K tokens of a cluster   T clusters that are compared
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextDecoderLayer,
    Gemma4TextRotaryEmbedding,
)

from specexec.drafters.heads.assistant_fields import (
    KIND,
    ORDER,
    OUT,
    AssistantFields,
    layer_config,
    own_name,
    read_layers,
)
from specexec.drafters.heads.filled import TargetSizes, fill
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.read_text import KeyReader, ReadText
from specexec.drafters.heads.refusal import unread
from specexec.drafters.kit import DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.model import attention
from specexec.model.architecture import longest_text
from specexec.model.cache import KVCache
from specexec.model.taps import LAST
from specexec.model.tree_lm import Rows, TreeLM
from specexec.text.sequence import Sequence

PLAIN = {"hidden_size_per_layer_input": 0}  # of `gemma4_unified`, which does not name it
CLUSTER_ROWS = 8  # rows whose clusters' embeddings lie side by side: some 2 MB each


class OfQueries(Gemma4TextConfig):
    """Settings of layers that have queries alone, which transformers 5.23 refuses where there are no others."""

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """None of them computes keys and values."""
        return ["reuse"] * self.num_hidden_layers


class Assistant(nn.Module):
    """The layers of an assistant beside its target. Compared and hashed by identity.

    `layers` are the target's layers that its own ones attend to, `window` as ReadText has it.
    """

    def __init__(
        self,
        fields: AssistantFields,
        config: OfQueries,
        target: TreeLM,
        layers: Items[int],
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.fields, self.vocabulary, self.context = fields, fields.vocabulary, longest_text(config)
        self.device = target.device
        self._target, self._reads, self._window = target, layers, window
        hidden, eps = int(config.hidden_size), float(config.rms_norm_eps)
        self.pre_projection = nn.Linear(2 * fields.hidden, hidden, bias=False)
        self.post_projection = nn.Linear(hidden, fields.hidden, bias=False)
        self.layers = nn.ModuleList(Gemma4TextDecoderLayer(config, number) for number in range(len(fields.kinds)))
        self.norm = Gemma4RMSNorm(hidden, eps=eps)
        self.lm_head = nn.Linear(hidden, fields.vocabulary, bias=False)
        if fields.clusters:
            self.masked_embedding = nn.ModuleDict({"centroids": nn.Linear(hidden, fields.clusters, bias=False)})
        self._config = config
        self._order_CK: Tensor | None = None

    def complete(self, order_V: Tensor | None) -> None:
        """Its weights are there: so is now what is made of them. `order_V` lists the tokens by their clusters."""
        self.rotary = Gemma4TextRotaryEmbedding(self._config).to(self.device)
        if order_V is not None:
            order_V = order_V.to(self.device)
            self.lm_head.weight = nn.Parameter(self.lm_head.weight[order_V], requires_grad=False)
            self._order_CK = order_V.view(self.fields.clusters, -1)

    @torch.no_grad()
    def forward(self, parts: list[Rows]) -> list[Tensor]:
        """y of the rows of each part, [R, H]: each reads its features and what the target keeps of the text."""
        embeddings = self._target.model.get_input_embeddings()
        counts, readers, features = [len(part.tokens) for part in parts], list[KeyReader](), list[Tensor]()
        for part in parts:
            assert part.read is not None
            assert part.features_RF is not None
            readers.append(KeyReader(len(part.tokens), part.read))
            features.append(part.features_RF)
        h_RF = torch.cat(features).to(self.pre_projection.weight)
        tokens_R = torch.tensor([token for part in parts for token in part.tokens], device=self.device)
        e_RF = embeddings(tokens_R.clamp(max=self._target.vocabulary - 1)).to(h_RF)
        at_R = torch.tensor([reader.cache.position for reader in readers], device=self.device)
        at_R = at_R.repeat_interleave(torch.tensor(counts, device=self.device))[None]
        x_RH = self.pre_projection(torch.cat([e_RF, h_RF], -1))[None]
        turned = {kind: self.rotary(x_RH, at_R, kind) for kind in {*self.fields.kinds}}
        text = ReadText(readers, self._reads, self._target.kept, self._window)
        nothing = x_RH.new_empty(1, 0, 0, 0)  # in the place of keys: `text` knows where they are
        for layer, kind in zip(self.layers, self.fields.kinds, strict=True):
            x_RH = layer(
                x_RH, shared_kv_states={kind: (nothing, nothing)}, position_embeddings=turned[kind],
                position_ids=at_R, sweep=text,
            )  # fmt: skip
        y_RH: Tensor = self.norm(x_RH[0])
        for part in parts:
            part.cache.node_tokens.extend(part.tokens)
            part.cache.parents.extend(part.parents)
        return list(y_RH.split(counts))

    @torch.no_grad()
    def head(self, y_RH: Tensor) -> Tensor:
        """Logits [R, V] in float32; -inf for tokens of clusters that are not compared."""
        if self._order_CK is None:
            logits_RV: Tensor = self.lm_head(y_RH).float()
            return logits_RV
        return torch.cat([self._of_clusters(part, self._order_CK) for part in y_RH.split(CLUSTER_ROWS)])

    def _of_clusters(self, y_RH: Tensor, order_CK: Tensor) -> Tensor:
        best_RT = self.masked_embedding["centroids"](y_RH).topk(self.fields.best).indices
        out_CKH = self.lm_head.weight.view(*order_CK.shape, -1)
        logits_RTK = (out_CKH[best_RT].flatten(1, 2) @ y_RH[:, :, None]).squeeze(-1)
        wide_RV = torch.full((len(y_RH), self.vocabulary), -torch.inf, device=y_RH.device)
        return wide_RV.scatter_(1, order_CK[best_RT].flatten(1), logits_RTK.float())


class ReadFeatures:
    """What an assistant reads: the last state of its target, its parent's y, and the target's cache of the text."""

    refused = False

    def __init__(self, assistant: Assistant, target: TreeLM) -> None:
        self._assistant, self._target = assistant, target
        target.taps.want(self, [LAST])

    def ready(self, sequence: Sequence) -> bool:
        """Whether the target has read all of a text but its last token, and its state behind that is there."""
        cache = sequence.cache(self._target)
        end = len(sequence.tokens) - 1
        return cache.taken is not None and cache.taken.end == len(cache) == end > cache.taken.first([LAST])

    def settle(self, sequence: Sequence) -> None:
        """A text tells nothing about it that its sizes did not."""

    def begin(self, sequence: Sequence) -> None:
        """All but the last token count as read."""
        cache, tokens = sequence.cache(self._assistant), sequence.tokens[:-1]
        cache.rewind(0)
        cache.tokens, cache.unread = tokens, len(tokens)

    def rows(self, sequence: Sequence, cache: KVCache, tokens: Items[int]) -> Rows:
        """The last token, which reads the target's state of the one before."""
        read = sequence.cache(self._target)
        assert read.taken is not None
        assert len(tokens) == 1
        features_RF = read.taken.between(LAST, read.taken.end - 1, read.taken.end)
        return replace(Rows.text(cache, tokens), features_RF=features_RF, read=read)

    def below(self, sequence: Sequence, part: Rows, given_RH: Tensor) -> Rows:
        """Guesses, which read what their parents' rows hand on."""
        with torch.no_grad():
            features_RF = self._assistant.post_projection(given_RH)
        return replace(part, features_RF=features_RF, read=sequence.cache(self._target))


def loaded(
    settings: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    target: TreeLM,
    name: str,
    window: int | None = None,
) -> Assistant:
    """The assistant for this target, `tensors` under published names.

    Raises BadDrafter, by name, where it has other parts than these or other shapes.
    """
    refused, fields = partial(unread, KIND, name), AssistantFields.of(settings, name)
    own = {own_name(key): one for key, one in tensors.items()}
    if "lm_head.weight" in tensors:  # untied: what it would look up is not needed
        own[OUT] = tensors["lm_head.weight"]
    order_V = own.pop(ORDER, None)
    if (order_V is not None) != bool(fields.clusters) or (order_V is not None and not _is_order(order_V, fields)):
        raise refused(f"its {ORDER} is no order of {fields.vocabulary} tokens")
    try:
        config = OfQueries.from_dict(PLAIN | layer_config(settings))
        config._attn_implementation = attention.NAME
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise refused(f"its config.json makes no sense ({error})") from error
    theirs = target.model.config
    layers = read_layers(fields.kinds, theirs.layer_types, getattr(theirs, "num_kv_shared_layers", 0))
    with torch.device("meta"):
        assistant = Assistant(fields, config, target, layers, window)
    fill(assistant, own, TargetSizes.of(target), refused)
    assistant.complete(order_V)
    return assistant


def make(kit: DrafterKit) -> Drafter:
    """An assistant from a folder of its own, for this target."""
    assert isinstance(kit.target, TreeLM)
    assert kit.head is not None
    found, ids = kit.head, kit.names
    assistant = loaded(found.settings, found.tensors(), kit.target, found.name, kit.window)
    features = ReadFeatures(assistant, kit.target)
    return HeadDrafter(assistant, features, ids.rows, kit.ranking, found.name, ids.never)


def _is_order(order_V: Tensor, fields: AssistantFields) -> bool:
    return torch.equal(order_V.long().sort().values, torch.arange(fields.vocabulary))
