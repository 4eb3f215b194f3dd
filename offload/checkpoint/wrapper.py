"""A language model out of transformers' class for images or sound: which class computes it, and its names in there.

The modelling code stays transformers' own. The wrapper is built without weights only to say where each tensor belongs.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

# Language models that transformers gives no class with a head, or one that scales logits where its wrapper does not:
# in the wrapper one matrix makes logits of the rows of the last norm, and `_finished` is what follows. Each was
# compared with its wrapper (docs/architectures.md). Those that transformers' auto classes do not find are named.
HEADLESS = {
    **dict.fromkeys(
        (
            "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text", "glm4v_moe_text",
            "glm_ocr_text", "glm5_next_text", "cosmos3_edge_text", "hunyuan_vl_text", "cohere2", "molmo2_text",
            "mistral_large4_text", "muse_glimmer_text", "muse_spark_text", "granite_docling_text",
        ),
        "",
    ),
    "paddleocr_vl_text": "PaddleOCRTextModel",
    "step3p5": "Step3p7TextModel",
    "granite4_vision_text": "Granite4VisionTextModel",
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
    "emu3_text_model": "Emu3TextModel",
    "qwen2_5_omni_text": "Qwen2_5OmniThinkerTextModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
}  # fmt: skip
_CAPPED = ("mistral_large4_text", "muse_glimmer_text", "muse_spark_text")
_SCALED = ("granite_docling_text", "granite4_vision_text")
_HEARS = re.compile(r"audio|speech|sound")


class LanguageModel(PreTrainedModel, GenerationMixin):
    """A model of transformers' without a head, and the head that its wrapper has. `language_model` makes the class."""

    base: ClassVar[type[PreTrainedModel]]
    base_model_prefix = "model"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self.base(config)
        self.lm_head = nn.Linear(int(config.hidden_size), int(config.vocab_size), bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits [B, R, V] of all rows, or of the last `logits_to_keep`."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _finished(self.lm_head(output.last_hidden_state[:, rows]), self.config)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def _finished(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """What a wrapper makes of the head's products, by its settings: a multiple, and soft limits."""
    if config.model_type in _SCALED:
        return logits / config.logits_scaling
    if config.model_type not in _CAPPED:
        return logits
    most = config.final_logit_softcapping
    return torch.tanh(logits * getattr(config, "output_multiplier", 1.0) / most) * most


@dataclass(frozen=True)
class Wrapper:
    """Transformers' class for the whole checkpoint, without weights.

    `own` maps the beginnings of the language model's names in there to those it has by itself.
    """

    whole: PreTrainedModel
    own: Mapping[str, str]

    def own_name(self, name: str) -> str | None:
        """What the language model calls this tensor of the whole; None for one of another part."""
        found = next((start for start in self.own if name.startswith(start)), None)
        return None if found is None else self.own[found] + name.removeprefix(found)

    def whole_name(self, name: str) -> str:
        """What the whole calls this module or tensor of the language model."""
        start = next(start for start, own in self.own.items() if name.startswith(own))
        return start + name.removeprefix(self.own[start])


def wrapper_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that answers in text to images or sound; None if transformers has none for this config."""
    return _known(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config) or _known(MODEL_FOR_MULTIMODAL_LM_MAPPING, config)


def language_class(text: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of a wrapper's language model with its head; None where what the head does is not known."""
    if text.model_type not in HEADLESS:
        return _known(MODEL_FOR_CAUSAL_LM_MAPPING, text)
    named = HEADLESS[text.model_type]
    base = getattr(transformers, named, None) if named else _known(MODEL_MAPPING, text)
    return None if base is None else _with_head(base)


def _known(classes: Mapping[type[PreTrainedConfig], object], config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    found = classes[type(config)] if type(config) in classes else None  # noqa: SIM401  # their `get` is another
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _with_head(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    kept = (
        "config_class",
        "_supports_attention_backend",
        "_supports_sdpa",
        "_supports_flash_attn",
        "_no_split_modules",
    )
    given = {name: getattr(base, name) for name in kept if hasattr(base, name)}
    given |= {"base": base, "_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"}}
    # Its code is transformers', so that is where it says it comes from.
    return type(f"{base.__name__}WithHead", (LanguageModel,), {**given, "__module__": base.__module__})


def is_tied(whole: PreTrainedModel) -> bool:
    """Does the wrapper's head share the matrix of its token embeddings?"""
    head = _head(whole)
    return any(
        whole.get_submodule(name.rpartition(".")[0]) is head
        for pair in whole.all_tied_weights_keys.items()
        for name in pair
    )


@contextmanager
def towers_optional() -> Iterator[None]:
    """While this is open, a part of a whole that needs a library which is not here (timm) is built empty.

    So the language model beside it has its names; nothing computes that part.
    """
    own = AutoModel.from_config

    def from_config(*args: Any, **kwargs: Any) -> nn.Module:
        try:
            return own(*args, **kwargs)
        except ImportError:
            return nn.Module()

    AutoModel.from_config = staticmethod(from_config)  # type: ignore[method-assign]  # it is a base class's
    try:
        yield
    finally:
        del AutoModel.from_config


def names_in(whole: PreTrainedModel, model: PreTrainedModel) -> Wrapper:
    """Where the language model is in its wrapper. Raises LookupError if it is not there."""
    trunk = next(module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    inside = (path for path, module in whole.named_modules() if type(module) is type(trunk))
    if (place := next(inside, None)) is None:
        raise LookupError(type(trunk).__name__)
    heads = _path(whole, _head(whole)), _path(model, _head(model))
    return Wrapper(whole, {f"{place}.": f"{_path(model, trunk)}.", f"{heads[0]}.": f"{heads[1]}."})


def strip_text(wrapper: Wrapper) -> None:
    """Take the language model, its head and all that hears out of the whole: what images go through is left."""
    whole = wrapper.whole
    parts = [start.removesuffix(".") for start in wrapper.own]
    parts += [path for path, _ in whole.named_modules() if _HEARS.search(path.rpartition(".")[2])]
    for path in parts:
        parent, _, name = path.rpartition(".")
        whole.get_submodule(parent)._modules.pop(name, None)


def _head(model: PreTrainedModel) -> nn.Module:
    """Its own, or that of a model inside it that is whole by itself."""
    inside = (module.get_output_embeddings() for module in model.modules() if isinstance(module, PreTrainedModel))
    head = next((found for found in inside if found is not None), None)
    if head is None:
        raise LookupError("a head")
    assert isinstance(head, nn.Module)
    return head


def _path(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)
