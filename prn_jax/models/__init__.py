"""The network of the paper's Fig. 3, one file per block."""
