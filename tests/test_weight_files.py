"""Files of published weights: PyTorch's formats written by hand, and what is refused."""

import collections
import os
import pickle
import pickletools
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from prn_jax import pretrained
from prn_jax.errors import UserError


class Storage:
    def __init__(self, kind: str, data: np.ndarray):
        self.kind, self.data = kind, data


class Tensor:
    """A strided view into a storage, pickled as PyTorch pickles its tensors."""

    def __init__(self, storage, offset, shape, stride, parameter=False):
        self.parts, self.parameter = (storage, offset, shape, stride), parameter

    def __reduce__(self):
        utils = sys.modules["torch._utils"]
        arguments = (*self.parts, False, collections.OrderedDict())
        if self.parameter:
            tensor = Tensor(*self.parts)
            return utils._rebuild_parameter, (tensor, True, collections.OrderedDict())
        return utils._rebuild_tensor_v2, arguments

    def numpy(self):
        storage, offset, shape, stride = self.parts
        index = sum(i * s for i, s in zip(np.indices(shape), stride)) if shape else 0
        return storage.data[offset + index]


@pytest.fixture
def fake_torch(monkeypatch):
    """Modules from which pickle can name PyTorch's globals."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    for name in pretrained.STORAGES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


class TorchPickler(pickle.Pickler):
    def __init__(self, file, legacy):
        super().__init__(file, protocol=2)
        self.legacy, self.storages = legacy, {}

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        self.storages.setdefault(id(value), value)
        key = str(list(self.storages).index(id(value)))
        kind = getattr(sys.modules["torch"], value.kind)
        view = (None,) if self.legacy else ()
        return ("storage", kind, key, "cpu", value.data.size, *view)


def write_legacy(path, value):
    with path.open("wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        pickler = TorchPickler(file, legacy=True)
        pickler.dump(value)
        storages = list(pickler.storages.values())
        order = list(range(len(storages)))[::-1]  # the list of keys says which comes when
        pickle.dump([str(i) for i in order], file, protocol=2)
        for i in order:
            file.write(storages[i].data.size.to_bytes(8, "little") + storages[i].data.tobytes())


def write_zip(path, value):
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("model/data.pkl", "w") as file:
            pickler = TorchPickler(file, legacy=False)
            pickler.dump(value)
        for i, storage in enumerate(pickler.storages.values()):
            archive.writestr(f"model/data/{i}", storage.data.tobytes())
        archive.writestr("model/version", "3\n")


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


def tensors() -> collections.OrderedDict:
    """Every kind of number, a transposed view, two views of one storage, a scalar, a parameter."""
    data = np.random.default_rng(0).normal(size=24) * 50
    kinds = {kind: Storage(kind, data.astype(dtype)) for kind, dtype in pretrained.STORAGES.items()}
    state = collections.OrderedDict(
        (kind, Tensor(storage, 0, (2, 3, 4), (12, 4, 1))) for kind, storage in kinds.items()
    )
    shared = kinds["FloatStorage"]
    state["transposed"] = Tensor(shared, 0, (4, 6), (1, 4))
    state["behind"] = Tensor(shared, 5, (3, 2), (4, 2))
    state["scalar"] = Tensor(shared, 23, (), ())
    state["repeated"] = Tensor(shared, 2, (3, 2), (0, 1))
    state["parameter"] = Tensor(shared, 1, (3,), (2,), parameter=True)
    state._metadata = collections.OrderedDict([("", {"version": 1})])
    return state


@WRITERS
@pytest.mark.parametrize("wrapped", ["", "state_dict", "model"])
def test_pytorch_files(tmp_path, fake_torch, write, wrapped):
    state = tensors()
    value = state
    if wrapped:
        value = {"epoch": 3, wrapped: {f"module.{k}": v for k, v in state.items()}}
    write(tmp_path / "a.pth", value)
    arrays = pretrained.read_arrays(tmp_path / "a.pth")
    assert list(arrays) == list(state)
    for name, tensor in state.items():
        expected = tensor.numpy()
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[name], expected)


@WRITERS
def test_tensors_under_other_keys_are_not_a_wrong_network(tmp_path, fake_torch, write):
    write(tmp_path / "a.pth", {"student": tensors(), "state_dict": None, "epoch": 3})
    with pytest.raises(UserError, match=r"no tensors, but student, state_dict, epoch: save a st"):
        pretrained.read_arrays(tmp_path / "a.pth")


def test_all_formats_agree(tmp_path, fake_torch):
    values = {
        "a.weight": np.random.default_rng(0).normal(size=(3, 2, 1, 2)).astype(np.float32),
        "a.bias": np.arange(3).astype(ml_dtypes.bfloat16),
        "b.weight": np.arange(4, dtype=np.float16).reshape(2, 2),
        "b.count": np.array(5),
    }
    kinds = {np.dtype(dtype): kind for kind, dtype in pretrained.STORAGES.items()}
    state = {
        name: Tensor(
            Storage(kinds[x.dtype], x.ravel()),
            0,
            x.shape,
            tuple(s // x.itemsize for s in x.strides),
        )
        for name, x in values.items()
    }
    write_zip(tmp_path / "zip.pth", state)
    write_legacy(tmp_path / "legacy.pt", state)
    safetensors.numpy.save_file(values, tmp_path / "a.safetensors")
    as_float32 = {k: v.astype(np.float32) for k, v in values.items()}  # .npz has no bfloat16
    np.savez(tmp_path / "a.npz", **as_float32)
    for name in ("zip.pth", "legacy.pt", "a.safetensors", "a.npz"):
        arrays = pretrained.read_arrays(tmp_path / name)
        assert set(arrays) == set(values)
        for key, expected in as_float32.items():
            np.testing.assert_array_equal(arrays[key].astype(np.float32), expected, err_msg=name)


@pytest.mark.parametrize("suffix", ["zip.pth", "legacy.pth", "safetensors", "npz"])
def test_truncated_files(tmp_path, fake_torch, suffix):
    path = tmp_path / f"whole.{suffix}"
    values = {"a": np.arange(100, dtype=np.float32), "b": np.ones((3, 4), np.float32)}
    state = {
        name: Tensor(Storage("FloatStorage", x.ravel()), 0, (x.size,), (1,))
        for name, x in values.items()
    }
    if suffix == "safetensors":
        safetensors.numpy.save_file(values, path)
    elif suffix == "npz":
        np.savez(path, **values)
    else:
        (write_zip if suffix == "zip.pth" else write_legacy)(path, state)
    assert set(pretrained.read_arrays(path)) == {"a", "b"}
    whole = path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for size in [0, 1, 4, *range(20, len(whole), 37), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"cut.{suffix}: damaged") as caught:
            pretrained.read_arrays(cut)
        assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@WRITERS
def test_code_is_refused_and_does_not_run(tmp_path, fake_torch, write):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # the attack is a real one
    marker.rmdir()
    write(tmp_path / "evil.pth", {"state_dict": tensors(), "optimizer": Evil(marker)})
    with pytest.raises(UserError, match=r"evil.pth: refused.*mkdir"):
        pretrained.read_arrays(tmp_path / "evil.pth")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "torch load", "collections namedtuple",
             "torch.storage _load_from_bytes", "numpy.core.multiarray scalar"]
)  # fmt: skip
def test_any_other_global_is_refused(tmp_path, name):
    module, function = name.split()
    pickled = f"c{module}\n{function}\n.".encode()
    assert [op.name for op, *_ in pickletools.genops(pickled)] == ["GLOBAL", "STOP"]
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickled)
    with pytest.raises(UserError, match=f"refused.*{module}.{function}"):
        pretrained.read_arrays(tmp_path / "a.pth")


@WRITERS
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(1, (24,), (1,)), (0, (5, 6), (6, 1)), (-1, (2,), (1,)), (5, (2,), (-1,)), (0, (2, 2), (1,))],
)
def test_tensors_outside_of_their_storage(tmp_path, fake_torch, write, offset, shape, stride):
    storage = Storage("FloatStorage", np.zeros(24, np.float32))
    write(tmp_path / "a.pth", {"a": Tensor(storage, offset, shape, stride)})
    with pytest.raises(UserError, match="damaged"):
        pretrained.read_arrays(tmp_path / "a.pth")


def test_npz_of_objects_is_refused(tmp_path):
    marker = tmp_path / "marker"
    np.savez(tmp_path / "a.npz", a=np.array([Evil(marker)], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        pretrained.read_arrays(tmp_path / "a.npz")
    assert not marker.exists()


def test_real_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = collections.OrderedDict(
        a=base.T, b=base[1:, ::2], c=torch.nn.Parameter(base[0]), d=torch.tensor(3),
        e=base.to(torch.bfloat16), f=base.half(), g=base.double(), h=base > 3,
    )  # fmt: skip
    for is_zip in (True, False):
        path = tmp_path / f"{is_zip}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)
        arrays = pretrained.read_arrays(path)
        assert list(arrays) == list(state)
        for name, tensor in state.items():
            np.testing.assert_array_equal(
                arrays[name].astype(np.float64), np.array(tensor.tolist(), np.float64)
            )
