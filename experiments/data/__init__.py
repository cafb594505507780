"""Pairs of texts for fine-tuning: read, tokenized, batched, and scored.

`registry` names the data sets, `vocabulary` turns texts into token ids and back,
`batches` makes arrays of fixed shapes out of them, `metrics` compares what a model
wrote with what it should have written.
"""
