"""Other libraries running the same model. Not in the wheel: run from a checkout, with the extra `peers`."""
