"""Names become folders: the demo, paths, aliases, the Hub's cache; everything else is an error with a way out."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import errors as hub

import offload
from offload.errors import GatedRepo, ModelNotFound, OfflineMissing, OffloadError
from offload.hub import names

PAIRED = (names.PAIRED,)
BIG, SMALL = "unsloth/Llama-3.3-70B-Instruct-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"


def snapshot(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files or ("config.json", "model.safetensors"):
        (path / file).touch()
    return path


class Hub:
    """A stand-in for the Hub library: a cache, and what happens on download."""

    def __init__(self, cached: dict[str, Path], download: Callable[[str], Path]) -> None:
        self.cached = cached
        self.download = download
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, repo: str, revision: str | None = None, local_files_only: bool = False, **_: object
    ) -> str:
        self.asked.append((repo, revision))
        if not local_files_only:
            return str(self.download(repo))
        if repo not in self.cached:
            raise hub.LocalEntryNotFoundError("not here")
        return str(self.cached[repo])


@pytest.fixture
def hub_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def install(cached: dict[str, Path] | None = None, error: Exception | None = None) -> Hub:
        def download(repo: str) -> Path:
            raise error or AssertionError("no download was expected")

        stand_in = Hub(cached or {}, download)
        monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in.snapshot_download)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda _, repo, **__: download(repo))
        return stand_in

    return install


def test_demo_is_the_built_in_pair() -> None:
    pair = offload.resolve("demo", PAIRED, offline=True)
    assert pair.toy
    assert (pair.target, pair.drafters) == (names.demo_folder("target"), (names.demo_folder("drafter"),))
    assert offload.resolve("demo").drafters == ()


def test_a_folder_is_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = snapshot(tmp_path / "small")
    pair = offload.resolve(str(tmp_path), (str(small),))
    assert (pair.target, pair.drafters, pair.toy) == (tmp_path, (small,), False)
    assert offload.resolve(str(tmp_path), PAIRED).drafters == ()
    monkeypatch.chdir(tmp_path)
    assert offload.resolve("small").target == Path("small")


def test_folders_are_called_what_people_know_them_by(tmp_path: Path) -> None:
    assert offload.called(tmp_path / "small") == "small"
    assert offload.called(names.demo_folder("drafter")) == "demo drafter"
    assert offload.called(tmp_path / "models--org--small-1b" / "snapshots" / "0f3a9c") == "org/small-1b"


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelNotFound, match=r"there is no folder \./nowhere"):
        offload.resolve("./nowhere")


def test_misspelt_names_get_suggestions() -> None:
    with pytest.raises(ModelNotFound) as caught:
        offload.resolve("lama-70b")
    assert caught.value.what == "no model named 'lama-70b'."
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("llama-70b")


def test_a_short_name_for_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text('[alias.mine]\ntarget = "demo"\n')
    with pytest.raises(ModelNotFound, match=r"^'mine' is short for 'demo', which is neither a path nor org/name"):
        names.resolve("mine")


def test_an_alias_takes_its_drafter_only_if_it_is_here(tmp_path: Path, hub_with: Callable[..., Hub]) -> None:
    big, small = snapshot(tmp_path / "big"), snapshot(tmp_path / "small")
    hub_with({BIG: big})
    assert offload.resolve("llama-70b", PAIRED) == offload.ModelPair("llama-70b", big)
    hub_with({BIG: big, SMALL: small})
    assert offload.resolve("llama-70b", PAIRED).drafters == (small,)
    assert offload.resolve(BIG, PAIRED).drafters == (small,)
    assert offload.resolve("llama-70b").drafters == ()
    (small / "model.safetensors").unlink()
    assert offload.resolve("llama-70b", PAIRED).drafters == ()


def test_several_drafters_come_in_the_order_they_are_named(tmp_path: Path, hub_with: Callable[..., Hub]) -> None:
    big, small, other = (snapshot(tmp_path / name) for name in ("big", "small", "other"))
    hub_with({BIG: big, SMALL: small, "org/other": other})
    assert offload.resolve("llama-70b", ("org/other", "sibling", "demo")).drafters == (
        other, small, names.demo_folder("drafter"),
    )  # fmt: skip
    with pytest.raises(OfflineMissing, match="org/missing"):
        offload.resolve("llama-70b", ("sibling", "org/missing"), offline=True)


def test_a_name_is_known_if_a_folder_or_an_alias_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names.known("llama-70b")
    assert not names.known("ngrams")
    (tmp_path / "ngrams").mkdir()
    assert names.known("ngrams")


def test_a_revision_is_passed_on(tmp_path: Path, hub_with: Callable[..., Hub]) -> None:
    stand_in = hub_with({"org/name": snapshot(tmp_path / "big")})
    offload.resolve("org/name@6f6073b")
    assert stand_in.asked == [("org/name", "6f6073b")]


def test_offline_names_the_cache_and_what_is_missing(tmp_path: Path, hub_with: Callable[..., Hub]) -> None:
    hub_with({"org/none": tmp_path / "nothing"})
    with pytest.raises(OfflineMissing, match=r"org/other is not in the local cache \(.*\), and nothing is downloaded"):
        offload.resolve("org/other", offline=True)
    part = snapshot(tmp_path / "part", "config.json", "model-1.safetensors")
    shards = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}'
    (part / "model.safetensors.index.json").write_text(shards)
    hub_with({"org/part": part})
    with pytest.raises(OfflineMissing) as caught:
        offload.resolve("org/part", offline=True)
    assert caught.value.why == "Missing: model-2.safetensors (and 1 more)."


def answer(kind: type[Exception]) -> Exception:
    """An error of the Hub library without the HTTP response that its constructor wants."""
    return kind.__new__(kind, "as the Hub says")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (answer(hub.GatedRepoError), GatedRepo, "is gated and your account has no access"),
        (answer(hub.RepositoryNotFoundError), ModelNotFound, "has no repository 'org/name'"),
        (answer(hub.RevisionNotFoundError), ModelNotFound, "has no revision 'abc'"),
        (hub.LocalEntryNotFoundError("no network"), OfflineMissing, "could not be downloaded"),
        (ConnectionError("refused"), OfflineMissing, "could not be downloaded"),
        (OSError(28, "No space left on device"), OffloadError, "no space left while downloading org/name"),
    ],
)
def test_troubles_of_the_hub_have_names(
    error: Exception, kind: type[OffloadError], words: str, hub_with: Callable[..., Hub]
) -> None:
    hub_with({}, error)
    with pytest.raises(kind, match=words):
        offload.resolve("org/name@abc")


def test_every_alias_is_complete() -> None:
    for name, alias in names.aliases().items():
        assert names.HUB_NAME.fullmatch(alias.target), name
        assert alias.drafter is None or names.HUB_NAME.fullmatch(alias.drafter), name
        assert alias.drafter != alias.target


# One tokenizer each, as those who made the models say; how a repository of the family may be called.
TOKENIZERS = (
    "llama-3", "qwen2.5", "qwen3-", r"qwen3\.[56]", "gemma-2", "gemma-4", "glm-4.5", "mi(s|x)tral-.*v0.1",
    "mistral-small-3", "ministral-3", "nemotron-3", "granite-4", "gpt-oss",
)  # fmt: skip


def test_a_drafter_speaks_with_the_tokenizer_of_its_target_and_large_targets_have_few_bits() -> None:
    def family(repo: str) -> list[str]:
        return [one for one in TOKENIZERS if re.search(one, repo.lower())]

    for name, alias in names.aliases().items():
        assert len(family(alias.target)) == 1, name
        assert alias.drafter is None or family(alias.drafter) == family(alias.target), name
        if re.search(r"llama|qwen2|qwen3-\d+b|gemma-2|mixtral", alias.target.lower()):
            assert alias.drafter is None or "bnb-4bit" in alias.target, name
            assert not re.match(r"(meta-llama|google|mistralai)/", alias.target + (alias.drafter or "")), "gated"


def test_codes_are_stable_and_errors_read_as_three_lines() -> None:
    codes = {kind.code for kind in OffloadError.__subclasses__()}
    assert codes >= {
        "model_not_found", "bad_model_dir", "corrupt_shard", "unsupported_arch", "not_enough_ram", "not_enough_vram",
        "no_gpu", "gated_repo", "offline_missing", "read_failed", "disk_full",
    }  # fmt: skip
    assert str(ModelNotFound("what.", "why.", "this.")) == "what.\n  why.\n  Try: this."
    assert str(ModelNotFound("what.")) == "what."


def test_names_needs_and_placements_cost_no_torch() -> None:
    code = """
import sys, offload, offload.machine.memory, offload.hub.names, offload.placement.requirements
import offload.placement.placement, offload.checkpoint.headers
offload.resolve("demo", offline=True), offload.Placement, offload.ReadFailed
sys.exit(", ".join({"torch", "transformers", "huggingface_hub"} & set(sys.modules)) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attributes_of_the_package_are_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(offload, "nonsense")  # noqa: B009  # the name must not be known to mypy
