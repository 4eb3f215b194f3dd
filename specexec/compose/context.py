"""What is known of a model before it is loaded: its tokenizer, and how long its texts may be."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

import offload as weights
from specexec.model.architecture import DEFAULT_CONTEXT, longest_text
from specexec.sampling.model_defaults import defaults_of
from specexec.text.image_processor import DOCUMENTS, missing_for
from specexec.text.image_prompts import FAMILIES, UNREAD, ImagePrompts
from specexec.text.templates import damage
from specexec.text.tokenizer import Encoding


def encoding_of(model: str, *, offline: bool = False, trust_remote_code: bool = False) -> Encoding:
    """The tokenizer of a model that need not be loaded."""
    folder = weights.resolve(model, offline=offline, code=trust_remote_code).target
    return encoding_in(folder, trust_remote_code)


def encoding_in(folder: Path, trust_remote_code: bool = False) -> Encoding:
    """The tokenizer of a model folder. Raises BadModelDir, or RemoteCode where it needs code that is not trusted."""
    weights.check_documents(folder)
    try:
        with weights.running_code(folder, trust_remote_code):
            encoding = Encoding.of(folder, trust_remote_code)
        for template in templates_of(encoding):
            if why := damage(template):
                raise weights.BadModelDir(f"the chat template of {folder} is damaged: {why}.", None, weights.AGAIN)
    except weights.OffloadError:
        raise
    except Exception as problem:  # tokenizers and their libraries raise whatever they meet
        first = (str(problem).strip() or repr(problem)).splitlines()[0]
        raise weights.BadModelDir(
            f"the tokenizer of {folder} cannot be used.", f"{type(problem).__name__}: {first}", weights.AGAIN
        ) from problem
    encoding.look = partial(_image_prompts, folder, encoding)
    if not encoding.encode_rest("abc"):  # transformers makes an empty tokenizer of settings alone
        raise weights.BadModelDir(f"{folder} holds no vocabulary of a tokenizer, only settings.", None, weights.AGAIN)
    return encoding


def _image_prompts(folder: Path, encoding: Encoding) -> ImagePrompts | str:
    """How a model's prompts show images, or why they are refused."""
    opened = weights.open_folder(folder)
    if opened.wrapper is None:
        return ""
    config = weights.design(opened).whole
    if config is None or config.model_type not in FAMILIES:
        why = UNREAD.get(opened.architecture)
        return f"Images are not read for the model type {opened.architecture!r}" + (f": {why}." if why else ".")
    if not weights.tower_tensors(opened.beside):
        return "Its files hold no tower for images."
    if not any((folder / name).exists() for name in DOCUMENTS):
        return f"Its folder has no {DOCUMENTS[0]}, which says how images are prepared."
    return missing_for(config.model_type) or ImagePrompts(folder, config, encoding.tokenizer)


def templates_of(encoding: Encoding) -> list[str]:
    """Its chat templates; a model may have several, by name."""
    found = encoding.tokenizer.chat_template
    return [str(one) for one in found.values()] if isinstance(found, dict) else [found] if found else []


def stops_of(folder: Path) -> tuple[str, ...]:
    """The texts that end an answer unless the caller names others: the model's own, from its generation_config.json."""
    if not (folder / GENERATION_CONFIG_NAME).exists():
        return ()
    return defaults_of(GenerationConfig.from_pretrained(folder)).sampling.stop or ()


def context_of(folder: Path, ctx: int | None, trust_remote_code: bool = False) -> int:
    """Tokens that prompt and answer may have together, as `load` decides it, at most what the model was made for."""
    config = weights.design(weights.open_folder(folder), trust_remote_code).config
    return min(ctx or DEFAULT_CONTEXT, longest_text(config))
