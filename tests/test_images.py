"""Messages with images: the answer is the one that transformers' own generate of the whole model gives.

Checkpoints are tiny and random (tests/pictured.py); a random model that did not see an image would write another text.
"""

from __future__ import annotations

import base64
import gc
import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedModel

import specexec
from cli.batch.input.form import Form
from cli.chat.archive import Archive
from cli.messages_api import read as anthropic
from cli.ollama_api import read as ollama
from cli.openai import stream as openai
from cli.openai.prepare import prepare
from cli.openai.reply import Exchange
from cli.responses_api.read import ResponsesReader
from cli.responses_api.store import ResponseStore
from cli.shared.errors import BadJsonl, BadSession
from offload import Free, open_folder, open_tower
from offload.packs.pack import pack, plan
from specexec.compose import context
from specexec.compose.context import encoding_in
from specexec.compose.load_options import LoadOptions
from specexec.compose.memory_plan import LoadRequest, memory_plan
from specexec.drafters.registry import parse
from specexec.engine.engine import Engine
from specexec.engine.request_types import Failure
from specexec.errors import BadMessages, UnknownToken, UnreadContent, UnsupportedArchitecture
from specexec.model.cache import KVCache
from specexec.model.image_rows import is_row
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from specexec.sizes import SEEING
from specexec.text import image_processor, image_prompts
from specexec.text.image_prompts import MOST_IMAGES
from specexec.text.pictures import MOST_B, data_url, is_image_file
from specexec.text.transcript import Kept
from tests.pictured import (
    KNOWN,
    PICTURES,
    logits,
    picture,
    replayed,
    seeing,
    shown,
    whole_inputs,
    whole_processor,
    written,
)
from tests.recorded_images import RecordedProcessor

FAMILIES = ["qwen3_5", "qwen3_vl", "gemma3", "gemma4", "smolvlm"]
# Of the others a sample, and all whose pixels only torchvision prepares: scripts/images.py tries every promise on all.
SAMPLE = ["mistral3", "glm4v_moe", "internvl", "cohere2_vision", "gemma4_unified", "kimi_k25", "lfm2_vl", "llama4"]
SAMPLE += ["minimax_m3_vl", "hunyuan_vl", "minicpmv4_6", "idefics2"]
MOST = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=MOST, ignore_eos=True)
ONE, OTHER = map(picture, PICTURES)


@dataclass(frozen=True)
class Model:
    """A tiny checkpoint, streamed, and transformers' own model of it."""

    folder: Path
    truth: PreTrainedModel
    engine: Engine

    def expected(self, prompt: list[int], *files: bytes) -> list[int]:
        return written(self.truth, whole_inputs(self.truth, self.folder, self.words(prompt), files), MOST)

    def words(self, prompt: list[int]) -> list[int]:
        """A prompt as transformers is given it."""
        return self.engine.encoding.in_vocabulary(prompt)

    def answer(self, messages: list[Any], caches: dict[object, KVCache] | None = None) -> list[int]:
        return [token for burst in self.engine.stream(messages, GREEDY, caches) for token in burst.tokens]


