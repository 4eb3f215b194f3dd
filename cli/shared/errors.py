"""The command line's own refusals, and the one table from error codes to exit codes. Imports nothing heavy."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from offload.errors import OffloadError
from specexec.errors import SpecexecError

INTERNAL = 1
USAGE = 2
BAD_INPUT = 7
SOME_FAILED = 8
INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143

EXIT_CODES = {
    "internal": INTERNAL,
    "engine_closed": INTERNAL,
    "broken_logits": 4,
    "bad_sampling": USAGE,
    "bad_option": USAGE,
    "bad_grammar": USAGE,
    "bad_drafter": USAGE,
    "wrong_offer": USAGE,
    "model_not_found": 3,
    "gated_repo": 3,
    "offline_missing": 3,
    "bad_model_dir": 4,
    "corrupt_shard": 4,
    "read_failed": 4,
    "tokenizer_mismatch": 4,
    "unsupported_arch": 4,
    "remote_code": 4,
    "not_enough_ram": 5,
    "not_enough_vram": 5,
    "disk_full": 5,
    "no_gpu": 6,
    "unsupported_system": 6,
    "context_length_exceeded": BAD_INPUT,
    "empty_prompt": BAD_INPUT,
    "bad_jsonl": BAD_INPUT,
    "bad_text": BAD_INPUT,
    "unknown_token": BAD_INPUT,
    "bad_messages": BAD_INPUT,
    "unsupported_content": BAD_INPUT,
    "duplicate_id": BAD_INPUT,
    "output_exists": 9,
    "manifest_mismatch": 9,
    "locked": 9,
    "damaged_output": 9,
    "cluster_lost": 6,
    "device_lost": 6,
    "port_taken": 9,
    "no_server": 6,
    "mcp_failed": 6,
    "missing_extra": USAGE,
    "file_refused": 3,
    "session_not_found": 3,
    "task_not_found": 3,
    "preset_not_found": 3,
    "bad_session": 4,
    "bad_recording": 4,
    "bad_checkpoint": 9,
    "bad_config": USAGE,
}

REFUSALS = (OffloadError, SpecexecError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class BadJsonl(SpecexecError):
    """One line of an input file is not a prompt."""

    code = "bad_jsonl"


class OutputFileExists(SpecexecError):
    """The output file holds results that the user did not ask to replace."""

    code = "output_exists"


class PortTaken(SpecexecError):
    """Something else listens there, or we may not."""

    code = "port_taken"


class NoServer(SpecexecError):
    """No running server answers there, or it refuses."""

    code = "no_server"


class ServerRefusal(SpecexecError):
    """A running server does not answer a request. It may be asked again in `retry_s` seconds."""

    code = "no_server"

    def __init__(self, what: str, code: str, retry_s: int | None = None, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.retry_s = retry_s
        if code in EXIT_CODES:
            self.code = code  # type: ignore[misc]  # every other error has one code for its class


class McpFailed(SpecexecError):
    """No MCP server of this name, or it cannot be used."""

    code = "mcp_failed"


class MissingExtra(SpecexecError):
    """This command needs packages that were not installed with the rest."""

    code = "missing_extra"


class TaskNotFound(SpecexecError):
    """No task of that name, or not with its data."""

    code = "task_not_found"


class SessionNotFound(SpecexecError):
    """No conversation has this id, or several do."""

    code = "session_not_found"


class PresetNotFound(SpecexecError):
    """No preset has this name."""

    code = "preset_not_found"


class BadSession(SpecexecError):
    """A file among the conversations is not one."""

    code = "bad_session"


class BadConfig(SpecexecError):
    """A settings file says something that we do not understand."""

    code = "bad_config"


class OutputDiskFull(SpecexecError):
    """The result could not be written."""

    code = "disk_full"


def exit_code(error: BaseException) -> int:
    """The exit code for the shell; a code missing from the table is a bug of ours and counts as one."""
    return EXIT_CODES.get(code_of(error), INTERNAL)


def code_of(error: BaseException) -> str:
    """The stable name of an error, also of those that are not ours."""
    if isinstance(error, REFUSALS):
        return error.code
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "disk_full"
    if isinstance(error, OSError) and error.filename is not None:
        return "file_refused"
    if refused := _refused_memory(error):
        return refused[0]
    # torch.AcceleratorError, by its name: torch is not imported here.
    lost = type(error).__name__ == "AcceleratorError" or str(error).startswith("CUDA error")
    return "device_lost" if lost and isinstance(error, RuntimeError) else "internal"


def _refused_memory(error: BaseException) -> tuple[str, str] | None:
    """Code and name of the memory that an allocator refused; torch's errors by their names, it is not imported here."""
    if type(error).__name__ == "OutOfMemoryError" and isinstance(error, RuntimeError):
        return "not_enough_vram", "GPU memory"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return "not_enough_ram", "memory"
    return None


def described(error: BaseException) -> dict[str, str | None]:
    """The same for programs: a stable code, what happened, what to try."""
    if isinstance(error, REFUSALS):
        return {"code": error.code, "message": "\n".join([error.what, *filter(None, [error.why])]), "hint": error.hint}
    return {"code": code_of(error), "message": explain(error).removeprefix("Error: "), "hint": None}


def explain(error: BaseException, log_file: Path | None = None) -> str:
    """What happened, why, and what to try: at most three lines for a refusal, two for a bug."""
    if isinstance(error, REFUSALS):
        lines = [f"Error: {error.what}"]
        lines += [f"  {line}" for line in (error.why or "").splitlines()]
        if error.hint:
            lines.append(f"  {error.hint if error.hint.startswith('Try') else f'Try: {error.hint}'}")
        return "\n".join(lines)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"Error: no space left on the device ({error.filename or 'standard output'})."
    if isinstance(error, OSError) and error.filename is not None:
        return f"Error: {os.fsdecode(error.filename)}: {error.strerror}."
    if refused := _refused_memory(error):
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "Try: fewer guesses (--budget), a smaller --ctx, or a shorter prompt."
        return f"Error: {refused[1]} ran out.\n  {said}\n  {hint}"
    if code_of(error) == "device_lost":
        said = str(error).partition("\n")[0].rstrip(".")
        return (
            f"Error: the GPU stopped answering ({said}).\n"
            "  What was finished is on the disk. Try: the same command again, a batch with --resume; chat -c."
        )
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name}()" if frames else ""
    more = f"The traceback is in {log_file}." if log_file is not None else "Run again with -vv for the traceback."
    return f"Internal error{where}: {type(error).__name__}: {error}\n  This is a bug, please report it. {more}"
