"""Levels and group scales trained together with an adapter: the codes stay, what they stand for is learned.

LowRA, section 4.1: one set of thresholds, and so one set of codes, for all adapters, with levels for each task.

    parameters = train_tables(model, scales=True)  # a PeftModel on a packed base; by name, for a trainer's checkpoints
    ...                                            # any training loop
    bake_tables(model)                             # what was learned, in packed format 1: the kernels run as before
    model.save_pretrained("adapter")               # the tables beside it; the packed base itself is for all adapters
    PeftModel.from_pretrained(base, "adapter")     # with its tables; without PEFT: save_tables, load_tables
"""

import logging
import pathlib
import re

import torch
from torch import nn

from ..checkpoints.atomic import save_tensors
from ..checkpoints.guarded import read_tensors
from ..checkpoints.places import expanded
from ..checkpoints.records import CHANGES_FILE, TABLES_FILE, renew_record
from ..checkpoints.targets import replace_module
from ..weights.packed import TABLES
from .adapter_tables import AdapterTables, adapter_tables, base_name, hold_adapter_tables, packed_linears
from .linear import LowRALinear
from .shared_linear import SharedTablesLinear
from .tabled_linear import TabledLinear, TablesBeyondStorage, TrainedTablesLinear
from .tables_in_state import IN_TRAINING, check_part, codes_digest

logger = logging.getLogger(__name__)

_EXPECTED = "the trained tables of an adapter"


def train_tables(model: nn.Module, scales: bool = False, shared: bool = False) -> dict[str, nn.Parameter]:
    """Makes the tables of every packed linear layer trainable.

    What is trained are changes, float32 and zero at first. A learning rate near 4e-3 suits them, whatever the adapter's
    is (docs/lab/accuracy.md). On a model with adapters they are those of the active one: they count while it is active,
    and the base keeps its own. They are saved and loaded with it, so that a trainer resumes.

    Args:
        model: after the adapter has been put on it; changed in place.
        scales: each level for itself, and each group's scale as well; a number for every `group_size` weights, where
            levels are some for each channel. Without it and `shared`, levels alone.
        shared: changes that the levels of a channel, and the scales of a group of inputs, have in common: a shift and a
            gain for each channel, a gain for each group. A step takes little longer than with frozen tables. The last
            packed layer of each block, and one outside the blocks, has no gain of its levels: it takes an output that
            has to be kept, and theirs a checkpointed block does not compute again.

    Returns:
        the new parameters by name.

    Raises:
        ValueError: there is no packed linear layer, tables are trained already, several adapters are active, or both
            kinds are asked for.
    """
    if scales and shared:
        raise ValueError("scales=True trains each scale and shared=True those of a group together: give one of them.")
    layers = _packed_layers(model)
    if any(isinstance(layer, TabledLinear) for layer in layers.values()):
        raise ValueError("The tables of this model are being trained already: bake_tables ends that.")
    held = hold_adapter_tables(model)
    adapter = None if held is None else _only_active(held)
    if held is not None:
        held.in_training = adapter
    last = {_block_of(name): name for name in layers}
    for name, layer in layers.items():
        if shared:
            gains = _block_of(name) is not None and last[_block_of(name)] != name
            replace_module(model, name, SharedTablesLinear(layer, gains, adapter))
        else:
            replace_module(model, name, TrainedTablesLinear(layer, scales, adapter))
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in IN_TRAINING}


