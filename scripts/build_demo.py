"""Build the demo pair: corpus, tokenizer, target, drafters, figures and manifest, in that order.

The same interpreter, torch build and instruction set give the same bytes; elsewhere losses agree to about 0.02 nats.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random

import click
import demo_corpus as corpus
from demo_card import card
from demo_corpus import Entry
from demo_dialogues import Turn, conversations
from demo_words import held_out

from cli.engine.imports import lean_imports

with lean_imports():
    import torch
    from demo_eval import answers, copying_candidates, golden_candidates, mean_loss, small_sums, word_for_word
    from demo_training import DRAFTERS, SHORT, TARGET, Rows, Trained, encode_docs, fit, new_model, train_tokenizer
    from torch import nn
    from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

SHIPPED = Path(__file__).parent.parent / "offload" / "demo"
SEED = 0
THREADS = 2  # sums are split by thread: another number gives other last bits


@dataclass(frozen=True)
class Recipe:
    """How long everything lasts; nothing depends on the clock."""

    target_steps: int = 1000
    drafter_steps: int = 600
    other_drafter_steps: int = 400  # weak and strong, which only measurements use
    step_tokens: int = 6144
    written: int = 1000  # answers by the target for its drafters
    copies: int = 200
    answer_tokens: int = 120
    val_batches: int = 4


SMOKE = Recipe(1, 1, 1, step_tokens=512, written=4, copies=4, answer_tokens=2, val_batches=1)


@dataclass(frozen=True)
class Corpus:
    """Texts to learn from and texts kept apart; `sha256` covers both and the first 20 000 dialogues."""

    docs: list[str]
    docs_kept: list[str]
    entries: list[Entry]
    sample: list[str]
    sha256: str


@dataclass(frozen=True)
class Workshop:
    """What all stages of one build share."""

    out: Path
    recipe: Recipe
    device: str
    text: Corpus
    tokenizer: PreTrainedTokenizerFast
    docs: list[int]


@dataclass(frozen=True)
class Made:
    """A model as users load it, in float32, and how its training went."""

    model: LlamaForCausalLM
    trained: Trained


def read_corpus() -> Corpus:
    """Every 40th document, and every eighth name in the dialogues, is never trained on."""
    documents = corpus.documentation()
    learnt = [document for index, document in enumerate(documents) if index % 40 != 20]
    kept = [document.text for index, document in enumerate(documents) if index % 40 == 20]
    entries = [entry for document in learnt for entry in document.entries if not held_out(entry.name)]
    talks = islice(conversations(SEED, entries), 20_000)
    sample = [f"{turn.question}\n{turn.answer}" for talk in talks for turn in talk]
    texts = [document.text for document in learnt]
    return Corpus(texts, kept, entries, sample, corpus.fingerprint(iter([*texts, *sample])))


def open_workshop(out: Path, recipe: Recipe, device: str) -> Workshop:
    """Read the corpus and make the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    text = read_corpus()
    click.echo(f"corpus {text.sha256[:12]}: {len(text.docs)} documents, {len(text.entries)} documented names", err=True)
    tokenizer = train_tokenizer(text.docs + text.sample)
    return Workshop(out, recipe, device, text, tokenizer, encode_docs(tokenizer, text.docs))


def mixed(entries: list[Entry], written: list[Turn]) -> Iterator[list[Turn]]:
    """Dialogues by rule and answers by the target, in turn."""
    rng = Random(SEED + 3)
    for talk in conversations(SEED + 2, entries):
        yield talk
        yield [rng.choice(written)]


