#include "stream.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "resolve.h"

namespace kvasir {
namespace {

constexpr size_t kIovMax = 1024;
constexpr size_t kInPlaceBytes = 16 << 10;  // smaller parts are copied
constexpr int kPipeBytes = 512 << 10;       // stands for 128 pages

void set_option(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof value);  // best effort
}

// Drops `done` bytes from the front of the parts.
void advance(iovec*& parts, size_t& num_parts, size_t done) {
  while (num_parts > 0 && done >= parts->iov_len) {
    done -= parts->iov_len;
    ++parts;
    --num_parts;
  }
  if (num_parts > 0) {
    parts->iov_base = static_cast<uint8_t*>(parts->iov_base) + done;
    parts->iov_len -= done;
  }
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

int64_t monotonic_ms() { return monotonic_ns() / 1'000'000; }

int64_t Deadline::left_ms() const { return std::max<int64_t>(at_ms_ - monotonic_ms(), 0); }

Deadline Deadline::at_most(int64_t timeout_ms) const {
  return Deadline(std::min(at_ms_, monotonic_ms() + timeout_ms));
}

Signal::Signal() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!fd_) throw std::system_error(errno, std::generic_category(), "eventfd");
}

void Signal::raise() {
  raised_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(fd_.get(), &one, sizeof one);
}

void tune(int fd) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 4);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 2);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 10'000);
}

