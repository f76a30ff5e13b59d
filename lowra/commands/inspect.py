"""`lowra inspect`: where the bits of a packed checkpoint went, and what they cost."""

import argparse
import dataclasses
import pathlib

from ..checkpoints.places import expanded, usable_file, usable_folder
from ..inspection.errors import Original, channel_errors, quantiles
from ..inspection.memory import PAPER_RANK, TOKENS, footprints
from ..inspection.packed import NF4_BITS, LayerContent, PackedFolder
from ..optional import require


def run(args: argparse.Namespace) -> dict:
    """Prints the tables and returns them as one object."""
    if args.plot is not None:
        require("--plot", "matplotlib")
    plot = None if args.plot is None else _checked_plot(args.plot)
    packed = PackedFolder(args.model, args.trust_remote_code)
    original = None if args.original is None else Original(args.original, packed, args.trust_remote_code)
    layers = list(packed.contents())
    result = _totals(packed, layers)
    _print_totals(result)
    result["kinds"] = _by_kind(layers)
    _print_table(result["kinds"])
    result["layers"] = [
        {**dataclasses.asdict(layer), "nominal_bits": layer.nominal_bits, "true_bits": layer.true_bits}
        for layer in layers
    ]
    if args.layers:
        _print_table([_summary(layer.name, [layer]) for layer in layers])
    rank = packed.adapter_rank() or PAPER_RANK
    result["memory"] = _memory(packed, layers, rank)
    errors = None
    if original is not None:
        errors = channel_errors(packed, original)
        result["errors"] = quantiles(errors)
        _print_errors(result["errors"])
    if plot is not None:
        from ..inspection.pictures import draw_all, write_pictures  # matplotlib takes a second to import

        paths = write_pictures(draw_all(packed, layers, rank, original, errors), plot)
        result["pictures"] = [str(path) for path in paths]
        print(f"\npictures: {', '.join(result['pictures'])}")
    return result


def _checked_plot(place: pathlib.Path) -> pathlib.Path:
    """
    Raises:
        OSError, ValueError: a file type that matplotlib does not write, or a place that cannot be written.
    """
    place = expanded(place)
    if not place.suffix or place.is_dir():
        return usable_folder(place)
    if place.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot takes a folder, or a file in .png, .svg or .pdf; got {place.name}.")
    usable_file(place.with_name(f"{place.stem}-channels{place.suffix}"))  # the longest name there is
    return place if place.suffix != ".pdf" else usable_file(place)


def _totals(packed: PackedFolder, layers: list[LayerContent]) -> dict:
    parameters = sum(layer.parameters for layer in layers)
    stored = sum(layer.stored_bytes for layer in layers)
    return {
        "model": str(packed.folder),
        "base": packed.config.base,
        "fingerprint": packed.config.fingerprint,
        "error": packed.config.error,
        **packed.errors(),
        "trained_token_tables": packed.trained_token_tables(),
        "channels": {str(bits): sum(layer.channels[bits] for layer in layers) for bits in (4, 2, 1)},
        "quantised_parameters": parameters,
        "nominal_bits": sum(layer.nominal_bits * layer.parameters for layer in layers) / parameters,
        "true_bits": 8 * stored / parameters,
        "packed_bytes": stored,
        "bf16_bytes": 2 * parameters,
        "nf4_bytes": round(parameters * NF4_BITS / 8),
        "code_bytes": {str(bits): sum(layer.code_bytes[bits] for layer in layers) for bits in (4, 2, 1)},
        "scale_bytes": sum(layer.scale_bytes for layer in layers),
        "table_bytes": sum(layer.table_bytes for layer in layers),
        "dense_bytes": packed.total_bytes - stored,
        "checkpoint_bytes": packed.total_bytes,
    }


