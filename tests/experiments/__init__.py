"""Tests of the experiments, and the packages of the extra that they need."""

PACKAGES = (
    "array_record",
    "flax",
    "grain",
    "importlib_resources",
    "matplotlib",
    "orbax",
    "rich",
    "tensorflow_datasets",
    "tokenizers",
    "tyro",
)
