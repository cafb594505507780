"""T5 and GPT-2 on summarization and translation: `python -m experiments.finetune`."""
