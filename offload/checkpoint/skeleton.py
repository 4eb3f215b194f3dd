"""A transformers causal LM without weights, and where its decoder layers are. Refuses by name what cannot stream."""

import copy
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import TORCH_INIT_FUNCTIONS, guard_torch_init_functions
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from offload.checkpoint.documents import Json, read_json
from offload.checkpoint.headers import Folder
from offload.checkpoint.mtp import mtp_layout
from offload.checkpoint.quantized.stored import refuse_unknown
from offload.checkpoint.remote_code import classes_in, references, refuse_elsewhere, refused, running_code
from offload.checkpoint.roles import attentions
from offload.checkpoint.unrolled import unroll
from offload.checkpoint.wrapped import tower_tensors
from offload.checkpoint.wrapper import (
    Wrapper,
    is_tied,
    language_class,
    names_in,
    strip_text,
    towers_optional,
    wrapper_class,
)
from offload.errors import BadModelDir, UnsupportedModel

SUPPORTED = (
    "Supported: Llama, Mistral, Qwen 2 to 3.5, Gemma 2 to 4, Phi-3, OLMo 2, GPT-NeoX, Mixtral, gpt-oss, DeepSeek …: "
    "all are in docs/architectures.md."
)
# What transformers computes and streaming cannot, and why.
REFUSED = {
    "paligemma": "Its prompts begin with an image, and their rows see what follows them: no text goes on from a text.",
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES |= {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters are on the meta device; `layers` names its list of decoder layers."""

    model: PreTrainedModel
    layers: str
    dtype: torch.dtype
    wrapper: Wrapper | None = None
    """What names in the checkpoint refer to, where the model is a part of it."""

    @property
    def whole(self) -> PreTrainedModel:
        """The model that the checkpoint's names refer to."""
        return self.wrapper.whole if self.wrapper else self.model

    @property
    def whole_layers(self) -> str:
        """The list of decoder layers in `whole`."""
        return self.wrapper.whole_name(self.layers) if self.wrapper else self.layers

    @property
    def layer_list(self) -> nn.ModuleList:
        """The decoder layers."""
        found = self.model.get_submodule(self.layers)
        assert isinstance(found, nn.ModuleList)
        return found


def settings_of(config: PreTrainedConfig) -> dict[str, Json]:
    """The config as config.json would say it, under the usual names where the class has others for them."""
    given: dict[str, Json] = config.to_dict()
    usual = {name: given[own] for name, own in config.attribute_map.items() if own in given}
    return {**usual, **given}


@dataclass(frozen=True)
class Design:
    """What transformers makes of config.json: the settings and the class that would be built. No weights yet."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    whole: PreTrainedConfig | None = None
    """Settings of the checkpoint where it holds images or sound as well; `config` is the language model's."""

    @property
    def own_code(self) -> bool:
        """Whether the class comes from the checkpoint's folder."""
        return not self.model_class.__module__.startswith("transformers.")


def build(
    folder: Folder, dtype: str | torch.dtype | None, trust_remote_code: bool = False, longer: bool = False
) -> Skeleton:
    """The folder's model as transformers would build it, in `dtype` (default: as config.json or the weights say).

    `longer`: with the layer more that the folder brings (mtp.py). It sees all of the text unless the config says else,
    and is dense where it has no experts.
    """
    refuse_unknown(folder)
    found = design(folder, trust_remote_code)
    config = found.config
    if longer:
        _lengthen(config, folder)
    wanted = _dtype(dtype, config, folder)
    if found.whole is not None:
        return _unwrapped(folder, found, found.whole, wanted)
    with (
        _no_weights(),
        running_code(folder.path, trust_remote_code),
        _sense(folder.path / "config.json"),
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    assert isinstance(model, PreTrainedModel)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    unroll(model)
    _ready(model)
    return Skeleton(model, _find_layers(model, folder), wanted)


@contextmanager
def _no_weights() -> Iterator[None]:
    """Parameters go to the meta device, where drawing them would only take time."""
    draws = {**TORCH_INIT_FUNCTIONS}
    with init_empty_weights(include_buffers=False), guard_torch_init_functions():
        TORCH_INIT_FUNCTIONS.update({name: _unless_empty(draw) for name, draw in draws.items()})  # type: ignore[arg-type]
        try:
            yield
        finally:
            TORCH_INIT_FUNCTIONS.update(draws)


def _unless_empty(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda tensor, *how, **more: tensor if tensor.is_meta else draw(tensor, *how, **more)


def _lengthen(config: PreTrainedConfig, folder: Folder) -> None:
    """Add the layers of one step, each of the kind that config.json lists behind those of the model."""
    count, more = int(config.num_hidden_layers), mtp_layout(folder).layers
    # MiMo-V2's config does not say that its layer has a window; its publisher's code does.
    usual = "sliding_attention" if config.model_type == "mimo_v2_flash" else "full_attention"
    sparse = any(".experts." in name or ".moe." in name for name in folder.mtp)
    kinds = {
        "layer_types": getattr(config, "mtp_layer_types", None) or [usual],
        "layers_block_type": getattr(config, "mtp_layers_block_type", None),
        "mlp_layer_types": getattr(config, "mtp_mlp_layer_types", None) or ["sparse" if sparse else "dense"],
    }
    for name, value in [*vars(config).items()]:
        if isinstance(value, list) and len(value) == count:  # what differs from layer to layer
            listed = folder.config.get(name)
            behind = listed[count:] if isinstance(listed, list) else None
            setattr(config, name, [*value, *(behind or kinds.get(name) or value[-1:])[:more]])
    config.num_hidden_layers = count + more * attentions(config.model_type)
    if config.is_heterogeneous:  # Step: those with a window have more heads
        own = {int(at): settings for at, settings in config.to_dict()["per_layer_config"].items()}
        alike = {kind: own[at] for at, kind in enumerate(config.layer_types[:count]) if at in own}
        added = {at: alike[kind] for at, kind in enumerate(config.layer_types) if at >= count and kind in alike}
        config.per_layer_config = {str(at): settings for at, settings in (own | added).items()}


def _unwrapped(folder: Folder, found: Design, config: PreTrainedConfig, dtype: torch.dtype) -> Skeleton:
    """The language model of a wrapper, tied to its embeddings as the wrapper is."""
    whole_class, text = wrapper_class(config), copy.deepcopy(found.config)
    assert whole_class is not None, "the design was checked"
    with _no_weights(), _sense(folder.path / "config.json"):
        with towers_optional():
            whole = whole_class._from_config(config, dtype=dtype)
        text.tie_word_embeddings = is_tied(whole)
        model = found.model_class._from_config(text, dtype=dtype)
        try:
            wrapper = names_in(whole, model)
        except LookupError as error:
            raise _unsupported(folder, f"Its language model has no {error} of its own.") from error
    own = os.path.lexists(folder.path / "generation_config.json")
    model.generation_config = _generation_config(folder) if own else GenerationConfig.from_model_config(config)
    _ready(model)
    return Skeleton(model, _find_layers(model, folder), dtype, wrapper)


def build_tower(folder: Folder, dtype: str | torch.dtype | None) -> Skeleton:
    """What images go through in a model that sees; `layers` names the blocks that most of it is made of.

    Raises UnsupportedModel for one that does not see.
    """
    found = design(folder)
    if found.whole is None or not tower_tensors(folder.beside):
        raise UnsupportedModel(f"{folder.called} holds nothing that images go through.", hint="text alone.")
    wanted = _dtype(dtype, found.config, folder)
    built = _unwrapped(folder, found, found.whole, wanted)
    alone = _unwrapped(folder, found, found.whole, wanted).wrapper
    assert built.wrapper is not None
    assert alone is not None
    strip_text(alone)
    _ready(alone.whole)
    lists = {path: module for path, module in alone.whole.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:  # Gemma 4's unified models embed patches, and have no tower to speak of
        lists["blocks"] = alone.whole.blocks = nn.ModuleList()
    blocks = max(lists, key=lambda path: sum(one.numel() for one in lists[path].parameters()))
    return Skeleton(
        alone.whole, blocks, wanted, Wrapper(built.whole, {name: name for name in alone.whole.state_dict()})
    )


def _ready(model: PreTrainedModel) -> None:
    """To be read only, and to record what its layers put out."""
    model.eval()
    model.requires_grad_(False)
    # transformers finds the layers whose outputs it records by their class; later it would only see our wrapper.
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            maybe_install_capturing_hooks(module)


def _generation_config(folder: Folder) -> GenerationConfig:
    """As `from_pretrained` finds it: old checkpoints say in config.json how to generate."""
    own = os.path.lexists(folder.path / "generation_config.json")
    name = "generation_config.json" if own else "config.json"
    read_json(folder.path / name)
    with _sense(folder.path / name):
        return GenerationConfig.from_pretrained(
            folder.path, config_file_name=name, local_files_only=True, _from_model_config=not own
        )


def design(folder: Folder, trust_remote_code: bool = False) -> Design:
    """How transformers would build the folder's model: by its own code, or with trust by code in the folder.

    Raises RemoteCode where there is no other way than the folder's code and no trust.
    """
    theirs = references(folder.path) if folder.here else classes_in(folder.whole_config)
    if trust_remote_code:
        refuse_elsewhere(folder.path)
    elif "AutoConfig" in theirs and folder.architecture not in CONFIG_MAPPING:
        raise refused(folder.path)
    if "AutoConfig" not in theirs and folder.architecture not in CONFIG_MAPPING:
        raise _unsupported(
            folder, f"This version of transformers does not know the model type '{folder.architecture}'."
        )
    try:
        config = _config(folder, trust_remote_code)
    except ImportError as error:  # a library that this model's settings need is not here
        raise _unsupported(folder, str(error).strip().splitlines()[0]) from error
    # Layers see ordinary dense weights, so the model is built as if it had never been quantised.
    vars(config).pop("quantization_config", None)
    # Encoders that could be decoders (BERT) have both settings; as they are their rows see what follows.
    encoder = getattr(config, "is_decoder", True) is False and hasattr(config, "add_cross_attention")
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise _unsupported(folder, "It is not a decoder-only language model.")
    if why := REFUSED.get(config.model_type):
        raise _unsupported(folder, why)
    with _sense(folder.path / "config.json"):
        text = config.get_text_config()
        _check_window(text)
    if text is not config:
        return _language_model(folder, config, text)
    return Design(config, _model_class(folder, config, theirs.get("AutoModelForCausalLM"), trust_remote_code))


def _config(folder: Folder, trust_remote_code: bool) -> PreTrainedConfig:
    with running_code(folder.path, trust_remote_code), _sense(folder.path / "config.json"):
        if not folder.here:
            told = PreTrainedConfig._decode_special_floats({**folder.whole_config})
            return CONFIG_MAPPING[folder.architecture].from_dict(told)
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        return found


def _language_model(folder: Folder, config: PreTrainedConfig, text: PreTrainedConfig) -> Design:
    """The language model alone, as transformers builds it where nothing else is there."""
    vars(text).pop("quantization_config", None)
    text.dtype = text.dtype or config.dtype
    if folder.wrapper is None or wrapper_class(config) is None:
        raise _unsupported(folder, "It is not a decoder-only language model.")
    if (found := language_class(text)) is None:
        raise _unsupported(folder, f"It sees or hears, and its language model ({text.model_type}) is not known alone.")
    return Design(text, found, config)


def _model_class(
    folder: Folder, config: PreTrainedConfig, theirs: list[str] | None, trust_remote_code: bool
) -> type[PreTrainedModel]:
    if theirs and trust_remote_code:
        with running_code(folder.path, trust_remote_code):
            found: object = get_class_from_dynamic_module(theirs[0], str(folder.path), local_files_only=True)
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    elif theirs:
        raise refused(folder.path)
    else:
        raise _unsupported(folder, "It is not a decoder-only language model.")
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise _unsupported(folder, "Its class is no transformers model.")
    return found


def _check_window(config: PreTrainedConfig) -> None:
    """Raises ValueError for one that transformers takes as it is and no mask can be made of."""
    window = getattr(config, "sliding_window", None)
    if window is not None and not (isinstance(window, int) and abs(window) < 1 << 31):
        raise ValueError(f"sliding_window is {window!r}, not a number of tokens.")


@contextmanager
def _sense(file: Path) -> Iterator[None]:
    """What transformers raises on settings that make no sense, as an error about their file."""
    nonsense = (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
        StrictDataclassError,
    )  # fmt: skip
    try:
        yield
    except nonsense as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise BadModelDir(f"{file} does not describe a usable model.", first) from error


def _dtype(asked: str | torch.dtype | None, config: PreTrainedConfig, folder: Folder) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked not in (None, "auto"):
        return DTYPES[asked]
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = [entry for entry in folder.entries.values() if entry.dtype in STORED]
    largest = max(stored, key=lambda entry: entry.nbytes, default=None)
    return STORED[largest.dtype] if largest else torch.float32


def _find_layers(model: PreTrainedModel, folder: Folder) -> str:
    """The shallowest list with one module per hidden layer (experts are lists too, but deeper)."""
    count = getattr(model.config, "num_hidden_layers", -1) // attentions(model.config.model_type)
    waiting: deque[tuple[str, nn.Module]] = deque([("", model)])
    while waiting:
        path, module = waiting.popleft()
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path
        waiting.extend((f"{path}.{name}" if path else name, child) for name, child in module.named_children())
    raise _unsupported(folder, "No list of decoder layers was found in it.")


def _unsupported(folder: Folder, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"architecture {_architecture(folder)} is not supported.", f"{why} {SUPPORTED}")


def _architecture(folder: Folder) -> str:
    names = folder.whole_config.get("architectures")
    return f"'{names[0]}'" if isinstance(names, list) and names else f"'{folder.architecture}'"
