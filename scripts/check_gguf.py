"""GGUF architectures against llama.cpp itself: its own converter writes a tiny model's file, its own engine runs it.

Each model is tiny and random, with a real tokenizer. The file must give transformers' logits here, and llama.cpp must
write the same greedy tokens from it. The converter comes from the sdist of llama-cpp-python (pinned), the engine from
npm, into a folder of your choice:

    npm install --prefix /tmp/node --ignore-scripts node-llama-cpp@3.22.1
    python scripts/check_gguf.py --node /tmp/node            # all of them, some minutes
    python scripts/check_gguf.py gpt-oss gemma4              # these, without the engine
    python scripts/check_gguf.py --node /tmp/node --real     # SmolLM2's own file: text and perplexity by both
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from real_material import converter, gguf, tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import offload
from offload.errors import OffloadError
from tests.tiny import greedy, redraw

TEXT = "The quick brown fox jumps over the lazy dog; 12 wizards' 3 boxes of quartz."
TOKENS = 12
BASE: dict[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
DELTA: dict[str, object] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
}
MIXTURE: dict[str, object] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
LATENT: dict[str, object] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
    "q_lora_rank": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": None,
    "topk_group": None,
}
# By a name of ours: model type, whose tokenizer, settings.
MODELS: dict[str, tuple[str, str, dict[str, object]]] = {
    "gpt-oss": (
        "gpt_oss",
        "gptoss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek2": ("deepseek_v3", "deepseek_v3", {**LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}),
    "deepseek2-v2": ("deepseek_v2", "deepseek_v3", {**LATENT, "topk_method": "greedy"}),
    "qwen35": ("qwen3_5_text", "qwen3", dict(DELTA)),
    "qwen35moe": ("qwen3_5_moe_text", "qwen3", {**DELTA, **MIXTURE}),
    "qwen3next": ("qwen3_next", "qwen3", {**DELTA, **MIXTURE}),
    "gemma4": (
        "gemma4_text",
        "gemma3",
        {
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4-moe": (
        "gemma4_text",
        "gemma3",
        {
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "tie_word_embeddings": True,
        },
    ),
}
ENGINE = """
import {getLlama} from "node-llama-cpp";
const [file, given, count] = [process.argv[2], JSON.parse(process.argv[3]), Number(process.argv[4])];
const llama = await getLlama({gpu: false, logLevel: "error", build: "never"});
const model = await llama.loadModel({modelPath: file});
const text = JSON.parse(process.argv[5]);
const own = model.tokenize(text, true);
const context = await model.createContext({contextSize: 256});
const sequence = context.getSequence();
const written = [];
for await (const token of sequence.evaluate(given, {temperature: 0, yieldEogToken: true})) {
    written.push(token);
    if (written.length === count) break;
}
console.log(JSON.stringify({tokens: own, written}));
process.exit(0);
"""
SURPRISE = """
import {getLlama} from "node-llama-cpp";
const [file, given] = [process.argv[2], JSON.parse(process.argv[3])];
const llama = await getLlama({gpu: false, logLevel: "error", build: "never"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512});
const items = given.slice(0, -1).map((token) => [token, {generateNext: {logits: true}}]);
const found = await context.getSequence().controlledEvaluate(items);
let sum = 0;
found.forEach((one, index) => {
    const logits = [...one.next.logits.values()];
    const most = logits.reduce((a, b) => Math.max(a, b));
    const total = logits.reduce((all, logit) => all + Math.exp(logit - most), 0);
    sum += most + Math.log(total) - one.next.logits.get(given[index + 1]);
});
console.log(JSON.stringify(sum / found.length));
process.exit(0);
"""


def make(name: str, folder: Path) -> PreTrainedModel:
    """A tiny random model of one of MODELS, saved with its tokenizer."""
    model_type, family, settings = MODELS[name]
    vocabulary = json.loads((tokenizer(family) / "tokenizer.json").read_text())
    size = len(vocabulary["model"]["vocab"]) + 2000
    sizes = {"vocab_size": size, "vocab_size_per_layer_input": size}
    whole: dict[str, Any] = {**BASE, **sizes, **settings}
    config = CONFIG_MAPPING[model_type](**whole)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw(model, 0)
    model.eval().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer(family) / file, folder / file)
    settings_file = folder / "config.json"
    saved = json.loads(settings_file.read_text())
    # What transformers 5 has folded into others of its own, and published files have by these names.
    published = ("global_head_dim", "num_global_key_value_heads", "full_attention_interval", "scoring_func")
    saved |= {key: settings[key] for key in published if key in settings}
    if model_type == "deepseek_v3":
        saved["scoring_func"] = "sigmoid"
    settings_file.write_text(json.dumps(saved))
    return model


def convert(folder: Path, file: Path, outtype: str) -> None:
    """The folder as llama.cpp's converter writes it."""
    home = converter()
    paths = os.pathsep.join([str(home / "gguf-py"), str(home)])
    options = ["--outfile", str(file), "--outtype", outtype]
    if MODELS[folder.name][0].startswith("qwen3"):
        options.append("--no-mtp")
    command = [sys.executable, str(home / "convert_hf_to_gguf.py"), str(folder), *options]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def by_llama_cpp(node: Path, file: Path, tokens: list[int]) -> dict[str, list[int]]:
    """How llama.cpp cuts TEXT, and what it writes behind the tokens."""
    answer: dict[str, list[int]] = json.loads(
        _in_node(node, ENGINE, str(file), json.dumps(tokens), str(TOKENS), json.dumps(TEXT))
    )
    return answer


