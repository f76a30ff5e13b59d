"""torch.func, forward-mode AD, second derivatives, compiled code and recomputation through packed layers.

Each gives the numbers of a dense layer with the same weight.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lowra import LowRAConfig
from lowra.nn.embedding import LowRAEmbedding
from lowra.nn.experts import LowRAExperts
from lowra.nn.linear import LowRALinear
from lowra.nn.shared_linear import SharedTablesLinear
from lowra.nn.trained_tables import TrainedTablesLinear
from lowra.quantization.learner import learn_codebook
from lowra.quantization.pack import quantize_matrix

N, K = 12, 40


def packed_weight():
    generator = torch.Generator().manual_seed(5)
    weight, config = torch.randn(N, K, generator=generator), LowRAConfig(bits=2, group_size=32)
    return quantize_matrix(
        weight, learn_codebook(weight, config), torch.tensor([4, 2, 1] * 4, dtype=torch.uint8), config
    )


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear_layer():
    layer = LowRALinear.from_packed(packed_weight(), numbers(N))
    return layer, layer.dequantize(), layer.bias.detach()


def lora_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear_layer()[0]

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    layer = get_peft_model(Model(), LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    layer = layer.base_model.model.layer
    change = layer.get_delta_weight("default").detach()
    return layer, layer.base_layer.dequantize() + change, layer.base_layer.bias.detach()


def tabled_layer():
    layer = TrainedTablesLinear(linear_layer()[0], scales=True)
    return layer, layer.dequantize(), layer.bias.detach()


def shared_layer():
    layer = SharedTablesLinear(linear_layer()[0], gains=True)
    return layer, layer.dequantize(), layer.bias.detach()


def expert_layer():
    packed = packed_weight()
    experts = LowRAExperts(2, K, N, packed.group_size, packed.tensors(), torch.float32)
    experts.prepare()
    weight, bias = experts.dequantize()[N // 2 :], numbers(N // 2)
    return (lambda x: nn.functional.linear(x, experts[1], bias)), weight, bias


LAYERS = {
    "linear": linear_layer, "lora": lora_layer, "tables": tabled_layer, "shared": shared_layer, "experts": expert_layer,
}  # fmt: skip


def with_dual(f, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def twice(f, x):
    given = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(given).pow(3).sum(), given, create_graph=True)
    return torch.autograd.grad(first.square().sum(), given, allow_unused=True)[0]


def once(f, x):
    given = x.clone().requires_grad_()
    return torch.autograd.grad(f(given).square().sum(), given)[0]


def recomputed(f, x, reentrant):
    given = x.clone().requires_grad_()
    out = checkpoint(f, given, use_reentrant=reentrant)
    out.square().sum().backward()
    return given.grad


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


TRANSFORMS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "dual numbers": with_dual,
    "linearize": lambda f, x, t: torch.func.linearize(f, x)[1](t),
    "vmap": lambda f, x, t: torch.func.vmap(f)(x),
    "vmap over columns": lambda f, x, t: torch.func.vmap(f, in_dims=1, out_dims=1)(x.t().contiguous().t()[None, :, :]),
    "grad": lambda f, x, t: torch.func.grad(lambda v: f(v).square().sum())(x),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](f(t))[0],
    "vmap of grad": lambda f, x, t: torch.func.vmap(torch.func.grad(lambda v: f(v).square().sum()))(x),
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, t: torch.func.hessian(lambda v: f(v).pow(3).sum())(x[:1]),
    "hessian vector product": lambda f, x, t: torch.autograd.functional.hvp(lambda v: f(v).pow(3).sum(), x, t)[1],
    "batched gradients": lambda f, x, t: torch.autograd.functional.jacobian(f, x[0], vectorize=True),
    "second derivative": lambda f, x, t: twice(f, x),
    "reentrant checkpoint": lambda f, x, t: recomputed(f, x, True),
    "checkpoint": lambda f, x, t: recomputed(f, x, False),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_dense_layer_gives(kind, transform):
    layer, weight, bias = LAYERS[kind]()
    x, t = numbers(3, K), numbers(K, 3).t().contiguous()
    found = TRANSFORMS[transform](layer, x, t)
    expected = TRANSFORMS[transform](lambda v: nn.functional.linear(v, weight, bias), x, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_compiled_whole(kind, transform):
    layer, weight, bias = LAYERS[kind]()
    x, t = numbers(3, K), numbers(3, K)
    if transform == "grad":
        found, expected = (once(f, x) for f in (compiled(layer), lambda v: nn.functional.linear(v, weight, bias)))
    else:
        found = compiled(lambda v: torch.func.jvp(layer, (v,), (t,))[1])(x)
        expected = nn.functional.linear(t, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
def test_under_autocast(kind, transform):
    layer, weight, bias = LAYERS[kind]()
    x, t = numbers(3, K), numbers(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        found = TRANSFORMS[transform](layer, x, t)
        expected = TRANSFORMS[transform](lambda v: nn.functional.linear(v, weight, bias), x, t)
    # to what vmap maps over, autocast does nothing in a dense layer
    assert found.dtype == (torch.bfloat16 if transform == "vmap" else expected.dtype)
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=3e-2, atol=3e-2 * float(expected.detach().abs().max())
    )


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_factors_are_differentiated_twice_and_forwards(name):
    layer, *_ = lora_layer()
    x = numbers(3, K)
    factor = getattr(layer, name)["default"].weight

    def packed(value):
        return torch.func.functional_call(layer, {f"{name}.default.weight": value}, (x,))

    def dense(value):
        a, b = (value if n == name else getattr(layer, n)["default"].weight.detach() for n in ("lora_A", "lora_B"))
        base = nn.functional.linear(x, layer.base_layer.dequantize(), layer.base_layer.bias)
        return base + layer.scaling["default"] * (x @ a.t() @ b.t())

    tangent = torch.ones_like(factor)
    for of in (
        lambda f: torch.func.jvp(f, (factor,), (tangent,))[1],
        lambda f: torch.func.hessian(lambda v: f(v).square().sum())(factor.detach()),
        lambda f: twice(f, factor.detach()),
    ):
        expected = of(dense).detach()
        torch.testing.assert_close(of(packed), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["level_change", "scale_change"])
def test_tables_are_differentiated_twice_and_forwards(name):
    """Against autograd through the dense weight that the tables make."""
    layer, *_ = tabled_layer()
    x, tangent = numbers(3, K), torch.ones_like(getattr(layer, name))
    plain = dict(layer.named_parameters())

    def packed(value):
        return torch.func.functional_call(layer, {name: value}, (x,))

    def slope(value, step):
        return (packed(value + step * tangent) - packed(value - step * tangent)) / (2 * step)

    start = torch.zeros_like(plain[name])
    along = torch.func.jvp(packed, (start,), (tangent,))[1]
    torch.testing.assert_close(along, slope(start, 0.25), rtol=1e-2, atol=1e-2)  # linear in both but for rounding
    given = start.clone().requires_grad_()
    (first,) = torch.autograd.grad(packed(given).square().sum(), given, create_graph=True)
    (second,) = torch.autograd.grad((first * tangent).sum(), given)
    hessian = torch.func.hessian(lambda v: packed(v).square().sum())(start)
    expected = torch.tensordot(hessian, tangent, dims=tangent.dim())
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (2, 20, K)])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_comes_out_can_be_written_into(kind, shape):
    layer, weight, bias = LAYERS[kind]()
    gradients = []
    for f in (layer, lambda v: nn.functional.linear(v, weight, bias)):
        x = numbers(*shape).requires_grad_()
        out = f(x)
        out += 1
        out[:1] *= 2
        out.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_ids_are_mapped_over():
    packed = packed_weight()
    table = LowRAEmbedding(K, N, packed.group_size, packed.tensors(), torch.float32)
    table.prepare()
    ids = torch.tensor([[0, 3, 11], [5, 5, 1]])
    dense = table.dequantize()
    for dim in (0, 1):
        found = torch.func.vmap(table, in_dims=dim)(ids)
        assert torch.equal(found, torch.func.vmap(lambda i: nn.functional.embedding(i, dense), in_dims=dim)(ids))
    assert torch.equal(compiled(table)(ids), dense[ids])
    table = table.half()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(table(ids), dense.half()[ids])
