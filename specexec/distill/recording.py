"""What was recorded of a target, in one folder: a file for each text, and one that says how. Knows no engine.

    recording.json             the target, its layers that are kept, how its answers were chosen
    shared.safetensors         its embeddings, last norm and head
    hs_{i}.safetensors         text i: `token_ids` [R], `hidden_states` [R, layers + 1, H], as `speculators` names them;
                               `loss_mask` [R] (true: the answer), `top_ids` [R, N], `top_log_probs` [R, N]
    unfinished.json            beginnings of answers, from a run that was stopped

R tokens of a text   H hidden size   N likeliest tokens after each
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from specexec.errors import BadRecording

MANIFEST, SHARED, UNFINISHED = "recording.json", "shared.safetensors", "unfinished.json"
VERSION = 1
_TEXT = re.compile(r"hs_(\d+)\.safetensors")
IDS_B, LOG_PROB_B = 4, 2
Replace: TypeAlias = Callable[[Path, bytes], None]
"""Puts bytes in the place of a file, whole or not at all."""


@dataclass(frozen=True)
class RecordedTarget:
    """The model that wrote. `vocabulary` are its rows; `tokens` names its tokenizer's, by a hash of them."""

    name: str
    model_class: str
    hidden: int
    layers: int
    vocabulary: int
    context: int
    tokens: str


