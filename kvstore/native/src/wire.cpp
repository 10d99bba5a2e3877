#include "wire.h"

#include <cstddef>

#include "crc32c.h"

namespace kvasir {

const char* code_name(Code code) {
  switch (code) {
    case Code::kOk:
      return "";
    case Code::kStalePeer:
      return "stale_peer";
    case Code::kOtherLayout:
      return "other_layout";
    case Code::kTimeout:
      return "timeout";
    case Code::kRefused:
      return "refused";
    case Code::kAborted:
      return "aborted";
    case Code::kBadFrame:
      return "bad_frame";
    case Code::kCancelled:
      return "cancelled";
    case Code::kUnreachable:
      return "unreachable";
    case Code::kUnauthenticated:
      return "unauthenticated";
    case Code::kOtherTransport:
      return "other_transport";
    case Code::kTransportFailed:
      return "transport_failed";
  }
  return "refused";  // a code of a later version
}

template <typename Message>
void seal(Message& message) {
  message.magic = kMagic;
  message.version = kVersion;
  message.crc = crc32c(&message, offsetof(Message, crc));
}

template <typename Message>
bool is_intact(const Message& message) {
  return message.magic == kMagic && message.version == kVersion &&
         message.crc == crc32c(&message, offsetof(Message, crc));
}

template void seal(Hello&);
template void seal(HelloReply&);
template void seal(RemoteOffer&);
template void seal(Request&);
template void seal(Frame&);
template bool is_intact(const Hello&);
template bool is_intact(const HelloReply&);
template bool is_intact(const RemoteOffer&);
template bool is_intact(const Request&);
template bool is_intact(const Frame&);

Name session_name(uint64_t session_id) {
  Name name{};
  std::memcpy(name.data(), &session_id, sizeof session_id);
  return name;
}

}  // namespace kvasir
