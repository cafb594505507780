"""Tests of the experiments, and the packages of the extra that they need."""

PACKAGES = (
    "array_record",
    "babel",
    "flax",
    "grain",
    "importlib_resources",
    "matplotlib",
    "orbax",
    "rich",
    "rouge_score",
    "sacrebleu",
    "safetensors",
    "sentencepiece",
    "tensorboardX",
    "tensorflow_datasets",
    "tokenizers",
    "tyro",
)