@contextmanager
def model_of(family: str, folder: Path, tier: Literal["disk", "none"] = "disk") -> Iterator[Model]:
    """A model of the family; its pixels come from a recording where only torchvision could prepare them."""
    with pytest.MonkeyPatch.context() as patched:
        if replayed(family):
            recorded = RecordedProcessor(family)
            patched.setattr(AutoImageProcessor, "from_pretrained", lambda *_, **__: recorded)
            patched.setattr(context, "missing_for", lambda _: "")
        truth = seeing(family, folder)
        with specexec.load(str(folder), drafter="ngram", offload=tier, budget=8) as engine:
            yield Model(folder, truth, engine)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with model_of(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.mark.parametrize("family", SAMPLE)
def test_other_families_answer_as_the_whole_model_does(family: str, tmp_path: Path) -> None:
    with model_of(family, tmp_path) as model:
        test_answers_about_images_are_those_of_the_whole_model(model)
        test_prompts_are_spelled_as_the_processor_of_the_family_spells_them(model)
        test_a_tower_in_16_bits_sees_what_it_sees_in_32(model)


def test_answers_about_images_are_those_of_the_whole_model(model: Model) -> None:
    asked = [[shown("What is ", ONE, " and ", OTHER, "?")], [shown(OTHER, ONE, "Compare.")]]
    prompts = [model.engine.encode(messages) for messages in asked]
    found = {}
    for result in model.engine.generate_many(asked, [GREEDY] * 2):
        assert not isinstance(result, Failure)
        found[result.index] = list(result.tokens)
    assert found[0] == model.expected(prompts[0], ONE, OTHER)
    assert found[1] == model.expected(prompts[1], OTHER, ONE)


def test_another_image_of_the_same_size_shares_nothing_and_the_same_one_all(model: Model) -> None:
    caches: dict[object, KVCache] = {}
    first, second = [shown(ONE, "What is it?")], [shown(OTHER, "What is it?")]
    prompts = model.engine.encode(first), model.engine.encode(second)
    assert model.words(prompts[0]) == model.words(prompts[1])
    assert model.answer(first, caches) == model.expected(prompts[0], ONE)
    assert model.answer(second, caches) == model.expected(prompts[1], OTHER)
    kept = next(iter(caches.values())).tokens
    assert kept[: len(prompts[1])] == prompts[1]
    assert model.answer(second, caches) == model.expected(prompts[1], OTHER)


def test_a_conversation_goes_on_after_an_image(model: Model) -> None:
    talk = model.engine.conversation()
    list(talk.send(shown(ONE, "What is it?")["content"], GREEDY))  # type: ignore[arg-type]  # parts
    before = model.engine._target.images  # type: ignore[union-attr]  # of a model that sees
    assert before is not None
    tower, before.tower = before.tower, None  # what was seen is not looked at again
    before._seen.clear()
    try:
        again = [token for burst in talk.send("Why?", GREEDY) for token in burst.tokens]
    finally:
        before.tower = tower
    assert again == model.expected(talk._turns[-1].prompt, ONE)


def test_rows_of_an_image_stay_together_where_a_prompt_goes_in_pieces(model: Model) -> None:
    """Long texts before an image, so that its rows lie across the pieces in which layers take a prompt."""
    lm = model.engine._target
    assert isinstance(lm, TreeLM)
    prompt = model.engine.encode([shown("x" * 246, ONE, "y" * 30, OTHER, "?")])
    (hidden_RH,) = lm.forward([Rows.text(KVCache(), prompt)])
    inputs = whole_inputs(model.truth, model.folder, model.words(prompt), [ONE, OTHER])
    theirs = logits(model.truth, inputs).float()
    torch.testing.assert_close(lm.head(hidden_RH), theirs, atol=2e-3, rtol=2e-3)


def test_prompts_are_spelled_as_the_processor_of_the_family_spells_them(model: Model) -> None:
    engine, family = model.engine, str(model.truth.config.model_type)
    ours = engine.encode([shown("a", ONE, "b", OTHER)])
    said = engine.encoding.render([{"role": "user", "content": "a%b%"}]).replace("%", KNOWN[family].place)
    pictures = [Image.open(io.BytesIO(file)) for file in (ONE, OTHER)]
    theirs = whole_processor(family, model.folder)(images=pictures, text=said, return_tensors="pt")
    assert model.words(ours) == theirs["input_ids"][0].tolist()


def test_a_tower_in_16_bits_sees_what_it_sees_in_32(model: Model) -> None:
    prompts = model.engine.encoding.images
    assert prompts is not None
    pixels = prompts.image(ONE, "").prepare()
    exact, short = (
        open_tower(model.folder, "cpu", dtype)(pixels).rows_RH.float() for dtype in (torch.float32, torch.bfloat16)
    )
    assert (short - exact).norm() < 0.15 * exact.norm()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("gemma")
    truth = seeing("gemma3", folder)
    with specexec.load(str(folder), drafter="none", offload="disk") as engine:
        yield Model(folder, truth, engine)


def test_a_tower_looks_once_at_an_image(gemma: Model) -> None:
    images = gemma.engine._target.images  # type: ignore[union-attr]  # of a model that sees
    assert images is not None
    looked, tower = [], images.tower
    assert tower is not None
    images._seen.clear()
    images.tower = lambda inputs: looked.append(1) or tower(inputs)  # type: ignore[func-returns-value]
    try:
        list(gemma.engine.generate_many([[shown(ONE, text)] for text in ("a", "b", "c")], GREEDY))
    finally:
        images.tower = tower
    assert len(looked) == 1


def _url(url: object) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def _bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (_url("https://example.com/cat.png"), "no data: URL, and images are not fetched"),
        (_url("file:///etc/passwd"), "no data: URL"),
        (_url("data:image/png,abc"), "must be in base64"),
        (_url("data:image/png;base64,!!!"), "damaged"),
        (_url("data:image/png;base64," + "A" * (MOST_B * 2)), "bytes; "),
        (_url(7), "needs an image_url with a url"),
        (shown(b"this is no image"), "no image that can be read"),
        (shown(ONE[: len(ONE) // 2]), "damaged"),
        (shown(_bomb()), "more than 50,000,000 pixels"),
        (shown(*[ONE] * (MOST_IMAGES + 1)), f"a prompt may have {MOST_IMAGES} images"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "reads text and images, not 'input_audio'"),
        ({"role": "user", "content": [{"type": "video_url"}]}, "reads text and images, not 'video_url'"),
    ],
)  # fmt: skip
def test_hostile_and_other_content_is_refused_in_words(gemma: Model, message: dict[str, object], says: str) -> None:
    with pytest.raises(BadMessages) as refused:
        gemma.engine.encode([message])
    assert says in refused.value.what
    assert refused.value.what.startswith("messages.0.content")


def test_a_place_that_is_spelled_out_is_no_image(gemma: Model) -> None:
    prompt = gemma.engine.encode([shown("<|boi|><|image|>", ONE)])
    assert sum(map(is_row, prompt)) == 16
    gemma.engine.encoding.control_tokens = True
    try:
        with pytest.raises(BadMessages, match="writes 2 images of the 1"):
            gemma.engine.encode([shown("<|boi|>", ONE)])
    finally:
        gemma.engine.encoding.control_tokens = False


def test_rows_of_images_are_no_prompt_of_ids(gemma: Model) -> None:
    (row, *_) = [token for token in gemma.engine.encode([shown(ONE)]) if is_row(token)]
    with pytest.raises(BadMessages, match="not here any more"):
        gemma.engine.generate([1, row + (1 << 30)], GREEDY)
    with specexec.load("demo", drafter="none") as demo, pytest.raises(UnknownToken):
        demo.generate([1, row], GREEDY)


def test_every_protocol_of_the_server_reads_an_image(gemma: Model) -> None:
    coded = base64.b64encode(ONE).decode()
    url = f"data:image/png;base64,{coded}"
    source = {"type": "base64", "media_type": "image/png", "data": coded}
    told: dict[str, object] = {"type": "text", "text": "What?"}
    bodies: dict[Callable[[object, list[str]], Exchange], dict[str, object]] = {
        openai.chat: {"messages": [shown(ONE, "What?")]},
        anthropic.messages: {
            "messages": [{"role": "user", "content": [{"type": "image", "source": source}, told]}], "max_tokens": 9,
        },
        ResponsesReader(ResponseStore()).response: {
            "input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What?"},
            ]}]
        },
        ollama.chat: {"messages": [{"role": "user", "content": "What?", "images": [coded]}]},
        ollama.generate: {"prompt": "What?", "images": [coded]},
    }  # fmt: skip
    expected = gemma.engine.encode([shown(ONE, "What?")])
    for read, body in bodies.items():
        (prompt,) = read({"model": "m", **body}, ["m"]).asked.prompts
        assert gemma.engine.encode(prompt) == expected


