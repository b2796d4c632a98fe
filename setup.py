"""Build script: `adapters/` is installed as `gglspeedup.adapters`, `.cu` files travel as package data."""

from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "gglspeedup" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

cuda = ["cupy-cuda13x>=14", "numba-cuda[cu13]>=0.20"]
torch = ["torch>=2.1"]
tensorflow = ["tensorflow-cpu>=2.16"]
paddle = ["paddlepaddle>=3.0"]
jax = ["jax>=0.4.30", "optax"]
# TensorFlow is its default backend; GammaGL has no wheels for newer Pythons.
tensorlayerx = ["tensorlayerx>=0.5.8", 'gammagl>=0.4.0; python_version < "3.12"', *tensorflow]
pyg = [*torch, "torch-geometric>=2.5"]
metis = ["pymetis>=2025.2"]
mpi = ["mpi4py>=4", "mpich"]  # an MPI that pip installs; with another one, install mpi4py alone
lightning = [*pyg, "lightning>=2.2"]
demo = ["tqdm", "matplotlib", "scikit-learn", "scipy"]
setup(
    name="gglspeedup",
    version=version,
    description="Feeds graph neural networks: neighbour sampling and feature caching, on GPU or CPU",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["gglspeedup", *(f"gglspeedup.{part}" for part in ("kernels", "history", "distributed", "adapters"))],
    package_dir={"gglspeedup.adapters": "adapters"},
    package_data={"gglspeedup": ["py.typed"], "gglspeedup.kernels": ["*.cu", "*.cuh"]},
    install_requires=[
        "numpy>=1.26",
        "numba>=0.60",
        'tbb>=2021.6; platform_machine == "x86_64" or platform_machine == "AMD64"',
    ],
    extras_require={
        "cuda": cuda,
        "torch": torch,
        "tensorflow": tensorflow,
        "paddle": paddle,
        "tensorlayerx": tensorlayerx,
        "jax": jax,
        "pyg": pyg,
        "lightning": lightning,
        "metis": metis,
        "mpi": mpi,
        "demo": demo,
        "test": [
            *cuda, *lightning, *paddle, *tensorlayerx, *jax, *metis, *mpi, *demo,
            "pytest>=8", "pytest-xdist", "hypothesis", "mypy", "ruff", "psutil", "nvidia-cuda-nvdisasm>=13.2",
        ],
    },
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)  # fmt: skip
