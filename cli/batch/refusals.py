"""Refusals of batch work."""

from __future__ import annotations

from cli.openai.errors import ApiError
from cli.shared.errors import BadJsonl
from specexec.errors import SpecexecError


class BadRequest(BadJsonl):
    """A line asks for something that the API refuses; `refusal` says it in the API's own shape."""

    def __init__(self, place: str, refusal: ApiError) -> None:
        about = refusal.param if refusal.param and refusal.param not in refusal.message else None
        super().__init__(": ".join(filter(None, [place, about, refusal.message])))
        self.refusal = refusal


class DuplicateId(SpecexecError):
    """Two items of the input have the same name, so a record could not say whose it is."""

    code = "duplicate_id"


class UnreadableFile(SpecexecError):
    """A file of the input that the system will not let us read."""

    code = "file_refused"


class OutputRefused(SpecexecError):
    """A place where the system will not let us write the output."""

    code = "file_refused"


class ManifestMismatch(SpecexecError):
    """The output was made with another configuration."""

    code = "manifest_mismatch"


class Locked(SpecexecError):
    """Another process writes this output."""

    code = "locked"


class DamagedOutput(SpecexecError):
    """The output holds lines that are not ours, or not whole, where no crash could have left them."""

    code = "damaged_output"


class ClusterLost(SpecexecError):
    """There is no cluster, or all its workers died."""

    code = "cluster_lost"
