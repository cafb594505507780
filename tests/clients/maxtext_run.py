"""Trains a small MaxText model with one of the transformations; prints what it took."""

import argparse
import hashlib
import json
import os
import pathlib
import sys
import tempfile


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of tests.clients.common.TRANSFORMATIONS")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folds", choices=["muon", "metadata", "none"], default="muon")
    parser.add_argument("--folder", help="of checkpoints; none are written without")
    parser.add_argument("settings", nargs="*", help="of MaxText, as name=value")
    return parser.parse_args()


def main():
    options = arguments()
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={options.devices}"
        " --xla_backend_optimization_level=0"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("NPROC", "32")

    # After the number of devices is set.
    import dataclasses

    import maxtext
    from flax import nnx
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train
    from maxtext.utils.muon_utils import get_muon_weight_dimension_numbers

    from tests.clients import common

    used = {}

    def get_optimizer(config, learning_rate, model=None, mesh=None):
        del learning_rate, mesh  # The tests' is constant.
        sketch = common.SKETCH
        if options.folds == "muon":
            numbers = get_muon_weight_dimension_numbers(model, config)
            sketch = dataclasses.replace(sketch, weight_dimension_numbers=numbers)
        elif options.folds == "metadata":
            sketch = sketch.with_metadata(nnx.state(model, nnx.Param))
        used["sketch"] = sketch
        return common.TRANSFORMATIONS[options.name](sketch)

    optimizers.get_optimizer = get_optimizer
    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    folder = pathlib.Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    metrics = folder / f"metrics-{options.steps}.jsonl"
    settings = {
        "run_name": "run",
        "base_output_directory": folder,
        "enable_checkpointing": options.folder is not None,
        "async_checkpointing": False,
        "checkpoint_period": 2,
        "dataset_type": "synthetic",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_goodput_recording": False,
        "monitor_goodput": False,
        "attention": "dot_product",
        "metrics_file": metrics,
        "steps": options.steps,
        "dtype": "float32",
        "base_emb_dim": 256,
        "base_mlp_dim": 512,
        "base_num_query_heads": 4,
        "base_num_kv_heads": 2,
        "head_dim": 64,
        "base_num_decoder_layers": 3,
        "vocab_size": 256,
        "per_device_batch_size": 8 / options.devices,
        "max_target_length": 32,
        "ici_fsdp_parallelism": options.devices,
    }
    given = [f"{name}={value}" for name, value in settings.items()]
    config, recorder = train.initialize(["", str(base), *given, *options.settings])
    state = train.train_loop(config, recorder)
    lines = metrics.read_text().splitlines()
    losses = [json.loads(line)["learning/loss"] for line in lines]
    params = state["model"].filter(nnx.Param)
    trained = params, state["optimizer"]
    found = {
        "losses": losses,
        "bytes": common.kernel_bytes(
            state["optimizer"]["opt_state"], params, used["sketch"]
        ),
        "width_bytes": common.width_bytes(params, used["sketch"], 1),
        "folds": {
            plan.path: [plan.shape, plan.state_shape, plan.dense_reason]
            for plan in used["sketch"].plan(params)
        },
        "bits": hashlib.sha256(b"".join(common.bits(trained))).hexdigest(),
    }
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
