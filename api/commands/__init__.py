"""The command line: `twinfer COMMAND ...`, one file for each command."""
