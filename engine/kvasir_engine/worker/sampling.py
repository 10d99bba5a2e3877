"""Sampling as the wire has it, turned into what the engine takes."""

from kvasir_proto.v1 import common_pb2

from kvasir_engine.core.types import Sampling


def engine_sampling(sampling: common_pb2.SamplingParams) -> Sampling:
    """Sampling as the engine takes it."""
    return Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )


def stop_token_ids(
    sampling: common_pb2.SamplingParams, eos_token_ids: frozenset[int]
) -> frozenset[int]:
    """Tokens that end the output."""
    own = frozenset(sampling.stop_token_ids)
    return own if sampling.ignore_eos else own | eos_token_ids
