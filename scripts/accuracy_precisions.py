"""What a precision costs, beside what the assigner reckons: KL divergence of packed models from the dense one.

    python scripts/accuracy_precisions.py MODEL TEXT --bits 2.25 2.0 --factors 1 2 3
    python scripts/accuracy_precisions.py MODEL TEXT --alone

MODEL is packed at each true budget, with errors at one bit counted so many times (`FISHER_COSTS` of
lowra/quantization/planning.py), and not trained. "--alone": one matrix is packed at one precision and all others are
dense; of all matrices the sums of divergence and of what the assigner reckons, and their ratio. TEXT: a folder with
train.txt, for the statistics, and validation.txt, for the divergence. Some minutes for 36 million weights on two cores.
"""

import argparse
import json
import pathlib
import tempfile

import torch
from accuracy_grid import Session
from accuracy_variants import Experiment, Variant, quantise, true_bits

from lowra.config import LowRAConfig
from lowra.quantization import planning
from lowra.quantization.loftq import initialize
from lowra.quantization.pack import quantize_matrix

AT_ONCE = 4  # sequences


class Judge:
    """KL divergence from a model, over the validation text of its session, in float32."""

    def __init__(self, session: Session):
        self._model, self._parts = session.model.eval(), session.valid.split(AT_ONCE)
        self._targets, self._device = session.targets, session.device
        self._wanted = [self._logits(part, {}) for part in self._parts]

    @torch.no_grad()
    def _logits(self, ids, weights):
        own = {name: self._targets[name].as_matrix(weight.to(self._device)) for name, weight in weights.items()}
        ids = ids.to(self._device)
        return torch.func.functional_call(self._model, own, (), {"input_ids": ids}).logits.log_softmax(-1).cpu()

    def __call__(self, weights: dict[str, torch.Tensor]) -> float:
        """Mean over tokens, with these in the places of dense weights [N, K]."""
        total, tokens = 0.0, 0
        for part, wanted in zip(self._parts, self._wanted, strict=True):
            total += float((wanted.exp() * (wanted - self._logits(part, weights))).sum())
            tokens += part.numel()
        return total / tokens


def alone(session: Session, judge: Judge, v: Variant) -> None:
    """Prints a line for each precision."""
    config = LowRAConfig(sensitivity=v.sensitivity, refine=v.refine, group_size=v.group_size)
    calibration = session.calibration(v.calibrate_on)
    planner = Experiment(config, None, calibration)
    for name, target in session.targets.items():
        planner.add(name, target, session.weights[name])
    plan, found = planner.assign(), {}
    for name, weight in session.weights.items():
        book, moment = plan.codebooks[name], calibration.moment(name)
        for place, bits in enumerate((4, 2, 1)):
            row_bits = torch.full((len(weight),), bits, dtype=torch.uint8)

            def pack(matrix, book=book, row_bits=row_bits):
                return quantize_matrix(matrix, book, row_bits, config)

            packed, _ = initialize(
                weight, pack, v.rank, v.rank, v.method, v.steps, v.seed, moment=moment, feedback=v.feedback
            )
            reckoned = float((book.errors[:, place].double() * calibration.channel_weights(name).double()).sum())
            sums = found.setdefault(bits, [0.0, 0.0])
            sums[0] += judge({name: packed.dequantize()})
            sums[1] += reckoned
    for bits, (divergence, reckoned) in found.items():
        row = {"bits": bits, "kl": divergence, "reckoned": reckoned, "ratio": divergence / reckoned}
        print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, planning.FISHER_COSTS[-1]])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration-tokens", type=int, default=30_000)
    parser.add_argument("--eval-blocks", type=int, default=8, help="sequences of 1,024 tokens for the divergence")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as shared:
        own_text = pathlib.Path(shared), {}  # none is written
        session = Session(
            args.model,
            args.text,
            args.device,
            args.calibration_tokens,
            args.eval_blocks,
            own_text,
            pathlib.Path(shared),
        )
    judge = Judge(session)
    v = Variant(budget="true", sensitivity="fisher", group_size=128, method="lora", refine=2, feedback=1)
    if args.alone:
        alone(session, judge, v)
        return
    for bits in args.bits:
        v.bits = bits
        for factor in args.factors:
            planning.FISHER_COSTS = (*planning.FISHER_COSTS[:-1], factor)
            fitted = quantise(session, v)
            shares = {
                precision: sum(int((w.row_bits == precision).sum()) * w.in_features for w, *_ in fitted.values())
                for precision in (1, 2, 4)
            }
            row = {
                "bits": bits,
                "true_bits": true_bits(session, v, fitted),
                "factor": factor,
                "kl": judge({name: weight.dequantize() + b @ a for name, (weight, a, b) in fitted.items()}),
                **{f"of_{precision}": share / sum(shares.values()) for precision, share in shares.items()},
            }
            print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()
