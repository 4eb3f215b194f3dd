"""What is added to a weight before it computes: a product of two small matrices that travel beside it. No torch."""

from dataclasses import dataclass

from offload.checkpoint.entry import Entry


@dataclass(frozen=True)
class Change:
    """`scale` times B [O, r] @ A [r, I], added to a weight [O, I] in float32; the sum is rounded once."""

    name: str
    """Of the weight, as a checkpoint of transformers has it."""
    a: Entry
    b: Entry
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, [O, I]."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def origin(self) -> str:
        """The folder that it comes from."""
        return str(self.a.file.parent)
