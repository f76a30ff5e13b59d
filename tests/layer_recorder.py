"""A recorder without CUDA graphs, for machines without a GPU: it replays the operations it saw, on the same tensors.

As a graph does it knows nothing of Python: what the host decided when it was recorded stays decided.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitsandbytes.backends.lowra.checks import KnownOrders
from lowra.integrations import layer_graphs
from lowra.nn.captured import NotCapturable


def tensors_of(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Log(TorchDispatchMode):
    """Every operation with its arguments, what it gave, and which of that is a view of an argument."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        outs = [tensor.detach() for tensor in tensors_of(out)]
        views = [tensor.untyped_storage()._cdata in given for tensor in outs]
        self.operations.append((operation, args, kwargs, outs, views))
        return out


class Watch(TorchDispatchMode):
    """Ops on packed weights look at row orders that they do not know yet, for which a GPU has to be waited for."""

    def __init__(self):
        super().__init__()
        self._known = KnownOrders()
        self._may_wait = True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = dict(zip((argument.name for argument in operation._schema.arguments), args, strict=False))
        if operation.namespace == "bitsandbytes" and "rows_4bit" in given:
            order = given["row_order"], given["rows_4bit"], given["rows_2bit"]
            if self._known.what_was_found(*order) is None:
                if not self._may_wait:
                    raise NotCapturable("it looks at a row order that nothing before it has seen")
                self._known.keep(*order, True)
        return operation(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def without_waiting(self):
        self._may_wait = False
        try:
            yield
        finally:
            self._may_wait = True


class StandIn:
    """In the place of `lowra.nn.captured.Recorder`."""

    recorded = 0
    generator = torch.default_generator

    def __init__(self, device):
        self._watch = Watch()
        self.without_waiting = self._watch.without_waiting

    def check(self):
        pass

    def beside(self):
        return self._watch

    def without_chance(self):
        return contextlib.nullcontext()

    def record(self, call):
        StandIn.recorded += 1
        with Log() as log:
            call()

        def replay():
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch._C._AutoDispatchBelowAutograd():
                for operation, args, kwargs, outs, views in log.operations:
                    if outs and all(views) and not operation._schema.is_mutable:
                        continue  # a view needs no second look
                    found = tensors_of(operation(*args, **kwargs))
                    for place, value, view in zip(outs, found, views, strict=True):
                        if not view and place.numel():
                            place.copy_(value)

        return replay


def stand_in(patch):
    """Puts it in place.

    Args:
        patch: sets an attribute of an object, as `setattr` does.
    """
    StandIn.recorded = 0
    patch(layer_graphs, "Recorder", StandIn)
