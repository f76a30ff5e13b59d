"""Greedy tokens of vLLM, in a process of its own: prints them as JSON, for what the first argument asks."""

import json
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.argv[1])
    options = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True, "enforce_eager": True}
    model = LLM(asked["model"], **{**options, **asked["options"]})
    prompts = [{"prompt_token_ids": tokens} for tokens in asked["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    adapter = LoRARequest("mine", 1, asked["adapter"]) if "adapter" in asked else None
    answers = model.generate(prompts, sampling, lora_request=adapter)
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
