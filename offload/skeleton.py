"""A transformers causal LM without weights, and where its decoder layers are. Refuses by name what cannot stream."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from offload.errors import BadModelDir, UnsupportedArchitecture
from offload.shards import Folder

SUPPORTED = (
    "Supported: Llama, Mistral, Qwen 2/3, Gemma 2/3, Phi-3, OLMo 2, GPT-NeoX, OPT, Mixtral, gpt-oss, DeepSeek-V3 …"
)
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "f32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "f16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters are on the meta device; `layers` names its list of decoder layers."""

    model: PreTrainedModel
    layers: str
    dtype: torch.dtype

    @property
    def layer_list(self) -> nn.ModuleList:
        """The decoder layers."""
        found = self.model.get_submodule(self.layers)
        assert isinstance(found, nn.ModuleList)
        return found


def build(folder: Folder, dtype: str | torch.dtype | None) -> Skeleton:
    """The folder's model as transformers would build it, in `dtype` (default: as config.json or the weights say)."""
    _refuse_quantised(folder)
    config = _config(folder)
    wanted = _dtype(dtype, config, folder)
    with init_empty_weights(include_buffers=False):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
        except ValueError as error:
            raise _unsupported(folder, config, str(error).splitlines()[0]) from error
    assert isinstance(model, PreTrainedModel)
    if (folder.path / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    model.eval()
    model.requires_grad_(False)
    # transformers finds the layers whose outputs it records by their class; later it would only see our wrapper.
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            maybe_install_capturing_hooks(module)
    return Skeleton(model, _find_layers(model, folder, config), wanted)


def _config(folder: Folder) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedArchitecture(
            f"architecture {_architecture(folder)} is not supported.", str(error).splitlines()[0], SUPPORTED
        ) from error
    except Exception as error:  # a config class may fail in any way on numbers that make no sense
        raise BadModelDir(f"{folder.path / 'config.json'} is not a usable config: {error!r}.") from error
    if config.get_text_config() is not config:
        raise _unsupported(folder, config, "Models with images or sound cannot be streamed yet.")
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(folder, config, "It is an encoder-decoder, not a decoder-only language model.")
    return config


def _refuse_quantised(folder: Folder) -> None:
    found = folder.config.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else "unknown"
        raise UnsupportedArchitecture(
            f"{folder.path} is quantised ({method}); quantised checkpoints cannot be streamed yet.",
            hint="the 16-bit version of the model.",
        )


def _dtype(asked: str | torch.dtype | None, config: PreTrainedConfig, folder: Folder) -> torch.dtype:
    if isinstance(asked, str) and asked != "auto":
        if asked not in DTYPES:
            raise UnsupportedArchitecture(f"dtype '{asked}' is not known.", hint=f"one of {', '.join(DTYPES)}.")
        return DTYPES[asked]
    if isinstance(asked, torch.dtype):
        return asked
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = [entry for entry in folder.entries.values() if entry.dtype in ("F32", "F16", "BF16")]
    largest = max(stored, key=lambda entry: entry.nbytes, default=None)
    return DTYPES[{"F32": "f32", "F16": "f16", "BF16": "bf16"}[largest.dtype]] if largest else torch.float32


def _find_layers(model: PreTrainedModel, folder: Folder, config: PreTrainedConfig) -> str:
    """The shallowest list with one module per hidden layer (experts are lists too, but deeper)."""
    waiting: deque[tuple[str, nn.Module]] = deque([("", model)])
    while waiting:
        path, module = waiting.popleft()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", -1):
            return path
        waiting.extend((f"{path}.{name}" if path else name, child) for name, child in module.named_children())
    raise _unsupported(folder, config, "No list of decoder layers was found in it.")


def _unsupported(folder: Folder, config: PreTrainedConfig, why: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(f"architecture {_architecture(folder)} is not supported.", why, SUPPORTED)


def _architecture(folder: Folder) -> str:
    names = folder.config.get("architectures")
    return f"'{names[0]}'" if isinstance(names, list) and names else f"'{folder.model_type}'"
