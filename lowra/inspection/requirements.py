"""What fine-tuning and quantising will need of memory, before anything is loaded.

Every figure follows from shapes and from what the code keeps at the moments that can be the peak. At each of them the
tensors that live are added up, as PyTorch counts them (`torch.cuda.max_memory_allocated`); the largest sum is the peak.
What a card needs on top, the driver's context and room between blocks, stands beside it.
"""

import dataclasses

from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.dense_parts import DENSE_BYTES

from ..checkpoints.targets import Target
from ..config import LowRAConfig
from ..integrations.graph_memory import ROOM_BETWEEN
from ..integrations.tiled_mlp import TILE as _TILE
from ..weights.packed import channel_bits
from .shapes import ModelShape

# The driver's context with PyTorch's and our kernels: on no list of PyTorch's, and different by driver and card.
CONTEXT_BYTES = 512 << 20
PYTHON_BYTES = 900 << 20  # of the host: Python with PyTorch and Transformers loaded
# cuBLAS has one workspace for the thread of forward and one for backward (PyTorch's defaults; 9.0 and 10.0 have more).
_WORKSPACE_BYTES = 2 * 8_519_680
_LARGE_WORKSPACE_BYTES = 2 * (32 << 20)
LOGITS_AT_ONCE = 1 << 24  # entries, as `lowra.training.head_by_parts` takes them
_FLOAT = 4
_TILE_GRADIENTS = 3  # of the MLP's width, that live while a tile is differentiated
_STATES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 0}
_WHOLE_TEMPORARY = ("adamw_torch",)  # PyTorch's AdamW over lists of tensors makes one more copy of all
# Bytes for each weight of the widest matrix while it is quantised: float32 copies of what the learner and LoftQ sum.
# Measured: 23.3 on a GPU (docs/lab/log.md, "The whole way at LLaMA-2-7B's shape"), 17.8 to 23.7 on a CPU; 13.3 without
# an adapter ("Memory before work").
_BYTES_QUANTISING = 23.7
_BYTES_WITHOUT_ADAPTER = 13.5
# For each weight of a block while that is trained: dense, packed, rounded, its gradients and the optimiser's moments.
# Measured on a CPU: 50 to 52 (docs/lab/log.md, "What makes codes a better base").
_BYTES_RECONSTRUCTING = 52.0
# The same of all blocks together: dense, what is rounded, Adam's two moments, what is made and its gradient, codes.
# Measured on a CPU: 35 to 36 (docs/lab/log.md, "Memory of a training of all blocks").
_BYTES_END_TO_END = 36.0
# Of these the host of a GPU holds what a killed run goes on from while it is written or read.
_BYTES_OF_STATE = 12.0
_BYTES_OF_TABLES = 4 * (22 + 19 + 3) + 3 * 8  # a channel's levels, thresholds, errors and the assigner's costs


@dataclasses.dataclass(frozen=True)
class Run:
    """What is asked of a fine-tuning.

    Attributes:
        rank: of the adapter.
        batch, length: sequences of a forward pass, and tokens of each.
        bits: nominal bits of a weight in the blocks; 16 and 32 leave them dense.
        true_bits: everything stored, where it is known; None reckons it from `bits`.
        embeddings, head: packed too.
        checkpointing: activations are computed again in backward.
        offload: of these, what is kept waits in the host's memory.
        tiled_mlp: MLPs and norms work on some tokens at a time.
        packing: rows of several conversations, whose attention mask [T, T] is held.
        accumulation: forward passes of an optimiser step; more than one keep gradients from pass to pass.
        optimizer: a name of Transformers'.
        tables: "frozen", "shared", "levels" or "levels_and_scales".
        eval_batch: sequences of an evaluation pass; 0 for none.
        group_size: weights that share a scale.
        large_workspace: of cuBLAS, on GPUs of compute capability 9.0 and later.
        bf16: base and arithmetic have 16 bits; 32 otherwise.
        whole_logits: those of a whole batch are held, as outside `lowra finetune`.
    """

    rank: int = 16
    batch: int = 1
    length: int = 1024
    bits: float = 2.0
    true_bits: float | None = None
    embeddings: bool = False
    head: bool = False
    checkpointing: bool = True
    offload: bool = False
    tiled_mlp: bool = False
    packing: bool = False
    accumulation: int = 1
    optimizer: str = "adamw_torch"
    tables: str = "frozen"
    eval_batch: int = 0
    group_size: int = 64
    large_workspace: bool = False
    bf16: bool = True
    whole_logits: bool = False


