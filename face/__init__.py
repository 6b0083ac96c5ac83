"""An executable specification of large-transformer inference, with its fast twins beside it."""
