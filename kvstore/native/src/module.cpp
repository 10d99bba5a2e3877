// Binds the native data plane to Python: checks arguments and releases the GIL, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <system_error>

#include "block_names.h"
#include "client.h"
#include "codec.h"
#include "codec_module.h"
#include "crc32c.h"
#include "crypto.h"
#include "pool.h"
#include "remote_module.h"
#include "server.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvasir {
namespace {

Name to_name(const nb::bytes& value, const char* what) {
  if (value.size() != kNameBytes) {
    throw std::invalid_argument(std::string(what) + " must be 16 bytes, not " +
                                std::to_string(value.size()));
  }
  Name name;
  std::memcpy(name.data(), value.data(), kNameBytes);
  return name;
}

std::string to_secret(const nb::bytes& key, bool is_remote) {
  if (key.size() > 0 && is_remote) {
    throw std::invalid_argument("what is read from afar is not encrypted: no key can be given");
  }
  if (key.size() > 0 && key.size() < kSecretBytesMin) {
    throw std::invalid_argument("key must have at least 32 bytes");
  }
  return std::string(key.c_str(), key.size());
}

void construct_pool(BlockPool* self, int64_t num_blocks, int64_t num_layers, int64_t layer_bytes,
                    const nb::bytes& layout_digest, bool is_shared) {
  const auto check = [](int64_t value, int64_t max, const char* what) {
    if (value < 1 || value > max) {
      throw std::invalid_argument(std::string(what) + " must be from 1 to " + std::to_string(max) +
                                  ", not " + std::to_string(value));
    }
    return static_cast<uint32_t>(value);
  };
  const PoolShape shape{.num_blocks = check(num_blocks, INT32_MAX, "num_blocks"),
                        .num_layers = check(num_layers, 4096, "num_layers"),
                        .layer_bytes = check(layer_bytes, 1 << 28, "layer_bytes"),
                        .layout_digest = to_name(layout_digest, "layout_digest")};
  new (self) BlockPool(shape, is_shared);
}

using Bytes2d = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;
using Words = nb::ndarray<nb::numpy, uint32_t, nb::ndim<1>>;

// The arrays own a reference to the pool, so its memory outlives them.
Bytes2d pool_data(nb::handle self) {
  const auto& pool = nb::cast<const BlockPool&>(self);
  return Bytes2d(pool.data(), {pool.shape().num_blocks, pool.shape().block_bytes()}, self);
}

Words pool_ready(nb::handle self) {
  const auto& pool = nb::cast<const BlockPool&>(self);
  return Words(pool.ready(), {pool.shape().num_blocks}, self);
}

Words pool_uses(nb::handle self) {
  const auto& pool = nb::cast<const BlockPool&>(self);
  return Words(pool.uses(), {pool.shape().num_blocks}, self);
}

Words pool_progress(nb::handle self) {
  return Words(nb::cast<const BlockPool&>(self).progress(), {1}, self);
}

nb::bytes pool_digest(const BlockPool& pool) {
  return nb::bytes(pool.shape().layout_digest.data(), kNameBytes);
}

uint32_t pool_checksum(const BlockPool& pool, uint32_t block) {
  if (block >= pool.shape().num_blocks) throw std::out_of_range("no such block");
  return crc32c(pool.layer(block, 0), pool.shape().block_bytes());
}

void bind_pool(nb::module_& m) {
  nb::class_<BlockPool>(m, "BlockPool")
      .def("__init__", &construct_pool, nb::kw_only(), "num_blocks"_a, "num_layers"_a,
           "layer_bytes"_a, "layout_digest"_a, "shared"_a = false)
      .def_prop_ro("data", &pool_data)
      .def_prop_ro("ready", &pool_ready)
      .def_prop_ro("progress", &pool_progress)
      .def_prop_ro("uses", &pool_uses)
      .def_prop_ro("num_blocks", [](const BlockPool& p) { return p.shape().num_blocks; })
      .def_prop_ro("num_layers", [](const BlockPool& p) { return p.shape().num_layers; })
      .def_prop_ro("layer_bytes", [](const BlockPool& p) { return p.shape().layer_bytes; })
      .def_prop_ro("layout_digest", &pool_digest)
      .def_prop_ro("num_published", &BlockPool::num_published)
      .def_prop_ro("num_sessions", &BlockPool::num_sessions)
      .def("reset", &BlockPool::reset, "block"_a)
      .def("checksum", &pool_checksum, "block"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "publish",
          [](BlockPool& p, const nb::bytes& name, uint32_t block) {
            return p.publish(to_name(name, "name"), block);
          },
          "name"_a, "block"_a)
      .def(
          "unpublish",
          [](BlockPool& p, const nb::bytes& name) { return p.unpublish(to_name(name, "name")); },
          "name"_a)
      .def(
          "lookup",
          [](const BlockPool& p, const nb::bytes& name) { return p.lookup(to_name(name, "name")); },
          "name"_a)
      .def("open_session", &BlockPool::open_session, "session_id"_a)
      .def("extend_session", &BlockPool::extend_session, "session_id"_a, "blocks"_a)
      .def("finish_session", &BlockPool::finish_session, "session_id"_a)
      .def("abort_session", &BlockPool::abort_session, "session_id"_a)
      .def("session_pulled", &BlockPool::session_pulled, "session_id"_a)
      .def("close_session", &BlockPool::close_session, "session_id"_a);
}

void construct_server(BlockServer* self, BlockPool& pool, const std::string& host, uint16_t port,
                      const nb::bytes& uid, uint64_t epoch, uint32_t connections_max,
                      const std::string& socket_dir, const nb::bytes& key,
                      const nb::bytes& remote_agent) {
  const ServerOptions options{.host = host,
                              .port = port,
                              .self = {.uid = to_name(uid, "uid"), .epoch = epoch},
                              .connections_max = connections_max,
                              .secret = to_secret(key, remote_agent.size() > 0),
                              .socket_dir = socket_dir,
                              .remote_agent = {remote_agent.c_str(), remote_agent.size()}};
  if (remote_agent.size() > kAgentBytesMax) throw std::invalid_argument("remote_agent is too long");
  if (connections_max < 1) throw std::invalid_argument("connections_max must be at least 1");
  if (!socket_dir.empty() && !pool.is_shared()) {
    throw std::invalid_argument("socket_dir: the pool's memory is not shared");
  }
  if (!options.secret.empty()) require_crypto();
  try {
    new (self) BlockServer(pool, options);
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
    throw nb::python_error();
  }
}

nb::dict server_stats(const BlockServer& server) {
  const ServerCounters& counters = server.counters();
  nb::dict stats;
  stats["connections"] = server.num_connections();
  stats["connections_refused"] = counters.connections_refused.load();
  stats["stale_refused"] = counters.stale_refused.load();
  stats["layout_refused"] = counters.layout_refused.load();
  stats["unauthenticated"] = counters.unauthenticated.load();
  stats["bad_requests"] = counters.bad_requests.load();
  stats["blocks_sent"] = counters.blocks_sent.load();
  stats["blocks_missed"] = counters.blocks_missed.load();
  stats["bytes_sent"] = counters.bytes_sent.load();
  stats["sessions_sent"] = counters.sessions_sent.load();
  stats["background_waits"] = server.pool().traffic().num_yields();
  return stats;
}

void bind_server(nb::module_& m) {
  nb::class_<BlockServer>(m, "BlockServer")
      .def("__init__", &construct_server, "pool"_a, nb::kw_only(), "host"_a, "port"_a, "uid"_a,
           "epoch"_a, "connections_max"_a = 256, "socket_dir"_a = "", "key"_a = nb::bytes("", 0),
           "remote_agent"_a = nb::bytes("", 0), nb::keep_alive<1, 2>())
      .def_prop_ro("port", &BlockServer::port)
      .def("stop", &BlockServer::stop, nb::call_guard<nb::gil_scoped_release>())
      .def("stats", &server_stats);
}

PullResult run_pull(BlockClient& client, Pull pull) {
  if (is_lossy(pull.codec) && !client.can_decode()) {
    throw std::invalid_argument("a client without num_heads and head_dim takes raw only");
  }
  if (pull.timeout_ms < 1 || pull.timeout_ms > 86'400'000) {
    throw std::invalid_argument("timeout_ms must be from 1 to 86400000, not " +
                                std::to_string(pull.timeout_ms));
  }
  const nb::gil_scoped_release release;
  return client.pull(pull);
}

PullResult pull_session(BlockClient& client, const std::string& host, uint16_t port,
                        const nb::bytes& uid, uint64_t epoch, uint64_t session_id,
                        std::vector<uint32_t> blocks, int64_t timeout_ms, uint64_t cancel_id,
                        const std::string& codec) {
  return run_pull(client, {.peer = {host, port, {to_name(uid, "uid"), epoch}},
                           .blocks = std::move(blocks),
                           .names = {},
                           .session_id = session_id,
                           .timeout_ms = timeout_ms,
                           .cancel_id = cancel_id,
                           .codec = codec_of(codec)});
}

PullResult pull_named(BlockClient& client, const std::string& host, uint16_t port,
                      const nb::bytes& uid, uint64_t epoch, const std::vector<nb::bytes>& names,
                      std::vector<uint32_t> blocks, int64_t timeout_ms, uint64_t cancel_id,
                      const std::string& codec, bool is_background, bool may_be_local) {
  if (names.empty()) return {};
  if (names.size() != blocks.size() || names.size() > kNamesMax) {
    throw std::invalid_argument("names and blocks must be of one length, at most " +
                                std::to_string(kNamesMax));
  }
  Pull pull{.peer = {host, port, {to_name(uid, "uid"), epoch}, may_be_local},
            .blocks = std::move(blocks),
            .names = {},
            .timeout_ms = timeout_ms,
            .cancel_id = cancel_id,
            .codec = codec_of(codec),
            .is_background = is_background};
  for (const nb::bytes& name : names) pull.names.push_back(to_name(name, "name"));
  return run_pull(client, std::move(pull));
}

void construct_client(BlockClient* self, BlockPool& pool, uint32_t connections_per_peer_max,
                      const std::string& socket_dir, const nb::bytes& key, uint32_t num_heads,
                      uint32_t head_dim, const nb::object& remote) {
  const CodecShape codecs{.num_heads = num_heads, .head_dim = head_dim};
  const bool is_right = codecs.is_encodable() && codecs.layer_bytes() == pool.shape().layer_bytes;
  if (num_heads != 0 && !is_right) {
    throw std::invalid_argument("no codec takes blocks of such heads in layers of this pool's");
  }
  new (self) BlockClient(
      pool, {.connections_per_peer_max = std::max<uint32_t>(1, connections_per_peer_max),
             .socket_dir = socket_dir,
             .secret = to_secret(key, !remote.is_none()),
             .codecs = codecs,
             .remote = make_remote_reader(remote)});
}

void bind_client(nb::module_& m) {
  nb::class_<PullResult>(m, "PullResult")
      .def_ro("blocks_ok", &PullResult::blocks_ok)
      .def_ro("bytes_moved", &PullResult::bytes_moved)
      .def_prop_ro("error", [](const PullResult& result) { return code_name(result.error); })
      .def_ro("frames_bad", &PullResult::frames_bad)
      .def_ro("bytes_wire", &PullResult::bytes_wire)
      .def_prop_ro("wire_s", [](const PullResult& result) { return 1e-9 * result.wire_ns; })
      .def_ro("is_lossy", &PullResult::is_lossy)
      .def_prop_ro("transport",
                   [](const PullResult& result) { return transport_name(result.transport); });
  nb::class_<BlockClient>(m, "BlockClient")
      .def("__init__", &construct_client, "pool"_a, nb::kw_only(), "connections_per_peer_max"_a = 4,
           "socket_dir"_a = "", "key"_a = nb::bytes("", 0), "num_heads"_a = 0, "head_dim"_a = 0,
           "remote"_a = nb::none(), nb::keep_alive<1, 2>())
      .def("pull_session", &pull_session, nb::kw_only(), "host"_a, "port"_a, "uid"_a, "epoch"_a,
           "session_id"_a, "blocks"_a, "timeout_ms"_a, "cancel_id"_a = 0, "codec"_a = "raw")
      .def("pull_named", &pull_named, nb::kw_only(), "host"_a, "port"_a, "uid"_a, "epoch"_a,
           "names"_a, "blocks"_a, "timeout_ms"_a, "cancel_id"_a = 0, "codec"_a = "raw",
           "background"_a = false, "local"_a = true)
      .def("cancel", &BlockClient::cancel, "cancel_id"_a)
      .def("close", &BlockClient::close, nb::call_guard<nb::gil_scoped_release>());
}

void bind_checksums(nb::module_& m) {
  const auto bind = [&m](const char* name, uint32_t (*checksum)(const void*, size_t, uint32_t)) {
    m.def(
        name,
        [checksum](const nb::bytes& data, uint32_t seed) {
          return checksum(data.data(), data.size(), seed);
        },
        "data"_a, "seed"_a = 0);
  };
  bind("crc32c", crc32c);
  m.def(
      "crc32c",
      [](const nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& data) {
        const nb::gil_scoped_release no_gil;
        return crc32c(data.data(), data.size());
      },
      "data"_a.noconvert());
  bind("crc32c_reference", crc32c_reference);
  m.def(
      "crc32c_copy",
      [](const nb::bytes& data) {
        std::string copy(data.size(), '\0');
        const uint32_t checksum = crc32c_copy(copy.data(), data.data(), data.size());
        return nb::make_tuple(checksum, nb::bytes(copy.data(), copy.size()));
      },
      "data"_a);
}

nb::list chain_names(const nb::bytes& parent, const nb::bytes& data, int64_t block_bytes) {
  if (block_bytes < 1) throw std::invalid_argument("block_bytes must be positive");
  const Name first = to_name(parent, "parent");
  const auto* bytes = static_cast<const uint8_t*>(data.data());
  const size_t step = static_cast<size_t>(block_bytes);
  std::vector<Name> names(data.size() / step);
  {
    nb::gil_scoped_release unlocked;
    const Name* before = &first;
    for (size_t i = 0; i < names.size(); ++i) {
      name_block(before->data(), {bytes + i * step, step}, names[i].data());
      before = &names[i];
    }
  }
  nb::list out;
  for (const Name& name : names) out.append(nb::bytes(name.data(), kNameBytes));
  return out;
}

void bind_names(nb::module_& m) {
  m.def("chain_names", &chain_names, "parent"_a, "data"_a, "block_bytes"_a);
}

}  // namespace
}  // namespace kvasir

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // the pool outlives the interpreter where a thread still holds it
  kvasir::bind_pool(m);
  kvasir::bind_server(m);
  kvasir::bind_client(m);
  kvasir::bind_checksums(m);
  kvasir::bind_names(m);
  kvasir::bind_codecs(m);
}
