#include "remote.h"

#include "crc32c.h"

namespace kvasir {

Code send_remote_pool(const Stream& stream, const RemotePool& pool, Deadline deadline,
                      const Signal* ended) {
  RemoteOffer offer{};
  offer.address = pool.address;
  offer.num_blocks = pool.num_blocks;
  offer.agent_bytes = static_cast<uint32_t>(pool.agent.size());
  offer.agent_crc = crc32c(pool.agent.data(), pool.agent.size());
  seal(offer);
  iovec parts[2] = {
      {.iov_base = &offer, .iov_len = sizeof offer},
      {.iov_base = const_cast<char*>(pool.agent.data()), .iov_len = pool.agent.size()},
  };
  return stream.send_all(parts, 2, deadline, ended);
}

Code recv_remote_pool(const Stream& stream, RemotePool& pool, Deadline deadline,
                      const Signal* ended) {
  RemoteOffer offer;
  Code code = stream.recv_all(&offer, sizeof offer, deadline, ended);
  if (code != Code::kOk) return code;
  if (!is_intact(offer) || offer.agent_bytes > kAgentBytesMax) return Code::kRefused;
  pool.address = offer.address;
  pool.num_blocks = offer.num_blocks;
  pool.agent.resize(offer.agent_bytes);
  code = stream.recv_all(pool.agent.data(), pool.agent.size(), deadline, ended);
  if (code != Code::kOk) return code;
  const bool is_right = crc32c(pool.agent.data(), pool.agent.size()) == offer.agent_crc;
  return is_right ? Code::kOk : Code::kRefused;
}

}  // namespace kvasir
