"""uvicorn and the engines' threads, started together and stopped together."""

from __future__ import annotations

import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from cli.serve.models import Models


class Running(uvicorn.Server):
    """Ctrl-C and SIGTERM first stop engines after their current layer: every client gets the reason, then we exit."""

    def __init__(self, app: ASGIApp, models: Models, shutdown_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=shutdown_s,
                h11_max_incomplete_event_size=32 * 1024,
            )
        )
        self._models = models
        models.on_failure = self.leave

    def leave(self) -> None:
        """End soon, from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._models.begin_stopping()
        super().handle_exit(sig, frame)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        self._models.start()
        super().run(sockets)
