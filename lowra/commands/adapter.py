"""`lowra adapter`: quantise trained LoRA adapters and read the labels of packed ones."""

import argparse
import os
import pathlib
import sys
import time
from collections import Counter

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from lowra_command.adapter import METHODS

from ..adapters.binary_baselines import quantize_billm, quantize_pbllm
from ..adapters.gptq import calibration_blocks, input_hessians, quantize_gptq
from ..adapters.joint import check_alike, quantize_joint
from ..adapters.labels import bytes_problem, check_retirement, make_label, retirement_problem
from ..adapters.loraquant import LoraQuantSettings, check_bits, quantize_bin, quantize_loraquant, quantize_rtn
from ..adapters.source import LoraAdapter, read_adapter
from ..adapters.storage import PACKED_FILE, PackedAdapter, read_packed, tensor_bytes, write_packed, write_shared
from ..checkpoints.atomic import written_beside
from ..checkpoints.companions import companions, copy_companions
from ..checkpoints.dense import empty_model, read_config
from ..checkpoints.places import expanded, lasting_name, new_folder
from ..checkpoints.records import TABLES_FILE, WITHOUT_TABLES, record_of_folder
from ..corpus import check_token_ids, load_tokenizer
from ..integrations.adapter_records import check_adapter

_TAKES_BITS = ("loraquant", "rtn", "gptq")


def run_quantize(args: argparse.Namespace) -> dict:
    """Quantises, labels and writes; everything that can be refused is refused before anything is written.

    Raises:
        ValueError, FileNotFoundError: bad options or input, with what was expected, what came and what to do.
    """
    settings = _check_options(args)
    evaluation = _parse_evaluation(args.evaluation)
    if args.retire is not None:
        check_retirement(args.retire)
    args.output = expanded(args.output)
    new_folder(args.output)
    args.adapters = [expanded(folder) for folder in args.adapters]
    args.base = None if args.base is None else expanded(args.base)
    if args.calibration is not None and not expanded(args.calibration).is_file():
        raise FileNotFoundError(f"Calibration file {args.calibration} is not there; expected a UTF-8 text file.")
    adapters = [read_adapter(folder) for folder in args.adapters]
    most = max(len(layer.a) for layer in adapters[0].layers)
    if args.static_h is not None and args.static_h > most:
        raise ValueError(f"--static-h is {args.static_h}, and the adapter has {most} components in a layer at most.")
    beside = [companions(folder, outside=(args.output,)) for folder in args.adapters]
    if args.method == "jd-diagonal":
        check_alike(adapters)
        output_names(args.adapters)
    base_path = _base_path(args, adapters[0])
    if args.method == "gptq" and base_path is None:
        raise ValueError(
            f"gptq needs the base model for calibration, and {adapters[0].config.get('base_model_name_or_path')!r} is "
            "no folder here; give --base."
        )
    base = None if base_path is None else _load_base(base_path, args.trust_remote_code)
    if base is None:
        print(
            f"warning: the base {adapters[0].config.get('base_model_name_or_path')!r} is no folder here, so the label "
            "records no fingerprint and loading will ask for force; give --base to record it.",
            file=sys.stderr,
        )
    else:
        for folder in args.adapters:
            check_adapter(base, folder, {}, any_base=False)

    start = time.perf_counter()
    if base is not None and base_path is not None and args.method == "gptq":
        packed = [_run_gptq(args, settings.bits, adapters[0], base, base_path)]
    else:
        packed = _run_method(args.method, settings, adapters)
    seconds = time.perf_counter() - start
    if _is_coarse(args, settings) and record_of_folder(args.adapters[0]).get("init", "lora") != "lora":
        print(
            "warning: this adapter also makes up for the quantisation of its packed base, which takes more precision "
            "than what is learned: --bits 3 --ratio 1 lose less. Measure with `lowra evaluate`.",
            file=sys.stderr,
        )

    for one in packed:
        one.label = make_label(
            one,
            base_name=lasting_name(base_path)
            if base_path
            else adapters[0].config.get("base_model_name_or_path") or None,
            base=base,
            task=args.task,
            training_data=args.training_data,
            evaluation=evaluation,
            licence=args.licence,
            retire=args.retire,
        )
    _write(args, packed, beside)
    return _report(args, packed, seconds)


def output_names(folders: list[pathlib.Path]) -> list[str]:
    """Names for what becomes of several adapters: their folders', with those above where they are the same.

    `lowra finetune` calls every adapter `adapter`: runs/law/adapter and runs/news/adapter become law-adapter and
    news-adapter.

    Raises:
        ValueError: a folder that is given twice.
    """
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"The adapter {place} is given twice: give each once.")
    for above in range(1, max(len(place.parts) for place in places) + 1):
        names = ["-".join(place.parts[-above:]) for place in places]
        if len(set(names)) == len(names):
            break
    return [name.replace("/", "") for name in names]


