"""What a run is made of: stored with its checkpoints and results, compared in one place; its lock.

A run whose data, seen anomalies, length or configuration are others than before is another run. It
neither goes on from what is there nor is it finished, unless its user says so.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from prn_jax.errors import UserError, shown, shown_first

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
    "profile",
    "thresholds",
    "total_steps",
)
# Fields that make a checkpoint's network another one: it is not gone on with.
_NETWORK_FIELDS = (
    "attention",
    "average_turns",
    "backbone.doublings",
    "backbone.merge",
    "backbone.name",
    "backbone.train_stage4",
    "decoder",
    "fusion",
    "image_size",
    "memory",
    "optimizer.average",
    "patch_map.backbone.name",
    "patch_map.patches",
    "patch_map.weight",
    "prototypes.enabled",
    "score_distance",
    "tile_overlap",
    "tiles",
)
# What a field amounted to before there was one, or since there is none.
_BEFORE = {
    "attention.norm": False,
    "attention.scales": [1, 2, 3],
    "average_turns": False,
    "backbone.doublings": [0],
    "backbone.merge": "mean",
    "data.holdout": 0.0,
    "decoder.stem": False,
    "decoder.stride": 1,
    "decoder.width": 1.0,
    "loss.dice_weight": 0.0,
    "loss.each_look": False,
    "optimizer.average": 0.0,
    "optimizer.clip": 0.0,
    "patch_map.backbone.name": "resnet18",
    "patch_map.backbone.weights": "",
    "patch_map.patches": 1024,
    "patch_map.weight": 0.0,
    "prototypes.max_images": 1000,
    "score_distance": 0.0,
    "synthesis.softness": 0.0,
    "synthesis.turns": False,
    "tile_overlap": 32,
    "tiles": [1, 1],
}


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is made of.

    Attributes:
      dataset: its name, as in `config.data.name`.
      category: its name.
      fingerprint: of the raw files, see `datasets.raw.fingerprint`; "" of a run that an earlier
        version made, which did not record it.
      seen: ids of the seen anomalies, sorted.
      steps: that the whole training has; -1: not known.
      white_level: grey level that became 255, 0 where the files have 8 bits.
      config: the whole configuration, plain JSON types.
      changes: what became different on the way, let pass by --allow_config_change.
      held: ids of the normal images that are not trained on, sorted.
      textures: see `textures.fingerprint`; "" where it is not known.
      dtype: name of the type that is computed in; "" where it is not known.
      turns: see `models.prn.create_model`; of the first training images, () if nothing asked.
    """

    dataset: str
    category: str
    fingerprint: str
    seen: tuple[str, ...]
    steps: int
    white_level: int
    config: dict[str, Any]
    changes: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    textures: str = ""
    dtype: str = ""
    turns: tuple[tuple[int, bool], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        lists = {name: list(getattr(self, name)) for name in ("seen", "changes", "held")}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Identity":
        """From what `as_json` gave, or from an earlier version's bare configuration."""
        backbone = stored.get("config", stored).get("backbone", {})
        if isinstance(backbone.get("doublings"), int):  # it was of one look
            backbone["doublings"] = [backbone["doublings"]]
        if "fingerprint" not in stored:
            config = {name: value for name, value in stored.items() if name != "steps"}
            steps = stored.get("steps", -1)
            return cls(config["data"]["name"], config["category"], "", (), steps, 0, config)
        lists = {name: tuple(stored.get(name, ())) for name in ("seen", "changes", "held")}
        turns = tuple((quarters, mirrored) for quarters, mirrored in stored.get("turns", ()))
        return cls(**stored | lists | {"turns": turns})

    @classmethod
    def of_run(cls, run: dict[str, Any]) -> "Identity":
        """Of a finished run, from its `results.json`."""
        earlier = run["config"] | {"steps": run.get("steps", -1)}
        return cls.from_json(run.get("identity") or earlier)

    def today(self, config: ConfigDict, fingerprint: str, textures: str) -> "Identity":
        """This run with other fields, data and textures, as far as is known before loading it."""
        old = self.config
        # What the devices would compute in they are not asked: another process may train on them.
        dtype = self.dtype if config.dtype == "auto" else config.dtype
        # Where `epochs` says how many, the number of images does too: as many as before, unless
        # something else is known to have changed.
        kept = config.epochs == old.get("epochs") and old.get("total_steps", -1) < 0
        steps = config.total_steps if config.total_steps >= 0 else self.steps if kept else -1
        return dataclasses.replace(
            self,
            config=as_dict(config),
            fingerprint=fingerprint,
            steps=steps,
            dtype=dtype,
            textures=textures,
        )

    @property
    def untrained(self) -> bool:
        """Whether it is a memory of patches alone, without a network (`total_steps=0`)."""
        return self.config.get("total_steps") == 0 and "memory" in self.config

    def differences(self, other: "Identity") -> list[str]:
        """What `other` is made of that this is not, each in words; empty where they are alike."""
        found = []
        if self.fingerprint:  # else it is not known
            if self.fingerprint != other.fingerprint:
                found.append("the images changed: some were added, removed or replaced")
            if gone := set(self.seen) - set(other.seen):
                found.append(f"no longer a seen anomaly: {shown_first(sorted(gone), 3)}")
            if new := set(other.seen) - set(self.seen):
                found.append(f"newly a seen anomaly: {shown_first(sorted(new), 3)}")
        if self.textures and other.textures and self.textures != other.textures:
            found.append("the textures (synthesis.textures) changed")
        types_known = bool(self.dtype and other.dtype)
        if types_known and self.dtype != other.dtype:
            found.append(f"it was computed in {self.dtype}, is in {other.dtype} (dtype says which)")
        changed = self._changed(other)
        if self.steps >= 0 and self.steps != other.steps:
            length = [changed[name] for name in ("epochs", "total_steps") if name in changed]
            found += length or [f"its steps were {self.steps}, are {other.steps}"]
        told = ("dtype",) if types_known else ()
        if self.textures and self.textures == other.textures:
            told += ("synthesis.textures",)  # where they lie
        return found + [
            text
            for name, text in changed.items()
            if name not in told and not _is_one(name, FREE_FIELDS)
        ]

    def _changed(self, other: "Identity") -> dict[str, str]:
        """The fields that differ, each with what it was and is."""
        old, new = (_BEFORE | _flatten(x.config) for x in (self, other))
        return {
            name: f"{name} was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name, "absent") != new.get(name, "absent")
        }

    def check(
        self, other: "Identity", where: str, step: int = 0, allow: bool = False
    ) -> "Identity":
        """Refuses to go on with what `other` is made of, unless it is allowed.

        Args:
          other: what a run is to be made of now.
          where: what this is the identity of, for the message.
          step: steps that were done.
          allow: let pass what can be gone on with.

        Returns:
          `other`, which remembers what was let pass.

        Raises:
          UserError: naming the differences and what to do.
        """
        found = self.differences(other)
        text = f"{where} is made of something else ({'; '.join(found)})"
        if self.fingerprint and set(self.seen) - set(other.seen):
            raise UserError(
                f"{text}: what it was trained on would be tested on. Put the images and fields "
                "back, or give another --workdir"
            )
        if new := set(other.held) - set(self.held):
            raise UserError(
                f"{text}: what it was trained on ({shown_first(sorted(new), 3)}) would set its "
                "thresholds. Put the images and fields back, or give another --workdir"
            )
        if self.untrained != other.untrained:
            raise UserError(
                f"{text}: what answers without training holds no network to train, nor the other "
                "way round. Give another --workdir"
            )
        if any(_is_one(name, _NETWORK_FIELDS) for name in self._changed(other)):
            raise UserError(
                f"{text}: its network would be another one. Set the fields back, or give another "
                "--workdir"
            )
        if 0 <= other.steps < step:
            raise UserError(
                f"{text}: {step} steps are done, and none is undone. Set total_steps (or epochs) "
                "back, or give another --workdir"
            )
        self.check_white(other.white_level, text, "Put the images back, or give another --workdir")
        if found and not allow:
            drawn = self.fingerprint != other.fingerprint and (self.seen or self.held)
            unless = ", unless other images are drawn as seen or held out now" if drawn else ""
            raise UserError(
                f"{text}: undo that, give another --workdir, or pass --allow_config_change, which "
                f"goes on from the last checkpoint and evaluates anew{unless}"
            )
        return dataclasses.replace(other, changes=(*self.changes, *found), turns=self.turns)

    def check_white(self, white_level: int, text: str, mend: str) -> None:
        """Raises `UserError` if the images' white is another one than that of the training."""
        if self.white_level and self.white_level != white_level:
            raise UserError(
                f"{text}: level {self.white_level} was white in images of more than 8 bits, now it "
                f"is {white_level} (0: there are none), and all would be brighter or darker to the "
                f"network. {mend}"
            )


def as_dict(config: ConfigDict) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return json.loads(config.to_json())


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The fields by which the figures of runs may differ, but for categories and seeds.

    Args:
      config: of a run's results, plain JSON types.
    """
    fields = _BEFORE | _flatten(config)
    lengths, seeds = ("epochs", "total_steps"), ("seed", "split_seed")
    return {
        name: value
        for name, value in fields.items()
        if name in lengths or not (name in seeds or _is_one(name, FREE_FIELDS))
    }


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _is_one(name: str, fields: tuple[str, ...]) -> bool:
    """Whether a field is one of those, or in a group of them."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


LOCK = ".lock"  # the name of the file by which a folder is held


@contextlib.contextmanager
def lock(
    folder: os.PathLike,
    what: str = "training",
    inheritable: bool = False,
    flag: str = "--workdir",
    wait: bool = False,
) -> Iterator[bool]:
    """Holds a folder for this process alone.

    The lock is the kernel's, so it ends with its process, however that ends. Without it goes a
    bucket, and, with a warning, a file system that has none.

    Args:
      folder: is made where it is not there.
      what: works in it, for the message.
      inheritable: processes that this one starts hold it too.
      flag: that names another folder.
      wait: until another process lets go of it.

    Yields:
      Whether it is held.

    Raises:
      UserError: another process holds it, and the message says which; or it cannot be written to.
    """
    if "://" in os.fspath(folder):
        yield False
        return
    import fcntl

    path = pathlib.Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path.parent, flag, error) from error
    with file:
        os.set_inheritable(file.fileno(), inheritable)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read() or "just begun"
                there = f"another {what} works in {shown(path.parent)} ({holder})"
                if not wait:
                    raise UserError(
                        f"{there}: wait until it has ended, or give another {flag}"
                    ) from error
                logging.info("%s: waiting until it has ended", there)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logging.log_first_n(
                logging.WARNING,
                "%s cannot be locked (%s): see to it that nothing else works there",
                1, shown(path.parent), error.strerror,
            )  # fmt: skip
            yield False
            return
        since = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        try:
            file.truncate(0)
            os.write(file.fileno(), holder.encode())
        except OSError as error:
            raise _unwritable(path.parent, flag, error) from error
        yield True


def _unwritable(folder: pathlib.Path, flag: str, error: OSError) -> UserError:
    return UserError(f"cannot write to {shown(folder)} ({flag}): {error.strerror}")
