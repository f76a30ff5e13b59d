"""How a model speaks: loading it with its adapter, and continuing text."""
