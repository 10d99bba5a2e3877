// Codecs of KV on its way: some layers of one block, as the engine lays them out in bfloat16,
// become fewer bytes and come back nearly the same (docs/kv-codecs.md).
//
//   CodecHeader | payload, per layer, K or V, and head ("section": 32 * head_dim values):
//     int8     32 scales (of tokens)              | codes, rows in pairs, a byte each
//     int4     head_dim minima, head_dim steps    | codes, groups in fours, four to a word
//     entropy  a step, head_dim centres + tables  | at the end: one rANS stream of all sections
//              and head_dim shifts of the step    |
//
// A group of 32 is a channel of K over the tokens, or 32 channels of a token's V (KIVI's axes): in
// a block both are 64 bytes side by side. All paths of the CPU give the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "wire.h"

namespace kvasir {

inline constexpr uint16_t kCodecVersion = 1;
inline constexpr size_t kBlockTokens = 32;

// What a codec must know of a block's layout: [layer][K|V][head][32 * head_dim], bfloat16.
struct CodecShape {
  uint32_t num_heads = 0;
  uint32_t head_dim = 0;

  size_t section_values() const { return kBlockTokens * head_dim; }
  size_t layer_bytes() const { return 2 * num_heads * section_values() * sizeof(uint16_t); }
  // Others travel raw.
  bool is_encodable() const {
    return num_heads >= 1 && num_heads <= 4096 && head_dim >= 32 && head_dim <= 1024 &&
           head_dim % 32 == 0;
  }
};

// Which of the model's layers: early ones are quantised more finely by kEntropy.
struct LayerRun {
  uint32_t first;
  uint32_t count;
  uint32_t total;
};

struct CodecHeader {
  uint32_t magic;
  uint16_t version;
  uint8_t codec;
  uint8_t is_checked;  // 0: whoever carries it has a checksum of its own
  uint32_t num_heads;
  uint32_t head_dim;
  uint32_t num_layers;
  uint32_t payload_bytes;
  uint32_t payload_crc;
  uint32_t crc;  // of all before
};
static_assert(sizeof(CodecHeader) == 32);

enum class CodecFault { kNone, kTruncated, kBadHeader, kOtherShape, kBadChecksum, kBadPayload };

const char* codec_name(Codec codec);
// kRaw, kInt8, kInt4 or kEntropy; throws std::invalid_argument.
Codec codec_of(const std::string& name);
bool is_lossy(Codec codec);

// Exact for kInt8 and kInt4, the most that it can be for kEntropy; header included.
size_t encoded_bytes_max(Codec codec, const CodecShape& shape, uint32_t num_layers);

// Encodes run.count layers that begin at `source`; returns the bytes written. 0: a value is not
// finite, or beyond 2^100, so these layers must travel raw. `target` holds encoded_bytes_max().
size_t encode(Codec codec, const CodecShape& shape, const LayerRun& run, const uint8_t* source,
              std::span<uint8_t> target, bool is_checked = true);

// Decodes into `num_layers` layers at `target`, of which nothing can be used if it fails.
CodecFault decode(const CodecShape& shape, uint32_t num_layers, std::span<const uint8_t> source,
                  uint8_t* target);

const char* fault_name(CodecFault fault);

// "scalar", "avx2", "avx512": those that run here, and which is used (by default the last).
std::vector<std::string> codec_paths();
// "": the default. For tests and measurements; throws std::invalid_argument.
void use_codec_path(const std::string& name);

}  // namespace kvasir
