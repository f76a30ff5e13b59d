"""Packed adapters: what is held in memory, and the folder they are written to and read from.

A packed folder holds three files, and a fourth where levels and scales of the base were trained with the adapter:

    adapter_config.json          PEFT's configuration, as trained
    lowra_adapter.safetensors    flat tensors of the codes; form, bits and layer shapes in the metadata
    lowra_adapter.json           the label (see labels.py)
    tables.safetensors           these tables, as they were trained

and, for JD-Diagonal, `shared_basis.safetensors` one folder up. A folder is written under another name beside its place
and renamed, so a killed process leaves no half-written adapter.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import torch

from ..checkpoints.atomic import save_json, save_tensors
from ..checkpoints.guarded import parse_json, read_json, read_tensors
from ..checkpoints.places import expanded
from ..checkpoints.records import TABLES_FILE
from .formats import FORMS, DiagonalCodes, Fields, LayerCodes, LayerLayout, Sizes
from .source import CONFIG_FILE, LoraAdapter

FORMAT = 1
PACKED_FILE = "lowra_adapter.safetensors"
LABEL_FILE = "lowra_adapter.json"
SHARED_FILE = "shared_basis.safetensors"
_HEADER = "lowra_adapter"
_KEPT = "kept."  # prefix of tensors stored as they were trained


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def digest(header: str, config: dict, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the layout, the PEFT configuration and every tensor's name, type, shape and bytes."""
    hasher = hashlib.sha256(header.encode())
    hasher.update(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


@dataclasses.dataclass
class SharedBasis:
    """Factors that `adapters` JD-Diagonal adapters share: one copy in memory and on disk, counted in equal parts."""

    tensors: dict[str, torch.Tensor]
    adapters: int

    @property
    def sha256(self) -> str:
        return digest(str(self.adapters), {}, self.tensors)


@dataclasses.dataclass
class PackedAdapter:
    """A quantised adapter in packed form; decoding makes new tensors and leaves this one as it is."""

    method: str
    form: str
    bits: int
    layers: list[LayerLayout]
    tensors: dict[str, torch.Tensor]
    config: dict
    label: dict = dataclasses.field(default_factory=dict)
    shared: SharedBasis | None = None
    # trained levels and scales of the packed base
    tables: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Numbers of the trained adapter that the file stands for."""
        kept = sum(tensor.numel() for name, tensor in self.tensors.items() if name.startswith(_KEPT))
        return sum(layer.parameters for layer in self.layers) + kept

    @property
    def tensor_bytes(self) -> int:
        """Bytes of everything stored for this adapter alone, kept tensors included."""
        return tensor_bytes(self.tensors)

    @property
    def table_bytes(self) -> int:
        """Bytes of the trained tables beside the factors, which are not packed; 0 without any."""
        return tensor_bytes(self.tables)

    @property
    def average_bits(self) -> float:
        """AvgBits: 8 x stored bytes / parameters (Equation 10), with this adapter's part of a shared basis."""
        part = tensor_bytes(self.shared.tensors) / self.shared.adapters if self.shared else 0
        return 8 * (self.tensor_bytes + part) / self.parameters

    @property
    def header(self) -> str:
        """Metadata of the packed file, as JSON."""
        content = {"format": FORMAT, "method": self.method, "form": self.form, "bits": self.bits, "layers": self.layers}
        if self.shared:
            content["shared_sha256"] = self.shared.sha256
        return json.dumps(content, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        tables = {f"{TABLES_FILE} {name}": tensor for name, tensor in self.tables.items()}
        return digest(self.header, self.config, self.tensors | tables)

    def layer_codes(self) -> Iterator[tuple[LayerLayout, LayerCodes]]:
        """Unpacks one layer after the other."""
        form = FORMS[self.form]
        position: dict[str, int] = {}
        for layer in self.layers:
            fields = {}
            for source, sizes in self._fields(layer):
                for name, (_, pieces) in sizes.items():
                    start = position.get(name, 0)
                    position[name] = start + sum(pieces)
                    fields[name] = source[name][start : position[name]]
            yield layer, form.unpack(fields, layer, self.bits)

    def dequantize(self) -> dict[str, torch.Tensor]:
        """Factors under PEFT's keys, A [r, n] and B [m, r] float32, and the kept tensors."""
        state = {name.removeprefix(_KEPT): t for name, t in self.tensors.items() if name.startswith(_KEPT)}
        for layer, codes in self.layer_codes():
            state.update(factor_state(layer, codes))
        return state

    def check(self, source: str) -> None:
        """Raises ValueError unless every field has the type and length that the layout asks for."""
        expected: dict[str, tuple[torch.dtype, int]] = {}
        for layer in self.layers:
            for _, sizes in self._fields(layer):
                for name, (dtype, pieces) in sizes.items():
                    expected[name] = (dtype, expected.get(name, (dtype, 0))[1] + sum(pieces))
        found = dict(self.tensors) | (self.shared.tensors if self.shared else {})
        for name, (dtype, count) in expected.items():
            tensor = found.get(name)
            came = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            if tensor is None or tensor.dtype != dtype or tensor.shape != (count,):
                raise ValueError(
                    f"{source}: tensor {name} should be {dtype} [{count}] for its {len(self.layers)} layers; came "
                    f"{came}. The file does not belong to its layout: pack the adapter again."
                )

    def _fields(self, layer: LayerLayout) -> Iterator[tuple[Fields, Sizes]]:
        yield self.tensors, FORMS[self.form].sizes(layer, self.bits)
        if self.shared:
            yield self.shared.tensors, DiagonalCodes.shared_sizes(layer)


def factor_state(layer: LayerLayout, codes: LayerCodes) -> dict[str, torch.Tensor]:
    """The two factors that a layer's codes stand for, under PEFT's keys, float32."""
    b, a = codes.rows()
    missing = layer.rank - layer.stored
    if missing:
        b, a = (torch.nn.functional.pad(rows, (0, 0, 0, missing)) for rows in (b, a))
    a = a.contiguous()
    if layer.embedding:
        return {f"{layer.name}.lora_embedding_A": a, f"{layer.name}.lora_embedding_B": b.mT.contiguous()}
    return {f"{layer.name}.lora_A.weight": a, f"{layer.name}.lora_B.weight": b.mT.contiguous()}


def pack(
    adapter: LoraAdapter, method: str, form: str, bits: int, coded: Sequence[tuple[LayerLayout, LayerCodes]]
) -> PackedAdapter:
    """Pack the codes of all layers of an adapter; for JD-Diagonal the caller sets `shared` afterwards."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for _, codes in coded:
        for name, tensor in codes.pack(bits).items():
            pieces.setdefault(name, []).append(tensor)
    tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
    tensors |= {_KEPT + name: tensor for name, tensor in adapter.kept.items()}
    layouts = [layer for layer, _ in coded]
    return PackedAdapter(method, form, bits, layouts, tensors, adapter.config, tables=adapter.tables)


def write_packed(folder: pathlib.Path, packed: PackedAdapter) -> None:
    """Writes one packed adapter into an existing folder; its label gets the hash of what is written."""
    packed.label["sha256"] = packed.sha256
    save_tensors(packed.tensors, folder / PACKED_FILE, {_HEADER: packed.header})
    if packed.tables:
        save_tensors(packed.tables, folder / TABLES_FILE)
    for name, content in ((CONFIG_FILE, packed.config), (LABEL_FILE, packed.label)):
        save_json(content, folder / name)


def write_shared(folder: pathlib.Path, shared: SharedBasis) -> None:
    """Writes the basis of JD-Diagonal adapters into the folder above theirs."""
    save_tensors(shared.tensors, folder / SHARED_FILE, {"adapters": str(shared.adapters)})


def read_shared(folder: pathlib.Path) -> SharedBasis:
    """Reads the basis of JD-Diagonal adapters from the folder above theirs."""
    path = folder / SHARED_FILE
    tensors, metadata = read_tensors(path, "the basis that these JD-Diagonal adapters share")
    adapters = metadata.get("adapters", "")
    if not adapters.isdecimal() or int(adapters) == 0:
        raise ValueError(f"{path} says it is shared by {adapters!r} adapters; expected a positive number.")
    return SharedBasis(tensors, int(adapters))


def read_packed(folder: str | pathlib.Path, shared: SharedBasis | None = None) -> PackedAdapter:
    """Reads a packed adapter into memory, packed. Hash, base and retirement are checked by `labels`, not here.

    Args:
        folder: what `lowra adapter quantize` wrote.
        shared: the basis already in memory, for a JD-Diagonal adapter; read from the folder above if not given.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a cut file, another format, or tensors that do not fit the layout.
    """
    folder = expanded(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is no packed adapter: there is no such folder.")
    if not (folder / PACKED_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {PACKED_FILE}; expected a folder written by `lowra adapter quantize`. A PEFT adapter "
            "has to be quantised first; of JD-Diagonal output give one of the folders inside."
        )
    config = read_json(folder / CONFIG_FILE, "the PEFT configuration of a packed adapter")
    label = read_json(folder / LABEL_FILE, "the label of a packed adapter")
    for name in ("base", "evaluation"):
        if not isinstance(label.get(name) or {}, dict):
            raise ValueError(f"{folder / LABEL_FILE} is damaged: {name} is {label[name]!r}, expected a dictionary.")
    tensors, metadata = read_tensors(folder / PACKED_FILE, "a packed adapter")
    source = str(folder / PACKED_FILE)
    try:
        header = parse_json(metadata[_HEADER], source, "the layout of a packed adapter")
        version, form, bits = header["format"], header["form"], header["bits"]
        layers = [LayerLayout(sys.intern(name), *rest) for name, *rest in header["layers"]]
        method = header["method"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has no readable layout ({error!r}); expected a file of this program.") from error
    if version != FORMAT or form not in FORMS:
        raise ValueError(
            f"{source} has format {version!r}, form {form!r}; this version reads format {FORMAT} with {sorted(FORMS)}. "
            "Update lowra."
        )
    if form == "diagonal":
        shared = shared or read_shared(folder.parent)
        if shared.sha256 != header.get("shared_sha256"):
            raise ValueError(
                f"{folder.parent / SHARED_FILE} is not the basis that {source} was packed with (sha256 "
                f"{shared.sha256[:12]}, expected {str(header.get('shared_sha256'))[:12]}). Put the original file back."
            )
    shared = shared if form == "diagonal" else None
    tables = read_tensors(folder / TABLES_FILE, "trained tables")[0] if (folder / TABLES_FILE).exists() else {}
    packed = PackedAdapter(method, form, bits, layers, tensors, config, label, shared, tables)
    packed.check(source)
    return packed