def test_ids_for_others_are_those_that_the_tokenizer_gives(gemma: Model) -> None:
    """JavaScript reads no whole number beyond 2**53, and rows of images have ids beyond 2**62."""
    encoding, messages = gemma.engine.encoding, [shown(ONE, "What?")]
    whole = gemma.engine.tokenizer(encoding.render(messages), add_special_tokens=False)["input_ids"]
    assert max(encoding.encode(messages)) > 2**53
    assert encoding.in_vocabulary(encoding.encode(messages)) == whole
    assert encoding.in_vocabulary([1, 2]) == [1, 2]


def test_a_text_that_waits_keeps_its_images(gemma: Model) -> None:
    body = {"model": "m", "messages": [shown(picture(3), "What?")], "max_tokens": 2}
    prepared = prepare(gemma.engine, openai.chat(body, ["m"]).asked)
    tokens, prompts = prepared.texts[0].tokens, gemma.engine.encoding.images
    assert prompts is not None
    prompts._recent.clear()  # as 64 images of other requests would
    gc.collect()
    assert gemma.engine.generate(tokens, GREEDY).tokens
    del prepared
    gc.collect()
    with pytest.raises(BadMessages, match="not here any more"):
        gemma.engine.generate(tokens, GREEDY)


def test_a_pack_sees_as_the_original_does(gemma: Model, tmp_path: Path) -> None:
    pack(plan(open_folder(gemma.folder), "none"), tmp_path / "pack")
    with specexec.load(str(tmp_path / "pack"), drafter="none", offload="disk") as packed:
        found = packed.generate([shown(ONE, "What?")], GREEDY)
    assert list(found.tokens) == gemma.expected(gemma.engine.encode([shown(ONE, "What?")]), ONE)