def _check_options(args: argparse.Namespace) -> LoraQuantSettings:
    """Settings from the options; options that the method does not have are refused rather than ignored."""
    if args.method not in METHODS:
        raise ValueError(f"Unknown method {args.method!r}; expected one of {', '.join(METHODS)}.")
    if len(args.adapters) > 1 and args.method != "jd-diagonal":
        raise ValueError(
            f"Method {args.method} takes one adapter; came {len(args.adapters)}. Call it once for each, or use "
            "--method jd-diagonal to share factors between them."
        )
    given = {
        "--bits": args.bits is not None and args.method not in _TAKES_BITS,
        "--calibration": args.calibration is not None and args.method != "gptq",
        "--ratio": args.ratio is not None,
        "--static-h": args.static_h is not None,
        "--split": args.split is not None,
        "--no-refine": args.no_refine,
        "--no-binary": args.no_binary,
    }
    own = ("--ratio", "--static-h", "--split", "--no-refine", "--no-binary")
    if args.method == "loraquant":
        given |= dict.fromkeys(own, False)
    foreign = [option for option, is_set in given.items() if is_set]
    if foreign:
        raise ValueError(f"Method {args.method} has no option {foreign[0]}; leave it out, or choose another --method.")
    if args.ratio is not None and args.static_h is not None:
        raise ValueError("--ratio and --static-h exclude one another: both choose how many components are important.")
    if args.method == "gptq" and args.calibration is None:
        raise ValueError("gptq needs calibration text; give --calibration FILE, UTF-8 text of the adapter's kind.")
    bits = 2 if args.bits is None else args.bits
    check_bits(bits)
    return LoraQuantSettings(
        bits=bits,
        ratio=0.9 if args.ratio is None else args.ratio,
        split=args.split or "svd",
        refine=not args.no_refine,
        binary=not args.no_binary,
        static_h=args.static_h,
    )


def _is_coarse(args: argparse.Namespace, settings: LoraQuantSettings) -> bool:
    """Whether LoraQuant is asked for less than three bits for every component."""
    return args.method == "loraquant" and (settings.bits < 3 or settings.ratio < 1 or settings.static_h is not None)


def _parse_evaluation(pairs: list[str]) -> dict[str, str]:
    results = {}
    for pair in pairs:
        name, equals, result = pair.partition("=")
        if not (name and equals and result):
            raise ValueError(f"--evaluation got {pair!r}; expected NAME=RESULT, such as perplexity=23.4.")
        if name in results:
            raise ValueError(f"--evaluation gives {name} twice; which of them is meant?")
        results[name] = result
    return results


def _base_path(args: argparse.Namespace, adapter: LoraAdapter) -> pathlib.Path | None:
    """Folder of the base: --base, or what the adapter names if that is a folder here."""
    if args.base is not None:
        if not (args.base / "config.json").is_file():
            raise FileNotFoundError(f"{args.base} has no config.json; expected the folder of a base model.")
        return args.base
    named = adapter.config.get("base_model_name_or_path")
    return pathlib.Path(named) if named and (pathlib.Path(named) / "config.json").is_file() else None


def _load_base(path: pathlib.Path, trust_remote_code: bool) -> PreTrainedModel:
    """The base model in the type of its checkpoint, in the class that its configuration names."""
    if trust_remote_code:
        return type(empty_model(path, trust_remote_code)).from_pretrained(path, dtype="auto")
    names = read_config(path).architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(f"{path / 'config.json'} names the architectures {names}; expected one that Transformers has.")
    return model_class.from_pretrained(path, dtype="auto")


def _run_gptq(
    args: argparse.Namespace, bits: int, adapter: LoraAdapter, base: PreTrainedModel, base_path: pathlib.Path
) -> PackedAdapter:
    tokenizer = load_tokenizer(base_path, args.trust_remote_code)
    blocks = calibration_blocks(args.calibration, tokenizer)
    check_token_ids(set(blocks.flatten().tolist()), base.config, tokenizer, "the calibration text")
    model = PeftModel.from_pretrained(base, args.adapters[0])
    names = [layer.name for layer in adapter.layers]
    hessians = input_hessians(model, blocks, names, progress=True)
    return quantize_gptq(adapter, hessians, bits, progress=True)


