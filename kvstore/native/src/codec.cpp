#include "codec.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "codec_entropy.h"
#include "codec_kernels.h"
#include "crc32c.h"

namespace kvasir {
namespace {

constexpr uint32_t kCodecMagic = 0x43564b52;  // "RKVC"
constexpr uint32_t kLayersMax = 4096;

struct Path {
  const char* name;
  bool is_runnable;
  const CodecKernels& (*kernels)();
};

std::vector<Path> all_paths() {
  std::vector<Path> paths = {{"scalar", true, scalar_codec_kernels}};
#ifdef KVASIR_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  paths.push_back({"avx2", has_avx2, avx2_codec_kernels});
  paths.push_back({"avx512", has_avx512, avx512_codec_kernels});
#endif
  std::erase_if(paths, [](const Path& path) { return !path.is_runnable; });
  return paths;
}

std::atomic<const CodecKernels*>& chosen() {
  static std::atomic<const CodecKernels*> kernels = &all_paths().back().kernels();
  return kernels;
}

// Of one section, encoded.
size_t section_bytes(Codec codec, const CodecShape& shape) {
  if (codec == Codec::kInt8) return 2 * kBlockTokens + shape.section_values();
  return 4 * shape.head_dim + shape.section_values() / 2;
}

size_t encode_sections(Codec codec, const CodecKernels& kernels, const CodecShape& shape,
                       uint32_t num_layers, const uint16_t* source, uint8_t* target) {
  const size_t sections = size_t{2} * num_layers * shape.num_heads;
  const size_t step = section_bytes(codec, shape);
  for (size_t i = 0; i < sections; ++i) {
    const uint16_t* const section = source + i * shape.section_values();
    const bool is_key = i / shape.num_heads % 2 == 0;
    const bool is_right =
        codec == Codec::kInt8
            ? kernels.int8_encode(section, shape.head_dim, is_key, target + i * step)
            : kernels.int4_encode(section, shape.head_dim, target + i * step);
    if (!is_right) return 0;
  }
  return sections * step;
}

bool decode_sections(Codec codec, const CodecKernels& kernels, const CodecShape& shape,
                     uint32_t num_layers, std::span<const uint8_t> source, uint16_t* target) {
  const size_t sections = size_t{2} * num_layers * shape.num_heads;
  const size_t step = section_bytes(codec, shape);
  if (source.size() != sections * step) return false;
  for (size_t i = 0; i < sections; ++i) {
    uint16_t* const section = target + i * shape.section_values();
    const bool is_key = i / shape.num_heads % 2 == 0;
    const uint8_t* const encoded = source.data() + i * step;
    const bool is_right = codec == Codec::kInt8
                              ? kernels.int8_decode(encoded, shape.head_dim, is_key, section)
                              : kernels.int4_decode(encoded, shape.head_dim, section);
    if (!is_right) return false;
  }
  return true;
}

}  // namespace

const char* codec_name(Codec codec) {
  switch (codec) {
    case Codec::kRaw:
      return "raw";
    case Codec::kShared:
      return "shared";
    case Codec::kInt8:
      return "int8";
    case Codec::kInt4:
      return "int4";
    case Codec::kEntropy:
      return "entropy";
  }
  return "unknown";
}

Codec codec_of(const std::string& name) {
  for (const Codec codec : {Codec::kRaw, Codec::kInt8, Codec::kInt4, Codec::kEntropy}) {
    if (name == codec_name(codec)) return codec;
  }
  throw std::invalid_argument("codec must be raw, int8, int4 or entropy, not '" + name + "'");
}

bool is_lossy(Codec codec) {
  return codec == Codec::kInt8 || codec == Codec::kInt4 || codec == Codec::kEntropy;
}

size_t encoded_bytes_max(Codec codec, const CodecShape& shape, uint32_t num_layers) {
  if (codec == Codec::kEntropy) return sizeof(CodecHeader) + entropy_bytes_max(shape, num_layers);
  return sizeof(CodecHeader) +
         size_t{2} * num_layers * shape.num_heads * section_bytes(codec, shape);
}

size_t encode(Codec codec, const CodecShape& shape, const LayerRun& run, const uint8_t* source,
              std::span<uint8_t> target, bool is_checked) {
  const CodecKernels& kernels = *chosen().load(std::memory_order_relaxed);
  const auto* values = reinterpret_cast<const uint16_t*>(source);
  uint8_t* const payload = target.data() + sizeof(CodecHeader);
  const size_t size = codec == Codec::kEntropy
                          ? entropy_encode(kernels, shape, run, values, payload)
                          : encode_sections(codec, kernels, shape, run.count, values, payload);
  if (size == 0) return 0;
  CodecHeader header{.magic = kCodecMagic,
                     .version = kCodecVersion,
                     .codec = static_cast<uint8_t>(codec),
                     .is_checked = is_checked,
                     .num_heads = shape.num_heads,
                     .head_dim = shape.head_dim,
                     .num_layers = run.count,
                     .payload_bytes = static_cast<uint32_t>(size),
                     .payload_crc = is_checked ? crc32c(payload, size) : 0,
                     .crc = 0};
  header.crc = crc32c(&header, offsetof(CodecHeader, crc));
  std::memcpy(target.data(), &header, sizeof header);
  return sizeof header + size;
}

CodecFault decode(const CodecShape& shape, uint32_t num_layers, std::span<const uint8_t> source,
                  uint8_t* target) {
  CodecHeader header;
  if (source.size() < sizeof header) return CodecFault::kTruncated;
  std::memcpy(&header, source.data(), sizeof header);
  const auto codec = static_cast<Codec>(header.codec);
  if (header.magic != kCodecMagic || header.version != kCodecVersion || !is_lossy(codec) ||
      header.crc != crc32c(&header, offsetof(CodecHeader, crc))) {
    return CodecFault::kBadHeader;
  }
  if (!shape.is_encodable() || header.num_heads != shape.num_heads ||
      header.head_dim != shape.head_dim || header.num_layers != num_layers ||
      num_layers > kLayersMax) {
    return CodecFault::kOtherShape;
  }
  const auto payload = source.subspan(sizeof header);
  if (payload.size() != header.payload_bytes) return CodecFault::kTruncated;
  if (header.is_checked && crc32c(payload.data(), payload.size()) != header.payload_crc) {
    return CodecFault::kBadChecksum;
  }
  const CodecKernels& kernels = *chosen().load(std::memory_order_relaxed);
  auto* values = reinterpret_cast<uint16_t*>(target);
  const bool is_right = codec == Codec::kEntropy
                            ? entropy_decode(kernels, shape, num_layers, payload, values)
                            : decode_sections(codec, kernels, shape, num_layers, payload, values);
  return is_right ? CodecFault::kNone : CodecFault::kBadPayload;
}

const char* fault_name(CodecFault fault) {
  constexpr std::array names = {
      "", "truncated", "bad_header", "other_shape", "bad_checksum", "bad_payload"};
  return names[static_cast<size_t>(fault)];
}

std::vector<std::string> codec_paths() {
  std::vector<std::string> names;
  for (const Path& path : all_paths()) names.emplace_back(path.name);
  return names;
}

void use_codec_path(const std::string& name) {
  const std::vector<Path> paths = all_paths();
  for (const Path& path : paths) {
    if (path.name == name) chosen() = &path.kernels();
    if (path.name == name) return;
  }
  if (!name.empty()) throw std::invalid_argument("no codec path '" + name + "' runs here");
  chosen() = &paths.back().kernels();
}

}  // namespace kvasir