@dataclass(frozen=True)
class Recording:
    """One folder. `taps`: what flows into these layers is kept, and what the last one makes; `top` likeliest tokens.

    `sampling`: how the answers were chosen, by the names of SamplingParams. `replace`: how files are written.
    """

    folder: Path
    target: RecordedTarget
    taps: tuple[int, ...]
    top: int
    sampling: Mapping[str, object]
    replace: Replace = field(compare=False, repr=False)

    @property
    def token_B(self) -> int:
        """Bytes of one token on disk, states in 16 bits."""
        return (len(self.taps) + 1) * self.target.hidden * 2 + self.top * (IDS_B + LOG_PROB_B) + 8 + 1

    def begin(self, shared: Mapping[str, Tensor]) -> None:
        """Create the folder, or go on with one of the same kind. Raises BadRecording where it holds another."""
        if (self.folder / MANIFEST).exists():
            self._check_same(Recording.open(self.folder, self.replace))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(self.folder / SHARED, {name: _in_16_bits(one) for name, one in shared.items()})
        said = {"version": VERSION, **{one.name: _plain(getattr(self, one.name)) for one in _SAID}}
        self.replace(self.folder / MANIFEST, (json.dumps(said, indent=1) + "\n").encode())

    @classmethod
    def open(cls, folder: Path, replace: Replace) -> Recording:
        """The recording in a folder. Raises BadRecording where there is none."""
        hint = "a folder that `specexec distill record` has written."
        try:
            said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if said.pop("version") != VERSION:
                raise BadRecording(
                    f"{folder} was recorded by another version.", hint="record again, into a new folder."
                )
            target = RecordedTarget(**said.pop("target"))
            return cls(folder, target, tuple(said["taps"]), int(said["top"]), said["sampling"], replace)
        except FileNotFoundError:
            raise BadRecording(f"{folder} holds no recording.", hint=hint) from None
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise BadRecording(f"{folder / MANIFEST} cannot be read: {problem}.", hint=hint) from problem

    @property
    def texts(self) -> list[int]:
        """The numbers of the texts that are there, ascending."""
        names = (_TEXT.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def prompt_of(self, text: int) -> str:
        """The name of the prompt that was answered, as `keep` was given it."""
        with self._file(text) as file:
            return str((file.metadata() or {}).get("prompt"))

    def keep(self, text: int, prompt: str, recorded: RecordedText) -> None:
        """Write one text, whole or not at all. `prompt` names what was answered."""
        tensors = {
            "token_ids": recorded.tokens_R,
            "loss_mask": recorded.answer_R,
            "hidden_states": _in_16_bits(recorded.states_RTH),
            "top_ids": recorded.top_ids_RN.int(),
            "top_log_probs": recorded.top_log_probs_RN.half(),
        }
        self.save(self._path(text), tensors, {"prompt": prompt})

    def set_aside(self, begun: Mapping[int, tuple[str, tuple[int, ...]]]) -> None:
        """Keep beginnings of answers, by text: the name of the prompt, and the tokens."""
        said = {text: [prompt, list(tokens)] for text, (prompt, tokens) in begun.items()}
        self.replace(self.folder / UNFINISHED, json.dumps(said).encode())

    def begun(self) -> dict[int, tuple[str, tuple[int, ...]]]:
        """What `set_aside` kept last; nothing where that cannot be read, which costs time alone."""
        try:
            said = json.loads((self.folder / UNFINISHED).read_text(encoding="utf-8"))
            return {int(text): (str(prompt), tuple(map(int, tokens))) for text, (prompt, tokens) in said.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}

    def length(self, text: int) -> int:
        """Its tokens."""
        with self._file(text) as file:
            (found,) = file.get_slice("token_ids").get_shape()
            return int(found)

    def read(self, text: int, first: int = 0, end: int | None = None) -> RecordedText:
        """The tokens `first` … `end` - 1 of one text. Raises BadRecording for a damaged file."""
        with self._file(text) as file:
            names = ("token_ids", "loss_mask", "hidden_states", "top_ids", "top_log_probs")
            try:
                return RecordedText(*(file.get_slice(name)[first:end] for name in names))
            except SafetensorError as problem:
                raise self._damaged(text, problem) from problem

    def tokens(self, text: int) -> tuple[Tensor, Tensor]:
        """Token ids and answer mask of one text, without its states."""
        with self._file(text) as file:
            return file.get_tensor("token_ids"), file.get_tensor("loss_mask")

    def shared(self) -> dict[str, Tensor]:
        """The target's embeddings, last norm and head, as far as they were dense."""
        try:
            return load_file(self.folder / SHARED)
        except (OSError, SafetensorError) as problem:
            raise BadRecording(f"{self.folder / SHARED} cannot be read: {problem}.", hint="record again.") from problem

    def save(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Tensors in the place of what is there, whole or not at all."""
        self.replace(path, serialized({name: one.contiguous() for name, one in tensors.items()}, metadata))

    def _path(self, text: int) -> Path:
        return self.folder / f"hs_{text}.safetensors"

    def _file(self, text: int) -> safe_open:
        try:
            return safe_open(self._path(text), framework="pt")
        except (OSError, SafetensorError) as problem:
            raise self._damaged(text, problem) from problem

    def _damaged(self, text: int, problem: Exception) -> BadRecording:
        hint = "delete that file; the same `distill record` writes it again."
        return BadRecording(f"{self._path(text)} is damaged: {problem}.", hint=hint)

    def _check_same(self, there: Recording) -> None:
        for one in _SAID:
            then, now = _plain(getattr(there, one.name)), _plain(getattr(self, one.name))
            if then != now:
                if isinstance(then, dict) and isinstance(now, dict):
                    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
                    then, now = ({name: settings.get(name) for name in names} for settings in (then, now))
                raise BadRecording(
                    f"{self.folder} was recorded with another {one.name}: {then}, now {now}.",
                    hint="the old settings, or another -o.",
                )


_SAID = [one for one in fields(Recording) if one.name not in ("folder", "replace")]


@dataclass(frozen=True)
class RecordedText:
    """Tokens of one text, and what the target computed at each of them.

    int64 [R]; bool [R], true for tokens of the answer; states [R, T, H], one more than the taps; the likeliest tokens
    after each, and the natural logarithm of their probabilities, [R, N].
    """

    tokens_R: Tensor
    answer_R: Tensor
    states_RTH: Tensor
    top_ids_RN: Tensor
    top_log_probs_RN: Tensor


def _in_16_bits(states: Tensor) -> Tensor:
    return states.to(torch.bfloat16) if states.dtype == torch.float32 else states


def _plain(value: object) -> object:
    return json.loads(json.dumps(asdict(value) if isinstance(value, RecordedTarget) else value))
