"""How an anomaly is made: pure functions of TensorFlow ops, each a function of its seed.

`simulated` stands for anomalies never seen, `extended` enlarges the few seen ones (paper,
"anomaly generation strategies"); `perlin`, `textures`, `foreground` and `augment` serve them.
"""
