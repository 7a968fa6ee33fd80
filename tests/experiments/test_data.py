"""Loaders on tiny generated folders in the public layouts, and on damaged ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import culpa
from culpa.experiments.data import cifar10 as cifar
from culpa.experiments.data import digits as mnist
from culpa.experiments.data.download import fetch
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.data.pickles import read_plain_pickle

RANDOM = np.random.default_rng(0)
IMAGES, TEST = (RANDOM.integers(0, 256, (n, 28, 28), np.uint8) for n in (6, 4))
LABELS, ANSWERS = np.arange(6, dtype=np.uint8), np.arange(4, dtype=np.uint8)
COLOURS = RANDOM.integers(0, 256, (10, 3072), np.uint8)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def raw_mnist(root: Path, zipped: bool) -> Path:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    arrays = (IMAGES, LABELS, TEST, ANSWERS)
    for name, array in zip(mnist.FILES, arrays, strict=True):
        content = idx(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def same_as_made(found: mnist.Digits) -> None:
    assert torch.equal(found.images[:, 0], torch.from_numpy(IMAGES.copy()).float() / 255)
    assert torch.equal(found.test_images[:, 0], torch.from_numpy(TEST.copy()).float() / 255)
    assert found.labels.tolist() == LABELS.tolist()
    assert found.test_labels.tolist() == ANSWERS.tolist()
    assert not found.stand_in


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_as_torchvision_keeps_it(tmp_path: Path, zipped: bool) -> None:
    raw_mnist(tmp_path, zipped)
    same_as_made(mnist.digits(DataFolder((tmp_path,)), required=True))


def test_mnist_packed_and_from_the_second_folder(tmp_path: Path) -> None:
    arrays = {"x_train": IMAGES, "y_train": LABELS, "x_test": TEST, "y_test": ANSWERS}
    np.savez(tmp_path / "mnist.npz", **arrays)
    same_as_made(mnist.digits(DataFolder((tmp_path / "nothing", tmp_path)), required=True))


def test_absent_mnist_is_told_where_it_is_required_and_replaced_where_not(tmp_path: Path) -> None:
    nothing = DataFolder((tmp_path,))
    with pytest.raises(culpa.OptionError, match=rf"(?s){tmp_path}.*MNIST/raw.*--download.*--data"):
        mnist.digits(nothing, required=True)
    found = mnist.digits(nothing, required=False)
    assert "scikit-learn" in found.stand_in
    assert found.images.shape == (1400, 1, 28, 28)
    assert 0 <= float(found.images.min()) < float(found.images.max()) <= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\x09\x01" + b"\0\0\0\1" + b"a", "no IDX file"),
        (b"\0\0\x08\x03" + b"\0\0\0\1", "announces"),
        (b"", "no IDX file"),
        (idx(IMAGES)[:-1], "announces"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    folder = raw_mnist(tmp_path, zipped=False)
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(culpa.IntegrityError, match=rf"train-images-idx3-ubyte.*{said}"):
        mnist.mnist(DataFolder((tmp_path,)))


def test_a_missing_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    folder = raw_mnist(tmp_path, zipped=True)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(culpa.IntegrityError, match=r"t10k-labels-idx1-ubyte.gz"):
        mnist.mnist(DataFolder((tmp_path,)))
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(culpa.OptionError, match="neither t10k-labels-idx1-ubyte nor"):
        mnist.mnist(DataFolder((tmp_path,)))


def test_the_folder_is_the_one_named_then_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CULPA_DATA", str(tmp_path))
    assert DataFolder.find().roots == (tmp_path,)
    with pytest.raises(culpa.OptionError, match="does not exist"):
        DataFolder.find(tmp_path / "no")
    assert DataFolder.find(tmp_path / "no", download=True).download
    monkeypatch.delenv("CULPA_DATA")
    assert DataFolder.find().roots[0] == Path("data")


def python_2_batch(pixels: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    """The bytes that Python 2's pickle, protocol 2, wrote for a batch of CIFAR-10."""
    data, shape = pixels.tobytes(), pixels.shape

    def number(n: int) -> bytes:
        return b"J" + struct.pack("<i", n)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R"
        b"(K\x01"
        + number(shape[0])
        + number(shape[1])
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", len(data)) + data + b"tb"
    )
    listed = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}q\x01(U\x06labels" + listed + b"U\x04data" + array + b"u."


def python_3_batch(pixels: np.ndarray[Any, Any], labels: list[int], protocol: int) -> bytes:
    return pickle.dumps({b"data": pixels, b"labels": labels, b"x": [None, True, (1,)]}, protocol)


def cifar_folder(root: Path, layout: str, write: Any) -> DataFolder:
    folder = root / layout
    folder.mkdir(parents=True)
    suffix = ".bin" if layout == cifar.BINARY else ""
    for at, name in enumerate((*cifar.TRAIN, "test_batch")):
        rows = COLOURS[at : at + 2]
        (folder / f"{name}{suffix}").write_bytes(write(rows, [at, 9 - at]))
    return DataFolder((root,))


def binary_batch(pixels: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    return b"".join(bytes([n]) + row.tobytes() for n, row in zip(labels, pixels, strict=True))


@pytest.mark.parametrize(
    ("layout", "write"),
    [
        (cifar.BINARY, binary_batch),
        (cifar.PYTHON, python_2_batch),
        *((cifar.PYTHON, lambda p, n, k=k: python_3_batch(p, n, k)) for k in (2, 3, 4)),
    ],
)
def test_cifar_in_its_published_layouts(tmp_path: Path, layout: str, write: Any) -> None:
    found = cifar.cifar10(cifar_folder(tmp_path, layout, write))
    assert found.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert found.test_labels.tolist() == [5, 4]
    expected = np.concatenate([COLOURS[i : i + 2] for i in range(5)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(found.images.numpy(), expected)
    assert np.array_equal(found.test_images.numpy(), COLOURS[5:7].reshape(-1, 3, 32, 32))
    some = cifar.cifar10(DataFolder((tmp_path,)), train=3, test=1)
    assert (len(some.images), len(some.test_labels)) == (3, 1)


def test_cifar_packed_as_jpeg(tmp_path: Path) -> None:
    grey = [np.full((32, 32, 3), level, np.uint8) for level in (10, 200, 90)]
    files = []
    for pixels in grey:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=95)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    offsets = np.cumsum([0, *(len(f) for f in files)])
    parts = {}
    for part in ("train", "test"):
        parts |= {f"jpeg_{part}": np.concatenate(files), f"offsets_{part}": offsets}
        parts[f"y_{part}"] = np.array([1, 2, 3], np.uint8)
    np.savez(tmp_path / "cifar10.npz", **parts)
    found = cifar.cifar10(DataFolder((tmp_path,)), test=2)
    assert found.images.shape == (3, 3, 32, 32)
    assert [int(image.float().mean().round()) for image in found.images] == [10, 200, 90]
    assert found.test_labels.tolist() == [1, 2]
    assert "re-encoded" in found.stand_in
    parts["jpeg_train"] = np.zeros_like(parts["jpeg_train"])
    np.savez(tmp_path / "cifar10.npz", **parts)
    with pytest.raises(culpa.IntegrityError, match="image 0 is no JPEG"):
        cifar.cifar10(DataFolder((tmp_path,)))


class Hostile:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit",))


def test_a_pickle_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    for protocol in range(6):
        file.write_bytes(pickle.dumps({b"data": Hostile(), b"labels": [1]}, protocol))
        with pytest.raises(culpa.IntegrityError, match="refused"):
            read_plain_pickle(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"garbage",
        python_2_batch(COLOURS[:2], [1, 2])[:-40],
        b"\x80\x02R.",
        b"]e.",
    ],
)
def test_a_damaged_pickle_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "batch"
    file.write_bytes(content)
    with pytest.raises(culpa.IntegrityError, match="batch"):
        read_plain_pickle(file)


def test_arrays_of_another_type_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    file.write_bytes(pickle.dumps(np.arange(4.0), 2))
    with pytest.raises(culpa.IntegrityError, match="unsigned bytes"):
        read_plain_pickle(file)


def test_damaged_and_absent_cifar_is_told(tmp_path: Path) -> None:
    with pytest.raises(culpa.OptionError, match=r"cifar-10-batches-bin, cifar-10-batches-py"):
        cifar.cifar10(DataFolder((tmp_path,)))
    data = cifar_folder(tmp_path, cifar.BINARY, binary_batch)
    first = tmp_path / cifar.BINARY / "data_batch_1.bin"
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(culpa.IntegrityError, match="no multiple of 3073"):
        cifar.cifar10(data)
    first.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(culpa.IntegrityError, match="outside of 0 to 9"):
        cifar.cifar10(data)
    first.unlink()
    with pytest.raises(culpa.OptionError, match=r"data_batch_1.bin is missing"):
        cifar.cifar10(data)


def test_a_download_is_checked_and_happens_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "published"
    made = cifar_folder(source, cifar.BINARY, binary_batch)
    archive = source / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made.roots[0] / cifar.BINARY, cifar.BINARY)
    monkeypatch.setattr(cifar, "ADDRESS", archive.as_uri())
    here = tmp_path / "here"
    with pytest.raises(culpa.IntegrityError, match="MD5"):
        cifar.cifar10(DataFolder((here,), download=True))
    assert not here.exists()
    monkeypatch.setattr(cifar, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(culpa.OptionError, match="--download"):
        cifar.cifar10(DataFolder((here,)))
    assert len(cifar.cifar10(DataFolder((here,), download=True)).images) == 10


def test_mnist_is_downloaded_from_the_mirror_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = raw_mnist(tmp_path / "published", zipped=True)
    files = {n: hashlib.md5((published / f"{n}.gz").read_bytes()).hexdigest() for n in mnist.FILES}
    monkeypatch.setattr(mnist, "FILES", files)
    mirrors = ((tmp_path / "gone").as_uri() + "/", published.as_uri() + "/")
    monkeypatch.setattr(mnist, "MIRRORS", mirrors)
    here = DataFolder((tmp_path / "here",), download=True)
    same_as_made(mnist.digits(here, required=False))
    with pytest.raises(culpa.OptionError, match=r"could not be downloaded: .*gone"):
        fetch(((tmp_path / "gone").as_uri(),), "", tmp_path / "file")
