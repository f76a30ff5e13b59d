"""`lowra env`: versions, GPUs, native libraries and kernels in use."""

import argparse

from ..inspection.environment import describe


def run(args: argparse.Namespace) -> dict:
    """Prints what is found here and returns it."""
    found = describe()
    for name, version in {**found["versions"], "python": found["python"], "system": found["system"]}.items():
        _line(name, version or "not installed")
    cuda = found["cuda"]
    _line("CUDA of torch", cuda["of_torch"] or "none: a build for the CPU")
    _line("NVIDIA driver", cuda["driver"] or "none")
    for index, card in enumerate(cuda["gpus"]):
        capability = ".".join(map(str, card["capability"]))
        _line(f"cuda:{index}", f"{card['name']}, compute capability {capability}, {card['bytes'] / 2**30:.1f} GiB")
    print("\nnative libraries")
    for kind, library in found["libraries"].items():
        _line(f"  {kind}", "loaded" if library["loaded"] else f"not loaded: {library['why_not']}")
        for path in library["files"]:
            _line("", path)
    print("\nkernels")
    for device, kernels in found["kernels"].items():
        _line(f"  {device}", f"{kernels['in_use']}, tried: {kernels['tried']}")
        for name, reason in kernels["not_in_use"].items():
            _line("", f"not {name}: {reason}")
    print("\nintegrations switched off" + ("" if found["switched_off"] else ": none"))
    for reason in found["switched_off"]:
        print(f"  {reason}")
    _line("autoload", found["autoload"])
    for name, value in found["settings"].items():
        _line(name, value)
    return found


def _line(name: str, value: str) -> None:
    print(f"{name:<16} {value}")