Code Stream::connect(const std::string& host, uint16_t port, Deadline deadline, const Signal* ended,
                     Stream& stream) {
  for (const Endpoint& endpoint : resolve(host, port, false, deadline, ended)) {
    Stream attempt(
        Fd(socket(endpoint.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)));
    if (!attempt) continue;
    const auto* address = reinterpret_cast<const sockaddr*>(&endpoint.address);
    if (::connect(attempt.fd(), address, endpoint.size) != 0) {
      if (errno != EINPROGRESS) continue;
      const Code code = attempt.wait(POLLOUT, deadline, ended);
      if (code == Code::kCancelled) return code;
      int error = 0;
      socklen_t size = sizeof error;
      getsockopt(attempt.fd(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (code != Code::kOk || error != 0) continue;
    }
    tune(attempt.fd());
    stream = std::move(attempt);
    return Code::kOk;
  }
  return ended != nullptr && ended->is_raised() ? Code::kCancelled : Code::kUnreachable;
}

Code Stream::wait(short events, Deadline deadline, const Signal* ended) const {
  while (!deadline.is_past()) {
    pollfd entries[2] = {{.fd = fd_.get(), .events = events, .revents = 0},
                         {.fd = ended ? ended->fd() : -1, .events = POLLIN, .revents = 0}};
    const int64_t left_ms = std::min<int64_t>(deadline.left_ms(), 1 << 30);
    const int count = poll(entries, 2, static_cast<int>(left_ms));
    if (count < 0 && errno != EINTR) return Code::kUnreachable;
    if (entries[1].revents != 0) return Code::kCancelled;
    if (count > 0) return Code::kOk;  // an error of the socket shows in the next call on it
  }
  return Code::kTimeout;
}

Code Stream::wait_readable(Deadline deadline, const Signal* ended) const {
  return wait(POLLIN, deadline, ended);
}

Code Stream::send_all(iovec* parts, size_t num_parts, Deadline deadline,
                      const Signal* ended) const {
  return send_parts(parts, num_parts, 0, deadline, ended);
}

Code Stream::send_parts(iovec* parts, size_t num_parts, int flags, Deadline deadline,
                        const Signal* ended) const {
  advance(parts, num_parts, 0);
  while (num_parts > 0) {
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = std::min(num_parts, kIovMax);
    const ssize_t sent = sendmsg(fd_.get(), &message, MSG_NOSIGNAL | flags);
    if (sent >= 0) {
      advance(parts, num_parts, static_cast<size_t>(sent));
      continue;
    }
    if (!would_block()) return Code::kUnreachable;
    const Code code = wait(POLLOUT, deadline, ended);
    if (code != Code::kOk) return code;
  }
  return Code::kOk;
}

Pipe Pipe::make() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return {};
  Pipe pipe{.from = Fd(ends[0]), .to = Fd(ends[1])};
  // There is a limit for each user, beyond which pipes are so small that copying is quicker.
  return fcntl(ends[1], F_SETPIPE_SZ, kPipeBytes) < 0 ? Pipe{} : std::move(pipe);
}

Code Stream::send_in_place(iovec* parts, size_t num_parts, const Pipe& pipe, Deadline deadline,
                           const Signal* ended) const {
  for (; num_parts > 0; ++parts, --num_parts) {
    const bool has_more = num_parts > 1;
    if (parts->iov_len < kInPlaceBytes) {
      const Code code = send_parts(parts, 1, has_more ? MSG_MORE : 0, deadline, ended);
      if (code != Code::kOk) return code;
      continue;
    }
    while (parts->iov_len > 0) {
      const ssize_t taken = vmsplice(pipe.to.get(), parts, 1, SPLICE_F_NONBLOCK);
      // A sandbox may not know the call: then all is copied, as it would be otherwise.
      if (taken <= 0) return send_parts(parts, num_parts, 0, deadline, ended);
      const auto size = static_cast<size_t>(taken);
      parts->iov_base = static_cast<uint8_t*>(parts->iov_base) + size;
      parts->iov_len -= size;
      const unsigned flags = has_more || parts->iov_len > 0 ? SPLICE_F_MORE : 0;
      const Code code = send_pages(pipe, size, flags, deadline, ended);
      if (code != Code::kOk) return code;
    }
  }
  return Code::kOk;
}

Code Stream::send_pages(const Pipe& pipe, size_t size, unsigned flags, Deadline deadline,
                        const Signal* ended) const {
  while (size > 0) {
    const ssize_t sent =
        splice(pipe.from.get(), nullptr, fd_.get(), nullptr, size, SPLICE_F_NONBLOCK | flags);
    if (sent > 0) {
      size -= static_cast<size_t>(sent);
      continue;
    }
    if (sent == 0 || !would_block()) return Code::kUnreachable;
    const Code code = wait(POLLOUT, deadline, ended);
    if (code != Code::kOk) return code;
  }
  return Code::kOk;
}

Code Stream::send_all(const void* data, size_t size, Deadline deadline, const Signal* ended) const {
  iovec part{.iov_base = const_cast<void*>(data), .iov_len = size};
  return send_all(&part, 1, deadline, ended);
}

Code Stream::recv_some(iovec (&parts)[2], size_t& received, Deadline deadline,
                       const Signal* ended) const {
  for (;;) {
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    const ssize_t count = recvmsg(fd_.get(), &message, 0);
    if (count > 0) {
      received = static_cast<size_t>(count);
      return Code::kOk;
    }
    if (count == 0 || !would_block()) return Code::kUnreachable;
    const Code code = wait(POLLIN, deadline, ended);
    if (code != Code::kOk) return code;
  }
}

Code Stream::recv_all(void* data, size_t size, Deadline deadline, const Signal* ended) const {
  auto* next = static_cast<uint8_t*>(data);
  while (size > 0) {
    iovec parts[2] = {{.iov_base = next, .iov_len = size}, {.iov_base = next, .iov_len = 0}};
    size_t received = 0;
    const Code code = recv_some(parts, received, deadline, ended);
    if (code != Code::kOk) return code;
    next += received;
    size -= received;
  }
  return Code::kOk;
}

bool Stream::is_disturbed() const {
  pollfd entry{.fd = fd_.get(), .events = POLLIN | POLLRDHUP, .revents = 0};
  return poll(&entry, 1, 0) > 0;
}

void Stream::shut() const { shutdown(fd_.get(), SHUT_RDWR); }

void Stream::discard() const {
  const sockaddr none{.sa_family = AF_UNSPEC, .sa_data = {}};
  ::connect(fd_.get(), &none, sizeof none);
}

Fd listen_on(const std::string& host, uint16_t port, int backlog) {
  int error = EADDRNOTAVAIL;
  for (const Endpoint& endpoint : resolve(host, port, true, Deadline::in(5000), nullptr)) {
    Fd fd(socket(endpoint.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
    const auto* address = reinterpret_cast<const sockaddr*>(&endpoint.address);
    if (fd && bind(fd.get(), address, endpoint.size) == 0 && listen(fd.get(), backlog) == 0) {
      return fd;
    }
    error = errno;
  }
  throw std::system_error(error, std::generic_category(),
                          "cannot listen on " + host + ":" + std::to_string(port));
}

uint16_t bound_port(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  return address.ss_family == AF_INET6
             ? ntohs(reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port)
             : ntohs(reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
}

}  // namespace kvasir
