"""What each part of PRN is worth: a table of ablations, by one command.

python launch/study.py --config=configs/mvtec.py --ablations --categories=bottle,pill --workdir=...
"""

from absl import logging
from ml_collections import ConfigDict

from prn_jax.errors import UserError
from prn_jax.fields import spares_prototypes

_KINDS = ("seen", "extended", "simulated")


def variations(config: ConfigDict) -> dict[str, dict[str, str]]:
    """By name, the fields that leave out one part, as a command line sets them.

    Args:
      config: of the whole network. Slots of anomalies of one kind go to the other kinds. What it
        does without already, or would have no anomalies without, has no variation.

    Raises:
      UserError: nothing is trained.
    """
    if config.total_steps == 0:
        raise UserError("--ablations: with total_steps=0 no part is trained")
    without_prototypes = config.prototypes.enabled and spares_prototypes(config.memory)
    # Without seen anomalies all slots are simulated ones.
    kinds = [kind for kind in _KINDS if config.num_seen and config.sampling[kind]]
    fields = {
        "prototypes": {"prototypes.enabled": "False"} if without_prototypes else None,
        "attention": {"attention.layers": "0"} if config.attention.layers else None,
        "fusion": {"fusion.enabled": "False"} if config.fusion.enabled else None,
        **{
            kind: _without(config, kind) if kind in kinds and len(kinds) > 1 else None
            for kind in ("extended", "simulated", "seen")
        },
    }
    if unused := [part for part, field in fields.items() if field is None]:
        logging.warning("not part of this configuration, or all there is: %s", ", ".join(unused))
    return {"PRN": {}} | {f"without {part}": field for part, field in fields.items() if field}


def _without(config: ConfigDict, kind: str) -> dict[str, str]:
    kept = {x: config.sampling[x] for x in _KINDS if x != kind}
    factor = 1.0 + config.sampling[kind] / sum(kept.values())
    shares = {name: share * factor for name, share in kept.items()} | {kind: 0.0}
    return {f"sampling.{name}": repr(share) for name, share in shares.items()}
