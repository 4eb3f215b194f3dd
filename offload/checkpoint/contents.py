"""What a model folder holds, by its file names: its weights, or what it is instead and what to do.

The names may be those of a folder here or of a repository on the Hub. Reads no weight.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from offload.checkpoint.documents import CONFIG, TOKENIZER, Json
from offload.errors import BadModelDir

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
MODELOPT = "hf_quant_config.json"
MANIFEST = "manifest.json"  # of a pack
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HEAD = "medusa_lm_head.safetensors"  # what some heads that draft are published as, and others as one of
PICKLED_HEADS = ("medusa_lm_head.pt", "hydra_lm_head.pt")
FETCH = "specexec pull, or copy the missing files there."
GGUF_NOTE = "gguf.source"  # in the folder of documents of a GGUF file: where that file lies
READS = "specexec reads safetensors checkpoints with config.json and tokenizer.json, and GGUF files."
FOREIGN = (".gguf", ".safetensors", ".onnx", ".h5", ".msgpack", *PICKLES)
_VARIANT_INDEX = re.compile(r"model\.safetensors\.index\.(\w+)\.json")
_VARIANT = re.compile(r"model\.(\w+)\.safetensors")
NUMBERED = re.compile(r"model(?:\.(\w+))?-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The files that make a model: those that `index` names or, where there is none, `files` with all they hold."""

    index: str | None
    files: tuple[str, ...] = ()
    note: str | None = None
    """What is unusual about them, in words."""


def find_weights(names: Collection[str]) -> WeightFiles | None:
    """The weights among files of these names, whole; a variant only where it is the only one and nothing is plain."""
    if INDEX in names:
        return WeightFiles(INDEX)
    if SINGLE in names:
        return WeightFiles(None, (SINGLE,))
    if shards := _numbered(names, None):
        return WeightFiles(None, shards, f"{INDEX} is missing; every tensor of its {len(shards)} shards is taken")
    found = {match[1]: WeightFiles(name) for name in names if (match := _VARIANT_INDEX.fullmatch(name))}
    found |= {match[1]: WeightFiles(None, (name,)) for name in names if (match := _VARIANT.fullmatch(name))}
    if len(found) != 1:
        return WeightFiles(None, (HEAD,)) if HEAD in names else None
    ((variant, weights),) = found.items()
    return WeightFiles(weights.index, weights.files, f"the weights are the variant '{variant}', the only one there is")


def find_pickled(names: Collection[str]) -> WeightFiles | None:
    """A head among files of a folder here: of such a pickle the description of its tensors is read, and nothing run."""
    return next((WeightFiles(None, (name,)) for name in PICKLED_HEADS if name in names), None)


def _numbered(names: Collection[str], variant: str | None) -> tuple[str, ...]:
    """The shards of a set that is complete, by their numbers; nothing where one is missing or there are two sets."""
    found = [match for name in sorted(names) if (match := NUMBERED.fullmatch(name)) and match[1] == variant]
    of = {int(match[3]) for match in found}
    whole = len(of) == 1 and [int(match[2]) for match in found] == [*range(1, of.pop() + 1)]
    return tuple(match[0] for match in found) if whole else ()


def instead(
    where: str, names: Collection[str], documents: Mapping[str, Mapping[str, Json]], inside: str | None = None
) -> BadModelDir:
    """What to say of a folder without config.json or weights: what it is, and the way out.

    `documents` are those of its JSON files that say more, the adapter's; `inside` is a folder in it that is a model's.
    """

    def ends(*suffixes: str) -> str | None:
        return next((name for name in sorted(names) if name.endswith(suffixes)), None)

    lacks = f"neither {SINGLE} nor {INDEX} is there" if CONFIG in names else f"{CONFIG} is missing"
    no_model = f"{where} is not a model folder: {lacks}{_counted(names)}."
    if ADAPTER in names:
        base = documents.get(ADAPTER, {}).get("base_model_name_or_path") or "the model it was trained on"
        return BadModelDir(
            f"{where} holds an adapter (LoRA), not a model.",
            f"It changes {base}, whose weights are not here.",
            "that model with -m, and this adapter, in a folder here, with --lora.",
        )
    if "model_index.json" in names:
        return BadModelDir(f"{where} is a diffusers pipeline, which makes images.", READS, "a language model.")
    if shards := [match for name in names if (match := NUMBERED.fullmatch(name))]:
        there = len({match[2] for match in shards})
        why = f"{there} of {int(shards[0][3])} shards are there."
        return BadModelDir(f"{where} is incomplete: {INDEX} is missing.", why, FETCH)
    variants = sorted(match[1] for name in names if (match := _VARIANT.fullmatch(name)))
    if len(variants) > 1:
        return BadModelDir(
            f"{where} holds its weights as the variants {', '.join(variants)}, and none is the model's own.",
            None,
            f"a copy of the folder in which one of them is called {SINGLE}.",
        )
    if ends(".gguf"):
        return BadModelDir(no_model, *_GGUF)
    if "params.json" in names or ends("consolidated.safetensors", "consolidated.00.pth"):
        return BadModelDir(
            f"{where} holds its weights in Mistral's or Meta's own format (params.json, consolidated.*).",
            f"{READS} Of this format: params.json beside consolidated.safetensors, without config.json.",
            "the same model in transformers' format; most repositories have both (model*.safetensors, config.json).",
        )
    if head := find_pickled(names):
        why, file = "Of such a file in a folder here its tensors are read, and nothing of it is run.", head.files[0]
        if CONFIG not in names:
            return BadModelDir(
                f"{where} holds a head ({file}), and {CONFIG} is missing.",
                why,
                f"the {CONFIG} of its repository beside it.",
            )
        return BadModelDir(
            f"{where} holds a head as a pickle ({file}), and no pickle is downloaded.",
            why,
            f"hf download {where} --local-dir FOLDER, then -d FOLDER.",
        )
    if found := ends(*PICKLES):
        return BadModelDir(
            f"{where} holds its weights as pickle ({found}), which can run code when loaded.",
            READS,
            "a safetensors version of the model, or convert it with transformers' save_pretrained; how to convert "
            "a head that drafts is in docs/heads.md.",
        )
    for suffix, kind in ((".onnx", "an ONNX export"), (".h5", "TensorFlow weights"), (".msgpack", "Flax weights")):
        if found := ends(suffix):
            return BadModelDir(f"{where} holds {kind} ({found}).", READS, "a safetensors version of the model.")
    if found := ends(".safetensors"):
        return BadModelDir(no_model, READS, f"rename {found} to {SINGLE} if it holds the whole model.")
    if inside:
        return BadModelDir(no_model, READS, f"{inside}, which is one.")
    if TOKENIZER in names or "tokenizer.model" in names:
        return BadModelDir(no_model, f"It holds a tokenizer and no weights. {READS}", FETCH)
    if not names:
        return BadModelDir(f"{where} is not a model folder: it is empty, {lacks}.", None, FETCH)
    return BadModelDir(no_model, READS, FETCH)


_GGUF = (
    "specexec reads GGUF files of this machine; which of a repository's files is meant, it cannot know.",
    "hf download REPOSITORY FILE.gguf --local-dir ., then -m FILE.gguf; or the repository that it was made from (often "
    "the same name without -GGUF).",
)


def _counted(names: Collection[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        suffix = f".{name.rpartition('.')[2]}"
        if suffix in FOREIGN:
            counts[suffix] = counts.get(suffix, 0) + 1
    return f" (found {', '.join(f'{n} {suffix}' for suffix, n in sorted(counts.items()))} files)" if counts else ""
