"""Decoders: the bytes of one file to its normal form, with measurements. They run in child processes."""
