// Binds the codecs to Python: for the quality probe, measurements and tests.
#include "codec_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "codec.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvasir {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

CodecShape to_shape(uint32_t num_heads, uint32_t head_dim) {
  const CodecShape shape{.num_heads = num_heads, .head_dim = head_dim};
  if (!shape.is_encodable()) {
    throw std::invalid_argument("head_dim must be a multiple of 32 up to 1024, of 1 to 4096 heads");
  }
  return shape;
}

uint32_t layers_of(const CodecShape& shape, size_t size, const void* data) {
  const size_t layers = size / shape.layer_bytes();
  if (layers < 1 || layers > 4096 || size % shape.layer_bytes() != 0 ||
      reinterpret_cast<uintptr_t>(data) % alignof(uint16_t) != 0) {
    throw std::invalid_argument("the data must be whole layers, of " +
                                std::to_string(shape.layer_bytes()) + " bytes each");
  }
  return static_cast<uint32_t>(layers);
}

size_t codec_encode(const std::string& name, const ConstBytes& source, const Bytes& target,
                    uint32_t num_heads, uint32_t head_dim, uint32_t layer_first,
                    uint32_t layers_total) {
  const Codec codec = codec_of(name);
  const CodecShape shape = to_shape(num_heads, head_dim);
  const uint32_t count = layers_of(shape, source.size(), source.data());
  if (codec == Codec::kRaw) throw std::invalid_argument("raw is not encoded");
  if (target.size() < encoded_bytes_max(codec, shape, count)) {
    throw std::invalid_argument("the target is shorter than codec_bytes_max()");
  }
  const LayerRun run{.first = layer_first,
                     .count = count,
                     .total = layers_total > 0 ? layers_total : layer_first + count};
  const nb::gil_scoped_release unlocked;
  return encode(codec, shape, run, source.data(), {target.data(), target.size()});
}

const char* codec_decode(const ConstBytes& source, const Bytes& target, uint32_t num_heads,
                         uint32_t head_dim) {
  const CodecShape shape = to_shape(num_heads, head_dim);
  const uint32_t count = layers_of(shape, target.size(), target.data());
  const nb::gil_scoped_release unlocked;
  return fault_name(decode(shape, count, {source.data(), source.size()}, target.data()));
}

size_t codec_bytes_max(const std::string& name, uint32_t num_heads, uint32_t head_dim,
                       uint32_t num_layers) {
  return encoded_bytes_max(codec_of(name), to_shape(num_heads, head_dim), num_layers);
}

}  // namespace

void bind_codecs(nb::module_& m) {
  m.attr("CODEC_VERSION") = kCodecVersion;
  m.def("codec_encode", &codec_encode, "codec"_a, "source"_a, "target"_a, nb::kw_only(),
        "num_heads"_a, "head_dim"_a, "layer_first"_a = 0, "layers_total"_a = 0);
  m.def("codec_decode", &codec_decode, "source"_a, "target"_a, nb::kw_only(), "num_heads"_a,
        "head_dim"_a);
  m.def("codec_bytes_max", &codec_bytes_max, "codec"_a, nb::kw_only(), "num_heads"_a, "head_dim"_a,
        "num_layers"_a);
  m.def("codec_paths", &codec_paths);
  m.def("use_codec_path", &use_codec_path, "name"_a);
}

}  // namespace kvasir
