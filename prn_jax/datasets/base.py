"""What the builders of all benchmarks share: the record, the checks, the TFRecords' life.

A data set's official raw files are read once, category by category, into TFRecords. One record is

    image   uint8 [h, w, 3], encoded as found
    mask    uint8 [h, w, 1] in {0, 255}, all 0 for a normal image
    has_mask  bool: whether the mask is known; true for a normal image
    label   0 normal, 1 anomalous
    defect  the defect's name, "good" for a normal image
    id      the image's path below the category's folder, without extension

in the splits `train` and `test`, ordered by id. A split without images is absent.
"""

import abc
import collections
import contextlib
import functools
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from prn_jax import images
from prn_jax.datasets import raw, records, roi
from prn_jax.datasets.layout import GOOD, INVERTED, Example, read_mask, seems_inverted
from prn_jax.errors import UserError, as_os_errors, first_line, is_plain, shown
from prn_jax.identity import lock
from prn_jax.parallel import several_at_a_time

# Raised when an image or a mask comes out otherwise than before: TFRecords are then made anew where
# the raw files are there.
_READING = 2


class AnomalyBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads one category of one data set. Subclasses say where its files are."""

    VERSION = tfds.core.Version("2.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "docs/datasets.md has each data set's page and layout."
    url_infos = {}  # Nothing is downloaded; TFDS needn't look for a checksum file.

    # Where the seen anomalies are drawn: "test", from which they then leave, or "train".
    seen_from = "test"
    # Official images per category: train normal, train defective, test normal, test defective.
    counts: dict[str, tuple[int, int, int, int]] = {}
    title: str
    licence: str
    page: str
    # A folder that every category folder has.
    marker = "train"

    @classmethod
    @abc.abstractmethod
    def _scan(cls, folder: pathlib.Path, stray: list[pathlib.Path]) -> list[Example]:
        """Returns a category folder's examples; `stray` gets the stray files and folders in it."""

    @classmethod
    def sources(cls, manual_dir: str | os.PathLike) -> dict[str, pathlib.Path]:
        """Returns the folders of the categories that are there, by category.

        `manual_dir` holds the category folders, or one folder that does, as archives unpack.
        """

        def look(folder: pathlib.Path) -> dict[str, pathlib.Path]:
            found = {name: cls._category_folder(folder, name) for name in cls.counts}
            return {name: path for name, path in found.items() if os.path.isdir(path / cls.marker)}

        root = pathlib.Path(os.path.expanduser(manual_dir))
        if not os.fspath(manual_dir):  # not the current folder: there are none
            return {}
        if found := look(root):
            return found
        below = [look(folder) for folder in (root.iterdir() if root.is_dir() else ())]
        below = [found for found in below if found]
        return below[0] if len(below) == 1 else {}

    @classmethod
    def _category_folder(cls, root: pathlib.Path, category: str) -> pathlib.Path:
        return root / category

    @classmethod
    def _missing(cls, manual_dir: str | os.PathLike, category: str) -> UserError:
        """Returns the error of a category that is not on disk."""
        root = pathlib.Path(os.path.expanduser(manual_dir))
        expected = cls._category_folder(root, category) / cls.marker
        return cls._where_from(f"{cls.name}/{category}: no folder {shown(expected)}")

    @classmethod
    def nothing_found(cls, manual_dir: str | os.PathLike) -> UserError:
        """Returns the error where no category at all is on disk."""
        root = pathlib.Path(os.path.expanduser(manual_dir))
        looked = [f"{cls._category_folder(pathlib.Path(), x) / cls.marker}" for x in cls.counts]
        looked = f"{looked[0]} to {looked[-1]}" if len(looked) > 1 else looked[0]
        if not root.is_dir():
            return cls._where_from(f"{cls.name}: no folder {shown(root)} (data.manual_dir)")
        return cls._where_from(
            f"{cls.name}: none of the folders {looked} is in {shown(root)} (data.manual_dir), or "
            "in exactly one folder of it"
        )

    @classmethod
    def look_for_slips(cls, manual_dir: str | os.PathLike, category: str = "") -> None:
        """Raises `UserError` where a folder, of the category or of any, is likely misnamed."""

    @classmethod
    def _where_from(cls, problem: str) -> UserError:
        return UserError(
            f"{problem}; download {cls.title} ({cls.licence}) from {cls.page}, unpack it and set "
            "data.manual_dir to the folder that it unpacks to"
        )

    @classmethod
    def prepared(cls, manual_dir: str | os.PathLike, data_dir: str | os.PathLike) -> set[str]:
        """Returns the categories that have TFRecords which may stand for those in `manual_dir`."""
        del manual_dir
        return {category for category, _ in cls._records(data_dir)}

    @classmethod
    def _records(cls, data_dir: str | os.PathLike) -> list[tuple[str, str]]:
        """Returns each category that has TFRecords, with the name of its folder."""
        root = epath.Path(os.path.expanduser(data_dir)) / cls.name
        # No glob: etils takes `[2]` in the name of a folder for a part of the pattern.
        names = [folder.name for folder in (root.iterdir() if root.is_dir() else ())]
        version = str(cls.VERSION)
        names = [x for x in sorted(names) if (root / x / version / "dataset_info.json").exists()]
        return [(cls._category_of(root / name / version), name) for name in names]

    @classmethod
    def _category_of(cls, folder: epath.Path) -> str:
        """Returns whose TFRecords are in `<data_dir>/<data set>/<name>/<version>`."""
        return folder.parent.name

    @classmethod
    def _records_name(
        cls, category: str, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
    ) -> str:
        """Returns the name of the folder that a category's TFRecords are in, or would be."""
        del manual_dir, data_dir
        return category

    @property
    def category(self) -> str:
        """The category's name."""
        return self.builder_config.description or self.builder_config.name

    @classmethod
    def open(
        cls, category: str, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
    ) -> "AnomalyBuilder":
        """Returns the builder of a category, prepared or not."""
        config = next((c for c in cls.BUILDER_CONFIGS if c.name == category), None)
        name = cls._records_name(category, manual_dir, data_dir)
        config = config or tfds.core.BuilderConfig(name=name, description=category)
        return cls(config=config, data_dir=os.path.expanduser(data_dir))

    @classmethod
    def find(
        cls, category: str, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
    ) -> tuple["AnomalyBuilder", pathlib.Path | None, str]:
        """Finds a category, raw or as TFRecords.

        Returns:
          Its builder, prepared or not; the folder of its raw files, None where they are gone; and
          the fingerprint of those, or of the TFRecords where they are gone.

        Raises:
          UserError: neither raw files nor TFRecords, or a raw file is wrong.
        """
        if not is_plain(category):
            raise UserError(
                f"{cls.name}: the category {shown(category)} has a backslash, a control character "
                "or bytes that are not UTF-8 in its name; rename its folder"
            )
        builder = cls.open(category, manual_dir, data_dir)
        source = cls.sources(manual_dir).get(category)
        closed = cls._category_folder(pathlib.Path(os.path.expanduser(manual_dir)), category)
        if source is None and os.path.isdir(closed) and not os.access(closed, os.R_OK | os.X_OK):
            raise UserError(f"{shown(closed)} (data.manual_dir) may not be read: Permission denied")
        if source is not None:
            return builder, source, cls._source_fingerprint(source)
        cls.look_for_slips(manual_dir, category)
        if builder.fingerprint is None and records.are_aside(builder.data_path):
            with lock(builder.data_path.parent, "preparation", flag="data.data_dir", wait=True):
                records.bring_back(builder.data_path)
            builder = cls.open(category, manual_dir, data_dir)
        if builder.fingerprint is None:
            raise cls._missing(manual_dir, category)
        origin = (builder.info.metadata or {}).get("source", "an earlier version's folder")
        inside = pathlib.Path(origin).is_relative_to(os.path.abspath(closed.parent))
        say_once(
            logging.INFO if inside else logging.WARNING,
            f"{cls.name}/{category}: no raw files in {shown(manual_dir) or repr('')} "
            f"(data.manual_dir), using the TFRecords in {shown(builder.data_dir)}, made from "
            f"{shown(origin)}",
        )
        return builder, None, builder.fingerprint

    @classmethod
    def prepare(
        cls, category: str, *, manual_dir: str | os.PathLike, data_dir: str | os.PathLike
    ) -> "AnomalyBuilder":
        """Returns the builder of a category with its TFRecords there and up to date.

        They are written where there are none and written anew where the raw files have changed
        since; where the raw files are gone, the TFRecords are what counts.

        Raises:
          UserError: neither raw files nor TFRecords, or a raw file is wrong.
        """
        builder, source, current = cls.find(category, manual_dir, data_dir)
        if source is None or builder._is_of(current):
            return builder
        try:
            return cls._rewrite(category, source, current, manual_dir, data_dir)
        except UserError as error:
            if builder.fingerprint != current:
                raise
            logging.warning(
                "%s/%s: the TFRecords are of an earlier version, which read some types of files "
                "otherwise, and are used as they are: %s", cls.name, category, error,
            )  # fmt: skip
            return builder

    @classmethod
    def _rewrite(cls, category, source, current, manual_dir, data_dir) -> "AnomalyBuilder":
        """Writes the TFRecords of raw files whose fingerprint is `current`, see `prepare`."""
        folder = cls.open(category, manual_dir, data_dir).data_path
        with lock(folder.parent, "preparation", flag="data.data_dir", wait=True) as alone:
            # Another process may have been first.
            builder = cls.open(category, manual_dir, data_dir)
            if builder._is_of(current):
                return builder
            if alone:
                records.remove_unfinished(folder.parent)
            if builder.fingerprint is not None:
                same = builder.fingerprint == current
                why = "an earlier version made the TFRecords" if same else "the raw files changed"
                logging.info("%s/%s: %s, rewriting", cls.name, category, why)
            with records.set_aside(folder):
                builder = cls.open(category, manual_dir, data_dir)
                failure = None
                try:
                    builder.info.metadata.update(
                        category=category, source=os.path.abspath(source), reading=_READING
                    )
                    with as_os_errors():  # TFDS wraps some of TensorFlow's own
                        builder._write(manual_dir)
                except (OSError, RuntimeError) as error:
                    failure = first_line(error)
                # What is there counts: where nothing can be locked, another may have been faster.
                builder = cls.open(category, manual_dir, data_dir)
                if not builder._is_of(current):
                    changed = f"{shown(source)} changed while it was read: run it again at rest"
                    cannot = f"cannot write {shown(builder.data_dir)} (data.data_dir): {failure}"
                    raise UserError(cannot if failure else changed)
        return builder

    def _is_of(self, fingerprint: str) -> bool:
        """Whether the TFRecords are there, made of these files as they are read now."""
        metadata = self.info.metadata or {}
        return self.fingerprint == fingerprint and metadata.get("reading") == _READING

    @classmethod
    def _source_fingerprint(cls, folder: pathlib.Path) -> str:
        return raw.fingerprint(folder, cls._scan_sorted(folder)[0])

    @classmethod
    def scan(cls, category: str, manual_dir: str | os.PathLike) -> list[Example]:
        """Returns a category's examples by the names of its raw files; none where they are gone."""
        source = cls.sources(manual_dir).get(category)
        return [] if source is None else cls._scan(source, [])

    @classmethod
    def _scan_sorted(cls, folder: pathlib.Path) -> tuple[list[Example], list[pathlib.Path]]:
        stray: list[pathlib.Path] = []
        try:
            examples = cls._scan(folder, stray)
        except UserError:
            _say_skipped(cls.name, stray)
            raise
        if not any(example.split == "train" for example in examples):
            why = f"; skipped {images.describe_skipped(stray)}" if stray else ""
            raise UserError(
                f"{shown(folder)}: no training images; add normal images to train on{why}"
            )
        return sorted(examples, key=lambda example: example.id), stray

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the files that the TFRecords were made of; None without TFRecords."""
        return (self.info.metadata or {}).get("fingerprint")

    def _write(self, manual_dir: str | os.PathLike) -> None:
        tfds.disable_progress_bar()
        config = tfds.download.DownloadConfig(
            manual_dir=os.path.expanduser(manual_dir), try_download_gcs=False
        )
        with (
            contextlib.redirect_stdout(io.StringIO()),  # TFDS prints sizes that it doesn't know,
            tempfile.TemporaryDirectory() as downloads,  # and makes folders that stay empty.
        ):
            self.download_and_prepare(download_dir=downloads, download_config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        info = tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.title} ({self.licence}), one category, for anomaly detection.",
            homepage=self.page,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "has_mask": np.bool_,
                    "label": tfds.features.ClassLabel(names=["normal", "anomalous"]),
                    "defect": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )
        info.initialize_from_bucket = lambda: None  # it would leave an empty folder in TMPDIR
        return info

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        category = self.category
        source = self.sources(dl_manager.manual_dir).get(category)
        if source is None:
            raise self._missing(dl_manager.manual_dir, category)
        examples, stray = self._scan_sorted(source)
        self.info.metadata["fingerprint"] = raw.fingerprint(source, examples)
        self._start_report(stray)
        self._region = roi.read(source)
        if self._region is not None:
            self.info.metadata["roi"] = roi.to_text(self._region)
        self._white = raw.find_white(self._title, examples)
        self.info.metadata["white_level"] = self._white
        return {
            split: self._generate_examples(chosen)
            for split in ("train", "test")
            if (chosen := [example for example in examples if example.split == split])
        }

    def _generate_examples(self, examples: Sequence[Example]) -> Iterator[tuple[int, dict]]:
        wrong = []
        # TFDS sorts by them, in parts of equal ranges, each of which is in memory at a time.
        keys = range(0, 2**128, 2**128 // len(examples))
        found = several_at_a_time(self._look, examples)
        for key, example, (picture, mask, data) in zip(keys, examples, found):
            if picture is None:
                wrong.append((example.image, data))
            if wrong:  # the rest is only looked at
                continue
            size = mask.shape
            if picture.pages > 1:
                self._report["several images in a file, the first is read"].append(example.image)
            if picture.transparent:
                self._report["transparent pixels, whose colours count"].append(example.image)
            self._proportions[example.image] = size[1] / size[0]
            if picture.levels.dtype != np.uint8 and picture.levels.max(initial=0) > self._white:
                self._report[f"levels above {self._white}, clipped"].append(example.image)
            if roi.stretched(self._region, size):
                self._report[f"of other proportions than {roi.NAME}, stretched"].append(
                    example.image
                )
            defect = example.defect
            if defect is None:
                defect = "defect" if mask.any() else GOOD
            elif defect != GOOD and example.mask is not None and not mask.any():
                self._report["empty masks of defective images"].append(example.mask)
            if seems_inverted(mask):
                self._report[INVERTED].append(example.mask)
            yield key, self._record(example.id, example.split, defect, data, mask)
        raw.refuse(wrong)

    def _look(self, example: Example) -> tuple:
        """A picture, its mask and the record's bytes; None, None and what is wrong with it."""
        try:
            picture = images.read_picture(example.image)
            mask = read_mask(example, picture.levels.shape[:2])
            return picture, mask, images.encode(picture, self._white)
        except UserError as error:
            return None, None, str(error)

    def _record(
        self, id_: str, split: str, defect: str, image: bytes, mask: np.ndarray
    ) -> dict[str, Any]:
        self._written[split, defect] += 1
        return {
            "image": io.BytesIO(image),
            "mask": io.BytesIO(images.encode_png(mask)),
            "has_mask": defect == GOOD or bool(mask.any()),
            "label": int(defect != GOOD),
            "defect": defect,
            "id": id_,
        }

    @property
    def _title(self) -> str:
        return f"{self.name}/{self.category}"

    def _start_report(self, stray: list[pathlib.Path]) -> None:
        _say_skipped(self._title, stray)  # Before anything can fail.
        self._report: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
        self._written: collections.Counter[tuple[str, str]] = collections.Counter()
        self._proportions: dict[pathlib.Path, float] = {}

    def _post_download_and_prepare_hook(self) -> None:
        parts = []
        for split in ("train", "test"):
            found = [(defect, n) for (s, defect), n in sorted(self._written.items()) if s == split]
            parts.append(f"{split} " + (", ".join(f"{n} {d}" for d, n in found) or "empty"))
        logging.info("%s: %s; TFRecords in %s", self._title, "; ".join(parts), shown(self.data_dir))
        if odd := raw.stretched(self._proportions):
            self._report["of other proportions than most, stretched to the same"] = odd
        for what, paths in self._report.items():
            logging.warning("%s: %s: %s", self._title, what, raw.some(paths))
        official = self.counts.get(self.category)
        if official and (differ := raw.differing(self._written, official)):
            logging.warning("%s: incomplete or changed: %s", self._title, ", ".join(differ))


def _say_skipped(title: str, stray: list[pathlib.Path]) -> None:
    if stray:
        logging.warning("%s: skipped %s", title, images.describe_skipped(stray))


say_once = functools.cache(logging.log)
