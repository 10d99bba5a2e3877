#include "handshake.h"

#include <memory>

namespace kvasir {
namespace {

struct ServerProof {
  Key nonce;
  Key proof;
};

}  // namespace

Code prove_as_client(Stream& stream, const std::string& secret, const Greeting& greeting,
                     Deadline deadline, const Signal* ended) {
  ServerProof theirs;
  const Code code = stream.recv_all(&theirs, sizeof theirs, deadline, ended);
  if (code != Code::kOk) return code;
  const SessionKeys keys =
      derive_keys(secret, greeting.client_nonce, theirs.nonce, greeting.hello, greeting.reply);
  if (!are_equal(theirs.proof, keys.server_proof)) return Code::kUnauthenticated;
  stream.secure(std::make_shared<SecureChannel>(keys.client_key, keys.server_key));
  return stream.send_all(&keys.client_proof, sizeof keys.client_proof, deadline, ended);
}

Code prove_as_server(Stream& stream, const std::string& secret, const Greeting& greeting,
                     Deadline deadline, const Signal* ended) {
  ServerProof ours{.nonce = random_key(), .proof = {}};
  const SessionKeys keys =
      derive_keys(secret, greeting.client_nonce, ours.nonce, greeting.hello, greeting.reply);
  ours.proof = keys.server_proof;
  Key theirs;
  Code code = stream.send_all(&ours, sizeof ours, deadline, ended);
  if (code == Code::kOk) code = stream.recv_all(&theirs, sizeof theirs, deadline, ended);
  // A client to which our proof is wrong goes away without a word.
  if (code == Code::kUnreachable) return Code::kUnauthenticated;
  if (code == Code::kOk && !are_equal(theirs, keys.client_proof)) return Code::kUnauthenticated;
  if (code == Code::kOk) {
    stream.secure(std::make_shared<SecureChannel>(keys.server_key, keys.client_key));
  }
  return code;
}

}  // namespace kvasir
