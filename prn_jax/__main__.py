"""`python -m prn_jax COMMAND` is `prn-jax COMMAND`."""

from prn_jax import cli

if __name__ == "__main__":
    cli.main()
