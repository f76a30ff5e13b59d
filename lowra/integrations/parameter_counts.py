"""How many parameters a model has: a packed weight [N, K] counts as N K, not as the elements of its tensors."""

from torch import nn

from ..nn.packed_module import PackedModule


def uncounted(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """What is to be added to a count over `model.parameters()`.

    Args:
        model: any.
        exclude_embeddings: the count has left out the `weight` of every embedding.
    """
    modules: dict[int, PackedModule] = {}
    for module in model.modules():
        if isinstance(module, PackedModule):
            modules.setdefault(id(module.weight), module)  # of tied modules the first
    missing = 0
    for module in modules.values():
        if exclude_embeddings and isinstance(module, nn.Embedding):
            tensors = PackedModule.packed_tensors(module)
            missing -= sum(tensor.numel() for name, tensor in tensors.items() if name != "weight")
        else:
            stored = sum(tensor.numel() for tensor in module.packed_tensors().values())
            missing += module.in_features * module.out_features - stored
    return missing