def test_a_conversation_about_an_image_is_kept_and_goes_on(gemma: Model, tmp_path: Path) -> None:
    talk, archive = gemma.engine.conversation(), Archive(tmp_path)
    list(talk.send(shown(ONE, "What?")["content"], GREEDY))  # type: ignore[arg-type]  # parts
    kept = talk.keep()
    saved = archive.save(replace(archive.new("m"), messages=tuple(kept.messages), turns=tuple(kept.turns)))
    found = archive.load(saved.id)
    assert found.messages == saved.messages
    assert (found.title, found.turns[0].tokens) == ("What?", kept.turns[0].tokens)
    again = gemma.engine.conversation()
    again.take_up(Kept([*found.messages], None, [*found.turns]))
    answer = [token for burst in again.send("Why?", GREEDY) for token in burst.tokens]
    assert again._turns[-1].prompt[: len(found.turns[0].tokens)] == found.turns[0].tokens
    assert answer == gemma.expected(again._turns[-1].prompt, ONE)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text().replace('"url"', '"nothing"'))
    with pytest.raises(BadSession):
        archive.load(saved.id)


def test_a_model_that_reads_text_alone_says_so() -> None:
    not_this = pytest.raises(UnreadContent, match="this model reads text, not 'image_url'")
    with specexec.load("demo", drafter="none") as demo, not_this:
        demo.encode([shown(ONE)])


def test_a_line_of_a_batch_may_name_a_file(tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    file.write_bytes(ONE)
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(file)}}]}
    assert Form().prompt([message], "line 1") == [shown(ONE)]  # type: ignore[list-item]  # JSON
    assert data_url(file) == f"data:image/png;base64,{base64.b64encode(ONE).decode()}"


