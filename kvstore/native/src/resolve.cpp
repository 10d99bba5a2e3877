#include "resolve.h"

#include <netdb.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>

namespace kvasir {
namespace {

constexpr int64_t kSliceMs = 50;  // between looks at `ended` while the resolver works

std::vector<Endpoint> look_up(const std::string& host, uint16_t port, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const char* node = host.empty() ? nullptr : host.c_str();
  if (getaddrinfo(node, std::to_string(port).c_str(), &hints, &found) != 0) return {};
  std::vector<Endpoint> endpoints;
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    Endpoint& endpoint = endpoints.emplace_back();
    std::memcpy(&endpoint.address, entry->ai_addr, entry->ai_addrlen);
    endpoint.size = entry->ai_addrlen;
  }
  freeaddrinfo(found);
  return endpoints;
}

struct LookUp {
  std::mutex mutex;
  std::condition_variable done_changed;
  bool done = false;
  std::vector<Endpoint> endpoints;
};

// On a thread that outlives a caller whose deadline passes: getaddrinfo cannot be interrupted. It
// ends by itself after the resolver's own time limits.
std::vector<Endpoint> look_up_until(const std::string& host, uint16_t port, int flags,
                                    Deadline deadline, const Signal* ended) {
  const auto shared = std::make_shared<LookUp>();
  std::thread([shared, host, port, flags] {
    std::vector<Endpoint> endpoints = look_up(host, port, flags);
    const std::lock_guard lock(shared->mutex);
    shared->endpoints = std::move(endpoints);
    shared->done = true;
    shared->done_changed.notify_all();
  }).detach();
  std::unique_lock lock(shared->mutex);
  while (!shared->done && !deadline.is_past() && !(ended != nullptr && ended->is_raised())) {
    shared->done_changed.wait_for(
        lock, std::chrono::milliseconds(std::min(deadline.left_ms(), kSliceMs)));
  }
  return shared->done ? shared->endpoints : std::vector<Endpoint>{};
}

}  // namespace

std::vector<Endpoint> resolve(const std::string& host, uint16_t port, bool passive,
                              Deadline deadline, const Signal* ended) {
  const int flags = passive ? AI_PASSIVE : 0;
  std::vector<Endpoint> endpoints = look_up(host, port, flags | AI_NUMERICHOST);
  if (!endpoints.empty()) return endpoints;
  return look_up_until(host, port, flags, deadline, ended);
}

}  // namespace kvasir
