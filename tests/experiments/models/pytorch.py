"""The same models in PyTorch, as the transformers library has them."""

import numpy as np
import torch
import transformers

from experiments.models.config import DecoderConfig, GPT2Config, LlamaConfig
from tests.experiments.models.tiny import batch_of, prompts_of

LENGTH = 9
BEAMS = 3


def build(config, seed):
    """Returns a model of these sizes whose parameters are all random."""
    torch.manual_seed(seed)
    makers = {GPT2Config: _gpt2, LlamaConfig: _llama}
    model = makers.get(type(config), _t5)(config)
    if not getattr(config, "tied", True) and hasattr(model, "shared"):
        # The library ties the head at first; a loaded checkpoint unties it.
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.clone())
    # Larger noise would saturate T5's unscaled softmax, where rounding alone moves
    # logits by more than 1e-4.
    noise = 1.5 * config.width**-0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape)
    return model.eval()


def _gpt2(config):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.layers,
            n_embd=config.width,
            n_head=config.heads,
            n_positions=config.context,
            vocab_size=config.vocab_size,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _llama(config):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=config.layers,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            vocab_size=config.vocab_size,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            rms_norm_eps=config.epsilon,
            tie_word_embeddings=config.tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _t5(config):
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            num_layers=config.layers,
            num_decoder_layers=config.decoder_layers,
            d_model=config.width,
            d_kv=config.head_width,
            d_ff=config.hidden,
            num_heads=config.heads,
            vocab_size=config.vocab_size,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu" if config.gated else "relu",
            tie_word_embeddings=config.tied,
            decoder_start_token_id=0,
            eos_token_id=None,
        )
    )


def tensors_of(model):
    """Returns what the model would save: no second name of a tied embedding."""
    tied = set(model.all_tied_weights_keys)
    return {
        name: tensor.detach().numpy().copy()
        for name, tensor in model.state_dict().items()
        if name not in tied or not _same(model, name)
    }


def _same(model, name):
    source = model.get_parameter(model.all_tied_weights_keys[name])
    return model.get_parameter(name) is source


@torch.no_grad()
def logits_of(model, config):
    """Returns the logits of the padded batch, and where they count."""
    if isinstance(config, DecoderConfig):
        batch = prompts_of(config, seed=3)
        mask = batch["prompt_mask"]
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        out = model(
            _long(batch["prompt"]),
            attention_mask=_long(mask),
            position_ids=_long(positions),
        )
    else:
        batch = batch_of(config, seed=3)
        mask = np.ones(batch["target"].shape, bool)
        out = model(
            _long(batch["source"]),
            attention_mask=_long(batch["source"] != 0),
            labels=_long(batch["target"]),
        )
    return out.logits.numpy(), mask


@torch.no_grad()
def decode(model, config, eos=None, beams=1, length_penalty=1.0):
    """Returns only the new tokens, (B, LENGTH), filled up with 0."""
    batch = prompts_of(config)
    decoder_only = isinstance(config, DecoderConfig)
    tokens = batch["prompt"] if decoder_only else batch["source"]
    settings = transformers.GenerationConfig(
        max_new_tokens=LENGTH,
        do_sample=False,
        num_beams=beams,
        length_penalty=length_penalty if beams > 1 else None,
        early_stopping="never" if beams > 1 else None,
        eos_token_id=eos,
        pad_token_id=0,
        decoder_start_token_id=None if decoder_only else 0,
    )
    mask = batch["prompt_mask"] if decoder_only else tokens != 0
    out = model.generate(
        _long(tokens), attention_mask=_long(mask), generation_config=settings
    )
    new = out.numpy()[:, tokens.shape[1] if decoder_only else 1 :]
    new = np.pad(new, ((0, 0), (0, LENGTH - new.shape[1])))
    # Beam search there fills up with the end, not with the padding, if that is 0.
    after_end = np.cumsum(new == eos, axis=1) - (new == eos) > 0
    return np.where(after_end, 0, new)


def end_of(model, config):
    """Returns a token that ends some row early, and if possible no row at once."""
    tokens = decode(model, config)
    later = set(tokens[:, 2:-1].flat) - {0}
    return int(min(later - set(tokens[:, :2].flat) or later))


def _long(array):
    return torch.from_numpy(np.ascontiguousarray(array).astype(np.int64))
