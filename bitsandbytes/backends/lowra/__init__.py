"""lowra backend of bitsandbytes: packed weights of mixed 1, 2 and 4 bits with a level table per output channel.

Upstream loads this package through its entry-point group `bitsandbytes.backends` at the end of `import bitsandbytes`.
Layers, importing downwards: `table_gradients` and `shared_tables` (ops of their own) -> `ops` (schemas, fake kernels,
autograd) -> `native_cpu` -> `native` (both ctypes), `reference` and `lloyd` (plain PyTorch, the specification),
`checks` -> `layout` (the packed format).
"""


def load() -> None:
    """Registers the ops. A missing native library never fails the import: the PyTorch reference serves instead."""
    from . import ops, shared_tables, table_gradients  # noqa: F401
