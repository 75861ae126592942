"""The configurations, in the package as `prn_jax.configs` (a link in a source tree)."""
