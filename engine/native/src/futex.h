// Sleep on a 32-bit word until another thread changes it (Linux futex).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace kvasir {

// Returns at once if the word no longer holds `expected`; may also return for no reason.
inline void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, word, FUTEX_WAIT, expected, nullptr, nullptr, 0);
}

// Not FUTEX_PRIVATE: the word may lie in memory that processes share.
inline void futex_wake_all(void* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace kvasir
