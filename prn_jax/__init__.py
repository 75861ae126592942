"""Prototypical Residual Networks (CVPR 2023) for anomaly detection, in JAX and Flax."""

__version__ = "0.1.0"
