// Messages of the data plane, as they lie on the wire (little-endian, no padding).
//
//   client                                server
//   Hello (layout, uid, epoch)      ->
//                                   <-    HelloReply (code; not kOk: the server closes)
//   Request named + names           ->
//                                   <-    Frame data* | miss* ..., Frame end
//   Request acknowledge             ->    (if the end says that the blocks are held until then)
//   Request session                 ->
//                                   <-    Frame data* as layers become final, Frame end
//   Request acknowledge             ->    (all blocks are verified: the source may let go)
//   Request used + names            ->    (over a local socket: these were looked for in the
//   memory)
//
// Over a local socket the server's kOk is followed by the descriptor of its pool, and frames have
// no payload: they say where in the pool it lies. A client whose transfer library reads the pool
// from afar says so in its Hello, and gets a RemoteOffer and such frames; it acknowledges named
// blocks, too, which stay where they are until then.
//
// With a key, the greeting is longer (handshake.h), and every message after it is sealed: names and
// payloads are encrypted, headers are authenticated, and a tag of 16 bytes follows. It takes the
// place of the payload's checksum.
//
// Every header ends in a CRC-32C of its own. A frame's header holds its payload's CRC-32C, so
// the header is trusted before the payload lands anywhere, and a payload cannot change frames.
#pragma once

#include <bit>
#include <cstdint>

#include "name.h"

namespace kvasir {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

inline constexpr uint32_t kMagic = 0x5256534b;  // "KSVR"
inline constexpr uint16_t kVersion = 5;
inline constexpr uint32_t kNamesMax = 16384;             // per request
inline constexpr size_t kFramePayloadBytes = 256 << 10;  // aim: stays in the L2 cache

// Why a pull ended early. The values are on the wire.
enum class Code : uint16_t {
  kOk = 0,
  kStalePeer = 1,
  kOtherLayout = 2,
  kTimeout = 3,
  kRefused = 4,
  kAborted = 5,
  kBadFrame = 6,
  kCancelled = 7,
  kUnreachable = 8,
  kUnauthenticated = 9,
  kOtherTransport = 10,   // the client reads from afar, and the server's pool cannot be
  kTransportFailed = 11,  // of the library that reads from afar; never on the wire
};

// "" for kOk.
const char* code_name(Code code);

// One life of one process.
struct Identity {
  Name uid;
  uint64_t epoch;
};

// kExtra: one more for a large pull, which the server refuses before others need the room. kRemote:
// payloads are read from afar.
enum class LinkKind : uint8_t { kUsual = 0, kRemote = 1, kExtra = 2 };

struct Hello {
  uint32_t magic;
  uint16_t version;
  uint8_t is_secured;  // the client's nonce follows
  LinkKind kind;
  Name layout_digest;
  Name uid;  // (uid, epoch): the life of the process that the client means to talk to
  uint64_t epoch;
  uint32_t num_layers;
  uint32_t layer_bytes;
  uint16_t num_heads;  // with head_dim, what codecs must know of the layout; 0: it takes raw only
  uint16_t head_dim;
  uint32_t crc;
};
static_assert(sizeof(Hello) == 64);

struct HelloReply {
  uint32_t magic;
  uint16_t version;
  Code code;
  Name uid;
  uint64_t epoch;
  uint32_t reserved;
  uint32_t crc;
};
static_assert(sizeof(HelloReply) == 40);

// How a pool is read from afar; what the transfer library must know of the peer follows.
struct RemoteOffer {
  uint32_t magic;
  uint16_t version;
  uint16_t reserved;
  uint64_t address;  // of the pool
  uint32_t num_blocks;
  uint32_t agent_bytes;
  uint32_t agent_crc;
  uint32_t crc;
};
static_assert(sizeof(RemoteOffer) == 32);

// How a payload is encoded. kShared: it is not there, but in the peer's memory.
enum class Codec : uint8_t { kRaw = 0, kShared = 1, kInt8 = 2, kInt4 = 3, kEntropy = 4 };

enum class RequestType : uint8_t {
  kNamed = 1,
  kSession = 2,
  kAcknowledge = 3,
  kUsed = 4,
  kBackground = 5,  // kNamed for nobody who waits: it lets the others pass
};

inline bool has_names(RequestType type) {
  return type == RequestType::kNamed || type == RequestType::kUsed ||
         type == RequestType::kBackground;
}

struct Request {
  uint32_t magic;
  uint16_t version;
  RequestType type;
  Codec codec;          // of payloads over TCP; what it does not take travels raw all the same
  uint64_t request_id;  // repeated in every frame of the answer
  uint64_t session_id;
  uint32_t count;  // names that follow, or blocks that the client has room for
  uint32_t timeout_ms;
  uint32_t body_crc;  // of the names
  uint16_t stripe;    // named: which frames are asked for (stripe.h)
  uint16_t num_stripes;
  uint32_t reserved;
  uint32_t crc;
};
static_assert(sizeof(Request) == 48);

enum class FrameKind : uint8_t { kData = 1, kMiss = 2, kEnd = 3 };
struct Frame {
  uint32_t magic;
  uint16_t version;
  FrameKind kind;
  Codec codec;
  uint32_t ordinal;       // of the block within the request; kEnd: number of blocks
  uint32_t source_block;  // kShared: of the server's pool
  uint16_t layer_first;
  uint16_t layer_count;
  uint16_t is_held;  // kEnd: the server holds the blocks as they are until all is acknowledged
  Code code;         // kEnd: kOk, or why it ended early
  uint64_t payload_bytes;
  uint64_t request_id;
  Name name;  // the block's name, or the session's id
  uint32_t payload_crc;
  uint32_t crc;
};
static_assert(sizeof(Frame) == 64);

// Fills magic, version and, last, the checksum.
template <typename Message>
void seal(Message& message);
// Whether magic, version and checksum are right.
template <typename Message>
bool is_intact(const Message& message);

Name session_name(uint64_t session_id);

}  // namespace kvasir