def _run_method(method: str, settings: LoraQuantSettings, adapters: list[LoraAdapter]) -> list[PackedAdapter]:
    if method == "jd-diagonal":
        return quantize_joint(adapters, progress=True)
    if method == "loraquant":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return [quantize_loraquant(adapters[0], settings, progress=True, device=device)]
    if method == "rtn":
        return [quantize_rtn(adapters[0], settings.bits)]
    return [{"bin": quantize_bin, "pbllm": quantize_pbllm, "billm": quantize_billm}[method](adapters[0])]


def _write(args: argparse.Namespace, packed: list[PackedAdapter], beside: list[list[pathlib.Path]]) -> None:
    """Writes the packed adapters, each with the files beside its weights, such as a tokenizer with more tokens."""
    with written_beside(args.output) as folder:
        if packed[0].shared is None:
            write_packed(folder, packed[0])
            copy_companions(args.adapters[0], beside[0], folder)
            return
        write_shared(folder, packed[0].shared)
        for source, name, one, paths in zip(args.adapters, output_names(args.adapters), packed, beside, strict=True):
            inner = folder / name
            os.mkdir(inner)
            write_packed(inner, one)
            copy_companions(source, paths, inner)


def _report(args: argparse.Namespace, packed: list[PackedAdapter], seconds: float) -> dict:
    stored = sum(one.tensor_bytes for one in packed)
    stored += tensor_bytes(packed[0].shared.tensors) if packed[0].shared else 0
    parameters = sum(one.parameters for one in packed)
    result = {
        "output": str(args.output),
        "method": packed[0].method,
        "adapters": len(packed),
        "layers": len(packed[0].layers),
        "parameters": parameters,
        "tensor_bytes": stored,
        "table_bytes": sum(one.table_bytes for one in packed),
        "file_bytes": sum(file.stat().st_size for file in args.output.rglob("*.safetensors")),
        "average_bits": 8 * stored / parameters,
        "base_fingerprint": packed[0].label["base"]["fingerprint"],
        "sha256": [one.label["sha256"] for one in packed],
        "seconds": round(seconds, 2),
    }
    print(
        f"{result['method']}: {parameters:,} parameters in {stored:,} bytes, {result['average_bits']:.3f} bits each "
        f"(float16: {2 * parameters:,} bytes), in {seconds:.1f} s"
    )
    if any(layer.important for layer in packed[0].layers):
        print(f"components at {packed[0].bits} bits per layer: {_important_counts(packed[0])}")
    if result["table_bytes"]:
        print(
            f"beside them {result['table_bytes']:,} bytes of trained tables ({TABLES_FILE}), which are not packed; "
            f"{WITHOUT_TABLES}"
        )
    print(f"written to {args.output}")
    return result


def _important_counts(packed: PackedAdapter) -> str:
    """Such as "4 of 16 in 12 layers, 5 of 16 in 44 layers"."""
    counts = Counter((layer.important, layer.rank) for layer in packed.layers)
    return ", ".join(f"{h} of {rank} in {number} layers" for (h, rank), number in sorted(counts.items()))


def run_inspect(args: argparse.Namespace) -> dict:
    """Shows the label of a packed adapter, whether its bytes are those packed and whether it is past retirement.

    Raises:
        ValueError, FileNotFoundError: no packed adapter, or one that cannot be read.
    """
    packed = read_packed(args.adapter)
    label = packed.label
    problems = [problem for problem in (bytes_problem(packed), retirement_problem(label)) if problem]
    base = label.get("base") or {}
    rows = {
        "method": packed.method,
        "average bits": f"{packed.average_bits:.3f}",
        "parameters": f"{packed.parameters:,} in {len(packed.layers)} layers",
        "file": f"{(args.adapter / PACKED_FILE).stat().st_size:,} bytes",
        "trained tables": f"{packed.table_bytes:,} bytes" if packed.tables else "none",
        "base": base.get("name"),
        "base fingerprint": base.get("fingerprint"),
        "base quantisation": base.get("quantization"),
        "task": label.get("task"),
        "training data": label.get("training_data"),
        "evaluation": ", ".join(f"{name} {result}" for name, result in (label.get("evaluation") or {}).items()) or None,
        "licence": label.get("licence"),
        "retires after": label.get("retire"),
        "sha256": label.get("sha256"),
        "state": f"must not be loaded: {'; '.join(problems)}" if problems else "bytes as packed, not retired",
    }
    for name, value in rows.items():
        print(f"{name:<18} {'not recorded' if value is None else value}")
    return {
        "label": label,
        "method": packed.method,
        "average_bits": packed.average_bits,
        "parameters": packed.parameters,
        "tensor_bytes": packed.tensor_bytes,
        "table_bytes": packed.table_bytes,
        "layers": {layer.name: layer.important for layer in packed.layers},
        "problems": problems,
    }
