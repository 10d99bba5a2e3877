// Binds the native data plane to Python: checks arguments and releases the GIL, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "pool.h"

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

void construct_pool(BlockPool* self, int64_t num_blocks, int64_t num_layers, int64_t layer_bytes,
                    const nb::bytes& layout_digest) {
  const auto check = [](int64_t value, int64_t max, const char* what) {
    if (value < 1 || value > max) {
      throw std::invalid_argument(std::string(what) + " must be from 1 to " + std::to_string(max) +
                                  ", not " + std::to_string(value));
    }
    return static_cast<uint32_t>(value);
  };
  new (self) BlockPool({.num_blocks = check(num_blocks, INT32_MAX, "num_blocks"),
                        .num_layers = check(num_layers, 4096, "num_layers"),
                        .layer_bytes = check(layer_bytes, 1 << 28, "layer_bytes"),
                        .layout_digest = to_name(layout_digest, "layout_digest")});
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

Words pool_progress(nb::handle self) {
  return Words(nb::cast<const BlockPool&>(self).progress(), {1}, self);
}

nb::bytes pool_digest(const BlockPool& pool) {
  return nb::bytes(pool.shape().layout_digest.data(), kNameBytes);
}

void bind_pool(nb::module_& m) {
  nb::class_<BlockPool>(m, "BlockPool")
      .def("__init__", &construct_pool, nb::kw_only(), "num_blocks"_a, "num_layers"_a,
           "layer_bytes"_a, "layout_digest"_a)
      .def_prop_ro("data", &pool_data)
      .def_prop_ro("ready", &pool_ready)
      .def_prop_ro("progress", &pool_progress)
      .def_prop_ro("num_blocks", [](const BlockPool& p) { return p.shape().num_blocks; })
      .def_prop_ro("num_layers", [](const BlockPool& p) { return p.shape().num_layers; })
      .def_prop_ro("layer_bytes", [](const BlockPool& p) { return p.shape().layer_bytes; })
      .def_prop_ro("layout_digest", &pool_digest)
      .def_prop_ro("num_published", &BlockPool::num_published)
      .def_prop_ro("num_sessions", &BlockPool::num_sessions)
      .def("reset", &BlockPool::reset, "block"_a)
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

}  // namespace
}  // namespace kvasir

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // the pool outlives the interpreter where a thread still holds it
  kvasir::bind_pool(m);
}
