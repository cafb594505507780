"""Tests of the fine-tuning data, and the packages that they need besides."""

PACKAGES = ("babel", "rouge_score", "sacrebleu", "sentencepiece")
