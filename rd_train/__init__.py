"""Training of shortcut-free CNNs by residual distillation. Produces one file, ``model.pt``."""