def _print_totals(total: dict) -> None:
    parameters = total["quantised_parameters"]
    print(f"{total['model']}, packed from {total['base']} (fingerprint {str(total['fingerprint'])[:16]})")
    print(f"  {parameters:,} weights in {sum(total['channels'].values()):,} output channels")
    print(f"  nominal {total['nominal_bits']:.4f} bits per weight (codes alone), true {total['true_bits']:.4f} bits")
    parts = {
        **{f"{bits}-bit codes": size for bits, size in total["code_bytes"].items()},
        "group scales": total["scale_bytes"],
        "level tables": total["table_bytes"],
    }
    for part, size in parts.items():
        print(f"    {part:<18} {_mib(size)}  {8 * size / parameters:.4f} bits")
    for name, key in (
        ("packed", "packed_bytes"),
        ("as bf16", "bf16_bytes"),
        (f"as NF4 ({NF4_BITS} bits)", "nf4_bytes"),
    ):
        print(f"  {name:<20} {_mib(total[key])}  {total[key] / total['packed_bytes']:.2f} x packed")
    print(f"  {'left dense':<20} {_mib(total['dense_bytes'])}  everything that is not packed")
    trained = total["trained_token_tables"]
    if trained is None:
        print("    embeddings and head may have been trained with the packed weights (end to end)")
    elif trained:
        print(f"    trained with the packed weights (end to end), and so not the base's: {', '.join(trained)}")
    if total["error"] is not None:
        shown = {
            "planned": "error",
            "of the packed weights": "packed_error",
            "with the initial adapter": "adapted_error",
        }
        errors = [f"{name} {total[key]:.5f}" for name, key in shown.items() if key in total]
        print(f"  squared error / energy: {', '.join(errors)}")


def _by_kind(layers: list[LayerContent]) -> list[dict]:
    members: dict[str, list[LayerContent]] = {}
    for layer in layers:
        members.setdefault(layer.kind, []).append(layer)
    return [_summary(kind, group) for kind, group in members.items()]


def _summary(name: str, layers: list[LayerContent]) -> dict:
    parameters = sum(layer.parameters for layer in layers)
    return {
        "name": name,
        "layers": len(layers),
        "parameters": parameters,
        "channels": {str(bits): sum(layer.channels[bits] for layer in layers) for bits in (4, 2, 1)},
        "nominal_bits": sum(layer.nominal_bits * layer.parameters for layer in layers) / parameters,
        "true_bits": 8 * sum(layer.stored_bytes for layer in layers) / parameters,
    }


def _print_table(rows: list[dict]) -> None:
    width = max(len(row["name"]) for row in rows)
    print(f"\n{'':{width}}  layers   parameters   channels at 4 / 2 / 1 bits    nominal    true")
    for row in rows:
        counts = " / ".join(f"{count:,}" for count in row["channels"].values())
        print(
            f"{row['name']:{width}}  {row['layers']:6}  {row['parameters']:11,}  {counts:>27}  "
            f"{row['nominal_bits']:9.3f}  {row['true_bits']:6.3f}"
        )


def _memory(packed: PackedFolder, layers: list[LayerContent], rank: int) -> dict:
    dense = packed.total_bytes - sum(layer.stored_bytes for layer in layers)
    found = {}
    print(f"\nmemory in MiB (batch 1 x {TOKENS}; activations and optimizer are estimated, linear layers only)")
    for training in (False, True):
        what = f"fine-tuning, r = {rank}" if training else "inference"
        bars = footprints(layers, dense, rank, training)
        found["fine_tuning" if training else "inference"] = [dataclasses.asdict(bar) for bar in bars]
        labels = "   ".join(f"{' '.join(bar.label.split())} {bar.total / 2**20:,.1f}" for bar in bars)
        print(f"  {what:<24} {labels}")
    return found


def _print_errors(errors: dict) -> None:
    print("\nsquared error / energy of a channel (quantiles over channels)")
    for precision, versions in errors.items():
        for which, values in versions.items():
            shown = "   ".join(f"{share} {value:.4f}" for share, value in values.items() if share != "channels")
            name = "packed base" if which == "base" else "with initial adapter"
            print(f"  {precision:<7} {name:<21} {values['channels']:8,} channels   {shown}")


def _mib(size: int) -> str:
    return f"{size / 2**20:10,.2f} MiB"
