"""Weights in motion: any safetensors checkpoint in, a transformers model whose layers stream out.

Names are looked up on first use, so that `import offload` costs nothing and a plan never pays for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# OpenMP reads it when torch is loaded. Threads that spin between two products take the core from the one that reads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from offload.carrier import carrier_for
    from offload.crew import share
    from offload.custom import running_code
    from offload.documents import AGAIN, check_documents
    from offload.errors import BadModelDir, OffloadError, ReadFailed
    from offload.formats import FewBits, FourBits, copy_B, is_quantised, looked_up_B, resident_B, with_head
    from offload.hardware import free_memory
    from offload.lender import StreamStats
    from offload.listing import item_B, list_model
    from offload.local import check_bytes
    from offload.model import ModelStream, load, stream_of
    from offload.names import ModelPair, called, is_here, known, resolve
    from offload.need import cache_B, need_of
    from offload.placement import Free, Offload, Placement
    from offload.placing import place
    from offload.quantised import refuse_unknown
    from offload.routing import EXPERTS
    from offload.shards import Folder, open_folder
    from offload.skeleton import Design, design
    from offload.standing import skeleton_layer, standing_layer, stands
    from offload.system import check_system

__all__ = [
    "AGAIN",
    "EXPERTS",
    "BadModelDir",
    "Design",
    "FewBits",
    "Folder",
    "FourBits",
    "Free",
    "ModelPair",
    "ModelStream",
    "Offload",
    "OffloadError",
    "Placement",
    "ReadFailed",
    "StreamStats",
    "cache_B",
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
    "item_B",
    "known",
    "list_model",
    "load",
    "looked_up_B",
    "need_of",
    "open_folder",
    "place",
    "refuse_unknown",
    "resident_B",
    "resolve",
    "running_code",
    "share",
    "skeleton_layer",
    "standing_layer",
    "stands",
    "stream_of",
    "with_head",
]

_HOMES = {
    "AGAIN": "documents",
    "BadModelDir": "errors",
    "check_documents": "documents",
    "EXPERTS": "routing",
    "Design": "skeleton",
    "Folder": "shards",
    "FewBits": "formats",
    "FourBits": "formats",
    "Free": "placement",
    "ModelPair": "names",
    "ModelStream": "model",
    "Offload": "placement",
    "OffloadError": "errors",
    "Placement": "placement",
    "ReadFailed": "errors",
    "StreamStats": "lender",
    "cache_B": "need",
    "called": "names",
    "carrier_for": "carrier",
    "check_bytes": "local",
    "design": "skeleton",
    "copy_B": "formats",
    "free_memory": "hardware",
    "check_system": "system",
    "is_here": "names",
    "is_quantised": "formats",
    "list_model": "listing",
    "refuse_unknown": "quantised",
    "item_B": "listing",
    "known": "names",
    "load": "model",
    "need_of": "need",
    "open_folder": "shards",
    "place": "placing",
    "looked_up_B": "formats",
    "resident_B": "formats",
    "resolve": "names",
    "running_code": "custom",
    "share": "crew",
    "skeleton_layer": "standing",
    "standing_layer": "standing",
    "stands": "standing",
    "stream_of": "model",
    "with_head": "formats",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'offload' has no attribute '{name}'")
    return getattr(import_module(f"offload.{_HOMES[name]}"), name)
