"""A pool of threads for arithmetic on a CPU: an idle thread takes the next piece.

OpenMP wakes all its threads for every operation and waits for the slowest of them. That takes about as long as a piece
of weights that fits a cache, and when a reader or another program has a core, all threads wait for it. Here a thread
computes whole pieces alone, and one that was held up does fewer of them.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Piece = TypeVar("Piece")

_making = threading.Lock()
_crews: dict[int, ThreadPoolExecutor] = {}


def share(work: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
    """Do `work` on every piece, on as many threads as torch has here; they must not depend on each other.

    No thread works on a piece any more when this returns, or raises what the work raised.
    """
    queue, threads = list(pieces), torch.get_num_threads()
    if threads == 1 or len(queue) == 1:
        for piece in queue:
            work(piece)
        return
    left, inference = iter(queue), torch.is_inference_mode_enabled()

    def take_part() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for piece in left:
                work(piece)

    crew = _crew(threads)
    parts = [crew.submit(take_part) for _ in range(min(threads, len(queue)))]
    try:
        wait(parts)
    finally:
        wait(parts)  # after an interrupt no thread may go on writing to what the caller takes back
    for part in parts:
        part.result()


def _crew(threads: int) -> ThreadPoolExecutor:
    """So many threads, for each of which an operation runs on one core."""
    with _making:
        if threads not in _crews:
            there = threading.Barrier(threads + 1)

            def begin() -> None:
                torch.get_num_threads()  # or torch would set the number afterwards
                torch.set_num_threads(1)
                there.wait()

            _crews[threads] = crew = ThreadPoolExecutor(threads, "crew", begin)
            for _ in range(threads):
                crew.submit(int)
            there.wait()
            torch.set_num_threads(threads)  # which is also what threads to come will have
        return _crews[threads]
