"""Conversations on disk: one JSON-lines file each, under the XDG data directory, written whole or not at all.

The first line says what the file is, every other one is a message. Lines end at \\n and nowhere else. Readable by their
owner alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from cli.shared.errors import BadSession, SessionNotFound
from offload.machine.atomic_write import PRIVATE, replacing
from offload.machine.folders import folder_of
from specexec.sizes import FIRST_IMAGE_ROW
from specexec.text.messages import Message, pictures_of, text_in
from specexec.text.transcript import NOTHING, LeftOut, Turn, belonging, common, dialogue

FORMAT = 1
_ID = re.compile(r"[\w-]{1,80}")


Stamp: TypeAlias = tuple[int, int, int]  # of a file: another one has another


@dataclass(frozen=True)
class TakenBack:
    """Messages that were said after the first `after` and then taken back or replaced: the model reads them no more."""

    after: int
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Record:
    """One conversation as it is kept."""

    id: str
    model: str
    system: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    messages: tuple[Message, ...] = ()
    turns: tuple[Turn, ...] = ()  # the ids behind the answers
    taken_back: tuple[TakenBack, ...] = ()
    left_out: LeftOut = NOTHING
    lossy: tuple[str, ...] = ()  # what answers were written with that may have changed them
    seen: Stamp | None = field(default=None, compare=False)  # the file that this is all of; None: it has none yet

    @property
    def facts(self) -> dict[str, object]:
        """What is kept, for programs."""
        return {name: value for name, value in asdict(self).items() if name not in ("seen", "turns")}

    @property
    def dialogue(self) -> list[Message]:
        """All messages, the system prompt first."""
        return dialogue(self.system, self.messages)

    @property
    def read(self) -> list[Message]:
        """What the model reads of it."""
        return dialogue(self.system, self.messages, self.left_out)

    def place_of(self, turn: Turn) -> int:
        """Which of the messages is the answer of a turn."""
        return len(turn.asked) - bool(self.system) + self.left_out.messages

    @property
    def title(self) -> str:
        """The first thing that was asked, on one line."""
        asked = next((message["content"] for message in self.messages if message["role"] == "user"), "(empty)")
        return " ".join(text_in(asked).split())


def sessions_folder() -> Path:
    """Where conversations live; made, for its owner alone, when it is first asked for."""
    folder = folder_of("data") / "sessions"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


class Archive:
    """All conversations of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self, model: str) -> Record:
        """A conversation with an id of its own; nothing is written yet."""
        return Record(_new_id(), model)

    def save(self, record: Record) -> Record:
        """Replace what is kept of a conversation, atomically; the record as it is kept now.

        Where another process has continued it since it was read, that one stays and ours gets a new id.
        """
        named = ("id", "model", "system", "created")
        head: dict[str, object] = {name: getattr(record, name) for name in named}
        if record.left_out != NOTHING:
            head["left_out"] = asdict(record.left_out)
        if record.lossy:
            head["lossy"] = record.lossy
        lines = [{"specexec_session": FORMAT, **head}, *_with_tokens(record)]
        lines += [{"taken_back": one.messages, "after": one.after} for one in record.taken_back]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self._alone():
            if _stamp_of(self._path(record.id)) not in (None, record.seen):
                record = replace(record, id=_new_id())
            path = self._path(record.id)
            with replacing(path, PRIVATE) as file:
                file.write(text.encode(errors="backslashreplace"))  # half a character becomes its JSON escape
            return replace(record, seen=_stamp_of(path))

    def load(self, id: str) -> Record:
        """One conversation, by its id or by the beginning of it."""
        found = [path for path in self._paths() if path.stem == id] or [
            path for path in self._paths() if path.stem.startswith(id)
        ]
        if len(found) != 1 or not id:
            what = f"{len(found)} conversations begin with" if found else "there is no conversation"
            raise SessionNotFound(f"{what} {id!r}.", hint="specexec sessions list, or /sessions in a chat")
        return _record(found[0], *_text(found[0]))

    def latest(self) -> Record:
        """The conversation that was saved last."""
        paths = self._paths()
        if not paths:
            raise SessionNotFound("there is no conversation to continue.", hint="specexec chat")
        path = max(paths, key=_saved_ns)
        return _record(path, *_text(path))

    def everything(self, holding: Items[str] = ()) -> Iterator[Record | BadSession]:
        """Every conversation, the latest first; a file that cannot be read comes as its error.

        Those whose file does not hold all these texts, in any case, are left out: they need not be understood.
        """
        spelled = [text.casefold() for text in holding]
        for path in sorted(self._paths(), key=_saved_ns, reverse=True):
            try:
                seen, text = _text(path)
                folded = text.casefold() if spelled else ""
                if all(one in folded for one in spelled):
                    yield _record(path, seen, text)
            except BadSession as problem:
                yield problem

    def remove(self, id: str) -> None:
        """Delete a conversation."""
        self._path(id).unlink()

    def saved_s(self, id: str) -> float:
        """When it was saved, in seconds since the epoch."""
        return self._path(id).stat().st_mtime

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For the length of the block no other specexec saves a conversation here."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _path(self, id: str) -> Path:
        assert _ID.fullmatch(id), "ids are made by us or were found as file names"
        return self.folder / f"{id}.jsonl"

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.glob("*.jsonl") if _ID.fullmatch(path.stem)]


