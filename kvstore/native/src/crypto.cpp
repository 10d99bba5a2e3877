#include "crypto.h"

#include <dlfcn.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <stdexcept>
#include <system_error>
#include <vector>

namespace kvasir {
namespace {

// NIST SP 800-38D allows far more for counters as nonces; a new connection costs a millisecond.
constexpr uint64_t kWornBytes = uint64_t{1} << 36;
constexpr uint64_t kWornMessages = uint64_t{1} << 31;

// The part of libcrypto's stable interface (1.1 and 3) that is used here; see evp.h and hmac.h.
struct Library {
  using Context = void;
  using Cipher = const void;
  using Digest = const void;
  static constexpr int kGetTag = 0x10;
  static constexpr int kSetTag = 0x11;

  Context* (*context_new)();
  void (*context_free)(Context*);
  int (*init)(Context*, Cipher*, void* engine, const uint8_t* key, const uint8_t* nonce, int seals);
  int (*update)(Context*, uint8_t* target, int* written, const uint8_t* source, int size);
  int (*finish)(Context*, uint8_t* target, int* written);
  int (*control)(Context*, int type, int size, void* data);
  Cipher* (*aes_128_gcm)();
  Digest* (*sha256)();
  uint8_t* (*hmac)(Digest*, const void* key, int key_size, const uint8_t* data, size_t size,
                   uint8_t* result, unsigned int* result_size);
};

template <typename Function>
void find(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) throw std::runtime_error(std::string("libcrypto lacks ") + name);
}

Library load() {
  void* handle = nullptr;
  for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"}) {
    handle = handle != nullptr ? handle : dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (handle == nullptr) {
    throw std::runtime_error(
        "encrypted KV transfer needs OpenSSL's libcrypto.so.3 (Debian: libssl3): " +
        std::string(dlerror()));
  }
  Library library;
  find(handle, "EVP_CIPHER_CTX_new", library.context_new);
  find(handle, "EVP_CIPHER_CTX_free", library.context_free);
  find(handle, "EVP_CipherInit_ex", library.init);
  find(handle, "EVP_CipherUpdate", library.update);
  find(handle, "EVP_CipherFinal_ex", library.finish);
  find(handle, "EVP_CIPHER_CTX_ctrl", library.control);
  find(handle, "EVP_aes_128_gcm", library.aes_128_gcm);
  find(handle, "EVP_sha256", library.sha256);
  find(handle, "HMAC", library.hmac);
  return library;
}

const Library& library() {
  static const Library loaded = load();  // tried again by the next call if it throws
  return loaded;
}

Key hmac(std::span<const uint8_t> key, std::span<const uint8_t> data) {
  Key result;
  unsigned int size = 0;
  if (library().hmac(library().sha256(), key.data(), static_cast<int>(key.size()), data.data(),
                     data.size(), result.data(), &size) == nullptr ||
      size != result.size()) {
    throw std::runtime_error("libcrypto: HMAC failed");
  }
  return result;
}

void append(std::vector<uint8_t>& target, std::span<const uint8_t> bytes) {
  target.insert(target.end(), bytes.begin(), bytes.end());
}

}  // namespace

void require_crypto() { library(); }

Key random_key() {
  Key key;
  for (size_t done = 0; done < key.size();) {
    const ssize_t count = getrandom(key.data() + done, key.size() - done, 0);
    if (count < 0 && errno != EINTR) {
      throw std::system_error(errno, std::generic_category(), "getrandom");
    }
    done += static_cast<size_t>(std::max<ssize_t>(count, 0));
  }
  return key;
}

bool are_equal(const Key& a, const Key& b) {
  volatile uint8_t difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference = difference | (a[i] ^ b[i]);
  return difference == 0;
}

SessionKeys derive_keys(const std::string& secret, const Key& client_nonce, const Key& server_nonce,
                        const Hello& hello, const HelloReply& reply) {
  std::vector<uint8_t> salt;
  append(salt, client_nonce);
  append(salt, server_nonce);
  const Key extracted =
      hmac(salt, {reinterpret_cast<const uint8_t*>(secret.data()), secret.size()});
  const auto expand = [&](const char* label) {
    std::vector<uint8_t> info;
    append(info, {reinterpret_cast<const uint8_t*>(label), std::strlen(label) + 1});
    append(info, as_bytes(hello));
    append(info, as_bytes(reply));
    info.push_back(1);  // the first and only block of the expansion
    return hmac(extracted, info);
  };
  return {.client_proof = expand("kvasir kv 2 client proof"),
          .server_proof = expand("kvasir kv 2 server proof"),
          .client_key = expand("kvasir kv 2 client key"),
          .server_key = expand("kvasir kv 2 server key")};
}

Aead::Aead(const Key& derived, bool seals) : seals_(seals), context_(library().context_new()) {
  constexpr size_t kKeyBytes = 16;
  static_assert(kKeyBytes + sizeof mask_ <= sizeof derived);
  std::memcpy(mask_.data(), derived.data() + kKeyBytes, sizeof mask_);
  const Library& crypto = library();
  if (context_ == nullptr ||
      crypto.init(context_, crypto.aes_128_gcm(), nullptr, derived.data(), nullptr, seals) != 1) {
    throw std::runtime_error("libcrypto: AES-128-GCM is not available");
  }
}

Aead::~Aead() { library().context_free(context_); }

bool Aead::is_worn() const { return num_bytes_ > kWornBytes || num_messages_ > kWornMessages; }

bool Aead::begin(std::span<const uint8_t> header) {
  if (num_bytes_ > 2 * kWornBytes || num_messages_ > 2 * kWornMessages) return false;
  std::array<uint8_t, 12> nonce = mask_;
  uint64_t counter;
  std::memcpy(&counter, nonce.data(), sizeof counter);
  counter ^= num_messages_++;
  std::memcpy(nonce.data(), &counter, sizeof counter);
  const Library& crypto = library();
  int written = 0;
  return crypto.init(context_, nullptr, nullptr, nullptr, nonce.data(), -1) == 1 &&
         crypto.update(context_, nullptr, &written, header.data(),
                       static_cast<int>(header.size())) == 1;
}

bool Aead::update(const uint8_t* source, uint8_t* target, size_t size) {
  num_bytes_ += size;
  while (size > 0) {
    const int step = static_cast<int>(std::min<size_t>(size, INT_MAX / 2));
    int written = 0;
    if (library().update(context_, target, &written, source, step) != 1) return false;
    source += step;
    target += step;
    size -= static_cast<size_t>(step);
  }
  return true;
}

bool Aead::finish(Tag& tag) {
  const Library& crypto = library();
  const int tag_bytes = static_cast<int>(tag.size());
  const auto exchange = [&](int type) {
    return crypto.control(context_, type, tag_bytes, tag.data()) == 1;
  };
  uint8_t rest[16];  // GCM leaves none
  int written = 0;
  if (!seals_ && !exchange(Library::kSetTag)) return false;
  if (crypto.finish(context_, rest, &written) != 1) return false;
  return !seals_ || exchange(Library::kGetTag);
}

bool Aead::run(std::span<const uint8_t> header, const uint8_t* source, uint8_t* target, size_t size,
               Tag& tag) {
  return begin(header) && update(source, target, size) && finish(tag);
}

}  // namespace kvasir