@dataclasses.dataclass(frozen=True)
class Requirement:
    """Memory at the peak.

    Attributes:
        moment: which one it is.
        parts: bytes by what they are spent on, at that moment.
        moments: bytes at every moment that was looked at.
        host: bytes of the host's memory that activations wait in.
    """

    moment: str
    parts: dict[str, float]
    moments: dict[str, float]
    host: float = 0.0

    @property
    def allocated(self) -> float:
        """Peak as PyTorch counts it."""
        return sum(self.parts.values())

    @property
    def on_card(self) -> float:
        """What a card must have free."""
        return self.allocated * (1 + ROOM_BETWEEN) + CONTEXT_BYTES


def finetuning(shape: ModelShape, run: Run) -> Requirement:
    """Peak of a fine-tuning run on the GPU."""
    base = base_parts(shape, run)
    adapter = float(_FLOAT * sum(run.rank * (linear.out_features + linear.in_features) for linear in shape.linears))
    trained = adapter + _table_bytes(shape, run)
    state = trained / _FLOAT * _STATES.get(run.optimizer, 8)
    held = base | {
        "adapter": adapter,
        **({"trained tables": trained - adapter} if trained > adapter else {}),
        "optimiser": state,
        "workspace of cuBLAS": float(_LARGE_WORKSPACE_BYTES if run.large_workspace else _WORKSPACE_BYTES),
    }
    tokens, width = run.batch * run.length, 2 if run.bf16 else 4
    if run.packing:  # truth values, and what attention adds to its scores in their place
        held["attention mask"] = float((1 + width) * run.batch * run.length**2)
    once, block = float(tokens * shape.hidden * width), tokens * kept_by_block(shape, run)
    dense = float(min(DENSE_BYTES, max(t.size for t in shape.linears) * width)) if run.bits < 16 else 0.0
    dense += _tabled_gradient(shape, run)
    # at the start of backward, where nothing but earlier passes has left gradients, and at its end
    start = held | {"gradients": trained if run.accumulation > 1 else 0.0}
    end = held | {"gradients": trained if run.accumulation > 1 else trained - trained / shape.layers}
    in_block = {"activations of a block": _in_block(shape, run, tokens, width), "a weight made dense": dense}
    if run.tables == "shared":
        in_block["scales as trained"] = _FLOAT * _scales(shape, run) / (shape.layers if run.checkpointing else 1)
    host = 0.0
    at_loss: dict[str, float]
    if not run.checkpointing:
        at_loss = kept = {"kept for backward": shape.layers * block}
        in_block["activations of a block"] -= block
        last, first = start | kept | in_block, end | {"kept for backward": block} | in_block
    elif run.offload:  # the input of one block, and of the one before it on its way back
        host = shape.layers * once
        at_loss, kept = {"inputs of the blocks": once}, {"inputs of the blocks": min(2, shape.layers) * once}
        last, first = start | kept | in_block, end | kept | in_block
    else:
        at_loss = kept = {"inputs of the blocks": shape.layers * once}
        last, first = start | kept | in_block, end | {"inputs of the blocks": once} | in_block
    moments = {
        "backward of the loss": start | at_loss | _loss_parts(shape, run, tokens, width),
        "backward of the last block": last,
        "backward of the first block": first,
        "step of the optimiser": held
        | {"gradients": trained}
        | ({"temporaries of the optimiser": trained} if run.optimizer in _WHOLE_TEMPORARY else {}),
    }
    if run.eval_batch:
        seen = run.eval_batch * run.length
        entries = _logits_at_once(shape, run, seen)
        # whole ones lie there in 16 bits and, as the Trainer hands them on, in float32, beside the loss of a sequence
        logits = (width + _FLOAT) * entries + 2 * _FLOAT * min(entries, run.length * shape.vocabulary)
        moments["evaluation"] = held | {
            "logits": float(logits),
            "activations of a block": _seen_by_block(shape, run, seen, width),
        }
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    peak = max(totals, key=lambda name: totals[name])
    return Requirement(peak, {name: size for name, size in moments[peak].items() if size}, totals, host)


def _in_block(shape: ModelShape, run: Run, tokens: int, width: int) -> float:
    """The most that lives while a block is differentiated, beside its input."""
    once, kept = float(tokens * shape.hidden * width), tokens * kept_by_block(shape, run)
    # The last product of the MLP: what the block keeps, the gradients of its output and of the MLP's width.
    in_mlp = once + kept + tokens * shape.mlp * width
    if not run.tiled_mlp:
        return in_mlp
    tile = min(tokens, _TILE)
    of_mlp = width * shape.mlp_kept * shape.mlp + _outputs_kept(shape, run, shape.mlp)
    rest = kept - tokens * (of_mlp + shape.norms * shape.hidden * (_FLOAT + width))  # of attention and adapters
    # What norms give, what the second one reads, and gradients of what the MLP gives and reads.
    in_mlp = (shape.norms + 3) * once + rest + tile * (of_mlp + _TILE_GRADIENTS * shape.mlp * width)
    # Attention, after the MLP's part is gone: what its norm gave, the gradient of the block's middle, and as much once
    # more, which was measured and not found (docs/lab/training.md); gradients of its output, queries, keys and values,
    # by the flash kernel (float32 sums of the queries'; the others for each of their heads).
    expanded = 2 * shape.queries if shape.keys < shape.queries else 0
    gradients = width * (2 * shape.queries + 2 * shape.keys + expanded) + _FLOAT * shape.queries
    return max(in_mlp, 3 * once + rest + tokens * gradients)


