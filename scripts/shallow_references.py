"""Recorded outputs of heads without layers, by the code that defines them, for tests.

`python scripts/shallow_references.py FOLDER [NAME …]`: FOLDER holds checkouts of github.com/FasterDecoding/Medusa,
zankner/Hydra, foundation-model-stack/fms-extras and apple/ml-recurrent-drafter, under these last names; ibm-fms is
installed (pip install --no-deps). Files are loaded one by one: what they import beside is of transformers 4.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.tiny import redraw

OUT = Path(__file__).parents[1] / "tests" / "data" / "heads"
V, H, ROWS = 96, 32, 12


def medusa(code: Path, folder: Path) -> None:
    """Three networks of two blocks. Its authors repeat one block, so both have the same weights."""
    source = (code / "Medusa" / "medusa" / "model" / "medusa_model_legacy.py").read_text(encoding="utf-8")
    block = next(one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == "ResBlock")
    scope: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(compile(ast.Module([block], []), "medusa", "exec"), scope)  # the class alone
    heads = nn.ModuleList(
        nn.Sequential(*[scope["ResBlock"](H)] * 2, nn.Linear(H, V, bias=False)) for _ in range(3)
    )  # fmt: skip
    states, text = _drawn(heads)
    with torch.no_grad():
        logits = torch.stack([head(states) for head in heads])
    settings = {"medusa_num_heads": 2, "medusa_num_layers": 2, "base_model_name_or_path": "org/model"}
    _saved(folder, heads.state_dict(), settings, {"text": text, "states": states, "logits": logits})


def hydra(code: Path, folder: Path, prefix: bool = False) -> None:
    """Three networks of two blocks, in Hydra++ behind a layer."""
    stub = ModuleType("hydra.model.modeling_llama_kv")
    vars(stub)["LlamaModel"] = LlamaModel
    sys.modules[stub.__name__] = stub
    heads = _module(code / "Hydra" / "hydra" / "model" / "hydra_heads" / f"{'prefix_' if prefix else ''}mlp_head.py")
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    table = torch.randn(V, H, generator=torch.Generator().manual_seed(3))
    made = heads.HydraPrefixMLP if prefix else heads.HydraMLP
    head = made(2, 3, True, lambda ids: table[ids], config).eval()
    states, text = _drawn(head)
    with torch.no_grad():
        logits, _ = head(base_hidden_states=states[None], input_ids=text[None])
    settings = {"hydra_num_heads": 3, "hydra_num_layers": 2, "grounded_heads": True,
                "hydra_head_arch": "prefix-mlp" if prefix else "mlp"}  # fmt: skip
    record = {"text": text, "states": states, "table": table, "logits": torch.cat(logits)}
    _saved(folder, head.state_dict(), settings, record)


def mlp_speculator(code: Path, folder: Path, tied: bool = False) -> None:
    """Three stages; `tied`: their weights are shared and the input is scaled, as for the largest targets."""
    serialization = __import__("fms.utils.serialization", fromlist=["register_adapter"])
    vars(serialization)["register_adapter"] = lambda *_: None  # newer releases want more than the file gives
    file = code / "fms-extras" / "fms_extras" / "models" / "speculator.py"
    speculator = _module(file).MLPSpeculator(H, 40, V, 3, tie_weights=tied, scale_input=tied)
    speculator.reset_parameters()
    states, text = _drawn(speculator)
    with torch.no_grad():
        logits = speculator(states[None, :-3], text[None, 1:])[:, 0]
    tensors = {f"speculator.{name}": one for name, one in speculator.state_dict().items()}
    settings = {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator", "emb_dim": H,
                "inner_dim": 40, "n_predict": 3, "vocab_size": V, "tie_weights": tied, "scale_input": tied}  # fmt: skip
    _saved(folder, tensors, settings, {"text": text, "states": states, "logits": logits})


def redrafter(code: Path, folder: Path, exits: int = 48) -> None:
    """Beams of four guesses behind one state, and the probabilities of the 50 best tokens at each."""
    package = ModuleType("recurrent_drafting")
    package.__path__ = [str(code / "ml-recurrent-drafter" / "recurrent_drafting")]
    sys.modules[package.__name__] = package
    drafting, config = (
        __import__(f"recurrent_drafting.{name}", fromlist=["x"])
        for name in ("modeling_drafter", "configuration_drafter")
    )
    settings = {"vocab_size": V, "hidden_size": H, "exit_dim": exits, "num_draft_layers": 2, "rnn": exits != 2 * H}
    drafter = drafting.Drafter(config.DrafterConfig(**settings)).eval()
    states, text = _drawn(drafter)
    table = nn.Embedding(V, H)
    redraw(table, 3)
    with torch.no_grad():
        beams, log_probs = drafter.beam_search_candidates(states[:1], text[:1], table, drafting.BeamShape(3, 5))
    record = {"states": states[:1], "beams": beams[0], "log_probs": log_probs[0], "table": table.weight}
    _saved(folder, drafter.state_dict(), settings | {"model_type": "recurrent_drafting_drafter"}, record)


@cache
def _module(file: Path) -> Any:
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _drawn(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights of bfloat16, so that they are stored in half the space; and states of a text, and its tokens."""
    redraw(module, 5)
    with torch.no_grad():
        for one in module.parameters():
            one.copy_(one.bfloat16())
    drawn = torch.Generator().manual_seed(6)
    return torch.randn(ROWS, H, generator=drawn), torch.randint(0, V, (ROWS,), generator=drawn)


def _saved(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object], record: dict[str, Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    save_file({name: one.bfloat16().clone() for name, one in tensors.items()}, folder / "model.safetensors")
    record = {name: one.detach().clone().contiguous() for name, one in record.items()}
    save_file(record, folder / "reference.safetensors")


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "medusa": medusa,
    "hydra": hydra,
    "hydra_prefix": partial(hydra, prefix=True),
    "mlp_speculator": mlp_speculator,
    "mlp_speculator_tied": partial(mlp_speculator, tied=True),
    "redrafter": redrafter,
    "redrafter_plain": partial(redrafter, exits=2 * H),
}

if __name__ == "__main__":
    for name in sys.argv[2:] or MAKERS:
        torch.manual_seed(4)  # what is not drawn below
        MAKERS[name](Path(sys.argv[1]), OUT / name)
