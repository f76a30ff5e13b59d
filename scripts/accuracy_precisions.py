"""What a precision costs, beside what the assigner reckons: KL divergence of packed models from the dense one.

    python scripts/accuracy_precisions.py MODEL TEXT --bits 2.25 2.0 --factors 1 2 3
    python scripts/accuracy_precisions.py MODEL TEXT --alone

MODEL is packed at each true budget, with errors at one bit counted so many times (`FISHER_COSTS` of
lowra/quantization/planning.py), and not trained. "--alone": one matrix is packed at one precision and all others are
dense; of all matrices the sums of divergence and of what the assigner reckons, and their ratio. TEXT: a folder with
train.txt, for the statistics, and validation.txt, for the divergence. Some minutes for 36 million weights on two cores.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

import torch
from accuracy_blocks import held_out_divergence
from accuracy_grid import Session
from accuracy_variants import Variant, quantise, true_bits

from lowra.config import LowRAConfig
from lowra.quantization.learner import learn_codebook
from lowra.quantization.planning import FISHER_COSTS
from lowra.weights.codebook import PRECISIONS


def alone(session: Session, v: Variant) -> None:
    """Prints a line for each precision."""
    config, calibration = LowRAConfig(group_size=v.group_size), session.calibration(v.calibrate_on)
    reckoned = torch.zeros(len(PRECISIONS), dtype=torch.float64)
    for name, weight in session.weights.items():
        costs = calibration.channel_weights(name).double()
        reckoned += costs @ learn_codebook(weight, config).errors.double()
    for bits, expected in zip(PRECISIONS, reckoned.tolist(), strict=True):
        fitted = quantise(session, dataclasses.replace(v, menu=(bits,), bits=float(bits), budget="nominal"))
        found = sum(divergence(session, {name: packed.dequantize()}) for name, (packed, *_) in fitted.items())
        _show({"bits": bits, "kl": found, "reckoned": expected, "ratio": found / expected})


def divergence(session: Session, weights: dict[str, torch.Tensor]) -> float:
    """From the dense model, over the validation text, with these in the places of its weights."""
    there = {name: weight.to(session.device) for name, weight in weights.items()}
    return held_out_divergence(session, session.model, there, session.valid)


def whole(session: Session, v: Variant, factor: float) -> None:
    """Prints a line of the model as the assigner has it packed."""
    fitted = quantise(session, dataclasses.replace(v, one_bit=factor))
    weights = {name: packed.dequantize() + b @ a for name, (packed, a, b) in fitted.items()}
    sizes = dict.fromkeys(PRECISIONS, 0)
    for packed, *_ in fitted.values():
        for bits in PRECISIONS:
            sizes[bits] += int((packed.row_bits == bits).sum()) * packed.in_features
    shares = {f"of_{bits}": size / sum(sizes.values()) for bits, size in sizes.items()}
    row = {"bits": v.bits, "true_bits": true_bits(session, v, fitted), "factor": factor}
    _show({**row, "kl": divergence(session, weights), **shares})


def _show(row: dict) -> None:
    print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, FISHER_COSTS[-1]])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration-tokens", type=int, default=30_000)
    parser.add_argument("--eval-blocks", type=int, default=8, help="sequences of 1,024 tokens for the divergence")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # for text that the model writes, of which there is none
        beside = pathlib.Path(folder)
        session = Session(
            args.model, args.text, args.device, args.calibration_tokens, args.eval_blocks, (beside, {}), beside
        )
    v = Variant(budget="true", sensitivity="fisher", group_size=128, method="lora", refine=2, feedback=1)
    if args.alone:
        alone(session, v)
        return
    for bits in args.bits:
        for factor in args.factors:
            whole(session, dataclasses.replace(v, bits=bits), factor)


if __name__ == "__main__":
    main()
