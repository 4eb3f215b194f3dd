"""The texts of one request on their way from the engine's thread to a client's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from cli.openai.choice import Choice, News
from cli.openai.errors import ApiError, api_error
from cli.serve.worker import Full, Stopping, Ticket, Worker

if TYPE_CHECKING:
    from specexec.stats import Burst

STOPPING = ApiError(503, "server_stopping", "the server is stopping.", retry_s=30)


class Writing:
    """Every choice of a request. Lives in the event loop; the engine's thread only calls what `_receiver` makes."""

    def __init__(self, worker: Worker, timeout_s: float | None = None) -> None:
        self.choices: list[Choice] = []
        self._worker = worker
        self._timeout_s = timeout_s
        self._began_s = time.monotonic()
        self._tickets: list[Ticket] = []
        self._loop = asyncio.get_running_loop()
        # At most one entry per sweep and choice, a few words each: a client that reads slowly delays no other.
        self._results: asyncio.Queue[tuple[Choice, Burst | Exception]] = asyncio.Queue()

    def add(self, choice: Choice, ticket_for: Callable[[Callable[[Burst | Exception], None]], Ticket]) -> None:
        """One more text; nothing starts before `submit`."""
        self.choices.append(choice)
        self._tickets.append(ticket_for(self._receiver(choice)))

    def submit(self) -> None:
        """Put all texts in the engine's line, or raise ApiError."""
        try:
            self._worker.submit(self._tickets)
        except Full as full:
            message = f"{full} Try again in about {full.retry_s} s."
            raise ApiError(503, "queue_full", message, retry_s=full.retry_s) from None
        except Stopping:
            raise STOPPING from None

    @property
    def unfinished(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.finish_reason is None]

    @property
    def ahead(self) -> int:
        """How many texts must be finished before the first of these begins."""
        return min(self._worker.ahead(ticket) for ticket in self._tickets)

    async def bursts(self) -> AsyncIterator[tuple[Choice, News]]:
        """What is new in which choice, burst by burst, until all texts have ended.

        Raises ApiError for what went wrong, and when the texts have not ended in time.
        """
        while self.unfinished:
            try:
                async with asyncio.timeout(self._rest_s):
                    choice, result = await self._results.get()
            except TimeoutError:
                written = sum(choice.tokens for choice in self.choices)
                message = f"not finished within {self._timeout_s:g} s; {written} tokens were written."
                raise ApiError(504, "request_timeout", message) from None
            if isinstance(result, Stopping):
                raise STOPPING
            if isinstance(result, Exception):
                raise api_error(result)
            choice.cached = self._tickets[choice.index].reused if choice.first else None
            yield choice, choice.add(result)

    @property
    def _rest_s(self) -> float | None:
        return None if self._timeout_s is None else max(0.0, self._began_s + self._timeout_s - time.monotonic())

    async def finish(self) -> None:
        """Wait for all texts."""
        async for _ in self.bursts():
            pass

    def cancel(self) -> bool:
        """Let go of what has not ended; True if there was something."""
        leaving = [
            ticket
            for choice, ticket in zip(self.choices, self._tickets, strict=True)
            if choice.finish_reason is None and not ticket.gone
        ]
        for ticket in leaving:
            self._worker.cancel(ticket)
        return bool(leaving)

    def _receiver(self, choice: Choice) -> Callable[[Burst | Exception], None]:
        def tell(what: Burst | Exception) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._results.put_nowait, (choice, what))

        return tell