def _new_id() -> str:
    return f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _stamp_of(path: Path) -> Stamp | None:
    try:
        return _stamp(path.stat())
    except FileNotFoundError:
        return None


def _saved_ns(path: Path) -> int:
    """When a file was written; those that cannot be reached count as the oldest, and reading them says why."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _text(path: Path) -> tuple[Stamp, str]:
    try:
        with path.open("rb") as file:
            return _stamp(os.fstat(file.fileno())), file.read().decode()
    except OSError as problem:
        raise BadSession(f"{path} cannot be read: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise BadSession(f"{path} is not a conversation of ours: {problem}.") from problem


def _record(path: Path, seen: Stamp, text: str) -> Record:
    try:
        head, *lines = (json.loads(line) for line in text.split("\n") if line)
        if head.pop("specexec_session") != FORMAT:
            raise ValueError("made by another version of specexec")
        said = [line for line in lines if "taken_back" not in line]
        taken_back = tuple(
            TakenBack(int(line["after"]), tuple(_message(one) for one in line["taken_back"]))
            for line in lines
            if "taken_back" in line
        )
        system = None if head.get("system") is None else str(head["system"])
        record = Record(
            path.stem, str(head["model"]), system, int(head["created"]), tuple(map(_message, said)),
            taken_back=taken_back, left_out=_left_out(head.get("left_out"), len(said)), seen=seen,
            lossy=tuple(map(str, head.get("lossy", ()))),
        )  # fmt: skip
        return replace(record, turns=tuple(_turns(record, said)))
    except RecursionError:
        raise BadSession(f"{path} is not a conversation of ours: it is nested too deeply.") from None
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as problem:
        raise BadSession(f"{path} is not a conversation of ours: {problem}.") from problem


def _left_out(found: object, messages: int) -> LeftOut:
    if found is None:
        return NOTHING
    if not isinstance(found, dict):
        raise ValueError("what it leaves out is no object")
    left_out = LeftOut(int(found["messages"]), str(found["summary"]))
    if not 0 <= left_out.messages <= messages:
        raise ValueError("it leaves out messages that it does not have")
    return left_out


def _message(found: dict[str, object]) -> Message:
    """A message in OpenAI's shape. Raises ValueError and the like for what is none."""
    content = found["content"]
    message: Message = {"role": str(found["role"]), "content": None if content is None else str(content)}
    if isinstance(content, list):  # with images
        message["content"] = [dict(part) for part in content]
        pictures_of(content)
    if "reasoning_content" in found:
        message["reasoning_content"] = str(found["reasoning_content"])
    message |= {name: str(found[name]) for name in ("tool_call_id", "name") if name in found}
    if "tool_calls" in found:
        message["tool_calls"] = [_call(call) for call in list(found["tool_calls"])]  # type: ignore[call-overload]
    return message


def _call(found: dict[str, dict[str, object]]) -> dict[str, object]:
    function = found["function"]
    named = {"name": str(function["name"]), "arguments": str(function["arguments"])}
    return {"id": str(found["id"]), "type": "function", "function": named}


def _with_tokens(record: Record) -> Iterator[dict[str, object]]:
    """The messages, beside each answer its ids: those of its prompt that are new since the one before, and its own."""
    behind = {record.place_of(turn): turn for turn in belonging(record.turns, record.read)}
    known: list[int] = []
    for place, message in enumerate(record.messages):
        if place not in behind:
            yield message
            continue
        turn = behind[place]
        kept = common(known, turn.prompt)
        ids = {"kept": kept, "read": turn.prompt[kept:], "written": turn.written}
        yield {**message, "tokens": {**ids, "ended": turn.ended, "seed": turn.seed}}
        known = turn.tokens


def _turns(record: Record, lines: list[dict[str, dict[str, object]]]) -> Iterator[Turn]:
    before, known = bool(record.system) - record.left_out.messages, list[int]()
    for place, line in enumerate(lines):
        if "tokens" not in line:
            continue
        tokens = line["tokens"]
        prompt = known[: int(str(tokens["kept"]))] + _ids(tokens["read"])
        ended, seed = tokens["ended"], tokens["seed"]
        turn = Turn(record.read[: before + place], prompt, _ids(tokens["written"]))
        turn.ended = ended if ended in ("stop", "length", "interrupted") else None
        turn.seed = None if seed is None else int(str(seed))
        yield turn
        known = turn.tokens


def _ids(found: object) -> list[int]:
    if not isinstance(found, list) or not all(type(token) is int and _is_id(token) for token in found):
        raise ValueError("its tokens are not ids")
    return found


def _is_id(token: int) -> bool:
    """Whether it can be one of a vocabulary, or of an image's rows."""
    return 0 <= token < 1 << 31 or FIRST_IMAGE_ROW <= token < 1 << 63
