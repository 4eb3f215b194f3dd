"""Refusals as OpenAI's clients read them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping

from cli.shared.errors import REFUSALS


class ApiError(Exception):
    """A request that gets no answer, and why. `retry_s`: seconds after which a client may try again."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_s = retry_s

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same in a protocol that has other names for the fields of a chat request."""
        param = names.get(self.param or "", self.param)
        return ApiError(self.status, self.code, self.message, param=param, retry_s=self.retry_s)

    @property
    def body(self) -> dict[str, object]:
        """The JSON that goes to the client, as a whole answer or as the last event of a stream."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 401:
            kind = "authentication_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The client can mend this."""
    return ApiError(400, code, message, param=param)


def api_error(error: BaseException) -> ApiError:
    """What a client may know of an error: all of a refusal, only the kind of a bug (paths and prompts stay here)."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, REFUSALS):
        ours = error.code in ("broken_logits", "corrupt_shard", "read_failed", "internal")
        return ApiError(500 if ours else 400, error.code, "the model cannot be read." if ours else error.what)
    return ApiError(500, "internal", f"internal error ({type(error).__name__}); the server's log has more.")