def _in_node(node: Path, source: str, *arguments: str) -> str:
    """The last line that a script prints which finds node-llama-cpp in the folder `node`."""
    script = node / "check_gguf.mjs"
    script.write_text(source)
    done = subprocess.run(["node", str(script), *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:] + done.stdout[-500:])
    return done.stdout.strip().splitlines()[-1]


def check_real(node: Path) -> str:
    """SmolLM2's own file: greedy text, and the perplexity of a page of this repository, by llama.cpp and here."""
    from transformers import AutoTokenizer

    file = gguf()
    model = offload.load(file, "disk", dtype="f32")
    tokenizer = AutoTokenizer.from_pretrained(offload.open_folder(file).path)
    page = (Path(__file__).parent.parent / "docs" / "streaming.md").read_text(encoding="utf-8")
    read: list[int] = tokenizer(page, add_special_tokens=False)["input_ids"][:200]
    theirs = float(_in_node(node, SURPRISE, str(file), json.dumps(read)))
    with torch.no_grad():
        ours = float(
            torch.nn.functional.cross_entropy(model(torch.tensor([read])).logits[0, :-1], torch.tensor(read[1:]))
        )
    asked: list[int] = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    written = greedy(model, torch.tensor([asked]), TOKENS)[0, len(asked) :].tolist()
    same = sum(a == b for a, b in zip(by_llama_cpp(node, file, asked)["written"], written, strict=False))
    return (
        f"{file.name}: perplexity {math.exp(ours):.4f} here in float32, {math.exp(theirs):.4f} by llama.cpp, which "
        f"rounds activations; {same} of {len(written)} tokens alike"
    )


def check(name: str, outtype: str, node: Path | None, workplace: Path) -> str:
    """One line about one model."""
    from transformers import AutoTokenizer

    folder, file = workplace / name, workplace / f"{name}.gguf"
    dense = make(name, folder)
    convert(folder, file, outtype)
    model = offload.load(file, "disk", dtype="f32")
    documents = offload.open_folder(file).path
    tokens = AutoTokenizer.from_pretrained(documents)(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ours, theirs = (one(torch.tensor([tokens])).logits for one in (model, dense))
    said = [f"{name:14} {outtype:5} logits differ by at most {float((ours - theirs).abs().max()):.2g}"]
    if node:
        answer = by_llama_cpp(node, file, tokens)
        written = greedy(dense, torch.tensor([tokens]), TOKENS)[0, len(tokens) :].tolist()
        same = sum(a == b for a, b in zip(answer["written"], written, strict=False))
        cut = answer["tokens"][-len(tokens) :] == tokens
        said.append(
            f"llama.cpp writes {same} of {len(written)} tokens alike, cuts the text {'alike' if cut else 'otherwise'}"
        )
    return ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], help="which; all of them by default")
    parser.add_argument("--node", type=Path, help="a folder where npm has installed node-llama-cpp")
    parser.add_argument("--real", action="store_true", help="SmolLM2's own file instead of tiny ones; needs --node")
    parser.add_argument("--outtype", default="f32", help="f32, f16, bf16 or q8_0, as the converter has them")
    arguments = parser.parse_args()
    if arguments.real:
        print(check_real(arguments.node))
        return
    for name in arguments.names or MODELS:
        with tempfile.TemporaryDirectory() as workplace:
            try:
                print(check(name, arguments.outtype, arguments.node, Path(workplace)), flush=True)
            except (RuntimeError, OffloadError) as problem:
                print(f"{name:14} {problem}", flush=True)


if __name__ == "__main__":
    main()
