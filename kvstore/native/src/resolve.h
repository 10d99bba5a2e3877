// Host names to addresses, with a deadline that the system's resolver does not offer.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include "stream.h"

namespace kvasir {

struct Endpoint {
  sockaddr_storage address;
  socklen_t size;
};

// Empty if the name does not resolve in time. `passive`: for listening.
std::vector<Endpoint> resolve(const std::string& host, uint16_t port, bool passive,
                              Deadline deadline, const Signal* ended);

}  // namespace kvasir
