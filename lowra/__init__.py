"""lowra: LoRA fine-tuning of large language models on base weights of 1 to 2 bits."""
