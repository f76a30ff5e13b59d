"""The blocks of a model as a decoding step passes them: what is read off their modules, and by which forward.

An attribute counts if the forward of its module names it. Others may stand there all the same, put there by somebody
or left over in a configuration, and have no part in what the model computes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN, GELUTanh, SiLUActivation

from bitsandbytes.backends.lowra.decoding import Attention, Norm

from ..nn.authors import names_in
from .coverage import check_attention
from .projections import Projections, Unsupported

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATION_OF = {nn.SiLU: "silu", SiLUActivation: "silu", GELUTanh: "gelu_tanh"}


@dataclasses.dataclass
class Layer:
    """One block: norms, projections, attention; the norms `after_…` are None but in Gemma 2."""

    before_attention: Norm
    query_key_value: Projections
    attention: Attention
    out: Projections
    after_attention: Norm | None
    before_feed_forward: Norm
    gate_up: Projections
    activation: str
    down: Projections
    after_feed_forward: Norm | None


class Reading:
    """Reads the blocks of one model."""

    def __init__(
        self,
        config: PreTrainedConfig,
        body: Any,
        group: Callable[..., Projections],
        rotary: tuple[torch.Tensor, torch.Tensor],
    ):
        """
        Args:
            config: of the model.
            body: class of the module that has the blocks.
            group: makes projections of a module and names of its layers.
            rotary: cosine and sine, see `Attention`.

        Raises:
            Unsupported: a function of somebody else computes attention.
        """
        check_attention(config)
        self._config: Any = config
        self._body, self._group = body, group
        self._cosine, self._sine = rotary

    def layer(self, number: int, block: Any) -> Layer:
        """Reads a block: of attributes those alone that its forwards name, since others have no part in what it does.

        Args:
            number: of the block.
        """
        attention, feed_forward = block.self_attn, block.mlp
        read, gates_read = names_in(type(attention).forward), names_in(type(feed_forward).forward)
        fused = "qkv_proj" in read
        names = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        gates = ("gate_up_proj",) if "gate_up_proj" in gates_read else ("gate_proj", "up_proj")
        if not getattr(attention, "is_causal", True):
            raise Unsupported("its attention is not causal")
        four_norms = "pre_feedforward_layernorm" in names_in(type(block).forward)
        norms = [getattr(attention, name) if name in read else None for name in ("q_norm", "k_norm")]
        after = block.post_attention_layernorm
        query_key_value = self._group(attention, names)
        heads, kv_heads = self._heads(attention, query_key_value.widths())
        return Layer(
            before_attention=norm_of(block.input_layernorm),
            query_key_value=query_key_value,
            attention=Attention(
                heads=heads,
                kv_heads=kv_heads,
                dim=attention.head_dim,
                scaling=attention.scaling,
                cosine=self._cosine,
                sine=self._sine,
                query_norm=None if norms[0] is None else norm_of(norms[0]),
                key_norm=None if norms[1] is None else norm_of(norms[1]),
                window=self._window(number, block, "sliding_window" in read),
                softcap=(attention.attn_logit_softcapping or 0.0) if "attn_logit_softcapping" in read else 0.0,
            ),
            out=self._group(attention, ("o_proj",)),
            after_attention=norm_of(after) if four_norms else None,
            before_feed_forward=norm_of(block.pre_feedforward_layernorm if four_norms else after),
            gate_up=self._group(feed_forward, gates),
            activation=self._activation(feed_forward),
            down=self._group(feed_forward, ("down_proj",)),
            after_feed_forward=norm_of(block.post_feedforward_layernorm) if four_norms else None,
        )

    def _heads(self, attention: Any, widths: list[int]) -> tuple[int, int]:
        """Query heads and key-value heads, as the forward finds them: by the widths of the projections.

        Raises:
            Unsupported: numbers that do not belong together, of which the model's forward makes what it can.
        """
        dim, config = attention.head_dim, self._config
        if len(widths) == 1:
            heads, kv_heads = config.num_attention_heads, attention.num_key_value_heads
            expected = [(heads + 2 * kv_heads) * dim]
        else:
            heads, kv_heads = widths[0] // dim, widths[1] // dim
            expected = [heads * dim, kv_heads * dim, kv_heads * dim]
        if widths != expected or heads != kv_heads * attention.num_key_value_groups or self._cosine.shape[-1] > dim:
            raise Unsupported(f"{widths} outputs are not those of heads of {dim}")
        return heads, kv_heads

    def _window(self, number: int, block: Any, is_read: bool) -> int:
        """Slots that a token of a block sees; 0 for all. It is the body that makes masks.

        Args:
            number: of the block.
            is_read: its attention names a window, for kernels that take no mask.

        Raises:
            Unsupported: attention and mask differ.
        """
        config, read = self._config, names_in(self._body.forward)
        window = getattr(config, "sliding_window", None) or 0
        if "layer_types" in read or "attention_type" in read:
            kind = config.layer_types[number] if "layer_types" in read else block.attention_type
            if kind not in ("full_attention", "sliding_attention"):
                raise Unsupported(f"a layer's attention is {kind}")
            window = window if kind == "sliding_attention" else 0
        elif "sliding_window" not in read:
            if window or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
                raise Unsupported(
                    "its configuration has a window, of which its forward does not know but its cache does"
                )
        attention = block.self_attn
        own = getattr(attention, "sliding_window", None) if hasattr(attention, "sliding_window") else window
        if is_read and (own or 0) != window:
            raise Unsupported(f"a layer's attention has a window of {own} and its mask one of {window}")
        if window == 1:  # Transformers' cache keeps the last window - 1 tokens, and takes -0 of them for all
            raise Unsupported("its cache keeps all tokens where its mask has a window of one")
        return window

    def _activation(self, feed_forward: Any) -> str:
        """
        Raises:
            Unsupported: one that this path does not know.
        """
        own = getattr(feed_forward, "act_fn", getattr(feed_forward, "activation_fn", None))
        if own is not None:
            if type(own) not in _ACTIVATION_OF:
                raise Unsupported(f"its activation is {type(own).__name__}")
            return _ACTIVATION_OF[type(own)]
        name = getattr(self._config, "hidden_activation", None) or self._config.hidden_act
        if name not in _ACTIVATIONS or _ACTIVATION_OF.get(type(ACT2FN[name])) != _ACTIVATIONS[name]:
            raise Unsupported(f"its activation is {name}")
        return _ACTIVATIONS[name]


def norm_of(module: Any) -> Norm:
    """
    Raises:
        Unsupported: another norm than of the root mean square, or weights that are made for each use.
    """
    name = type(module).__name__
    if not name.endswith("RMSNorm"):
        raise Unsupported(f"it normalises by {name}")
    epsilon = getattr(module, "variance_epsilon", None)
    epsilon = getattr(module, "eps", None) if epsilon is None else epsilon
    weight = module.weight
    if weight is None or epsilon is None:
        raise Unsupported(f"its {name} has no weights or no epsilon of its own")
    if weight is not module.weight:
        raise Unsupported(f"the weights of its {name} are computed, by a parametrization")
    return Norm(weight, epsilon, one_plus=name.startswith("Gemma"))
