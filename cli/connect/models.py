"""The models of a running server: which it has, and one of them, loaded and waiting."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from cli.connect.server import Server
from cli.shared.errors import ServerRefusal
from cli.shared.quantities import format_count
from cli.terminal.screen import Screen

Card: TypeAlias = dict[str, object]

_LOOK_S = 0.5  # between two looks at a model that is loading


def cards_of(server: Server) -> list[Card]:
    """What a server says of its models, the first one first. Raises NoServer, ServerRefusal."""
    cards = server.asked("/v1/models").get("data")
    if not isinstance(cards, list) or not cards or not all(map(_is_ours, cards)):
        raise server.foreign
    return cards


def _is_ours(card: object) -> bool:
    return isinstance(card, dict) and card.get("owned_by") == "specexec"


@dataclass(frozen=True)
class ServedModel:
    """A model that a server has loaded, with what its card said then."""

    server: Server
    name: str
    meta: Mapping[str, object]

    @property
    def context(self) -> int:
        return int(str(self.meta["context"]))

    @property
    def revision(self) -> str:
        """Names what its texts depend on: the checkpoint, and how it is computed."""
        meta = self.meta
        computed = [] if meta["compute"] == "float" else [meta["compute"]]
        computed += [f"kv{meta['kv_quant']}"] if meta.get("kv_quant") else []
        return "-".join(map(str, [meta["revision"], meta["dtype"], *computed, *self.lossy]))

    @property
    def lossy(self) -> tuple[str, ...]:
        """What the server was started with that changes texts."""
        given = self.meta.get("lossy")
        return tuple(map(str, given)) if isinstance(given, list) else ()

    @property
    def introduction(self) -> str:
        """Which model answers, where, and who drafts."""
        meta = self.meta
        facts = [f"drafter {meta['drafter']}", f"budget {meta['budget']}", f"context {format_count(self.context)}"]
        facts += [str(meta["placement"]), *(f"LOSSY {one}" for one in self.lossy)]
        return " · ".join([f"{self.name} at {self.server.address}", *facts])


def loaded_model(server: Server, name: str, required: bool, screen: Screen) -> ServedModel:
    """The model of this name once it is loaded, which may take minutes; the first one if there is none of that name.

    Raises NoServer, ServerRefusal, also for a name that is `required` and not there.
    """
    names = [str(card["id"]) for card in cards_of(server)]
    if required and name not in names:
        what = f"the server at {server.address} has no model {name!r}; it has {', '.join(names)}."
        raise ServerRefusal(what, "model_not_found", hint=f"-m {names[0]}")
    name = name if name in names else names[0]
    with screen.status(lambda: f"waiting for {name} at {server.address}…"):
        while _card(server, name)["status"] == {"value": "loading"}:
            time.sleep(_LOOK_S)
        server.asked("/api/generate", {"model": name})  # loads it, if it is not
        meta = _card(server, name).get("meta")
    if not isinstance(meta, dict):
        raise ServerRefusal(f"{name!r} was unloaded again at {server.address}.", "no_server", hint="the same again")
    return ServedModel(server, name, meta)


def _card(server: Server, name: str) -> Card:
    return next((card for card in cards_of(server) if card["id"] == name), {"status": None})
