"""One of two processes: Transformers' Trainer, or TRL's, on a packed model that Accelerate shards by FSDP2.

python -m torch.distributed.run --nproc-per-node 2 sharded_training.py PACKED OUTPUT [resume] [trl]
"""

import functools
import json
import pathlib
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lowra  # noqa: F401 - registers the format

STEPS = 6


def _collated(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def train(folder: str, output: pathlib.Path, processes: int, resume: bool = False, by_trl: bool = False) -> list[float]:
    """Losses of the steps; the adapter goes to OUTPUT/adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.randint(5, 60, (32, 16), generator=torch.Generator().manual_seed(0)).tolist()
    make_arguments, make_trainer = TrainingArguments, functools.partial(Trainer, data_collator=_collated)
    if by_trl:  # which has its own way of making batches
        from byte_tokenizer import byte_tokenizer
        from trl import SFTConfig, SFTTrainer

        make_arguments = functools.partial(SFTConfig, bf16=False)
        make_trainer = functools.partial(SFTTrainer, processing_class=byte_tokenizer())
    arguments = make_arguments(
        str(output / "checkpoints"), max_steps=STEPS, per_device_train_batch_size=4 // processes, learning_rate=1e-2,
        logging_steps=1, save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, label_names=["labels"],
        dataloader_pin_memory=False, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = make_trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens]),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(output / "adapter"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import fsdp_on_cpu

    fsdp_on_cpu.allow()
    torch.set_num_threads(1)
    losses = train(sys.argv[1], pathlib.Path(sys.argv[2]), 2, "resume" in sys.argv, "trl" in sys.argv)
    (pathlib.Path(sys.argv[2]) / "losses.json").write_text(json.dumps(losses))
