"""Everything that can be wrong with a model, a machine or a disk, as errors a person can act on. Knows no torch.

Each carries a stable `code` (shared by CLI, records and API) and three lines: what happened with the name and the
numbers, why if known, and one thing to try.
"""


class OffloadError(Exception):
    """A model cannot be found, used, placed or read; `what`, `why` and `hint` say so in words."""

    code: str = "internal"

    def __init__(self, what: str, why: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, why, hint)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(self.why)
        if self.hint:
            lines.append(f"Try: {self.hint}")
        return "\n  ".join(lines)


class ModelNotFound(OffloadError):
    """No alias, folder or repository has this name."""

    code = "model_not_found"


class GatedRepo(OffloadError):
    """The repository exists, but this account has not been given access."""

    code = "gated_repo"


class OfflineMissing(OffloadError):
    """The files are not in the local cache, and the network was forbidden or out of reach."""

    code = "offline_missing"


class DiskFull(OffloadError):
    """A download or a pack finds no more space, or would not find enough."""

    code = "disk_full"


class BadModelDir(OffloadError):
    """The folder is not a safetensors model folder, or its files contradict each other."""

    code = "bad_model_dir"


class CorruptShard(OffloadError):
    """A weight file is damaged, cut short or does not say what it must."""

    code = "corrupt_shard"


class UnsupportedModel(OffloadError):
    """The model is sound, but of a kind that cannot be streamed here."""

    code = "unsupported_arch"


class RemoteCode(OffloadError):
    """The model needs Python of its own folder, which the user has not allowed to run."""

    code = "remote_code"


class NotEnoughRam(OffloadError):
    """The placement needs more main memory than it was given."""

    code = "not_enough_ram"


class NotEnoughVram(OffloadError):
    """The placement needs more GPU memory than it was given."""

    code = "not_enough_vram"


class UnsupportedSystem(OffloadError):
    """This operating system is none that weights are streamed on."""

    code = "unsupported_system"


class NoGpu(OffloadError):
    """A GPU was asked for and there is none that PyTorch can use."""

    code = "no_gpu"


class ReadFailed(OffloadError):
    """Weights could not be read in the middle of a sweep; the next sweep starts from the first layer."""

    code = "read_failed"


class MissingLibrary(OffloadError):
    """This model needs a package that is not installed."""

    code = "missing_extra"


class OutputExists(OffloadError):
    """The folder to write holds files that the user did not ask to replace."""

    code = "output_exists"