def on(device: str, model: LlamaForCausalLM) -> LlamaForCausalLM:
    nn.Module.to(model, device)  # in place; transformers' own `to` has a signature that mypy cannot call
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write an ordinary transformers folder in bf16 and give back what a user would load from it, in float32."""
    nn.Module.to(model, torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    # Calls with padding leave their setting in the tokenizer; both folders must hold the same file.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.eval()
    return loaded


def make_target(shop: Workshop) -> Made:
    """Train the target on the corpus."""
    torch.manual_seed(SEED)
    model = on(shop.device, new_model(TARGET, shop.tokenizer))
    rows = Rows(shop.tokenizer, shop.docs, conversations(SEED + 1, shop.text.entries), SEED + 1)
    batches = rows.batches(shop.recipe.step_tokens)
    trained = fit(model, batches, shop.recipe.target_steps, shop.device, shop.out / "target.pt")
    return Made(on(shop.device, save(model, shop.tokenizer, shop.out / "target")), trained)


def make_drafter(shop: Workshop, name: str, target: LlamaForCausalLM, written: list[Turn]) -> Made:
    """Distil a drafter from the target, on the corpus and on the target's own answers."""
    torch.manual_seed(SEED)
    model = on(shop.device, new_model(DRAFTERS[name], shop.tokenizer))
    rows = Rows(shop.tokenizer, shop.docs, mixed(shop.text.entries, written), SEED + 2)
    batches, checkpoint = rows.batches(shop.recipe.step_tokens), shop.out / f"{name}.pt"
    steps = shop.recipe.drafter_steps if name == "drafter" else shop.recipe.other_drafter_steps
    trained = fit(model, batches, steps, shop.device, checkpoint, teacher=target)
    return Made(on(shop.device, save(model, shop.tokenizer, shop.out / name)), trained)


def write_answers(shop: Workshop, target: LlamaForCausalLM) -> list[Turn]:
    """What the target itself says, half of it greedy and half sampled at temperature 1."""
    path = shop.out / "written.json"
    if path.exists():
        return [Turn(**turn) for turn in json.loads(path.read_text(encoding="utf-8"))]
    questions = [t[0].question for t in islice(conversations(SEED + 4, shop.text.entries), shop.recipe.written)]
    half, limit = len(questions) // 2, shop.recipe.answer_tokens
    torch.manual_seed(SEED)
    greedy = answers(target, shop.tokenizer, questions[:half], limit=limit)
    sampled = answers(target, shop.tokenizer, questions[half:], sample=True, limit=limit)
    turns = [Turn(question, answer) for question, answer in zip(questions, greedy + sampled, strict=True) if answer]
    path.write_text(json.dumps([asdict(turn) for turn in turns], indent=1) + "\n", encoding="utf-8")
    return turns


def build(shop: Workshop, drafters: list[str]) -> dict[str, object]:
    """Run all stages, continuing where an interrupted run stopped; returns the manifest."""
    made = {"target": make_target(shop)}
    target = made["target"].model
    written = write_answers(shop, target)
    made |= {name: make_drafter(shop, name, target, written) for name in drafters}
    return describe(shop, made)


