"""What passes through linear layers: means of their inputs and of the gradients at their outputs."""

import functools

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Collector:
    """Hooks that reduce inputs and output gradients on the fly; nothing of size tokens stays alive."""

    def __init__(self, modules: dict[str, nn.Module], moments: bool):
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.moments: dict[str, torch.Tensor] = {}
        self._with_moments = moments
        self._tokens: dict[str, int] = {}
        self._gradient_tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(functools.partial(self._on_input, name)))
            self._handles.append(module.register_forward_hook(functools.partial(self._on_output, name)))

    def _on_input(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        _add(self.inputs, name, x.square().sum(dim=0))
        if self._with_moments:
            _add(self.moments, name, x.T @ x)
        self._tokens[name] = self._tokens.get(name, 0) + x.shape[0]

    def _on_output(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        # of the tensor: a backward hook of the module would forbid what Falcon does, to add to an output in place
        if out.requires_grad:
            out.register_hook(functools.partial(self._on_gradient, name))

    def _on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        _add(self.gradients, name, gradient.square().sum(dim=0))
        self._gradient_tokens[name] = self._gradient_tokens.get(name, 0) + gradient.shape[0]

    def check_gradients(self) -> None:
        """
        Raises:
            ValueError: a layer has run and the loss does not depend on it by a gradient, as where tokens are selected.
        """
        without = [name for name in self._tokens if name not in self.gradients]
        if without:
            raise ValueError(
                f"No gradient comes to {', '.join(without[:3])}: a calibration cannot tell what an error costs there. "
                "Leave such layers dense (modules_to_not_convert, --keep-dense), or quantise without a calibration."
            )

    def means(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Of squared inputs [K], squared gradients [N] and x x^T [K, K], on the CPU; the hooks are removed.

        Raises:
            ValueError: no layer saw a token.
        """
        for handle in self._handles:
            handle.remove()
        if not self._tokens:
            raise ValueError("The calibration text reached none of the layers that are to be packed.")
        return (
            {name: (total / self._tokens[name]).cpu() for name, total in self.inputs.items()},
            {name: (total / self._gradient_tokens[name]).cpu() for name, total in self.gradients.items()},
            {name: (total / self._tokens[name]).cpu() for name, total in self.moments.items()},
        )


def _add(totals: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    if name in totals:
        totals[name] += value
    else:
        totals[name] = value
