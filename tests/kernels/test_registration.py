"""The ops as PyTorch sees them: opcheck, capture into a CUDA graph, torch.compile, messages of bad arguments."""

import pytest
import torch
from cases import packed_case

OPS = torch.ops.bitsandbytes


@pytest.mark.parametrize("scales", [torch.float32, torch.uint8])
def test_opcheck(device, scales):
    case = packed_case(4, 8, 20, 256, scales=scales).to(device)
    check = torch.library.opcheck
    check(OPS.lowra_quantize.default, case.quantize_arguments)
    check(OPS.lowra_dequantize.default, case.dequantize_arguments(torch.bfloat16))
    *packed, dtype = case.dequantize_arguments(torch.bfloat16)
    check(OPS.lowra_dequantize_part.default, (*packed, 3, 20, 0, 100, dtype))
    check(OPS.lowra_encode_scales.default, (torch.rand(9, 40, device=device),))
    levels, cuts = torch.linspace(-1, 1, 22, device=device), torch.linspace(-1, 1, 19, device=device)
    check(OPS.lowra_lloyd_max.default, (case.weight, levels, cuts, None, 64, 2, True))
    for tokens, dtype in ((3, torch.bfloat16), (3, torch.float32), (20, torch.float16), (100, torch.bfloat16)):
        x = torch.randn(tokens, 256, device=device, dtype=dtype, requires_grad=True)
        bias = torch.zeros(32, device=device, dtype=dtype, requires_grad=True)
        check(OPS.lowra_linear.default, case.linear_arguments(x, bias))


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_compiles_without_a_graph_break(device, tokens):
    case = packed_case(4, 8, 20, 256).to(device)
    x = torch.randn(tokens, 256, device=device).bfloat16()

    def forward(x):
        return OPS.lowra_linear(*case.linear_arguments(x)) * 2

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), forward(x))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_captures_into_a_cuda_graph():
    case = packed_case(40, 80, 200, 1024, scales=torch.uint8).to("cuda")
    x = {tokens: torch.randn(tokens, 1024, device="cuda").bfloat16() for tokens in (1, 8, 64, 100)}

    def everything():
        products = [OPS.lowra_linear(*case.linear_arguments(value)) for value in x.values()]
        return *products, *OPS.lowra_quantize(*case.quantize_arguments)

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = everything()
    for value in x.values():
        value.copy_(torch.randn_like(value))
    graph.replay()
    for captured, eager in zip(out, everything(), strict=True):
        assert torch.equal(captured, eager)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_size": 12}, "group_size must be a multiple of 8"),
        ({"rows_4bit": 40}, "do not fit"),
        ({"codes": torch.zeros(3, dtype=torch.uint8)}, "codes must be"),
        ({"levels": torch.zeros(3, dtype=torch.float16)}, "levels must be"),
        ({"scale_steps": torch.zeros(1)}, "scales must be float32, float16 or"),
    ],
)
def test_bad_arguments_are_named(device, change, message):
    case = packed_case(4, 8, 20, 256)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(RuntimeError, match=message):
        OPS.lowra_dequantize(*case.to(device).dequantize_arguments(torch.float32))
