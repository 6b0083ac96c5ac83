"""How it is computed, readable: one file for each component, eager, in any float dtype."""
