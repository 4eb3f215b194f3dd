"""What a user can change, in three lines: what happened, why, what to try. Knows no screen and no exit code."""

from __future__ import annotations

from typing import ClassVar


class SpecexecError(Exception):
    """A clear refusal; `code` is a stable name shared by the command line, result files and the API."""

    code: ClassVar[str] = "internal"

    def __init__(self, what: str, why: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint


class EmptyPrompt(SpecexecError):
    """There is nothing to continue."""

    code = "empty_prompt"


class BadText(SpecexecError):
    """Some input is not text."""

    code = "bad_text"


class BadMessages(SpecexecError):
    """The model's chat template does not take these messages."""

    code = "bad_messages"


class UnreadContent(BadMessages):
    """A message holds what this model does not read: images, sound, films."""

    code = "unsupported_content"


class ContextLengthExceeded(SpecexecError):
    """Prompt and answer do not fit the context."""

    code = "context_length_exceeded"


class UnknownToken(SpecexecError):
    """A token id that the model has no row for: its embedding ends before."""

    code = "unknown_token"


class TokenizerMismatch(SpecexecError):
    """Drafter and target give different meanings to the same token id."""

    code = "tokenizer_mismatch"


class BadDrafter(SpecexecError):
    """What was asked of --drafter makes no drafter."""

    code = "bad_drafter"


class UnsupportedArchitecture(SpecexecError):
    """This model cannot be verified in trees."""

    code = "unsupported_arch"


class BadOption(SpecexecError):
    """A keyword of the Python API has a value that it cannot have."""

    code = "bad_option"


class EngineClosed(SpecexecError):
    """An engine was asked for text after `close`."""

    code = "engine_closed"


class BadSampling(SpecexecError):
    """A sampling parameter is out of its range."""

    code = "bad_sampling"


class BadGrammar(SpecexecError):
    """A grammar that cannot be read, or that no token can continue."""

    code = "bad_grammar"


class BrokenLogits(SpecexecError):
    """The model produced NaN or infinite logits: its weights are damaged or its dtype is too small."""

    code = "broken_logits"


class BadRecording(SpecexecError):
    """A folder holds no recording of a target's texts, another one, or a damaged one."""

    code = "bad_recording"


class BadCheckpoint(SpecexecError):
    """A training that was begun cannot be continued so."""

    code = "bad_checkpoint"


class SweepCancelled(Exception):
    """The sweep was asked to stop and did so between two layers; nothing of it was committed."""