def _block_of(name: str) -> str | None:
    """The block that a layer belongs to, by its name, as "model.layers.3"; None for a head."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return None if found is None else found[1]


def bake_tables(model: nn.Module) -> None:
    """Puts plain packed layers with the trained levels and scales in the places of those that train them.

    Levels are rounded to float16 and scales to their storage, so outputs change by that rounding, once.

    Raises:
        ValueError: no tables are being trained, or they are no numbers any more; the model stays as it was.
    """
    trained = {n: layer for n, layer in _packed_layers(model).items() if isinstance(layer, TabledLinear)}
    if not trained:
        raise ValueError("No tables are being trained in this model: train_tables comes first.")
    adapter = next(iter(trained.values())).adapter
    tables = adapter_tables(model)
    if adapter is not None and tables is not None:
        tables.put(adapter, {base_name(name): layer.baked_tables() for name, layer in trained.items()})
    plain = {name: layer.baked() if adapter is None else layer.untrained() for name, layer in trained.items()}
    for name, layer in plain.items():
        replace_module(model, name, layer)
    if tables is not None:
        tables.in_training = None


def save_tables(model: nn.Module, folder: str | pathlib.Path, scales: bool = True) -> pathlib.Path:
    """Writes levels and, unless told otherwise, scales of all packed linear layers to `folder/tables.safetensors`.

    They are those that count now: of the active adapter, if it has any.

    Raises:
        ValueError: tables are still being trained.
    """
    tables = {}
    for name, layer in _packed_layers(model).items():
        if isinstance(layer, TabledLinear):
            raise ValueError("The tables of this model are still being trained: bake_tables comes before saving.")
        current = layer.current_tables()
        tables[base_name(name)] = current if scales else {"levels": current["levels"]}
    return _write(model, tables, expanded(folder))


def save_tables_of(model: nn.Module, adapter: str, folder: pathlib.Path) -> None:
    """Writes the tables of one adapter beside it; where it has none, it takes away those that an earlier one left.

    Those that are being trained are written as they are now, and their changes beside them: tables are rounded, and
    what optimiser states belong to are the changes. Those of the base, of which they are no part, are told.
    """
    held = adapter_tables(model)
    tables = {} if held is None else held.of_adapter(adapter)
    training = [layer for layer in packed_linears(model).values() if isinstance(layer, TabledLinear)]
    if training and training[0].adapter is None:
        logger.warning(
            "lowra: adapter %r is saved in %s without the levels and scales that are being trained: they are the "
            "base's, since train_tables came before the adapter, or its method has no layers. Outputs from this folder "
            "are others; bake_tables(model) and save the base too.",
            adapter,
            folder,
        )
    (folder / CHANGES_FILE).unlink(missing_ok=True)
    if training and training[0].adapter == adapter:
        tables = {layer.table_name: layer.baked_tables() for layer in training}
        save_tensors({name: p.detach().cpu() for name, p in _changes(model).items()}, folder / CHANGES_FILE)
    if tables:
        _write(model, tables, folder)
    else:
        (folder / TABLES_FILE).unlink(missing_ok=True)


def read_changes(model: nn.Module, path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Changes of tables that were being trained, from a file, as `put_changes` takes them.

    Raises:
        OSError, ValueError: a file that cannot be read; changes of others than the model trains.
    """
    stored = {
        base_name(name): tensor for name, tensor in read_tensors(path, "tables that were being trained")[0].items()
    }
    own = _changes(model)
    if {name: tensor.shape for name, tensor in stored.items()} != {name: p.shape for name, p in own.items()}:
        raise ValueError(
            f"{path} belongs to a run that trained other tables: go on with the same ones, or begin anew in another "
            "folder."
        )
    return stored


@torch.no_grad()
def put_changes(model: nn.Module, changes: dict[str, torch.Tensor]) -> None:
    """Goes on with changes from `read_changes`."""
    for name, parameter in _changes(model).items():
        parameter.copy_(changes[name])


def is_training_tables(model: nn.Module) -> bool:
    """Whether `train_tables` was called and `bake_tables` was not yet."""
    return any(isinstance(module, TabledLinear) for module in model.modules())


def have_storage(model: nn.Module) -> bool:
    """Whether tables that are being trained could be baked as they are now; so it is where none are."""
    try:
        for module in model.modules():
            if isinstance(module, TabledLinear):
                module.baked_tables()
    except TablesBeyondStorage:
        return False
    return True


