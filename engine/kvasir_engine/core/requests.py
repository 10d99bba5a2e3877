"""Which requests an engine can serve at all."""

from kvasir_kvstore.core.block import BLOCK_TOKENS

from kvasir_engine.core.types import EngineLimits, EngineRequest, Refusal, RefusedError, Sampling

UINT64_MAX = (1 << 64) - 1
INT32_MAX = (1 << 31) - 1
TEMPERATURE_MAX = 1e6
"""Beyond it every token is as likely as any other, long before float32 ends."""
TOP_P_MIN = 1e-37
"""Below it the sampler's float32 ends in 0, which would fail the step of everybody in it."""


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold the KV of this many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


def check_request(request: EngineRequest, limits: EngineLimits) -> None:
    """Checks what can be said without looking at other requests.

    Raises:
        RefusedError: INVALID with the field, or NEVER_FITS.
    """
    _check_tokens(request, limits.vocab_size)
    _check_sampling(request.sampling)
    _check_session(request)
    _check_length(request, limits)


def _check_tokens(request: EngineRequest, vocab_size: int) -> None:
    if not request.prompt:
        raise RefusedError(Refusal.INVALID, "the prompt has no tokens", param="prompt")
    known = request.prompt + request.resume_tokens
    if min(known) < 0 or max(known) >= vocab_size:
        message = f"token ids must be between 0 and {vocab_size - 1}"
        raise RefusedError(Refusal.INVALID, message, param="prompt")


def _check_sampling(sampling: Sampling) -> None:
    checks = (
        ("temperature", 0 <= sampling.temperature <= TEMPERATURE_MAX, "between 0 and 1000000"),
        ("top_k", 0 <= sampling.top_k <= INT32_MAX, "between 0 and 2147483647"),
        ("top_p", TOP_P_MIN <= sampling.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= sampling.seed <= UINT64_MAX, "an unsigned 64-bit number"),
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
    )
    for name, is_fine, wanted in checks:
        if not is_fine:
            raise RefusedError(Refusal.INVALID, f"{name} must be {wanted}", param=name)


def _check_session(request: EngineRequest) -> None:
    """Both come from a peer."""
    session_id = request.prefill_only_session
    if session_id is not None and not 0 <= session_id <= UINT64_MAX:
        message = "session_id must be an unsigned 64-bit number"
        raise RefusedError(Refusal.INVALID, message, param="session_id")
    num_blocks = num_blocks_for(len(request.prompt) + len(request.resume_tokens))
    if not 0 <= request.skip_blocks <= num_blocks:
        message = f"skip_blocks must be between 0 and {num_blocks}"
        raise RefusedError(Refusal.INVALID, message, param="skip_blocks")


def _check_length(request: EngineRequest, limits: EngineLimits) -> None:
    num_known = len(request.prompt) + len(request.resume_tokens)
    num_total = max(len(request.prompt) + request.sampling.max_tokens, num_known)
    if request.prefill_only_session is not None:
        num_total = num_known + 1
    _check_fits(num_known, num_total, limits.context_length, "the context")
    _check_fits(num_known, num_total, limits.kv_tokens_max, "this worker's KV memory")


def _check_fits(num_known: int, num_total: int, num_tokens_max: int, limit: str) -> None:
    if num_total > num_tokens_max:
        message = (
            f"{num_known} prompt tokens and {num_total - num_known} output tokens exceed"
            f" {limit} of {num_tokens_max} tokens"
        )
        param = "prompt" if num_known >= num_tokens_max else "max_tokens"
        raise RefusedError(Refusal.NEVER_FITS, message, param=param)
