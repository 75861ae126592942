"""What each part of PRN is worth: the paper's ablation table, by one command.

python launch/study.py --config=configs/mvtec.py --ablations --categories=bottle,pill --workdir=...
"""

from ml_collections import ConfigDict


def variations(config: ConfigDict) -> dict[str, dict[str, str]]:
    """By name, the fields that leave out one part, as a command line sets them.

    Args:
      config: of the whole network. Slots of anomalies of one kind go to the other kinds.
    """
    return {
        "PRN": {},
        "without prototypes": {"prototypes.enabled": "False"},
        "without attention": {"attention.layers": "0"},
        "without fusion": {"fusion.enabled": "False"},
        "without extended": _without(config, "extended"),
        "without simulated": _without(config, "simulated"),
        "without seen": _without(config, "seen"),
    }


def _without(config: ConfigDict, kind: str) -> dict[str, str]:
    kept = {x: config.sampling[x] for x in ("seen", "extended", "simulated") if x != kind}
    factor = 1.0 + config.sampling[kind] / sum(kept.values())
    shares = {name: share * factor for name, share in kept.items()} | {kind: 0.0}
    return {f"sampling.{name}": repr(share) for name, share in shares.items()}
