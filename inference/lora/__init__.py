"""LoRA adapters: their files, and the bank of pages that holds them beside the model's weights."""
