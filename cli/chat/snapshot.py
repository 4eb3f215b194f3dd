"""Keys and values of a conversation on disk, so that continuing it reads nothing twice. One safetensors file.

The header names the weights they were computed with; a file of other weights, or a damaged one, is refused whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cli.shared.errors import BadSnapshot
from offload.machine.atomic_write import PRIVATE, replacing
from offload.machine.file_identity import samples, stamps

if TYPE_CHECKING:
    from torch import Tensor

    from specexec.model.recurrent.memory import Recurrence
    from specexec.text.transcript import Kept

FORMAT = "2"
SPARE_BYTES = 1 << 30


def fingerprint(folder: Path) -> str:
    """A name for the exact weights in a folder: config, and of every shard its samples, inode, size and times."""
    seen = hashlib.sha256((folder / "config.json").read_bytes())
    shards = sorted(folder.glob("*.safetensors"))
    seen.update(json.dumps(stamps(shards)).encode())
    for shard in shards:
        seen.update(samples(shard))
    return seen.hexdigest()


def write_snapshot(path: Path, kept: Kept, weights: dict[str, str]) -> int:
    """Keep the caches of a dialogue; the bytes that took, or 0 where the disk has no room to spare for them."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for role, cache in kept.caches.items():
        for layer, kv in cache.layers.items():
            tensors[f"{role}.{layer}.keys"] = kv.keys_HRD[:, : cache.rows].contiguous().cpu()
            tensors[f"{role}.{layer}.values"] = kv.values_HRD[:, : cache.rows].contiguous().cpu()
        ends = {(*key, len(cache)): memory.text for key, memory in cache.memories.items()}
        earlier = {(*key, one.length): state for one in cache.snapshots for key, state in one.states.items()}
        for (layer, name, length), state in (earlier | ends).items():
            tensors[f"{role}.{layer}.{name}.{length}"] = state.contiguous().cpu()
    if not tensors:
        return 0
    head = {
        "cached": {role: cache.tokens for role, cache in kept.caches.items()},
        "dropped": {role: cache.dropped for role, cache in kept.caches.items() if cache.dropped},
        "weights": {role: weights[role] for role in kept.caches},
        "prompts": {role: cache.prompt for role, cache in kept.caches.items() if cache.stepwise},
        "digests": {name: _digest(tensor) for name, tensor in tensors.items()},
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    if shutil.disk_usage(path.parent).free < size + SPARE_BYTES:
        return 0
    with replacing(path, PRIVATE) as file:
        text = json.dumps(head)
        file.write(save(tensors, {"specexec_snapshot": FORMAT, "head": text, "digest": _digest_of(text.encode())}))
    return size


def read_snapshot(path: Path, kept: Kept, weights: dict[str, str]) -> int:
    """Put caches that were kept into `kept`, in RAM: the next sweep takes them as far as their tokens are its own.

    Gives the tokens of the dialogue that need not be read again. Raises BadSnapshot, leaving `kept` as it was, for
    anything that does not fit.
    """
    from safetensors import SafetensorError, safe_open

    from specexec.model.cache import KVCache, LayerKV, Snapshot
    from specexec.model.recurrent.packed import restored
    from specexec.text.transcript import common

    try:
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
            if marks.get("specexec_snapshot") != FORMAT:
                raise BadSnapshot("it was made by another version of specexec.")
            if _digest_of(marks["head"].encode()) != marks["digest"]:
                raise BadSnapshot("its header is damaged.")
            head = json.loads(marks["head"])
            caches: dict[str, KVCache] = {}
            for role, tokens in head["cached"].items():
                if role not in weights:
                    continue  # this run has no drafter; the target's rows are the ones that cost
                if head["weights"][role] != weights[role]:
                    if role == "target":
                        raise BadSnapshot("it was made with another model.")
                    continue
                dropped = int(head.get("dropped", {}).get(role, 0))
                cache = caches[role] = KVCache(tokens=list(tokens), dropped=dropped)
                if role in (prompts := head.get("prompts", {})):
                    cache.prompt, cache.stepwise = int(prompts[role]), True
                named = [rest for whose, *rest in (name.split(".") for name in head["digests"]) if whose == role]
                for layer in sorted({int(rest[0]) for rest in named if len(rest) == 2}):
                    keys, values = (_checked(file.get_tensor(name), name, head) for name in _names(role, layer))
                    if any(tensor.shape[1] != cache.rows for tensor in (keys, values)):
                        raise BadSnapshot(f"{role} layer {layer} does not have a row for each token.")
                    cache.layers[layer] = LayerKV(keys, values)
                states: dict[int, dict[Recurrence, Tensor]] = {}
                for layer, recurrence, length in (rest for rest in named if len(rest) == 3):
                    name = f"{role}.{layer}.{recurrence}.{length}"
                    state = _checked(file.get_tensor(name), name, head)
                    states.setdefault(int(length), {})[int(layer), recurrence] = state
                ends = states.pop(len(tokens), {})
                cache.memories = {key: restored(key[1], state) for key, state in ends.items()}
                cache.snapshots = [Snapshot(length, states[length]) for length in sorted(states)]
            target = caches["target"].tokens
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise BadSnapshot(f"it is damaged ({type(problem).__name__}).") from problem
    known = max((common(target, turn.tokens) for turn in kept.turns), default=0)
    if not known:
        raise BadSnapshot("it belongs to another state of the conversation.")
    kept.caches = caches
    return known


def _names(role: str, layer: int) -> tuple[str, str]:
    return f"{role}.{layer}.keys", f"{role}.{layer}.values"


def _checked(tensor: Tensor, name: str, head: dict[str, dict[str, str]]) -> Tensor:
    if _digest(tensor) != head["digests"][name]:
        raise BadSnapshot(f"{name} is damaged.")
    return tensor


def _digest(tensor: Tensor) -> str:
    import torch

    return _digest_of(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
