"""What happens to an image before a network sees it: one record that travels in every artefact."""

from dataclasses import asdict, dataclass, fields

from rd_deploy.common import UserError


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network sees it; travels in every artefact.

    ``resize``: shorter side in pixels, then a centre crop of ``size`` x ``size`` (both given: images of any size);
    pixel values in [0, 1] are then normalised as (x - mean) / std per channel.
    """

    size: int
    resize: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if not (len(self.mean) == len(self.std) == self.channels):
            raise UserError(f"preprocessing needs {self.channels} means and stds, one per channel")
        if not (1 <= self.size <= 4096 and self.size <= self.resize <= 8192 and all(std > 0 for std in self.std)):
            raise UserError("preprocessing needs 1 <= size <= resize and positive stds")

    def to_dict(self) -> dict:
        """Plain containers for a checkpoint or JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> "Preprocessing":
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"preprocessing must have exactly {sorted(names)}")
        return cls(**values)
