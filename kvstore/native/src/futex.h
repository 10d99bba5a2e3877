// Waiting on a 32-bit word that other threads of this process raise.
#pragma once

#include <cstdint>

namespace kvasir {

// Sleeps while `*word == seen`, at most `timeout_ms`. Wakers must use FUTEX_WAKE (not _PRIVATE: the
// kernel keeps the two apart).
void futex_wait(uint32_t* word, uint32_t seen, int64_t timeout_ms);

// Increments `*word` (release) and wakes every waiter.
void futex_bump(uint32_t* word);

}  // namespace kvasir