def test_a_file_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    for path, says in (
        (empty, "no image that can be read"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none.png", "No such file"),
        ("half\0name.png", "null"),
        ("/dev/zero", "bytes; "),
        ("~nobody-of-this-name/one.png", "No such file"),
    ):
        message = {"role": "user", "content": [{"type": "image_url", "image_url": str(path)}]}
        with pytest.raises(BadJsonl, match=r"^line 1: ") as refused:
            Form().prompt([message], "line 1")  # type: ignore[list-item]  # JSON
        assert says in refused.value.what


def test_words_are_not_taken_for_an_image(tmp_path: Path) -> None:
    for name, begins, image in (
        ("words.txt", b"BMW builds cars.", False),
        ("sound.wav", b"RIFF\x24\0\0\0WAVEfmt ", False),
        ("one.png", ONE, True),
    ):
        (tmp_path / name).write_bytes(begins)
        assert is_image_file(tmp_path / name) is image
    for kind in ("BMP", "WEBP", "GIF", "JPEG"):
        Image.new("RGB", (4, 4)).save(tmp_path / kind, kind)
        assert is_image_file(tmp_path / kind)


def test_images_that_only_torchvision_prepares_are_refused_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing("llama4", tmp_path)
    monkeypatch.setattr(image_processor, "is_torchvision_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(UnreadContent) as refused:
        encoding_in(tmp_path).encode([shown(ONE)])
    assert refused.value.why == (
        "Images for it are prepared by torchvision, which is not here: "
        "pip install torchvision --index-url https://download.pytorch.org/whl/cpu"
    )


def test_a_torchvision_made_for_another_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(image_processor, "is_torchvision_available", lambda: True)
    why = image_processor.missing_for("llama4")
    assert f"fails beside torch {torch.__version__} (operator torchvision::nms does not exist): pip install" in why


def test_a_folder_whose_settings_do_not_fit_its_tower_is_refused(tmp_path: Path) -> None:
    seeing("llava", tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace('"patch_size": 14', '"patch_size": 7'))
    with specexec.load(str(tmp_path), drafter="none") as engine, pytest.raises(UnsupportedArchitecture) as refused:
        engine.generate([shown(ONE)], GREEDY)
    assert "the tower makes 4 rows of an image that has 16 tokens in a prompt" in refused.value.what


def test_pictures_are_made_smaller_where_a_family_has_no_setting_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing("llava_next", tmp_path)
    prompts = encoding_in(tmp_path).images
    assert prompts is not None
    whole = prompts.image(picture(3, 400, 390), "").rows
    monkeypatch.setattr(prompts, "_most", whole // 2)
    assert 0 < prompts.image(picture(4, 400, 390), "").rows <= whole // 2
    monkeypatch.setattr(prompts, "_most", 1)
    with pytest.raises(BadMessages, match="1 are allowed"):
        prompts.image(picture(5, 400, 390), "")


def test_the_table_of_families_is_what_is_read_and_refused() -> None:
    table = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    table = table.partition("<!-- made by scripts/images.py -->")[2].partition("<!-- end -->")[0]
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| (\w+) \|", table, re.MULTILINE))
    assert rows == dict.fromkeys(SEEING, "read") | dict.fromkeys(image_prompts.UNREAD, "refused")


@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v_moe"])
def test_large_images_are_made_smaller_and_all_that_is_counted(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {*SEEING} == {*KNOWN}
    seeing(family, tmp_path)
    monkeypatch.setattr(image_prompts, "IMAGE_ROWS", 4)
    prompts = encoding_in(tmp_path).images
    assert prompts is not None
    assert prompts.image(picture(3, 400, 400), "").rows == 4
    folder = open_folder(tmp_path)
    choice = parse("none", lambda _: False)
    request = LoadRequest.of(folder, (), LoadOptions("none"), 512, Free(1 << 34))
    blocks = [entry.nbytes for name, entry in folder.beside.items() if ".blocks.0." in name]
    assert memory_plan(request, choice).beside_B["images and their tower"] > sum(blocks)