def _seen_by_block(shape: ModelShape, run: Run, tokens: int, width: int) -> float:
    """The most that lives while a block is computed without gradients."""
    if not run.tiled_mlp:
        return float(tokens * (2 * shape.hidden + 3 * shape.mlp) * width)
    in_attention = float(tokens * (3 * shape.hidden + 3 * (shape.queries + shape.keys)) * width)
    return max(in_attention, (tokens * 3 * shape.hidden + min(tokens, _TILE) * 3 * shape.mlp) * float(width))


def _loss_parts(shape: ModelShape, run: Run, tokens: int, width: int) -> dict[str, float]:
    """What lives while the loss is computed backward, beside what the blocks keep."""
    entries = _logits_at_once(shape, run, tokens)
    states = 0 if _whole_logits(shape, run) else 2 * tokens * shape.hidden * width  # of the head, and their gradients
    head = float(min(DENSE_BYTES, shape.embedding * width)) if _packs_head(shape, run) else 0.0
    # log-softmax, its gradient and the gradient of that, all float32; the head's product comes after
    logits = max(3.0 * _FLOAT * entries, (_FLOAT + width) * entries + head)
    return {"hidden states before the head": float(tokens * shape.hidden * _FLOAT + states), "logits": logits}


def _whole_logits(shape: ModelShape, run: Run) -> bool:
    return run.whole_logits or shape.changes_logits


