"""/v1/embeddings as data: a body becomes texts to read, their vectors a list of embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cli.openai.errors import ApiError, bad_request
from cli.openai.logprobs import Json
from cli.openai.parse import unknown_model, validated
from cli.openai.prepare import encode
from cli.openai.schema import Whole
from specexec.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from specexec.engine.embeddings import Pooling
    from specexec.engine.engine import Engine

MOST_TEXTS = 2048  # of one request, as OpenAI has it


class EmbeddingRequest(BaseModel):
    """The body of /v1/embeddings. `pooling` is ours: what of a text's tokens is its vector."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    input: str | list[Whole] | list[str] | list[list[Whole]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Whole, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] = "mean"
    user: str | None = None


@dataclass(frozen=True)
class EmbeddingTexts:
    """Texts that are to become vectors. `dimensions` is how many numbers a vector must have, if that was said."""

    model: str | None
    texts: tuple[str | list[int], ...]
    pooling: Pooling
    dimensions: int | None = None
    in_base64: bool = False
    cut: bool = False

    def tokens(self, engine: Engine) -> list[list[int]]:
        """The tokens of each text. Raises ApiError, BadText."""
        most = None if self.cut else engine.context
        return [self._fitting(engine, at, encode(engine, text, most=most)) for at, text in enumerate(self.texts)]

    def _fitting(self, engine: Engine, at: int, tokens: list[int]) -> list[int]:
        if not tokens:
            raise bad_request(f"input.{at} is empty.", "input", "empty_prompt")
        if len(tokens) > engine.context and not self.cut:
            what = f"input.{at} has {len(tokens)} tokens, this model's maximum context length is {engine.context}."
            raise ApiError(400, ContextLengthExceeded.code, what, param="input")
        return tokens[: engine.context]


def read_embeddings(body: object, served: Items[str]) -> EmbeddingTexts:
    """A body of /v1/embeddings. Raises ApiError."""
    request = validated(EmbeddingRequest, body)
    check_served(request.model, served)
    texts = _texts(request.input)
    return EmbeddingTexts(
        request.model, texts, request.pooling, request.dimensions, request.encoding_format == "base64"
    )


def check_served(model: str | None, served: Items[str]) -> None:
    """Raises ApiError for a model that is not here."""
    if model is not None and model not in served:
        raise unknown_model(model, served)


def check_texts(texts: Items[object]) -> None:
    """Raises ApiError for none, or for more than one request may have."""
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise bad_request(f"input: 1 to {MOST_TEXTS} texts are allowed, not {len(texts)}.", "input")


def check_dimensions(wanted: int | None, has: int) -> None:
    """Raises ApiError where vectors of this model do not have so many numbers: a part of one means nothing."""
    if wanted is not None and wanted != has:
        what = f"dimensions: vectors of this model have {has} numbers; a part of one is no vector of it."
        raise bad_request(what, "dimensions", "unsupported_parameter")


def embedded(asked: EmbeddingTexts, model: str, vectors: list[list[float]], tokens: int) -> Json:
    """The answer, in OpenAI's shape."""
    shaped: list[object] = [_in_base64(one) for one in vectors] if asked.in_base64 else [*vectors]
    data = [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(shaped)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _texts(given: str | list[int] | list[str] | list[list[int]]) -> tuple[str | list[int], ...]:
    if isinstance(given, str):
        return (given,)
    ids = [item for item in given if isinstance(item, int)]
    if ids:
        return (ids,)
    texts = [item for item in given if not isinstance(item, int)]
    check_texts(texts)
    return tuple(texts)


def _in_base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
