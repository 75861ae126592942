"""Prototypical Residual Networks (CVPR 2023) for anomaly detection, in JAX and Flax."""

__version__ = "0.1.0"


def load(checkpoint, step=None, white_level=None):
    """Loads a trained network: `maps, scores = prn_jax.load("runs/mvtec/bottle")(images)`.

    See `prn_jax.predict.load`.
    """
    from prn_jax import predict

    return predict.load(checkpoint, step, white_level)
