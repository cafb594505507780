"""From the settings to a model and the packed corpus."""

import jax

from experiments.common import processes
from experiments.common.problem import Data
from experiments.data import batches, packing
from experiments.main_job.config import Config
from experiments.models.build import create


def prepare(config: Config) -> Data:
    """Makes or loads all that the runs have in common.

    Raises:
        ConfigError: the corpus is too small, or the processes of this job have
            different ones.
    """
    model = config.model
    with processes.first_goes_first():
        packed = packing.load(
            config.corpus_dir,
            config.data_dir,
            vocab_size=model.vocab_size,
            context=model.context,
        )
    processes.check_same("the corpus", packed.fingerprint)
    graphdef, params = create(model, config.seed)
    return Data(
        model=model,
        graphdef=graphdef,
        params=jax.device_get(params),
        train=packed.train,
        validation=batches.spread(packed.validation, config.eval_examples),
        tokens=model.context,
        fingerprint=packed.fingerprint,
    )
