"""Tokens a second of a whole model on the processor: `fast_decoding` beside llama.cpp on the same shape, in turns.

    pip install gguf
    python scripts/bench_cpu_generation.py --llama llama.cpp/build/bin --shapes tinyllama --bits 1.5 2.0 --threads 1 2

Weights are random; times do not depend on their values. Ours has a head of bfloat16, and with `--heads 16 4` another
packed at 4 bits; llama.cpp's files have all layers in Q2_K and the head in Q6_K, as its quantiser leaves it. A number
is the time of a longer generation less that of a shorter one, over the tokens between: loading, prompt and warming up
drop out. With one thread it is the process's CPU seconds, since other work on the machine does not count there; with
more the wall's. Also printed: the largest resident memory of ours, over the bytes of its tensors.
"""

import argparse
import pathlib
import resource
import statistics
import subprocess
import tempfile
import time

import torch
from kernels.ggml_products import Ggml
from random_models import MIXES, SHAPES, make_model, pack_head

import lowra

SHORT, LONG = 16, 80
DENSE = 16.0  # bits of a head that is not packed


def write_gguf(path: pathlib.Path, shape: str, ggml: Ggml) -> None:
    """A LLaMA of random weights, as llama.cpp reads it."""
    import gguf

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        coded = ggml.quantized(kind, torch.randn(32, columns) * 0.02).numpy()
        own = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(name, coded.repeat(rows // 32, axis=0), raw_dtype=own)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, torch.ones(hidden).numpy())

    add("token_embd.weight", vocabulary, hidden, "Q2_K")
    add("output.weight", vocabulary, hidden, "Q6_K")
    add_norm("output_norm.weight")
    narrow = hidden // heads * kv_heads
    for layer in range(layers):
        block = f"blk.{layer}."
        add_norm(block + "attn_norm.weight")
        add_norm(block + "ffn_norm.weight")
        for part, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("output", hidden)):
            add(f"{block}attn_{part}.weight", rows, hidden, "Q2_K")
        for part in ("gate", "up"):
            add(f"{block}ffn_{part}.weight", intermediate, hidden, "Q2_K")
        add(block + "ffn_down.weight", hidden, intermediate, "Q2_K")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds_of_llama(folder: str, path: pathlib.Path, threads: int) -> float:
    """Of a token."""

    def run(tokens: int) -> float:
        tool = pathlib.Path(folder) / "llama-bench"
        call = [tool, "-m", path, "-p", "0", "-n", str(tokens), "-r", "1", "-t", str(threads), "-ngl", "0"]
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(call, check=True, capture_output=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - wall
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime if threads == 1 else wall

    short = run(SHORT)
    return (run(LONG) - short) / (LONG - SHORT)


def seconds_of_ours(model: torch.nn.Module, threads: int) -> float:
    """Of a token."""
    torch.set_num_threads(threads)
    prompt = torch.randint(3, model.config.vocab_size, (1, 8))

    def run(tokens: int) -> float:
        clock = time.process_time if threads == 1 else time.perf_counter
        begun = clock()
        model.generate(prompt, max_new_tokens=tokens, do_sample=False, custom_generate=lowra.fast_decoding)
        return clock() - begun

    run(LONG)  # makes the cache that both take
    short = run(SHORT)
    return (run(LONG) - short) / (LONG - SHORT)


def measure(shape: str, path: pathlib.Path, args: argparse.Namespace) -> None:
    """Prints what ours and llama.cpp take on one shape; its file goes to `path`."""
    if args.llama is not None:
        write_gguf(path, shape, Ggml(args.llama, 1))
    models = {(bits, head): make_model(shape, bits, device="cpu") for bits in args.bits for head in args.heads}
    for (_, head), model in models.items():
        if head < DENSE:
            pack_head(model, head, device="cpu")
    for threads in args.threads:
        found: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            for (bits, head), model in models.items():
                found.setdefault(f"lowra {bits}, head {head}", []).append(seconds_of_ours(model, threads))
            if args.llama is not None:
                found.setdefault("Q2_K, head Q6_K", []).append(seconds_of_llama(args.llama, path, threads))
        for kind, seconds in found.items():
            middle = statistics.median(seconds)
            each = " ".join(f"{1e3 * value:.1f}" for value in sorted(seconds))
            print(
                f"{shape} {threads} threads {kind:18} {1e3 * middle:7.1f} ms {1 / middle:6.1f}/s  ({each})",
                flush=True,
            )
    tensors = sum(t.nbytes for model in models.values() for t in (*model.parameters(), *model.buffers()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{shape}: tensors {tensors / 1e9:.2f} GB, largest resident memory {peak / 1e9:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="folder of llama.cpp's libraries and llama-bench; without it it is left out")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tinyllama"])
    parser.add_argument("--bits", nargs="+", type=float, default=[1.5, 2.0])
    parser.add_argument(
        "--heads", nargs="+", type=float, choices=[DENSE, *MIXES], default=[DENSE], help="bits of ours; 16: bfloat16"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            measure(shape, pathlib.Path(folder) / f"{shape}.gguf", args)


if __name__ == "__main__":
    main()
