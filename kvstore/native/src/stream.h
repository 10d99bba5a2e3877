// Non-blocking sockets with a deadline on every wait and a file descriptor that ends it early.
#pragma once

#include <poll.h>
#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "mapping.h"
#include "wire.h"

namespace kvasir {

int64_t monotonic_ms();
int64_t monotonic_ns();

// A moment after which a wait gives up.
class Deadline {
 public:
  static Deadline in(int64_t timeout_ms) { return Deadline(monotonic_ms() + timeout_ms); }
  int64_t left_ms() const;
  bool is_past() const { return left_ms() == 0; }
  // This deadline, or `timeout_ms` from now if that is sooner.
  Deadline at_most(int64_t timeout_ms) const;

 private:
  explicit Deadline(int64_t at_ms) : at_ms_(at_ms) {}
  int64_t at_ms_;
};

// An event that, once raised, stays raised: every wait that watches it ends with kCancelled.
class Signal {
 public:
  Signal();
  void raise();
  bool is_raised() const { return raised_.load(std::memory_order_acquire); }
  int fd() const { return fd_.get(); }

 private:
  Fd fd_;
  std::atomic<bool> raised_ = false;
};

// Carries references to pages of memory from a process to a socket.
struct Pipe {
  static Pipe make();  // without ends if the system grants none
  explicit operator bool() const { return static_cast<bool>(from); }
  Fd from;
  Fd to;
};

struct SecureChannel;

class Stream {
 public:
  Stream() = default;
  explicit Stream(Fd fd) : fd_(std::move(fd)) {}

  // kUnreachable, kTimeout or kCancelled on failure; `ended` may be null.
  static Code connect(const std::string& host, uint16_t port, Deadline deadline,
                      const Signal* ended, Stream& stream);

  Code send_all(iovec* parts, size_t num_parts, Deadline deadline, const Signal* ended) const;
  // The kernel reads the large parts where they lie: they must stay as they are until the peer has
  // said that it received them.
  Code send_in_place(iovec* parts, size_t num_parts, const Pipe& pipe, Deadline deadline,
                     const Signal* ended) const;
  Code send_all(const void* data, size_t size, Deadline deadline, const Signal* ended) const;
  Code recv_all(void* data, size_t size, Deadline deadline, const Signal* ended) const;
  // One receive into two spans; at least one byte unless it fails.
  Code recv_some(iovec (&parts)[2], size_t& received, Deadline deadline, const Signal* ended) const;
  // Until the socket is ready for `events` (POLLIN, POLLOUT).
  Code wait(short events, Deadline deadline, const Signal* ended) const;
  Code wait_readable(Deadline deadline, const Signal* ended) const;

  // The peer closed, or sent something though it is our turn.
  bool is_disturbed() const;
  void shut() const;  // both ways: ends the waits of other threads
  // Ends a TCP connection, and forgets what is still to be sent.
  void discard() const;

  // What seals and opens this connection's messages; null: they are sent as they are.
  SecureChannel* secure() const { return secure_.get(); }
  void secure(std::shared_ptr<SecureChannel> channel) { secure_ = std::move(channel); }

  int fd() const { return fd_.get(); }
  explicit operator bool() const { return static_cast<bool>(fd_); }

 private:
  Code send_parts(iovec* parts, size_t num_parts, int flags, Deadline deadline,
                  const Signal* ended) const;
  // Of the pages that the pipe holds; `flags` as for splice.
  Code send_pages(const Pipe& pipe, size_t size, unsigned flags, Deadline deadline,
                  const Signal* ended) const;

  Fd fd_;
  std::shared_ptr<SecureChannel> secure_;
};

// No delay; a peer that vanished without a word is noticed within about ten seconds.
void tune(int fd);

// A listening socket; throws std::system_error.
Fd listen_on(const std::string& host, uint16_t port, int backlog);
uint16_t bound_port(int fd);

}  // namespace kvasir
