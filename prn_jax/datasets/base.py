"""What the builders of all benchmarks share: the record, the checks, the TFRecords' life.

A data set's official raw files are read once, category by category, into TFRecords. One record is

    image   uint8 [h, w, 3], encoded as found
    mask    uint8 [h, w, 1] in {0, 255}, all 0 for a normal image
    label   0 normal, 1 anomalous
    defect  the defect's name, "good" for a normal image
    id      the image's path below the category's folder, without extension

in the splits `train` and `test`, ordered by id. A split without images is absent.
"""

import abc
import collections
import contextlib
import dataclasses
import hashlib
import io
import logging as std_logging
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from prn_jax import images
from prn_jax.errors import UserError, is_plain, shown

GOOD = "good"
# Files that the official archives or operating systems put among the images.
_JUNK = ("thumbs.db", "desktop.ini", "labels.txt")
_TAIL = 4096  # bytes


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of a category, and where its mask is.

    `defect` is "good" for a normal image and None where only the mask tells.
    """

    id: str
    split: str
    defect: str | None
    image: pathlib.Path
    mask: pathlib.Path | None


def list_images(
    folder: pathlib.Path, stray: list[pathlib.Path], folders: Iterable[str] = ()
) -> dict[str, pathlib.Path]:
    """Lists the image files of one folder by their stem, sorted.

    Args:
      folder: the folder; where it does not exist the result is empty.
      stray: gets what has no business here: files that are no images, and subfolders.
      folders: the names of subfolders that do have business here.

    Raises:
      UserError: two files differ only in their extension, so that their ids would be equal.
    """
    found: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.name.lower() in _JUNK:
            continue
        if path.is_dir() or path.suffix.lower() not in images.EXTENSIONS:
            if path.name not in folders:
                stray.append(path)
        elif path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path} have the same name but for the extension; "
                "rename one of them"
            )
        else:
            found[path.stem] = path
    return found


def pair_masks(
    found: dict[str, pathlib.Path], masks: dict[str, pathlib.Path], suffixes: Iterable[str]
) -> dict[str, pathlib.Path]:
    """Finds each image's mask, named `<stem><suffix>`; returns masks by the images' stems.

    Raises:
      UserError: a mask has no image, or an image has two masks.
    """
    masks = dict(masks)
    paired: dict[str, pathlib.Path] = {}
    for suffix in suffixes:
        for stem in found:
            mask = masks.pop(stem + suffix, None)
            if mask is not None and stem in paired:
                raise UserError(f"{found[stem]} has two masks, {paired[stem]} and {mask}")
            if mask is not None:
                paired[stem] = mask
    for mask in masks.values():
        raise UserError(f"{mask}: a mask without an image; add its image or remove the mask")
    return paired


def scan_folders(
    folder: pathlib.Path, *, normal: str, suffixes: tuple[str, ...]
) -> tuple[list[Example], list[pathlib.Path]]:
    """Reads MVTec AD's layout, which others took over.

    `train/<normal>`, `test/<normal>`, `test/<defect>`, `ground_truth/<defect>/<stem><suffix>`.

    Args:
      folder: the category's folder.
      normal: what the folders of normal images are called.
      suffixes: what may follow the image's stem in its mask's name.

    Returns:
      The examples, and the stray files and folders.

    Raises:
      UserError: a defective image has no mask, a mask no image, or there is an ambiguous name.
    """
    stray: list[pathlib.Path] = []
    examples: list[Example] = []
    stray.extend(list_images(folder / "train", stray, folders=(normal,)).values())
    for stem, path in list_images(folder / "train" / normal, stray).items():
        examples.append(Example(f"train/{normal}/{stem}", "train", GOOD, path, None))
    names = {
        path.name
        for part in ("test", "ground_truth")
        if (folder / part).is_dir()
        for path in (folder / part).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    }
    for part in ("test", "ground_truth"):
        # An image right in test/ belongs to no defect.
        stray.extend(list_images(folder / part, stray, folders=names).values())
    for name in sorted(names):
        found = list_images(folder / "test" / name, stray)
        masks = list_images(folder / "ground_truth" / name, stray)
        paired = pair_masks(found, masks, suffixes)
        for stem, path in found.items():
            if name != normal and stem not in paired:
                mask = folder / "ground_truth" / name / f"{stem}{suffixes[0]}.png"
                raise UserError(f"{path}: a defective image without a mask; expected {mask}")
            defect = GOOD if name == normal else name
            examples.append(Example(f"test/{name}/{stem}", "test", defect, path, paired.get(stem)))
    return examples, stray


def fingerprint(folder: pathlib.Path, examples: Iterable[Example]) -> str:
    """Hashes what a category's files are, to notice when they change.

    Names, sizes, the images' last 4 KiB (a PNG ends in its checksum; uncompressed pixels of another
    photograph differ there by their noise) and the whole masks. No times: hosts that share the
    TFRecords may have copied the raw files at different ones.
    """
    digest = hashlib.sha256()
    for example in examples:
        for path, tail in ((example.image, _TAIL), (example.mask, None)):
            if path is None:
                continue
            try:
                with path.open("rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(0 if tail is None else max(0, size - tail))
                    end = file.read()
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
            name = path.relative_to(folder).as_posix()
            digest.update(f"{example.split}\0{name}\0{size}\0".encode() + end)
    return digest.hexdigest()


class AnomalyBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads one category of one data set. Subclasses say where its files are."""

    VERSION = tfds.core.Version("1.0.0")
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
    def _scan(cls, folder: pathlib.Path) -> tuple[list[Example], list[pathlib.Path]]:
        """Returns a category folder's examples, and the stray files and folders in it."""

    @classmethod
    def sources(cls, manual_dir: str | os.PathLike) -> dict[str, pathlib.Path]:
        """Returns the folders of the categories that are there, by category.

        `manual_dir` holds the category folders, or one folder that does, as archives unpack.
        """

        def look(folder: pathlib.Path) -> dict[str, pathlib.Path]:
            found = {name: cls._category_folder(folder, name) for name in cls.counts}
            return {name: path for name, path in found.items() if (path / cls.marker).is_dir()}

        root = pathlib.Path(manual_dir).expanduser()
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
    def categories(cls, manual_dir: str | os.PathLike) -> list[str]:
        """Returns the names of the data set's categories, on disk or not."""
        del manual_dir  # Only a data set without a fixed list looks.
        return list(cls.counts)

    @classmethod
    def _missing(cls, manual_dir: str | os.PathLike, category: str) -> UserError:
        """Returns the error of a category that is not on disk."""
        root = pathlib.Path(manual_dir).expanduser()
        expected = cls._category_folder(root, category) / cls.marker
        return cls._where_from(f"{cls.name}/{category}: no folder {shown(expected)}")

    @classmethod
    def nothing_found(cls, manual_dir: str | os.PathLike) -> UserError:
        """Returns the error where no category at all is on disk."""
        root = pathlib.Path(manual_dir).expanduser()
        looked = [f"{cls._category_folder(pathlib.Path(), x) / cls.marker}" for x in cls.counts]
        looked = f"{looked[0]} to {looked[-1]}" if len(looked) > 1 else looked[0]
        if not root.is_dir():
            return cls._where_from(f"{cls.name}: no folder {shown(root)} (data.manual_dir)")
        return cls._where_from(
            f"{cls.name}: none of the folders {looked} is in {shown(root)} (data.manual_dir), or "
            "in exactly one folder of it"
        )

    @classmethod
    def _where_from(cls, problem: str) -> UserError:
        return UserError(
            f"{problem}; download {cls.title} ({cls.licence}) from {cls.page}, unpack it and set "
            "data.manual_dir to the folder that it unpacks to"
        )

    @classmethod
    def prepared(cls, data_dir: str | os.PathLike) -> set[str]:
        """Returns the categories that have TFRecords."""
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
        if source is not None:
            return builder, source, cls._source_fingerprint(source)
        if builder.fingerprint is None:
            raise cls._missing(manual_dir, category)
        logging.info(
            "%s/%s: no raw files in %s (data.manual_dir), using the TFRecords in %s",
            cls.name, category, shown(manual_dir) or "''", shown(builder.data_dir),
        )  # fmt: skip
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
        if source is None or builder.fingerprint == current:
            return builder
        if builder.data_path.exists():
            logging.info("%s/%s: the raw files changed, rewriting", cls.name, category)
            builder.data_path.rmtree(missing_ok=True)
            builder = cls.open(category, manual_dir, data_dir)
        failure = None
        try:
            builder.info.metadata.update(category=category, source=os.path.abspath(source))
            builder._write(manual_dir)
        except (OSError, RuntimeError) as error:  # TFDS wraps TensorFlow's own
            failure = str(error).splitlines()[0]
        # What is there counts: another process that prepares the category may have been first.
        builder = cls.open(category, manual_dir, data_dir)
        if builder.fingerprint != current:
            raise UserError(f"cannot write {shown(builder.data_dir)} (data.data_dir): {failure}")
        return builder

    @classmethod
    def _source_fingerprint(cls, folder: pathlib.Path) -> str:
        return fingerprint(folder, cls._scan_sorted(folder)[0])

    @classmethod
    def _scan_sorted(cls, folder: pathlib.Path) -> tuple[list[Example], list[pathlib.Path]]:
        examples, stray = cls._scan(folder)
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
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.title} ({self.licence}), one category, for anomaly detection.",
            homepage=self.page,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["normal", "anomalous"]),
                    "defect": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        category = self.category
        source = self.sources(dl_manager.manual_dir).get(category)
        if source is None:
            raise self._missing(dl_manager.manual_dir, category)
        examples, stray = self._scan_sorted(source)
        if not any(example.split == "train" for example in examples):
            raise UserError(f"{source}: no training images; add normal images to train on")
        self.info.metadata["fingerprint"] = fingerprint(source, examples)
        self._start_report(stray)
        return {
            split: self._generate_examples(chosen)
            for split in ("train", "test")
            if (chosen := [example for example in examples if example.split == split])
        }

    def _generate_examples(self, examples: Iterable[Example]) -> Iterator[tuple[str, dict]]:
        for example in examples:
            data, size = images.read_image(example.image)
            if example.mask is None:
                mask = np.zeros(size, np.uint8)
            else:
                mask = images.read_mask(example.mask)
                if mask.shape != size:
                    raise UserError(
                        f"{example.image} is {size[1]}x{size[0]} pixels but its mask "
                        f"{example.mask} {mask.shape[1]}x{mask.shape[0]}; make them equal"
                    )
            defect = example.defect
            if defect is None:
                defect = "defect" if mask.any() else GOOD
            elif defect == GOOD and mask.any():
                raise UserError(
                    f"{example.image} is a normal image but its mask {example.mask} is not empty; "
                    "move the image or remove the mask"
                )
            elif defect != GOOD and not mask.any():
                self._empty.append(example.mask)
            yield self._record(example.id, example.split, defect, data, mask)

    def _record(
        self, id_: str, split: str, defect: str, image: bytes, mask: np.ndarray
    ) -> tuple[str, dict]:
        self._written[split, defect] += 1
        return id_, {
            "image": io.BytesIO(image),
            "mask": io.BytesIO(images.encode_png(mask)),
            "label": int(defect != GOOD),
            "defect": defect,
            "id": id_,
        }

    def _start_report(self, stray: list[pathlib.Path]) -> None:
        self._stray = stray
        self._empty: list[pathlib.Path] = []  # masks of defective images
        self._written: collections.Counter[tuple[str, str]] = collections.Counter()

    def _post_download_and_prepare_hook(self) -> None:
        name = f"{self.name}/{self.category}"
        parts = []
        for split in ("train", "test"):
            found = [(defect, n) for (s, defect), n in sorted(self._written.items()) if s == split]
            parts.append(f"{split} " + (", ".join(f"{n} {d}" for d, n in found) or "empty"))
        logging.info("%s: %s; TFRecords in %s", name, "; ".join(parts), self.data_dir)
        if self._stray:
            logging.warning("%s: skipped, no images or out of place: %s", name, _some(self._stray))
        if self._empty:
            logging.warning("%s: empty masks of defective images: %s", name, _some(self._empty))
        official = self.counts.get(self.category)
        if official is not None:
            kinds = ("train normal", "train defective", "test normal", "test defective")
            counted = dict.fromkeys(kinds, 0)
            for (split, defect), n in self._written.items():
                counted[f"{split} {'normal' if defect == GOOD else 'defective'}"] += n
            differ = [
                f"{counted[kind]} {kind} images (officially {n})"
                for kind, n in zip(kinds, official, strict=True)
                if counted[kind] != n
            ]
            if differ:
                logging.warning("%s: incomplete or changed: %s", name, ", ".join(differ))


def _some(paths: list[pathlib.Path], most: int = 5) -> str:
    named = ", ".join(map(str, paths[:most]))
    return f"{len(paths)} files: {named}{', ...' if len(paths) > most else ''}"


def _is_news(record: std_logging.LogRecord) -> bool:
    """Lets through what isn't TFDS's routine: paths that it reads, configs that it doesn't know."""
    routine = record.levelno < std_logging.WARNING or "custom data configuration" in record.msg
    return not (routine and "tensorflow_datasets" in record.pathname)


logging.get_absl_logger().addFilter(_is_news)
