"""T5 and GPT-2 on summarisation and translation: `python -m experiments.finetune`."""