def _changes(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `train_tables` made, by name in the base, with PEFT's wrappers or without."""
    return {base_name(name): p for name, p in model.named_parameters() if name.rpartition(".")[2] in IN_TRAINING}


def _write(model: nn.Module, tables: dict[str, dict[str, torch.Tensor]], folder: pathlib.Path) -> pathlib.Path:
    tensors = {}
    for name, layer in packed_linears(model).items():
        tensors[f"{name}.codes"] = codes_digest(name, layer.weight)
        own = tables.get(name, {})
        tensors.update({f"{name}.{part}": tensor.detach().cpu() for part, tensor in own.items()})
    save_tensors(tensors, folder / TABLES_FILE)
    renew_record(folder)
    return folder / TABLES_FILE


def load_tables(model: nn.Module, folder: str | pathlib.Path) -> None:
    """Puts the levels and scales of `folder/tables.safetensors` into the packed linear layers, all or none.

    On a model with adapters they are those of the active one, and the base keeps its own.

    Raises:
        FileNotFoundError, ValueError: no such file; the tables of other codes or layers than this model's; several
            adapters are active; tables are being trained.
    """
    if is_training_tables(model):
        raise ValueError("The tables of this model are being trained: load others after bake_tables, or before.")
    path = expanded(folder) / TABLES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: this adapter has no tables of its own.")
    tables = read_tables(model, path)
    held = hold_adapter_tables(model)
    if held is not None:
        held.put(_only_active(held), tables)
        return
    for name, layer in packed_linears(model).items():
        for part, tensor in tables[name].items():
            getattr(layer, part).data.copy_(tensor)
        layer.prepare()


def read_tables(model: nn.Module, path: pathlib.Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tables by layer and part from a file, as `AdapterTables.put` takes them.

    Raises:
        OSError, ValueError: a file that cannot be read; the tables of other codes or layers than this model's.
    """
    return check_tables(model, read_tensors(path, _EXPECTED)[0], str(path))


def check_tables(model: nn.Module, stored: dict[str, torch.Tensor], path: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a file of tables, by layer and part.

    Args:
        model: with packed layers, whose tables they are to be.
        stored: the content of the file.
        path: of the file, for messages.

    Raises:
        ValueError: the tables of other codes or layers than this model's, cut short or not finite.
    """
    layers = {base_name(name): layer for name, layer in _packed_layers(model).items()}
    tables: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
    for key, tensor in sorted(stored.items(), key=lambda item: not item[0].endswith(".codes")):
        name, _, part = key.rpartition(".")
        if name not in layers or part not in ("codes", *TABLES):
            raise ValueError(f"{path} holds {key}, which this model does not have: it belongs to another base.")
        layer = layers[name]
        if isinstance(layer, TabledLinear) and layer.adapter is None:  # which count whatever adapter is active
            raise ValueError("The tables of this model are being trained: load others after bake_tables, or before.")
        if part == "codes":
            if not torch.equal(tensor, codes_digest(name, layer.weight)):
                raise ValueError(
                    f"{path} belongs to other codes of {name} than this model has: load it on the packed base that the "
                    "adapter was trained on."
                )
            continue
        check_part(key, tensor, getattr(layer, part), path)
        tables[name][part] = tensor
    if missing := [name for name, parts in tables.items() if "levels" not in parts or f"{name}.codes" not in stored]:
        raise ValueError(f"{path} is cut short: it has no levels or no digest of {', '.join(missing[:3])}.")
    return tables


def _only_active(held: AdapterTables) -> str:
    active = held.active()
    if len(active) != 1:
        raise ValueError(
            f"Tables belong to one adapter, and active are {active}: make that one active first (set_adapter)."
        )
    return active[0]


def _packed_layers(model: nn.Module) -> dict[str, LowRALinear]:
    """The packed linear layers that have tables of their own, by their names in the model.

    Raises:
        ValueError: there is none.
    """
    having = set(map(id, packed_linears(model).values()))
    layers = {name: module for name, module in model.named_modules() if id(module) in having}
    if not layers:
        raise ValueError("This model has no packed linear layer: load one that `lowra quantize` wrote.")
    return layers