def _logits_at_once(shape: ModelShape, run: Run, tokens: int) -> int:
    """Entries of the logits that are held together."""
    if _whole_logits(shape, run):
        return tokens * shape.vocabulary
    return min(tokens, max(1, LOGITS_AT_ONCE // shape.vocabulary)) * shape.vocabulary


def _packs_head(shape: ModelShape, run: Run) -> bool:
    return run.head if shape.head else run.embeddings


def base_parts(shape: ModelShape, run: Run) -> dict[str, float]:
    """Bytes of the frozen model on the GPU."""
    width = 2 if run.bf16 else 4
    packed = sum(linear.size for linear in shape.linears)
    tables = shape.embedding * run.embeddings + shape.head * run.head
    rest = float((shape.parameters - packed - tables) * width)
    if run.bits >= 16:
        return {"dense weights": float(packed * width), "embeddings, head, norms": rest}
    config = LowRAConfig(group_size=run.group_size)
    targets = list(shape.linears)
    for size, taken, name in ((shape.embedding, run.embeddings, "embeddings"), (shape.head, run.head, "head")):
        if taken and size:
            targets.append(Target(name, size // shape.hidden, shape.hidden, adapted=False))
    codes = run.bits / 8 * sum(target.size for target in targets)
    stored = run.true_bits / 8 * sum(target.size for target in targets) if run.true_bits else 0.0
    stored = stored or sum(stored_bytes(target, run.bits, config) for target in targets)
    order = 4.0 * sum(target.out_features for target in targets)  # made when loaded: where each row stands
    return {"codes": codes, "tables": stored - codes + order, "embeddings, head, norms": rest}


def stored_bytes(target: Target, bits: float, config: LowRAConfig) -> float:
    """Bytes of a packed matrix whose channels have the two precisions next to `bits`, in the share that meets it."""
    low = max(precision for precision in config.menu if precision <= bits)
    high = min(precision for precision in config.menu if precision >= bits)
    share = 0.0 if high == low else (bits - low) / (high - low)
    each = [channel_bits(target.out_features, target.in_features, precision, config) for precision in (low, high)]
    return target.out_features * ((1 - share) * each[0] + share * each[1]) / 8


def kept_by_block(shape: ModelShape, run: Run) -> float:
    """Bytes that one block keeps for backward, a token.

    Norms keep what they read in float32; each packed layer its input, which those that read the same one share;
    attention its queries, keys, values and output (the kernels that hold no scores); the MLP its gate, up, and what
    becomes of them; each adapter the `rank` numbers between A and B; tables what `_outputs_kept` says.
    """
    width = 2 if run.bf16 else 4
    norms = shape.norms * shape.hidden * (_FLOAT + width)
    attention = 2 * width * (shape.queries + shape.keys)
    if shape.normed_heads:
        attention += _FLOAT * (shape.queries + shape.keys)
    inner = width * run.rank * len(shape.linears) / shape.layers
    return norms + attention + width * shape.mlp_kept * shape.mlp + inner + _outputs_kept(shape, run)


def _table_bytes(shape: ModelShape, run: Run) -> float:
    """What is trained of the tables, in float32."""
    if run.tables == "frozen":
        return 0.0
    rows = sum(linear.out_features for linear in shape.linears)
    if run.tables == "shared":  # a shift of each row and, but for a block's last layer, a gain; a gain of each group
        gains = shape.layers * sum(linear.out_features for linear in _before_the_last(shape))
        groups = sum(layout.group_count(linear.in_features, run.group_size) for linear in shape.linears)
        return float(_FLOAT * (rows + gains + groups))
    levels = rows * 2**run.bits
    return _FLOAT * (levels + (_scales(shape, run) if run.tables == "levels_and_scales" else 0))


def _scales(shape: ModelShape, run: Run) -> int:
    """Scales of all packed layers."""
    return sum(linear.out_features * layout.group_count(linear.in_features, run.group_size) for linear in shape.linears)


def _before_the_last(shape: ModelShape) -> tuple[Target, ...]:
    """The packed layers of a block but its last."""
    return shape.linears[: len(shape.linears) // shape.layers - 1]


def _outputs_kept(shape: ModelShape, run: Run, width: int | None = None) -> float:
    """Bytes a token of the outputs that shared tables need of a block, in float8 where they have 16 bits: of all packed
    layers but the last, or of those of one width.
    """
    if run.tables != "shared":
        return 0.0
    outputs = sum(each.out_features for each in _before_the_last(shape) if width in (None, each.out_features))
    return float(outputs * (1 if run.bf16 else _FLOAT))


def _tabled_gradient(shape: ModelShape, run: Run) -> float:
    """The gradient of a whole dense weight, of which those of its tables are sums, unless they are shared."""
    width = 2 if run.bf16 else 4
    whole = run.tables in ("levels", "levels_and_scales")
    return float(max(linear.size for linear in shape.linears) * width) if whole else 0.0


@dataclasses.dataclass(frozen=True)
class Quantising:
    """Bytes at the peak of `lowra quantize`.

    Attributes:
        device: on the GPU that computes; 0 where the CPU does.
        host: of the host's memory.
    """

    device: float
    host: float


def quantising(
    shape: ModelShape,
    on_gpu: bool,
    embeddings: bool = False,
    head: bool = False,
    rank: int = 0,
    calibrating: bool = False,
    moments: bool = False,
    *,
    reconstruct_tokens: int = 0,
    end_to_end: bool = False,
) -> Quantising:
    """One matrix is in memory at a time, and the tables of all. A calibration comes before and runs the dense model.

    Args:
        shape: of the model.
        on_gpu: a GPU computes. A calibration spreads the model over GPUs and host, which is not counted here.
        embeddings, head: packed too.
        rank: of the initial adapter; 0 for none.
        calibrating: with a pass over text.
        moments: which collects second moments, [K, K] float32 of every layer.
        reconstruct_tokens: on which blocks are trained afterwards, whose activations are not counted; 0: they are not.
        end_to_end: all blocks are trained together after that, with embeddings and head that are not packed;
            activations are not counted either.
    """
    tables = [shape.embedding] * embeddings + [shape.head] * head
    kept = 0.0
    widest = max(linear.size for linear in shape.linears)
    each = _BYTES_QUANTISING if rank else _BYTES_WITHOUT_ADAPTER
    work = max(each * widest, _BYTES_WITHOUT_ADAPTER * max(tables, default=0))
    if reconstruct_tokens:
        hidden = 3 * reconstruct_tokens * shape.hidden * (2 if on_gpu else _FLOAT)
        block = sum(linear.size for linear in shape.linears) / shape.layers
        work = max(work, _BYTES_RECONSTRUCTING * block + hidden + _FLOAT * shape.embedding)
    if end_to_end:
        learning = sum(linear.size for linear in shape.linears)
        learning += shape.embedding * (not embeddings) + shape.head * (not head)
        work = max(work, _BYTES_END_TO_END * learning + _FLOAT * (shape.parameters - learning))
        kept = max(_FLOAT * shape.parameters, _BYTES_OF_STATE * learning) if on_gpu else 0.0
    rows = sum(linear.out_features for linear in shape.linears) + shape.vocabulary * (embeddings + head)
    held = PYTHON_BYTES + _FLOAT * sum(linear.in_features**2 for linear in shape.linears) * moments
    host = held + rows * _BYTES_OF_TABLES + max(2 * max(widest, shape.embedding), kept) + (0 if on_gpu else work)
    if calibrating and not on_gpu:
        host = max(host, held + _FLOAT * shape.parameters)
    return Quantising(work if on_gpu else 0.0, host)
