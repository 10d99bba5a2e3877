// How two ends that hold the same secret prove it to one another and begin to encrypt.
//
//   client                                   server
//   Hello (secured) + nonce            ->
//                                      <-    HelloReply + nonce + proof
//   proof                              ->
//
// A proof is made of the secret, both nonces and both greetings, so it is of this connection only.
#pragma once

#include <string>

#include "crypto.h"
#include "stream.h"

namespace kvasir {

struct Greeting {
  Hello hello;
  HelloReply reply;
  Key client_nonce;
};

// The last two steps, one for each side; kUnauthenticated if the other's proof is wrong. The stream
// encrypts from then on.
Code prove_as_client(Stream& stream, const std::string& secret, const Greeting& greeting,
                     Deadline deadline, const Signal* ended);
Code prove_as_server(Stream& stream, const std::string& secret, const Greeting& greeting,
                     Deadline deadline, const Signal* ended);

}  // namespace kvasir
