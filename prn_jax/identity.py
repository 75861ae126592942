"""What a run was made of: stored with its checkpoints and results, compared in one place."""

import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict

from prn_jax.errors import UserError

# Fields that may differ between a run and its continuation: they say where things are, how often
# something is written, or how evaluation is cut into batches, and change no figure. The length of
# the training is compared as `steps`.
FREE_FIELDS = (
    "category",
    "checkpoint",
    "data.data_dir",
    "data.manual_dir",
    "epochs",
    "eval_batch_size",
    "eval_every",
    "log_every",
    "total_steps",
)


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run was made of.

    Attributes:
      dataset: its name, as in `config.data.name`.
      category: its name.
      fingerprint: of the raw files, see `datasets.base.fingerprint`; "" of a run that an earlier
        version made, which did not record it.
      seen: ids of the seen anomalies, sorted.
      steps: that the whole training has.
      white_level: grey level that became 255, 0 where the files have 8 bits.
      config: the whole configuration, plain JSON types.
    """

    dataset: str
    category: str
    fingerprint: str
    seen: tuple[str, ...]
    steps: int
    white_level: int
    config: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self) | {"seen": list(self.seen)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Identity":
        """From what `as_json` gave, or from an earlier version's bare configuration."""
        if "fingerprint" not in stored:
            name, steps = stored["data"]["name"], stored.get("steps", 0)
            return cls(name, stored["category"], "", (), steps, 0, stored)
        return cls(**stored | {"seen": tuple(stored["seen"])})

    def differences(self, other: "Identity") -> list[str]:
        """What `other` is made of that this is not, each in words; empty where they are alike."""
        found = []
        if self.fingerprint and self.fingerprint != other.fingerprint:
            found.append("the images were others (some were added, removed or replaced since)")
        if self.fingerprint and self.seen != other.seen:
            gone, new = (sorted(set(a) - set(b)) for a, b in ((self.seen, other.seen),
                                                              (other.seen, self.seen)))  # fmt: skip
            found.append(f"the seen anomalies were {', '.join(gone) or 'fewer'} where now there "
                         f"are {', '.join(new) or 'fewer'}")  # fmt: skip
        if self.steps != other.steps:
            found.append(f"it had {self.steps} steps, now {other.steps} are asked for")
        old, new = _flatten(self.config), _flatten(other.config)
        return found + [
            f"{name} was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name, "absent") != new.get(name, "absent")
            and not any(name == free or name.startswith(free + ".") for free in FREE_FIELDS)
        ]

    def check(self, other: "Identity", where: str) -> None:
        """Refuses to go on with what `other` is made of.

        Raises:
          UserError: naming the differences.
        """
        if found := self.differences(other):
            raise UserError(
                f"{where} was made of something else ({'; '.join(found)}): give another "
                "--workdir, undo the change, or pass --allow_config_change"
            )


def as_dict(config: ConfigDict) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return json.loads(config.to_json())


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
