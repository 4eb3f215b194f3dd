"""What earlier runs found out about a target and its drafters, as `load` can use it. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class EarlierRuns:
    """Speeds to choose by, and searches that need not be made again."""

    speeds: Mapping[str, float] = field(default_factory=dict)
    """Tokens per second that drafters, by name, made with this target here: `auto` takes the best of those that fit."""
    searches: MutableMapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Which sublayers `skip` keeps, by what was searched; a search that has to be made is added."""
