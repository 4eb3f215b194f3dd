"""Weights in motion: any safetensors checkpoint in, a transformers model whose layers stream out.

Names are looked up on first use, so that `import offload` costs nothing and a plan never pays for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# OpenMP reads it when torch is loaded. Threads that spin between two products take the core from the one that reads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from offload.checkpoint.documents import AGAIN, Json, check_documents
    from offload.checkpoint.headers import Folder, open_folder
    from offload.checkpoint.lora import with_adapters
    from offload.checkpoint.mtp import mtp_names
    from offload.checkpoint.quantized.stored import refuse_unknown
    from offload.checkpoint.remote_code import running_code
    from offload.checkpoint.routing import EXPERTS
    from offload.checkpoint.skeleton import Design, design
    from offload.checkpoint.tensors import read_tensors
    from offload.checkpoint.wrapped import tower_tensors
    from offload.errors import BadModelDir, OffloadError, ReadFailed
    from offload.hub.headers_only import item_B, list_model
    from offload.hub.local_models import check_bytes
    from offload.hub.names import ModelPair, called, is_here, known, resolve
    from offload.machine.host_rows import carrier_for
    from offload.machine.memory import Free, free_memory
    from offload.machine.system import check_system
    from offload.machine.thread_pool import share
    from offload.model.load import load, stream_of
    from offload.model.model_stream import ModelStream
    from offload.model.mtp_layer import load_mtp_layer
    from offload.model.resident_layer import is_resident, resident_layer, skeleton_layer
    from offload.model.tower import open_tower
    from offload.placement.placement import KVHome, Need, Offload, Placement
    from offload.placement.quantized_sizes import (
        FewBits,
        Format,
        FourBits,
        copy_B,
        is_quantised,
        looked_up_B,
        mtp_B,
        need_in,
        resident_B,
        with_head,
    )
    from offload.placement.requirements import (
        Compute,
        KVQuant,
        cache_heads,
        cache_rows_B,
        cache_widths,
        need_of,
        tower_B,
        with_cache,
    )
    from offload.placement.solver import place
    from offload.stream.protocol import StreamStats

__all__ = [
    "AGAIN",
    "EXPERTS",
    "BadModelDir",
    "Compute",
    "Design",
    "FewBits",
    "Folder",
    "Format",
    "FourBits",
    "Free",
    "Json",
    "KVHome",
    "KVQuant",
    "ModelPair",
    "ModelStream",
    "Need",
    "Offload",
    "OffloadError",
    "Placement",
    "ReadFailed",
    "StreamStats",
    "cache_heads",
    "cache_rows_B",
    "cache_widths",
    "called",
    "carrier_for",
    "check_bytes",
    "check_documents",
    "check_system",
    "copy_B",
    "design",
    "free_memory",
    "is_here",
    "is_quantised",
    "is_resident",
    "item_B",
    "known",
    "list_model",
    "load",
    "load_mtp_layer",
    "looked_up_B",
    "mtp_B",
    "mtp_names",
    "need_in",
    "need_of",
    "open_folder",
    "open_tower",
    "place",
    "read_tensors",
    "refuse_unknown",
    "resident_B",
    "resident_layer",
    "resolve",
    "running_code",
    "share",
    "skeleton_layer",
    "stream_of",
    "tower_B",
    "tower_tensors",
    "with_adapters",
    "with_cache",
    "with_head",
]

_HOMES = {
    "AGAIN": "checkpoint.documents",
    "BadModelDir": "errors",
    "check_documents": "checkpoint.documents",
    "EXPERTS": "checkpoint.routing",
    "Compute": "placement.requirements",
    "KVHome": "placement.placement",
    "KVQuant": "placement.requirements",
    "Design": "checkpoint.skeleton",
    "Folder": "checkpoint.headers",
    "FewBits": "placement.quantized_sizes",
    "Format": "placement.quantized_sizes",
    "FourBits": "placement.quantized_sizes",
    "Free": "machine.memory",
    "Json": "checkpoint.documents",
    "ModelPair": "hub.names",
    "ModelStream": "model.model_stream",
    "Need": "placement.placement",
    "Offload": "placement.placement",
    "OffloadError": "errors",
    "Placement": "placement.placement",
    "ReadFailed": "errors",
    "StreamStats": "stream.protocol",
    "cache_heads": "placement.requirements",
    "cache_rows_B": "placement.requirements",
    "cache_widths": "placement.requirements",
    "called": "hub.names",
    "carrier_for": "machine.host_rows",
    "check_bytes": "hub.local_models",
    "design": "checkpoint.skeleton",
    "copy_B": "placement.quantized_sizes",
    "free_memory": "machine.memory",
    "check_system": "machine.system",
    "is_here": "hub.names",
    "is_quantised": "placement.quantized_sizes",
    "is_resident": "model.resident_layer",
    "list_model": "hub.headers_only",
    "refuse_unknown": "checkpoint.quantized.stored",
    "item_B": "hub.headers_only",
    "known": "hub.names",
    "load": "model.load",
    "load_mtp_layer": "model.mtp_layer",
    "mtp_B": "placement.quantized_sizes",
    "mtp_names": "checkpoint.mtp",
    "need_in": "placement.quantized_sizes",
    "need_of": "placement.requirements",
    "open_folder": "checkpoint.headers",
    "open_tower": "model.tower",
    "place": "placement.solver",
    "looked_up_B": "placement.quantized_sizes",
    "read_tensors": "checkpoint.tensors",
    "resident_B": "placement.quantized_sizes",
    "resident_layer": "model.resident_layer",
    "resolve": "hub.names",
    "running_code": "checkpoint.remote_code",
    "share": "machine.thread_pool",
    "skeleton_layer": "model.resident_layer",
    "stream_of": "model.load",
    "tower_B": "placement.requirements",
    "tower_tensors": "checkpoint.wrapped",
    "with_adapters": "checkpoint.lora",
    "with_cache": "placement.requirements",
    "with_head": "placement.quantized_sizes",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'offload' has no attribute '{name}'")
    return getattr(import_module(f"offload.{_HOMES[name]}"), name)
