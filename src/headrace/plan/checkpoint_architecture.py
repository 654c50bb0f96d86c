"""Converts a checkpoint's header into the `Architecture` of a forecast for other machines."""

from headrace.checkpoint import Checkpoint
from headrace.forecast.architecture import Architecture
from headrace.plan.shape import Shape, shape_of


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The sizes of a file or folder, counted as the plan counts them. For an encoder-decoder, a pass is the decoder's.

    Raises:
        UnsupportedError: the architecture does not run.
        CheckpointError: the metadata is inconsistent.
    """
    shape = shape_of(checkpoint)
    heads = max(1, checkpoint.number("attention.head_count", 1))
    experts = shape.experts
    table = 0 if shape.tied else checkpoint.vocab_size * shape.hidden
    params = float(shape.weights_count + table)
    unrouted = 0.0 if experts is None else sum(experts.weights.values()) * (1 - experts.per_token / experts.count)
    return Architecture(
        name=checkpoint.name,
        params=params,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=heads,
        kv_heads=shape.kv_heads,
        head_dim=max(1, shape.attention_width // heads),
        feed_forward=checkpoint.number("feed_forward_length", shape.feed_forward),
        vocab=checkpoint.vocab_size,
        tied=shape.tied,
        context=checkpoint.number("context_length", 0) or None,
        active_params=None if experts is None else params - unrouted,
        experts=0 if experts is None else experts.count,
        experts_per_token=0 if experts is None else experts.per_token,
        expert_feed_forward=None if experts is None else experts.width,
        dense_layers=0 if experts is None else shape.layers - experts.layers,
        kv_dim_per_layer=shape.cached_elements / shape.layers or None,
        kv_layers=None if shape.cached_elements else 0,
        weights_bytes=float(shape.weights_bytes) * shape.read_share,
        bits=8 * _stored_bytes(shape) / shape.weights_count,
        source="the file's header" if checkpoint.config is None else "the folder's headers",
    )


def _stored_bytes(shape: Shape) -> float:
    """Bytes of the weights as stored in the file: other programs multiply them in that form."""
    experts = 0.0 if shape.experts is None else shape.experts.nbytes * shape.experts.read_share
    return shape.weights_bytes * shape.read_share + shape.prefill_only_bytes + experts
