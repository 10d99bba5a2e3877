#include "server.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <system_error>

namespace kvasir {
namespace {

constexpr int kBacklog = 128;
constexpr int64_t kReapMs = 1'000;
constexpr int64_t kIdleKeptMs = 200;  // a connection idle for longer makes room for a new one

// splice, unlike send, cannot be told to raise no signal where the peer has gone.
void block_pipe_signal() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

}  // namespace

BlockServer::BlockServer(BlockPool& pool, const ServerOptions& options)
    : pool_(pool),
      self_(options.self),
      connections_max_(options.connections_max),
      secret_(options.secret),
      remote_agent_(options.remote_agent),
      listener_(listen_on(options.host, options.port, kBacklog)),
      port_(bound_port(listener_.get())),
      local_listener_(options.socket_dir.empty()
                          ? LocalListener()
                          : listen_local(options.socket_dir, self_.uid, kBacklog)),
      acceptor_([this] { accept_loop(); }) {}

void BlockServer::stop() {
  const std::lock_guard stop_lock(stop_mutex_);
  stopped_.raise();
  pool_.wake();
  if (acceptor_.joinable()) acceptor_.join();
  std::map<uint64_t, std::unique_ptr<Connection>> connections;
  {
    const std::lock_guard lock(mutex_);
    connections.swap(connections_);
    for (const auto& [id, connection] : connections) connection->stream.shut();
  }
  for (const auto& [id, connection] : connections) connection->thread.join();
  listener_ = Fd();
  stop_listening(local_listener_);
}

size_t BlockServer::num_connections() const {
  const std::lock_guard lock(mutex_);
  return static_cast<size_t>(std::count_if(connections_.begin(), connections_.end(),
                                           [](const auto& entry) { return !entry.second->done; }));
}

void BlockServer::accept_loop() {
  while (!stopped_.is_raised()) {
    pollfd entries[3] = {{.fd = listener_.get(), .events = POLLIN, .revents = 0},
                         {.fd = local_listener_.fd.get(), .events = POLLIN, .revents = 0},
                         {.fd = stopped_.fd(), .events = POLLIN, .revents = 0}};
    poll(entries, 3, kReapMs);
    reap();
    if (stopped_.is_raised()) return;
    if (entries[0].revents != 0) accept_from(listener_, false);
    if (entries[1].revents != 0) accept_from(local_listener_.fd, true);
  }
}

void BlockServer::accept_from(const Fd& listener, bool is_local) {
  Stream stream(Fd(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC)));
  if (stream) {
    admit(std::move(stream), is_local);
  } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
    pollfd stop_only{.fd = stopped_.fd(), .events = POLLIN, .revents = 0};
    poll(&stop_only, 1, 100);  // out of descriptors: wait for some to be freed
  }
}

void BlockServer::admit(Stream stream, bool is_local) {
  if (!is_local) tune(stream.fd());
  if (num_connections() >= connections_max_) close_idlest();
  const std::lock_guard lock(mutex_);
  const auto is_open = [](const auto& entry) { return !entry.second->done; };
  const auto num_open = std::count_if(connections_.begin(), connections_.end(), is_open);
  if (num_open >= static_cast<ptrdiff_t>(connections_max_)) {
    refuse(stream);
    return;
  }
  auto connection = std::make_unique<Connection>(std::move(stream), is_local);
  try {
    connection->thread = std::thread(&BlockServer::serve, this, connection.get());
  } catch (const std::system_error&) {  // the process may have no more threads
    refuse(connection->stream);
    return;
  }
  connections_.emplace(next_id_++, std::move(connection));
}

void BlockServer::serve(Connection* connection) {
  block_pipe_signal();
  const SenderContext context{.pool = pool_,
                              .self = self_,
                              .counters = counters_,
                              .stopped = stopped_,
                              .secret = secret_,
                              .remote_agent = remote_agent_,
                              .is_local = connection->is_local,
                              .takes_extra = 2 * num_connections() <= connections_max_};
  try {
    serve_connection(context, connection->stream, connection->idle_since_ms);
  } catch (const std::exception&) {  // no memory, or no cryptography: this connection ends
    counters_.bad_requests += 1;
  }
  connection->stream.shut();
  const std::lock_guard lock(mutex_);
  connection->done = true;
}

void BlockServer::refuse(const Stream& stream) {
  counters_.connections_refused += 1;
  HelloReply reply{};
  reply.code = Code::kRefused;
  reply.uid = self_.uid;
  reply.epoch = self_.epoch;
  seal(reply);
  stream.send_all(&reply, sizeof reply, Deadline::in(0), &stopped_);  // fits the socket's buffer
}

// Ends the connection that has waited longest for a request: its client opens another if needed.
void BlockServer::close_idlest() {
  const std::lock_guard lock(mutex_);
  const int64_t idle_enough_ms = monotonic_ms() - kIdleKeptMs;
  Connection* idlest = nullptr;
  int64_t oldest_ms = idle_enough_ms;
  for (const auto& [id, connection] : connections_) {
    const int64_t since_ms = connection->idle_since_ms;
    if (connection->done || since_ms == 0 || since_ms > oldest_ms) continue;
    oldest_ms = since_ms;
    idlest = connection.get();
  }
  if (idlest == nullptr) return;
  idlest->stream.shut();
  idlest->done = true;  // its thread ends at once and is reaped with the others
}

void BlockServer::reap() {
  std::vector<std::unique_ptr<Connection>> ended;
  {
    const std::lock_guard lock(mutex_);
    for (auto it = connections_.begin(); it != connections_.end();) {
      if (it->second->done) {
        ended.push_back(std::move(it->second));
        it = connections_.erase(it);
      } else {
        ++it;
      }
    }
  }
  for (const auto& connection : ended) connection->thread.join();
}

}  // namespace kvasir
