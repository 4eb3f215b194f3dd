"""Embeddings are transformers' own hidden states of a plain forward, pooled; many texts share one sweep."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import openai
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, PreTrainedModel

import specexec
from specexec.engine.embeddings import Pooling, embeddings
from specexec.engine.engine import Engine
from specexec.engine.together import MOST_ROWS
from specexec.errors import ContextLengthExceeded, EmptyPrompt, UnknownToken
from specexec.model.tree_lm import Rows
from tests.serving import Served, serving

TEXTS = ["What is a drafter?", "x", "A longer text, of several words and signs: 1, 2, 3.", "What is a drafter?"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with specexec.load("demo", drafter="none", dtype="f32") as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(lambda: specexec.load("demo", drafter="none", dtype="f32", ctx=64), names=("demo",)) as served:
        yield served


@pytest.fixture(scope="module")
def truth(engine: Engine) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(engine.folders["target"], dtype=torch.float32)
    return model


@torch.no_grad()
def expected(truth: PreTrainedModel, tokens: list[int], pooling: Pooling = "mean") -> torch.Tensor:
    states_LH = truth(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    pooled_H = states_LH.mean(0) if pooling == "mean" else states_LH[-1]
    return pooled_H / pooled_H.norm()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_pooled_hidden_states_of_transformers(
    engine: Engine, truth: PreTrainedModel, pooling: Pooling
) -> None:
    before = engine.progress().sweeps
    for text, vector_H in zip(TEXTS, engine.embeddings(TEXTS, pooling), strict=True):
        torch.testing.assert_close(vector_H, expected(truth, engine.encode(text), pooling), atol=1e-5, rtol=1e-4)
    assert engine.progress().sweeps == before  # no sweep of the decoder's


def test_texts_share_sweeps_as_far_as_memory_holds_them() -> None:
    sweeps: list[list[int]] = []

    class Target:
        def forward(self, parts: list[Rows]) -> list[torch.Tensor]:
            sweeps.append([len(part.tokens) for part in parts])
            return [torch.ones(len(part.tokens), 2) for part in parts]

    def sizes(*lengths: int) -> list[list[int]]:
        sweeps.clear()
        assert len(list(embeddings(Target(), [[1] * n for n in lengths], "mean", lambda some: sum(some) <= 9000))) > 0
        return sweeps

    assert sizes(3, 2, 4) == [[3, 2, 4]]
    assert sizes(MOST_ROWS, 1, 9, 9500, 1) == [[MOST_ROWS], [1, 9], [9500], [1]]


def test_what_cannot_be_a_vector_is_refused_before_a_sweep(engine: Engine) -> None:
    for texts, refusal in ((["a", ""], EmptyPrompt), ([[1] * 3000], ContextLengthExceeded), ([[-1]], UnknownToken)):
        with pytest.raises(refusal, match="text "):
            engine.embeddings(texts)


def test_openais_client_reads_floats_and_base64(server: Served, truth: PreTrainedModel) -> None:
    engine, client = server.worker.engine, server.openai()
    tokens = [engine.encode(text) for text in TEXTS]
    for form in ({}, {"encoding_format": "float"}):  # without a wish the client asks for base64
        told = client.embeddings.create(model="demo", input=TEXTS, **form)  # type: ignore[arg-type]  # one of its words
        for one, ids in zip(told.data, tokens, strict=True):
            torch.testing.assert_close(torch.tensor(one.embedding), expected(truth, ids), atol=1e-5, rtol=1e-4)
        assert [one.index for one in told.data] == [0, 1, 2, 3]
        assert told.usage.prompt_tokens == told.usage.total_tokens == sum(map(len, tokens))
    last = client.embeddings.create(model="demo", input=tokens[:1], extra_body={"pooling": "last"}).data[0].embedding
    torch.testing.assert_close(torch.tensor(last), expected(truth, tokens[0], "last"), atol=1e-5, rtol=1e-4)
    same = client.embeddings.create(model="demo", input=tokens[0], dimensions=engine.width).data[0].embedding
    assert float(cosine_similarity(torch.tensor(same), expected(truth, tokens[0]), dim=0)) == pytest.approx(1, abs=1e-5)


def test_ollamas_client_embeds_and_long_texts_are_cut_there_alone(server: Served, truth: PreTrainedModel) -> None:
    engine = server.worker.engine
    with ollama.Client(host=server.url, trust_env=False) as client:
        told = client.embed("demo:latest", ["x", "word " * 200])
        cut = engine.encode("word " * 200)[: engine.context]
        for vector, ids in zip(told.embeddings, (engine.encode("x"), cut), strict=True):
            torch.testing.assert_close(torch.tensor(vector), expected(truth, ids), atol=1e-5, rtol=1e-4)
        assert told.prompt_eval_count == len(engine.encode("x")) + engine.context
        with pytest.raises(ollama.ResponseError, match="maximum context length is 64"):
            client.embed("demo", "word " * 200, truncate=False)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 64"):
        server.openai().embeddings.create(model="demo", input="word " * 200)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"input": "x", "dimensions": 3}, "unsupported_parameter"),
        ({"input": []}, "invalid_value"),
        ({"input": ["x", ""]}, "empty_prompt"),
        ({"input": ["x"] * 2049}, "invalid_value"),
        ({"input": [10**9]}, "invalid_token"),
        ({"input": "x", "encoding_format": "int8"}, "invalid_value"),
        ({"input": "x", "pooling": "cls"}, "invalid_value"),
        ({}, "invalid_value"),
    ],
)
def test_refusals_name_what_is_wrong(server: Served, body: dict[str, Any], code: str) -> None:
    with server.http as http:
        refused = http.post("/v1/embeddings", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, code), refused.text


def test_vectors_and_answers_of_a_crowd_are_those_of_one(server: Served) -> None:
    """Texts are read between the sweeps that write others, and change none of them."""
    alone = server.ask("What is a drafter?", temperature=0, max_tokens=40).json()["choices"][0]["message"]["content"]
    vector = server.openai().embeddings.create(model="demo", input=TEXTS).data
    wrong: list[object] = []

    def write() -> None:
        said = server.ask("What is a drafter?", temperature=0, max_tokens=40).json()["choices"][0]["message"]["content"]
        wrong.extend([said] * (said != alone))

    def embed(http: httpx.Client) -> None:
        told = http.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "float"}).json()["data"]
        pairs = zip(told, vector, strict=True)
        wrong.extend(one for one, other in pairs if one["embedding"] != pytest.approx(other.embedding, abs=1e-6))

    with server.http as http:
        threads = [threading.Thread(target=write if at % 2 else lambda: embed(http)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