def describe(shop: Workshop, made: dict[str, Made]) -> dict[str, object]:
    """Measure the models, then write golden.json, the model card and the manifest."""
    out, text, tokenizer, recipe, target = shop.out, shop.text, shop.tokenizer, shop.recipe, made["target"].model
    golden = golden_candidates()

    def right(turns: list[Turn]) -> list[bool]:
        return word_for_word(target, tokenizer, turns, recipe.answer_tokens)

    exact = right(golden)
    passed = [{"prompt": turn.question, "answer": turn.answer} for turn, ok in zip(golden, exact, strict=True) if ok]
    missed = [turn.question for turn, ok in zip(golden, exact, strict=True) if not ok]
    scores = {
        "golden_prompts": tally(exact),
        "copying_unseen_names": tally(right(copying_candidates(recipe.copies))),
        "small_sums": tally(right(small_sums(recipe.copies))),
    }
    talks = conversations(SEED + 5, text.entries)
    heldout = Rows(tokenizer, encode_docs(tokenizer, text.docs_kept), talks, SEED + 5)
    count = range(recipe.val_batches)
    only_docs, only_talk = ([heldout.batch(8, SHORT, docs_share=share) for _ in count] for share in (1.0, 0.0))
    figures: dict[str, dict[str, float]] = {
        name: {
            "parameters": sum(p.numel() for p in each.model.parameters()),
            **asdict(each.trained),
            "val_dialogues": mean_loss(each.model, only_talk, shop.device),
            "val_docs": mean_loss(each.model, only_docs, shop.device),
            "kl_dialogues": mean_loss(each.model, only_talk, shop.device, teacher=target),
        }
        for name, each in made.items()
    }
    manifest: dict[str, object] = {
        "made_with": {"python": platform.python_version()}
        | {n: version(n) for n in ("torch", "transformers", "tokenizers")},
        "machine": {"device": shop.device, "threads": THREADS, "cpu": torch.backends.cpu.get_cpu_capability()},
        "recipe": asdict(recipe),
        "corpus_sha256": text.sha256,
        "models": figures,
        "scores": scores,
        "golden_missed": missed,
        "files": hashes(out, ["target", "drafter"]),
        "not_shipped": hashes(out, [name for name in made if name in ("weak", "strong")]),
    }
    (out / "golden.json").write_text(json.dumps(passed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(figures, scores, missed, passed, recipe.written), encoding="utf-8")
    return manifest


def tally(right: list[bool]) -> dict[str, int]:
    return {"right": sum(right), "of": len(right)}


def hashes(out: Path, folders: list[str]) -> dict[str, str]:
    """sha256 of every file in these folders."""
    files = sorted(path for folder in folders for path in (out / folder).iterdir())
    return {path.relative_to(out).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def install(out: Path) -> None:
    """Put target, drafter, figures and card where the package finds them."""
    for folder in ("target", "drafter"):
        shutil.rmtree(SHIPPED / folder, ignore_errors=True)
        shutil.copytree(out / folder, SHIPPED / folder, copy_function=shutil.copyfile)  # weights are saved as 0600
    for name in ("golden.json", "MANIFEST.json", "README.md"):
        shutil.copyfile(out / name, SHIPPED / name)


def smoke(device: str) -> None:
    """Run every stage in miniature, and refuse if corpus or target come out differently a second time."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        one = build(open_workshop(Path(first), SMOKE, device), list(DRAFTERS))
        again = open_workshop(Path(second), SMOKE, device)
        make_target(again)
        before, after = (hashes(Path(folder), ["target"]) for folder in (first, second))
    if one["corpus_sha256"] != again.text.sha256 or before != after:
        raise click.ClickException(f"two runs differ: {one['corpus_sha256']} {before}, {again.text.sha256} {after}")
    shipped = json.loads((SHIPPED / "MANIFEST.json").read_text(encoding="utf-8"))
    if shipped["made_with"]["python"] != platform.python_version():
        click.echo(
            f"corpus of Python {platform.python_version()} not compared: shipped is {shipped['made_with']['python']}"
        )
    elif shipped["corpus_sha256"] != one["corpus_sha256"]:
        raise click.ClickException(f"corpus {one['corpus_sha256']} is not the shipped {shipped['corpus_sha256']}")
    click.echo(f"smoke: corpus {str(one['corpus_sha256'])[:12]}, two runs agree")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True, help="Working folder."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--all-drafters", is_flag=True, help="Also distil a weak and a strong drafter, for measurements.")
@click.option("--install", "installs", is_flag=True, help="Copy target and drafter into offload/demo when done.")
@click.option(
    "--smoke", "smokes", is_flag=True, help="Every stage in miniature, in a temporary folder, under a minute."
)
def main(out: Path, device: str, all_drafters: bool, installs: bool, smokes: bool) -> None:
    """Build the demo target and its drafter (about an hour on two idle CPU cores).

    An interrupted run continues from its checkpoints in --out. The weak and the strong drafter are never shipped; they
    stay in --out.
    """
    if device == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1 if smokes else THREADS)  # a smoke test is compared with itself only; several run at once
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if smokes:
        smoke(device)
        return
    manifest = build(open_workshop(out, Recipe(), device), list(DRAFTERS) if all_drafters else ["drafter"])
    click.echo(json.dumps({key: manifest[key] for key in ("models", "scores", "golden_missed")}, indent=1))
    if installs:
        install(out)


if __name__ == "__main__":
    main()
