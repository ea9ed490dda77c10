"""Export, execution and measurement of trained networks. Needs torch only to read a ``model.pt``."""
