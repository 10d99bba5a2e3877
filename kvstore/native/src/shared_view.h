// Another process's pool, mapped read-only: where its bytes lie and how they are looked up.
#pragma once

#include <cstdint>

#include "directory.h"
#include "mapping.h"
#include "pool.h"

namespace kvasir {

class SharedView {
 public:
  // Throws std::runtime_error if the descriptor is not that of a pool of this shape.
  SharedView(int fd, const PoolShape& shape)
      : shape_(shape),
        memory_(Mapping::open_shared(fd, shape.shared_bytes())),
        directory_(memory_.data(), shape.num_blocks) {}

  const PoolShape& shape() const { return shape_; }
  const Directory& directory() const { return directory_; }
  const uint8_t* layer(uint32_t block, uint32_t layer) const {
    return memory_.data() + shape_.shared_data_offset() + block * shape_.block_bytes() +
           size_t{layer} * shape_.layer_bytes;
  }

 private:
  const PoolShape shape_;
  const Mapping memory_;
  const Directory directory_;
};

}  // namespace kvasir
