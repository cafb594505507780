"""What each parameter is called in a Hugging Face checkpoint, one table per model.

Our path on the left; on the right their name, and whether their matrix has to be
transposed: kernels are (in, out) here and in GPT-2's files, (out, in) in T5's. {i} is
the number of a block.
"""

GPT2_NAMES: dict[str, tuple[str, bool]] = {
    "wte/embedding": ("wte.weight", False),
    "wpe/embedding": ("wpe.weight", False),
    "h/{i}/ln_1/scale": ("h.{i}.ln_1.weight", False),
    "h/{i}/ln_1/bias": ("h.{i}.ln_1.bias", False),
    "h/{i}/attn/c_attn/kernel": ("h.{i}.attn.c_attn.weight", False),
    "h/{i}/attn/c_attn/bias": ("h.{i}.attn.c_attn.bias", False),
    "h/{i}/attn/c_proj/kernel": ("h.{i}.attn.c_proj.weight", False),
    "h/{i}/attn/c_proj/bias": ("h.{i}.attn.c_proj.bias", False),
    "h/{i}/ln_2/scale": ("h.{i}.ln_2.weight", False),
    "h/{i}/ln_2/bias": ("h.{i}.ln_2.bias", False),
    "h/{i}/mlp/c_fc/kernel": ("h.{i}.mlp.c_fc.weight", False),
    "h/{i}/mlp/c_fc/bias": ("h.{i}.mlp.c_fc.bias", False),
    "h/{i}/mlp/c_proj/kernel": ("h.{i}.mlp.c_proj.weight", False),
    "h/{i}/mlp/c_proj/bias": ("h.{i}.mlp.c_proj.bias", False),
    "ln_f/scale": ("ln_f.weight", False),
    "ln_f/bias": ("ln_f.bias", False),
}
"""GPT-2, without the prefix "transformer." that some files have."""

T5_NAMES: dict[str, tuple[str, bool]] = {
    "shared/embedding": ("shared.weight", False),
    "encoder/relative_attention_bias/embedding": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        False,
    ),
    "encoder/block/{i}/layer/0/SelfAttention/q/kernel": (
        "encoder.block.{i}.layer.0.SelfAttention.q.weight",
        True,
    ),
    "encoder/block/{i}/layer/0/SelfAttention/k/kernel": (
        "encoder.block.{i}.layer.0.SelfAttention.k.weight",
        True,
    ),
    "encoder/block/{i}/layer/0/SelfAttention/v/kernel": (
        "encoder.block.{i}.layer.0.SelfAttention.v.weight",
        True,
    ),
    "encoder/block/{i}/layer/0/SelfAttention/o/kernel": (
        "encoder.block.{i}.layer.0.SelfAttention.o.weight",
        True,
    ),
    "encoder/block/{i}/layer/0/layer_norm/scale": (
        "encoder.block.{i}.layer.0.layer_norm.weight",
        False,
    ),
    "encoder/block/{i}/layer/1/DenseReluDense/wi/kernel": (
        "encoder.block.{i}.layer.1.DenseReluDense.wi.weight",
        True,
    ),
    "encoder/block/{i}/layer/1/DenseReluDense/wi_0/kernel": (
        "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight",
        True,
    ),
    "encoder/block/{i}/layer/1/DenseReluDense/wi_1/kernel": (
        "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight",
        True,
    ),
    "encoder/block/{i}/layer/1/DenseReluDense/wo/kernel": (
        "encoder.block.{i}.layer.1.DenseReluDense.wo.weight",
        True,
    ),
    "encoder/block/{i}/layer/1/layer_norm/scale": (
        "encoder.block.{i}.layer.1.layer_norm.weight",
        False,
    ),
    "encoder/final_layer_norm/scale": ("encoder.final_layer_norm.weight", False),
    "decoder/relative_attention_bias/embedding": (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        False,
    ),
    "decoder/block/{i}/layer/0/SelfAttention/q/kernel": (
        "decoder.block.{i}.layer.0.SelfAttention.q.weight",
        True,
    ),
    "decoder/block/{i}/layer/0/SelfAttention/k/kernel": (
        "decoder.block.{i}.layer.0.SelfAttention.k.weight",
        True,
    ),
    "decoder/block/{i}/layer/0/SelfAttention/v/kernel": (
        "decoder.block.{i}.layer.0.SelfAttention.v.weight",
        True,
    ),
    "decoder/block/{i}/layer/0/SelfAttention/o/kernel": (
        "decoder.block.{i}.layer.0.SelfAttention.o.weight",
        True,
    ),
    "decoder/block/{i}/layer/0/layer_norm/scale": (
        "decoder.block.{i}.layer.0.layer_norm.weight",
        False,
    ),
    "decoder/block/{i}/layer/1/EncDecAttention/q/kernel": (
        "decoder.block.{i}.layer.1.EncDecAttention.q.weight",
        True,
    ),
    "decoder/block/{i}/layer/1/EncDecAttention/k/kernel": (
        "decoder.block.{i}.layer.1.EncDecAttention.k.weight",
        True,
    ),
    "decoder/block/{i}/layer/1/EncDecAttention/v/kernel": (
        "decoder.block.{i}.layer.1.EncDecAttention.v.weight",
        True,
    ),
    "decoder/block/{i}/layer/1/EncDecAttention/o/kernel": (
        "decoder.block.{i}.layer.1.EncDecAttention.o.weight",
        True,
    ),
    "decoder/block/{i}/layer/1/layer_norm/scale": (
        "decoder.block.{i}.layer.1.layer_norm.weight",
        False,
    ),
    "decoder/block/{i}/layer/2/DenseReluDense/wi/kernel": (
        "decoder.block.{i}.layer.2.DenseReluDense.wi.weight",
        True,
    ),
    "decoder/block/{i}/layer/2/DenseReluDense/wi_0/kernel": (
        "decoder.block.{i}.layer.2.DenseReluDense.wi_0.weight",
        True,
    ),
    "decoder/block/{i}/layer/2/DenseReluDense/wi_1/kernel": (
        "decoder.block.{i}.layer.2.DenseReluDense.wi_1.weight",
        True,
    ),
    "decoder/block/{i}/layer/2/DenseReluDense/wo/kernel": (
        "decoder.block.{i}.layer.2.DenseReluDense.wo.weight",
        True,
    ),
    "decoder/block/{i}/layer/2/layer_norm/scale": (
        "decoder.block.{i}.layer.2.layer_norm.weight",
        False,
    ),
    "decoder/final_layer_norm/scale": ("decoder.final_layer_norm.weight", False),
    "lm_head/kernel": ("lm_head.weight", True),
}
"""T5; a model has `wi`, or `wi_0` and `wi_1`, and a head only if it is untied."""
