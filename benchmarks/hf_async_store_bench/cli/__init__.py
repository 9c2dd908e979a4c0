"""The commands that this package adds to `hf-async-store`; importing one is cheap."""
