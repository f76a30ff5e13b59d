"""What Transformers' Trainer goes through all modules and parameters of a model for at every step, done once for a run.

A 7B with adapters has 2,700 modules and 1,600 parameters: to put them in training mode, to take gradients away, to
count them and to list them takes the host some 20 ms a step, in which a GPU that works for 55 waits.
"""

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer


class FewerWalks(Trainer):
    """A Trainer whose model has the same modules, and the same parameters to train, all through a run.

    Only in a process of its own: several wrap the model in another, and FSDP puts other parameters in it.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        alone = self.accelerator.distributed_type == DistributedType.NO
        with _remembered(self) if alone else contextlib.nullcontext():
            return super().train(*args, **kwargs)


@contextlib.contextmanager
def _remembered(trainer: Trainer) -> Iterator[None]:
    """Within, the model knows which modules it has, which parameters have gradients, and how many there are."""
    model: Any = trainer.model
    accelerator: Any = trainer.accelerator
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attributes = list(map(vars, model.modules()))
    walk, clip = model.train, accelerator.clip_grad_norm_

    # Methods of the model: a copy's are those of the copy, which has the class's own done.
    def train(self: Any, mode: bool = True) -> torch.nn.Module:
        if self is not model:
            return type(self).train(self, mode)
        # to look is quick, and whoever evaluates may have put a part of the model in another mode
        if not all(own["training"] is mode for own in attributes):
            walk(mode)
        return model

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        if self is not model:
            return type(self).zero_grad(self, set_to_none)
        for parameter in trained:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()
        return None

    def num_parameters(self: Any, *args: Any, **kwargs: Any) -> int:
        return counted(*args, **kwargs) if self is model else type(self).num_parameters(self, *args, **kwargs)

    def clip_grad_norm(parameters: Iterable[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        return clip(trained, *args, **kwargs)

    remembered: list[Any] = [train, zero_grad]
    if hasattr(model, "num_parameters"):
        counted = functools.cache(model.num_parameters)
        remembered.append(num_parameters)
    vars(model).update({method.__name__: types.MethodType(method, model) for method in remembered})
    accelerator.clip_grad_norm_ = clip_grad_norm
    try:
        yield
    finally:
        for method in remembered:
            del vars(model)[method.__name__]
        del accelerator.clip_grad_norm_
