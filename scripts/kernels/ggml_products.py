"""Products by llama.cpp's kernels (ggml), called from its shared libraries by ctypes.

`pip install llama-cpp-python` brings the libraries in `llama_cpp/lib`; a build of llama.cpp's sources has them in
`build/bin`. Weights go where llama.cpp puts them when it loads a model: into its repacked layouts for this processor
where it has one for their type, into plain memory otherwise.
"""

import ctypes
import pathlib

import torch

# enum ggml_type of ggml.h
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q2_K": 10, "Q6_K": 14, "BF16": 30, "TQ2_0": 35}
_P, _L = ctypes.c_void_p, ctypes.c_int64


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The libraries of one folder, and a backend of so many threads."""

    def __init__(self, folder: str, threads: int):
        found = {}
        for name in ("ggml-base", "ggml-cpu"):
            path = pathlib.Path(folder) / f"lib{name}.so"
            if not path.exists():
                raise FileNotFoundError(f"{folder} has no {path.name}: give the folder of llama.cpp's libraries.")
            found[name] = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.base, self.cpu = found["ggml-base"], found["ggml-cpu"]
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph"):
            getattr(self.base, name).restype = _P
        self.base.ggml_init.argtypes = [_InitParams]
        self.base.ggml_new_tensor_2d.argtypes = [_P, ctypes.c_int, _L, _L]
        self.base.ggml_mul_mat.argtypes = [_P, _P, _P]
        self.base.ggml_new_graph.argtypes = [_P]
        self.base.ggml_build_forward_expand.argtypes = [_P, _P]
        self.base.ggml_backend_alloc_ctx_tensors_from_buft.restype = _P
        self.base.ggml_backend_alloc_ctx_tensors_from_buft.argtypes = [_P, _P]
        self.base.ggml_backend_tensor_set.argtypes = [_P, _P, ctypes.c_size_t, ctypes.c_size_t]
        self.base.ggml_backend_tensor_get.argtypes = [_P, _P, ctypes.c_size_t, ctypes.c_size_t]
        self.base.ggml_backend_graph_compute.argtypes = [_P, _P]
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.base.ggml_quantize_chunk.argtypes = [ctypes.c_int, _P, _P, _L, _L, _L, _P]
        self.base.ggml_row_size.restype = ctypes.c_size_t
        self.base.ggml_row_size.argtypes = [ctypes.c_int, _L]
        self.base.ggml_nbytes.restype = ctypes.c_size_t
        self.base.ggml_nbytes.argtypes = [_P]
        self.cpu.ggml_backend_cpu_init.restype = _P
        self.cpu.ggml_backend_cpu_set_n_threads.argtypes = [_P, ctypes.c_int]
        # of the C++ interface, which llama.cpp asks for by a registry
        self._repacked = self.cpu._Z35ggml_backend_cpu_repack_buffer_typev
        self._repacked.restype = _P
        self.base.ggml_backend_cpu_buffer_type.restype = _P
        # as ggml_repack_get_optimal_repack_type chooses on x86; a weight there without a layout ends the process
        self.repacked = {"Q4_0"} if self.cpu.ggml_cpu_has_avx2() else set()
        self.repacked |= {"Q2_K"} if self.cpu.ggml_cpu_has_avx512() else set()
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def quantized(self, kind: str, weight: torch.Tensor) -> torch.Tensor:
        """weight [N, K] in one of `TYPES`: uint8 [N, bytes of a row]."""
        rows, in_features = weight.shape
        size = self.base.ggml_row_size(TYPES[kind], in_features)
        part, wide = torch.empty(rows, size, dtype=torch.uint8), weight.float().contiguous()
        self.base.ggml_quantize_chunk(TYPES[kind], wide.data_ptr(), part.data_ptr(), 0, rows, in_features, None)
        return part

    def context(self) -> int:
        return self.base.ggml_init(_InitParams(1 << 20, None, True))


class GgmlProduct:
    """x [tokens, K] times a transposed weight [rows, K] that ggml quantised to one of `TYPES`.

    Attributes:
        bytes: of the weight.
    """

    def __init__(self, ggml: Ggml, kind: str, weight: torch.Tensor, rows: int, tokens: int):
        """
        Args:
            weight: [N, K], of which the rows repeat up to `rows`, a multiple of N: quantising takes ggml long.
        """
        given, in_features = weight.shape
        base = ggml.base
        self._ggml = ggml
        holds_weight, holds_rest = ggml.context(), ggml.context()
        tensor = base.ggml_new_tensor_2d(holds_weight, TYPES[kind], in_features, rows)
        plain = base.ggml_backend_cpu_buffer_type()
        base.ggml_backend_alloc_ctx_tensors_from_buft(
            holds_weight, ggml._repacked() if kind in ggml.repacked else plain
        )
        self.bytes = base.ggml_nbytes(tensor)
        coded = ggml.quantized(kind, weight).repeat(rows // given, 1)
        base.ggml_backend_tensor_set(tensor, coded.data_ptr(), 0, self.bytes)
        self._x = base.ggml_new_tensor_2d(holds_rest, TYPES["F32"], in_features, tokens)
        self._out = base.ggml_mul_mat(holds_rest, tensor, self._x)
        base.ggml_backend_alloc_ctx_tensors_from_buft(holds_rest, plain)
        self._graph = base.ggml_new_graph(holds_rest)
        base.ggml_build_forward_expand(self._graph, self._out)
        self._shape = tokens, rows

    def set_x(self, x: torch.Tensor) -> None:
        x = x.float().contiguous()
        self._ggml.base.ggml_backend_tensor_set(self._x, x.data_ptr(), 0, 4 * x.numel())

    def __call__(self) -> None:
        self._ggml.base.ggml_backend_graph_compute(self._ggml.backend, self._graph)

    def out(self) -> torch.Tensor:
        """[tokens, N] of the last call."""
        out = torch.empty(self._shape)
        self._ggml.base.ggml_backend_tensor_get(self._out, out.data_ptr(), 0, 4 * out.numel())
        return out
