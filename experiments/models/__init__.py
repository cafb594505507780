"""GPT-2, Llama and T5 in Flax NNX, written for reading.

`build.create` takes a model apart into a static part and a plain tree of arrays;
losses (`build`), decoding (`decode`) and checkpoints (`hugging_face`) are functions of
the two. `config` has the sizes, without jax.
"""
