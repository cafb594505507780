"""The table of data sets: complete, honest, and free of heavy imports."""

import subprocess
import sys

import pytest

from experiments.common.errors import ConfigError
from experiments.data import builders, docstrings, iwslt, metrics, phrases, texts
from experiments.data.registry import DATASETS


def test_metrics_exist_and_fit():
    for dataset in DATASETS.values():
        assert set(dataset.metrics) <= set(metrics.METRICS)
        if dataset.prefix is None:
            assert not dataset.metrics
            continue
        summaries = "rougeL" in dataset.metrics
        assert summaries != ("bleu" in dataset.metrics)
        assert summaries == (dataset.prefix == "summarize: ")
    german = {name for name, x in DATASETS.items() if "German" in (x.prefix or "")}
    assert german == {"phrases", "iwslt2017", "opus"}


@pytest.mark.parametrize(
    ("name", "published"), [("docstrings", "XSum"), ("phrases", "IWSLT")]
)
def test_offline_data_sets_say_what_they_are(name, published):
    description = DATASETS[name].description
    assert description.startswith(f"A smoke-scale task, not {published}: ")


def test_published_data_sets_are_not_fetched_unasked(tmp_path):
    for name in ("xsum", "billsum", "iwslt2017", "opus"):
        with pytest.raises(ConfigError, match="`--data-dir` .* (lacks|has no) "):
            DATASETS[name].load(tmp_path)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("docstrings", docstrings, "load"),
        ("phrases", phrases, "load"),
        ("prose", texts, "load_prose"),
        ("code", texts, "load_code"),
        ("xsum", builders, "load_xsum"),
        ("billsum", builders, "load_billsum"),
        ("iwslt2017", iwslt, "load"),
        ("opus", builders, "load_opus"),
    ],
)
def test_arguments_arrive(name, module, function, monkeypatch, tmp_path):
    monkeypatch.setattr(module, function, lambda *arguments: arguments)
    assert DATASETS[name].load(tmp_path, download=True) == (tmp_path, True)


def test_naming_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from experiments.data import registry\n"
        "heavy = {'babel', 'grain', 'jax', 'numpy', 'sentencepiece',\n"
        "    'tensorflow_datasets'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
