"""Beyond memory: a model's prepared layers on a disk, streamed through a few buffers while they are computed with."""
