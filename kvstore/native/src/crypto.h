// Authenticated encryption of a connection whose two ends hold the same key.
//
// AES-128-GCM, HMAC and HKDF come from OpenSSL's libcrypto, which is loaded when a key is first
// used: building and running without a key needs neither its headers nor the library.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "wire.h"

namespace kvasir {

using Key = std::array<uint8_t, 32>;  // also digests and nonces of the handshake
using Tag = std::array<uint8_t, 16>;

inline constexpr size_t kSecretBytesMin = 32;

// Throws std::runtime_error, which says what is missing, if libcrypto cannot be loaded.
void require_crypto();

Key random_key();
bool are_equal(const Key& a, const Key& b);  // in constant time

// What both ends derive from the shared secret, their fresh nonces and what they said before (HKDF,
// RFC 5869): a change of any of it, the layout and the lives of both included, changes all of it.
struct SessionKeys {
  Key client_proof;
  Key server_proof;
  Key client_key;
  Key server_key;
};
SessionKeys derive_keys(const std::string& secret, const Key& client_nonce, const Key& server_nonce,
                        const Hello& hello, const HelloReply& reply);

// One direction of one connection. The nonce is a counter, masked with bytes of the derived key as
// TLS 1.3 does: a message that is lost, repeated or moved fails like one that was changed.
class Aead {
 public:
  Aead(const Key& derived, bool seals);
  ~Aead();
  Aead(const Aead&) = delete;
  Aead& operator=(const Aead&) = delete;

  // One message: its header, which is authenticated, then its payload in pieces, which are
  // encrypted or decrypted (in place if target == source), then its tag, which sealing fills in.
  // What was decrypted counts only once finish() has said so. False: opening with this tag failed,
  // or the key is worn out.
  bool begin(std::span<const uint8_t> header);
  bool update(const uint8_t* source, uint8_t* target, size_t size);
  bool finish(Tag& tag);
  bool run(std::span<const uint8_t> header, const uint8_t* source, uint8_t* target, size_t size,
           Tag& tag);
  // Time for another connection, which has fresh keys.
  bool is_worn() const;

 private:
  const bool seals_;
  std::array<uint8_t, 12> mask_;  // the length that GCM takes unasked
  void* context_;
  uint64_t num_messages_ = 0;
  uint64_t num_bytes_ = 0;
};

struct SecureChannel {
  SecureChannel(const Key& sending_key, const Key& receiving_key)
      : sending(sending_key, true), receiving(receiving_key, false) {}
  bool is_worn() const { return sending.is_worn() || receiving.is_worn(); }
  Aead sending;
  Aead receiving;
  std::vector<uint8_t> outgoing;  // pieces of payloads, encrypted; kept for the next answer
};

template <typename Message>
std::span<const uint8_t> as_bytes(const Message& message) {
  return {reinterpret_cast<const uint8_t*>(&message), sizeof message};
}

}  // namespace kvasir
