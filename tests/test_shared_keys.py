"""Gemma 4: layers with heads of their own sizes, layers that attend to the keys of others, embeddings of each layer.

References are unmodified transformers models on prefix + path, without a cache. Windows are 8 tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DiffLlamaConfig, PreTrainedModel

import offload
from offload.checkpoint.headers import open_folder
from offload.hub.local_models import describe
from offload.machine.memory import Free
from offload.packs.pack import pack, plan
from offload.placement.placement import Need, Offload
from offload.placement.requirements import cache_widths, need_of
from offload.placement.solver import place
from specexec.drafters.sibling import SiblingDrafter
from specexec.errors import UnsupportedArchitecture
from specexec.model import tree_lm
from specexec.model.architecture import layer_kinds
from specexec.model.attention import LayerRows, PackedRows
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.test_architectures import committed, path_logits, tree_logits
from tests.tiny import VOCABULARY, redraw
from tests.writing import greedy, prompt, write
from tests.zoo import tiny_of

LONG = prompt(300, most=240)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("gemma4")
    return folder, tiny_of("gemma4_text", folder)


def test_the_model_here_has_all_that_is_special_about_the_family(gemma: tuple[Path, PreTrainedModel]) -> None:
    folder, model = gemma
    lm = TreeLM(offload.load(folder, "none"))
    assert [kind.keys_of for kind in lm.kinds] == [None, None, 0, 1]
    assert [kind.window is None for kind in lm.kinds] == [False, True, False, True]
    assert cache_widths(open_folder(folder).config) == (2 * 2 * 16, 2 * 1 * 32, 0, 0)
    names = dict(model.named_parameters())
    assert "model.embed_tokens_per_layer.weight" in names
    assert not any(".layers.3.self_attn.k_proj" in name for name in names)


def test_nodes_below_a_prompt_in_pieces_have_the_logits_of_their_paths(gemma: tuple[Path, PreTrainedModel]) -> None:
    """Shared keys are those of the whole prompt, not of its last piece."""
    folder, truth = gemma
    lm = TreeLM(offload.load(folder, "disk"))
    with torch.no_grad():
        expected = truth(torch.tensor([LONG]), use_cache=False).logits[0]
    (hidden,) = lm.forward([Rows(KVCache(), LONG, range(-1, len(LONG) - 1))])
    torch.testing.assert_close(lm.head(hidden), expected, atol=2e-4, rtol=0)
    stream = offload.stream_of(lm.model)
    assert stream.stats().layers_read == stream.layers
    for prefix in (LONG[:33], LONG[:270]):
        cache = committed(lm, prefix)
        assert sorted(cache.layers) == [0, 1]
        torch.testing.assert_close(tree_logits(lm, cache), path_logits(truth, prefix), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("model_type", "offloaded"), [("gemma4_text", "ram"), ("gemma4", "disk"), ("gemma4", "none")])
def test_text_is_that_of_transformers_wherever_layers_live(model_type: str, offloaded: Offload, tmp_path: Path) -> None:
    truth = tiny_of(model_type, tmp_path / "model")
    pack(plan(open_folder(tmp_path / "model"), "none"), tmp_path / "pack")
    prompts = [LONG[:length] for length in (1, 40, 290)]
    drafter = SiblingDrafter(TreeLM(offload.load(tmp_path / "model", "none")), VOCABULARY)
    target = TreeLM(offload.load(tmp_path / "pack", offloaded))
    written = write(target, drafter, prompts, SamplingParams(temperature=0.0, max_tokens=10))
    assert [sequence.answer for sequence in written] == [greedy(truth, tokens, 10) for tokens in prompts]


def test_sums_count_every_layer_by_its_own_heads(gemma: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = gemma
    model = offload.load(folder, "disk", ctx=256)
    exact = offload.stream_of(model).placement.need
    early = need_of(open_folder(folder), 4, ctx=256)
    cache = committed(TreeLM(model), LONG[:256])
    assert exact.cache_B == early.cache_B == cache.size_B
    assert exact.cache_widths == early.cache_widths
    assert exact.lookups_B == early.lookups_B == VOCABULARY * 4 * 8 * 4
    published = {key: value for key, value in open_folder(folder).config.items() if key != "per_layer_config"}
    named = {"global_head_dim": 32, "num_global_key_value_heads": 1}
    assert cache_widths({**published, **named}) == exact.cache_widths


def test_layers_that_attend_twice_have_two_caches(tmp_path: Path) -> None:
    tiny_of("longcat_flash", tmp_path)
    model = offload.load(tmp_path, "disk", ctx=256)
    exact, early = offload.stream_of(model).placement.need, need_of(open_folder(tmp_path), 4, ctx=256)
    cache = committed(TreeLM(model), LONG[:256])
    assert exact.cache_B == early.cache_B == cache.size_B
    assert exact.cache_stays == early.cache_stays == frozenset(range(2 * len(exact.layers_B)))
    assert describe(tmp_path).layers == len(exact.layers_B) == len(early.layers_B)


def test_beside_a_gpu_shared_keys_stay_and_embeddings_of_layers_are_looked_up_in_ram() -> None:
    need = Need(
        (10,) * 8, (10,) * 8, embeddings_B=5, norms_B=1, head_B=0, cache_B=480, ctx=8, cache_moves=True,
        cache_widths=(4, 4, 4, 4, 4, 4, 8, 16), cache_stays=frozenset((6, 7)), lookups_B=30,
    )  # fmt: skip
    assert need.caches_B == (40, 40, 40, 40, 40, 40, 80, 160)
    travelling = set()
    for vram_B in range(350, 600, 10):
        placement = place(need, Free(ram_B=10_000, vram_B=vram_B), "auto")
        assert placement.device_B is not None
        assert placement.device_B <= vram_B
        assert placement.caches[6:] == ("device", "device")
        assert placement.host_parts_B["embeddings of layers"] == need.lookups_B
        travelling.add(placement.caches.count("ram"))
    assert travelling > {0, 6}, "where memory is short the others travel"


def test_keys_that_are_not_of_the_same_rows_are_refused(gemma: tuple[Path, PreTrainedModel]) -> None:
    lm = TreeLM(offload.load(gemma[0], "none"))

    class Fewer:
        """What a layer would ask for that keeps keys elsewhere."""

        def __init__(self, sweep: PackedRows) -> None:
            self._sweep = sweep

        def attend(self, rows: LayerRows) -> torch.Tensor:
            return self._sweep.attend(replace(rows, key_HKD=rows.key_HKD[:, 1:], value_HKD=rows.value_HKD[:, 1:]))

    trunk = lm._trunk
    lm._trunk = lambda **told: trunk(**{**told, "sweep": Fewer(told["sweep"])})  # type: ignore[assignment]
    with pytest.raises(UnsupportedArchitecture, match=r"attends to (4 keys with 5|15 keys with 16) queries"):
        committed(lm, LONG[:5])


def test_a_layer_that_attends_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiffLlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    redraw(model, 0)
    with pytest.raises(UnsupportedArchitecture, match="'diffllama' cannot verify trees"):
        TreeLM(model.eval())
    monkeypatch.setattr(tree_lm, "check_tree_support", lambda _, config: layer_kinds(config))
    with pytest.raises(UnsupportedArchitecture, match="layer 0 attends more than once"):
        committed(TreeLM(model.eval()), LONG[:5])
